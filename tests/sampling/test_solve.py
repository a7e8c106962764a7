"""The published loop, and what both loops share."""

import dataclasses
import json
import math
import multiprocessing
import re
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ncvsd_inverse
from ncvsd_inverse import DivergenceError, Result, load_prior, read_image
from ncvsd_inverse import operators as ops
from ncvsd_inverse.images import centre_crop
from ncvsd_inverse.priors import (
    DiffusionPrior,
    GaussianMixturePrior,
    GaussianPrior,
    NCVSDPrior,
    ncvsd_natural,
)
from ncvsd_inverse.priors.selfcheck import PHOTOGRAPH
from ncvsd_inverse.protocols import Point
from ncvsd_inverse.sampling.linear_solves import LinearSolver
from ncvsd_inverse.sampling.problem import Problem
from ncvsd_inverse.sampling.settings import point_settings
from ncvsd_inverse.schedules import karras

SHAPE = (3, 8, 6)

solve = partial(ncvsd_inverse.solve, method="gibbs")

# Few calls are enough to show most of what is tested here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:the schedule has one sweep only"),
    pytest.mark.filterwarnings("ignore:the residual is"),
]


def measurement(operator=None, batch=2, shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, *shape, generator=generator) * 2 - 1
    return (operator or box()).measure(x, 0.05, generator=generator)


def box():
    return ops.Inpaint.box(SHAPE[1:], 3)


def white_prior(shape=SHAPE):
    return GaussianPrior.stationary(torch.zeros(shape), torch.full(shape, 0.25))


class ShrinkPrior:
    """A user's prior: no network, no declared levels; keeps what it was asked and said."""

    def __init__(self):
        self.calls = []

    def sample(self, u, sigma, *, generator=None):
        x0 = torch.stack(
            [
                image / (1 + sigma**2) + 0.1 * torch.randn(image.shape, generator=source)
                for image, source in zip(u, generator, strict=True)
            ]
        )
        self.calls.append((sigma, x0))
        return x0


class Shrink(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.images = 0

    def forward(self, x, sigma):
        self.images += x.shape[0]
        return self.scale * x


class NetworkPrior:
    """A prior with a network that it calls `runs` times a draw and claims to call `claims`."""

    def __init__(self, runs=1, claims=1):
        self.network = Shrink()
        self.runs = runs
        self.nfe_per_sample = claims
        self.image_shape = None

    def sample(self, u, sigma, *, generator=None):
        for _ in range(self.runs):
            u = self.network(u, sigma)
        return u


class UsersBlur:
    """A user's operator with the least it may have, holding one gain an image."""

    def __init__(self, gains):
        self.gains = gains.view(-1, 1, 1, 1)
        self.batches = []

    def __call__(self, x):
        self.batches.append(x.shape[0])
        return self.gains * x

    adjoint = __call__

    def input_shape(self, y_shape):
        return tuple(y_shape)

    def solve_normal(self, rhs, *, a, b):
        return rhs / (a * self.gains**2 + b)


def small_problem():
    """A 3 x 4 image of a correlated Gaussian prior, blurred: everything as dense matrices."""
    height, width = 3, 4
    dim = height * width
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(dim, dim, generator=generator, dtype=torch.float64) * 0.2
    covariance = factor @ factor.T + 0.02 * torch.eye(dim, dtype=torch.float64)
    mean = 0.3 * torch.randn(dim, generator=generator, dtype=torch.float64)
    operator = ops.Blur(torch.tensor([[0.1, 0.5, 0.1], [0.05, 0.2, 0.05]]).double())
    basis = torch.eye(dim, dtype=torch.float64).view(dim, 1, height, width)
    matrix = operator(basis).flatten(1).T
    y = torch.randn(1, 1, height, width, generator=generator, dtype=torch.float64)
    prior = GaussianPrior(mean.view(1, height, width), covariance)
    return operator, prior, matrix, mean, covariance, y


def exact_chain_law(matrix, mean, covariance, y, sigma_y, schedule):
    """Mean and covariance of x0 after split-Gibbs sweeps from x0 = 0, by linear algebra."""
    eye = torch.eye(len(mean), dtype=mean.dtype)
    m, c = torch.zeros_like(mean), torch.zeros_like(covariance)
    for rho in schedule:
        p = torch.linalg.inv(matrix.T @ matrix / sigma_y**2 + eye / rho**2)
        m = p @ (matrix.T @ y / sigma_y**2 + m / rho**2)
        c = p + p @ c @ p / rho**4
        gain = covariance @ torch.linalg.inv(covariance + rho**2 * eye)
        m, c = mean + gain @ (m - mean), rho**2 * gain + gain @ c @ gain.T
    return m, c


@pytest.mark.parametrize(
    "schedule",
    [(0.4,), (3.0, 0.8, 0.3, 0.1), tuple(0.3 - 1e-6 * i for i in range(25))],
    ids=["one sweep", "annealed", "fixed rho"],
)
@pytest.mark.parametrize("sigma_lik", [None, 0.1])
def test_chain_has_the_law_that_linear_algebra_gives(schedule, sigma_lik):
    operator, prior, matrix, mean, covariance, y = small_problem()
    count = 2000
    result = solve(
        y,
        operator=operator,
        prior=prior,
        nfe=len(schedule),
        schedule=schedule,
        sigma_y=0.2,
        sigma_lik=sigma_lik,
        num_samples=count,
    )
    assert result.sigma_lik == (sigma_lik or 0.2)
    m, c = exact_chain_law(matrix, mean, covariance, y.flatten(), result.sigma_lik, schedule)
    samples = result.samples.flatten(1)
    # Four and a half standard errors: a few hundred entries are looked at.
    assert ((samples.mean(0) - m).abs() < 4.5 * (c.diagonal() / count).sqrt()).all()
    variances = c.diagonal()
    error = ((variances[:, None] * variances + c**2) / count).sqrt()
    assert ((torch.cov(samples.T) - c).abs() < 4.5 * error).all()


def test_annealed_chain_reaches_the_posterior():
    operator, prior, matrix, mean, covariance, y = small_problem()
    count, sigma_y = 400, 0.2
    result = solve(
        y,
        operator=operator,
        prior=prior,
        nfe=100,
        schedule=karras(100, 3.0, 0.02),
        sigma_y=sigma_y,
        num_samples=count,
    )
    precision = torch.linalg.inv(covariance) + matrix.T @ matrix / sigma_y**2
    posterior = torch.linalg.inv(precision)
    expected = posterior @ (
        torch.linalg.solve(covariance, mean) + matrix.T @ y.flatten() / sigma_y**2
    )
    stds = posterior.diagonal().sqrt()
    samples = result.samples.flatten(1)
    # Four Monte-Carlo standard errors of 0.05 stds (0.035 in the spread), and 0.05 of bias.
    assert ((samples.mean(0) - expected).abs() < 0.25 * stds).all()
    ratio = samples.std(0) / stds
    assert ((ratio - 1).abs() < 0.2).all()


def test_result_is_whole_and_frozen():
    operator, y = box(), measurement()
    result = solve(y.requires_grad_(), operator=operator, prior=white_prior(), nfe=3, num_samples=4)
    assert isinstance(result, Result)
    assert result.seconds > 0
    assert result.samples.shape == (4, 2, *SHAPE)
    assert result.std.shape == (2, *SHAPE)
    assert torch.equal(result.x0, result.mean)
    assert result.estimate == "mean"
    assert torch.allclose(result.mean, result.samples.mean(0))
    assert torch.allclose(result.std, result.samples.std(0))
    assert (result.method, result.schedule) == ("gibbs", karras(3, 3.0, 0.02))
    assert result.sigma_lik == 0.05
    assert not result.x0.requires_grad
    by_hand = (y - operator(result.x0)).flatten(1).norm(dim=1) / (0.05 * (3 * (48 - 9)) ** 0.5)
    assert torch.allclose(result.residual, by_hand.detach())
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.nfe = 1


class UpperRows:
    """A user's operator that says where it measures, and no more."""

    def __call__(self, x):
        return self.measured(2 * x)

    adjoint = __call__

    def input_shape(self, y_shape):
        return tuple(y_shape)

    def measured(self, y):
        return torch.cat((y[..., :3, :], torch.zeros_like(y[..., 3:, :])), -2)


MASKED = {
    "pixels": box(),
    "pixels of each image": ops.Inpaint(torch.rand(2, *SHAPE, generator=torch.Generator()) > 0.5),
    "frequencies": ops.MaskedFourier.lines(SHAPE[1:], 2, 0.25, centred=True),
    "blurred pixels": ops.Compose(box(), ops.GaussianBlur(1.0, 3)),
    "a user's": ops.Compose(UpperRows(), ops.Denoise()),
    "a user's alone": UpperRows(),
}


@pytest.mark.parametrize("method", ["gibbs", "conditioning"])
@pytest.mark.parametrize("name", MASKED)
def test_what_is_not_measured_is_of_no_account(name, method):
    """Users leave the picture there, or anything else."""
    operator = MASKED[name]
    y = measurement(operator if hasattr(operator, "measure") else ops.Denoise())
    measured = operator.measured(torch.ones_like(y)) != 0
    y = y.where(measured, 0)
    junk = torch.where(measured, y, 30.0)
    settings = {"operator": operator, "prior": white_prior(), "nfe": 4, "restarts": 2}
    clean, other = (ncvsd_inverse.solve(z, method=method, **settings) for z in (y, junk))
    assert torch.equal(other.x0, clean.x0)
    assert torch.equal(other.residual, clean.residual)
    error = (y - operator(clean.x0)).double().flatten(1)
    by_hand = error.norm(dim=1) / (0.05 * measured.flatten(1).sum(1).sqrt())
    assert torch.allclose(clean.residual.double(), by_hand)


def test_residuals_are_computed_in_float64():
    """The square of 1e25 is no float32."""
    y, x0, large = measurement(), torch.zeros(2, *SHAPE), 1e25
    plain = Problem.checked(y, box(), sigma_y=0.05, seed=0).residual(x0)
    scaled = Problem.checked(large * y, box(), sigma_y=0.05 * large, seed=0).residual(large * x0)
    torch.testing.assert_close(scaled, plain)


def test_output_follows_dtype_and_device(dtype, device):
    y = measurement().to(device, dtype)
    result = solve(y, operator=box(), prior=white_prior(), nfe=2, num_samples=2, restarts=2)
    for x in (result.x0, result.samples, result.mean, result.std, result.residual):
        assert x.dtype == dtype
        assert x.device.type == device.type


@pytest.mark.parametrize("runs", [1, 2])
def test_forward_passes_are_counted_by_what_runs(runs):
    prior = NetworkPrior(runs=runs, claims=runs)
    result = solve(measurement(), operator=box(), prior=prior, nfe=4, num_samples=3, batch_size=5)
    assert result.nfe == 4
    assert prior.network.images == 4 * 3 * 2
    assert not prior.network._forward_hooks
    again = solve(measurement(), operator=box(), prior=prior, nfe=2)
    assert again.nfe == 2


def test_a_diffusion_prior_counts_its_steps():
    prior = DiffusionPrior(lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2), num_steps=5)
    assert solve(measurement(), operator=box(), prior=prior, nfe=10).nfe == 10


def test_a_prior_that_miscounts_is_refused():
    with pytest.raises(ValueError, match=r"prior must call its network nfe_per_sample = 1 .* 4 im"):
        solve(measurement(), operator=box(), prior=NetworkPrior(runs=2, claims=1), nfe=2)


def test_the_hook_goes_when_the_loop_fails():
    prior = NetworkPrior()
    prior.network.scale.data.fill_(math.nan)
    with pytest.raises(DivergenceError):
        solve(measurement(), operator=box(), prior=prior, nfe=2)
    assert not prior.network._forward_hooks


def test_same_seed_same_result_and_more_samples_leave_the_first():
    operator, y, prior = box(), measurement(), white_prior()
    first = solve(y, operator=operator, prior=prior, nfe=3, num_samples=2, seed=5)
    again = solve(y, operator=operator, prior=prior, nfe=3, num_samples=2, seed=5)
    other = solve(y, operator=operator, prior=prior, nfe=3, num_samples=2, seed=6)
    more = solve(y, operator=operator, prior=prior, nfe=3, num_samples=4, seed=5)
    assert torch.equal(first.samples, again.samples)
    assert not torch.equal(first.samples, other.samples)
    assert torch.equal(more.samples[:2], first.samples)
    assert len({float(x.sum()) for x in more.samples.flatten(0, 1)}) == 8


def test_an_image_does_not_depend_on_its_batch():
    operator, y, prior = ops.GaussianBlur(1.0, 3), measurement(ops.Denoise(), 3), white_prior()
    together = solve(y, operator=operator, prior=prior, nfe=3, num_samples=2, seed=9)
    alone = solve(y[1:2], operator=operator, prior=prior, nfe=3, num_samples=2, seed=[(9, 1)])
    assert torch.allclose(together.samples[:, 1:2], alone.samples, atol=1e-6)
    by_image = solve(y, operator=operator, prior=prior, nfe=3, seed=[4, 5, 6])
    last = solve(y[2:], operator=operator, prior=prior, nfe=3, seed=[6])
    assert torch.allclose(by_image.x0[2:], last.x0, atol=1e-6)


def test_keys_of_chains_differ_and_stay():
    problem = Problem.checked(torch.zeros(2, *SHAPE), ops.Denoise(), sigma_y=None, seed=3)

    def keys(num_samples, restarts):
        parts = problem.chains(num_samples=num_samples, restarts=restarts, batch_size=3)
        return [key for part in parts for key in part.keys]

    assert len(set(keys(2, 2))) == 8
    assert keys(2, 2)[:4] == keys(2, 1)
    assert keys(2, 2)[:2] == keys(1, 1)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("per_image", [False, True])
def test_chunks_do_not_change_the_result(batch_size, per_image):
    mask = torch.rand(3, 1, *SHAPE[1:], generator=torch.Generator().manual_seed(2)) > 0.5
    operator = ops.Inpaint(mask if per_image else mask[0, 0])
    y = measurement(operator, 3)
    settings = {"operator": operator, "nfe": 3, "num_samples": 3, "restarts": 2}
    prior = ShrinkPrior()
    whole = solve(y, prior=ShrinkPrior(), **settings)
    parts = solve(y, prior=prior, batch_size=batch_size, **settings)
    assert torch.allclose(whole.samples, parts.samples, atol=1e-6)
    assert max(len(x0) for _, x0 in prior.calls) <= max(batch_size, 3 if per_image else 0)


def test_restarts_keep_the_run_that_fits_best_and_are_counted():
    operator, y, prior = ops.SuperResolution(2), measurement(ops.SuperResolution(2)), ShrinkPrior()
    once = solve(y, operator=operator, prior=ShrinkPrior(), nfe=2, num_samples=3)
    best = solve(y, operator=operator, prior=prior, nfe=2, num_samples=3, restarts=4)
    assert best.nfe == 8
    runs = prior.calls[-1][1].view(4, 3, 2, *SHAPE)
    assert torch.equal(runs[0], once.samples)
    misfit = (y - operator(runs.flatten(0, 2)).view(4, 3, *y.shape)).flatten(3).norm(dim=3)
    for sample in range(3):
        for image in range(2):
            kept = runs[misfit[:, sample, image].argmin(), sample, image]
            assert torch.equal(best.samples[sample, image], kept)
    assert (misfit.argmin(0) > 0).any()


def test_one_mask_an_image_serves_every_sample():
    masks = torch.rand(2, 1, *SHAPE[1:], generator=torch.Generator().manual_seed(4)) > 0.5
    operator = ops.Inpaint(masks)
    y = measurement(operator)
    together = solve(y, operator=operator, prior=white_prior(), nfe=3, num_samples=3, seed=[1, 2])
    for image, seed in enumerate([1, 2]):
        alone = solve(
            y[image : image + 1],
            operator=ops.Inpaint(masks[image, 0]),
            prior=white_prior(),
            nfe=3,
            num_samples=3,
            seed=[seed],
        )
        assert torch.allclose(together.samples[:, image], alone.samples[:, 0], atol=1e-6)
        assert torch.allclose(together.residual[image], alone.residual[0], atol=1e-5)


def test_a_users_operator_meets_its_own_batch_only():
    operator = UsersBlur(torch.tensor([0.5, 1.0, 2.0]))
    y = measurement(ops.Denoise(), 3)
    result = solve(y, operator=operator, prior=ShrinkPrior(), nfe=3, num_samples=4, restarts=2)
    assert set(operator.batches) == {3}
    assert result.samples.shape == (4, 3, *SHAPE)
    by_hand = (y - operator(result.x0)).flatten(1).norm(dim=1) / (0.05 * y[0].numel() ** 0.5)
    assert torch.allclose(result.residual, by_hand)


def test_noise_level_comes_from_the_operator_where_it_has_one():
    operator = UsersBlur(torch.ones(2))
    operator.sigma_y = 0.3
    y = measurement(ops.Denoise())
    assert solve(y, operator=operator, prior=ShrinkPrior(), nfe=1).sigma_lik == 0.3
    given = solve(y, operator=operator, prior=ShrinkPrior(), nfe=1, sigma_y=0.1)
    assert given.sigma_lik == 0.1


def test_other_processes_get_what_this_one_does():
    """Prior and operator travel to a spawned one, the prior of the package by its name."""
    frequencies = ops.MaskedFourier.lines((16, 16), 2, 0.25, centred=True)
    picture = measurement(ops.SuperResolution(2), 1, (3, 16, 16))
    tasks = [
        (measurement(), {"operator": box(), "prior": white_prior(), "num_samples": 2}),
        (picture, {"operator": ops.SuperResolution(2), "prior": ncvsd_natural}),
        (
            measurement(frequencies, 1, (3, 16, 16)),
            {"operator": frequencies, "prior": ncvsd_natural},
        ),
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        promised = [pool.submit(ncvsd_inverse.solve, y, nfe=2, **rest) for y, rest in tasks]
        for promise, (y, settings) in zip(promised, tasks, strict=True):
            theirs, ours = promise.result(), ncvsd_inverse.solve(y, nfe=2, **settings)
            # Another process may sum in another order.
            torch.testing.assert_close(theirs.samples, ours.samples)
            torch.testing.assert_close(theirs.residual, ours.residual)
            assert (theirs.nfe, theirs.schedule) == (ours.nfe, ours.schedule)


def test_estimates():
    y, prior = measurement(), ShrinkPrior()
    settings = {"operator": box(), "nfe": 4, "num_samples": 3}
    averaged = solve(y, prior=prior, estimate="ema", **settings)
    expected = None
    for _, x0 in prior.calls:
        expected = x0 if expected is None else 0.2 * expected + 0.8 * x0
    assert torch.allclose(averaged.x0, expected.view(3, 2, *SHAPE)[0], atol=1e-6)
    sample = solve(y, prior=ShrinkPrior(), **settings)
    assert torch.equal(averaged.samples, sample.samples)
    assert torch.equal(solve(y, prior=ShrinkPrior(), estimate="mean", **settings).x0, sample.mean)


def test_phase_retrieval_averages_below_its_level_only():
    operator, prior = ops.PhaseRetrieval(2), ShrinkPrior()
    y = operator.measure(torch.zeros(1, 1, 4, 4), 0.05)
    schedule = (0.5, 0.3, 0.15, 0.1)
    result = solve(y, operator=operator, prior=prior, nfe=4, schedule=schedule, estimate="ema")
    _, second, third, fourth = (x0 for _, x0 in prior.calls)
    expected = 0.6 * (0.6 * second + 0.4 * third) + 0.4 * fourth
    assert torch.allclose(result.x0, expected, atol=1e-6)


def test_published_settings_and_no_others():
    prior = ShrinkPrior()
    result = solve(measurement(), operator=box(), prior=prior, nfe=49, preset="ncvsd")
    assert [sigma for sigma, _ in prior.calls] == list(karras(50, 80.0, 0.002, 2.0)[:49])
    assert result.sigma_lik == pytest.approx(math.sqrt(1e-4 / 2))
    assert result.nfe == 49
    assert torch.equal(result.x0, result.samples[0])


def test_levels_are_called_in_order():
    prior, schedule = ShrinkPrior(), (2.0, 0.5, 0.1)
    result = solve(measurement(), operator=box(), prior=prior, nfe=3, schedule=list(schedule))
    assert tuple(sigma for sigma, _ in prior.calls) == schedule == result.schedule


class Poisoned(ShrinkPrior):
    def sample(self, u, sigma, *, generator=None):
        x0 = super().sample(u, sigma, generator=generator)
        if len(self.calls) == 2:
            x0[1, 0, 0, 0] = math.nan
        return x0


def test_divergence_names_sweep_and_level():
    with pytest.raises(
        DivergenceError, match=r"sweep 2 of 3 at rho = 0\.5: the prior's draw must stay finite"
    ):
        solve(measurement(), operator=box(), prior=Poisoned(), nfe=3, schedule=(2.0, 0.5, 0.1))


class Raising(ShrinkPrior):
    def sample(self, u, sigma, *, generator=None):
        raise DivergenceError("step size 0.1")


def test_divergence_of_a_step_gets_its_sweep():
    with pytest.raises(DivergenceError, match=r"sweep 1 of 2 at rho = 3: step size 0\.1"):
        solve(measurement(), operator=box(), prior=Raising(), nfe=2)


def test_progress_is_shown_on_standard_error_when_asked(capsys, monkeypatch):
    monkeypatch.setattr("ncvsd_inverse.machine.LINE_SECONDS", 0.0)
    for progress in (False, True):
        solve(measurement(), operator=box(), prior=ShrinkPrior(), nfe=3, progress=progress)
        out, err = capsys.readouterr()
        assert out == ""
        # Where standard error is no terminal, a line now and then.
        assert ("2 of 3 sweeps, about 0 s left\n" in err) is progress


class WrongShape(ShrinkPrior):
    def sample(self, u, sigma, *, generator=None):
        return u[:, :1]


class FourChannels(NetworkPrior):
    def __init__(self):
        super().__init__()
        self.network.image_channels = 4


BAD_VALUES = {
    "nfe zero": ({"nfe": 0}, r"\bnfe\b"),
    "nfe not divisible": ({"nfe": 3, "prior": NetworkPrior(2, 2)}, "nfe must be a multiple"),
    "sigma_y zero": ({"sigma_y": 0.0}, "sigma_y"),
    "sigma_y nan": ({"sigma_y": math.nan}, "sigma_y"),
    "sigma_lik": ({"sigma_lik": -1.0}, "sigma_lik"),
    "num_samples": ({"num_samples": 0}, "num_samples"),
    "restarts": ({"restarts": 0}, "restarts"),
    "batch_size": ({"batch_size": 0}, "batch_size"),
    "method": (
        {"method": "gibs"},
        "method must be one of conditioning, gibbs, got 'gibs'; did you mean gibbs",
    ),
    "estimate": ({"estimate": "median"}, "estimate must be one of point, sample, mean, ema"),
    "preset": ({"preset": "ncvs"}, "preset must be one of ncvsd"),
    "preset and schedule": ({"preset": "ncvsd", "schedule": (1.0,), "nfe": 1}, "preset must be"),
    "preset and sigma_lik": ({"preset": "ncvsd", "sigma_lik": 0.1}, "preset must be"),
    "preset, no family": ({"preset": "ncvsd", "operator": ops.Denoise()}, "family"),
    "schedule length": (
        {"schedule": (1.0, 0.1), "nfe": 3},
        "schedule must have .* 3 levels, got 2",
    ),
    "schedule rises": ({"schedule": (0.1, 1.0), "nfe": 2}, "schedule must be .*decreasing"),
    "schedule stays": ({"schedule": (0.1, 0.1), "nfe": 2}, "schedule must be .*decreasing"),
    "schedule zero": ({"schedule": (0.1, 0.0), "nfe": 2}, "schedule must be .*positive"),
    "schedule nan": ({"schedule": (0.1, math.nan), "nfe": 2}, "schedule must be"),
    "schedule infinite": ({"schedule": (math.inf, 0.1), "nfe": 2}, "schedule must be finite"),
    "schedule too high": (
        {"prior": DiffusionPrior(lambda x, s: x, num_steps=2), "schedule": (99.0,), "nfe": 2},
        "schedule must not exceed .* 80",
    ),
    "seed negative": ({"seed": -1}, "seed"),
    "seeds of other images": ({"seed": [1, 2, 3]}, "seed must be one or one for each of 2"),
    "prior name": ({"prior": "nowhere"}, "ncvsd_"),
    "prior of other images": (
        {"prior": white_prior((3, 4, 4))},
        r"\by must come from images of shape \(3, 4, 4\).*got \(2, 3, 8, 6\)",
    ),
    "prior of other channels": ({"prior": FourChannels()}, r"\by's images .* 4 channels, got 3"),
    "prior draws another shape": ({"prior": WrongShape()}, r"prior must draw x0 as \(2, 3, 8, 6\)"),
    "y not finite": ({"y": torch.full((2, *SHAPE), math.inf)}, r"\by\b must be finite"),
    "y without batch": ({"y": torch.zeros(SHAPE)}, r"\by\b"),
    "y a vector": ({"y": torch.zeros(4)}, r"\by\b"),
    "y empty": ({"y": torch.zeros(0, *SHAPE)}, r"\by\b"),
    "y of another mask": ({"y": torch.zeros(2, 3, 9, 9)}, r"\by\b must be a measurement.*\(9, 9\)"),
}


@pytest.mark.parametrize("case", list(BAD_VALUES))
def test_bad_values_name_the_argument(case):
    change, message = BAD_VALUES[case]
    arguments = {"y": measurement(), "operator": box(), "prior": ShrinkPrior(), **change}
    with pytest.raises(ValueError, match=message):
        solve(**arguments)


BAD_TYPES = {
    "y an array": ({"y": [[1.0]]}, "y must be a torch tensor"),
    "y of integers": ({"y": torch.zeros(2, *SHAPE, dtype=torch.uint8)}, "y must be a floating"),
    "y half": ({"y": torch.zeros(2, *SHAPE, dtype=torch.float16)}, "y must be float32 or float64"),
    "operator": ({"operator": torch.zeros(3)}, "operator must be callable"),
    "prior": ({"prior": object()}, "prior must have a sample method"),
    "nfe": ({"nfe": 2.5}, "nfe must be an integer"),
    "seed": ({"seed": 0.5}, "seed must be an integer"),
    "unknown": ({"nfee": 10}, "nfee"),
}


@pytest.mark.parametrize("case", list(BAD_TYPES))
def test_bad_types_name_the_argument(case):
    change, message = BAD_TYPES[case]
    arguments = {"y": measurement(), "operator": box(), "prior": ShrinkPrior(), **change}
    with pytest.raises(TypeError, match=message):
        solve(**arguments)


PROBLEMS = {
    "super-resolution": (partial(ops.SuperResolution, 4), 64),
    "hdr": (ops.HDR, 16),
    "phase retrieval": (partial(ops.PhaseRetrieval, 8), 16),
}


def given(name):
    """A problem and the arguments that solve it: with a shipped prior, or a Gaussian one."""
    make, side = PROBLEMS[name]
    shape = (3, side, side)
    prior = load_prior("ncvsd_faces64") if side == 64 else white_prior(shape)
    operator = make()
    return measurement(operator, batch=1, shape=shape), {"operator": operator, "prior": prior}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", ["conditioning", "gibbs"])
def test_solving_does_not_depend_on_the_callers_arithmetic(name, method, arithmetic):
    y, arguments = given(name)
    expected = solve(y, **arguments, method=method, nfe=2)
    with arithmetic():
        found = solve(y, **arguments, method=method, nfe=2)
    for field in ("samples", "x0", "mean", "residual"):
        value = getattr(found, field)
        assert value.dtype == torch.float32
        assert torch.equal(value, getattr(expected, field)), field
    assert found.nfe == expected.nfe == 2


class UsersCurve:
    """A user's operator that is not linear and holds a tensor."""

    def __init__(self):
        self.gains = torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)

    def __call__(self, x):
        return torch.tanh(self.gains * x)

    def input_shape(self, y_shape):
        return tuple(y_shape)


@pytest.mark.parametrize("method", ["conditioning", "gibbs"])
@pytest.mark.parametrize(
    "users", [UsersCurve, lambda: ops.Compose(ops.HDR(), ops.Blur(torch.full((3, 3), 1 / 9)))]
)
def test_what_was_made_in_inference_mode_is_solved(method, users):
    def make():
        operator, y = users(), measurement(batch=1)
        return y, {"operator": operator, "prior": white_prior()}

    y, arguments = make()
    expected = solve(y, **arguments, method=method, nfe=2)
    with torch.inference_mode():
        y, arguments = make()
        within = solve(y, **arguments, method=method, nfe=2)
    assert torch.equal(within.x0, expected.x0)
    assert torch.equal(solve(y, **arguments, method=method, nfe=2).x0, expected.x0)


class Watched(nn.Module):
    """A user's network, which keeps the dtypes in which it computes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.seen = set()

    def forward(self, x, *arguments):
        out = 0.5 * self.layer(x)
        self.seen.add(out.dtype)
        return out


class WatchedPrior:
    def __init__(self):
        self.network = Watched()

    def sample(self, u, sigma, *, generator=None):
        return self.network(u)


class WatchedBlur(UsersBlur):
    def __call__(self, x):
        self.seen = self.seen | {(x[0, 0] @ x[0, 0].T).dtype}
        return super().__call__(x)

    seen: frozenset = frozenset()
    adjoint = __call__


@pytest.mark.parametrize(
    "make",
    [
        WatchedPrior,
        lambda: DiffusionPrior(Watched(), image_shape=SHAPE),
        lambda: NCVSDPrior(Watched(), image_shape=SHAPE),
        lambda: DiffusionPrior.from_eps(Watched(), [0.9, 0.5, 1e-4], image_shape=SHAPE),
    ],
    ids=["prior", "denoiser", "generative denoiser", "noise predictor"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_users_network_alone_runs_under_the_callers_autocast(make, dtype):
    torch.manual_seed(0)
    prior, operator = make(), WatchedBlur(torch.ones(1))
    y = measurement(operator=box(), batch=1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = solve(y, operator=operator, prior=prior, nfe=2)
        layers = prior.network.modules()
        assert next(layer for layer in layers if isinstance(layer, Watched)).seen == {dtype}
        assert torch.is_autocast_enabled("cpu") == (dtype == torch.bfloat16)
    assert operator.seen == {torch.float32}
    assert result.x0.dtype == torch.float32


def test_threads_that_share_a_prior_get_what_each_gets_alone(at_once):
    prior = load_prior("ncvsd_faces64")
    shape = (3, 64, 64)
    operators = [
        ops.SuperResolution(4),
        ops.Denoise(),
        ops.Inpaint.box(shape[1:], 20),
        ops.GaussianBlur(1.0, 5),
    ]

    def call(place):
        operator = operators[place % 4]
        nfe = 2 + place % 2
        y = measurement(operator, batch=1, shape=shape, seed=place)
        method = ("conditioning", "gibbs")[place % 3 == 0]
        return nfe, solve(y, operator=operator, prior=prior, nfe=nfe, method=method, seed=place)

    def calls(thread):
        return [call(place) for place in range(3 * thread, 3 * thread + 3)]

    alone = [calls(thread) for thread in range(8)]
    together = at_once([partial(calls, thread) for thread in range(8)])
    for (nfe, expected), (_, found) in zip(chain(*alone), chain(*together), strict=True):
        assert found.nfe == expected.nfe == nfe
        assert torch.equal(found.samples, expected.samples)
    assert not prior.network._forward_hooks


ON_DEVICES = {
    "box": ops.Inpaint.box((16, 16), 8),
    "random": ops.Inpaint.random((16, 16), 0.3),
    "sr": ops.SuperResolution(4),
    "circular": ops.GaussianBlur(1.0, 5),
    "reflect": ops.GaussianBlur(1.0, 5, boundary="reflect"),
    "motion": ops.MotionBlur(5, 0.5, boundary="replicate"),
    "valid": ops.GaussianBlur(1.0, 5, boundary="valid"),
    "denoise": ops.Denoise(),
    "grey": ops.Colorize(),
    "sensing": ops.CompressedSensing((16, 16), 0.4),
    "fourier": ops.MaskedFourier.lines((16, 16), 3),
    "composed": ops.Compose(ops.SuperResolution(2), ops.GaussianBlur(1.0, 5)),
    "hdr": ops.HDR(),
    "phase": ops.PhaseRetrieval(8),
}


@pytest.mark.parametrize("name", ON_DEVICES)
@pytest.mark.parametrize("method", ["conditioning", "gibbs"])
def test_every_operator_is_solved_on_its_device(name, method, device):
    operator = ON_DEVICES[name]
    power = torch.fft.fftfreq(16)[:, None] ** 2 + torch.fft.fftfreq(16) ** 2
    prior = GaussianPrior.stationary(
        torch.zeros(3, 16, 16), (1 / (1 + 100 * power)).expand(3, 16, 16)
    )
    x = prior.draw(2, generator=torch.Generator().manual_seed(1)).to(device)
    y = operator.measure(x, 0.05, generator=torch.Generator(device).manual_seed(2))
    settings = {"operator": operator, "prior": prior, "method": method, "nfe": 4}
    result = ncvsd_inverse.solve(y, **settings)
    assert result.x0.device.type == device.type
    assert result.converged
    assert torch.isfinite(result.x0).all()
    if name not in ("hdr", "phase") and method == "conditioning":
        assert float(result.residual.max()) < 1.6


@pytest.mark.parametrize("name", ["ncvsd_faces64", "ncvsd_faces64_teacher", "ncvsd_natural"])
def test_shipped_priors_run_on_the_device(name, device):
    prior = load_prior(name, device)
    y = torch.zeros(2, 3, 64, 64, device=device)
    operator = ops.Inpaint.box((64, 64), 32)
    result = ncvsd_inverse.solve(y, operator=operator, prior=prior, nfe=2, seed=3)
    assert result.x0.device.type == device.type
    assert result.nfe == 2
    again = ncvsd_inverse.solve(y, operator=operator, prior=prior, nfe=2, seed=3)
    assert torch.equal(again.x0, result.x0)


def kinds_of_priors(device):
    def halved(x, sigma):
        return x / (1 + sigma.view(-1, 1, 1, 1).square())

    mean = torch.zeros(3, 16, 16, device=device)
    spread = torch.full((3, 16, 16), 0.25, device=device)
    unit = 0.1 * torch.eye(3, device=device)
    yield GaussianPrior.stationary(mean, spread)
    yield GaussianPrior(torch.zeros(3, 1, 1, device=device), unit)
    yield GaussianMixturePrior(
        torch.ones(2, device=device) / 2,
        torch.zeros(2, 3, 1, 1, device=device),
        unit.expand(2, 3, 3),
    )
    yield DiffusionPrior.from_function(halved, image_shape=(3, 16, 16))
    yield DiffusionPrior.from_eps(Watched().to(device), [0.9, 0.5, 1e-4], image_shape=(3, 16, 16))
    yield NCVSDPrior(Watched().to(device), image_shape=(3, 16, 16))
    yield ncvsd_inverse.tiled(load_prior("ncvsd_natural", device), 64)
    yield load_prior("ncvsd_faces64", device, torch.float16 if device.type == "cuda" else None)


@pytest.mark.filterwarnings("ignore:the covariances of a GaussianMixturePrior")
@pytest.mark.filterwarnings("ignore:prior has no statistics")
def test_every_kind_of_prior_restores_on_its_device(device):
    operator = ops.Denoise()
    for prior in kinds_of_priors(device):
        shape = getattr(prior, "image_shape", None) or (3, 64, 64)
        y = torch.zeros(2, *shape, device=device)
        result = ncvsd_inverse.solve(y, operator=operator, prior=prior, nfe=2)
        assert result.x0.device.type == device.type
        assert torch.isfinite(result.x0).all()


def test_a_compiled_prior_restores_as_the_plain_one(monkeypatch):
    compiled = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda network, mode: compiled(network))
    prior = load_prior("ncvsd_faces64")
    y = measurement(ops.SuperResolution(4), shape=(3, 64, 64))
    settings = {"operator": ops.SuperResolution(4), "nfe": 2}
    plain = ncvsd_inverse.solve(y, prior=prior, **settings)
    result = ncvsd_inverse.solve(y, prior=prior.compiled(), **settings)
    assert result.nfe == 2
    torch.testing.assert_close(result.x0, plain.x0, rtol=0, atol=2e-2)


@pytest.mark.parametrize("method", ["conditioning", "gibbs"])
def test_no_noise_at_all_is_refused_with_the_least_that_makes_sense(method):
    settings = {"operator": box(), "prior": white_prior(), "method": method}
    with pytest.raises(
        ValueError, match=r"got 0: .* 0\.002 for pictures .* 1e-07 for this y of fl"
    ):
        ncvsd_inverse.solve(torch.zeros(1, *SHAPE), sigma_y=0, **settings)
    with pytest.raises(ValueError, match=r"no less than 2e-13 for this y of float64"):
        ncvsd_inverse.solve(torch.full((1, *SHAPE), 1e3).double(), sigma_y=0.0, **settings)


class Steep:
    """A user's matrix whose singular values span four decades, solved by conjugate gradients."""

    def __init__(self):
        size = math.prod(SHAPE)
        source = torch.Generator().manual_seed(0)
        left, right = (
            torch.linalg.qr(torch.randn(size, size, generator=source, dtype=torch.float64))[0]
            for _ in range(2)
        )
        self.matrix = left @ torch.logspace(0, -4, size, dtype=torch.float64).diag() @ right

    def __call__(self, x):
        return (x.flatten(1).double() @ self.matrix.T).to(x).view(x.shape)

    def adjoint(self, y):
        return (y.flatten(1).double() @ self.matrix).to(y).view(y.shape)

    def input_shape(self, y_shape):
        return tuple(y_shape)


@pytest.mark.parametrize("method", ["conditioning", "gibbs"])
def test_a_solve_that_falls_short_is_told_and_a_worthless_one_refused(method, monkeypatch):
    operator, prior = Steep(), white_prior()
    x = prior.draw(2, generator=torch.Generator().manual_seed(1)).double()
    y = operator(x) + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    settings = {"operator": operator, "prior": prior, "method": method, "sigma_y": 1e-3, "nfe": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = ncvsd_inverse.solve(y, **settings)
    assert whole.converged
    warned = []
    for most in (round(400 / 1.1**step) for step in range(60)):
        monkeypatch.setattr(LinearSolver, "max_iterations", most)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = ncvsd_inverse.solve(y, **settings)
            except ncvsd_inverse.DivergenceError as error:
                refused = str(error)
                break
        assert result.converged == (not caught)
        warned += caught
    else:
        pytest.fail("no number of iterations is too few")
    assert re.search(r"sweep \d of 2 .* ended .* stds from its solution", refused)
    assert warned
    assert all("linear solves fell short by 0." in str(item.message) for item in warned)
    assert {item.filename for item in warned} == {__file__}


@pytest.mark.parametrize("name", ["box", "random", "sr", "circular", "reflect", "denoise", "grey"])
@pytest.mark.parametrize("method", ["conditioning", "gibbs"])
def test_images_fit_y_however_little_noise_there_is(name, method):
    operator = ON_DEVICES[name]
    power = torch.fft.fftfreq(16)[:, None] ** 2 + torch.fft.fftfreq(16) ** 2
    prior = GaussianPrior.stationary(
        torch.zeros(3, 16, 16), (1 / (1 + 100 * power)).expand(3, 16, 16)
    )
    x = prior.draw(2, generator=torch.Generator().manual_seed(1))
    for sigma_y in (1e-2, 1e-4, 1e-6):
        y = operator.measure(x, sigma_y, generator=torch.Generator().manual_seed(2))
        settings = {"operator": operator, "prior": prior, "method": method, "sigma_y": sigma_y}
        result = ncvsd_inverse.solve(y, nfe=10, estimate="sample", **settings)
        assert result.converged
        assert 0.4 < float(result.residual.min()) <= float(result.residual.max()) < 1.6
        assert float(result.x0.abs().max()) < 2 * float(x.abs().max())


# Point estimates.


def coloured_prior(**changes):
    power = torch.fft.fftfreq(8)[:, None] ** 2 + torch.fft.fftfreq(6) ** 2
    spectrum = (1 / (1 + 100 * power)).expand(SHAPE)
    return GaussianPrior.stationary(torch.zeros(SHAPE), spectrum, **changes)


def test_a_point_is_the_default_of_one_image_and_nearer_to_the_truth():
    prior = coloured_prior()
    x0 = prior.draw(100, generator=torch.Generator().manual_seed(1))
    y = box().measure(x0, 0.05, generator=torch.Generator().manual_seed(2))
    settings = {"operator": box(), "prior": prior, "nfe": 10}
    point = ncvsd_inverse.solve(y, **settings)
    assert (point.estimate, point.nfe, len(point.schedule)) == ("point", 10, 10)
    assert torch.equal(point.samples[0], point.x0)
    assert point.std is None
    drawn = ncvsd_inverse.solve(y, estimate="sample", **settings)
    mean = ncvsd_inverse.solve(y, num_samples=32, **settings)
    assert (drawn.estimate, mean.estimate) == ("sample", "mean")
    errors = [float((each.x0 - x0).square().mean()) for each in (point, drawn, mean)]
    # A draw has twice the squared error of the posterior mean.
    assert errors[1] > 1.8 * errors[2]
    assert errors[0] < 1.5 * errors[2]


def test_a_point_runs_beside_several_samples():
    prior, y = coloured_prior(), measurement()
    settings = {"operator": box(), "prior": prior, "nfe": 4, "seed": 3}
    drawn = ncvsd_inverse.solve(y, num_samples=3, **settings)
    both = ncvsd_inverse.solve(y, num_samples=3, estimate="point", **settings)
    alone = ncvsd_inverse.solve(y, **settings)
    assert torch.equal(both.samples, drawn.samples)
    assert torch.equal(both.x0, alone.x0)
    assert torch.equal(both.std, drawn.std)
    assert (both.nfe, both.schedule, both.estimate) == (4, alone.schedule, "point")
    assert both.schedule != drawn.schedule


def test_the_last_call_of_a_point_returns_the_mean_at_the_last_level():
    class Watched(GaussianPrior):
        asked = ()

        def sample(self, u, sigma, *, generator=None):
            type(self).asked += (("sample", sigma),)
            return super().sample(u, sigma, generator=generator)

        def denoise(self, u, sigma):
            type(self).asked += (("denoise", sigma),)
            self.given = u
            return super().denoise(u, sigma)

    prior = Watched.stationary(torch.zeros(SHAPE), torch.full(SHAPE, 0.25))
    settings = {"operator": box(), "prior": prior, "temperature": 1.0}
    result = ncvsd_inverse.solve(measurement(), nfe=3, schedule=(0.5, 0.2, 0.04), **settings)
    assert Watched.asked == (("sample", 0.5), ("sample", 0.2), ("denoise", 0.04))
    assert result.schedule == (0.5, 0.2, 0.04)
    Watched.asked = ()
    once = ncvsd_inverse.solve(measurement(), nfe=1, schedule=(0.3,), **settings)
    assert Watched.asked == (("denoise", 0.3),)
    assert once.nfe == 1


def test_a_prior_that_gives_no_mean_ends_a_point_on_y():
    class Tempered(ShrinkPrior):
        def tempered(self, temperature):
            return self

    statistics = coloured_prior().statistics
    prior = Tempered()
    prior.statistics = statistics
    result = ncvsd_inverse.solve(measurement(), operator=box(), prior=prior, nfe=3)
    assert (result.estimate, result.nfe) == ("point", 3)
    assert [level for level, _ in prior.calls] == list(result.schedule)


def test_where_there_is_no_point():
    y, settings = measurement(), {"operator": box(), "nfe": 2}
    assert solve(y, prior=coloured_prior(), **settings).estimate == "sample"
    with pytest.raises(ValueError, match=r"estimate must be one of 'sample', .*method 'gibbs'"):
        solve(y, prior=coloured_prior(), estimate="point", **settings)
    many = DiffusionPrior(lambda x, s: x, num_steps=2, statistics=coloured_prior().statistics)
    assert ncvsd_inverse.solve(y, prior=many, **settings).estimate == "sample"
    with pytest.raises(ValueError, match="with a prior without tempered draws, got 'point'"):
        ncvsd_inverse.solve(y, prior=many, estimate="point", **settings)


def test_noise_is_estimated_for_the_published_loop_too():
    x = centre_crop(read_image(PHOTOGRAPH), (64, 64))
    y = ops.Denoise().measure(x, 0.1, generator=torch.Generator().manual_seed(0))
    prior = load_prior("ncvsd_natural")
    result = solve(y, operator=ops.Denoise(), prior=prior, nfe=2, sigma_y="auto")
    assert result.method == "gibbs"
    assert float(result.sigma_y) == pytest.approx(0.1, rel=0.15)


def test_settings_of_a_point_are_those_of_the_nearest_calls_at_the_noise_of_y():
    rows = {
        None: {10: Point(0.5, 0.7, 3.0, 0.05, 0.03)},
        "blur": {2: Point(0.4, 0.8, 1.0, 0.2, 0.0), 20: Point(0.6, 0.6, 0.8, 0.05, 0.04)},
    }
    assert point_settings("blur", 6, 0.05, rows) == rows["blur"][2]
    assert point_settings("blur", 7, 0.05, rows) == rows["blur"][20]
    assert point_settings("hdr", 1, 0.05, rows) == rows[None][10]
    quiet = point_settings("blur", 50, 0.01, rows)
    assert quiet == pytest.approx((0.6, 0.6, 0.8, 0.01, 0.008))
    # A last call below half a step of 8 bits has nothing to take away.
    assert point_settings("blur", 50, 0.004, rows).last == 0
    loud = point_settings("blur", 1, 0.5, rows)
    assert loud == pytest.approx((0.4, 0.8, 1.0, 1.0, 0.0))


def test_the_noise_that_settings_go_by_is_that_of_images():
    """A physics of images in [0, 1], counts and amplitudes have units of their own."""
    x = 0.2 * torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    step = 0.01 * torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    counts = ops.Poisson(50.0)
    for operator in (
        counts,
        ops.PhaseRetrieval(0),
        ops.Denoise(),
        ops.Compose(counts, ops.Denoise()),
    ):
        change = (operator(x + step) - operator(x)).norm() / step.norm()
        assert 0.6 < float(change) / operator.gain < 1.1
    y, prior = ops.Poisson(20.0)(torch.zeros(1, *SHAPE)), coloured_prior()
    prior.points = {None: {4: Point(0.5, 0.7, 3.0, 0.05, 0.03)}}
    result = ncvsd_inverse.solve(y, operator=ops.Poisson(20.0), prior=prior, nfe=4)
    assert result.schedule[-1] == pytest.approx(0.03 * (1 / 10**0.5) / 0.05)


def test_a_prior_may_bring_settings_of_its_own():
    prior = coloured_prior()
    prior.points = {None: {10: Point(0.9, 0.5, 0.7, 0.1, 0.0)}}
    result = ncvsd_inverse.solve(measurement(), operator=box(), prior=prior, nfe=3)
    assert result.schedule == karras(3, 0.7, 0.1)
    assert result.sigma_lik == 0.025


def test_a_callback_sees_every_call():
    seen = []
    settings = {"operator": box(), "prior": coloured_prior(), "nfe": 3}
    result = ncvsd_inverse.solve(measurement(), callback=seen.append, **settings)
    assert [(step.call, step.calls, step.rho) for step in seen] == [
        (place, 3, rho) for place, rho in enumerate(result.schedule, start=1)
    ]
    assert torch.equal(seen[-1].x0, result.x0)

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ncvsd_inverse.solve(measurement(), callback=stop, **settings)


# What comes back.


def faces_result(**settings):
    prior = coloured_prior()
    return ncvsd_inverse.solve(measurement(), operator=box(), prior=prior, nfe=2, **settings)


def test_a_result_prints_in_five_lines():
    lines = repr(faces_result()).splitlines()
    assert len(lines) == 5
    assert lines[0] == "2 images of 3 x 8 x 6, torch.float32: point estimate"
    assert lines[1].startswith("conditioning loop, 2 network calls at levels ")
    assert lines[3].startswith("residual ")
    several = repr(faces_result(num_samples=3)).splitlines()
    assert len(several) == 5
    assert several[0].endswith("mean of the samples, 3 samples each with their std")
    assert several[2] == "noise of y 0.05, assumed 0.05"


def test_a_notebook_shows_the_images(tmp_path):
    result = faces_result()
    (tmp_path / "shown.png").write_bytes(result._repr_png_())
    shown = read_image(tmp_path / "shown.png")
    assert shown.shape == (1, 3, 8, 12)
    assert torch.allclose(shown[..., :6], result.x0[:1].clamp(-1, 1), atol=0.005)


def test_a_saved_result_holds_the_pictures_and_the_numbers(tmp_path):
    result = faces_result(num_samples=3)
    for _ in range(2):
        result.save(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    names = ["0.png", "0_std.png", "1.png", "1_std.png", "result.json", "result.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert torch.allclose(read_image(folder / "1.png"), result.x0[1:].clamp(-1, 1), atol=0.005)
    tensors = load_file(folder / "result.safetensors")
    assert torch.equal(tensors["samples"], result.samples)
    assert torch.equal(tensors["std"], result.std)
    figures = json.loads((folder / "result.json").read_text())
    assert figures["residual"] == pytest.approx(result.residual.tolist())
    assert (figures["estimate"], figures["nfe"]) == ("mean", 2)
    assert figures["kernel_numbers"] is None
    faces_result().save(tmp_path / "one")
    assert not (tmp_path / "one" / "0_std.png").exists()


def test_a_plot_shows_what_is_a_picture():
    result = faces_result(num_samples=2)

    def columns(figure):
        return [axis.get_title() for axis in figure.axes if axis.get_title()]

    assert columns(result.plot()) == ["measurement", "estimate", "std"]
    assert columns(result.plot(torch.zeros(2, *SHAPE))) == [
        *("truth", "measurement", "estimate", "std")
    ]
    assert columns(faces_result().plot()) == ["measurement", "estimate"]
    counts = dataclasses.replace(result, y=torch.zeros(2, 48))
    assert columns(counts.plot()) == ["estimate", "std"]
    shown = result.plot().axes[1].images[0].get_array()
    assert torch.allclose(
        torch.tensor(shown).permute(2, 0, 1), (result.x0[0].clamp(-1, 1) + 1) / 2, atol=1e-6
    )
    with pytest.raises(ValueError, match="truth must have shape"):
        result.plot(torch.zeros(1, *SHAPE))
