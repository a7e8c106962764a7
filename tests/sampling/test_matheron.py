"""Sampling by conditioning: Matheron's rule against dense matrices, and the loop of `solve`."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ncvsd_inverse import load_prior, solve
from ncvsd_inverse import operators as ops
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.priors import DiffusionPrior, GaussianPrior, NCVSDPrior
from ncvsd_inverse.priors.covariance import SpectralCovariance
from ncvsd_inverse.sampling.linear_solves import LinearSolver
from ncvsd_inverse.sampling.matheron import START_ITERATIONS, Matheron

SIGMA_LIK = 0.2


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def kernel(*shape):
    generator = torch.Generator().manual_seed(9)
    weights = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.1
    return weights / weights.sum()


def power_law(height, width, power=2.5, variance=0.25):
    """Variances (1, H, W) that fall with frequency, with this mean."""
    rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    columns = torch.fft.fftfreq(width, dtype=torch.float64)
    values = (rows**2 + columns**2 + 1 / max(height, width) ** 2) ** (-power / 2)
    return (variance / values.mean() * values)[None]


def make_covariance(height, width):
    """A covariance of images of two colours that go together, rougher in one direction."""
    mixing = torch.linalg.qr(normal(2, 2, seed=3))[0].contiguous()
    spectrum = power_law(height, width) * torch.tensor([1.5, 0.3]).view(2, 1, 1).double()
    spectrum = spectrum + 0.1 * torch.arange(height).sub(height / 2).abs()[:, None] / height
    spectrum[:, 0] = spectrum[:, 0].clamp(min=0.2)
    return SpectralCovariance(mixing, spectrum[..., : width // 2 + 1], width)


def masks(number, height, width):
    generator = torch.Generator().manual_seed(4)
    return torch.rand(number, 1, height, width, generator=generator) > 0.4


class Mixed:
    """A user's operator that sees one mixture of the two colours, blurred."""

    blur = ops.Blur(kernel(2, 3))

    def __call__(self, x):
        return self.blur(0.8 * x[:, :1] - 0.4 * x[:, 1:])

    def adjoint(self, y):
        return self.blur.adjoint(y) * torch.tensor([0.8, -0.4]).view(2, 1, 1).to(y)

    def input_shape(self, y_shape):
        return (y_shape[0], 2, *y_shape[2:])


class Gains:
    """A user's operator with one gain an image."""

    def __init__(self, gains):
        self.gains = gains.view(-1, 1, 1, 1)

    def __call__(self, x):
        return self.gains.to(x) * x

    adjoint = __call__

    def input_shape(self, y_shape):
        return tuple(y_shape)


CONVOLUTIONS = {
    "denoise": ops.Denoise(),
    "blur": ops.Blur(kernel(2, 3)),
    "gaussian": ops.GaussianBlur(0.8, 3),
    "motion": ops.MotionBlur(5, 0.5, 1),
    "a gain an image": Gains(torch.tensor([0.5, 1.0, 2.0])),
}
OTHERS = {
    "box": ops.Inpaint.box((5, 6), 3),
    "random": ops.Inpaint.random((5, 6), 0.4, seed=2),
    "a mask an image": ops.Inpaint(masks(3, 5, 6)),
    "sr_bicubic": ops.SuperResolution(2),
    "sr_box": ops.SuperResolution(2, filter="box"),
    "reflect": ops.Blur(kernel(2, 3), boundary="reflect"),
    "valid": ops.Blur(kernel(2, 3), boundary="valid"),
    "motion replicate": ops.MotionBlur(3, 0.5, 1, boundary="replicate"),
    "mixed colours": Mixed(),
}
OPERATORS = {**CONVOLUTIONS, **OTHERS}
SIZES = {"sr_bicubic": (4, 6), "sr_box": (6, 4)}


def dense_root(covariance, height, width):
    """The symmetric root of a covariance as a matrix; tests/priors/test_covariance.py checks it."""
    dim = 2 * height * width
    basis = torch.eye(dim, dtype=torch.float64).view(dim, 2, height, width)
    return covariance.colour(basis).flatten(1)


def dense_operator(operator, images, height, width):
    """Return A as a matrix for each of so many images, shape (images, M, 2 H W)."""
    dim = 2 * height * width
    basis = torch.eye(dim, dtype=torch.float64).view(dim, 1, 2, height, width)
    columns = [operator(image.expand(images, -1, -1, -1)).flatten(1) for image in basis]
    return torch.stack(columns, dim=2)


def gains(matrix, dense, sigma_lik):
    """Return S A^T (A S A^T + s^2 I)^-1, shape (B, 2 H W, M)."""
    seen = matrix @ dense
    noisy = seen @ matrix.mT + sigma_lik**2 * torch.eye(matrix.shape[1], dtype=torch.float64)
    return torch.linalg.solve(noisy, seen).mT


@pytest.fixture
def exactly(monkeypatch):
    """Let conjugate gradients run until they are exact."""
    monkeypatch.setattr(LinearSolver, "tolerance", 1e-11)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("sigma_lik", [1.0, 0.05])
def test_the_mean_moves_as_dense_matrices_say(name, sigma_lik, exactly):
    height, width = SIZES.get(name, (5, 6))
    operator, covariance = OPERATORS[name], make_covariance(height, width)
    x = normal(3, 2, height, width, seed=1)
    y = operator(normal(3, 2, height, width, seed=2)) + 0.3
    conditioning = Matheron(operator, y, sigma_lik)
    moved = conditioning.draw(x, covariance, temperature=0.0)
    root = dense_root(covariance, height, width)
    matrix = dense_operator(operator, 3, height, width)
    misfit = (y - operator(x)).flatten(1)[..., None]
    expected = gains(matrix, root @ root.T, sigma_lik) @ misfit
    assert_close((moved - x).flatten(1), expected[..., 0], rtol=1e-7, atol=1e-7)


def check_law(draws, mean, covariance):
    """Mean and every covariance entry within five standard errors of draws, shape (n, N).

    Five, not four: there are up to 1770 entries in a test, and all must hold.
    """
    count, variance = len(draws), covariance.diagonal()
    assert ((draws.mean(dim=0) - mean).abs() <= 5 * (variance / count).sqrt()).all()
    spread = ((torch.outer(variance, variance) + covariance**2) / count).sqrt()
    assert ((torch.cov(draws.T) - covariance).abs() <= 5 * spread).all()


@pytest.mark.parametrize("name", ["blur", "box", "sr_bicubic", "reflect", "mixed colours"])
def test_draws_have_the_law_given_y(name):
    """At the tolerance that ships, from draws of the law without y."""
    count = 4000
    height, width = SIZES.get(name, (5, 6))
    operator, covariance = OPERATORS[name], make_covariance(height, width)
    root = dense_root(covariance, height, width)
    dense = root @ root.T
    mean = normal(2, height, width, seed=5)
    x = mean + covariance.colour(normal(count, 2, height, width, seed=6))
    y = operator(normal(1, 2, height, width, seed=2)) + 0.3
    conditioning = Matheron(operator, y.expand(count, -1, -1, -1), SIGMA_LIK)
    draws = conditioning.draw(x, covariance, generator=torch.Generator().manual_seed(7))
    matrix = dense_operator(operator, 1, height, width)[0]
    gain = gains(matrix[None], dense, SIGMA_LIK)[0]
    expected = mean.flatten() + gain @ (y[0].flatten() - matrix @ mean.flatten())
    check_law(draws.flatten(1), expected, dense - gain @ matrix @ dense)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_temperature_scales_the_noise_of_y(temperature, exactly):
    operator, covariance = OPERATORS["box"], make_covariance(5, 6)
    x = normal(1, 2, 5, 6, seed=1)
    y = operator(normal(1, 2, 5, 6, seed=2)).expand(2000, -1, -1, -1)
    conditioning = Matheron(operator, y, SIGMA_LIK)
    draws = conditioning.draw(
        x.expand(2000, -1, -1, -1),
        covariance,
        generator=torch.Generator().manual_seed(7),
        temperature=temperature,
    )
    root = dense_root(covariance, 5, 6)
    gain = gains(dense_operator(operator, 1, 5, 6), root @ root.T, SIGMA_LIK)[0]
    misfit = (y[:1] - operator(x)).flatten()
    expected = x.flatten() + gain @ misfit
    noise = (temperature * SIGMA_LIK) ** 2 * gain @ gain.T
    check_law(draws.flatten(1), expected, noise)


def test_one_object_serves_every_covariance(exactly):
    """What it keeps of A^T A does not depend on the covariance of the first draw."""
    operator, x = OPERATORS["random"], normal(2, 2, 5, 6, seed=1)
    y = operator(normal(2, 2, 5, 6, seed=2))
    used = Matheron(operator, y, SIGMA_LIK)
    first = make_covariance(5, 6)
    used.draw(x, first, temperature=0.0)
    narrow = SpectralCovariance(first.mixing, 0.01 * first.variances[..., 0], 6)
    fresh = Matheron(operator, y, SIGMA_LIK)
    again, once = (c.draw(x, narrow, temperature=0.0) for c in (used, fresh))
    assert_close(again, once, rtol=0, atol=1e-9)


def test_a_variance_of_zero_does_not_move(exactly):
    covariance = make_covariance(5, 6)
    covariance.variances[:, 0, 0] = 0
    operator, x = OPERATORS["random"], normal(1, 2, 5, 6, seed=1)
    conditioning = Matheron(operator, operator(x) + 1, SIGMA_LIK)
    moved = conditioning.draw(x, covariance, temperature=0.0) - x
    assert_close(moved.mean((2, 3)), torch.zeros(1, 2).double(), rtol=0, atol=1e-9)
    assert float(moved.abs().max()) > 0.1


@pytest.mark.parametrize("name", ["blur", "a mask an image", "sr_bicubic", "reflect"])
def test_a_draw_does_not_depend_on_its_batch(name):
    height, width = SIZES.get(name, (5, 6))
    operator, covariance = OPERATORS[name], make_covariance(height, width)
    x = normal(3, 2, height, width, seed=1)
    y = operator(normal(3, 2, height, width, seed=2))
    sources = make_generators([(0, i) for i in range(3)])
    together = Matheron(operator, y, SIGMA_LIK).draw(x, covariance, generator=sources)
    alone = ops.Inpaint(operator.mask[2:]) if name == "a mask an image" else operator
    single = Matheron(alone, y[2:], SIGMA_LIK).draw(
        x[2:], covariance, generator=make_generators([(0, 2)])
    )
    assert_close(together[2:], single, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["blur", "box", "sr_bicubic", "reflect"])
def test_single_precision_follows_double(name, dtype, monkeypatch):
    height, width = SIZES.get(name, (5, 6))
    operator, covariance = OPERATORS[name], make_covariance(height, width)
    monkeypatch.setattr(
        "ncvsd_inverse.sampling.matheron.draw_normal",
        lambda like, generator: normal(*like.shape, seed=4).to(like),
    )
    x = normal(2, 2, height, width, seed=1)
    y = operator(normal(2, 2, height, width, seed=2))
    exact = Matheron(operator, y, SIGMA_LIK).draw(x, covariance)
    cast = SpectralCovariance(
        covariance.mixing.to(dtype), covariance.variances[..., 0].to(dtype), width
    )
    conditioning = Matheron(operator, y.to(dtype), SIGMA_LIK)
    draw = conditioning.draw(x.to(dtype), cast)
    assert draw.dtype == dtype
    # Iterations stop at an error of half a hundredth of a std, single ones perhaps one later.
    assert_close(draw.double(), exact, rtol=0, atol=0.02)


REAL = {
    "box": ops.Inpaint.box((32, 32), 16),
    "random": ops.Inpaint.random((32, 32), 0.3),
    "sr4x": ops.SuperResolution(4),
    "reflect": ops.GaussianBlur(1.5, 9, boundary="reflect"),
    "motion replicate": ops.MotionBlur(9, 0.5, 0, boundary="replicate"),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("rho", [math.inf, 0.4, 0.05])
def test_conjugate_gradients_are_few(name, rho):
    """With images like photographs."""
    operator = REAL[name]
    prior = GaussianPrior.stationary(torch.zeros(3, 32, 32), power_law(32, 32).float())
    x, other = (prior.draw(2, generator=torch.Generator().manual_seed(i)) for i in range(2))
    y = operator.measure(x, 0.05, generator=torch.Generator().manual_seed(2))
    conditioning = Matheron(operator, y, 0.05)
    covariance = prior.statistics.covariance(rho, x)
    start = other if math.isinf(rho) else x + covariance.colour(other)
    moved = conditioning.draw(start, covariance, generator=torch.Generator().manual_seed(3))
    assert conditioning.solver.iterations < 120
    assert float(conditioning.error.max()) < 0.05
    measured = operator.count_measured(y).sum()
    misfit = ((operator(moved) - y).square().sum() / measured).sqrt() / 0.05
    assert 0.7 < float(misfit) < 1.2


@pytest.mark.parametrize(
    ("name", "sigma_lik"), [("box", 0.05), ("box", 0.01), ("random", 0.01), ("random", 0.001)]
)
def test_hidden_pixels_are_drawn_exactly_enough(name, sigma_lik, monkeypatch):
    """To a hundredth of the images' std of 0.5, also where nothing is measured."""
    prior = GaussianPrior.stationary(torch.zeros(1, 32, 32).double(), power_law(32, 32))
    x, start = (prior.draw(1, generator=torch.Generator().manual_seed(i)) for i in range(2))
    operator, own = REAL[name], prior.statistics.covariance(math.inf, x)
    y = operator.measure(x, sigma_lik, generator=torch.Generator().manual_seed(2))
    draw = Matheron(operator, y, sigma_lik).draw(start, own, temperature=0.0)
    monkeypatch.setattr(LinearSolver, "tolerance", 1e-10)
    monkeypatch.setattr(LinearSolver, "max_iterations", 2000)
    exact = Matheron(operator, y, sigma_lik).draw(start, own, temperature=0.0)
    assert float((draw - exact).square().mean().sqrt()) < 0.005


def test_a_first_draw_that_is_hard_to_reach_is_rough_and_the_chain_goes_on():
    prior = GaussianPrior.stationary(
        torch.zeros(1, 48, 48).double(), power_law(48, 48, power=3.0, variance=30.0)
    )
    operator = ops.MotionBlur(17, 0.3, seed=1, boundary="replicate")
    x = prior.draw(1, generator=torch.Generator().manual_seed(0)).float()
    y = operator.measure(x, 1e-3, generator=torch.Generator().manual_seed(1))
    covariance = prior.statistics.covariance(math.inf, x)
    conditioning = Matheron(operator, y, 1e-3)
    seeded = torch.Generator().manual_seed(2)
    start = conditioning.start(torch.zeros_like(x), covariance, x, generator=seeded)
    assert conditioning._in_double.iterations <= START_ITERATIONS + 1
    assert float(conditioning.error) == 0
    assert start.isfinite().all()
    conditioning.start(torch.zeros_like(x), covariance, x, generator=seeded, rough=False)
    assert float(conditioning.error) > 0  # where nothing follows
    assert float((operator(start) - y).std()) < 0.5 * float(y.std())
    whole = Matheron(operator, y, 1e-3)
    whole.draw(torch.zeros_like(x), covariance, generator=seeded)
    assert whole._in_double.iterations > 3 * START_ITERATIONS


def test_images_of_one_row_are_conditioned():
    prior = GaussianPrior.stationary(torch.zeros(1, 1, 16), power_law(1, 16).float())
    operator = ops.Inpaint.random((1, 16), keep=0.5, seed=0)
    result = solve(operator(torch.ones(2, 1, 1, 16)), operator=operator, prior=prior, nfe=2)
    assert result.method == "conditioning"
    assert float(result.residual.max()) < 3


def test_bad_input_names_the_argument():
    y = torch.zeros(1, 2, 5, 6)
    for sigma_lik in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma_lik must be positive and finite"):
            Matheron(ops.Denoise(), y, sigma_lik)
    with pytest.raises(TypeError, match="sigma_lik must be a number"):
        Matheron(ops.Denoise(), y, None)
    with pytest.raises(ValueError, match="y must be finite, got 60"):
        Matheron(ops.Denoise(), y + math.nan, 0.1)
    with pytest.raises(TypeError, match="y must be a floating-point tensor"):
        Matheron(ops.Denoise(), y.long(), 0.1)
    covariance = make_covariance(5, 6)
    with pytest.raises(ValueError, match="generator must be one or one for each of 1"):
        Matheron(ops.Denoise(), y.double(), 0.1).draw(
            y.double(), covariance, generator=make_generators([(0,), (1,)])
        )


# The loop of `solve`.

SHAPE = (3, 8, 6)


def gaussian(shape=SHAPE, dtype=torch.float64):
    return GaussianPrior.stationary(
        torch.full(shape, 0.2, dtype=dtype), power_law(*shape[1:]).to(dtype)
    )


def measurement(operator, batch=2, prior=None):
    prior = prior or gaussian()
    x = prior.draw(batch, generator=torch.Generator().manual_seed(5))
    return operator.measure(x, 0.05, generator=torch.Generator().manual_seed(6))


def box():
    return ops.Inpaint.box(SHAPE[1:], 3)


@pytest.mark.parametrize("operator", [ops.SuperResolution(2), ops.GaussianBlur(0.7, 3)])
@pytest.mark.parametrize("nfe", [1, 3])
def test_samples_are_posterior_samples_whatever_nfe(operator, nfe):
    """With an exact prior, where the split-Gibbs loop is exact for many calls only."""
    shape, count, sigma_y = (2, 4, 4), 2000, 0.1
    prior = gaussian(shape)
    y = operator(normal(1, *shape, seed=2)) / 2
    settings = {"operator": operator, "prior": prior, "nfe": nfe, "sigma_y": sigma_y}
    result = solve(y, num_samples=count, **settings)
    assert (result.method, result.nfe) == ("conditioning", nfe)
    basis = torch.eye(32, dtype=torch.float64).view(-1, *shape)
    matrix = operator(basis).flatten(1).T
    dense = prior.statistics.covariance(math.inf, y.new_zeros(1, *shape)).colour(basis)
    dense = dense.flatten(1) @ dense.flatten(1).T
    gain = gains(matrix[None], dense, sigma_y)[0]
    mean = torch.full((32,), 0.2).double()
    expected = mean + gain @ (y.flatten() - matrix @ mean)
    posterior = dense - gain @ matrix @ dense
    check_law(result.samples.flatten(1), expected, posterior)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the schedule has one sweep")
        gibbs = solve(y, num_samples=count, method="gibbs", **settings)
    with pytest.raises(AssertionError):
        check_law(gibbs.samples.flatten(1), expected, posterior)


@pytest.mark.parametrize("nfe", [1, 4])
def test_a_dense_gaussian_reaches_the_posterior_with_no_argument(nfe):
    """Its covariance is not stationary: hidden pixels have one of their own."""
    shape, count = (1, 4, 3), 4000
    root = normal(12, 12, seed=3) * torch.linspace(0.1, 0.6, 12)
    covariance = root @ root.T + 0.01 * torch.eye(12)
    prior = GaussianPrior(torch.full(shape, 0.2).double(), covariance)
    operator = ops.Inpaint(torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 0, 1]]).bool())
    y = operator(prior.draw(1, generator=torch.Generator().manual_seed(1)))
    result = solve(y, operator=operator, prior=prior, nfe=nfe, num_samples=count)
    matrix = torch.diag(operator.mask.flatten().double())
    gain = gains(matrix[None], covariance, 0.05)[0]
    mean = torch.full((12,), 0.2).double()
    expected = mean + gain @ (y.flatten() - matrix @ mean)
    check_law(result.samples.flatten(1), expected, covariance - gain @ matrix @ covariance)


class Draws:
    """A user's prior without statistics."""

    nfe_per_sample = 1

    def sample(self, u, sigma, *, generator=None):
        return u / (1 + sigma**2)


class Forward:
    """A user's operator that knows no adjoint."""

    family = "inpainting"

    def __call__(self, x):
        return x.tanh()

    def input_shape(self, y_shape):
        return tuple(y_shape)


def with_statistics():
    prior = Draws()
    prior.statistics = gaussian().statistics
    return prior


METHODS = {
    "linear, statistics": (box(), with_statistics(), None, "conditioning"),
    "asked for": (box(), with_statistics(), "conditioning", "conditioning"),
    "gibbs asked for": (box(), with_statistics(), "gibbs", "gibbs"),
    "no statistics": (box(), Draws(), None, "gibbs"),
    "own statistics": (
        ops.Denoise(),
        GaussianPrior(torch.zeros(SHAPE), torch.eye(144)),
        None,
        "conditioning",
    ),
    "not linear": (Forward(), with_statistics(), None, "conditioning"),
}


@pytest.mark.parametrize("case", list(METHODS))
def test_the_method_follows_operator_and_prior(case):
    operator, prior, method, expected = METHODS[case]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = solve(torch.zeros(1, *SHAPE), operator=operator, prior=prior, nfe=2, method=method)
    assert result.method == expected
    assert [w for w in caught if "the weaker one" in str(w.message)] == (
        caught if isinstance(prior, Draws) and method is None and expected == "gibbs" else []
    )


def test_presets_are_of_the_published_loop():
    settings = {"operator": box(), "prior": with_statistics(), "nfe": 2, "preset": "ncvsd"}
    result = solve(torch.zeros(1, *SHAPE), **settings)
    assert result.method == "gibbs"
    explicit = solve(torch.zeros(1, *SHAPE), method="gibbs", **settings)
    assert torch.equal(result.x0, explicit.x0)


BAD = {
    "conditioning, preset": (
        {"method": "conditioning", "preset": "ncvsd"},
        "method must be 'gibbs' with preset='ncvsd', got 'conditioning'",
    ),
    "conditioning, no statistics": (
        {"method": "conditioning", "prior": Draws()},
        "method must be 'gibbs', got 'conditioning': the prior has no.*measure_statistics",
    ),
    "temperature zero": ({"temperature": 0.0}, r"temperature must be in \(0, 1\], got 0"),
    "temperature negative": ({"temperature": -0.5}, r"temperature must be in \(0, 1\]"),
    "temperature above one": ({"temperature": 1.1}, r"temperature must be in \(0, 1\]"),
    "temperature nan": ({"temperature": math.nan}, r"temperature must be in \(0, 1\]"),
    "temperature, prior that has none": (
        {"temperature": 0.5},
        r"temperature must be 1 for this prior, got 0\.5",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_arguments_are_named(case):
    change, message = BAD[case]
    arguments = {"operator": box(), "prior": with_statistics(), "nfe": 1, **change}
    with pytest.raises(ValueError, match=message):
        solve(torch.zeros(1, *SHAPE), **arguments)


class Wiener(nn.Module):
    """A network of a generative denoiser: exact for white images of variance 1/4 and mean 0.

    It draws x0 given the condition c at std t: its mean and, from what x adds to c, its spread.
    """

    def __init__(self):
        super().__init__()
        self.images = 0

    def forward(self, x, sigma, condition, level, labels=None):
        self.images += len(x)
        level, sigma = (s.view(-1, 1, 1, 1) for s in (level, sigma))
        gain = 0.25 / (0.25 + level**2)
        eps = (x - condition) / (sigma**2 - level**2).sqrt()
        return gain * condition + level * gain.sqrt() * eps


def white(shape=SHAPE):
    return GaussianPrior.stationary(torch.zeros(shape), torch.full(shape, 0.25))


def student(**changes):
    return NCVSDPrior(Wiener(), image_shape=None, statistics=white().statistics, **changes)


def test_an_image_does_not_depend_on_its_batch():
    operator, prior = ops.SuperResolution(2), gaussian()
    y = measurement(operator, 3)
    settings = {"operator": operator, "prior": prior, "nfe": 3, "num_samples": 2}
    together = solve(y, seed=9, **settings)
    assert together.method == "conditioning"
    alone = solve(y[1:2], seed=[(9, 1)], **settings)
    assert_close(together.samples[:, 1:2], alone.samples, rtol=0, atol=1e-9)
    by_image = solve(y, seed=[4, 5, 6], **settings)
    last = solve(y[2:], seed=[6], **settings)
    assert_close(by_image.samples[:, 2:], last.samples, rtol=0, atol=1e-9)
    again, more = solve(y, seed=9, **settings), solve(y, seed=9, **{**settings, "num_samples": 3})
    assert torch.equal(again.samples, together.samples)
    assert_close(more.samples[:2], together.samples, rtol=0, atol=1e-9)
    assert float((together.samples - by_image.samples).abs().mean()) > 0.01


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("name", ["mask", "a mask an image", "blur"])
def test_chunks_do_not_change_the_result(batch_size, name):
    each = masks(3, *SHAPE[1:])
    operator = {
        "mask": ops.Inpaint(each[0, 0]),
        "a mask an image": ops.Inpaint(each),
        "blur": ops.GaussianBlur(1.0, 3),
    }[name]
    y = measurement(operator, 3)
    settings = {"operator": operator, "prior": gaussian(), "nfe": 2, "num_samples": 2}
    whole = solve(y, restarts=2, **settings)
    parts = solve(y, restarts=2, batch_size=batch_size, **settings)
    assert_close(whole.samples, parts.samples, rtol=0, atol=1e-9)
    assert_close(whole.residual, parts.residual)


def test_one_mask_an_image_serves_every_sample():
    each = masks(2, *SHAPE[1:])
    y = measurement(ops.Inpaint(each))
    settings = {"prior": gaussian(), "nfe": 2, "num_samples": 3}
    together = solve(y, operator=ops.Inpaint(each), seed=[1, 2], **settings)
    for image, seed in enumerate([1, 2]):
        operator = ops.Inpaint(each[image, 0])
        alone = solve(y[image : image + 1], operator=operator, seed=[seed], **settings)
        assert_close(together.samples[:, image], alone.samples[:, 0], rtol=0, atol=1e-9)


def test_restarts_keep_the_run_that_fits_best():
    operator, prior = box(), student()
    y = measurement(operator).float()
    settings = {"operator": operator, "nfe": 2, "num_samples": 4}
    once = solve(y, prior=student(), **settings)
    best = solve(y, prior=prior, restarts=3, **settings)
    assert (once.nfe, best.nfe) == (2, 6)
    assert prior.network.images == 2 * 3 * 4 * 2

    def misfit(result):
        images = result.samples.flatten(0, 1)
        return (y.repeat(4, 1, 1, 1) - operator(images)).flatten(1).norm(dim=1)

    assert (misfit(best) <= misfit(once) + 1e-5).all()
    assert (misfit(best) < misfit(once) - 1e-3).any()


def test_priors_made_of_a_network_reach_the_posterior():
    """White images: pixels given y are independent, with a mean and a variance known by hand."""
    operator, sigma_y = box(), 0.2
    y = operator(normal(2, *SHAPE, seed=2).float() / 2)

    def mean(x, sigma):
        return 0.25 / (0.25 + sigma.view(-1, 1, 1, 1) ** 2) * x

    many_steps = DiffusionPrior(mean, num_steps=60, statistics=white().statistics)
    gain = 0.25 / (0.25 + sigma_y**2) * operator.mask
    expected = gain * y
    std = (0.25 * (1 - gain)).sqrt()
    for prior, nfe in (
        (student(), 2),
        (student().refined((math.inf, 0.3)), 4),
        (many_steps, 120),
    ):
        result = solve(y, operator=operator, prior=prior, nfe=nfe, sigma_y=sigma_y, num_samples=100)
        assert (result.method, result.nfe) == ("conditioning", nfe)
        # Five standard errors of 0.1 stds; spread to 1% (of 3600 numbers or more) and the steps'
        # loss of a tenth of the variance.
        assert ((result.mean - expected).abs() < 0.5 * std).all()
        for seen in (True, False):
            where = (operator.mask == seen).expand_as(result.mean)
            ratio = (result.std / std).square()[where].mean().sqrt()
            assert 0.92 < float(ratio) < 1.04


def test_with_statistics_shares_the_network_and_leaves_the_prior():
    prior = NCVSDPrior(Wiener(), image_shape=SHAPE, noise_scale=[(0.1, 1.2)])
    statistics = white().statistics
    twin = prior.with_statistics(statistics)
    assert (prior.statistics, twin.statistics) == (None, statistics)
    assert twin.network is prior.network
    assert isinstance(twin, NCVSDPrior)
    assert twin.noise_scale == ((0.1, 1.2),)
    assert twin.with_statistics(None).statistics is None
    assert twin.refined((1.0, 0.1)).statistics is statistics
    assert twin.tempered(0.5).statistics is statistics
    teacher = DiffusionPrior(lambda x, sigma: x)
    assert teacher.statistics is None
    assert teacher.with_statistics(statistics).statistics is statistics


def test_tempered_priors_vary_less():
    prior = student(noise_scale=[(0.1, 1.2), (2.0, 0.9)])
    assert prior.tempered(0.5).noise_scale == ((0.1, 0.6), (2.0, 0.45))
    assert prior.noise_scale == ((0.1, 1.2), (2.0, 0.9))
    assert student().tempered(0.5).noise_scale == ((1.0, 0.5),)
    assert student().tempered(0.5).tempered(0.5).noise_scale == ((1.0, 0.25),)
    u = normal(2, *SHAPE)

    def draw(of):
        return of.sample(u, 0.3, generator=torch.Generator().manual_seed(0))

    mean = 0.25 / (0.25 + 0.3**2) * u
    assert_close(draw(student().tempered(0.5)) - mean, 0.5 * (draw(student()) - mean))
    assert_close(draw(student().tempered(1.0)), draw(student()))
    for temperature in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="temperature must be positive"):
            prior.tempered(temperature)


def test_temperature_is_for_conditioning_only():
    y, prior = torch.zeros(1, *SHAPE), student()
    with pytest.raises(ValueError, match=r"temperature must be 1 with method 'gibbs', got 0\.5"):
        solve(y, operator=box(), prior=prior, nfe=1, temperature=0.5, method="gibbs")
    with pytest.raises(ValueError, match="temperature must be 1 with method 'gibbs'"):
        solve(y, operator=box(), prior=prior, nfe=1, temperature=0.5, preset="ncvsd")
    with pytest.raises(ValueError, match="temperature must be 1 with method 'gibbs'"):
        solve(y, operator=Forward(), prior=prior, nfe=1, temperature=0.5, method="gibbs")


class Heard(ops.PhaseRetrieval):
    """Phase retrieval that notes the noise std of its searches."""

    def __init__(self, pad):
        super().__init__(pad)
        self.heard = []

    def search(self, y, x, shrink, *, sigma_y, iterations=60):
        self.heard.append(sigma_y)
        return super().search(y, x, shrink, sigma_y=sigma_y, iterations=iterations)


def test_searches_know_the_noise_of_y_whatever_the_likelihood_assumes():
    operator = Heard(4)
    y = operator.measure(torch.zeros(1, *SHAPE), 0.1)
    solve(
        y,
        operator=operator,
        prior=student(),
        nfe=2,
        sigma_y=0.1,
        sigma_lik=0.02,
        estimate="sample",
    )
    assert operator.heard == [0.1] * 4  # a start, its half turn and two draws


def test_temperature_of_one_changes_nothing():
    y = measurement(box()).float()
    one, left = (
        solve(y, operator=box(), prior=student(), nfe=2, num_samples=2, **settings)
        for settings in ({"temperature": 1}, {})
    )
    assert torch.equal(one.samples, left.samples)


def test_the_shipped_prior_varies_less_when_cooler():
    prior = load_prior("ncvsd_faces64", dtype=torch.float32)
    assert prior.statistics is not None
    operator = ops.Inpaint.box((64, 64), 32)
    x = prior.generate(1, num_steps=1)
    y = operator.measure(x, 0.05, generator=torch.Generator().manual_seed(0))
    results = [
        solve(y, operator=operator, prior=prior, nfe=2, num_samples=2, temperature=temperature)
        for temperature in (1.0, 0.6)
    ]
    hidden = ~operator.mask.expand_as(x)
    for result in results:
        assert (result.method, result.nfe, result.x0.dtype) == ("conditioning", 2, torch.float32)
        assert 0.7 < float(result.residual) < 1.2
    warm, cool = (result.std for result in results)
    assert 0.02 < float(warm[hidden].mean()) < 0.5
    assert float(cool[hidden].mean()) < 0.9 * float(warm[hidden].mean())
    assert float(cool[~hidden].mean()) < 0.9 * float(warm[~hidden].mean())
