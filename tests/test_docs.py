"""The site: links, commands, examples and docstrings hold.

`pytest -m documented tests/test_docs.py` also runs every example and builds the site.
"""

import ast
import doctest
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import generate
import ncvsd_inverse
from ncvsd_inverse.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "generated"} & set(path.parts))
EXAMPLES = sorted((DOCS / "examples").glob("plot_*.py"))
OTHERS = {"deepinv", "matplotlib", "numpy", "PIL", "torch", *sys.stdlib_module_names}

WARNED = {"plot_04_deblur"}
"""Examples of what `solve` warns of."""


def names(paths):
    return [path.relative_to(DOCS).as_posix() for path in paths]


pages = pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
examples = pytest.mark.parametrize("script", EXAMPLES, ids=[path.stem for path in EXAMPLES])


# Links.


def exists(target, page):
    """Tell whether a page or picture that a Markdown page names is there, or will be made."""
    path = (DOCS / target[1:]) if target.startswith("/") else (page.parent / target)
    place = Path(os.path.normpath(path)).relative_to(ROOT).as_posix()
    if match := re.fullmatch(
        r"docs/gallery/(?:images/sphx_glr_)?(plot_\w+?)(?:_\d{3}\.png)?", place
    ):
        return (DOCS / "examples" / f"{match[1]}.py").is_file()
    if place == "docs/gallery/index":
        return (DOCS / "examples" / "README.rst").is_file()
    if match := re.fullmatch(r"docs/generated/(.*)", place):
        return match[1] in {*generate.MODULES, "commands.inc.md", "zoo.inc.md", "results.inc.md"}
    return any(path.with_name(path.name + suffix).is_file() for suffix in ("", ".md", ".rst"))


def links(text):
    """Return what a Markdown page points to within the project."""
    found = re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]*)>?`", text)
    found += re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    for block in re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL):
        found += [line for line in block.splitlines() if line and not line.startswith(":")]
    found += re.findall(r"```\{include\} (\S+)", text)
    return [link for link in found if "://" not in link]


@pages
def test_links_lead_somewhere(page):
    wrong = [link for link in links(page.read_text()) if not exists(link, page)]
    assert not wrong


def test_links_of_examples_lead_somewhere():
    for script in EXAMPLES:
        for link in re.findall(r":doc:`([^`]*)`", script.read_text()):
            assert exists(link, script), (script.name, link)


def test_a_broken_link_is_found(tmp_path):
    assert links("[a](no.md), {doc}`here <no>` {doc}`b`") == ["no", "b", "no.md"]
    assert not exists("no", DOCS / "index.md")
    assert not exists("gallery/plot_99_none", DOCS / "index.md")


def test_every_page_is_in_a_table_of_contents():
    listed = {
        os.path.normpath(page.parent / link)
        for page in PAGES
        for link in links(page.read_text())
        if not link.endswith((".jpg", ".png", ".inc.md"))
    }
    assert {str(page.with_suffix("")) for page in PAGES} - listed <= {str(DOCS / "index")}


# Commands.


def documented_commands():
    """Return the lines behind a prompt, with the page that has them."""
    sources = [*PAGES, *EXAMPLES]
    for source in sources:
        for line in re.findall(r"^(?:#\s*)?\$ (.+)$", source.read_text(), re.MULTILINE):
            yield source.name, line


def flags_of(name):
    """Return the options of `ncvsd NAME`."""
    (command,) = [c for c in app.registered_commands if c.name == name]
    text = "\n".join(generate._describe_parameters(name, command.callback))
    return set(re.findall(r"(?<=`)--?[a-z][a-z-]*", text))


def test_documented_commands_exist_with_their_options():
    seen = 0
    for source, line in documented_commands():
        words = shlex.split(line)
        given = {word for word in words if re.match(r"--?[a-z]", word)}
        if words[0] == "ncvsd":
            assert given <= flags_of(words[1]), (source, line)
            seen += 1
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), (source, line)
        else:
            assert words[0] == "pip", (source, line)
    assert seen > 10


def test_an_option_that_does_not_exist_is_noticed():
    assert "--kernel" in flags_of("solve")
    assert "-o" in flags_of("solve")
    assert "--nonsense" not in flags_of("solve")


# Examples.


def imported(tree):
    """Return every (module, name) that a script imports; name is None for a whole module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def test_there_are_twelve_examples():
    assert len(EXAMPLES) >= 12


@examples
def test_an_example_compiles_and_imports_public_names_only(script):
    tree = ast.parse(script.read_text())
    assert ast.get_docstring(tree).splitlines()[1].startswith("==")
    for module, name in imported(tree):
        if module.split(".")[0] != "ncvsd_inverse":
            assert module.split(".")[0] in OTHERS, module
            continue
        assert module in generate.MODULES, f"{module} is not in the reference"
        assert name in importlib.import_module(module).__all__, (module, name)


@pytest.mark.documented
@examples
def test_an_example_runs(script, tmp_path):
    strict = [] if script.stem in WARNED else ["-W", "error::UserWarning:__main__"]
    done = subprocess.run(
        [sys.executable, *strict, script],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.documented
@pages
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    assets = ROOT / "ncvsd_inverse" / "assets"
    Image.open(assets / "grace_hopper.png").save(tmp_path / "face.png")
    blur = ncvsd_inverse.operators.GaussianBlur(1.5, 11, boundary="replicate")
    photograph = ncvsd_inverse.read_image(assets / "photographs" / "cat.png")
    source = torch.Generator().manual_seed(0)
    ncvsd_inverse.write_image(
        tmp_path / "photo.png", blur.measure(photograph, 0.03, generator=source)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    if not blocks:
        pytest.skip("it has none")
    for block in blocks:
        exec(compile(block, page.name, "exec"), {"__name__": "page"})


# Docstrings.


def all_modules():
    for info in pkgutil.walk_packages(ncvsd_inverse.__path__, "ncvsd_inverse."):
        if not info.name.endswith("__main__"):
            yield info.name


def test_examples_in_docstrings_run():
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    for name in all_modules():
        module = importlib.import_module(name)
        for case in finder.find(module, name):
            if case.examples:
                runner.run(case)
    result = runner.summarize(verbose=False)
    assert result.failed == 0
    assert result.attempted >= 20


def test_docstrings_become_what_sphinx_reads():
    text = """y = A x_ + |n|, with `a * b` as code.

    u' = u * 2
    no_ end

>>> 2 * 3  # as it is
6

Args:
    x: images,

        of shape (B, *size)
"""
    lines = text.splitlines()
    generate.as_restructured_text(None, "function", "", None, None, lines)
    expected = r"""y = A x\_ + \|n\|, with `a * b` as code.

::

    u' = u * 2
    no_ end

>>> 2 * 3  # as it is
6

Args:
    x: images,

    ::

        of shape (B, *size)
"""
    assert lines == expected.splitlines()


def test_public_names_have_docstrings():
    for name in generate.MODULES:
        module = importlib.import_module(name)
        for entry in generate.public_names(module):
            value = getattr(module, entry)
            if callable(value):
                assert value.__doc__, f"{name}.{entry}"


@pytest.mark.documented
def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "furo", "myst_parser", "sphinx_gallery", "sphinx_copybutton"):
        pytest.importorskip(package)
    build = [sys.executable, "-m", "sphinx", "-W", "-q"]
    done = subprocess.run([*build, DOCS, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
