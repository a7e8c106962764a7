"""Imports go down only, operators and priors never meet, and heavy packages wait for their use."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ncvsd_inverse"

# Lowest first; a unit may import the units of earlier rows, and itself.
LAYERS = [
    {"errors", "protocols"},
    {"checks"},
    {"numerics"},
    {
        "schedules",
        "metrics",
        "images",
        "operators",
        "networks",
        "covariance",
        "unpickle",
        "physics",
    },
    {"settings", "priors", "likelihood", "conditioning", "linearised"},
    {"solver", "distill"},
    {"tasks", "tiles", "deepinv_models"},
    {"plots"},
    {"cli"},
]
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}

# The loop meets operators through protocols, and the trainer knows no measurement.
STRANGERS = {
    "settings": {"operators"},
    "likelihood": {"operators"},
    "conditioning": {"operators"},
    "priors": {"operators"},
    "solver": {"operators"},
    "distill": {"operators", "likelihood", "settings", "metrics"},
}

HEAVY = {
    "accelerate",
    "deepinv",
    "diffusers",
    "kornia",
    "lpips",
    "matplotlib",
    "piq",
    "rich",
    "scipy",
    "torchvision",
    "typer",
}
MODULES = sorted(
    path.relative_to(PACKAGE).as_posix()
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE / "operators").rglob("*.py")]
)


def imported_modules(source, parent="ncvsd_inverse"):
    """Return every absolute module that `source` imports, as often as it does."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            if node.module == parent:
                found += [f"{parent}.{alias.name}" for alias in node.names]
            else:
                found.append(node.module)
    return found


def wrong_imports(unit, source):
    """Return what a module of `unit` imports of this package but must not."""
    targets = {
        name.split(".")[1] for name in imported_modules(source) if name.startswith("ncvsd_inverse.")
    }
    return sorted(
        target
        for target in targets - {unit}
        if RANK.get(target, len(LAYERS)) >= RANK[unit] or target in STRANGERS.get(unit, set())
    )


def heavy_at_the_top(source):
    """Return the heavy packages that importing a module loads at once."""
    top = ast.Module(
        [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)],
        [],
    )
    return sorted(HEAVY & {name.split(".")[0] for name in imported_modules(ast.unparse(top))})


def test_every_unit_has_a_layer():
    units = {Path(module).parts[0].removesuffix(".py") for module in MODULES} - {"__init__"}
    assert units <= set(RANK)
    assert {"solver", "operators", "priors", "networks"} <= units


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__.py"])
def test_imports_go_down(module):
    unit = Path(module).parts[0].removesuffix(".py")
    source = (PACKAGE / module).read_text()
    if unit == "cli":
        # The command line calls the public API by the names of the package itself.
        public = ast.parse((PACKAGE / "__init__.py").read_text())
        names = next(
            ast.literal_eval(node.value)
            for node in public.body
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
        )
        assert not set(wrong_imports(unit, source)) - set(names)
    else:
        assert wrong_imports(unit, source) == []


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_where_they_are_used(module):
    allowed = {"typer"} if module == "cli.py" else set()
    assert not set(heavy_at_the_top((PACKAGE / module).read_text())) - allowed


@pytest.mark.parametrize(
    ("unit", "line", "wrong"),
    [
        ("numerics", "from ncvsd_inverse.protocols import Prior", []),
        ("checks", "from ncvsd_inverse.numerics import draw_normal", ["numerics"]),
        ("operators", "from ncvsd_inverse.priors.base import X", ["priors"]),
        ("priors", "import ncvsd_inverse.operators", ["operators"]),
        ("priors", "from ncvsd_inverse import operators", ["operators"]),
        ("networks", "def f():\n    from ncvsd_inverse.schedules import karras", ["schedules"]),
        ("distill", "from ncvsd_inverse.likelihood import X", ["likelihood"]),
        ("solver", "from ncvsd_inverse import load_prior", ["load_prior"]),
    ],
)
def test_the_rule_itself(unit, line, wrong):
    assert wrong_imports(unit, line) == wrong
    assert heavy_at_the_top("import scipy.linalg\ndef f():\n    import piq") == ["scipy"]
