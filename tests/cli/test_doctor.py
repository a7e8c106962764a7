import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from ncvsd_inverse import __version__, cli, list_priors
from ncvsd_inverse.cli.doctor import EXTRAS, REQUIRED, VARIABLES
from ncvsd_inverse.cli.examples import EXAMPLES
from ncvsd_inverse.priors.files import PACKAGE_WEIGHTS

COMMANDS = vars(typer.main.get_command(cli.app))["commands"]


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """Run the command as `run` does, with a home of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NCVSD_WEIGHTS", raising=False)
    return run


def told(report):
    """Return what a report says, by the name of each line."""
    lines = [line.strip().partition(": ") for line in report.splitlines() if line[:1] == " "]
    return {name: text for name, _, text in lines}


def test_the_report_holds_what_a_bug_report_needs(run, tmp_path, monkeypatch):
    monkeypatch.setenv("NCVSD_OWN", "seen")
    monkeypatch.setenv("HF_TOKEN", "secret")
    status, out, err = run("doctor")
    assert (status, err) == (0, "")
    found = told(out)
    assert found["version"] == __version__
    assert torch.__version__.startswith(found["torch"])
    assert found["python"].endswith(sys.executable)
    assert f"{torch.get_num_threads()} threads of torch" in found["cpu"]
    assert found["cache"] == "~/cache/ncvsd_inverse, which is not there"
    assert found["NCVSD_OWN"] == "seen"
    assert found["NCVSD_WEIGHTS"] == "not set"
    assert set(VARIABLES) <= set(found)
    assert found["ncvsd_faces64"].startswith("whole, ")
    assert found["ncvsd_ffhq"] == "not on this machine, fetched when first used"
    assert set(list_priors()) <= set(found)
    assert str(tmp_path) not in out
    assert "secret" not in out


def test_a_report_is_written_to_a_file(run, tmp_path):
    status, out, _ = run("doctor", "-o", tmp_path / "report.txt")
    report = (tmp_path / "report.txt").read_text()
    assert status == 0
    assert out.endswith(f"{len(report.splitlines())} lines\n")
    assert told(report)["version"] == __version__


def test_damaged_and_missing_weights_are_named(run, tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    weights.mkdir()
    for name, stem in (("cut", "ncvsd_faces64"), ("lone", "ncvsd_natural")):
        shutil.copy(PACKAGE_WEIGHTS / f"{stem}.json", weights / f"{name}.json")
    content = (PACKAGE_WEIGHTS / "ncvsd_faces64.safetensors").read_bytes()
    (weights / "cut.safetensors").write_bytes(content[:-1])
    (weights / "lpips_vgg_features.safetensors").write_bytes(b"")
    monkeypatch.setenv("NCVSD_WEIGHTS", str(weights))
    status, out, err = run("doctor")
    found = told(out)
    assert status == 1
    assert err == "error: cut, lone cannot be used; the report says why\n"
    assert found["cut"].startswith("DAMAGED: ~/weights/cut.safetensors must have the SHA-256")
    assert found["lone"].endswith("there is no ~/weights/lone.safetensors")
    size = sum(file.stat().st_size for file in weights.iterdir()) / 2**20
    assert found["$NCVSD_WEIGHTS"].startswith(f"~/weights, 4 files, {size:.1f} MiB, ")
    assert found["lpips-vgg"] == "~/weights/lpips_vgg_features.safetensors"
    assert found["lpips-alex"] == "comes with the package"
    assert found["lpips-squeeze"] == "torchvision downloads it when first used"


def test_a_missing_package_is_said(run, monkeypatch):
    from importlib import metadata

    real = metadata.version

    def version(name):
        if name in ("piq", "tensorboard"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = told(run("doctor")[1])
    assert found["piq"] == "MISSING"
    assert found["tensorboard"] == "not installed, the extra train does"


def test_the_packages_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

    def names(requirements):
        return tuple(requirement.partition(">")[0] for requirement in requirements)

    assert names(project["dependencies"]) == REQUIRED
    optional = project["optional-dependencies"]
    assert {extra: names(optional[extra]) for extra in EXTRAS} == dict(EXTRAS)


def test_every_command_has_examples_that_parse():
    assert set(EXAMPLES) == set(COMMANDS)
    for name, examples in EXAMPLES.items():
        for example in examples:
            program, command, *words = shlex.split(example)
            assert (program, command) == ("ncvsd", name)
            COMMANDS[name].make_context(name, words)  # which reads the words and runs nothing


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_help_of_a_command_shows_its_examples(name):
    shown = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "200"})
    lines = [line.strip() for line in shown.output.splitlines()]
    assert shown.exit_code == 0
    assert [line for line in lines if line in EXAMPLES[name]] == list(EXAMPLES[name])


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ncvsd do", ["doctor"]),
        ("ncvsd solve a.png --task den", ["denoise"]),
        ("ncvsd solve a.png --prior ncvsd_faces64_", ["ncvsd_faces64_teacher"]),
        ("ncvsd priors ncvsd_nat", ["ncvsd_natural", "ncvsd_natural_teacher"]),
        ("ncvsd train faces", ["faces64"]),
        ("ncvsd distill faces64 --teach", ["--teacher"]),
    ],
)
def test_a_shell_completes(typed, offered):
    variables = {
        "_NCVSD_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    shown = CliRunner().invoke(cli.app, [], env=variables, prog_name="ncvsd")
    assert shown.output.split() == offered
