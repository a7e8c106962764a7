"""Priors of colour images as priors of grey ones."""

import math

import pytest
import torch

from ncvsd_inverse import load_prior, metrics, solve
from ncvsd_inverse.operators import Denoise, Inpaint
from ncvsd_inverse.priors import DiffusionPrior
from ncvsd_inverse.priors.grey import GreyPrior
from ncvsd_inverse.priors.selfcheck import photograph

STD = 0.5


def white(x, sigma):
    """E[x0 | x] for channels of one mean, with differences between them of std 1 each."""
    total = 3 * STD**2  # variance of the mean of the channels, times 3
    mean = x.mean(1, keepdim=True)
    level = sigma.view(-1, 1, 1, 1)
    return mean * total / (total + level**2) + (x - mean) / (1 + level**2)


def test_a_grey_image_has_the_mean_that_the_channels_would(generator):
    prior = GreyPrior(DiffusionPrior(white))
    x = torch.randn(2, 1, 8, 8, generator=generator)
    sigma = 0.4
    expected = x * STD**2 / (STD**2 + sigma**2)
    assert torch.allclose(prior.denoise(x, sigma), expected, atol=1e-5)
    assert torch.allclose(prior.denoise(x, torch.full((2,), sigma)), expected, atol=1e-5)


def test_the_network_sees_white_noise_of_the_right_std(generator):
    seen = []

    def record(x, sigma):
        seen.append((x, sigma))
        return x

    GreyPrior(DiffusionPrior(record)).denoise(torch.randn(1, 1, 64, 64, generator=generator), 1.0)
    (noise, sigma), *_ = seen
    assert float(sigma) == pytest.approx(math.sqrt(3))
    covariance = torch.cov(noise[0].flatten(1))
    assert torch.allclose(covariance, 3 * torch.eye(3), atol=0.25)


def test_statistics_are_those_of_the_mean_of_the_channels(generator):
    colours = load_prior("ncvsd_natural")
    grey = GreyPrior(colours)
    like = torch.zeros(1, 1, 16, 16)
    covariance = grey.statistics.covariance(0.3, like)
    of_colours = colours.statistics.covariance(math.sqrt(3) * 0.3, like.expand(-1, 3, -1, -1))
    noise = torch.randn(400, 3, 16, 16, generator=generator)
    drawn = of_colours.colour(noise).mean(1, keepdim=True)
    spread = covariance.colour(torch.randn(400, 1, 16, 16, generator=generator))
    assert float(spread.var()) == pytest.approx(float(drawn.var()), rel=0.02)


@pytest.mark.parametrize("name", ["ncvsd_natural", "ncvsd_natural_teacher"])
def test_grey_pictures_are_restored_by_a_prior_of_colours(name):
    x = photograph(3, 64, 8).mean(1, keepdim=True)
    for operator, sigma_y in ((Denoise(), 0.2), (Inpaint.random((64, 64), 0.3), 0.02)):
        y = operator.measure(x, sigma_y, generator=torch.Generator().manual_seed(0))
        result = solve(y, operator=operator, prior=name, nfe=4, sigma_y=sigma_y)
        assert result.x0.shape == x.shape
        assert result.nfe == 4
        before = metrics.psnr(operator.adjoint(y), x)
        assert float(metrics.psnr(result.x0, x)) > float(before) + 5


def test_colours_are_refused():
    prior = GreyPrior(DiffusionPrior(white))
    with pytest.raises(ValueError, match="u must have 1 channels, got 3"):
        prior.sample(torch.zeros(1, 3, 8, 8), 1.0)
