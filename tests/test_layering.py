"""Imports go down only, operators and priors never meet, and heavy packages wait for their use."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ncvsd_inverse"

# Lowest first; a unit may import the units of earlier rows, and itself.
LAYERS = [
    {"errors", "protocols", "files", "machine", "plain_data", "sources"},
    {"checks"},
    {"numerics"},
    {"schedules", "metrics", "images", "operators", "networks"},
    {"checkpoints"},
    {"priors"},
    {"sampling", "training", "evaluation"},
    {"tasks", "integrations"},
    {"cli"},
]
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}

# The loop meets operators through protocols, and the trainer knows no measurement.
STRANGERS = {
    "sampling": {"operators"},
    "priors": {"operators"},
    "training": {"operators", "metrics"},
}

# What takes a user's arguments may know more than what it calls.
DOORS = {"sampling/solve.py": {"operators.deepinv_physics"}}

HEAVY = {
    "accelerate",
    "deepinv",
    "diffusers",
    "jinja2",
    "kornia",
    "lpips",
    "matplotlib",
    "piq",
    "rich",
    "scipy",
    "torchvision",
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


def wrong_imports(module, source):
    """Return what a module imports of this package but must not."""
    unit = Path(module).parts[0].removesuffix(".py")
    found = {
        name.removeprefix("ncvsd_inverse.")
        for name in imported_modules(source)
        if name.startswith("ncvsd_inverse.")
    }
    targets = {name.split(".")[0] for name in found - DOORS.get(module, set())} - {unit}
    above = {name for name in targets if RANK.get(name, len(LAYERS)) >= RANK[unit]}
    return sorted(above | targets & STRANGERS.get(unit, set()))


def heavy_at_the_top(source):
    """Return the heavy packages that importing a module loads at once."""
    top = ast.Module(
        [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)],
        [],
    )
    return sorted(HEAVY & {name.split(".")[0] for name in imported_modules(ast.unparse(top))})


def public_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    return next(
        set(ast.literal_eval(node.value))
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )


def test_every_unit_has_a_layer():
    units = {Path(module).parts[0].removesuffix(".py") for module in MODULES} - {"__init__"}
    assert units == set(RANK)


def test_imports_go_down():
    wrong = {
        module: wrong_imports(module, (PACKAGE / module).read_text())
        for module in MODULES
        if module != "__init__.py"
    }
    for module in wrong:
        if module.startswith("cli/"):  # the command line calls the public API by its names
            wrong[module] = sorted(set(wrong[module]) - public_names())
    assert {module: names for module, names in wrong.items() if names} == {}


def test_heavy_packages_are_imported_where_they_are_used():
    heavy = {module: heavy_at_the_top((PACKAGE / module).read_text()) for module in MODULES}
    assert {module: names for module, names in heavy.items() if names} == {}


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("numerics.py", "from ncvsd_inverse.protocols import Prior", []),
        ("checks.py", "from ncvsd_inverse.numerics import draw_normal", ["numerics"]),
        ("operators/blur.py", "from ncvsd_inverse.priors.base import X", ["priors"]),
        ("priors/base.py", "import ncvsd_inverse.operators", ["operators"]),
        ("priors/base.py", "from ncvsd_inverse import operators", ["operators"]),
        ("networks/unet.py", "def f():\n    from ncvsd_inverse.schedules import x", ["schedules"]),
        ("training/losses.py", "from ncvsd_inverse.sampling.likelihood import X", ["sampling"]),
        ("sampling/solve.py", "from ncvsd_inverse import load_prior", ["load_prior"]),
        ("sampling/solve.py", "from ncvsd_inverse.operators.deepinv_physics import x", []),
        ("sampling/chains.py", "from ncvsd_inverse.operators.blur import x", ["operators"]),
    ],
)
def test_the_rule_itself(module, line, wrong):
    assert wrong_imports(module, line) == wrong
    assert heavy_at_the_top("import scipy.linalg\ndef f():\n    import piq") == ["scipy"]
