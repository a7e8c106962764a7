"""Numbers of numpy wherever Python's are taken, and sizes as one integer or a pair."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from ncvsd_inverse import checks, karras, make_task, measure_statistics, solve, tiled
from ncvsd_inverse import operators as ops
from ncvsd_inverse.evaluation import evaluate
from ncvsd_inverse.priors import DiffusionPrior, GaussianPrior

TWO, EIGHT, HALF = np.int64(2), np.uint8(8), np.float32(0.5)
PIXELS = 3 * 8 * 8
MEAN, COVARIANCE = torch.zeros(3, 8, 8), torch.eye(PIXELS) / 4
PRIOR = GaussianPrior(MEAN, COVARIANCE)
X = torch.linspace(-1, 1, PIXELS).reshape(1, 3, 8, 8)
DENOISER = DiffusionPrior(PRIOR.denoise, image_shape=(3, 8, 8))


def solved(**options):
    y = X + 0.1
    return solve(y, operator=ops.Denoise(), prior=PRIOR, **options).samples


def drawn(prior):
    return prior.sample(X, 0.5, generator=torch.Generator().manual_seed(0))


def masked(operator):
    return operator.mask


def statistics(**options):
    return measure_statistics(PRIOR, torch.cat([X, -X]), **options).spectra


def judged(**options):
    images = torch.cat([X, -X])
    found = evaluate(PRIOR, DENOISER, images, **options)
    json.dumps(asdict(found))
    return torch.tensor([level.crps.value for level in found.levels])


SAME = {
    "karras": (
        lambda n, s, e: torch.tensor(karras(n, s, e)),
        (3, 2.0, 0.5),
        (np.int32(3), np.float64(2), HALF),
    ),
    "inpaint_box": (lambda a, b: masked(ops.Inpaint.box(a, b)), ((8, 8), (2, 2)), (EIGHT, TWO)),
    "inpaint_box_pair": (
        lambda a, b: masked(ops.Inpaint.box(a, b)),
        ((8, 6), (2, 4)),
        (np.array([8, 6]), [TWO, np.int16(4)]),
    ),
    "inpaint_random": (
        lambda a, k, s: masked(ops.Inpaint.random(a, k, s)),
        ((8, 8), 0.5, 2),
        (8, HALF, TWO),
    ),
    "lines": (
        lambda a, f, c, s: masked(ops.MaskedFourier.lines(a, f, c, s)),
        ((8, 8), 2.0, 0.5, 2),
        (EIGHT, np.float16(2), HALF, TWO),
    ),
    "compressed": (
        lambda a, r, s: ops.CompressedSensing(a, r, s)(X),
        ((8, 8), 0.5, 2),
        (EIGHT, HALF, TWO),
    ),
    "superres": (lambda f: ops.SuperResolution(f)(X), (2,), (TWO,)),
    "gaussian_blur": (lambda s, k: ops.GaussianBlur(s, k)(X), (0.5, 3), (HALF, np.int8(3))),
    "motion_blur": (lambda k, i, s: ops.MotionBlur(k, i, s)(X), (8, 0.5, 2), (EIGHT, HALF, TWO)),
    "phase": (lambda p: ops.PhaseRetrieval(p)(X), (8,), (EIGHT,)),
    "hdr": (lambda s: ops.HDR(s)(X), (0.5,), (HALF,)),
    "poisson": (lambda p: ops.Poisson(p)(X), (0.5,), (HALF,)),
    "measure": (
        lambda s: ops.Denoise().measure(X, s, generator=torch.Generator().manual_seed(0)),
        (0.5,),
        (HALF,),
    ),
    "solve_normal": (
        lambda a, b: ops.SuperResolution(2).solve_normal(X, a=a, b=b),
        (2, 0.5),
        (TWO, HALF),
    ),
    "from_function": (
        lambda shape: ops.from_function(lambda x: 2 * x, shape, linear=False)(X),
        ((3, 8, 8),),
        (np.array([3, 8, 8]),),
    ),
    "task": (
        lambda a, s: make_task("inpaint_random", a, seed=s).operator(X),
        ((8, 8), 2),
        (EIGHT, TWO),
    ),
    "task_pair": (
        lambda a, s: make_task("deblur_motion", a, seed=s).operator(torch.cat([X, X[..., :2]], 3)),
        ((8, 10), 2),
        (np.array([8, 10]), TWO),
    ),
    "solve": (
        lambda n, y, k, r, b, s: solved(
            nfe=n, sigma_y=y, num_samples=k, restarts=r, batch_size=b, seed=s
        ),
        (2, 0.5, 2, 2, 8, 2),
        (TWO, HALF, TWO, TWO, EIGHT, TWO),
    ),
    "solve_levels": (
        lambda levels, s, t, lik: solved(
            nfe=2, num_samples=2, schedule=levels, seed=s, temperature=t, sigma_lik=lik
        ),
        ([1.0, 0.5], [(2, 8)], 0.5, 0.5),
        (np.array([1.0, 0.5], np.float32), np.array([[2, 8]]), HALF, HALF),
    ),
    "tempered": (lambda t: drawn(PRIOR.tempered(t)), (0.5,), (HALF,)),
    "sample": (
        lambda s: PRIOR.sample(X, s, generator=torch.Generator().manual_seed(0)),
        (0.5,),
        (HALF,),
    ),
    "draw": (lambda n: PRIOR.draw(n, generator=torch.Generator().manual_seed(0)), (2,), (TWO,)),
    "generate": (
        lambda n, k, s, b: DENOISER.generate(n, k, s, batch_size=b),
        (2, 2, 2, 8),
        (TWO, TWO, TWO, EIGHT),
    ),
    "image_shape": (
        lambda shape, n: drawn(DiffusionPrior(PRIOR.denoise, image_shape=shape, num_steps=n)),
        ((3, 8, 8), 2),
        (np.array([3, 8, 8]), TWO),
    ),
    "statistics": (
        lambda levels, s, b: statistics(levels=levels, seed=s, batch_size=b),
        ([0.5, 1.0], 2, 2),
        (np.array([0.5, 1.0]), TWO, TWO),
    ),
    "evaluate": (
        lambda levels, n, s: judged(levels=levels, draws=n, teacher_draws=n, seed=s),
        ([0.5, 2.0], 2, 2),
        (np.array([0.5, 2.0]), TWO, TWO),
    ),
    "tiled": (
        lambda tile, overlap: (
            tiled(DiffusionPrior(PRIOR.denoise), tile, overlap).network(X, X[:, 0, 0, 0] ** 2)
        ),
        (8, 2),
        (EIGHT, TWO),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_numpys_numbers_are_pythons(name):
    make, python, numpy = SAME[name]
    wanted, found = make(*python), make(*numpy)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


def test_what_is_kept_are_pythons_numbers():
    blur = ops.MotionBlur(EIGHT, HALF, TWO)
    kept = {**vars(ops.PhaseRetrieval(TWO)), **vars(ops.Poisson(HALF))}
    kept |= {name: vars(blur)[name] for name in ("kernel_size", "intensity", "seed")}
    kept |= {"size": ops.CompressedSensing(EIGHT).size, "levels": karras(TWO, HALF, HALF / 2)}
    kept["nfe"] = DENOISER.with_steps(TWO).nfe_per_sample
    assert json.loads(json.dumps(kept))["kernel_size"] == 8


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        (4, (4, 4)),
        (np.int32(4), (4, 4)),
        ((4, 6), (4, 6)),
        ([np.int64(4), 6], (4, 6)),
        (torch.Size((4, 6)), (4, 6)),
        (np.array([4, 6]), (4, 6)),
    ],
)
def test_sizes(size, sides):
    found = checks.check_size("size", size)
    assert found == sides
    assert all(type(side) is int for side in found)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (4.0, TypeError, r"size must be one integer or \(height, width\), got 4.0"),
        (True, TypeError, "size must be an integer, got True"),
        ("44", TypeError, r"size must be one integer or \(height, width\), got '44'"),
        (None, TypeError, r"size must be one integer or \(height, width\), got None"),
        ((4,), ValueError, r"size must be one integer or \(height, width\), got \(4,\)"),
        ((4, 4, 4), ValueError, r"size must be one integer or \(height, width\), got \(4, 4, 4\)"),
        ((4, 0), ValueError, "size must be at least 1, got 0"),
        ((4, 2.5), TypeError, "size must be an integer, got 2.5"),
        (torch.zeros(4, 4), TypeError, r"got tensor of shape \(4, 4\)"),
    ],
)
def test_wrong_sizes(size, error, message):
    with pytest.raises(error, match=message):
        checks.check_size("size", size)


@pytest.mark.parametrize(
    "value", [True, np.True_, "3", None, 1j, [3.0], torch.ones(3), np.ones(1), b"3"]
)
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match="scale must be a number, got "):
        checks.check_positive("scale", value)
    with pytest.raises(TypeError, match="nfe must be an integer, got "):
        checks.check_count("nfe", value)


@pytest.mark.parametrize("value", [0.5, HALF, np.array(0.5), torch.tensor(0.5), np.float16(0.5)])
def test_what_is_a_number(value):
    found = checks.check_positive("scale", value)
    assert type(found) is float
    assert found == 0.5


@pytest.mark.parametrize("bits", [63, 1500, 100_000])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_integers_are_refused_on_one_short_line(bits, sign):
    with pytest.raises(ValueError, match="seed must be ") as caught:
        checks.check_count("seed", sign * 2**bits)
    assert len(str(caught.value)) < 120
    if bits > 1024:
        with pytest.raises(ValueError, match="scale must be positive and finite, got an integer"):
            checks.check_positive("scale", sign * 2**bits)


@pytest.mark.parametrize("levels", [[], [1, 1], [0.5, 1], [1, 0], [math.inf, 1], [math.nan]])
def test_levels_fall(levels):
    with pytest.raises(ValueError, match="schedule must be finite, positive and decreasing, got"):
        checks.check_falling("schedule", levels)


@pytest.mark.parametrize("levels", ["21", 3, None, ["a"], torch.ones(2, 2)])
def test_levels_are_numbers(levels):
    with pytest.raises(TypeError, match=r"schedule must be a (sequence of )?number"):
        checks.check_falling("schedule", levels)
