"""The benchmark's harness with stub methods and tiny random networks."""

import copy
import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import typer

from baselines.interface import Ladder, Method
from harness import cache, cli
from harness.problems import find_test_set, find_validation_set, load_images
from harness.records import RECORDS, read_records
from harness.runner import choose_calls, measure_call, nearest_calls
from harness.tuning import Cost, Search, fit_plan, read_tuned
from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.images import read_image, write_image
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.networks import ConcatDenoiser, Denoiser, UNetShape
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.priors import load_prior, save_prior
from ncvsd_inverse.protocols import Point
from ncvsd_inverse.schedules import karras
from ncvsd_inverse.tasks import make_task

ROOT = Path(__file__).parents[2]

CARD = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "licence": "research use only",
    "data": "noise",
    "training": {},
    "evaluation": {},
    "weaknesses": "knows nothing",
    "intended_use": "tests",
}

CALLS = []
"""Method and images of every call of a stub."""


def chain(problem, models, nfe, settings):
    """Draw with the student at `nfe` levels; the end depends on the measurement too."""
    CALLS.append(("chain", [key[1] for key in problem.keys]))
    generators = problem.generators()
    x0 = torch.zeros(problem.shape) + problem.y.flatten(1).mean(1).view(-1, 1, 1, 1)
    for rho in karras(nfe, 3.0, 0.1):
        u = x0 + rho * draw_normal(x0, generators)
        x0 = models.student.sample(u, rho, generator=generators)
    return x0


def guided(problem, models, nfe, settings):
    """Go `nfe` times forth and back through the teacher."""
    CALLS.append(("guided", [key[1] for key in problem.keys]))
    x = torch.zeros(problem.shape)
    for _ in range(nfe):
        x.requires_grad_(True)
        misfit = (problem.operator(models.teacher.denoise(x, 0.5)) - problem.y).square().sum()
        (gradient,) = torch.autograd.grad(misfit, x)
        x = (x - 0.01 * gradient).detach()
    return x


def adjoint(problem, models, nfe, settings):
    CALLS.append(("adjoint", [key[1] for key in problem.keys]))
    return settings["gain"] * problem.operator.adjoint(problem.y)


def noise(problem, models, nfe, settings):
    """Uniform draws on [-1, 1], the law of the images."""
    CALLS.append(("noise", [key[1] for key in problem.keys]))
    eps = draw_normal(torch.zeros(problem.shape), problem.generators())
    return 2 * torch.special.ndtr(eps) - 1


def fails(problem, models, nfe, settings):
    """Image 2 raises, image 4 is not finite, the others are black."""
    images = [key[1] for key in problem.keys]
    CALLS.append(("fails", images))
    if 2 in images:
        raise DivergenceError("sweep 3 left the\nfinite numbers")
    x0 = torch.full(problem.shape, -1.0)
    x0[[image == 4 for image in images]] = torch.nan
    return x0


def stub(name, run, **changes):
    known = {
        "title": name.title(),
        "network": "none",
        "samples": False,
        "linear_only": False,
        "calls": (0,),
        "reference": "nobody2000",
    }
    return Method(name=name, run=run, **{**known, **changes})


PRESENT = cli.present

METHODS = {
    method.name: method
    for method in (
        stub("ncvsd", chain, network="student", samples=True, calls=(2, 3)),
        stub("guided", guided, network="teacher", calls=(2,)),
        stub("slow", guided, network="teacher", calls=(101,)),
        stub("adjoint", adjoint, linear_only=True, settings={"gain": 0.5, "power": 2.0},
             search={"gain": Ladder()}),
        stub("noise", noise, samples=True),
        stub("fails", fails),
    )
}  # fmt: skip


def save_random(path, cls, kind, *, fixed):
    torch.manual_seed(0)
    shape = UNetShape(16, channels=(8, 8), blocks=1, attention=(), head_channels=8)
    network = cls(shape, any_size=not fixed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 0:
                parameter.fill_(0.5 if "gain" in name else 0.3)
    own = {
        "name": path.name,
        "kind": kind,
        "gamma": 0.414 if kind == "ncvsd" else None,
        "image_shape": [3, 16, 16] if fixed else None,
    }
    save_prior(path, network, {**CARD, **own})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with priors for 16x16 images and for any size, and pictures."""
    place = tmp_path_factory.mktemp("place")
    for name, fixed in (("tiny", True), ("any", False)):
        save_random(place / name, ConcatDenoiser, "ncvsd", fixed=fixed)
        save_random(place / f"{name}_teacher", Denoiser, "diffusion", fixed=fixed)
    save_random(place / "alone", ConcatDenoiser, "ncvsd", fixed=True)
    source = torch.Generator().manual_seed(0)
    for side in (16, 40):
        (place / f"of{side}").mkdir()
        for i in range(6):
            x = torch.rand(1, 3, side, side, generator=source) * 2 - 1
            write_image(place / f"of{side}" / f"{i}.png", x)
    return place


@pytest.fixture
def run(place, tmp_path, monkeypatch, capsys):
    """Run the command on the tiny prior; return exit status, standard output and error."""
    monkeypatch.delenv("NCVSD_DATA", raising=False)
    monkeypatch.setattr(cli, "present", lambda records, out: typer.echo(f"rows {len(records)}"))
    CALLS.clear()

    def run(*arguments, command=cli.run, methods=METHODS):
        shared = ["--prior", place / "tiny", "--data", place / "of16", "--task", "sr4x"]
        shared += ["--out", tmp_path / "out"]
        status = command(methods, [str(part) for part in (*shared, *arguments)])
        return status, *capsys.readouterr()

    return run


def by_row(folder):
    return {
        (record.task, record.method, record.nfe, record.images): record
        for record in read_records(folder)
    }


def test_a_run_that_asks_for_nothing_is_a_glance(run, tmp_path):
    status, printed, err = run()
    assert (status, err) == (0, "")
    assert "a glance: 16 images, methods at 10 calls" in printed
    calls = {(method, nfe) for _, method, nfe, _ in by_row(tmp_path / "out")}
    without = {(name, 0) for name in ("adjoint", "noise", "fails")}
    assert calls == {("ncvsd", 10), ("guided", 10), ("slow", 10), *without}


def test_the_printed_table_fits_a_terminal(run, monkeypatch, tmp_path, capsys):
    run()
    monkeypatch.setenv("COLUMNS", "80")
    PRESENT(read_records(tmp_path / "out"), tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    (head,) = (line for line in lines if line.strip().startswith("method"))
    assert head.split() == ["method", "calls", "psnr", "ssim", "residual", "s"]
    assert max(len(line) for line in lines if not line.startswith(str(tmp_path))) <= 80
    assert not any("…" in line for line in lines)


def test_rows_with_what_they_count(run, tmp_path):
    status, printed, err = run("--slow-images", 4, "--methods", *METHODS)
    assert (status, err) == (0, "")
    rows = by_row(tmp_path / "out")
    assert printed.endswith("rows 9\n")
    assert "without lpips-alex: x must be at least 32 pixels" in printed
    expected = {("ncvsd", nfe, images) for nfe in (2, 3) for images in (6, 4)}
    expected |= {("guided", 2, 6), ("slow", 101, 4)}
    expected |= {(name, 0, 6) for name in ("adjoint", "noise", "fails")}
    assert rows.keys() == {("sr4x", *row) for row in expected}
    for (_, name, nfe, images), record in rows.items():
        assert record.forward == nfe
        assert record.backward == (nfe if name in ("guided", "slow") else 0)
        assert record.seconds > 0
        assert 100 < record.peak_mib < 100_000
        assert set(record.values) == {"psnr", "ssim", "residual"}
        assert all(len(entries) == images for entries in record.values.values())
        assert (record.prior, record.data, record.size) == ("tiny", "of16", (16, 16))
        assert (record.seed, record.sigma_y, record.draws, record.tuned) == (0, 0.05, 1, False)
        assert {"commit", "torch", "hardware", "date", "batch_size"} <= set(record.environment)
    # Of our own, fewer images are the first of all and are not run again.
    few, all_of_them = (rows["sr4x", "ncvsd", 3, images] for images in (4, 6))
    assert few.values["psnr"] == all_of_them.values["psnr"][:4]
    assert few.data_sha256 != all_of_them.data_sha256
    assert CALLS.count(("chain", list(range(6)))) == 2


def test_values_are_those_of_the_metrics(run, place, tmp_path):
    run("--methods", "adjoint", "--seed", 5)
    (record,) = read_records(tmp_path / "out")
    x0 = torch.cat([read_image(place / "of16" / f"{i}.png") for i in range(6)])
    operator = make_task("sr4x", 16, seed=5).operator
    # Truth and measurement are kept for the first four images, in 255 levels.
    pictures = tmp_path / "out" / "pictures" / "sr4x"
    y = torch.cat([read_image(pictures / "measurement" / f"{i}.png") for i in range(4)])
    kept = torch.cat([read_image(pictures / "adjoint-0" / f"{i}.png") for i in range(4)])
    assert not (pictures / "adjoint-0" / "4.png").exists()
    assert torch.equal(read_image(pictures / "truth" / "3.png"), x0[3:4])
    estimate = 0.5 * operator.adjoint(y)
    assert torch.allclose(kept, estimate, atol=0.02)
    assert record.values["psnr"][:4] == pytest.approx(psnr(estimate, x0[:4]).tolist(), abs=0.05)
    misfit = (y - operator(estimate)).square().mean((1, 2, 3)).sqrt() / 0.05
    assert record.values["residual"][:4] == pytest.approx(misfit.tolist(), rel=0.05)


def test_draws_are_judged_as_a_law(run, tmp_path):
    status, _, _ = run("--draws", 19, "--methods", "noise", "adjoint", "--batch-size", 4)
    assert status == 0
    rows = by_row(tmp_path / "out")
    record, point = rows["sr4x", "noise", 0, 6], rows["sr4x", "adjoint", 0, 6]
    assert (record.draws, point.draws) == (19, 1)
    assert {"psnr-mean", "crps", "coverage"}.isdisjoint(point.values)
    # 4,608 pixels; the score of a uniform law on an interval of length 2 is a third of it.
    assert record.mean("coverage") == pytest.approx(0.9, abs=0.02)
    assert record.mean("crps") == pytest.approx(1 / 3, abs=0.03)
    assert record.mean("psnr-mean") > record.mean("psnr") + 2


def test_batches_do_not_change_values(run, tmp_path):
    for size in (1, 4, 16):
        out = tmp_path / f"out{size}"
        run("--batch-size", size, "--methods", "ncvsd", "guided", "--nfe", 4, "--out", out)
    whole = by_row(tmp_path / "out16")
    for size in (1, 4):
        rows = by_row(tmp_path / f"out{size}")
        assert rows.keys() == whole.keys()
        for name, record in rows.items():
            assert record.key == whole[name].key
            for metric, entries in record.values.items():
                assert entries == pytest.approx(whole[name].values[metric], abs=1e-3)


def test_other_seeds_and_draws_differ(run, tmp_path):
    for seed in (0, 1):
        run("--methods", "ncvsd", "noise", "--seed", seed, "--out", tmp_path / f"out{seed}")
    first, second = (by_row(tmp_path / f"out{seed}") for seed in (0, 1))
    for name, record in first.items():
        assert record.values["psnr"] != second[name].values["psnr"]
        assert len(set(record.values["psnr"])) == 6


def test_rows_are_run_once(run, tmp_path):
    run("--methods", "adjoint", "noise")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    CALLS.clear()
    _, printed, _ = run("--methods", "adjoint", "noise")
    assert not CALLS
    assert printed.count("as recorded") == 2
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before


def test_what_changes_a_row_runs_it_again(run, tmp_path):
    run("--methods", "adjoint", "--metrics", "psnr")
    CALLS.clear()
    other = {**METHODS, "adjoint": replace(METHODS["adjoint"], settings={"gain": 1.0})}
    code = {**METHODS, "adjoint": replace(METHODS["adjoint"], run=partial(measure_nothing, 1))}
    for changes in (["--metrics", "ssim"], ["--images", 5], ["--draws", 1]):
        run("--methods", "adjoint", *changes)
    # One estimate an image stays one, and a row may have more metrics than are asked for.
    assert [images for _, images in CALLS] == [list(range(6)), list(range(5)), list(range(6))]
    for methods in (other, code):
        CALLS.clear()
        run("--methods", "adjoint", methods=methods)
        assert CALLS
    # Of one row and number of images one record is kept, the last.
    rows = read_records(tmp_path / "out")
    assert sorted(record.images for record in rows) == [5, 6]


def measure_nothing(number, problem, models, nfe, settings):
    CALLS.append(("nothing", []))
    return torch.full(problem.shape, float(number))


def test_the_code_of_a_method_is_its_own_and_what_it_uses(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cache, "OWN_CODE", ("helper_of_test",))

    def hashed(own, helper):
        # Other lengths than before, as Python may miss changes within a second.
        (tmp_path / "helper_of_test.py").write_text(helper)
        (tmp_path / "method_of_test.py").write_text(own)
        for name in ("method_of_test", "helper_of_test"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return cache.hash_code(importlib.import_module("method_of_test").run)

    own = "from helper_of_test import gain\ndef run():\n    return gain()\n"
    helper = "def gain():\n    return 1\n"
    first = hashed(own, helper)
    assert hashed(f'"""Documented."""\n{own}', f"# Commented.\n{helper}") == first
    typed = own.replace("run():", "run() -> int:")
    moved = f'from ncvsd_inverse.numerics import squared_norm\n\n__all__ = ["run"]\n{typed}'
    assert hashed(moved, helper.replace("gain():", "gain() -> int:")) == first
    assert hashed(f"from math import floor\n{own}", helper) != first
    assert hashed(own.replace("gain()\n", "gain() + 10\n"), helper) != first
    assert hashed(own, helper.replace("return 1", "return 100")) != first


def test_a_stopped_run_loses_one_row(run, tmp_path):
    def stops(problem, models, nfe, settings):
        if problem.keys[0][1] > 0:
            raise KeyboardInterrupt
        return noise(problem, models, nfe, settings)

    names = ("adjoint", "noise", "guided")
    broken = {**METHODS, "noise": replace(METHODS["noise"], run=stops)}
    with pytest.raises(KeyboardInterrupt):
        run("--methods", *names, "--batch-size", 2, methods=broken)
    assert [record.method for record in read_records(tmp_path / "out")] == ["adjoint"]
    assert not list((tmp_path / "out").rglob("*.part"))
    CALLS.clear()
    status, _, _ = run("--methods", *names, "--batch-size", 2)
    assert status == 0
    assert {name for name, _ in CALLS} == {"noise", "guided"}
    assert len(read_records(tmp_path / "out")) == 3


def test_failures_are_counted_and_the_rest_goes_on(run, tmp_path):
    status, printed, _ = run("--methods", "fails", "adjoint", "--batch-size", 3)
    assert status == 0
    assert "6 images, 2 failed" in printed
    record = by_row(tmp_path / "out")["sr4x", "fails", 0, 6]
    assert record.failures == {
        "2": "sweep 3 left the finite numbers",
        "4": "the restored image must be finite, got NaN or infinity",
    }
    for entries in record.values.values():
        assert [entry is None for entry in entries] == [i in (2, 4) for i in range(6)]
    # Alone, the others of a batch that fails are restored.
    assert [images for name, images in CALLS if name == "fails"] == [
        *([0, 1, 2], [0], [1], [2]),
        *([3, 4, 5], [3], [4], [5]),
    ]
    only = replace(METHODS["fails"], name="all")
    images = ["--images", 3, "--batch-size", 1, "--out", tmp_path / "other"]
    run("--methods", "all", *images, methods={"all": replace(only, run=fails_always)})
    (record,) = read_records(tmp_path / "other")
    assert record.values["psnr"] == (None, None, None)
    assert (record.mean("psnr"), record.forward) == (None, 0)


def fails_always(problem, models, nfe, settings):
    raise DivergenceError("no image is found")


def test_a_method_that_must_not_be_run_on_a_task_has_no_row(run, tmp_path):
    run("--task", "phase_retrieval", "--methods", "noise", "adjoint")
    rows = {(task, method) for task, method, _, _ in by_row(tmp_path / "out")}
    assert rows == {("sr4x", "noise"), ("sr4x", "adjoint"), ("phase_retrieval", "noise")}
    folder = tmp_path / "out" / "pictures" / "phase_retrieval" / "measurement"
    picture = read_image(folder / "0.png")
    assert picture.shape == (1, 3, 32, 32)


def test_calls_that_are_asked_for(run, tmp_path):
    run("--nfe", 4, 5)
    rows = {(method, nfe) for _, method, nfe, _ in by_row(tmp_path / "out")}
    assert {nfe for method, nfe in rows if method in ("ncvsd", "guided", "slow")} == {4, 5}
    assert {("ncvsd", 4), ("guided", 5), ("slow", 4), ("noise", 0)} < rows
    run("--nfe", 4, "--methods", "guided", "noise", "--out", tmp_path / "named")
    rows = {(method, nfe) for _, method, nfe, _ in by_row(tmp_path / "named")}
    assert rows == {("guided", 4), ("noise", 0)}


def test_another_folder_of_results_is_refused(run, place, tmp_path):
    run("--methods", "adjoint", "--images", 4)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    (tmp_path / "others").mkdir()
    for i in range(4):
        write_image(tmp_path / "others" / f"{i}.png", torch.full((1, 3, 16, 16), 0.1 * i))
    for arguments, message in (
        (("--seed", 1), "seed is 0 there and 1 here"),
        (("--data", tmp_path / "others"), "the images of --data are others"),
        (("--prior", place / "any", "--size", 16), "prior is 'tiny' there and 'any' here"),
        (("--prior", place / "any", "--size", 8), "size is [16, 16] there and [8, 8] here"),
    ):
        status, _, err = run("--methods", "adjoint", *arguments)
        assert status == 2
        assert message in err
        assert "--out must be a folder of the same settings" in err
        assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before
    # More or fewer of the same images are no other settings.
    assert run("--methods", "adjoint", "--images", 6)[0] == 0
    assert run("--methods", "adjoint", "--images", 2)[0] == 0
    assert len(json.loads((tmp_path / "out" / "settings.json").read_text())["images"]) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sr4"], "--task must be one of .* did you mean sr4x"),
        (["--methods", "guidd"], "--methods must be one of .* did you mean guided"),
        (["--metrics", "lpips-alx"], "--metrics must be .* did you mean lpips-alex"),
        (["--metrics", "lpips-alex"], "x must be at least 32 pixels high and wide for lpips"),
        (["--metrics", "crps"], "--draws must be at least 2 for crps, got 1"),
        (["--metrics", "coverage", "--draws", "18"], "--draws must be at least 19 for coverage"),
        (["--images", "0"], "--images must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--slow-images", "0"], "--slow-images must be at least 1"),
        (["--nfe", "0"], "--nfe must be at least 1"),
        (["--nfe", "many"], "argument --nfe: invalid int value"),
        (["--what"], "unrecognized arguments: --what"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--device", "abacus"], "--device must be usable here, got 'abacus'"),
        (["--data", "PLACE/of40"], "of 16 x 16 pixels and 3 channels, got 40 x 40 .* number 0"),
        (["--data", "PLACE/none"], "PLACE/none must be a folder or a zip archive"),
        (["--prior", "PLACE/any", "--size", "15"], "--size must have .* multiples of 2"),
        (["--prior", "PLACE/any", "--size", "32"], "of at least 32 x 32 pixels .* got 16 x 16"),
        (["--prior", "PLACE/none"], "there is no PLACE/none, and no PLACE/none.json"),
        (["--prior", "PLACE/alone"], "and no PLACE/alone_teacher.json"),
        (["--prior", "PLACE/tiny_teacher"], "--prior must be a distilled prior"),
        (["--teacher", "PLACE/any"], "--teacher must be a teacher"),
        (["--tuned", "PLACE/of16/0.png"], "0.png must be the JSON file of a tuning"),
        (["--out", "PLACE/of16/0.png/results"], "--out must be a writable folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, run, place, tmp_path):
    arguments = [part.replace("PLACE", str(place)) for part in arguments]
    status, printed, err = run("--methods", "adjoint", *arguments)
    assert (status, printed) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(message.replace("PLACE", str(place)), err)
    assert not (tmp_path / "out").exists()


def test_only_methods_for_other_operators(run, tmp_path, place):
    status = cli.run(
        METHODS,
        ["--prior", str(place / "tiny"), "--data", str(place / "of16"), "--methods", "adjoint",
         "--task", "phase_retrieval", "--out", str(tmp_path / "out")],
    )  # fmt: skip
    assert status == 2
    assert not (tmp_path / "out").exists()


def test_missing_weights_of_a_metric(run, place, tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("NCVSD_WEIGHTS", str(tmp_path))
    arguments = ["--prior", place / "any", "--data", place / "of40", "--size", 32]
    arguments += ["--methods", "adjoint", "--images", 1]
    status, _, err = run(*arguments, "--metrics", "lpips-squeeze")
    assert status == 2
    assert "lpips_squeeze_features.safetensors in the folder that NCVSD_WEIGHTS names" in err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("harness.scores.METRICS", {"psnr": "higher", "lpips-squeeze": "lower"})
    status, printed, _ = run(*arguments)
    assert status == 0
    (line,) = [line for line in printed.splitlines() if line.startswith("without lpips-squeeze:")]
    assert "no network" in line
    (record,) = read_records(tmp_path / "out")
    assert set(record.values) == {"psnr"}


def test_images_without_data_are_the_test_set_or_shipped(place, tmp_path, monkeypatch):
    prior = load_prior(place / "any")
    assert load_images(None, 100, prior=prior, size=24).x0.shape == (2, 3, 24, 24)
    fixed = load_prior(place / "tiny")
    assert load_images(None, 100, prior=fixed, size=24).x0.shape == (2, 3, 16, 16)
    crops = load_images(place / "of40", 3, prior=prior, size=24)
    whole = read_image(place / "of40" / "2.png")
    assert torch.equal(crops.x0[2:], whole[..., 8:32, 8:32])
    assert crops.sha256(2) == load_images(place / "of40", 2, prior=prior, size=24).sha256(3)
    monkeypatch.setenv("NCVSD_DATA", str(tmp_path))
    assert find_test_set("ncvsd_faces64") is None
    (tmp_path / "faces64").mkdir()
    (tmp_path / "faces64" / "test.zip").touch()
    assert find_test_set("ncvsd_faces64") == tmp_path / "faces64" / "test.zip"
    assert find_validation_set("ncvsd_faces64") is None


def test_numbers_of_calls_are_those_a_method_can_run_at(run, tmp_path):
    plain, slow = METHODS["guided"], METHODS["slow"]
    least = replace(plain, least_calls=2)
    asked = (1, 4, 100, 101, 1000)
    assert choose_calls(plain, asked, named=False) == (1, 4, 100)
    assert choose_calls(least, asked, named=False) == (4, 100)
    assert choose_calls(slow, asked, named=False) == (1, 4, 100, 101)
    assert choose_calls(least, asked, named=True) == (4, 100, 101, 1000)
    assert choose_calls(METHODS["noise"], asked, named=True) == (0,)
    methods = {"guided": least, "noise": METHODS["noise"]}
    status, _, err = run("--nfe", 1, "--methods", "guided", "noise", methods=methods)
    assert (status, err) == (2, "error: --nfe must be at least 2 for guided, got 1\n")
    run("--nfe", 1, 2, methods=methods)
    assert {row[1:3] for row in by_row(tmp_path / "out")} == {("guided", 2), ("noise", 0)}


def test_what_a_method_says_of_itself_fits_together():
    for changes, message in (
        ({"name": "../up"}, "name must be letters, digits and"),
        ({"network": "studnt"}, "network must be one of .* did you mean student"),
        ({"calls": (3,)}, r"calls must be \(0,\) without a network, got \(3,\)"),
        ({"calls": ()}, "calls must be at least 0 each"),
        ({"network": "teacher", "calls": (1, 4), "least_calls": 2}, "calls must be at least 2"),
        ({"search": {"gian": Ladder()}}, "each name in search must be one of .*mean gain"),
        ({"settings": {"gain": 0.0}}, "gain must be positive to be searched by factors, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(METHODS["adjoint"], **changes)
    for changes, message in (
        ({"factor": 1.0}, "factor must be above 1, got 1"),
        ({"least": 2.0, "most": 1.0}, r"least must be in \[0, most\], got 2.0, most 1.0"),
        ({"values": (1.0, 1.0)}, "values must rise"),
        ({"kind": "whole"}, "kind must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            Ladder(**changes)


# Tuning


def test_ladders_have_factors_listed_values_and_counts():
    assert [Ladder().value(0.3, steps, 10) for steps in (-1, 0, 0.5, 3)] == [0.15, 0.3, 0.424, 2.4]
    assert [Ladder(most=1.0, least=0.5).value(0.7, steps, 10) for steps in (-3, 1, 5)] == [
        0.5,
        1,
        1,
    ]
    listed = Ladder(values=(0.0, 0.3, 1.0))
    assert [listed.value(0.3, steps, 10) for steps in (-7, -1, -0.5, 0.5, 1)] == [0, 0, 0.3, 0.3, 1]
    assert [Ladder(kind="count").value(5, steps, 2) for steps in (-4, -1, 1)] == [1, 2, 10]
    calls = Ladder(kind="calls")
    assert [calls.value(100, steps, 20) for steps in (-1, 0, 1)] == [10, 20, 20]
    assert Ladder(values=(2, 5, 10), kind="calls").value(10, 0, 6) == 5
    method = replace(METHODS["adjoint"], search={"power": calls})
    assert method.settings_at(1) == {"gain": 0.5, "power": 1}
    assert method.settings_at(100, {"gain": 3.0}) == {"gain": 3.0, "power": 2.0}


def searched(score, trials, search, *, start=None, calls=100):
    """Search by a known score; return the search and what it tried."""
    start = start or dict.fromkeys(search, 1.0)
    made = Search(stub("searched", noise, settings=start, search=search), calls, start)
    tried = {}
    while len(tried) < trials and (position := made.propose(tried)) is not None:
        assert position not in tried
        tried[position] = score(made.settings(position))
    return made, tried


def bowl(**optimum):
    """A quadratic of the logarithms to base 2, with its least value where they are `optimum`."""

    def score(settings):
        away = [math.log2(settings[name]) - steps for name, steps in optimum.items()]
        return sum(a * a for a in away) + 0.5 * away[0] * away[-1]

    return score


@pytest.mark.parametrize("optimum", [{"a": 0.0}, {"a": 4.7}, {"a": -3.4}])
def test_one_setting_is_found_within_eight_trials(optimum):
    made, tried = searched(bowl(**optimum), 8, {"a": Ladder()})
    best = made.settings(min(tried, key=tried.get))
    assert len(tried) == 8
    assert abs(math.log2(best["a"]) - optimum["a"]) <= 0.5
    assert made.edges(tried) == []


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_two_settings_are_found_within_twenty_trials(signs):
    optimum = {"a": 2.3 * signs[0], "b": 1.2 * signs[1]}
    made, tried = searched(bowl(**optimum), 20, {"a": Ladder(), "b": Ladder()})
    best = made.settings(min(tried, key=tried.get))
    for name, steps in optimum.items():
        assert abs(math.log2(best[name]) - steps) <= 0.5
    assert made.edges(tried) == []


def test_a_search_widens_while_its_best_value_is_on_an_edge():
    made, tried = searched(lambda settings: -settings["a"], 6, {"a": Ladder(), "b": Ladder()})
    assert [made.settings(position)["a"] for position in tried] == [1, 2, 4, 8, 16, 32]
    # The second setting had no turn: its one value is an edge too.
    assert made.edges(tried) == ["a", "b"]
    made, tried = searched(lambda settings: settings["a"], 4, {"a": Ladder()})
    assert [made.settings(position)["a"] for position in tried] == [1, 2, 0.5, 0.25]
    # Whatever the score, the next trial is outside as long as the best value is on an edge.
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = (6 * torch.rand(2, generator=generator) - 3).tolist()
        score = bowl(a=a, b=b)
        tried = {}
        for _ in range(12):
            edges = set(made.edges(tried)) if tried else set()
            made, more = searched(score, len(tried) + 1, {"a": Ladder(), "b": Ladder()})
            if edges:
                before = [made.settings(position) for position in tried]
                newest = made.settings(list(more)[-1])
                assert any(
                    not min(s[name] for s in before) <= newest[name] <= max(s[name] for s in before)
                    for name in edges
                )
            tried = more


def test_a_search_stops_at_bounds_and_looks_inside():
    made, tried = searched(lambda settings: -settings["a"], 7, {"a": Ladder(most=3.0)})
    values = [made.settings(position)["a"] for position in tried]
    assert values == [1, 2, 3, 1.5, 2.12, 2.52, 2.75]
    assert made.edges(tried) == ["a"]
    made, tried = searched(lambda settings: settings["a"], 8, {"a": Ladder(values=(0.0, 1.0, 5.0))})
    assert [made.settings(position)["a"] for position in tried] == [1, 5, 0]
    # Listed values that lie farther have their turn before a search ends.
    listed = {"a": Ladder(values=(0.0, 0.25, 0.5, 0.75, 1.0))}
    made, tried = searched(lambda settings: -settings["a"], 8, listed)
    assert [made.settings(position)["a"] for position in tried] == [1, 0.75, 0.5, 0.25, 0]
    assert made.edges(tried) == ["a"]


def test_a_start_that_fails_is_left():
    search = {"a": Ladder(), "b": Ladder()}
    made, tried = searched(lambda s: math.inf if s["b"] > 0.6 else s["a"], 8, search)
    assert made.settings(min(tried, key=tried.get))["b"] == 0.5


def hours(**changes):
    """A plan for two searches at 10 calls and one at 1000, of a second and 10 ms a call each."""
    searches = [("sr4x", METHODS["adjoint"], nfe) for nfe in (10, 10, 1000)]
    costs = {("sr4x", "adjoint"): Cost(1.0, 0.01)}
    asked = {"images": 32, "trials": 8, "hours": 1.0, **changes}
    return fit_plan(searches, costs, **asked)


def test_images_are_cut_first_then_trials():
    full = 2 * 32 * 8 * 1.1 + 8 * 4 * 11
    plan = hours()
    assert (plan.images, plan.trials, plan.slow_images, plan.slow_trials) == (32, 8, 8, 4)
    assert plan.hours == pytest.approx(full / 3600, abs=1e-3)
    assert plan.cut == ""
    fewer = hours(hours=(2 * 20 * 8 * 1.1 + 8 * 4 * 11) / 3600 + 1e-6)
    assert (fewer.images, fewer.trials, fewer.slow_images) == (20, 8, 8)
    assert fewer.cut == "32 images and 8 trials would take 0.254 hours of 0.196"
    least = (2 * 8 * 4 * 1.1 + 8 * 2 * 11) / 3600
    fewest = hours(hours=least + 1e-6)
    assert (fewest.images, fewest.trials, fewest.slow_trials) == (8, 4, 2)
    with pytest.raises(
        ValueError, match=r"--hours must be at least 0.0684 .* 8 images and 4 trials"
    ):
        hours(hours=least - 1e-3)
    assert [plan.effort(calls) for calls in (20, 100, 1000)] == [(32, 8), (16, 6), (8, 4)]
    small = hours(images=2, trials=3)
    assert (small.images, small.trials, small.slow_images, small.slow_trials) == (2, 3, 2, 2)


def tuned_entries(path):
    """Return the entries of a file by task, method and calls."""
    tasks = json.loads(path.read_text())["tasks"]
    return {
        (task, name, int(calls)): entry
        for task, found in tasks.items()
        for name, entries in found.items()
        for calls, entry in entries.items()
    }


def gained(problem, models, nfe, settings):
    """Go once through the teacher; the best gain is 0.5, the best power is the number of calls."""
    CALLS.append(("gained", [key[1] for key in problem.keys]))
    models.teacher.denoise(torch.zeros(problem.shape), 1.0)
    away = math.log2(settings["gain"] / 0.5), math.log2(settings["power"] / nfe)
    return torch.full(problem.shape, 2.0 + abs(away[0]) + 0.5 * abs(away[1]))


TUNED = {
    "noise": METHODS["noise"],
    "adjoint": METHODS["adjoint"],
    "gained": stub(
        "gained",
        gained,
        network="teacher",
        calls=(4, 101),
        settings={"gain": 1.0, "power": 8.0},
        search={"gain": Ladder(), "power": Ladder()},
    ),
}


@pytest.fixture
def tune(run, tmp_path, monkeypatch):
    """Tune the methods above; their score is the mean of the restored images."""
    monkeypatch.setattr("harness.scores._SINGLE", {"psnr": lambda x, x0: -x.flatten(1).mean(1)})

    def tune(*arguments, methods=TUNED):
        few = ["--out", tmp_path / "tuned.json", "--calls", 4, 16, 101, "--images", 3]
        return run(*few, "--trials", 6, *arguments, command=cli.run_tuning, methods=methods)

    return tune


def test_all_have_the_same_trials_and_the_best_is_chosen(tune, tmp_path):
    status, printed, err = tune()
    assert (status, err) == (0, "")
    assert printed.startswith(
        "3 images and 6 trials, above 20 calls 3 and 5, above 100 calls 3 and 3, estimated "
    )
    entries = tuned_entries(tmp_path / "tuned.json")
    names = {("adjoint", 0), ("gained", 4), ("gained", 16), ("gained", 101)}
    assert entries.keys() == {("sr4x", *name) for name in names}
    assert f"tuned.json: {6 + 6 + 6 + 3} new trials in " in printed
    for (_, _, calls), entry in entries.items():
        assert len(entry["trials"]) == (3 if calls == 101 else 6)
        scores = [trial["score"] for trial in entry["trials"]]
        assert entry["score"] == max(scores)
        assert entry["settings"] == entry["trials"][scores.index(max(scores))]["settings"]
        for name in entry["settings"]:
            tried = [trial["settings"][name] for trial in entry["trials"]]
            on_edge = entry["settings"][name] in (min(tried), max(tried))
            assert (name in entry["edge"]) == on_edge
    assert entries["sr4x", "gained", 4]["settings"] == {"gain": 0.5, "power": 4}
    assert entries["sr4x", "gained", 16]["settings"]["power"] == 16
    # More than 100 calls begin with what the most calls below found, and with the method's own.
    many = entries["sr4x", "gained", 101]
    assert many["start"] == entries["sr4x", "gained", 16]["settings"]
    assert many["other_starts"] == [{"gain": 1.0, "power": 8.0}]
    assert [trial["settings"] for trial in many["trials"][:2]] == [
        many["start"],
        *many["other_starts"],
    ]
    assert many["trials"][2]["settings"]["power"] == many["start"]["power"]  # the better of the two


def test_above_100_calls_a_search_goes_on_from_the_methods_own_settings_if_they_are_better(
    tune, tmp_path
):
    misled = replace(TUNED["gained"], calls=(4, 101), settings={"gain": 0.5, "power": 128.0})
    tune("--calls", 4, 101, methods={"gained": misled})
    entry = tuned_entries(tmp_path / "tuned.json")["sr4x", "gained", 101]
    start, own, moved = (trial["settings"] for trial in entry["trials"])
    assert start["power"] < 64
    assert own == misled.settings
    assert moved == {"gain": 1.0, "power": 128.0}


def test_a_tuning_that_is_stopped_after_any_trial_ends_the_same(tune, tmp_path):
    path = tmp_path / "tuned.json"
    tune()
    whole = tuned_entries(path)
    made = sum(len(entry["trials"]) for entry in whole.values())
    path.unlink()
    left = []

    def stops(run, *given):
        # The plan is kept with the first trial: the runs that are timed are made anew before.
        if path.exists():
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return run(*given)

    methods = {
        name: replace(method, run=partial(stops, method.run)) for name, method in TUNED.items()
    }
    for number in range(made - 1):
        left[:] = [int(number > 0)]
        before = path.exists() and path.read_bytes()
        with pytest.raises(KeyboardInterrupt):
            tune(methods=methods)
        assert path.read_bytes() != before
    left[:] = [1]
    assert tune(methods=methods)[0] == 0
    found = tuned_entries(path)
    for name, entry in found.items():
        assert {**entry, "code": ""} == {**whole[name], "code": ""}
    CALLS.clear()
    status, printed, _ = tune(methods=methods)
    assert (status, CALLS) == (0, [])
    assert "as in" in printed
    assert ": 0 new trials" in printed


def test_a_change_of_search_code_or_start_tunes_anew_and_of_header_is_refused(tune, tmp_path):
    only = ("--methods", "adjoint")
    tune(*only)
    path = tmp_path / "tuned.json"
    before = tuned_entries(path)["sr4x", "adjoint", 0]
    known = TUNED["adjoint"]
    for changed in (
        replace(known, search={"gain": Ladder(3.0)}),
        replace(known, settings={"gain": 2.0, "power": 2.0}),
        replace(known, settings={"gain": 0.5, "power": 3.0}),
        replace(known, run=partial(fails_by_gain, draw_normal)),
    ):
        CALLS.clear()
        tune(*only, methods={"adjoint": changed})
        assert CALLS
    tune(*only)
    assert tuned_entries(path)["sr4x", "adjoint", 0] == before
    for arguments, names in (
        (("--seed", 1), "seed"),
        (("--trials", 5), "asked"),
        (("--images", 2), "data_sha256, asked"),
    ):
        status, _, err = tune(*only, *arguments)
        assert status == 2
        assert re.search(f"--out must be the tuning of the same settings.*other: {names}$", err)


def fails_by_gain(_, problem, models, nfe, settings):
    CALLS.append(("fails_by_gain", []))
    if settings["gain"] > 0.9:
        raise DivergenceError("too much")
    if settings["gain"] < 0.2:
        raise ValueError("gain must be at least 0.2")
    return torch.full(problem.shape, settings["gain"])


def test_trials_that_fail_are_never_chosen(tune, run, tmp_path):
    failing = {"adjoint": replace(TUNED["adjoint"], run=partial(fails_by_gain, 0))}
    tune(methods=failing)
    path = tmp_path / "tuned.json"
    entry = tuned_entries(path)["sr4x", "adjoint", 0]
    found = {trial["settings"]["gain"]: trial for trial in entry["trials"]}
    assert found[1.0] == {"settings": {"gain": 1.0}, "score": None, "failure": "too much"}
    assert found[0.125]["failure"] == "gain must be at least 0.2"
    assert entry["settings"] == {"gain": 0.25}
    path.unlink()
    always = {"adjoint": replace(TUNED["adjoint"], run=fails_always)}
    tune(methods=always)
    assert tuned_entries(path)["sr4x", "adjoint", 0]["settings"] is None
    run("--tuned", path, methods=always)
    record = by_row(tmp_path / "out")["sr4x", "adjoint", 0, 6]
    assert (record.tuned, record.tuned_calls) == (False, None)


def test_settings_of_the_nearest_number_of_calls_are_taken(tune, run, tmp_path):
    assert [nearest_calls({4: {}, 16: {}, 100: {}}, n) for n in (1, 4, 8, 9, 39, 41, 1000)] == [
        *(4, 4, 4, 16, 16, 100, None)
    ]
    assert nearest_calls({100: {}, 1000: {}}, 400) == 1000
    assert (nearest_calls({}, 4), nearest_calls({0: {}}, 0)) == (None, 0)
    path = tmp_path / "tuned.json"
    tune("--calls", 4, 16)
    chosen = {key: entry["settings"] for key, entry in tuned_entries(path).items()}
    assert chosen["sr4x", "gained", 4] != chosen["sr4x", "gained", 16]
    run("--tuned", path, "--nfe", 4, 7, 9, 50, "--metrics", "psnr", methods=TUNED)
    rows = by_row(tmp_path / "out")
    for nfe, nearest in ((4, 4), (7, 4), (9, 16), (50, 16)):
        record = rows["sr4x", "gained", nfe, 6]
        assert (record.tuned, record.tuned_calls) == (True, nearest)
        assert record.settings == chosen["sr4x", "gained", nearest]
    assert rows["sr4x", "adjoint", 0, 6].settings == {**chosen["sr4x", "adjoint", 0], "power": 2.0}
    assert not rows["sr4x", "noise", 0, 6].tuned
    old = {"tasks": {"sr4x": {"adjoint": {"nfe": 0, "trials": [], "settings": {"gain": 1.0}}}}}
    path.write_text(json.dumps(old))
    status, _, err = run("--tuned", path, methods=TUNED)
    assert status == 2
    assert "must have entries by number of calls, got nfe for adjoint: it was written by" in err


def test_the_score_is_the_geometric_mean_of_both_distances(run, place, tmp_path, monkeypatch):
    def distance(x, x0, scale):
        return scale * (x - x0).abs().flatten(1).mean(1)

    singles = {f"lpips-{net}": partial(distance, scale=s) for net, s in (("alex", 1), ("vgg", 9))}
    monkeypatch.setattr("harness.scores._SINGLE", singles)
    path = tmp_path / "tuned.json"
    known = ["--prior", place / "any", "--data", place / "of40", "--size", 32, "--out", path]
    run(*known, "--methods", "adjoint", "--trials", 1, "--images", 4, command=cli.run_tuning)
    assert json.loads(path.read_text())["score"] == "geometric mean of lpips-alex and lpips-vgg"
    (trial,) = tuned_entries(path)["sr4x", "adjoint", 0]["trials"]
    run(*known[:-2], "--methods", "adjoint", "--metrics", "lpips-alex", "--images", 4)
    record = by_row(tmp_path / "out")["sr4x", "adjoint", 0, 4]
    assert trial["score"] == pytest.approx(3 * record.mean("lpips-alex"))


def test_tuning_needs_the_weights_of_both_and_images(run, place, tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setattr("ncvsd_inverse.metrics._networks", {})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("NCVSD_WEIGHTS", str(tmp_path))
    known = ["--prior", place / "any", "--size", 32, "--out", tmp_path / "tuned.json"]
    status, _, err = run(*known, "--data", place / "of40", command=cli.run_tuning)
    assert status == 2
    assert "lpips_vgg_features.safetensors in the folder that NCVSD_WEIGHTS names" in err
    status = cli.run_tuning(METHODS, [str(part) for part in known])
    assert status == 2
    assert not (tmp_path / "tuned.json").exists()


def naps(problem, models, nfe, settings):
    time.sleep(len(problem.keys) * (0.002 + 0.003 * nfe))
    return torch.full(problem.shape, settings["gain"])


def test_the_estimate_is_near_the_time_it_takes(tune, tmp_path):
    sleepy = stub(
        "sleepy",
        naps,
        network="teacher",
        calls=(4,),
        settings={"gain": 0.1},
        search={"gain": Ladder()},
    )
    tune("--calls", 4, 40, "--trials", 4, methods={"sleepy": sleepy})
    plan = json.loads((tmp_path / "tuned.json").read_text())["plan"]
    seconds = 4 * 3 * (2 * 0.002 + 0.003 * 44)
    assert seconds / 1.5 < 3600 * plan["hours"] < 1.5 * seconds
    (tmp_path / "tuned.json").unlink()
    status, _, err = tune("--calls", 4, "--hours", 1e-6, methods={"sleepy": sleepy})
    assert status == 2
    assert "error: --hours must be at least" in err


# Methods of others

PLUG_IN = """
from dataclasses import replace

from baselines.interface import Method


def grey(problem, models, nfe, settings):
    return problem.y.new_zeros(problem.shape)


METHOD = Method(
    name="grey", title="Grey", run=grey, network="none", samples=False, linear_only=False,
    calls=(0,), reference="",
)
BOTH = [METHOD, replace(METHOD, name="grey2")]
TAKEN = replace(METHOD, name="noise")
OTHER = replace(METHOD, title="Other")
NONE = ()
NUMBER = 3
MIXED = (METHOD, 3)
"""


@pytest.mark.parametrize("source", ["plug_in_of_test", "json.py"])
def test_methods_of_others_have_rows(source, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = source if source.endswith(".py") else f"{source}.py"
    (tmp_path / file).write_text(PLUG_IN)
    status, _, err = run("--methods", f"{source}:BOTH", "noise", f"{source}:METHOD")
    assert (status, err) == (0, "")
    rows = by_row(tmp_path / "out")
    assert {name for _, name, _, _ in rows} == {"grey", "grey2", "noise"}
    assert rows["sr4x", "grey", 0, 6].title == "Grey"
    assert json.dumps({}) == "{}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:METHOD", "can be imported, got nowhere:METHOD: ModuleNotFoundError: No module"),
        ("nowhere.py:METHOD", "can be imported, got nowhere.py:METHOD: FileNotFoundError"),
        ("broken.py:METHOD", "got broken.py:METHOD: ZeroDivisionError: division by zero"),
        ("wrong.py:METHOD", "got wrong.py:METHOD: ValueError: calls must be at least 0 each"),
        ("plug.py:METHODS", "--methods must name what is in plug.py, got plug.py:METHODS"),
        ("plug.py:NUMBER", "a Method or a sequence of them, got plug.py:NUMBER, a int"),
        ("plug.py:NONE", "a Method or a sequence of them, got plug.py:NONE, a tuple of none"),
        ("plug.py:MIXED", "a sequence of Method alone, got plug.py:MIXED with a int"),
        ("plug.py:TAKEN", "names of their own, got plug.py:TAKEN, where noise is the name"),
        ("plug.py:OTHER", "names of their own, got plug.py:OTHER, where grey is the name"),
        (":METHOD", "can be imported, got :METHOD: ValueError"),
    ],
)
def test_what_is_no_method_of_others_is_told(name, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "plug.py").write_text(PLUG_IN)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "wrong.py").write_text(PLUG_IN.replace("calls=(0,)", "calls=()"))
    first = ["plug.py:METHOD"] if "OTHER" in name else []
    status, _, err = run("--methods", *first, name)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_peak_memory_is_that_of_the_call():
    models = SimpleNamespace(networks=[])
    device = torch.device("cpu")

    def hold(mebibytes):
        return torch.ones(mebibytes, 2**18)[:1, :1]

    small = [measure_call(partial(hold, 1), models, device)[1] for _ in range(2)]
    large = measure_call(partial(hold, 300), models, device)[1]
    assert 250 < (large.peak - small[1].peak) / 2**20 < 400
    if Path("/proc/self/clear_refs").exists():
        after = measure_call(partial(hold, 1), models, device)[1]
        assert (large.peak - after.peak) / 2**20 > 200
    assert (small[0] + large).peak == large.peak
    assert (small[0] + large).images == 2


SCRIPT = """
import sys
from pathlib import Path

import torch

from harness import cli
from tests.benchmarks.test_benchmark import METHODS

torch.set_num_threads(1)
if __name__ == "__main__":
    status = cli.run(METHODS)
    sys.exit(status)
"""


@pytest.mark.slow
def test_two_processes_write_the_rows_of_one(run, place, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = (ROOT, ROOT / "benchmarks", ROOT / "tests")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": str(tmp_path),
    }
    arguments = ["--methods", "ncvsd", "guided", "adjoint"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(script), "--task", "sr4x", *arguments]
    command += ["--prior", str(place / "tiny"), "--data", str(place / "of16")]
    command += ["--out", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    run(*arguments)
    two, one = by_row(tmp_path / "two"), by_row(tmp_path / "out")
    assert two.keys() == one.keys()
    assert len(two) == 4
    for name, record in two.items():
        assert record.key == one[name].key
        assert record.environment["processes"] == "2"
        for metric, entries in record.values.items():
            assert entries == pytest.approx(one[name].values[metric], abs=1e-3)
    # The tables of both processes' rows are there once.
    assert done.stdout.count("report.html") == 1
    assert (tmp_path / "two" / "report.html").exists()


def test_a_record_survives_its_file(run, tmp_path):
    run("--methods", "noise", "adjoint")
    path = tmp_path / "out" / RECORDS
    records = read_records(tmp_path / "out")
    assert "".join(f"{record.to_json()}\n" for record in records) == path.read_text()


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b'{"images": 3}', b'{"images": [3]}', b"[" * 100_000, b"\xff", b""]
)
def test_damaged_settings_are_named(run, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_bytes(content)
    status, _, err = run("--methods", "adjoint")
    assert status == 2
    assert "settings.json must be the settings of a results folder: " in err
    assert err.count("\n") == 1
    assert (tmp_path / "out" / "settings.json").read_bytes() == content


@pytest.mark.parametrize(
    "tasks",
    [
        {"sr4x": []},
        {"sr4x": {"scaled": []}},
        {"sr4x": {"scaled": {"4": {}}}},
        {"sr4x": {"scaled": {"9" * 5000: {"settings": None}}}},
        {"sr4x": {"scaled": {"4": {"settings": ["weight"]}}}},
        {"sr4x": {"scaled": {"4": {"settings": {"weight": "1"}}}}},
        {"sr4x": {"scaled": {"4": {"settings": {"weight": 10**400}}}}},
    ],
)
def test_damaged_tunings_are_named(tmp_path, tasks):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"tasks": tasks}))
    method = stub("scaled", chain, settings={"weight": 1.0})
    with pytest.raises(ValueError, match=r"tuned\.json(: weight of scaled)? must "):
        read_tuned(path, {"scaled": method})


def test_a_damaged_line_is_named_and_kept(run, tmp_path):
    run("--methods", "noise", "adjoint")
    path = tmp_path / "out" / RECORDS
    first, second = path.read_text().splitlines()
    damaged = first.replace('"nfe": 0', '"nfe": -1').replace('"nfe": 4', '"nfe": -1')
    path.write_text(f"{damaged}\n{second}\n")
    CALLS.clear()
    with pytest.warns(UserWarning, match="line 1 is damaged and left out: nfe must be at least 0"):
        run("--methods", "noise", "adjoint")
    assert len(CALLS) == 1
    assert path.read_text().splitlines()[0] == damaged
    with pytest.warns(UserWarning, match="line 1 is damaged"):
        assert len(read_records(tmp_path / "out")) == 2


def test_leftovers_of_a_kill_are_cleared(run, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    out = tmp_path / "out"
    out.mkdir()
    left = [out / f".{name}.{int(ended.stdout)}.7.part" for name in (RECORDS, "settings.json")]
    for path in left:
        path.write_bytes(b"half")
    run("--methods", "adjoint")
    assert not any(path.exists() for path in left)


def test_what_a_card_adds_to_the_weights_is_part_of_the_key():
    prior = copy.copy(load_prior("ncvsd_faces64"))
    before = cli._card_sha256(prior)
    points = {None: {10: Point(0.5, 0.5, 1.0, 0.1, 0.0)}}
    prior.card = replace(prior.card, points=points)
    assert cli._card_sha256(prior) != before
    prior.card = replace(prior.card, statistics=None, points=None)
    assert cli._card_sha256(prior) == ""


def test_a_last_line_that_was_cut_off_is_measured_anew(run, tmp_path):
    run("--methods", "noise", "adjoint")
    path = tmp_path / "out" / RECORDS
    whole = read_records(tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="the last line was cut off"):
        assert read_records(tmp_path / "out") == whole[:1]
    CALLS.clear()
    with pytest.warns(UserWarning, match="the last line was cut off"):
        run("--methods", "noise", "adjoint")
    assert [name for name, _ in CALLS] == ["noise"]
    assert [record.values for record in read_records(tmp_path / "out")] == [
        record.values for record in whole
    ]


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path

from harness.cache import Cache
from harness.records import read_records

first, folder = sys.argv[1:]
record, = read_records(Path(folder) / "one")
for nfe in range(int(first), 40, 2):
    Cache(Path(folder)).save(replace(record, nfe=nfe, key=str(nfe)))
"""


def test_two_processes_lose_no_record_of_each_other(run, tmp_path):
    run("--methods", "adjoint", "--out", tmp_path / "one")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    }
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(first), tmp_path], env=environment)
        for first in (0, 1)
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [record.nfe for record in read_records(tmp_path)] == list(range(40))


def test_time_is_that_of_the_method(run, tmp_path):
    def slow(problem, models, nfe, settings):
        time.sleep(0.02 * len(problem.y))
        return torch.zeros(problem.shape)

    run("--methods", "sleepy", methods={"sleepy": stub("sleepy", slow)})
    (record,) = read_records(tmp_path / "out")
    assert 0.02 <= record.seconds < 0.03
