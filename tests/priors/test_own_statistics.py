"""Statistics that priors measure for themselves: from what, when, and where they are kept."""

import json
import math
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ncvsd_inverse import DivergenceError, solve
from ncvsd_inverse import operators as ops
from ncvsd_inverse.networks import ConcatDenoiser, UNetShape
from ncvsd_inverse.priors import (
    DiffusionPrior,
    GaussianMixturePrior,
    GaussianPrior,
    NCVSDPrior,
    load_prior,
    save_prior,
)
from ncvsd_inverse.priors.own_statistics import (
    lacks_statistics,
    num_images,
    own_statistics,
    with_own_statistics,
)
from ncvsd_inverse.priors.statistics import measure_statistics

SHAPE = (1, 16, 16)


def spectrum(side=SHAPE[1]):
    f = torch.fft.fftfreq(side)
    return (0.25 * (1 + (8 * f[:, None]) ** 2 + (8 * f) ** 2) ** -1.5)[None]


def exact():
    return GaussianPrior.stationary(torch.full(SHAPE, 0.1), spectrum())


class Mean(nn.Module):
    """The posterior mean of `exact`, which counts its images."""

    image_channels = 1

    def __init__(self):
        super().__init__()
        self.images = 0

    def forward(self, x, sigma, labels=None):
        self.images += len(x)
        return exact().denoise(x, sigma)


def teacher(**changes):
    return DiffusionPrior(Mean(), **{"image_shape": SHAPE, **changes})


class Painter:
    """A user's prior that can generate, of the least it may have."""

    nfe_per_sample = 1
    image_shape = SHAPE

    def __init__(self):
        self.generated = 0

    def sample(self, u, sigma, *, generator=None):
        return exact().sample(u, sigma, generator=generator)

    def generate(self, num):
        self.generated += num
        return exact().draw(num, generator=torch.Generator().manual_seed(0))


def measurement(batch=1):
    x = exact().draw(batch, generator=torch.Generator().manual_seed(3))
    return box().measure(x, 0.05, generator=torch.Generator().manual_seed(4))


def box():
    return ops.Inpaint.box(SHAPE[1:], 8)


@pytest.mark.parametrize(
    ("size", "number"),
    [
        ((64, 64), 32),
        ((8, 8), 32),
        ((96, 96), 14),
        ((128, 128), 8),
        ((256, 256), 4),
        ((512, 512), 4),
    ],
)
def test_larger_images_are_fewer(size, number):
    assert num_images(size) == number


def test_a_mean_shows_the_covariance_that_draws_show_by_halves():
    images = exact().draw(400, generator=torch.Generator().manual_seed(0))
    by_mean = measure_statistics(teacher(), images)
    by_draws = measure_statistics(Painter(), images)
    # 400 coefficients or more a bin, some with as few: a few per cent.
    ratio = (by_mean.spectra[:-1] / by_draws.spectra[:-1]).log()
    assert float(ratio.abs().mean()) < 0.05
    assert_close(by_mean.spectra[-1], by_draws.spectra[-1])


def test_generated_images_give_nearly_what_real_ones_give():
    own = own_statistics(teacher(), images=128, progress=False)
    real = measure_statistics(teacher(), exact().draw(128, generator=torch.Generator()))
    ratio = (own.spectra / real.spectra).log().mean((1, 2))
    # The flow keeps the variance to 7%; 128 images know it to some per cent.
    assert (ratio.abs() < 0.12).all(), ratio


def test_given_images_are_used_and_no_more_than_asked_for():
    images = exact().draw(40, generator=torch.Generator())
    own = own_statistics(teacher(), data=images, images=10)
    assert own == measure_statistics(teacher(), images[:10])
    with pytest.raises(ValueError, match="images must be at least 2, got 1"):
        own_statistics(teacher(), images=1)


def test_levels_above_the_priors_largest_are_left_out():
    own = own_statistics(
        DiffusionPrior(Mean(), sigma_max=1.0), data=exact().draw(4), progress=False
    )
    assert own.levels[-1] == pytest.approx(0.8)


def test_one_call_draws_reach_the_posterior_with_no_argument():
    """The README's call with a bare denoiser; the truth is known."""
    prior, y = teacher(), measurement()
    result = solve(y, operator=box(), prior=prior, nfe=10, num_samples=200)
    assert (result.method, result.nfe) == ("conditioning", 10)
    basis = torch.eye(256).view(-1, *SHAPE)
    covariance = exact().statistics.covariance(math.inf, basis).colour(basis).flatten(1).double()
    covariance = covariance @ covariance.T
    seen = box()(torch.ones(1, *SHAPE)).flatten().bool()
    gain = covariance[:, seen] @ torch.linalg.inv(
        covariance[seen][:, seen] + 0.05**2 * torch.eye(int(seen.sum()), dtype=torch.float64)
    )
    mean = 0.1 + gain @ (y.flatten().double()[seen] - 0.1)
    std = (covariance - gain @ covariance[seen]).diagonal().sqrt()
    hidden = ~seen
    error = (result.mean.flatten() - mean) / std
    ratio = result.std.flatten() / std
    # 0.07 is the Monte-Carlo error of 200 draws; the rest is that of measured statistics.
    assert float(error[hidden].square().mean().sqrt()) < 0.2
    assert 0.85 < float(ratio[hidden].mean()) < 1.1


def test_measuring_is_no_part_of_nfe_and_happens_once():
    prior, y = teacher(), measurement()
    first = solve(y, operator=box(), prior=prior, nfe=4)
    spent = prior.network.images
    assert spent > 4
    assert first.nfe == 4
    again = solve(y, operator=box(), prior=prior, nfe=4)
    assert prior.network.images == spent + 4
    assert torch.equal(first.x0, again.x0)


def test_a_users_prior_that_generates_gets_the_good_loop():
    prior = Painter()
    result = solve(measurement(), operator=box(), prior=prior, nfe=2)
    assert (result.method, prior.generated) == ("conditioning", 32)
    solve(measurement(), operator=box(), prior=prior, nfe=2)
    assert prior.generated == 32


def test_draws_of_several_calls_use_the_statistics_of_one():
    class Student(nn.Module):
        image_channels = 1

        def forward(self, x, sigma, condition, level, labels=None):
            return exact().denoise(x, sigma)

    student = NCVSDPrior(Student(), image_shape=SHAPE)
    result = solve(measurement(), operator=box(), prior=student.refined((1.0, 0.3)), nfe=4)
    assert result.method == "conditioning"
    assert student.statistics is not None


def test_threads_measure_once():
    prior = teacher()
    threads = [threading.Thread(target=with_own_statistics, args=(prior, SHAPE)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert prior.network.images == 32 * (prior.generation_calls + 9)


class Little:
    nfe_per_sample = 1

    def sample(self, u, sigma, *, generator=None):
        return u / (1 + sigma**2)


@pytest.mark.parametrize(
    ("prior", "reason", "steps"),
    [
        (Little(), "a Little has no method generate", 1),
        (teacher(sigma_max=1.0), "its sigma_max is 1, too little noise", 4),
    ],
)
def test_a_prior_that_cannot_generate_runs_the_published_loop_and_says_so(prior, reason, steps):
    assert reason in lacks_statistics(prior)
    with pytest.warns(UserWarning, match=rf"the loop is 'gibbs'.*{reason}.*ncvsd statistics"):
        result = solve(
            measurement(),
            operator=box(),
            prior=prior,
            nfe=8,
            schedule=(1.0, 0.1) if steps == 4 else None,
        )
    assert (result.method, result.nfe) == ("gibbs", 8)
    assert len(result.schedule) == 8 // steps
    with pytest.raises(ValueError, match="method must be 'gibbs', got 'conditioning'"):
        solve(measurement(), operator=box(), prior=prior, method="conditioning")


def test_gibbs_that_is_asked_for_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = solve(measurement(), operator=box(), prior=Little(), nfe=4, method="gibbs")
    assert result.method == "gibbs"


def test_one_call_draws_measure_for_the_published_loop_too():
    prior = teacher()
    result = solve(measurement(), operator=box(), prior=prior, nfe=4, preset="ncvsd")
    assert result.method == "gibbs"
    assert prior.statistics is not None


def test_a_mixture_says_that_its_covariance_is_an_average():
    means = torch.stack([torch.full(SHAPE, -0.5), torch.full(SHAPE, 0.5)])
    covariances = 0.04 * torch.eye(256).expand(2, -1, -1)
    prior = GaussianMixturePrior(torch.tensor([0.5, 0.5]), means, covariances)
    with pytest.warns(UserWarning, match="averages.*approximate"):
        result = solve(measurement(), operator=box(), prior=prior, nfe=2)
    assert result.method == "conditioning"


def test_one_sweep_far_above_the_noise_is_said():
    with pytest.warns(UserWarning, match="one sweep only, at rho = 3.*--steps"):
        solve(measurement(), operator=box(), prior=Little(), nfe=1, method="gibbs")
    slow = teacher(num_steps=20, statistics=exact().statistics)
    with pytest.warns(UserWarning, match="one sweep only, at rho = 6"):
        solve(measurement(), operator=box(), prior=slow, nfe=20)


def test_long_measuring_is_announced_with_its_time(monkeypatch, capsys):
    monkeypatch.setattr("ncvsd_inverse.priors.own_statistics.SLOW", 0.0)
    own_statistics(teacher(), images=4)
    assert "from 4 images that it generates: about" in capsys.readouterr().err
    own_statistics(teacher(), images=4, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("model", "constructor"),
    [(lambda x, sigma: x, "from_function"), (Mean(), "from_function"), (3, "got int$")],
)
def test_what_is_no_prior_is_told_how_to_become_one(model, constructor):
    with pytest.raises(TypeError, match=rf"prior must have a sample method.*{constructor}"):
        solve(measurement(), operator=box(), prior=model)


def test_a_pipeline_and_a_deepinv_denoiser_are_told_too():
    diffusers = pytest.importorskip("diffusers")
    from deepinv.models import MedianFilter

    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    for model, words in (
        (unet, r"from_diffusers\(unet, scheduler\)"),
        (pipeline, r"from_diffusers\(pipeline.unet, pipeline.scheduler\)"),
        (MedianFilter(), "from_deepinv"),
    ):
        with pytest.raises(TypeError, match=words):
            solve(measurement(), operator=box(), prior=model)


class UnitMean(nn.Module):
    """The same posterior mean as a deepinv denoiser: images and stds on a [0, 1] scale."""

    def forward(self, x, sigma):
        return (exact().denoise(2 * x - 1, 2 * sigma) + 1) / 2


def test_a_denoiser_of_little_noise_restores_with_statistics_of_given_images():
    prior = DiffusionPrior.from_deepinv(UnitMean(), image_shape=SHAPE)
    assert "too little noise" in lacks_statistics(prior)
    images = exact().draw(64, generator=torch.Generator().manual_seed(8))
    prior = prior.with_statistics(own_statistics(prior, data=images))
    x = exact().draw(2, generator=torch.Generator().manual_seed(3))
    y = box().measure(x, 0.05, generator=torch.Generator().manual_seed(4))
    result = solve(y, operator=box(), prior=prior, nfe=4, num_samples=16)
    assert (result.method, result.nfe) == ("conditioning", 4)
    # No level is above what it was trained to.
    assert result.schedule[0] == pytest.approx(prior.sigma_max)
    known = solve(y, operator=box(), prior=exact(), nfe=4, num_samples=16)
    errors = [float((found.mean - x).square().mean()) for found in (result, known)]
    assert errors[0] < 1.2 * errors[1], errors
    assert 0.5 < float(result.residual.mean()) < 1.5


def test_what_is_not_finite_is_named():
    def broken(x, sigma):
        return x / (sigma.view(-1, 1, 1, 1) > 0.3)

    prior = DiffusionPrior(broken, image_shape=SHAPE, statistics=exact().statistics)
    with pytest.raises(DivergenceError, match=r"sweep \d+ of 10.*prior's draw must stay"):
        solve(measurement(), operator=box(), prior=prior)
    with pytest.raises(DivergenceError, match="generated images must stay finite"):
        solve(measurement(), operator=box(), prior=prior.with_statistics(None))
    with pytest.raises(DivergenceError, match=r"what the prior returns.*sigma = 0\.02"):
        own_statistics(prior, data=exact().draw(4))


def test_shapes_and_objects_a_denoiser_returns_are_named():
    given = {"image_shape": SHAPE, "statistics": exact().statistics}
    with pytest.raises(ValueError, match="the denoiser's output must have shape"):
        solve(measurement(), operator=box(), prior=DiffusionPrior(lambda x, s: x[..., 1:], **given))
    with pytest.raises(TypeError, match="the denoiser must return a tensor, got tuple"):
        solve(measurement(), operator=box(), prior=DiffusionPrior(lambda x, s: (x,), **given))


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Return the path of a small prior without statistics."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    shape = UNetShape(16, 1, channels=(8,), blocks=1, attention=())
    (tmp_path / "folder").mkdir()
    stem = tmp_path / "folder" / "small"
    save_prior(
        stem,
        ConcatDenoiser(shape),
        {
            "name": "small",
            "kind": "ncvsd",
            "image_shape": (1, 16, 16),
            "gamma": 0.414,
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "licence": "none",
            "data": "none",
            "training": {},
            "evaluation": {},
            "weaknesses": "all",
            "intended_use": "tests",
        },
    )
    return stem


def test_statistics_are_kept_in_the_card(saved):
    prior = load_prior(saved)
    solve(measurement(), operator=box(), prior=prior, nfe=1)
    again = load_prior(saved)
    assert again.statistics == prior.statistics
    assert again.card.statistics == prior.statistics


def test_statistics_of_a_copy_do_not_replace_those_of_the_card(saved):
    prior = load_prior(saved)
    prior.statistics_store.write(own_statistics(prior, data=exact().draw(4)))
    before = saved.with_suffix(".json").read_bytes()
    solve(measurement(), operator=box(), prior=load_prior(saved).with_statistics(None), nfe=1)
    assert saved.with_suffix(".json").read_bytes() == before


def test_statistics_of_a_card_that_cannot_be_written_are_kept_in_the_cache(
    saved, monkeypatch, tmp_path
):
    def fail(path, content):
        if path.name == "small.json":
            raise PermissionError(path)
        real(path, content)

    from ncvsd_inverse.priors import cache

    real = cache.write_whole
    monkeypatch.setattr(cache, "write_whole", fail)
    prior = load_prior(saved)
    solve(measurement(), operator=box(), prior=prior, nfe=1)
    (kept,) = (tmp_path / "cache" / "ncvsd_inverse" / "statistics").iterdir()
    assert kept.stem == prior.card.sha256
    assert load_prior(saved).statistics == prior.statistics
    assert load_prior(saved).card.statistics is None
    kept.write_text('{"mean": 3}')  # damaged: measured anew
    assert load_prior(saved).statistics is None


def test_a_class_of_a_prior_does_not_keep_its_statistics_as_the_priors(saved):
    prior = load_prior(saved)
    prior.num_classes = 2
    assert prior.statistics_store is not None
    assert prior.conditioned_on(1).statistics_store is None
    assert json.loads(saved.with_suffix(".json").read_text())["statistics"] is None


def test_statistics_do_not_depend_on_the_callers_arithmetic(arithmetic):
    images = exact().draw(4, generator=torch.Generator().manual_seed(0))
    denoising, painting = exact(), Painter()
    painting.sample, painting.generate = denoising.sample, lambda num: images[:num]

    def measure():
        return [measure_statistics(denoising, images), own_statistics(painting, images=4)]

    expected = measure()
    with arithmetic():
        found = measure()
    for statistics, wanted in zip(found, expected, strict=True):
        for name in ("mean", "mixing", "spectra"):
            value = getattr(statistics, name)
            assert value.dtype == torch.float32
            assert not value.is_inference()
            assert torch.equal(value, getattr(wanted, name)), name


def test_a_prior_with_statistics_does_not_wait_for_one_without():
    ready, slow = teacher().with_statistics(exact().statistics), Painter()
    measuring, go_on = threading.Event(), threading.Event()

    def generate(num):
        measuring.set()
        assert go_on.wait(60)
        return exact().draw(num)

    slow.generate = generate
    thread = threading.Thread(target=with_own_statistics, args=(slow, SHAPE))
    thread.start()
    assert measuring.wait(60)
    other = threading.Thread(target=with_own_statistics, args=(ready, SHAPE))
    other.start()
    other.join(60)
    waits = other.is_alive()
    go_on.set()
    thread.join(60)
    other.join(60)
    assert not waits
