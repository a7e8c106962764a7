"""The priors that ship: their cards, their sizes, and what they do to photographs of any size."""

import json
from pathlib import Path

import pytest
import torch

import ncvsd_inverse.priors
from ncvsd_inverse import load_prior
from ncvsd_inverse.images import read_image
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.priors import PriorHandle, describe_prior, list_priors, load_card
from ncvsd_inverse.priors.published import PUBLISHED

FOLDER = Path(ncvsd_inverse.priors.__file__).parent / "weights"
PHOTOGRAPHS = Path(ncvsd_inverse.__file__).parent / "assets" / "photographs"
STUDENTS = ("ncvsd_faces64", "ncvsd_natural")
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.json"))


def test_both_priors_and_their_teachers_ship():
    assert sorted([*STUDENTS, *(f"{name}_teacher" for name in STUDENTS)]) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_card_says_what_a_user_must_know(name):
    card = load_card(name)
    training = json.loads(json.dumps(card.training))
    assert training["command"].startswith(
        ("ncvsd train", "ncvsd distill", "python experiments/one_gpu/train.py")
    )
    assert training["images_seen"] > 50_000
    assert training["hours"] > 0
    assert training["hardware"]
    assert len(training["commit"]) >= 7
    assert {"levels", "images", "draws", "data"} <= set(card.evaluation)
    assert "research" in card.licence
    assert len(card.weaknesses) > 40
    assert (FOLDER / f"{name}.safetensors").stat().st_size < 16e6


def test_every_shipped_and_published_prior_has_a_handle():
    for name in {*SHIPPED, *PUBLISHED}:
        handle = getattr(ncvsd_inverse.priors, name)
        assert type(handle) is PriorHandle
        assert handle.name == name
    assert {*SHIPPED, *PUBLISHED} <= set(list_priors())
    assert {*SHIPPED, *PUBLISHED} <= set(ncvsd_inverse.priors.__all__)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_handle_stands_for_its_prior(name):
    handle = getattr(ncvsd_inverse.priors, name)
    prior = handle.load("cpu")
    assert handle.card == describe_prior(name)
    assert handle.card.kind == ("diffusion" if name.endswith("_teacher") else "ncvsd")
    assert handle.nfe_per_sample == prior.nfe_per_sample
    assert hasattr(handle, "noise_scale") == (not name.endswith("_teacher"))


@pytest.fixture(scope="module")
def natural():
    return load_prior("ncvsd_natural", dtype=torch.float32)


@pytest.fixture(scope="module")
def natural_teacher():
    return load_prior("ncvsd_natural_teacher", dtype=torch.float32)


def photograph(height, width):
    """A photograph of any size, mirrored over and over: one enlarged would have no fine detail."""
    x = read_image(PHOTOGRAPHS / "cat.png")
    x = torch.cat([x, x.flip(-1)], -1)
    x = torch.cat([x, x.flip(-2)], -2)
    return x.repeat(1, 1, 2, 2)[..., :height, :width]


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (256, 256), (512, 512)])
def test_a_photograph_of_any_size_is_denoised(natural, natural_teacher, size):
    x = photograph(*size)
    u = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    draw = natural.sample(u, 0.2, generator=make_generators([(1,)]))
    assert draw.shape == x.shape
    noisy, one, mean = (
        float(psnr(image, x)) for image in (u, draw, natural_teacher.denoise(u, 0.2))
    )
    assert noisy < 21
    assert mean > 28
    assert one > mean - 4.5  # a draw errs twice as much as the mean: 3 dB


@torch.no_grad()
def test_there_are_no_seams(natural):
    # What is far from the border does not depend on where the border is.
    x = photograph(256, 256)
    source = torch.Generator().manual_seed(0)
    u = x + 0.2 * torch.randn(x.shape, generator=source)
    raised = u + 0.2 * torch.randn(x.shape, generator=source)
    levels = torch.tensor([0.2 * 1.414]), torch.tensor([0.2])

    def run(box):
        return natural.network(raised[box], levels[0], u[box], levels[1])

    whole = run((..., slice(None), slice(None)))
    part = run((..., slice(0, 256), slice(0, 192)))
    difference = (whole[..., :192] - part).abs().amax((0, 1, 2))
    assert float(difference[:96].max()) < 0.02
    assert float(difference[-8:].max()) > float(difference[:96].max())


def test_a_batch_of_photographs_is_drawn_one_by_one(natural):
    x = torch.cat([read_image(path) for path in sorted(PHOTOGRAPHS.glob("*.png"))])[..., :64, :96]
    both = natural.sample(x, 0.5, generator=make_generators([(0,), (1,)]))
    second = natural.sample(x[1:], 0.5, generator=make_generators([(1,)]))
    assert torch.allclose(both[1:], second, atol=1e-4)


@pytest.mark.parametrize("name", ["ncvsd_faces64", "ncvsd_faces64_teacher"])
def test_draws_do_not_depend_on_the_callers_arithmetic(name, arithmetic):
    prior = load_prior(name)
    u = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def draw():
        drawn = prior.sample(u, 0.5, generator=torch.Generator().manual_seed(0))
        return torch.cat([drawn, prior.generate(1, 2)])

    expected = draw()
    with arithmetic():
        found = draw()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
