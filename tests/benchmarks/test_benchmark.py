"""The benchmark's harness with stub methods and tiny random networks."""

import importlib
import json
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

from baselines.interface import Method
from harness import cache, cli
from harness.problems import find_test_set, load_images
from harness.records import RECORDS, read_records
from harness.runner import measure_call
from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.images import read_image, write_image
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.networks import ConcatDenoiser, Denoiser, UNetShape
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.priors import load_prior, save_prior
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


METHODS = {
    method.name: method
    for method in (
        stub("ncvsd", chain, network="student", samples=True, calls=(2, 3)),
        stub("guided", guided, network="teacher", calls=(2,)),
        stub("slow", guided, network="teacher", calls=(101,)),
        stub("adjoint", adjoint, linear_only=True, settings={"gain": 0.5, "power": 2.0},
             grid={"gain": (0.25, 1.0, 4.0)}),
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


def test_rows_with_what_they_count(run, tmp_path):
    status, printed, err = run("--slow-images", 4)
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
    assert {("ncvsd", 4), ("ncvsd", 5), ("guided", 2), ("slow", 101), ("noise", 0)} < rows
    assert ("ncvsd", 2) not in rows
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
        (("--prior", place / "any", "--size", 16), "prior is tiny there and any here"),
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


def test_tuning_chooses_the_best_and_goes_on(run, tmp_path):
    out = tmp_path / "tuned.json"
    arguments = ["--out", out, "--images", 3, "--task", "deblur_gaussian"]
    status, printed, _ = run(*arguments, command=cli.run_tuning)
    assert status == 0
    assert printed.count("adjoint") == 6
    content = json.loads(out.read_text())
    assert (content["metric"], content["images"], content["prior"]) == ("psnr", 3, "tiny")
    entry = content["tasks"]["deblur_gaussian"]["adjoint"]
    assert [trial["settings"]["gain"] for trial in entry["trials"]] == [0.25, 1.0, 4.0]
    scores = [trial["score"] for trial in entry["trials"]]
    best = entry["trials"][scores.index(max(scores))]["settings"]
    assert entry["settings"] == best
    assert scores[2] < min(scores[:2])

    CALLS.clear()
    del entry["trials"][1:], content["tasks"]["sr4x"]
    out.write_text(json.dumps(content))
    run(*arguments, command=cli.run_tuning)
    assert len(CALLS) == 2 + 3
    assert json.loads(out.read_text())["tasks"]["deblur_gaussian"]["adjoint"]["settings"] == best

    status, _, err = run(*arguments, "--seed", 1, command=cli.run_tuning)
    assert status == 2
    assert "--out must be the tuning of the same settings" in err

    run("--tuned", out, "--methods", "adjoint", "noise")
    rows = by_row(tmp_path / "out")
    gain = json.loads(out.read_text())["tasks"]["sr4x"]["adjoint"]["settings"]["gain"]
    tuned = rows["sr4x", "adjoint", 0, 6]
    assert (tuned.tuned, tuned.settings) == (True, {"gain": gain, "power": 2.0})
    assert not rows["sr4x", "noise", 0, 6].tuned


def test_tuning_refuses_large_grids_and_skips_failures(run, tmp_path):
    grid = {"gain": (1.0, 2.0), "power": (1.0, 2.0, 3.0, 4.0, 5.0)}
    large = {"adjoint": replace(METHODS["adjoint"], grid=grid)}
    out = tmp_path / "tuned.json"
    status, _, err = run("--out", out, command=cli.run_tuning, methods=large)
    assert (status, out.exists()) == (2, False)
    assert "the grid of adjoint must have at most 9 combinations, got 10" in err
    failing = replace(METHODS["fails"], settings={"gain": 1.0}, grid={"gain": (1.0, 2.0)})
    run("--out", out, command=cli.run_tuning, methods={"fails": failing})
    entry = json.loads(out.read_text())["tasks"]["sr4x"]["fails"]
    assert [trial["score"] for trial in entry["trials"]] == [None, None]
    assert entry["settings"] is None
    run("--tuned", out, methods={"fails": failing})
    assert not by_row(tmp_path / "out")["sr4x", "fails", 0, 6].tuned


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
    arguments = ["--methods", "ncvsd", "guided", "adjoint", "--slow-images", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(script), "--task", "sr4x", *arguments]
    command += ["--prior", str(place / "tiny"), "--data", str(place / "of16")]
    command += ["--out", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    run(*arguments)
    two, one = by_row(tmp_path / "two"), by_row(tmp_path / "out")
    assert two.keys() == one.keys()
    assert len(two) == 6
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
    path.write_text(f"{{\n{path.read_text()}")
    with pytest.raises(ValueError, match="line 1 is damaged, delete it to measure it anew"):
        run("--methods", "noise")


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
