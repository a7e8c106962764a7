"""`ncvsd evaluate`: files, tables, options."""

import json
import zipfile
from functools import partial

import pytest
import torch

from ncvsd_inverse import metrics
from ncvsd_inverse.images import read_image, write_image
from ncvsd_inverse.networks import ConcatDenoiser, Denoiser, UNetShape
from ncvsd_inverse.priors import (
    DiffusionPrior,
    load_prior,
    save_prior,
)

CARD = {
    "image_shape": [3, 32, 32],
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "licence": "research use only",
    "data": "noise",
    "training": {},
    "evaluation": {},
    "weaknesses": "knows nothing",
    "intended_use": "tests",
}


def save_random(path, cls, kind, **changes):
    torch.manual_seed(0)
    any_size = changes.get("image_shape", 0) is None
    shape = UNetShape(32, channels=(8, 8), blocks=1, attention=(), head_channels=8)
    network = cls(shape, any_size=any_size)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 0:
                parameter.fill_(0.5 if "gain" in name else 0.3)
    gamma = 0.414 if kind == "ncvsd" else None
    save_prior(path, network, {**CARD, "name": path.name, "kind": kind, "gamma": gamma, **changes})


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny prior, its teacher, and pictures in a folder and in an archive."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "priors").mkdir()
    save_random(tmp_path / "priors" / "tiny", ConcatDenoiser, "ncvsd")
    save_random(tmp_path / "priors" / "tiny_teacher", Denoiser, "diffusion")
    (tmp_path / "faces").mkdir()
    source = torch.Generator().manual_seed(0)
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for i in reversed(range(6)):
            path = tmp_path / "faces" / f"{i}.png"
            write_image(path, torch.rand(1, 3, 40, 36, generator=source) * 2 - 1)
            archive.write(path, f"00000/{i}.png")
    return tmp_path


@pytest.fixture
def run(run):
    """Run `ncvsd evaluate` as `run` does."""
    return partial(run, "evaluate")


def small(place, *more):
    return ("priors/tiny", "--data", "faces", "--images", 4, "--draws", 2, "-o", "out", *more)


def test_the_command_writes_figures_table_and_plot(place, run):
    status, printed, err = run(*small(place, "--levels", "0.5,2", "--seed", 3))
    assert (status, err) == (0, "")
    assert "faces: 4 images of 32 x 32" in printed
    assert "without --train, generation is not judged" in printed
    assert sorted(path.name for path in (place / "out").iterdir()) == [
        f"evaluation.{kind}" for kind in ("json", "md", "png")
    ]
    record = json.loads((place / "out" / "evaluation.json").read_text())
    assert (record["prior"], record["teacher"]) == ("priors/tiny", "priors/tiny_teacher")
    assert (record["images"], record["draws"], record["seed"]) == (4, 2, 3)
    assert record["image_shape"] == [3, 32, 32]
    assert [level["sigma"] for level in record["levels"]] == [0.5, 2.0]
    assert record["fd_alex"] is None
    ratio = record["levels"][1]["prior"]["ratio"]["value"]
    text = (place / "out" / "evaluation.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 2 |"))
    assert f"| {ratio:.2f}±" in row
    assert row.count("|") == next(line for line in text.splitlines() if "sigma" in line).count("|")
    assert read_image(place / "out" / "evaluation.png").shape[-1] > 500
    # The same figures from the archive, in other batches.
    run(*small(place, "--levels", "0.5,2", "--seed", 3, "--batch-size", 3, "--data", "faces.zip"))
    again = json.loads((place / "out" / "evaluation.json").read_text())
    assert again["levels"][1]["prior"]["ratio"]["value"] == pytest.approx(ratio, rel=1e-2)


def test_the_command_judges_the_teachers_diffusion_too(place, run):
    status, printed, _ = run(*small(place, "--levels", "1", "--teacher-steps", 2))
    assert status == 0
    assert "2 calls" in printed
    record = json.loads((place / "out" / "evaluation.json").read_text())
    assert record["teacher_steps"] == 2
    assert record["levels"][0]["teacher"]["ratio"]["value"] > 0


def test_the_command_judges_generation(place, run, monkeypatch):
    monkeypatch.setattr(metrics, "alex_features", lambda x: x.mean((2, 3)))
    status, printed, err = run(
        *small(place, "--levels", "1", "--train", "faces.zip"),
        *("--samples", 3, "--teacher-samples", 2),
    )
    assert (status, err) == (0, "")
    assert "FD-alex" in printed
    assert "FID" not in printed
    record = json.loads((place / "out" / "evaluation.json").read_text())
    figures = record["fd_alex"]["figures"]
    assert [figure["images"] for figure in figures] == [3, 3, 3, 2, 3]
    assert [figure["reference"] for figure in figures] == [6, 6, 6, 6, 3]
    assert figures[3]["name"] == "teacher, 35 calls"
    text = (place / "out" / "evaluation.md").read_text()
    assert f"| 1 call | 3 | 6 | {figures[0]['distance']:.2f} |" in text


def test_a_prior_of_any_size_gets_the_centre(place, run):
    save_random(place / "priors" / "free", ConcatDenoiser, "ncvsd", image_shape=None)
    save_random(place / "priors" / "free_teacher", Denoiser, "diffusion", image_shape=None)
    arguments = ("priors/free.safetensors", *small(place, "--levels", "1")[1:])
    status, printed, _ = run(*arguments, "--size", 16)
    assert status == 0
    assert "4 images of 16 x 16" in printed
    status, _, err = run(*arguments, "--size", 64)
    assert status == 1
    assert (
        "--data must hold pictures of at least 64 x 64 pixels (--size), got one of 36 x 40" in err
    )


def test_another_teacher_may_be_named(place, run):
    (place / "priors" / "tiny_teacher.json").rename(place / "priors" / "other.json")
    (place / "priors" / "tiny_teacher.safetensors").rename(place / "priors" / "other.safetensors")
    assert isinstance(load_prior(place / "priors" / "other"), DiffusionPrior)
    status, _, err = run(*small(place, "--levels", "1"))
    assert status == 1
    assert err.startswith("error: --teacher must be given, as there is no priors/tiny_teacher")
    status, _, _ = run(*small(place, "--levels", "1", "--teacher", "priors/other"))
    assert status == 0
    record = json.loads((place / "out" / "evaluation.json").read_text())
    assert record["teacher"] == "priors/other"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--levels", "0.1;1"), "--levels must be numbers with commas between, got '0.1;1'"),
        (("--levels", "0.1,0"), "levels must be positive"),
        (("--levels", "100"), "levels must be positive and at most"),
        (("--draws", 1), "draws must be at least 2"),
        (("--images", 1), "--images must be at least 2"),
        (("--images", 0), "--images must be at least 2"),
        (("--samples", 1), "--samples must be at least 2"),
        (("--data", "nowhere"), "--data must be a folder or a zip archive, got nowhere"),
        (("--data", "priors"), "priors must hold pictures"),
        (("--data", "damaged.zip"), "damaged.zip must be a folder or a zip archive"),
        (("--data", "mixed.zip"), "mixed.zip: b.png must be a readable picture"),
        (("--train", "nowhere"), "--train must be a folder or a zip archive, got nowhere"),
        (("--teacher", "priors/tiny"), "--teacher must be a teacher, got priors/tiny"),
        (("--device", "warp"), "--device must be usable here"),
        (("-o", "faces.zip"), "--out must be a writable folder"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(place, run, change, message):
    (place / "damaged.zip").write_bytes((place / "faces.zip").read_bytes()[:500])
    with zipfile.ZipFile(place / "mixed.zip", "w") as archive:
        archive.write(place / "faces" / "0.png", "a.png")
        archive.writestr("b.png", b"no picture")
    status, _, err = run(*small(place, *change))
    assert status == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (place / "out").exists() or not list((place / "out").iterdir())


def test_a_teacher_is_no_prior_to_judge(place, run):
    arguments = ("priors/tiny_teacher", *small(place, "--teacher", "priors/tiny_teacher")[1:])
    status, _, err = run(*arguments)
    assert (status, err) == (
        1,
        "error: PRIOR must be a distilled prior, got priors/tiny_teacher, a teacher\n",
    )
