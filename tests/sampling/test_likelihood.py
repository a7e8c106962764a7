"""The likelihood step against its closed-form law."""

import math

import pytest
import torch

from ncvsd_inverse import operators as ops
from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.sampling.likelihood import ExactGaussian, Langevin, likelihood_step
from ncvsd_inverse.sampling.linear_solves import LinearSolver

SIGMA_LIK = 0.2


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def kernel(*shape):
    generator = torch.Generator().manual_seed(9)
    weights = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.1
    return weights / weights.sum()


class WithoutSolve:
    """A user's linear operator that knows its adjoint and nothing else."""

    def __init__(self, operator):
        self.operator = operator

    def __call__(self, x):
        return self.operator(x)

    def input_shape(self, y_shape):
        return self.operator.input_shape(y_shape)

    def adjoint(self, y):
        return self.operator.adjoint(y)


class ForwardOnly:
    """A user's operator of which only the forward direction is known."""

    def __init__(self, forward):
        self.forward = forward

    def __call__(self, x):
        return self.forward(x)

    def input_shape(self, y_shape):
        return tuple(y_shape)


OPERATORS = {
    "inpaint": ops.Inpaint(torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])),
    "sr_box": ops.SuperResolution(3, filter="box"),
    "sr_bicubic": ops.SuperResolution(3),
    "blur_circular": ops.Blur(kernel(2, 3)),
    "blur_reflect": ops.Blur(kernel(2, 3), boundary="reflect"),
    "blur_valid": ops.Blur(kernel(2, 3), boundary="valid"),
    "denoise": ops.Denoise(),
    "conjugate_gradient": WithoutSolve(ops.Blur(kernel(2, 3), boundary="replicate")),
}
SHAPES = {"sr_box": (3, 6), "sr_bicubic": (3, 6)}


def closed_form(operator, y, x0, rho, sigma_lik):
    """Mean, shape (N,), and covariance, (N, N), of u given one x0, (C, H, W), and y."""
    basis = torch.eye(x0.numel(), dtype=torch.float64).view(-1, *x0.shape)
    matrix = operator(basis).flatten(1).T
    precision = matrix.T @ matrix / sigma_lik**2 + torch.eye(x0.numel()) / rho**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (matrix.T @ y.flatten() / sigma_lik**2 + x0.flatten() / rho**2)
    return mean, covariance


def check_law(draws, mean, covariance):
    """Mean and every covariance entry within five standard errors of draws, shape (n, N).

    Five, not four: there are up to 342 entries in a test, and all must hold.
    """
    count = len(draws)
    variance = covariance.diagonal()
    assert ((draws.mean(dim=0) - mean).abs() <= 5 * (variance / count).sqrt()).all()
    spread = ((torch.outer(variance, variance) + covariance**2) / count).sqrt()
    assert ((torch.cov(draws.T) - covariance).abs() <= 5 * spread).all()


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("rho", [0.05, 0.4, 5.0])
def test_exact_draw_has_the_closed_form_law(name, rho):
    operator, count = OPERATORS[name], 20_000
    x0 = normal(1, 1, *SHAPES.get(name, (3, 4)), seed=1)
    y = operator(normal(*x0.shape, seed=2)) + 0.3
    mean, covariance = closed_form(operator, y[0], x0[0], rho, SIGMA_LIK)
    step = ExactGaussian(operator, y.expand(count, -1, -1, -1), SIGMA_LIK)
    generator = torch.Generator().manual_seed(3)
    draws = step.sample(x0.expand(count, -1, -1, -1), rho, generator=generator)
    check_law(draws.flatten(1), mean, covariance)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("rho", [80.0, 1.0, 0.002])
def test_float32_draws_follow_float64_ones(name, rho, monkeypatch):
    """The same noise in both precisions gives the same draw, to a small part of its own spread."""
    operator = OPERATORS[name]
    x0 = normal(2, 2, *SHAPES.get(name, (3, 4)), seed=1).clamp(-1, 1)
    y = operator(normal(*x0.shape, seed=2))
    monkeypatch.setattr(LinearSolver, "tolerance", 1e-6)
    for module in ("likelihood", "matheron"):
        monkeypatch.setattr(
            f"ncvsd_inverse.sampling.{module}.draw_normal",
            lambda like, generator: normal(*like.shape, seed=4).to(like),
        )
    exact, single = (
        ExactGaussian(operator, y.to(dtype), 0.05).sample(x0.to(dtype), rho)
        for dtype in (torch.float64, torch.float32)
    )
    assert single.dtype == torch.float32
    for item in range(2):
        _, covariance = closed_form(operator, y[item, 0], x0[item, :1], rho, 0.05)
        deviation = covariance.diagonal().sqrt().view(x0.shape[2:])
        # Rounding of float32 times a condition number of (80 / 0.05)^2, in posterior stds.
        assert ((single[item] - exact[item]).abs() <= 0.02 * deviation).all()


@pytest.mark.parametrize("name", OPERATORS)
def test_a_draw_does_not_depend_on_its_batch(name):
    operator = OPERATORS[name]
    x0 = normal(3, 2, *SHAPES.get(name, (3, 4)), seed=1)
    y = operator(normal(*x0.shape, seed=2))
    together = ExactGaussian(operator, y, SIGMA_LIK).sample(
        x0, 0.5, generator=make_generators([(0, i) for i in range(3)])
    )
    alone = ExactGaussian(operator, y[2:], SIGMA_LIK).sample(
        x0[2:], 0.5, generator=make_generators([(0, 2)])
    )
    torch.testing.assert_close(together[2:], alone, rtol=0, atol=1e-9)


def test_dtype_of_the_image_is_kept():
    x0, y = normal(2, 1, 3, 4), normal(2, 1, 3, 4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for operator in (OPERATORS["inpaint"], OPERATORS["blur_circular"]):
            draw = ExactGaussian(operator, y.float(), 0.05).sample(x0.to(dtype), 80.0)
            assert draw.dtype == dtype
            assert torch.isfinite(draw).all()
        draw = Langevin(ForwardOnly(torch.tanh), y, 0.5, steps=3).sample(x0.to(dtype), 0.3)
        assert draw.dtype == dtype


def test_likelihood_step_picks_the_sampler():
    y = torch.zeros(1, 1, 6, 6)
    assert isinstance(likelihood_step(ops.Denoise(), y, 0.1), ExactGaussian)
    assert isinstance(likelihood_step(WithoutSolve(ops.Denoise()), y, 0.1), ExactGaussian)
    assert isinstance(likelihood_step(ops.PhaseRetrieval(1), y, 0.1), Langevin)


@pytest.mark.parametrize("known_norm", [True, False])
@pytest.mark.parametrize("rho", [0.1, 0.6])
def test_langevin_has_the_closed_form_law_of_a_linear_operator(known_norm, rho):
    """Many chains of a tiny problem, long enough to forget their start."""
    count = 4000
    matrix = normal(6, 6, seed=7) / 3
    operator = ForwardOnly(lambda x: (x.flatten(1) @ matrix.T).view(x.shape))
    if known_norm:
        operator.lipschitz = float(torch.linalg.matrix_norm(matrix, ord=2))
    x0 = normal(1, 1, 2, 3, seed=1)
    y = operator(normal(1, 1, 2, 3, seed=2))
    mean, covariance = closed_form(operator, y[0], x0[0], rho, SIGMA_LIK)
    step = Langevin(operator, y.expand(count, -1, -1, -1), SIGMA_LIK, steps=150)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        draws = step.sample(x0.expand(count, -1, -1, -1), rho, generator=generator)
    check_law(draws.flatten(1), mean, covariance)
    assert step.acceptance.shape == step.step_size.shape == (count,)
    assert 0.4 < float(step.acceptance.mean()) < 0.8
    assert (step.step_size > 0).all()


def test_langevin_finds_the_largest_curvature():
    """A single move, which adapts nothing, starts from the same step with and without the norm."""
    matrix = torch.diag(torch.tensor([3.0, 0.5, 1.0, 0.2])).double()
    operator = ForwardOnly(lambda x: (x.flatten(1) @ matrix.T).view(x.shape))
    y = normal(2, 1, 2, 2)
    guessed = Langevin(operator, y, 0.1, steps=1)
    guessed.sample(y, 0.5)
    operator.lipschitz = 3.0
    told = Langevin(operator, y, 0.1, steps=1)
    told.sample(y, 0.5)
    torch.testing.assert_close(guessed.step_size, told.step_size, rtol=1e-3, atol=0)
    constant = Langevin(ForwardOnly(lambda x: 0 * x), y, 0.1, steps=1)
    constant.sample(y, 0.5)
    # Nothing is seen: the curvature is that of the coupling alone.
    expected = 1.36 * 4 ** (-1 / 3) * 0.5**2
    torch.testing.assert_close(constant.step_size, torch.full((2,), expected).double())


def test_langevin_has_the_law_of_a_non_linear_operator():
    """One pixel observed through exp(x): mean and variance by quadrature on a line."""
    count, rho, x0, y = 20_000, 0.5, 0.3, 1.1
    line = torch.linspace(-4, 4, 20_001, dtype=torch.float64)
    density = torch.exp(
        -((y - line.exp()) ** 2) / (2 * SIGMA_LIK**2) - (line - x0) ** 2 / (2 * rho**2)
    )
    density = density / density.sum()
    mean = (density * line).sum()
    variance = (density * (line - mean) ** 2).sum()
    kurtosis = (density * (line - mean) ** 4).sum() / variance**2
    ones = torch.ones(count, 1, 1, 1, dtype=torch.float64)
    step = Langevin(ForwardOnly(torch.exp), y * ones, SIGMA_LIK, steps=60)
    draws = step.sample(x0 * ones, rho, generator=torch.Generator().manual_seed(3)).flatten()
    # Four standard errors.
    assert abs(draws.mean() - mean) <= 4 * (variance / count).sqrt()
    assert abs(draws.var() - variance) <= 4 * variance * ((kurtosis - 1) / count).sqrt()


def test_langevin_fits_amplitudes_and_reports_itself():
    operator = ops.PhaseRetrieval(8)
    x = torch.nn.functional.avg_pool2d(normal(2, 1, 18, 18), 3, 1)
    y = operator.measure(x, 0.05, generator=torch.Generator().manual_seed(0))
    step = Langevin(operator, y, 0.05)
    assert step.acceptance is None
    assert step.step_size is None
    for rho in (1.0, 0.1, 0.02):
        u = step.sample(x, rho, generator=torch.Generator().manual_seed(1))
        assert step.acceptance.shape == step.step_size.shape == (2,)
        assert ((step.acceptance > 0.1) & (step.acceptance < 0.95)).all()
        # u has x's amplitudes up to the noise, to a tenth of the noise or so.
        misfit = (operator(u) - y).square().mean().sqrt() / 0.05
        assert 0.8 < float(misfit) < 1.25


def test_langevin_draw_does_not_depend_on_its_batch():
    operator = ops.PhaseRetrieval(2)
    x0 = normal(3, 1, 4, 5, seed=1)
    y = operator(normal(3, 1, 4, 5, seed=2))
    together = Langevin(operator, y, 0.1).sample(
        x0, 0.3, generator=make_generators([(0, i) for i in range(3)])
    )
    alone = Langevin(operator, y[2:], 0.1).sample(x0[2:], 0.3, generator=make_generators([(0, 2)]))
    torch.testing.assert_close(together[2:], alone, rtol=0, atol=1e-9)


def test_divergence_is_raised():
    y = torch.zeros(2, 1, 2, 2)
    overflows = ForwardOnly(lambda x: torch.exp(200 + 1000 * x))
    with pytest.raises(DivergenceError, match=r"rho = 0.3, step 0, step size"):
        Langevin(overflows, y, 0.1).sample(y, 0.3)
    breaks = ForwardOnly(lambda x: torch.where(x > 5, x, torch.nan))
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(DivergenceError, match=r"rho = 2, step \d+, step size"):
        Langevin(breaks, y - 0.1, 5.0).sample(y + 9, 2.0, generator=generator)


@pytest.mark.parametrize("sampler", [ExactGaussian, Langevin])
@pytest.mark.parametrize(
    ("y", "sigma_lik", "x0", "rho", "error", "match"),
    [
        ((1, 1, 2, 2), 0.0, (1, 1, 2, 2), 0.1, ValueError, "sigma_lik must be positive"),
        ((1, 1, 2, 2), 0.1, (1, 1, 2, 2), 0.0, ValueError, "rho must be positive"),
        ((1, 1, 2, 2), 0.1, (1, 1, 2, 2), math.nan, ValueError, "rho must be positive"),
        ((2, 1, 2, 2), 0.1, (1, 1, 2, 2), 0.1, ValueError, r"x0 must have shape \(2, 1, 2, 2\)"),
        ((1, 1, 2, 2), 0.1, (1, 2, 2), 0.1, ValueError, "x0 must have shape"),
    ],
)
def test_bad_input_names_the_argument(sampler, y, sigma_lik, x0, rho, error, match):
    with pytest.raises(error, match=match):
        sampler(ops.Denoise(), torch.zeros(y), sigma_lik).sample(torch.zeros(x0), rho)


@pytest.mark.parametrize("sampler", [ExactGaussian, Langevin])
def test_bad_measurements_name_the_argument(sampler):
    with pytest.raises(ValueError, match="y must be finite, got 4"):
        sampler(ops.Denoise(), torch.full((1, 1, 2, 2), math.nan), 0.1)
    with pytest.raises(TypeError, match="y must be a floating-point tensor"):
        sampler(ops.Denoise(), torch.zeros(1, 1, 2, 2, dtype=torch.int64), 0.1)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Langevin(ops.Denoise(), torch.zeros(1, 1, 2, 2), 0.1, steps=0)
