"""Gaussian and mixture priors against dense linear algebra and quadrature."""

import math

import pytest
import torch

from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.priors import GaussianMixturePrior, GaussianPrior

SHAPE = (2, 1, 3)
DIM = math.prod(SHAPE)


def random_covariance(dim=DIM, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, rank or dim, generator=generator, dtype=torch.float64) * 0.3
    return factor @ factor.T


def random_images(batch, shape=SHAPE, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)


def closed_form(mean, covariance, u, sigma):
    """Posterior mean (B, D) and covariance (D, D) of a Gaussian prior, by a dense solve."""
    dim = len(covariance)
    total = covariance + sigma**2 * torch.eye(dim, dtype=torch.float64)
    gain = torch.linalg.solve(total, covariance).T
    centred = (u - mean).flatten(1)
    return mean.flatten() + centred @ gain.T, covariance - gain @ covariance


def circulant(spectrum):
    """Dense covariance (D, D) whose eigenvalues at the 2-D FFT frequencies are `spectrum`."""
    dim = spectrum.numel()
    basis = torch.eye(dim, dtype=torch.complex128).reshape(dim, *spectrum.shape)
    columns = torch.fft.ifft2(torch.fft.fft2(basis) * spectrum)
    return columns.real.reshape(dim, dim).T


def symmetric_spectrum(channels, height, width, seed=2):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(channels, height, width, generator=generator, dtype=torch.float64)
    return torch.fft.fft2(image, norm="ortho").abs() ** 2


def assert_moments(draws, mean, covariance):
    """Mean and covariance of Gaussian draws (N, D) within four standard errors."""
    num = len(draws)
    variance = covariance.diagonal()
    mean_error = (variance / num).sqrt()
    assert ((draws.mean(0) - mean).abs() <= 4 * mean_error + 1e-12).all()
    error = ((torch.outer(variance, variance) + covariance**2) / num).sqrt()
    assert ((draws.T.cov() - covariance).abs() <= 4 * error + 1e-12).all()


@pytest.mark.parametrize("sigma", [1e-3, 0.3, 80.0])
@pytest.mark.parametrize("rank", [DIM, 2])
def test_gaussian_mean_is_the_closed_form(sigma, rank):
    mean, covariance = random_images(1)[0], random_covariance(rank=rank)
    u = random_images(4, seed=3)
    expected, _ = closed_form(mean, covariance, u, sigma)
    got = GaussianPrior(mean, covariance).denoise(u, sigma)
    torch.testing.assert_close(got.flatten(1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.1, 3.0])
@pytest.mark.parametrize("rank", [DIM, 2])
def test_gaussian_draws_have_the_posterior_law(sigma, rank):
    mean, covariance = random_images(1)[0], random_covariance(rank=rank)
    u = random_images(1, seed=4)
    expected, spread = closed_form(mean, covariance, u, sigma)
    prior = GaussianPrior(mean, covariance)
    draws = prior.sample(u.expand(20_000, *SHAPE), sigma, generator=torch.Generator())
    assert_moments(draws.flatten(1), expected[0], spread)


def test_gaussian_prior_draws_have_the_prior_law():
    mean, covariance = random_images(1)[0], random_covariance()
    draws = GaussianPrior(mean, covariance).draw(20_000, generator=torch.Generator())
    assert draws.shape == (20_000, *SHAPE)
    assert_moments(draws.flatten(1), mean.flatten(), covariance)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (4, 6), (1, 4), (5, 2)])
@pytest.mark.parametrize("shared", [True, False])
def test_stationary_equals_dense(height, width, shared):
    shape = (2, height, width)
    spectrum = symmetric_spectrum(1 if shared else 2, height, width)
    mean, u = random_images(1, shape)[0], random_images(3, shape, seed=5)
    covariance = torch.block_diag(*map(circulant, spectrum.expand(shape)))
    stationary = GaussianPrior.stationary(mean, spectrum)
    expected = GaussianPrior(mean, covariance).denoise(u, 0.7)
    torch.testing.assert_close(stationary.denoise(u, 0.7), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), [(1, 3), (2, 4)])
def test_stationary_draws_have_the_dense_law(height, width):
    mean, u = random_images(1, (1, height, width))[0], random_images(1, (1, height, width), seed=6)
    spectrum = symmetric_spectrum(1, height, width)
    covariance = circulant(spectrum[0])
    prior = GaussianPrior.stationary(mean, spectrum)
    generator = torch.Generator()
    assert_moments(prior.draw(20_000, generator=generator).flatten(1), mean.flatten(), covariance)
    expected, spread = closed_form(mean, covariance, u, 0.5)
    draws = prior.sample(u.expand(20_000, -1, -1, -1), 0.5, generator=generator)
    assert_moments(draws.flatten(1), expected[0], spread)


def make_priors():
    means = random_images(2, seed=7)
    covariances = torch.stack([random_covariance(seed=8), random_covariance(seed=9)])
    return {
        "dense": GaussianPrior(means[0], covariances[0]),
        "stationary": GaussianPrior.stationary(means[0], symmetric_spectrum(2, 1, 3)),
        "mixture": GaussianMixturePrior(torch.tensor([0.3, 0.7]), means, covariances),
    }


@pytest.mark.parametrize("name", list(make_priors()))
class TestEveryAnalyticPrior:
    def test_levels_may_differ_between_images(self, name):
        prior, u = make_priors()[name], random_images(3)
        sigma = torch.tensor([0.01, 0.5, 10.0])
        alone = [prior.denoise(u[i : i + 1], float(sigma[i].double())) for i in range(3)]
        torch.testing.assert_close(prior.denoise(u, sigma), torch.cat(alone), rtol=1e-7, atol=1e-7)
        sources = make_generators([(0, i) for i in range(3)])
        together = prior.sample(u, sigma, generator=sources)
        (source,) = make_generators([(0, 1)])
        own = prior.sample(u[1:2], float(sigma[1]), generator=[source])
        torch.testing.assert_close(together[1:2], own, rtol=1e-7, atol=1e-7)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_output_follows_the_dtype_of_u(self, name, dtype):
        prior, u = make_priors()[name], random_images(2)
        exact = prior.denoise(u, 0.5)
        got = prior.denoise(u.to(dtype), 0.5)
        assert got.dtype == dtype
        # A few roundings of values near 1; half precision rounds only input and output.
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)
        draw = prior.sample(u.to(dtype), 0.5, generator=torch.Generator())
        assert draw.dtype == dtype
        assert draw.shape == u.shape

    def test_same_generator_same_draw(self, name):
        prior, u = make_priors()[name], random_images(2)
        first, again, other = (
            prior.sample(u, 0.5, generator=torch.Generator().manual_seed(seed))
            for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_describes_itself(self, name):
        prior = make_priors()[name]
        assert prior.image_shape == SHAPE
        assert prior.nfe_per_sample == 1
        assert (prior.sigma_min, prior.sigma_max) == (0.0, math.inf)

    @pytest.mark.parametrize(
        ("u", "sigma", "message"),
        [
            (torch.zeros(1, 2, 3, 1), 1.0, "u must hold images of shape"),
            (torch.zeros(SHAPE), 1.0, r"u must have shape \(B, C, H, W\)"),
            (torch.zeros(2, *SHAPE), 0.0, "sigma must be positive and finite, got 0"),
            (torch.zeros(2, *SHAPE), -1.0, "sigma must be positive"),
            (torch.zeros(2, *SHAPE), math.inf, "sigma must be positive and finite"),
            (torch.zeros(2, *SHAPE), torch.tensor([1.0, math.nan]), "sigma must be positive"),
            (torch.zeros(2, *SHAPE), torch.ones(3), r"sigma must be a float or have shape \(2,\)"),
        ],
    )
    def test_bad_input_is_named(self, name, u, sigma, message):
        prior = make_priors()[name]
        for method in (prior.sample, prior.denoise):
            with pytest.raises(ValueError, match=message):
                method(u, sigma)

    def test_prior_draws_follow_the_dtype_of_the_mean(self, name):
        assert make_priors()[name].draw(2).dtype == torch.float64
        with pytest.raises(ValueError, match="num must be at least 1"):
            make_priors()[name].draw(0)


def test_mixture_matches_quadrature_in_one_dimension():
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    means = torch.tensor([-0.8, 0.1, 0.9], dtype=torch.float64)
    variances = torch.tensor([0.01, 0.04, 0.0025], dtype=torch.float64)
    prior = GaussianMixturePrior(weights, means.view(3, 1, 1, 1), variances.view(3, 1, 1))
    grid = torch.linspace(-4, 4, 40_001, dtype=torch.float64)
    density = (
        weights / variances.sqrt() * torch.exp(-0.5 * (grid[:, None] - means) ** 2 / variances)
    ).sum(1)
    for sigma in (0.05, 0.5, 5.0):
        for u in (-1.0, 0.4, 2.0):
            posterior = density * torch.exp(-0.5 * ((u - grid) / sigma) ** 2)
            posterior = posterior / posterior.sum()
            image = torch.full((1, 1, 1, 1), u, dtype=torch.float64)
            mean = float((posterior * grid).sum())
            assert float(prior.denoise(image, sigma)) == pytest.approx(mean, abs=1e-6)
            draws = prior.sample(
                image.expand(20_000, -1, -1, -1), sigma, generator=torch.Generator()
            ).flatten()
            # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed by chance once in a thousand.
            reached = torch.searchsorted(draws.sort().values, grid) / len(draws)
            assert float((reached - posterior.cumsum(0)).abs().max()) < 1.95 / len(draws) ** 0.5


def test_mixture_matches_quadrature_in_two_dimensions():
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
    means = torch.tensor([[-0.5, 0.2], [0.4, -0.3]], dtype=torch.float64)
    covariances = torch.tensor(
        [[[0.09, 0.06], [0.06, 0.08]], [[0.04, -0.03], [-0.03, 0.06]]], dtype=torch.float64
    )
    prior = GaussianMixturePrior(weights, means.view(2, 1, 1, 2), covariances)
    axis = torch.linspace(-2.5, 2.5, 501, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    offsets = points[:, None] - means
    log_density = -0.5 * torch.einsum(
        "nki,kij,nkj->nk", offsets, torch.linalg.inv(covariances), offsets
    )
    density = (weights / torch.linalg.det(covariances).sqrt() * log_density.exp()).sum(1)
    u, sigma = torch.tensor([0.1, 0.0], dtype=torch.float64), 0.4
    posterior = density * torch.exp(-0.5 * ((points - u) ** 2).sum(1) / sigma**2)
    posterior = posterior / posterior.sum()
    mean = posterior @ points
    centred = points - mean
    covariance = centred.T @ (posterior[:, None] * centred)
    got = prior.denoise(u.view(1, 1, 1, 2), sigma).flatten()
    torch.testing.assert_close(got, mean, rtol=0, atol=1e-5)
    num = 20_000
    draws = prior.sample(
        u.expand(num, 1, 1, 2), sigma, generator=torch.Generator().manual_seed(3)
    ).flatten(1)
    assert ((draws.mean(0) - mean).abs() < 4 * (covariance.diagonal() / num).sqrt()).all()
    products = torch.einsum("ni,nj->nij", draws - mean, draws - mean)
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / num**0.5).all()


def test_mixture_prior_draws_have_the_mixture_law():
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    means = torch.tensor([-0.5, 0.5], dtype=torch.float64).view(2, 1, 1, 1)
    prior = GaussianMixturePrior(weights, means, torch.full((2, 1, 1), 1e-4).double())
    draws = prior.draw(20_000, generator=torch.Generator()).flatten()
    share = float((draws > 0).double().mean())
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 20_000) ** 0.5
    assert float(draws[draws > 0].std()) == pytest.approx(0.01, rel=0.03)


def test_mixture_of_one_is_the_gaussian():
    mean, covariance = random_images(1), random_covariance()
    mixture = GaussianMixturePrior(torch.ones(1), mean, covariance[None])
    u = random_images(3, seed=4)
    expected = GaussianPrior(mean[0], covariance).denoise(u, 0.3)
    torch.testing.assert_close(mixture.denoise(u, 0.3), expected)


def test_mixture_survives_levels_and_images_far_from_every_component():
    means = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    prior = GaussianMixturePrior(torch.tensor([0.5, 0.5]), means, torch.full((2, 1, 1), 1e-6))
    u = torch.tensor([300.0, -300.0]).view(2, 1, 1, 1)
    mean = prior.denoise(u, 0.002)
    assert torch.isfinite(mean).all()
    assert torch.equal(mean.sign(), u.sign())
    assert torch.isfinite(prior.sample(u, 0.002)).all()


def test_mixture_never_draws_a_component_of_weight_zero():
    means = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    prior = GaussianMixturePrior(torch.tensor([1.0, 0.0]), means, torch.full((2, 1, 1), 0.01))
    u = torch.ones(200, 1, 1, 1)
    assert float(prior.sample(u, 10.0).max()) < 0
    assert float(prior.draw(200).max()) < 0
    assert torch.isfinite(prior.denoise(u, 0.01)).all()


@pytest.mark.parametrize(
    ("mean", "covariance", "error", "message"),
    [
        (torch.zeros(2, 3), torch.eye(6), ValueError, r"mean must have shape \(C, H, W\)"),
        (torch.zeros(0, 2, 2), torch.eye(1), ValueError, "mean must have shape"),
        (torch.zeros(SHAPE), torch.eye(4), ValueError, "covariance must have shape"),
        (
            torch.zeros(SHAPE),
            torch.ones(DIM, DIM).tril(),
            ValueError,
            "covariance must be symmetric",
        ),
        (torch.zeros(SHAPE), -torch.eye(DIM), ValueError, "semi-definite, got the eigenvalue -1"),
        (torch.zeros(SHAPE), torch.eye(DIM) * math.nan, ValueError, "covariance must be finite"),
        (torch.full(SHAPE, math.inf), torch.eye(DIM), ValueError, "mean must be finite"),
        (torch.zeros(SHAPE).long(), torch.eye(DIM), TypeError, "mean must be a floating"),
        (torch.zeros(SHAPE), torch.eye(DIM).long(), TypeError, "covariance must be a floating"),
    ],
)
def test_bad_gaussians_are_refused(mean, covariance, error, message):
    with pytest.raises(error, match=message):
        GaussianPrior(mean, covariance)


@pytest.mark.parametrize(
    ("spectrum", "message"),
    [
        (torch.ones(3, 4, 5), r"spectrum must have shape \(2 or 1, 4, 5\)"),
        (torch.ones(4, 5), "spectrum must have shape"),
        (-torch.ones(1, 4, 5), "spectrum must be non-negative"),
        (torch.arange(20.0).view(1, 4, 5), "same at a frequency and its negative"),
        (torch.full((1, 4, 5), math.inf), "spectrum must be finite"),
    ],
)
def test_bad_spectra_are_refused(spectrum, message):
    with pytest.raises(ValueError, match=message):
        GaussianPrior.stationary(torch.zeros(2, 4, 5), spectrum)


@pytest.mark.parametrize(
    ("weights", "covariances", "message"),
    [
        (torch.tensor([0.5, 0.4]), torch.eye(DIM).expand(2, -1, -1), "weights .* sum 1, got"),
        (torch.tensor([1.5, -0.5]), torch.eye(DIM).expand(2, -1, -1), "weights must be non-neg"),
        (torch.tensor([math.nan, 1]), torch.eye(DIM).expand(2, -1, -1), "weights must be finite"),
        (torch.ones(3) / 3, torch.eye(DIM).expand(2, -1, -1), r"weights must have shape \(2,\)"),
        (torch.ones(2) / 2, torch.eye(DIM), "covariances must have shape"),
        (
            torch.ones(2) / 2,
            torch.stack([torch.eye(DIM), -torch.eye(DIM)]),
            r"covariances\[1\] must be positive semi-definite",
        ),
    ],
)
def test_bad_mixtures_are_refused(weights, covariances, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixturePrior(weights, torch.zeros(2, *SHAPE), covariances)


def small_mixture():
    covariances = torch.stack([random_covariance(seed=seed) for seed in (0, 1)]).float()
    weights = torch.tensor([0.3, 0.7], dtype=torch.float32)
    return GaussianMixturePrior(weights, random_images(2).float(), covariances)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianPrior(random_images(1)[0], random_covariance()),
        lambda: GaussianPrior.stationary(
            random_images(1)[0].float(), symmetric_spectrum(*SHAPE).float()
        ),
        small_mixture,
    ],
    ids=["dense", "stationary", "mixture"],
)
@pytest.mark.parametrize("made_within", [True, False])
def test_draws_do_not_depend_on_the_callers_arithmetic(make, made_within, arithmetic):
    u = random_images(3).float()

    def everything(prior):
        def source():
            return torch.Generator().manual_seed(0)

        covariance = prior.statistics.covariance(0.5, u)
        return (
            prior.sample(u, 0.5, generator=source()),
            prior.denoise(u, 0.5),
            prior.draw(3, generator=source()),
            prior.statistics.mean_image(u),
            covariance.colour(u),
        )

    expected = everything(make())
    prior = make()
    with arithmetic():
        prior = make() if made_within else prior
        found = everything(prior)
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == wanted.dtype
        assert torch.equal(value, wanted)
    # What was kept for later calls takes gradients.
    for x in (u, u.double()):
        x.requires_grad_()
        prior.denoise(x, 0.5).sum().backward()
        assert x.grad is not None
