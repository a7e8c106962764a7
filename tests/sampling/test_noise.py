"""Noise levels that are estimated."""

import math

import pytest
import torch

from ncvsd_inverse import load_prior, make_task, solve
from ncvsd_inverse import operators as ops
from ncvsd_inverse.images import centre_crop, read_images
from ncvsd_inverse.priors import GaussianPrior
from ncvsd_inverse.sampling.noise import (
    LEAST_NOISE,
    DirectNoise,
    Noise,
    NoiseTracker,
    _least_noise,
    first_noise,
)
from ncvsd_inverse.sampling.problem import Problem

SHAPE = (3, 32, 32)
OPERATORS = {
    "denoise": ops.Denoise(),
    "blur": ops.GaussianBlur(1.5, 7),
    "mirrored blur": ops.GaussianBlur(1.5, 7, boundary="reflect"),
    "small picture": ops.SuperResolution(2),
    "scattered pixels": ops.Inpaint.random(SHAPE[1:], 0.5),
    "k-space": ops.MaskedFourier.lines(SHAPE[1:]),
    "grey": ops.Colorize(),
}


def gaussian_prior():
    """A prior of smooth images."""
    rows = torch.fft.fftfreq(SHAPE[1])[:, None]
    columns = torch.fft.fftfreq(SHAPE[2])[None]
    spectrum = 0.3 / (1 + 900 * (rows**2 + columns**2)) ** 1.5
    return GaussianPrior.stationary(torch.zeros(SHAPE), spectrum.expand(SHAPE))


def images(num):
    """Draw images of the Gaussian prior."""
    noise = torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(5))
    return gaussian_prior().statistics.covariance(math.inf, noise).colour(noise)


@pytest.mark.parametrize("sigma_y", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_the_noise_of_gaussian_images_is_found(name, sigma_y):
    prior, operator = gaussian_prior(), OPERATORS[name]
    x = images(3)
    y = operator.measure(x, sigma_y, generator=torch.Generator().manual_seed(1))
    result = solve(y, operator=operator, prior=prior, nfe=2, sigma_y="auto", estimate="sample")
    assert result.sigma_y.shape == result.sigma_y_std.shape == (3,)
    assert (result.sigma_y_std < 0.3 * sigma_y).all()
    allowed = 4 * result.sigma_y_std + 0.05 * sigma_y
    assert ((result.sigma_y - sigma_y).abs() < allowed).all()


def test_the_noise_is_estimated_for_each_measurement_by_itself():
    operator = ops.GaussianBlur(1.5, 7)
    x = images(2)
    stds = torch.tensor([0.02, 0.2])
    y = operator(x) + stds.view(-1, 1, 1, 1) * torch.randn(2, *SHAPE)
    options = {"operator": operator, "prior": gaussian_prior(), "nfe": 2, "sigma_y": "auto"}
    both = solve(y, **options)
    assert torch.allclose(both.sigma_y, stds, rtol=0.05)
    alone = solve(y[1:], seed=[(0, 1)], **options)
    assert torch.equal(both.x0[1:], alone.x0)
    assert torch.allclose(both.residual, torch.ones(2), atol=0.15)
    assert "found, give or take" in repr(both)


def test_a_trained_prior_finds_the_noise_of_a_blur(data_folder):
    x = torch.cat(list(read_images(data_folder / "faces64" / "val.zip", 4)))
    operator = make_task("deblur_gaussian", 64).operator
    for sigma_y in (0.01, 0.1):
        y = operator.measure(x, sigma_y, generator=torch.Generator().manual_seed(0))
        result = solve(y, operator=operator, prior="ncvsd_faces64", nfe=4, sigma_y="auto")
        assert torch.allclose(result.sigma_y / sigma_y, torch.ones(4), atol=0.05)
        known = solve(y, operator=operator, prior="ncvsd_faces64", nfe=4, sigma_y=sigma_y)
        assert float((result.x0 - known.x0).square().mean().sqrt()) < 0.02


@pytest.mark.parametrize("start", [0.01, 0.06])
def test_calls_of_an_exact_denoiser_find_the_noise(start):
    prior, sigma_y = gaussian_prior(), 0.02
    y = images(1) + sigma_y * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    search = DirectNoise(y, Noise(start, start))
    for _ in range(8):
        level = search.level
        mean, moved = prior.denoise(y, level), prior.denoise(search.moved(), level)
        search.update(mean, moved)
    assert search.settled
    assert abs(search.noise.sigma - sigma_y) < 4 * search.noise.std
    assert search.noise.std < 0.03 * sigma_y


def test_the_noise_of_textured_photographs_is_found_by_the_prior(data_folder):
    pictures = read_images(data_folder / "natural" / "val.zip", 4)
    x = torch.cat([centre_crop(picture, (96, 96)) for picture in pictures])
    y = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    arguments = {"operator": ops.Denoise(), "prior": "ncvsd_natural", "sigma_y": "auto"}
    found = solve(y, nfe=10, **arguments)
    assert found.nfe == 10
    assert torch.allclose(found.sigma_y / 0.02, torch.ones(4), atol=0.1)
    before = solve(y, nfe=2, **arguments)  # too few calls to look
    assert float((before.sigma_y / 0.02).max()) > 1.3


def test_several_samples_share_what_is_found():
    operator = ops.GaussianBlur(1.5, 7)
    y = operator.measure(images(1), 0.05)
    options = {"operator": operator, "prior": gaussian_prior(), "nfe": 2, "sigma_y": "auto"}
    result = solve(y, num_samples=4, **options)
    assert result.samples.shape == (4, 1, *SHAPE)
    assert float(result.sigma_y) == pytest.approx(0.05, rel=0.05)


def test_no_noise_at_all_is_told_from_some():
    operator = ops.GaussianBlur(1.5, 7)
    y = operator(images(1))
    found = solve(y, operator=operator, prior=gaussian_prior(), nfe=2, sigma_y="auto").sigma_y
    assert LEAST_NOISE <= float(found) < 2 * LEAST_NOISE


@pytest.mark.parametrize(
    "operator", [ops.GaussianBlur(1.5, 7), ops.Inpaint.random(SHAPE[1:], 0.6)], ids=["blur", "mask"]
)
def test_a_measurement_of_8_bits_has_the_noise_of_rounding(operator):
    clean = operator(images(1))
    y = operator.measured(((clean + 1) * 127.5).round() / 127.5 - 1)
    options = {"operator": operator, "prior": gaussian_prior(), "nfe": 2, "sigma_y": "auto"}
    rounding = 2 / 255 / 12**0.5
    assert rounding <= float(solve(y, **options).sigma_y) < 1.5 * rounding


def test_numbers_near_steps_of_8_bits_are_no_steps():
    y = torch.rand(1, 3, 8, 8).mul(255).round().double() / 127.5 - 1
    assert _least_noise(y, torch.ones_like(y)) == pytest.approx(2 / 255 / 12**0.5)
    y[0, 0, 0, 0] += 0.1 / 127.5
    assert _least_noise(y, torch.ones_like(y)) == LEAST_NOISE
    hidden = torch.ones_like(y)
    hidden[0, 0, 0, 0] = 0
    assert _least_noise(y, hidden) > LEAST_NOISE


def test_draws_that_hold_the_noise_of_y_tell_nothing():
    operator = ops.SuperResolution(4)
    y = operator(torch.zeros(1, *SHAPE))
    problem = Problem.checked(y, operator, sigma_y=0.05, seed=0)
    tracker = NoiseTracker(problem, Noise(0.05, 0.01))
    assert tracker.gain == pytest.approx(1 / 4, rel=0.2)
    assert tracker.tells(1.0)
    assert not tracker.tells(0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma_y": "automatic"}, "sigma_y must be a number, 'auto' or None, got 'automatic'"),
        ({"operator": ops.HDR()}, "sigma_y must be a number for an operator that is not linear"),
        (
            {"operator": ops.Inpaint(torch.ones(2, 1, 32, 32))},
            "sigma_y must be a number for an operator that holds something for each image",
        ),
    ],
)
def test_what_cannot_be_estimated_is_named(change, message):
    y = torch.zeros(2, *SHAPE)
    arguments = {"operator": ops.Denoise(), "prior": gaussian_prior(), "sigma_y": "auto", **change}
    with pytest.raises(ValueError, match=message):
        solve(y, **arguments)


def test_a_prior_without_statistics_is_refused():
    problem = Problem.checked(torch.zeros(1, *SHAPE), ops.Denoise(), sigma_y=None, seed=0)
    with pytest.raises(ValueError, match="sigma_y must be a number for a prior without statistics"):
        first_noise(problem, None)


def test_a_shipped_prior_prints_what_it_found():
    y = torch.zeros(1, 3, 64, 64) + 0.05 * torch.randn(1, 3, 64, 64)
    prior = load_prior("ncvsd_faces64")
    result = solve(y, operator=ops.Denoise(), prior=prior, nfe=2, sigma_y="auto")
    assert float(result.sigma_y) == pytest.approx(0.05, rel=0.1)
