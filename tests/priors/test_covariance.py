"""Covariances over frequencies and colours against dense matrices, and their measurement."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from ncvsd_inverse.priors import DiffusionPrior, GaussianMixturePrior, GaussianPrior
from ncvsd_inverse.priors.covariance import SpectralCovariance
from ncvsd_inverse.priors.statistics import ImageStatistics, _radial_bins, measure_statistics

SIZES = [(5, 4), (4, 5), (6, 6), (3, 7), (1, 4), (4, 1), (2, 2)]


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def symmetric_spectrum(channels, height, width):
    """Variances (C, H, W), the same at a frequency and its negative and nowhere else."""
    values = normal(channels, height, width, seed=7).square() + 0.05
    return (values + values.flip(1, 2).roll((1, 1), (1, 2))) / 2


def mixtures(channels, seed=3):
    return torch.linalg.qr(normal(channels, channels, seed=seed))[0].contiguous()


def make_covariance(height, width, channels=2):
    spectrum = symmetric_spectrum(channels, height, width)
    mixing = mixtures(channels)
    return SpectralCovariance(mixing, spectrum[..., : width // 2 + 1], width), mixing, spectrum


def dense_covariance(mixing, spectrum):
    """Return mixing^T F^H diag(spectrum) F mixing as a matrix (D, D) over flattened images."""
    channels, height, width = spectrum.shape

    def fourier(side):
        place = torch.arange(side, dtype=torch.float64)
        return torch.exp(-2j * math.pi * torch.outer(place, place) / side) / math.sqrt(side)

    waves = torch.kron(fourier(height), fourier(width))
    blocks = [waves.mH @ torch.diag(row.flatten() + 0j) @ waves for row in spectrum]
    mix = torch.kron(mixing, torch.eye(height * width, dtype=torch.float64))
    matrix = mix.T @ torch.block_diag(*blocks).real @ mix
    assert max(float(block.imag.abs().max()) for block in blocks) < 1e-12
    assert len(matrix) == channels * height * width
    return matrix


@pytest.mark.parametrize("size", SIZES)
def test_coordinates_keep_lengths_and_images_go_back(size):
    covariance, _, _ = make_covariance(*size)
    x, other = normal(3, 2, *size, seed=1), normal(3, 2, *size, seed=2)
    z = covariance.coordinates(x)
    assert z.shape == (3, 2, size[0], size[1] // 2 + 1, 2)
    assert covariance.variances.shape == (2, size[0], size[1] // 2 + 1, 1)
    assert_close((z * covariance.coordinates(other)).sum((1, 2, 3, 4)), (x * other).sum((1, 2, 3)))
    assert_close(covariance.images(z), x)


@pytest.mark.parametrize("size", SIZES)
def test_images_are_the_adjoint_of_coordinates(size):
    """For any numbers, also those that are coordinates of no image."""
    covariance, _, _ = make_covariance(*size)
    x = normal(2, 2, *size, seed=1)
    z = normal(2, 2, size[0], size[1] // 2 + 1, 2, seed=2)
    left = (covariance.coordinates(x) * z).sum((1, 2, 3, 4))
    assert_close(left, (x * covariance.images(z)).sum((1, 2, 3)))


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_dense_matrix_and_colour_is_its_root(size):
    covariance, mixing, spectrum = make_covariance(*size)
    dense = dense_covariance(mixing, spectrum)
    basis = torch.eye(len(dense), dtype=torch.float64).view(-1, 2, *size)
    applied = covariance.images(covariance.variances * covariance.coordinates(basis))
    assert_close(applied.flatten(1), dense)
    root = covariance.colour(basis).flatten(1)
    assert_close(root @ root.T, dense)


def test_colour_keeps_the_dtype(dtype):
    covariance = SpectralCovariance(torch.eye(2).to(dtype), torch.ones(2, 4, 3).to(dtype), 5)
    x = normal(2, 2, 4, 5).to(dtype)
    assert_close(covariance.colour(x), x)


@pytest.mark.parametrize("size", [(5, 4), (3, 7), (4, 4)])
@pytest.mark.parametrize("sigma", [0.1, 1.0, math.inf])
def test_a_stationary_gaussian_knows_its_statistics(size, sigma, dtype):
    """Against its exact denoiser: Cov[x0 | u] = sigma^2 dE[x0 | u]/du."""
    mean, spectrum = normal(2, *size, seed=4), symmetric_spectrum(2, *size)
    prior = GaussianPrior.stationary(mean, spectrum)
    like = torch.zeros(3, 2, *size, dtype=dtype)
    assert_close(prior.statistics.mean_image(like), mean[None].to(dtype))
    covariance = prior.statistics.covariance(sigma, like)
    assert covariance.variances.dtype == dtype
    basis = torch.eye(mean.numel(), dtype=torch.float64).view(-1, 2, *size)
    if math.isinf(sigma):
        expected = dense_covariance(torch.eye(2).double(), spectrum)
    else:
        expected = sigma**2 * (prior.denoise(mean + basis, sigma) - mean).flatten(1)
    root = covariance.colour(basis.to(dtype)).flatten(1).double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert_close(root @ root.T, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sigma", [0.1, math.inf])
def test_other_gaussians_know_their_statistics_too(sigma):
    mean, covariance = dense_gaussian()
    statistics = GaussianPrior(mean, covariance).statistics
    eye = torch.eye(12, dtype=torch.float64).view(-1, *mean.shape)
    root = statistics.covariance(sigma, eye).colour(eye).flatten(1)
    noise = 0 if math.isinf(sigma) else torch.eye(12) / sigma**2
    expected = torch.linalg.inv(torch.linalg.inv(covariance) + noise)
    assert torch.allclose(root @ root.T, expected, atol=1e-8)
    assert torch.equal(statistics.mean_image(eye), mean[None])


def dense_gaussian(seed=5):
    root = normal(12, 12, seed=seed) * 0.3
    return normal(1, 3, 4, seed=seed + 1), root @ root.T + 0.01 * torch.eye(12)


@pytest.mark.parametrize("sigma", [0.3, math.inf])
def test_a_mixture_takes_its_average_covariance(sigma):
    (first, one), (second, two) = dense_gaussian(), dense_gaussian(seed=9)
    weights = torch.tensor([0.3, 0.7]).double()
    prior = GaussianMixturePrior(weights, torch.stack([first, second]), torch.stack([one, two]))
    covariance = prior.statistics.covariance(sigma, first[None])
    eye = torch.eye(12, dtype=torch.float64).view(-1, 1, 3, 4)
    root = covariance.colour(eye).flatten(1)
    if math.isinf(sigma):
        apart = (first - second).flatten()
        expected = 0.3 * one + 0.7 * two + 0.21 * torch.outer(apart, apart)
        assert torch.allclose(root @ root.T, expected, atol=1e-8)
        return
    x0 = prior.draw(20_000, generator=torch.Generator().manual_seed(1))
    u = x0 + sigma * normal(*x0.shape, seed=2)
    left = (x0 - prior.denoise(u, sigma)).flatten(1)
    # 20,000 draws know a covariance to 1%, and 1024 views the part between components to 3%.
    expected = left.T @ left / len(left)
    error = torch.linalg.matrix_norm(root @ root.T - expected)
    assert float(error) < 0.04 * float(torch.linalg.matrix_norm(expected))
    assert "average" in prior.statistics.note


LEVELS = (0.1, 0.4, 2.0)
RADII = (0.0, 0.1, 0.3)


def make_statistics(**changes):
    values = {
        "mean": normal(2, 2, 3, seed=5).float() / 3,
        "mixing": mixtures(2).float(),
        "levels": LEVELS,
        "radii": RADII,
        "spectra": (normal(4, 2, 3, seed=6).square() + 0.01).float(),
        **changes,
    }
    return ImageStatistics(**values)


@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.4, 0.9, 2.0])
def test_variances_at_and_between_levels_are_log_linear(sigma):
    statistics = make_statistics()
    logs = statistics.spectra.double().log()
    low = 0 if sigma <= 0.4 else 1
    share = math.log(sigma / LEVELS[low]) / math.log(LEVELS[low + 1] / LEVELS[low])
    expected = ((1 - share) * logs[low] + share * logs[low + 1]).exp()
    covariance = statistics.covariance(sigma, torch.zeros(1, 2, 10, 10, dtype=torch.float64))
    variances = covariance.variances[..., 0]
    for place, (row, column) in enumerate([(0, 0), (0, 1), (0, 3)]):
        assert_close(variances[:, row, column], expected[:, place])
        assert_close(variances[:, column, row], expected[:, place])
        assert_close(variances[:, -column, row], expected[:, place])
    # Half-way between two radii in the logarithm; constant beyond the last; by radius only.
    assert_close(variances[:, 0, 2], (expected[:, 1] * expected[:, 2]).sqrt())
    assert_close(variances[:, 5, 5], expected[:, 2])
    assert_close(variances[:, 1, 2], variances[:, 2, 1])
    assert_close(covariance.mixing, statistics.mixing.double())


def test_variances_beyond_the_levels():
    statistics = make_statistics()
    like = torch.zeros(1, 2, 10, 8, dtype=torch.float64)

    def variances(sigma):
        return statistics.covariance(sigma, like).variances

    assert_close(variances(0.05), variances(0.1) / 4)
    assert_close(variances(0.001), variances(0.1) / 1e4)
    assert_close(variances(50.0), variances(2.0))
    own = make_statistics(spectra=statistics.spectra[-1:].repeat(4, 1, 1))
    assert_close(variances(math.inf), own.covariance(2.0, like).variances)
    assert not torch.allclose(variances(math.inf), variances(50.0))


def test_one_level_is_enough():
    statistics = make_statistics(levels=(0.4,), spectra=make_statistics().spectra[:2])
    like = torch.zeros(1, 2, 4, 4)
    at = statistics.covariance(0.4, like).variances
    assert_close(at[:, 0, 0, 0], statistics.spectra[0, :, 0])
    assert_close(statistics.covariance(0.2, like).variances, at / 4)
    assert_close(statistics.covariance(0.8, like).variances, at)


def test_frequencies_are_cycles_per_pixel_at_any_size():
    statistics = make_statistics()
    small, large = (
        statistics.covariance(0.3, torch.zeros(1, 2, side, side)).variances for side in (8, 16)
    )
    assert_close(small[:, 1, 2], large[:, 2, 4])


def test_mean_image_has_the_size_of_the_images():
    statistics = make_statistics()
    assert torch.equal(statistics.mean_image(torch.zeros(5, 2, 2, 3)), statistics.mean[None])
    large = statistics.mean_image(torch.zeros(5, 2, 8, 12, dtype=torch.float64))
    assert (large.shape, large.dtype) == ((1, 2, 8, 12), torch.float64)
    assert_close(large[0, :, 0, 0], statistics.mean[:, 0, 0].double())
    assert_close(large.mean((0, 2, 3)), statistics.mean.double().mean((1, 2)), rtol=0, atol=0.2)
    grey = make_statistics(mean=torch.tensor([0.2, -0.3]).view(2, 1, 1))
    image = grey.mean_image(torch.zeros(1, 2, 3, 5))
    assert_close(image, grey.mean[None].expand(1, 2, 3, 5))


def test_round_trip():
    statistics = make_statistics()
    entries = statistics.to_dict()
    again = ImageStatistics.from_dict(json.loads(json.dumps(entries, allow_nan=False)))
    assert again.levels == pytest.approx(LEVELS)
    assert again.radii == pytest.approx(RADII)
    for name in ("mean", "spectra"):
        # Four significant digits are kept.
        assert_close(getattr(again, name), getattr(statistics, name), rtol=6e-4, atol=0)
    assert_close(again.mixing, statistics.mixing, rtol=0, atol=1e-6)
    assert again.to_dict() == entries
    text = json.dumps(entries["spectra"])
    assert max(len(number.strip(" []")) for number in text.split(",")) <= 9


def nested(name, change):
    """Return a change of the field `name` of a dictionary of statistics."""
    return lambda entries: {**entries, name: change(entries[name])}


BAD_ENTRIES = {
    "no object": (lambda e: [e], "statistics must be an object with the fields mean, mixing"),
    "none": (lambda e: None, "statistics must be an object"),
    "lacks a field": (lambda e: {k: v for k, v in e.items() if k != "radii"}, "the fields"),
    "another field": (lambda e: {**e, "more": 1}, "the fields"),
    "text": (nested("mean", lambda v: "grey"), "must be numbers in"),
    "object": (nested("levels", lambda v: {"a": 1}), "must be numbers in"),
    "ragged": (nested("spectra", lambda v: [[[1.0], [1.0, 2.0]]]), "must be numbers in"),
    "mean flat": (
        nested("mean", lambda v: v[0]),
        "statistics' mean must be numbers in 3 dimensions",
    ),
    "mixing flat": (nested("mixing", lambda v: v[0]), "mixing must be numbers in 2 dimensions"),
    "levels a number": (nested("levels", lambda v: 0.1), "levels must be numbers in 1 dimensions"),
    "radii deep": (nested("radii", lambda v: [v]), "radii must be numbers in 1 dimensions"),
    "spectra flat": (nested("spectra", lambda v: v[0]), "spectra must be numbers in 3 dimensions"),
    "null": (nested("mean", lambda v: [[[None] * 3] * 2] * 2), "statistics' mean must be numbers"),
    "infinite": (
        nested("spectra", lambda v: [[[math.inf] * 3] * 2] * 4),
        "spectra must be numbers",
    ),
    "huge": (nested("levels", lambda v: [10**400]), "levels must be numbers"),
    "large": (nested("levels", lambda v: [1e39]), "levels must be numbers"),
    "number as text": (nested("levels", lambda v: ["0.1"] * 3), "levels must be numbers"),
    "truth values": (nested("levels", lambda v: [True] * 3), "levels must be numbers"),
    "level missing": (nested("spectra", lambda v: v[:-1]), r"spectra must have shape \(4, 2, 3\)"),
    "mixing of three": (
        nested("mixing", lambda v: [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        r"mixing must have shape \(2, 2\)",
    ),
    "mixing askew": (nested("mixing", lambda v: [[1, 0.1], [0, 1]]), "orthonormal rows"),
    "levels fall": (nested("levels", lambda v: v[::-1]), "levels must increase"),
    "levels stay": (nested("levels", lambda v: [0.1, 0.1, 2.0]), "levels must increase"),
    "level zero": (nested("levels", lambda v: [0.0, 0.1, 2.0]), "levels must increase"),
    "level infinite": (nested("levels", lambda v: [0.1, 2.0, math.inf]), "levels must be numbers"),
    "level nan": (nested("levels", lambda v: [math.nan, 0.1, 2.0]), "levels must increase"),
    "radii fall": (nested("radii", lambda v: v[::-1]), "radii must increase"),
    "radius negative": (nested("radii", lambda v: [-0.1, 0.1, 0.3]), "radii must increase"),
    "variance zero": (
        nested("spectra", lambda v: [[[0.0] * 3] * 2, *v[1:]]),
        "spectra must be positive, got 0",
    ),
    "variance negative": (
        nested("spectra", lambda v: [[[-1.0] * 3] * 2, *v[1:]]),
        "spectra must be positive, got -1",
    ),
}


@pytest.mark.parametrize("case", list(BAD_ENTRIES))
def test_bad_entries_are_named(case):
    change, message = BAD_ENTRIES[case]
    with pytest.raises(ValueError, match=message):
        ImageStatistics.from_dict(change(make_statistics().to_dict()))


@pytest.mark.parametrize("shape", [(2, 3), (0, 2, 2), (1, 2, 2, 2)])
def test_a_mean_that_is_no_image_is_refused(shape):
    with pytest.raises(ValueError, match=r"mean must have shape \(C, h, w\), got"):
        make_statistics(mean=torch.zeros(shape))


def test_images_with_other_colours_are_refused():
    with pytest.raises(ValueError, match=r"like must have shape \(1, 2, 4, 4\), got \(1, 3, 4, 4"):
        make_statistics().covariance(0.1, torch.zeros(1, 3, 4, 4))


SIDE = 16
IMAGES = 500
MEASURED = (0.1, 0.5, 2.0)


def power_law():
    """Variances (1, H, W) that fall with frequency, whatever the direction."""
    line = torch.fft.fftfreq(SIDE, dtype=torch.float64)
    return 0.01 / (line[:, None] ** 2 + line**2 + 0.1**2)[None]


@pytest.fixture(scope="module")
def gaussian():
    return GaussianPrior.stationary(torch.full((2, SIDE, SIDE), 0.3).double(), power_law())


@pytest.fixture(scope="module")
def images(gaussian):
    return gaussian.draw(IMAGES, generator=torch.Generator().manual_seed(1))


def expected_spectra(change=lambda variances, sigma: variances):
    """Means over the bins of the variances given a view at each level, then of the images'."""
    own = power_law()[0]
    bins, _ = _radial_bins(SIDE, SIDE)
    given = [change(sigma**2 * own / (own + sigma**2), sigma) for sigma in MEASURED]
    counts = torch.bincount(bins.flatten())
    sums = [
        torch.zeros(len(counts)).double().index_add_(0, bins.flatten(), variances.flatten())
        for variances in (*given, own)
    ]
    return torch.stack(sums) / counts, counts


def check_spectra(statistics, expected, counts, rows):
    """Within four and a half standard errors: there are up to 40 bins, mixtures and levels."""
    error = (2 / (counts * IMAGES)).sqrt()
    ratio = statistics.spectra[rows] / expected[rows][:, None]
    assert ((ratio - 1).abs() < 4.5 * error).all()


def test_a_right_prior_shows_its_posterior_variances(gaussian, images):
    statistics = measure_statistics(gaussian, images, levels=MEASURED)
    expected, counts = expected_spectra()
    check_spectra(statistics, expected, counts, slice(0, 3))
    # The mean over pixels of one image of `IMAGES` is lost with the mean image.
    check_spectra(statistics, expected * (1 - 1 / IMAGES), counts, slice(3, 4))
    assert statistics.levels == MEASURED
    assert statistics.radii[0] == 0
    assert statistics.mean.shape == (2, SIDE, SIDE)
    assert_close(statistics.mean, images.mean(0))
    assert float(counts[0]) == 1


def test_measured_colours_are_those_of_the_images(images):
    """Two colours that always go together, and the rest nearly grey."""
    mixing = mixtures(2)
    spectrum = power_law() * torch.tensor([4.0, 0.1]).view(2, 1, 1).double()
    source = GaussianPrior.stationary(torch.zeros(2, SIDE, SIDE).double(), spectrum)

    class Mixed:
        nfe_per_sample = 1
        image_shape = (2, SIDE, SIDE)

        def sample(self, u, sigma, *, generator=None):
            rotated = torch.einsum("kc,bchw->bkhw", mixing, u)
            drawn = source.sample(rotated, sigma, generator=generator)
            return torch.einsum("kc,bkhw->bchw", mixing, drawn)

    drawn = source.draw(IMAGES, generator=torch.Generator().manual_seed(1))
    truth = torch.einsum("kc,bkhw->bchw", mixing, drawn)
    statistics = measure_statistics(Mixed(), truth, levels=MEASURED)
    # Signs are free; the first mixture has the largest variance.
    assert_close((statistics.mixing @ mixing.T).abs(), torch.eye(2).double(), rtol=0, atol=0.02)
    ratio = statistics.spectra[-1, 0] / statistics.spectra[-1, 1]
    assert_close(ratio, torch.full_like(ratio, 40), rtol=0.4, atol=0)


def test_batch_size_does_not_matter_but_the_seed_does(gaussian, images):
    one, other, reseeded = (
        measure_statistics(gaussian, images[:40], levels=(0.5,), batch_size=size, seed=seed)
        for size, seed in ((32, 0), (7, 0), (32, 1))
    )
    for name in ("mean", "spectra"):
        assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12)
    assert_close(one.mixing.abs(), other.mixing.abs(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(one.spectra[0], reseeded.spectra[0], rtol=1e-3)
    assert torch.equal(one.mean, reseeded.mean)


class Biased:
    nfe_per_sample = 1
    image_shape = (2, SIDE, SIDE)

    def __init__(self, prior):
        self.prior = prior

    def sample(self, u, sigma, *, generator=None):
        return self.prior.sample(u, sigma, generator=generator) + 0.2


class Narrow(Biased):
    def sample(self, u, sigma, *, generator=None):
        return self.prior.denoise(u, sigma)


def test_a_biased_prior_shows_at_frequency_zero(gaussian, images):
    right, biased = (
        measure_statistics(prior, images, levels=MEASURED) for prior in (gaussian, Biased(gaussian))
    )
    added = (biased.spectra - right.spectra)[:3, :, 0].sum(1)
    # Half of the square of 0.2 SIDE, each of two colours. The cross term has the standard error
    # 0.2 SIDE sqrt(2 v / IMAGES), at most 0.2 with v <= 1.
    assert ((added - 2 * 0.5 * (0.2 * SIDE) ** 2).abs() < 1).all()
    expected, counts = expected_spectra()
    with pytest.raises(AssertionError):
        check_spectra(biased, expected, counts, slice(0, 3))


def test_a_prior_that_does_not_vary_shows_as_half_the_variance(gaussian, images):
    statistics = measure_statistics(Narrow(gaussian), images, levels=MEASURED)
    expected, counts = expected_spectra(lambda variances, sigma: variances / 2)
    check_spectra(statistics, expected, counts, slice(0, 3))


def test_a_prior_of_any_size_gets_one_colour_as_mean(images):
    prior = DiffusionPrior(lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2), num_steps=2)
    crop = images[:4, :, :8, :12].float()
    statistics = measure_statistics(prior, crop, levels=(0.5,))
    assert statistics.mean.shape == (2, 1, 1)
    assert_close(statistics.mean.flatten(), crop.mean((0, 2, 3)))
    assert statistics.spectra.shape == (2, 2, len(statistics.radii))
    assert prior.with_statistics(statistics).statistics is statistics
    assert statistics.covariance(0.5, torch.zeros(1, 2, 24, 10)).variances.shape[1:3] == (24, 6)


BAD_ARGUMENTS = {
    "one image": ({"images": torch.zeros(1, 2, SIDE, SIDE)}, ValueError, "at least 2, got 1"),
    "no batch": ({"images": torch.zeros(2, SIDE, SIDE)}, ValueError, "images must have shape"),
    "whole numbers": ({"images": torch.zeros(2, 2, 4, 4, dtype=torch.uint8)}, TypeError, "images"),
    "nan": ({"images": torch.full((2, 2, SIDE, SIDE), math.nan)}, ValueError, "images must be fin"),
    "size": ({"images": torch.arange(256.0).view(2, 2, 8, 8)}, ValueError, r"shape \(2, 16, 16\)"),
    "level zero": ({"levels": (0.0, 1.0)}, ValueError, "levels must be positive"),
    "level infinite": ({"levels": (1.0, math.inf)}, ValueError, "levels must be positive"),
    "levels fall": ({"levels": (1.0, 0.5)}, ValueError, "levels must increase"),
    "no levels": ({"levels": ()}, ValueError, "levels must increase"),
    "seed": ({"seed": -1}, ValueError, "seed must be at least 0"),
    "batch_size": ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
}


@pytest.mark.parametrize("case", list(BAD_ARGUMENTS))
def test_bad_arguments_are_named(case, gaussian, images):
    change, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        measure_statistics(**{"prior": gaussian, "images": images[:2], **change})


def test_levels_above_the_priors_largest_are_refused(images):
    prior = DiffusionPrior(lambda x, sigma: x, num_steps=2, sigma_max=5.0)
    with pytest.raises(ValueError, match="levels must be positive and at most 5, got 10"):
        measure_statistics(prior, images[:2])
