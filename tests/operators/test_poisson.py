"""Photon counts: their mean and std, what the Gaussian likelihood costs, and solving."""

import math

import pytest
import torch
from scipy import stats

from ncvsd_inverse import operators as ops
from ncvsd_inverse import solve
from ncvsd_inverse.priors import GaussianPrior
from ncvsd_inverse.protocols import LinearOperator, Operator
from tests.operators.cases import seeded


def line(*values):
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


def probabilities(rates, most):
    """P(k | rate), shape (most, len(rates)); a rate below 0 counts nothing."""
    counts = torch.arange(most)[:, None].numpy()
    return torch.from_numpy(stats.poisson.pmf(counts, rates.clamp(min=0).numpy()))


def test_the_mean_and_the_std_of_y_are_the_stated_ones():
    rates = torch.cat([torch.linspace(0, 12, 481), torch.linspace(12.5, 300, 300)]).double()
    operator, pmf = ops.Poisson(8.0), probabilities(rates, 600)
    y = operator.stabilise(torch.arange(600.0, dtype=torch.float64).view(1, 1, 1, -1)).flatten()
    mean, std = y @ pmf, (y**2 @ pmf - (y @ pmf) ** 2).clamp(min=0).sqrt()
    found = operator(line(*(2 * rates / 8 - 1))).flatten()
    error = (found - mean).abs()
    assert 0.0010 < float(error.max()) < 0.0011
    for rate, value in ((1, 0.85), (2, 0.96)):
        assert float(std[rates == rate][0]) == pytest.approx(value, abs=0.005)
    assert float((std[rates >= 3] - 1).abs().max()) < 0.01


def test_a_continues_along_its_tangent_below_black():
    operator = ops.Poisson(30.0)
    x = line(-1.5, -1.02, -0.98, -0.2, 0.7, 1.3).requires_grad_()
    assert torch.autograd.gradcheck(operator, (x,))
    below, black, above = (operator(line(-1 + step)) for step in (-1e-4, 0.0, 1e-4))
    torch.testing.assert_close(above - black, black - below, rtol=1e-3, atol=0)
    far, near = operator(line(-3.0)), operator(line(-2.0))
    torch.testing.assert_close(near - far, black - near)


def test_measure_draws_counts():
    operator, repeats = ops.Poisson(20.0), 20_000
    x = line(-1.2, -1.0, -0.9, 0.0, 1.0)
    y = operator.measure(x.expand(1, 1, repeats, 5), generator=seeded())[0, 0]
    counts = (y.square() / 4 - 3 / 8).round()
    torch.testing.assert_close(operator.stabilise(counts[None, None])[0, 0], y)
    rates = torch.tensor([0.0, 0.0, 1.0, 10.0, 20.0], dtype=torch.float64)
    # Four standard errors of the mean and, but for the small fourth cumulant, of the variance.
    assert ((counts.mean(0) - rates).abs() <= 4 * (rates / repeats).sqrt()).all()
    spread = ((2 * rates**2 + rates) / repeats).sqrt()
    assert ((counts.var(0) - rates).abs() <= 4 * spread).all()


def test_measure_takes_one_generator_an_image():
    operator, x = ops.Poisson(20.0), torch.zeros(2, 3, 4, 5)
    first = operator.measure(x, generator=[seeded(0), seeded(1)])
    again = operator.measure(x, generator=[seeded(7), seeded(1)])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], again[0])
    alike = [operator.measure(x, 1.0, generator=seeded(3)) for _ in range(2)]
    assert torch.equal(*alike)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_device_are_kept(kind, device):
    operator = ops.Poisson(20.0)
    x = torch.linspace(-1, 1, 12, device=device).view(1, 1, 3, 4).to(kind)
    y, measured = operator(x), operator.measure(x)
    for each in (y, measured):
        assert (each.dtype, each.device.type, each.shape) == (kind, device.type, x.shape)
    exact = operator(x.double())
    assert (y.double() - exact).norm() <= torch.finfo(kind).eps * exact.norm()


def test_roles():
    operator = ops.Poisson(20.0)
    assert isinstance(operator, Operator)
    assert not isinstance(operator, LinearOperator)
    assert (operator.family, operator.sigma_y, operator.peak) == ("poisson", 1.0, 20.0)
    assert operator.input_shape((2, 3, 4, 5)) == (2, 3, 4, 5)
    assert operator.repeated(3) is operator


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: ops.Poisson(0.0), ValueError, "peak must be positive"),
        (lambda x: ops.Poisson(20.0)(x[0]), ValueError, r"x must have shape \(B, C, H, W\)"),
        (lambda x: ops.Poisson(20.0).measure(x, 0.05), ValueError, "sigma_y must be 1 .*got 0.05"),
        (
            lambda x: ops.Poisson(20.0).measure(x, generator=[seeded()]),
            ValueError,
            "generator must be one or one for each of 2 images, got 1",
        ),
        (lambda x: ops.Poisson(20.0).stabilise(x - 1), ValueError, "counts must be at least 0"),
        (lambda x: ops.Poisson(20.0).stabilise(x.long()), TypeError, "counts must be a floating"),
    ],
)
def test_bad_input_names_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.zeros(2, 1, 2, 2))


@pytest.mark.parametrize(
    ("peak", "error", "factor"), [(5, 0.059, 1.02), (20, 0.029, 1.00), (100, 0.006, 1.00)]
)
def test_the_gaussian_likelihood_costs_what_is_stated(peak, error, factor):
    """Posteriors of one pixel on a grid, by the Poisson likelihood and by that of y."""
    operator = ops.Poisson(peak)
    grid = torch.linspace(-1, 1, 4001, dtype=torch.float64)[1:]
    prior = (-((grid / 0.5) ** 2) / 2).exp()
    prior = prior / prior.sum()
    exact = probabilities(peak * (grid + 1) / 2, int(peak + 10 * math.sqrt(peak) + 20)) * prior
    counts = torch.arange(len(exact), dtype=torch.float64)
    y = operator.stabilise(line(*counts)).flatten()
    gaussian = (-((y[:, None] - operator(line(*grid)).flatten()) ** 2) / 2).exp() * prior
    weights = exact.sum(dim=1)
    (mean, std), (found, spread) = (
        ((p @ grid) / p.sum(1), ((p @ grid**2) / p.sum(1) - ((p @ grid) / p.sum(1)) ** 2).sqrt())
        for p in (exact, gaussian)
    )
    wrong = (weights @ ((found - mean) / std) ** 2).sqrt()
    assert float(wrong) == pytest.approx(error, abs=0.001)
    assert float(weights @ (spread / std)) == pytest.approx(factor, abs=0.005)


@pytest.mark.parametrize("peak", [5, 20, 100])
def test_solve_of_blurred_counts_draws_from_their_law(peak):
    """Rows of two pixels, each a problem of its own, integrated on a grid with exact likelihoods.

    At one rho the chain's x0 has the law prior(x0) * E[P(counts | x0 + rho eps)] over eps.
    """
    rho, rows, samples = 0.2, 60, 16
    pairs = torch.tensor([[0.2, 0.4], [0.8, 0.5], [0.6, 0.6]], dtype=torch.float64) * peak
    operator = ops.Compose(ops.Poisson(peak), ops.Blur(torch.tensor([[0.3, 0.7]])))
    y = operator.outer.stabilise(pairs.view(3, 1, 1, 2).repeat(1, 1, rows, 1))
    covariance = torch.tensor([[0.16, 0.08], [0.08, 0.16]], dtype=torch.float64)
    blocks = torch.block_diag(*[covariance] * rows)
    prior = GaussianPrior(torch.zeros(1, rows, 2, dtype=torch.float64), blocks)
    levels = tuple(rho - 1e-6 * sweep for sweep in range(20))
    settings = {"nfe": 20, "schedule": levels, "num_samples": samples, "method": "gibbs"}
    result = solve(y, operator=operator, prior=prior, **settings)
    assert result.sigma_lik == 1.0
    grid = torch.linspace(-2, 2, 121, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    blurred = operator.inner(points.view(1, 1, -1, 2))[0, 0]
    smooth = (-(((grid[:, None] - grid) / rho) ** 2) / 2).exp()
    most = 3 * peak + 60
    both = [probabilities(peak * (blurred[:, i] + 1) / 2, most) for i in range(2)]
    density = (-(points @ torch.linalg.inv(covariance) * points).sum(dim=1) / 2).exp()
    for image, (first, second) in enumerate(pairs.round().long().tolist()):
        likelihood = (both[0][first] * both[1][second]).view(121, 121)
        weights = (smooth @ likelihood @ smooth).flatten() * density
        weights = weights / weights.sum()
        mean = weights @ points
        variance = weights @ points**2 - mean**2
        found = result.samples[:, image, 0].flatten(0, 1)
        # Four and a half standard errors, and what the Gaussian likelihood costs.
        error = (found.mean(dim=0) - mean).abs() / variance.sqrt()
        assert float(error.max()) < 4.5 / math.sqrt(len(found)) + 0.05
        ratio = found.var(dim=0) / variance
        assert float((ratio - 1).abs().max()) < 4.5 * math.sqrt(2 / len(found)) + 0.05


def test_counts_behind_another_operator():
    operator = ops.Compose(ops.Poisson(50.0), ops.SuperResolution(2, "box"))
    x = torch.rand(2, 3, 40, 40, generator=seeded(1), dtype=torch.float64) * 1.8 - 0.9
    y = operator.measure(x, operator.sigma_y, generator=seeded(2))
    assert operator.sigma_y == 1.0
    assert operator.input_shape(y.shape) == x.shape
    misfit = y - operator(x)
    # Four standard errors of the mean and of the variance of standard normals.
    assert abs(float(misfit.mean())) < 4 / math.sqrt(misfit.numel()) + 0.002
    assert abs(float(misfit.square().mean()) - 1) < 4 * math.sqrt(2 / misfit.numel()) + 0.005
