"""The distilled prior around an exact generator: its law in one and several steps, its levels."""

import math

import pytest
import torch
from torch import nn

from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.priors import NCVSDPrior
from ncvsd_inverse.schedules import karras

SHAPE = (1, 2, 2)
NUM = 8_000
MEAN = torch.tensor([0.1, -0.2, 0.0, 0.3], dtype=torch.float64)
FACTOR = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3
COVARIANCE = FACTOR @ FACTOR.T


class ExactGenerator(nn.Module):
    """The conditional network of a perfectly distilled Gaussian.

    It recovers z from the raised noise, (x - u) / sqrt(sigma_hat^2 - sigma^2), and returns the
    posterior mean given u plus a square root of the posterior covariance times z.
    """

    image_channels, size_multiple, num_classes, resolution = 1, 2, 0, None

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.values, self.vectors = torch.linalg.eigh(COVARIANCE)
        self.calls = []

    def forward(self, x, sigma, condition, condition_sigma, labels=None):
        self.calls.append((sigma, condition_sigma, labels))
        level = condition_sigma.double().view(-1, 1)
        raised = sigma.double().view(-1, 1)
        u = condition.flatten(1).double()
        z = (x.flatten(1).double() - u) / (raised**2 - level**2).sqrt()
        gain = self.values / (self.values + level**2)
        out = (u - MEAN) @ self.vectors * gain + level * gain.sqrt() * (z @ self.vectors)
        return (MEAN + out @ self.vectors.T).reshape(x.shape).to(x.dtype)


class Recorder(nn.Module):
    """A network with classes and weights that remembers what it is told."""

    image_channels, size_multiple, num_classes, resolution = 3, 4, 5, None

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, x, sigma, condition, condition_sigma, labels=None):
        self.calls.append((x, sigma, condition, condition_sigma, labels))
        return self.weight * (x + condition) / 2


def exact_prior(image_shape=SHAPE):
    return NCVSDPrior(ExactGenerator(), image_shape=image_shape)


def closed_form(u, sigma):
    total = COVARIANCE + sigma**2 * torch.eye(4, dtype=torch.float64)
    gain = torch.linalg.solve(total, COVARIANCE).T
    return MEAN + gain @ (u - MEAN), COVARIANCE - gain @ COVARIANCE


def assert_moments(draws, mean, covariance):
    """Mean and covariance of Gaussian draws (N, D) within four standard errors."""
    num, variance = len(draws), covariance.diagonal()
    assert ((draws.mean(0) - mean).abs() <= 4 * (variance / num).sqrt()).all()
    error = ((torch.outer(variance, variance) + covariance**2) / num).sqrt()
    assert ((draws.T.cov() - covariance).abs() <= 4 * error).all()


U = torch.tensor([0.5, -0.4, 0.8, 0.0], dtype=torch.float64)


def draw_many(prior, sigma):
    u = U.reshape(1, *SHAPE).expand(NUM, *SHAPE)
    return prior.sample(u, sigma, generator=torch.Generator().manual_seed(2)).flatten(1)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 5.0])
def test_one_call_draws_from_the_posterior(sigma):
    assert_moments(draw_many(exact_prior(), sigma), *closed_form(U, sigma))


@pytest.mark.parametrize("levels", [(math.inf,), (80.0,), (math.inf, 1.0, 0.2), (80.0, 1.0, 0.2)])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 2.0])
def test_refining_keeps_the_law(levels, sigma):
    prior = exact_prior().refined(levels)
    assert prior.nfe_per_sample == len(levels)
    assert_moments(draw_many(prior, sigma), *closed_form(U, sigma))
    assert len(prior.network.calls) == len(levels)


@pytest.mark.parametrize("zeta", [0.0, 0.5])
def test_refining_with_kept_noise_keeps_the_law(zeta):
    prior = exact_prior().refined((math.inf, 1.0, 0.2), zeta=zeta)
    assert_moments(draw_many(prior, 0.3), *closed_form(U, 0.3))


def test_refining_tells_the_network_the_level_of_both_views():
    prior = exact_prior().refined((math.inf, 1.0, 0.2))
    prior.sample(torch.zeros(2, *SHAPE), torch.tensor([0.3, 4.0]))
    for (_, told, _), level in zip(prior.network.calls, prior.levels, strict=True):
        merged = [(sigma**-2 + level**-2) ** -0.5 for sigma in (0.3, 4.0)]
        torch.testing.assert_close(told, torch.tensor(merged))


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_generate_draws_from_the_prior(num_steps):
    images = exact_prior().generate(NUM, num_steps, seed=1, batch_size=2_000)
    assert images.shape == (NUM, *SHAPE)
    assert images.dtype == torch.float32
    assert_moments(images.flatten(1).double(), MEAN, COVARIANCE)


@pytest.mark.parametrize(
    ("num_steps", "indices"), [(1, (10,)), (2, (10, 22)), (4, (0, 10, 20, 30))]
)
def test_generate_uses_the_published_levels(num_steps, indices):
    prior = exact_prior()
    prior.generate(1, num_steps)
    table = karras(40, 80.0, 0.002)
    merged = [(80.0**-2 + table[i] ** -2) ** -0.5 for i in indices]
    told = torch.cat([condition_sigma for _, condition_sigma, _ in prior.network.calls])
    torch.testing.assert_close(told, torch.tensor(merged))


def test_generated_images_do_not_depend_on_number_or_batch():
    prior = exact_prior()
    five = prior.generate(5, num_steps=2, seed=3, batch_size=2)
    torch.testing.assert_close(prior.generate(3, num_steps=2, seed=3), five[:3])
    assert not torch.equal(prior.generate(5, num_steps=2, seed=4), five)
    assert len({float(image.sum()) for image in five}) == 5


def test_spread_scales_the_noise_between_levels():
    u = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    levels = torch.tensor([0.05, 0.2, 3.0])  # below, halfway in the logarithm, above
    sources = lambda: make_generators([(i,) for i in range(3)])  # noqa: E731
    plain = NCVSDPrior(ExactGenerator(), image_shape=SHAPE)
    scaled = plain.with_noise_scale([(0.1, 1.2), (0.4, 0.8)])
    silent = plain.with_noise_scale([(1.0, 1e-9)])
    mean = silent.sample(u, levels, generator=sources())
    drawn = plain.sample(u, levels, generator=sources()) - mean
    wider = scaled.sample(u, levels, generator=sources()) - mean
    factors = torch.tensor([1.2, 1.0, 0.8]).view(3, 1, 1, 1)
    assert torch.allclose(wider, factors * drawn, atol=1e-6)
    assert plain.noise_scale == ()


def test_tempering_scales_the_noise_and_a_prior_that_tempers_says_so():
    u = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    prior = NCVSDPrior(ExactGenerator(), image_shape=SHAPE, tempers=True)
    assert prior.has_mean
    assert not NCVSDPrior(ExactGenerator(), image_shape=SHAPE).has_mean
    mean, drawn = prior.denoise(u, 0.4), prior.sample(u, 0.4, generator=torch.Generator())
    tempered = prior.tempered(0.5).sample(u, 0.4, generator=torch.Generator())
    assert prior.tempered(0.5).noise_scale == ((1.0, 0.5),)
    assert prior.tempered(0.5).has_mean
    assert torch.allclose(tempered, mean + 0.5 * (drawn - mean), atol=1e-6)
    with pytest.raises(ValueError, match=r"temperature must be positive"):
        prior.tempered(0)


@pytest.mark.parametrize(
    "noise_scale", [[(0.1, -1.0)], [(0.4, 1.0), (0.1, 1.0)], [(0.1, math.inf)]]
)
def test_a_wrong_spread_is_refused(noise_scale):
    with pytest.raises(ValueError, match="noise_scale must be pairs of positive numbers"):
        NCVSDPrior(ExactGenerator(), image_shape=SHAPE, noise_scale=noise_scale)


def test_generate_needs_a_size_when_any_size_works():
    prior = NCVSDPrior(Recorder(), image_shape=None)
    assert prior.generate(2, num_steps=1, size=(4, 8)).shape == (2, 3, 4, 8)
    with pytest.raises(ValueError, match=r"size must be given .* fixes none"):
        prior.generate(2)
    assert prior.generate(2, num_steps=1, size=(4, 6)).shape == (2, 3, 4, 6)
    with pytest.raises(ValueError, match=r"size must be \(2, 2\), got \(4, 4\)"):
        exact_prior().generate(2, size=(4, 4))
    with pytest.raises(ValueError, match="num_steps must be 1, 2 or 4, got 3"):
        exact_prior().generate(2, num_steps=3)
    with pytest.raises(ValueError, match="num must be at least 1"):
        exact_prior().generate(0)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        exact_prior().generate(1, seed=-1)


def test_the_network_is_told_the_raised_level_and_sees_its_noise():
    network = Recorder()
    prior = NCVSDPrior(network, image_shape=None, gamma=0.5)
    u = torch.zeros(2, 3, 64, 64)
    prior.sample(u, torch.tensor([0.2, 4.0]), generator=torch.Generator())
    x, sigma, condition, condition_sigma, labels = network.calls[0]
    torch.testing.assert_close(sigma, torch.tensor([0.3, 6.0]))
    torch.testing.assert_close(condition_sigma, torch.tensor([0.2, 4.0]))
    assert torch.equal(condition, u)
    assert labels is None
    added = (sigma**2 - condition_sigma**2).sqrt()
    # 12288 normals: their std is within four standard errors, 2.6%.
    assert ((x.flatten(1).std(1) / added - 1).abs() < 0.026).all()


@pytest.mark.parametrize(("sigma", "told"), [(1e-4, 0.002), (0.002, 0.002), (80.5, 80.0)])
def test_levels_just_outside_the_trained_range_are_told_as_its_ends(sigma, told):
    network = Recorder()
    NCVSDPrior(network, image_shape=None).sample(torch.zeros(1, 3, 4, 4), sigma)
    assert float(network.calls[0][3]) == pytest.approx(told)
    assert float(network.calls[0][1]) == pytest.approx(1.414 * told)


def test_classes():
    network = Recorder()
    prior = NCVSDPrior(network, image_shape=(3, 4, 4))
    bound = prior.conditioned_on(2)
    bound.sample(torch.zeros(2, 3, 4, 4), 1.0)
    bound.refined((math.inf, 0.5)).sample(torch.zeros(2, 3, 4, 4), 1.0)
    bound.generate(2, num_steps=1)
    for *_, labels in network.calls:
        assert torch.equal(labels, torch.tensor([[0.0, 0, 1, 0, 0]]).expand(2, 5))
    prior.sample(torch.zeros(2, 3, 4, 4), 1.0)
    assert network.calls[-1][-1] is None
    for label in (5, 99):
        with pytest.raises(ValueError, match="number of classes, 5, got"):
            prior.conditioned_on(label)
    with pytest.raises(ValueError, match="number of classes, 0"):
        exact_prior().conditioned_on(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_follows_the_dtype_of_u(dtype):
    u = torch.zeros(2, *SHAPE, dtype=dtype)
    for prior in (exact_prior(), exact_prior().refined((math.inf, 0.5))):
        draw = prior.sample(u, 0.5)
        assert draw.dtype == dtype
        assert draw.shape == u.shape


def test_draws_do_not_depend_on_the_batch_and_need_no_gradient():
    u, keys = torch.rand(3, *SHAPE, requires_grad=True), [(5, i) for i in range(3)]
    for prior in (exact_prior(), exact_prior().refined((math.inf, 0.5))):
        together = prior.sample(u, 0.5, generator=make_generators(keys))
        alone = prior.sample(u[1:2], 0.5, generator=make_generators(keys[1:2]))
        torch.testing.assert_close(together[1:2], alone)
        assert not together.requires_grad


def test_moving_keeps_the_prior_and_its_network():
    prior = exact_prior()
    assert prior.to("cpu") is prior
    assert prior.device == torch.device("cpu")
    refined = prior.refined((math.inf,))
    assert refined.to("cpu") is refined
    assert refined.network is prior.network
    assert (refined.image_shape, refined.sigma_min, refined.sigma_max) == (SHAPE, 0.002, 80.0)


@pytest.mark.parametrize(
    ("u", "sigma", "error", "message"),
    [
        (torch.zeros(1, 1, 2, 4), 1.0, ValueError, r"u must hold images of shape \(1, 2, 2\)"),
        (torch.zeros(1, 3, 2, 2), 1.0, ValueError, "u must hold images of shape"),
        (torch.zeros(*SHAPE), 1.0, ValueError, "u must have shape"),
        (torch.zeros(1, *SHAPE).long(), 1.0, TypeError, "u must be a floating-point"),
        (torch.zeros(1, *SHAPE), 0.0, ValueError, "sigma must be positive and at most 80.8"),
        (torch.zeros(1, *SHAPE), -1.0, ValueError, "sigma must be positive"),
        (torch.zeros(1, *SHAPE), 81.0, ValueError, "sigma must be .* at most 80.8, got 81"),
        (torch.zeros(1, *SHAPE), math.nan, ValueError, "sigma must be positive"),
        (torch.zeros(1, *SHAPE), "loud", TypeError, "sigma must be a number"),
        (torch.zeros(2, *SHAPE), torch.ones(3), ValueError, "sigma must be a float or have shape"),
        (torch.zeros(2, *SHAPE), torch.tensor([1.0, -1.0]), ValueError, "got -1.0 to 1.0"),
        (torch.zeros(1, *SHAPE, device="meta"), 1.0, ValueError, "u must be on the prior's device"),
    ],
)
def test_bad_input_is_named(u, sigma, error, message):
    for prior in (exact_prior(), exact_prior().refined((math.inf, 0.5))):
        with pytest.raises(error, match=message):
            prior.sample(u, sigma)
        assert not prior.network.calls


@pytest.mark.parametrize("size", [(8, 12), (8, 10), (5, 5), (1, 1), (2, 9)])
def test_images_of_any_size_are_mirrored_to_fit_the_network(size, generator):
    prior = NCVSDPrior(Recorder(), image_shape=None, gamma=0.0)
    u = torch.randn(1, 3, *size, generator=generator)
    assert torch.equal(prior.sample(u, 1.0), u)
    (seen, _, condition, *_) = prior.network.calls[-1]
    assert [side % 4 for side in seen.shape[2:]] == [0, 0]
    assert torch.equal(seen[..., : size[0], : size[1]], u)
    if size[0] == 5:
        assert torch.equal(condition[..., 5:8, :5], u[..., [3, 2, 1], :])


def test_images_must_have_the_channels_of_the_network():
    prior = NCVSDPrior(Recorder(), image_shape=None)
    with pytest.raises(ValueError, match="u must have 3 channels, got 1"):
        prior.sample(torch.zeros(1, 1, 8, 8), 1.0)


@pytest.mark.parametrize(
    "levels",
    [(), (1.0, 1.0), (0.2, 1.0), (1.0, 0.0), (1.0, -1.0), (math.nan,), (math.inf, math.inf)],
)
def test_bad_levels_are_refused(levels):
    with pytest.raises(ValueError, match="levels must be positive and decreasing"):
        exact_prior().refined(levels)


@pytest.mark.parametrize("zeta", [-0.1, 1.1, math.nan])
def test_bad_zeta_is_refused(zeta):
    with pytest.raises(ValueError, match=r"zeta must be in \[0, 1\]"):
        exact_prior().refined((1.0,), zeta=zeta)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": -0.1}, "gamma must be non-negative"),
        ({"sigma_min": 0.0}, "sigma_min must be positive"),
        ({"sigma_max": math.inf}, "sigma_max must be positive and finite"),
        ({"sigma_min": 90.0}, "sigma_min must be below sigma_max"),
        ({"image_shape": (1, 3, 2)}, "image_shape must have sides that are multiples of 2"),
        ({"image_shape": (3, 2, 2)}, "image_shape must have 1 channels, got 3"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        NCVSDPrior(ExactGenerator(), **{"image_shape": SHAPE, **change})
