from pathlib import Path

import pytest
import torch
from torch import nn

import ncvsd_inverse
from ncvsd_inverse import solve
from ncvsd_inverse.images import centre_crop, read_image
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior, PriorHandle
from ncvsd_inverse.priors.tiled import TiledNetwork, tiled
from ncvsd_inverse.tasks import make_task


class Local(nn.Module):
    """A network that sees 2 pixels far, every argument alike, and remembers what it was given."""

    image_channels = 2
    size_multiple = 4
    num_classes = 3

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(4, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 2, 3, padding=1)
        ).double()
        self.seen = []

    def forward(self, x, sigma, condition, condition_sigma, labels=None):
        self.seen.append(tuple(x.shape))
        level = (sigma + 2 * condition_sigma).reshape(-1, 1, 1, 1)
        return self.layers(torch.cat([x * level, condition], 1))


def arguments(*size, batch=2):
    generator = torch.Generator().manual_seed(1)
    x, condition = torch.randn(2, batch, 2, *size, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0.5, 2.0])[:batch], condition, torch.tensor([1.0, 0.3])[:batch]


@pytest.mark.parametrize("size", [(32, 32), (52, 36), (36, 16), (12, 68), (96, 40)])
def test_tiles_equal_the_whole_where_the_network_sees_less_far_than_their_margins(size):
    network = Local()
    given = arguments(*size)
    whole = network(*given)
    network.seen.clear()
    cut = TiledNetwork(network, 32, 8)(*given)
    assert (cut - whole).abs().max() < 1e-6  # weights are float32
    assert max(max(shape[2:]) for shape in network.seen) <= 32
    assert len(network.seen) == (-(-max(size[0] - 8, 1) // 24)) * (-(-max(size[1] - 8, 1) // 24))


def test_edges_of_tiles_are_felt_where_the_margin_is_too_narrow():
    network = Local()
    given = arguments(96, 40)
    differs = (TiledNetwork(network, 8, 4)(*given) - network(*given)).abs() > 1e-6
    assert differs.any()


def test_weights_add_to_one_and_leave_a_margin():
    for side in (32, 36, 40, 56, 60, 100):
        places = TiledNetwork(Local(), 32, 16)._places(side)
        total = torch.zeros(side)
        for i, (span, weight) in enumerate(places):
            assert span.stop - span.start == 32
            assert span.start % 4 == 0
            total[span] += weight
            if i > 0:
                assert not weight[:4].any()
            if i + 1 < len(places):
                assert not weight[-4:].any()
        assert torch.allclose(total, torch.ones(side))


def prior_of(network, **settings):
    return NCVSDPrior(network, image_shape=None, **settings)


@pytest.mark.parametrize(
    "make",
    [prior_of, lambda network: prior_of(network).refined([10.0, 0.5])],
    ids=["one step", "two steps"],
)
def test_draws_are_those_of_the_whole_image(make):
    u = arguments(52, 36)[0]
    network = Local()
    whole = make(network).sample(u, 0.7, generator=make_generators([(0,), (1,)]))
    twin = tiled(prior_of(network), 32, 8)
    cut = twin if make is prior_of else twin.refined([10.0, 0.5])
    network.seen.clear()
    drawn = cut.sample(u, 0.7, generator=make_generators([(0,), (1,)]))
    assert (drawn - whole).abs().max() < 1e-5
    assert all(shape[2:] == (32, 32) for shape in network.seen)


def test_solve_counts_a_pass_over_all_tiles_as_one_call():
    prior = tiled(prior_of(Local()), 16, 8)
    task = make_task("inpaint_random", (24, 32))
    y = task.operator.measure(arguments(24, 32)[0], 0.05, generator=make_generators([(0,), (1,)]))
    assert solve(y, operator=task.operator, prior=prior, nfe=3, method="gibbs").nfe == 3


def test_the_prior_is_otherwise_the_same():
    statistics = object()
    prior = prior_of(Local(), statistics=statistics, sigma_max=7.0)
    twin = tiled(prior, 32)
    assert (twin.statistics, twin.sigma_max, twin.network.network) == (
        statistics,
        7.0,
        prior.network,
    )
    assert twin.network.overlap == 8
    assert not isinstance(prior.network, TiledNetwork)
    assert twin.conditioned_on(2).label == 2
    assert twin.tempered(0.5).network is twin.network


def test_a_denoiser_is_tiled_too():
    prior = DiffusionPrior(lambda x, sigma: x.cumsum(-1), image_shape=None, num_steps=2)
    x = torch.ones(1, 3, 8, 64)
    assert prior.denoise(x, 1.0).max() == 64
    assert tiled(prior, 32, 8).denoise(x, 1.0).max() == 32


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (30, 8, "tile must be a multiple of 4, got 30"),
        (32, 6, "overlap must be a multiple of 4, got 6"),
        (32, 20, "overlap must be at most tile / 2 = 16, got 20"),
        (0, 8, "tile must be at least 1"),
        (32, 0, "overlap must be at least 1"),
    ],
)
def test_lengths_must_fit_the_network(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        tiled(prior_of(Local()), tile, overlap)


def test_other_priors_are_refused():
    with pytest.raises(TypeError, match="prior must be an NCVSDPrior or a DiffusionPrior, got int"):
        tiled(3)
    with pytest.raises(ValueError, match="must take images of any size, got one of"):
        tiled(NCVSDPrior(Local(), image_shape=(2, 8, 8)))


def test_the_shipped_prior_restores_tiled_and_whole_alike():
    """At 512x512 `experiments/large/tiles.py` finds less than 0.01 dB."""
    prior = PriorHandle("ncvsd_natural")
    photograph = Path(ncvsd_inverse.__file__).parent / "assets" / "photographs" / "cat.png"
    truth = centre_crop(read_image(photograph), (64, 128))
    task = make_task("sr4x", (64, 128))
    y = task.operator.measure(truth, task.sigma_y, generator=make_generators([(0,)]))

    def quality(prior):
        return float(psnr(solve(y, operator=task.operator, prior=prior, nfe=4).x0, truth))

    assert abs(quality(tiled(prior, 64, 32)) - quality(prior)) < 0.1


def test_weights_of_tiles_do_not_depend_on_the_callers_arithmetic(arithmetic):
    network = TiledNetwork(Local(), 24, 12)
    expected = network._places(40)
    with arithmetic():
        found = network._places(40)
    for (span, weights), (place, others) in zip(expected, found, strict=True):
        assert span == place
        assert weights.dtype == others.dtype
        assert torch.equal(weights, others)
