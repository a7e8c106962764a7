import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ncvsd_inverse
from ncvsd_inverse import operators

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_of_the_tree_ships():
    folders = {file.parent for file in ROOT.glob("ncvsd_inverse/**/__init__.py")}
    folders.add(ROOT / "ncvsd_inverse" / "operators")  # a link, which glob does not follow
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_operators_are_one_folder_and_one_copy():
    link = ROOT / "ncvsd_inverse" / "operators"
    if (ROOT / "PKG-INFO").exists():
        pytest.skip("a source distribution has one folder, where the link is")
    assert link.is_symlink()
    assert link.readlink() == Path("../operators")
    assert ncvsd_inverse.operators is operators
    assert not [path for path in (ROOT / "operators").iterdir() if path.suffix not in {".py", ""}]
    bare = subprocess.run(
        [sys.executable, "-c", "import operators"], cwd=ROOT, capture_output=True, text=True
    )
    assert "import ncvsd_inverse.operators" in bare.stderr
    assert bare.returncode == 1


def test_a_checkout_without_links_says_so(tmp_path):
    package = tmp_path / "ncvsd_inverse"
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / "ncvsd_inverse" / "__init__.py").read_text())
    (package / "operators").write_text("../operators")
    done = subprocess.run(
        [sys.executable, "-c", "import ncvsd_inverse"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "lost its symbolic links" in done.stderr


def test_data_files_ship_with_their_sources():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["ncvsd_inverse"]
    for pattern in patterns:
        assert list((ROOT / "ncvsd_inverse").glob(pattern)), pattern
    assets = ROOT / "ncvsd_inverse" / "assets"
    sources = (assets / "README.md").read_text()
    for picture in assets.rglob("*.png"):
        assert f"`{picture.name}`" in sources


def test_project_facts_agree():
    assert PROJECT["project"]["version"] == ncvsd_inverse.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f'version: "{ncvsd_inverse.__version__}"' in citation
    assert f"{ncvsd_inverse.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    for file in PROJECT["project"]["license-files"]:
        assert (ROOT / file).is_file(), file
    module, function = PROJECT["project"]["scripts"]["ncvsd"].split(":")
    code = f"import {module} as m; assert callable(m.{function})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def pinned(file):
    """Return the versions of each package in a lock file."""
    found = {}
    for line in (ROOT / ".ci" / file).read_text().splitlines():
        name, version = line.partition(";")[0].split("==")
        found.setdefault(canonicalize_name(name), []).append(Version(version.strip()))
    return found


def test_ci_installs_versions_within_the_bounds_and_the_lowest_of_them():
    optional = PROJECT["project"]["optional-dependencies"]
    run = [
        PROJECT["project"]["dependencies"],
        *(optional[of] for of in ("train", "data", "latents")),
    ]
    locked, oldest = pinned("locked.txt"), pinned("oldest.txt")
    for texts in (*run, *optional.values()):
        for requirement in map(Requirement, texts):
            name = canonicalize_name(requirement.name)
            if name == "ncvsd-inverse":
                continue
            (bound,) = requirement.specifier  # each has a lower bound and nothing else
            assert bound.operator == ">=", requirement
            assert name in locked, f"{requirement}: run .ci/lock"
            assert all(version in requirement.specifier for version in locked[name]), requirement
            if texts in run:
                assert oldest[name] == [Version(bound.version)], f"{requirement}: run .ci/lock"


def test_public_names_are_there_and_load_late():
    code = (
        "import sys, ncvsd_inverse\n"
        "assert 'ncvsd_inverse.sampling.solve' not in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
        "assert all(getattr(ncvsd_inverse, name) is not None for name in ncvsd_inverse.__all__)\n"
        "assert sorted(ncvsd_inverse.__all__) == dir(ncvsd_inverse)\n"
        "heavy = {'lpips', 'piq', 'kornia', 'deepinv', 'matplotlib', 'torchvision', 'accelerate',"
        " 'diffusers', 'rich', 'scipy', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'solves'"):
        ncvsd_inverse.solves  # noqa: B018
