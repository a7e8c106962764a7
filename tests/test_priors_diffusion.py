"""The diffusion prior: its levels, its count of calls, and its law against exact posteriors."""

import math

import pytest
import torch
from torch import nn

from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.priors import DiffusionPrior, GaussianMixturePrior, GaussianPrior

SHAPE = (1, 2, 2)
VARIANCES = torch.tensor([0.01, 0.1, 0.25, 1.0], dtype=torch.float64)


def gaussian():
    return GaussianPrior(torch.full(SHAPE, 0.1, dtype=torch.float64), VARIANCES.diag())


class Recorder(nn.Module):
    """A denoiser that remembers the levels it is called with."""

    image_channels, size_multiple, num_classes = 1, 2, 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.levels = []
        self.labels = []

    def forward(self, x, sigma, labels=None):
        self.levels.append(sigma)
        self.labels.append(labels)
        return self.scale * x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


def posterior(u, sigma):
    gain = VARIANCES / (VARIANCES + sigma**2)
    return 0.1 + gain * (u.flatten() - 0.1), gain * sigma**2


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0])
def test_law_tends_to_the_exact_posterior(sigma):
    u = torch.full((1, *SHAPE), 0.6, dtype=torch.float64)
    mean, variance = posterior(u, sigma)
    num, ratios = 8_000, {}
    for num_steps in (20, 100):
        prior = DiffusionPrior(gaussian().denoise, num_steps=num_steps)
        draws = prior.sample(
            u.expand(num, *SHAPE), sigma, generator=torch.Generator().manual_seed(1)
        ).flatten(1)
        assert ((draws.mean(0) - mean).abs() < 4 * (variance / num).sqrt()).all()
        ratios[num_steps] = draws.var(0) / variance
    # Lost variance is about 6 / num_steps for Gaussian data; four standard errors are 0.063.
    assert ((ratios[20] - 0.72).abs() < 0.06 + 0.063).all(), ratios[20]
    assert ((ratios[100] - 0.94).abs() < 0.02 + 0.063).all(), ratios[100]


def test_draws_spread_over_the_modes_of_a_mixture():
    """A draw given a vague u is in either mode with its posterior probability."""
    exact = GaussianMixturePrior(
        torch.tensor([0.3, 0.7]),
        torch.tensor([-0.5, 0.5]).view(2, 1, 1, 1),
        torch.full((2, 1, 1), 0.01),
    )
    u, num = torch.full((1, 1, 1, 1), 0.2), 4_000
    prior = DiffusionPrior(exact.denoise, num_steps=50)
    draws = prior.sample(u.expand(num, 1, 1, 1), 0.6, generator=torch.Generator())
    weights = torch.tensor([0.3, 0.7]) * torch.exp(
        -0.5 * torch.tensor([0.7, -0.3]) ** 2 / (0.6**2 + 0.01)
    )
    expected = float(weights[1] / weights.sum())
    # Four standard errors plus a bias of the finite number of steps.
    assert abs(float((draws > 0).float().mean()) - expected) < 4 * 0.5 / num**0.5 + 0.01


def test_known_image_is_returned_exactly():
    x0 = torch.rand(1, *SHAPE)
    prior = DiffusionPrior(lambda x, sigma: x0.expand_as(x), num_steps=5)
    assert torch.equal(prior.sample(x0 + 3.0, 3.0), x0)


@pytest.mark.parametrize("num_steps", [2, 3, 20])
@pytest.mark.parametrize("sigma", [0.002, 0.01, 1.0, 80.0])
def test_levels_fall_from_sigma_to_the_end(num_steps, sigma):
    network = Recorder()
    prior = DiffusionPrior(network, num_steps=num_steps)
    sigmas = torch.tensor([sigma, 1.5])
    prior.sample(torch.zeros(2, *SHAPE), sigmas)
    levels = torch.stack(network.levels)
    assert levels.shape == (num_steps, 2)
    assert prior.nfe_per_sample == num_steps
    torch.testing.assert_close(levels[0], sigmas)
    assert (levels[:-1] > levels[1:]).all()
    last = torch.tensor([min(0.002, sigma / 10), 0.002])
    torch.testing.assert_close(levels[-1], last, rtol=1e-4, atol=0)


def test_karras_spacing_of_the_levels():
    network = Recorder()
    DiffusionPrior(network, num_steps=3, sigma_min=0.01, exponent=2.0).sample(
        torch.zeros(1, *SHAPE), 4.0
    )
    middle = ((2 + 0.1) / 2) ** 2
    torch.testing.assert_close(torch.cat(network.levels), torch.tensor([4.0, middle, 0.01]))


def test_a_module_is_the_network_and_a_function_is_wrapped():
    network = Recorder()
    assert DiffusionPrior(network).network is network
    prior = DiffusionPrior(gaussian().denoise, num_steps=7)
    calls = []
    prior.network.register_forward_hook(lambda *_: calls.append(1))
    prior.sample(torch.zeros(3, *SHAPE), 1.0)
    assert len(calls) == 7


def test_denoise_is_the_denoiser_and_lets_gradients_pass():
    u = torch.full((2, *SHAPE), 0.6, requires_grad=True)
    mean = DiffusionPrior(gaussian().denoise).denoise(u, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(mean, gaussian().denoise(u, torch.tensor([0.5, 2.0])))
    mean.sum().backward()
    assert (u.grad > 0).all()
    assert not DiffusionPrior(Recorder()).sample(u, 1.0).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_follows_the_dtype_of_u(dtype):
    prior = DiffusionPrior(gaussian().denoise, num_steps=3)
    u = torch.zeros(1, *SHAPE, dtype=dtype)
    assert prior.sample(u, 1.0).dtype == prior.denoise(u, 1.0).dtype == dtype


def test_draws_do_not_depend_on_the_batch():
    prior, u = DiffusionPrior(gaussian().denoise, num_steps=4), torch.rand(3, *SHAPE)
    keys = [(5, i) for i in range(3)]
    together = prior.sample(u, 0.5, generator=make_generators(keys))
    alone = prior.sample(u[2:], 0.5, generator=make_generators(keys[2:]))
    torch.testing.assert_close(together[2:], alone)


def test_generate_draws_from_the_prior():
    prior = DiffusionPrior(gaussian().denoise, num_steps=40, image_shape=SHAPE)
    images = prior.generate(2_000, seed=3, batch_size=500).double()
    assert images.shape == (2_000, *SHAPE)
    error = 4 * (VARIANCES / 2_000).sqrt()
    assert ((images.flatten(1).mean(0) - 0.1).abs() < error).all()
    # About 10 / 40 of the variance is lost from 80 down; four standard errors are 0.13.
    ratio = images.flatten(1).var(0) / VARIANCES
    assert ((ratio > 0.6) & (ratio < 1.1)).all(), ratio
    few = prior.generate(3, seed=3, batch_size=2).double()
    torch.testing.assert_close(few, images[:3], rtol=1e-4, atol=1e-4)
    assert not torch.equal(prior.generate(3, seed=4).double(), few)


def test_generate_needs_a_shape():
    assert DiffusionPrior(Recorder()).generate(2, size=(4, 6)).shape == (2, 1, 4, 6)
    with pytest.raises(ValueError, match="size must be given"):
        DiffusionPrior(Recorder()).generate(2)
    with pytest.raises(ValueError, match="image_shape must be given"):
        DiffusionPrior(gaussian().denoise).generate(2, size=(4, 6))
    with pytest.raises(ValueError, match="size must have sides that are multiples of 2"):
        DiffusionPrior(Recorder()).generate(2, size=(4, 5))
    with pytest.raises(ValueError, match=r"size must be \(H, W\), got \(4,\)"):
        DiffusionPrior(Recorder()).generate(2, size=(4,))
    with pytest.raises(ValueError, match=r"size must be \(2, 2\), got \(4, 4\)"):
        DiffusionPrior(Recorder(), image_shape=SHAPE).generate(2, size=(4, 4))


def test_classes():
    network = Recorder()
    prior = DiffusionPrior(network, num_steps=2)
    prior.conditioned_on(2).sample(torch.zeros(2, *SHAPE), 1.0)
    assert torch.equal(network.labels[-1], torch.tensor([[0.0, 0, 1], [0, 0, 1]]))
    prior.sample(torch.zeros(2, *SHAPE), 1.0)
    assert network.labels[-1] is None
    with pytest.raises(ValueError, match="number of classes, 0"):
        DiffusionPrior(gaussian().denoise).conditioned_on(0)


@pytest.mark.parametrize(
    ("u", "sigma", "message"),
    [
        (torch.zeros(1, 1, 2, 4), 1.0, r"u must hold images of shape \(1, 2, 2\)"),
        (torch.zeros(1, 2, 2), 1.0, "u must have shape"),
        (torch.zeros(1, *SHAPE), 81.0, r"sigma must be positive and at most 80.8, got 81"),
        (torch.zeros(1, *SHAPE), 0.0, "sigma must be positive"),
        (torch.zeros(1, *SHAPE), math.nan, "sigma must be positive"),
        (torch.zeros(1, *SHAPE, device="meta"), 1.0, "u must be on the prior's device, cpu"),
    ],
)
def test_bad_input_is_named(u, sigma, message):
    with pytest.raises(ValueError, match=message):
        DiffusionPrior(Recorder(), image_shape=SHAPE).sample(u, sigma)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 1}, "num_steps must be at least 2"),
        ({"sigma_min": 0.0}, "sigma_min must be positive"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min must be below sigma_max"),
        ({"exponent": 0.0}, "exponent must be positive"),
        ({"image_shape": (1, 3, 2)}, "image_shape must have sides that are multiples of 2"),
        ({"image_shape": (3, 2, 2)}, "image_shape must have 1 channels, got 3"),
        ({"image_shape": (2, 2)}, r"image_shape must be \(C, H, W\), got \(2, 2\)"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        DiffusionPrior(Recorder(), **change)


def test_denoisers_that_are_none():
    with pytest.raises(TypeError, match="denoiser must be callable"):
        DiffusionPrior(3)
    prior = DiffusionPrior(lambda x, sigma: torch.cat([x, x], dim=1))
    with pytest.raises(ValueError, match="the denoiser's output must have shape"):
        prior.sample(torch.zeros(1, *SHAPE), 1.0)
