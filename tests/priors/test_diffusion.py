"""The diffusion prior: its levels, its count of calls, and its law against exact posteriors.

And what makes a prior of the denoisers of others.
"""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

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


def one_call(**changes):
    exact = gaussian()
    options = {"image_shape": SHAPE, "statistics": exact.statistics, **changes}
    return DiffusionPrior(exact.denoise, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_draw_of_one_call_is_the_mean_and_noise_of_the_covariance(temperature):
    """For a Gaussian it is an exact draw."""
    prior, u, sigma = one_call(), torch.tensor([[[[0.3, -0.2], [0.5, 1.0]]]]).double(), 0.4
    assert prior.nfe_per_sample == 1
    draws = prior.tempered(temperature).sample(
        u.expand(20_000, -1, -1, -1), sigma, generator=torch.Generator().manual_seed(0)
    )
    mean, variance = posterior(u, sigma)
    rows = draws.flatten(1)
    # Four standard errors.
    assert ((rows.mean(0) - mean).abs() < 4 * temperature * (variance / 20_000).sqrt()).all()
    assert_close(rows.var(0), temperature**2 * variance, rtol=0.04, atol=0)
    assert_close(prior.denoise(u, sigma).flatten(), mean)


def test_levels_of_one_call_may_differ_between_images():
    prior, u = one_call(), torch.rand(2, *SHAPE).double()
    sources = [torch.Generator().manual_seed(i) for i in range(2)]
    both = prior.sample(u, torch.tensor([0.1, 2.0]), generator=sources)
    second = prior.sample(u[1:], 2.0, generator=torch.Generator().manual_seed(1))
    assert_close(both[1:], second)
    same = [torch.Generator().manual_seed(i) for i in range(2)]
    assert not torch.equal(prior.sample(u, torch.tensor([2.0, 2.0]), generator=same)[0], both[0])


def test_one_call_needs_statistics_and_more_steps_do_not():
    prior = one_call(statistics=None)
    with pytest.raises(ValueError, match="statistics must be there for draws of one"):
        prior.sample(torch.zeros(1, *SHAPE), 1.0)
    steps = prior.with_steps(5)
    assert (steps.nfe_per_sample, prior.nfe_per_sample) == (5, 1)
    assert steps.sample(torch.zeros(1, *SHAPE), 1.0).shape == (1, *SHAPE)
    assert prior.generate(2).shape == (2, *SHAPE)
    with pytest.raises(ValueError, match="temperature must be 1 for draws of 5 steps"):
        steps.tempered(0.5)


SHIFT = 0.2


def noise_of(alphas, prediction):
    """Return the exact network of white images of variance 1/4 and mean SHIFT, by times."""

    def predict(x_t, time):
        alpha = alphas[time.round().long()].view(-1, 1, 1, 1)
        x0 = SHIFT + 0.25 * alpha.sqrt() / (0.25 * alpha + 1 - alpha) * (x_t - alpha.sqrt() * SHIFT)
        eps = (x_t - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        v = alpha.sqrt() * eps - (1 - alpha).sqrt() * x0
        made = {"epsilon": eps, "sample": x0, "v_prediction": v}[prediction]
        return torch.cat([made, torch.full_like(made, 9.0)], 1)  # a learned variance

    return predict


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_network_that_predicts_noise_becomes_its_denoiser(prediction):
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    prior = DiffusionPrior.from_eps(
        noise_of(alphas, prediction), alphas, prediction=prediction, image_shape=SHAPE
    )
    for place in (0, 300, 999):
        sigma = float(((1 - alphas[place]) / alphas[place]).sqrt())
        u = torch.linspace(-2, 2, 8).view(2, *SHAPE)
        expected = SHIFT + 0.25 / (0.25 + sigma**2) * (u - SHIFT)
        assert_close(prior.denoise(u, sigma), expected, rtol=1e-3, atol=2e-4)
    assert prior.sigma_min == pytest.approx(0.01, rel=1e-3)
    assert prior.sigma_max == pytest.approx(157.4, rel=1e-3)


def test_a_schedule_that_is_none_is_refused():
    for alphas in ([0.5], [0.2, 0.5], [[0.5, 0.2]], [1.0, 0.5], [0.5, 0.0]):
        with pytest.raises(ValueError, match="alphas_cumprod must"):
            DiffusionPrior.from_eps(lambda x, t: x, alphas)
    with pytest.raises(ValueError, match="prediction must be one of"):
        DiffusionPrior.from_eps(lambda x, t: x, [0.9, 0.5], prediction="noise")


def test_a_network_of_diffusers_becomes_a_prior():
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    prior = DiffusionPrior.from_diffusers(unet, scheduler)
    assert prior.image_shape == (1, 8, 8)
    place = 400
    alpha = scheduler.alphas_cumprod[place]
    sigma = float(((1 - alpha) / alpha).sqrt())
    u = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        eps = unet(alpha.sqrt() * u, place).sample
        assert_close(prior.denoise(u, sigma), u - sigma * eps, rtol=1e-3, atol=1e-3)
    with pytest.raises(TypeError, match="scheduler must have alphas_cumprod"):
        DiffusionPrior.from_diffusers(unet, object())
    with pytest.raises(TypeError, match="unet must be a UNet2DModel of diffusers, got Recorder"):
        DiffusionPrior.from_diffusers(Recorder(), scheduler)


def test_a_deepinv_denoiser_has_its_images_and_stds_scaled():
    class Half(nn.Module):
        def forward(self, x, sigma):
            return 0.5 * x + 0.25 * sigma.view(-1, 1, 1, 1)

    prior = DiffusionPrior.from_deepinv(Half(), sigma_max=80.0)
    u = torch.rand(2, *SHAPE) * 2 - 1
    expected = 2 * (0.5 * (u + 1) / 2 + 0.25 * 0.3 / 2) - 1
    assert_close(prior.denoise(u, 0.3), expected)
    assert DiffusionPrior.from_deepinv(Half()).sigma_max == pytest.approx(100 / 255)
    with pytest.raises(TypeError, match="denoiser must be callable"):
        DiffusionPrior.from_deepinv(3)


class Answer:
    sample = 3


def test_what_a_denoiser_returns_is_named():
    prior = DiffusionPrior.from_function(lambda x, sigma: Answer())
    with pytest.raises(TypeError, match=r"tensor, got Answer.*from_diffusers"):
        prior.denoise(torch.zeros(1, *SHAPE), 1.0)
    prior = DiffusionPrior.from_eps(lambda x, t: Answer(), [0.9, 0.5])
    with pytest.raises(TypeError, match=r"tensor, got Answer.*from_diffusers"):
        prior.denoise(torch.zeros(1, *SHAPE), 1.0)


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
    assert not DiffusionPrior(Recorder(), num_steps=2).sample(u, 1.0).requires_grad


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
    prior = DiffusionPrior(gaussian().denoise, image_shape=SHAPE)
    images = prior.generate(2_000, seed=3, batch_size=500).double()
    assert images.shape == (2_000, *SHAPE)
    error = 4 * (VARIANCES / 2_000).sqrt()
    assert ((images.flatten(1).mean(0) - 0.1).abs() < error).all()
    # The flow keeps the variance to 8%; four standard errors are 0.13.
    ratio = images.flatten(1).var(0) / VARIANCES
    assert ((ratio > 0.85) & (ratio < 1.21)).all(), ratio
    few = prior.generate(3, 35, 3, batch_size=2).double()
    torch.testing.assert_close(few, images[:3], rtol=1e-4, atol=1e-4)
    assert not torch.equal(prior.generate(3, seed=4).double(), few)


def test_generate_needs_a_shape():
    assert DiffusionPrior(Recorder()).generate(2, size=(4, 6)).shape == (2, 1, 4, 6)
    with pytest.raises(ValueError, match="size must be given"):
        DiffusionPrior(Recorder()).generate(2)
    with pytest.raises(ValueError, match="image_shape must be given"):
        DiffusionPrior(gaussian().denoise).generate(2, size=(4, 6))
    assert DiffusionPrior(Recorder()).generate(2, size=(4, 5)).shape == (2, 1, 4, 5)
    with pytest.raises(
        ValueError, match=r"size must be one integer or \(height, width\), got \(4,\)"
    ):
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
        ({"num_steps": 0}, "num_steps must be at least 1"),
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
