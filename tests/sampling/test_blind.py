"""Blurs whose kernel is not known."""

import json
import math
import warnings
from importlib.resources import files

import numpy as np
import pytest
import torch

from ncvsd_inverse import read_image, solve
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.operators import BlindBlur, Blur, GaussianBlur, MotionBlur
from ncvsd_inverse.operators.blind import FAMILIES
from ncvsd_inverse.priors import GaussianPrior
from ncvsd_inverse.priors.covariance import SpectralCovariance
from ncvsd_inverse.sampling import blind
from ncvsd_inverse.sampling.blind import describe_kernel
from ncvsd_inverse.sampling.kernels import (
    FoundKernel,
    KernelLikelihood,
    KernelTracker,
    centred,
    without_dust,
)

FACES = "ncvsd_faces64"


def normal(*shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=source)


def covariance(height, width, channels=3):
    """A covariance of smooth images."""
    rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    columns = torch.fft.rfftfreq(width, dtype=torch.float64)
    power = 0.3 / (1 + 200 * (rows**2 + columns**2))
    mixing = torch.linalg.qr(normal(channels, channels))[0]
    scales = torch.linspace(1, 0.2, channels, dtype=torch.float64)[:, None, None]
    return SpectralCovariance(mixing, scales * power, width)


def face():
    return read_image(files("ncvsd_inverse") / "assets" / "grace_hopper.png")


def similarity(found, kernel):
    """Return the largest normalised cross-correlation of two kernels."""
    waves = (torch.fft.rfft2(each.double().squeeze(), s=(64, 64)) for each in (found, kernel))
    first, second = waves
    product = torch.fft.irfft2(first.conj() * second, s=(64, 64)).max()
    return float(product / (found.double().norm() * kernel.double().norm()))


def test_the_likelihood_is_the_dense_gaussian_density():
    height, width, size, variance = 6, 5, 3, 0.04
    law, x, y = covariance(height, width), normal(1, 3, 6, 5), normal(1, 3, 6, 5, seed=1)
    kernel = normal(size, size, seed=2).softmax(0) / size
    likelihood = KernelLikelihood(y, BlindBlur(size))
    likelihood.given(x, law)
    units = torch.eye(3 * height * width, dtype=torch.float64).view(-1, 3, height, width)
    blur = Blur(kernel)
    matrix = blur(units).flatten(1).T
    images = law.images(law.variances * law.coordinates(units)).flatten(1)
    dense = matrix @ images @ matrix.T + variance * torch.eye(len(matrix), dtype=torch.float64)
    density = torch.distributions.MultivariateNormal(blur(x).flatten(), dense).log_prob(y.flatten())
    constant = len(matrix) / 2 * math.log(2 * math.pi)
    value, _, _ = likelihood.value(kernel, variance)
    assert math.isclose(value, constant * -1 - float(density), rel_tol=1e-9)


@pytest.mark.parametrize("boundary", ["circular", "replicate", "reflect", "valid"])
def test_derivatives_are_those_of_the_value(boundary):
    size, variance = 5, 0.04
    more = size - 1 if boundary == "valid" else 0
    y = normal(2, 3, 18, 21)
    likelihood = KernelLikelihood(y, BlindBlur(size, boundary))
    likelihood.given(normal(2, 3, 18 + more, 21 + more, seed=1), covariance(18, 21), 1.3)
    kernel, step = normal(size, size, seed=2).softmax(0) / size, 1e-6
    _, gradient, slope = likelihood.value(kernel, variance)
    for place in ((0, 0), (2, 2), (4, 1)):
        move = torch.zeros_like(kernel)
        move[place] = step
        ends = (likelihood.value(kernel + way * move, variance)[0] for way in (1, -1))
        assert math.isclose((next(ends) - next(ends)) / (2 * step), gradient[place], rel_tol=1e-4)
    ends = (likelihood.value(kernel, variance + way * step)[0] for way in (1, -1))
    assert math.isclose((next(ends) - next(ends)) / (2 * step), slope, rel_tol=1e-4)


@pytest.mark.parametrize("boundary", ["circular", "replicate", "valid"])
def test_the_kernel_of_known_images_is_found(boundary):
    kernel = MotionBlur(11, 0.5, seed=3).kernel[0, 0]
    x = covariance(48, 48).colour(normal(1, 3, 48, 48))
    y = Blur(kernel, boundary).measure(x, 0.01, generator=torch.Generator().manual_seed(1))
    tracker = KernelTracker(y, BlindBlur(11, boundary), 0.01)
    tracker.kernel = GaussianBlur(2.0, 11).kernel[0, 0]
    exact = SpectralCovariance(torch.eye(3), torch.full((3, *y.shape[2:]), 1e-8), y.shape[3])
    exact = SpectralCovariance(torch.eye(3), exact.spectrum[..., : y.shape[3] // 2 + 1], y.shape[3])
    for _ in range(4):
        tracker.update(x, exact, factor=1.0)
    assert similarity(tracker.kernel, kernel) > 0.98
    assert float((tracker.kernel - tracker.kernel.clamp(min=0)).abs().max()) == 0
    assert math.isclose(float(tracker.kernel.sum()), 1, rel_tol=1e-6)


def test_kernel_and_face_are_found_together():
    x, blur = face(), MotionBlur(15, 0.5, seed=5)
    y = blur.measure(x, 0.02, generator=torch.Generator().manual_seed(1))
    result = solve(y, operator=BlindBlur(15), prior=FACES, nfe=12, sigma_y=0.02)
    assert result.nfe == 12
    assert result.kernel.shape == result.kernel_std.shape == (1, 1, 15, 15)
    assert similarity(result.kernel, blur.kernel) > 0.8
    assert 0 < float(result.kernel_std.max()) < float(result.kernel.max())
    assert math.isclose(float(result.kernel.sum()), 1, rel_tol=1e-5)
    moved = max(
        float(psnr(result.x0.roll((row, column), (2, 3)), x))
        for row in range(-4, 5)
        for column in range(-4, 5)
    )
    assert moved > float(psnr(y, x)) + 1


def test_noise_and_kernels_of_several_measurements_are_found():
    blurs = [GaussianBlur(1.0, 9), MotionBlur(9, 0.3, seed=2)]
    source = torch.Generator().manual_seed(1)
    y = torch.cat([blur.measure(face(), 0.03, generator=source) for blur in blurs])
    operator = BlindBlur(9)
    both = solve(y, operator=operator, prior=FACES, nfe=6, sigma_y="auto", seed=[3, 4])
    assert both.kernel.shape == (2, 1, 9, 9)
    assert (both.sigma_y / 0.03 - 1).abs().max() < 0.25
    second = solve(y[1:], operator=operator, prior=FACES, nfe=6, sigma_y="auto", seed=[4])
    assert torch.equal(both.kernel[1:], second.kernel)
    assert torch.allclose(both.x0[1:], second.x0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "numbers"), [("gaussian", [1.7]), ("defocus", [2.6]), ("motion", [7.0, 160.0])]
)
def test_kernels_of_a_family_are_found(family, numbers):
    kernel = FAMILIES[family].draw(numbers, 13)
    y = Blur(kernel.float()).measure(face(), 0.02, generator=torch.Generator().manual_seed(1))
    result = solve(y, operator=BlindBlur(13, prior=family), prior=FACES, nfe=8, sigma_y=0.02)
    assert similarity(result.kernel, kernel) > 0.95
    assert result.kernel_numbers.shape == (1, len(numbers), 2)


def test_numbers_and_their_spread_are_those_of_the_exact_posterior():
    side, size, noise = 16, 9, 0.05
    law = covariance(side, side, channels=1)
    whole = torch.cat((law.spectrum, law.spectrum[..., 1:-1].flip(2)), 2)
    prior = GaussianPrior.stationary(torch.zeros(1, side, side, dtype=torch.float64), whole)
    truths = torch.tensor([0.7, 1.0, 1.4], dtype=torch.float64)
    x = law.colour(normal(3, 1, side, side, seed=3))
    source = torch.Generator().manual_seed(1)
    blurs = [GaussianBlur(float(std), size) for std in truths]
    y = torch.cat(
        [b.measure(each[None], noise, generator=source) for b, each in zip(blurs, x, strict=True)]
    )
    result = solve(
        y,
        operator=BlindBlur(size, prior="gaussian"),
        prior=prior,
        nfe=20,
        sigma_y=noise,
        estimate="sample",
    )
    found, sure = result.kernel_numbers[:, 0].T
    grid = torch.linspace(0.3, size / 4, 60, dtype=torch.float64)
    units = torch.eye(side**2, dtype=torch.float64).view(-1, 1, side, side)
    images = law.images(law.variances * law.coordinates(units)).flatten(1)
    logs = []
    for std in grid:
        matrix = GaussianBlur(float(std), size)(units).flatten(1)
        dense = matrix.T @ images @ matrix + noise**2 * torch.eye(side**2, dtype=torch.float64)
        density = torch.distributions.MultivariateNormal(torch.zeros(side**2).double(), dense)
        logs.append(density.log_prob(y.flatten(1)))
    weights = torch.stack(logs, 1).softmax(1)
    exact = weights @ grid
    spread = (weights * (grid - exact[:, None]).square()).sum(1).sqrt()
    assert ((found - exact).abs() < spread).all()
    assert ((sure / spread > 0.5) & (sure / spread < 2)).all()


def test_warnings_name_the_line_that_called():
    y = MotionBlur(9, 0.5).measure(face(), 0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solve(y, operator=BlindBlur(9), prior=FACES, nfe=8)  # 0.05 by default
    assert "the noise of y seems to be" in str(caught[0].message)
    assert {item.filename for item in caught} == {__file__}


def test_a_saved_result_has_the_numbers_of_its_kernel(tmp_path):
    y = GaussianBlur(1.0, 9).measure(face(), 0.02)
    blur = BlindBlur(9, prior="gaussian")
    result = solve(y, operator=blur, prior=FACES, nfe=2, sigma_y=0.02)
    result.save(tmp_path)
    figures = json.loads((tmp_path / "result.json").read_text())
    assert figures["kernel_numbers"] == result.kernel_numbers.tolist()


def test_draws_share_a_kernel():
    y = GaussianBlur(1.5, 9).measure(face(), 0.02, generator=torch.Generator().manual_seed(1))
    result = solve(y, operator=BlindBlur(9), prior=FACES, nfe=4, num_samples=3, sigma_y=0.02)
    assert result.kernel.shape == (1, 1, 9, 9)
    assert result.samples.shape[0] == 3
    assert result.nfe == 4


def test_any_prior_with_statistics_of_frequencies_does():
    law = covariance(16, 16, channels=1)
    spectrum = torch.cat((law.spectrum, law.spectrum[..., 1:-1].flip(2)), 2)
    prior = GaussianPrior.stationary(torch.zeros(1, 16, 16), spectrum.float())
    y = normal(1, 1, 16, 16).float()
    result = solve(y, operator=BlindBlur(5), prior=prior, nfe=4, estimate="sample")
    assert result.kernel.shape == (1, 1, 5, 5)


def test_kernels_of_large_photographs_are_looked_for_in_their_middle(monkeypatch):
    monkeypatch.setattr(blind, "SIDE", 48)
    x = read_image(files("ncvsd_inverse") / "assets" / "photographs" / "coffee.png")[..., :64, :80]
    y = GaussianBlur(1.5, 9, "replicate").measure(x, 0.02)
    operator, seen = BlindBlur(9, "replicate"), []
    result = solve(
        y,
        operator=operator,
        prior="ncvsd_natural",
        nfe=2,
        sigma_y=0.02,
        callback=lambda progress: seen.append(progress.x0.shape[2:]),
    )
    assert seen == [(48, 48), (64, 80)]
    assert result.x0.shape == x.shape


def test_kernels_are_centred_without_losing_weight():
    kernel = torch.zeros(7, 7, dtype=torch.float64)
    kernel[0, 1], kernel[1, 2] = 0.75, 0.25
    moved, spread = centred(kernel, 2 * kernel)
    assert moved[3, 3] == 0.75
    assert moved[4, 4] == 0.25
    assert torch.equal(spread, 2 * moved)
    kernel[6, 6] = 1e-3
    assert centred(kernel, kernel)[0].sum() == kernel.sum()


def test_dust_goes():
    kernel = GaussianBlur(1.0, 15).kernel[0, 0].clone()
    kernel[1, 1] = 1e-3
    cleaned = without_dust(kernel)
    assert cleaned[1, 1] == 0
    assert cleaned[7, 7] > 0
    assert math.isclose(float(cleaned.sum()), 1)


def test_a_kernel_that_does_not_fit_is_told():
    kernel = torch.zeros(5, 5, dtype=torch.float64)
    kernel[0, 2] = 1
    assert "larger kernel_size" in describe_kernel(FoundKernel(kernel, kernel, 0.01))
    assert describe_kernel(FoundKernel(kernel.roll(2, 0), kernel, 0.01)) == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"kernel_size": 1}, "kernel_size must be"),
        ({"kernel_size": 5, "boundary": "zero"}, "boundary must be"),
        ({"kernel_size": 5, "prior": "sparse"}, "prior must be"),
    ],
)
def test_arguments_are_checked(given, words):
    with pytest.raises(ValueError, match=words):
        BlindBlur(**given)


def test_what_does_not_go_together_is_told():
    y, operator = face(), BlindBlur(9)
    with pytest.raises(ValueError, match="nfe must be at least 2 for a BlindBlur"):
        solve(y, operator=operator, prior=FACES, nfe=1)
    with pytest.raises(ValueError, match="schedule None"):
        solve(y, operator=operator, prior=FACES, nfe=2, schedule=[1.0, 0.1])
    with pytest.raises(ValueError, match="got a BlindBlur with method 'gibbs'"):
        solve(y, operator=operator, prior=FACES, nfe=2, method="gibbs")
    with pytest.raises(ValueError, match="kernel must be at most as large"):
        solve(y, operator=BlindBlur(65), prior=FACES, nfe=2)


def test_it_prints_as_it_was_made():
    operator = BlindBlur(31, "replicate")
    assert repr(operator) == "BlindBlur(31, boundary='replicate', prior='smooth')"
    assert operator.input_shape((2, 3, 64, 48)) == (2, 3, 64, 48)
    assert BlindBlur(5, "valid").input_shape((1, 3, 60, 60)) == (1, 3, 64, 64)
    assert np.isfinite([ends for f in FAMILIES.values() for ends in f.ranges(31)]).all()
