"""The trainer: losses at their optima and exact resume."""

import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from ncvsd_inverse.errors import CheckpointError, DivergenceError
from ncvsd_inverse.evaluation import evaluate
from ncvsd_inverse.networks import ConcatDenoiser, ControlledDenoiser, Denoiser, UNetShape
from ncvsd_inverse.networks.unet import Block
from ncvsd_inverse.priors import GaussianMixturePrior, load_prior
from ncvsd_inverse.priors.observations import combine_observations
from ncvsd_inverse.priors.registry import load_network
from ncvsd_inverse.training import (
    DistillationTrainer,
    DistillConfig,
    ImageData,
    TeacherConfig,
    TeacherTrainer,
    load_teacher,
)
from ncvsd_inverse.training.data import Batch
from ncvsd_inverse.training.ema import PowerEMA, power_exponent
from ncvsd_inverse.training.export import save_run_prior
from ncvsd_inverse.training.losses import (
    Observation,
    add_noise,
    discriminator_losses,
    distillation_loss,
    energy_loss,
    generate,
    tempered_loss,
)
from ncvsd_inverse.training.progress import picture_grid

TINY = UNetShape(resolution=8, channels=(16, 16), blocks=1, attention=(), patch=2)


def mixture():
    means = torch.tensor([[-1.2, -0.6], [0.9, -0.9], [0.2, 1.2]]).reshape(3, 2, 1, 1)
    covariances = torch.stack(
        [torch.diag(torch.tensor(v)) for v in ([0.10, 0.20], [0.20, 0.10], [0.15, 0.15])]
    )
    return GaussianMixturePrior(torch.tensor([0.3, 0.3, 0.4]), means, covariances)


def small_images(num=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ImageData(torch.randint(0, 256, (num, 3, 8, 8), generator=generator, dtype=torch.uint8))


COMMON = {
    "network": TINY,
    "images": 48,
    "batch_size": 8,
    "warmup_images": 16,
    "precision": "float32",
}


def teacher_config(**changes):
    return TeacherConfig(**COMMON | {"decay_steps": 2.0, "ema_stds": (0.1,)} | changes)


def distill_config(**changes):
    return DistillConfig(**COMMON | {"adversarial_images": 16} | changes)


def parameters(run):
    return {
        f"{name}.{key}": value.clone()
        for name, module in run.modules.items()
        for key, value in module.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["teacher", "concat", "controlled"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind):
    torch.set_num_threads(1)

    def make(folder, images):
        if kind == "teacher":
            return TeacherTrainer(teacher_config(images=images), small_images(), folder)
        trained = TeacherTrainer(teacher_config(), small_images(), tmp_path / "teacher")
        config = distill_config(kind=kind, images=images)
        return DistillationTrainer(config, small_images(), folder, trained.averaged("teacher"))

    whole = make(tmp_path / "whole", images=48)
    assert whole.run(log_every=1)
    assert not make(tmp_path / "stopped", images=48).run(seconds=0.0)
    assert make(tmp_path / "stopped", images=24).run(log_every=1)
    resumed = make(tmp_path / "stopped", images=48)
    assert resumed.run(log_every=1)
    expected, got = parameters(whole), parameters(resumed)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    name = next(iter(whole.averages))
    averages = (run.averaged(name).state_dict() for run in (whole, resumed))
    assert all(torch.equal(*pair) for pair in zip(*(a.values() for a in averages), strict=True))


@pytest.mark.parametrize("kind", ["concat", "controlled"])
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_teacher_and_student_train_and_are_judged_on_the_device(tmp_path, kind, precision, device):
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"accelerator": Accelerator(cpu=device.type == "cpu")}
    config = teacher_config(precision=precision, dropout=0.1, microbatch=4)
    teacher = TeacherTrainer(config, small_images(), tmp_path / "teacher", **settings)
    assert teacher.run(log_every=1)
    config = distill_config(precision=precision, kind=kind, energy_images=16)
    exact = teacher.averaged("teacher")
    student = DistillationTrainer(config, small_images(), tmp_path / "student", exact, **settings)
    assert student.run(log_every=1)
    for run in (teacher, student):
        assert {value.device.type for value in parameters(run).values()} == {device.type}
        save_run_prior(run, "noise")
    prior, judge = (load_prior(str(tmp_path / run), device) for run in ("student", "teacher"))
    x0 = torch.rand(3, 3, 8, 8, device=device) * 2 - 1
    result = evaluate(prior, judge, x0, levels=(0.5,), draws=2)
    assert math.isfinite(result.levels[0].prior.ratio.value)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_what_a_killed_run_left_half_written_goes(tmp_path):
    torn = tmp_path / ".state.safetensors.99.part"
    torn.write_bytes(b"half")
    assert TeacherTrainer(teacher_config(), small_images(), tmp_path).run()
    assert not torn.exists()


def test_a_run_of_other_settings_is_not_resumed(tmp_path):
    TeacherTrainer(teacher_config(), small_images(), tmp_path).run(seconds=0.0)
    other = teacher_config(batch_size=4, network=replace(TINY, channels=(16, 32)))
    differing = re.escape("batch_size was 8 and is 4; network.channels was [16, 16] and is [16, 32")
    with pytest.raises(ValueError, match=f"other settings: {differing}]$"):
        TeacherTrainer(other, small_images(), tmp_path).run(seconds=0.0)
    teacher = untrained_teacher(tmp_path / "teacher")
    student = DistillationTrainer(distill_config(), small_images(), tmp_path, teacher)
    with pytest.raises(ValueError, match=r"settings: run was TeacherRun and is DistillRun$"):
        student.run(seconds=0.0)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json must be the settings of a run"):
        TeacherTrainer(teacher_config(), small_images(), tmp_path).run(seconds=0.0)


def without_digests(folder):
    """Make a run one of before there were digests."""
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("inputs")
    path.write_text(json.dumps(settings))


def test_a_run_goes_on_with_its_data_and_its_teacher_alone(tmp_path):
    def student(seed, data):
        torch.manual_seed(seed)
        return DistillationTrainer(distill_config(), data, tmp_path, Denoiser(TINY))

    student(0, small_images()).run(seconds=0.0)
    before = (tmp_path / "state.safetensors").read_bytes()
    one_pixel = small_images()
    one_pixel.pixels[7, 0, 0, 0] ^= 1
    labelled = ImageData(small_images().pixels, labels=torch.arange(20))
    mirrored = ImageData(small_images().pixels, flip=False)
    for seed, data, differing in [
        (0, one_pixel, "data_sha256"),
        (0, labelled, "data_sha256"),
        (0, mirrored, "data_sha256"),
        (1, small_images(), "teacher_sha256"),
    ]:
        with pytest.raises(
            ValueError, match=rf"settings: {differing} was \w{{64}} and is \w{{64}};"
        ):
            student(seed, data).run(seconds=0.0)
    assert (tmp_path / "state.safetensors").read_bytes() == before
    student(0, small_images()).run(seconds=0.0)
    without_digests(tmp_path)
    student(1, small_images()).run(seconds=0.0)
    with pytest.raises(ValueError, match="teacher_sha256 was"):
        student(0, small_images()).run(seconds=0.0)


def test_data_without_a_digest_are_taken_as_they_come(tmp_path):
    class Plain:
        image_shape, num_classes = (3, 8, 8), 0

        def batches(self, start, size, *, seed, rows=None):
            return small_images().batches(start, size, seed=seed, rows=rows)

    assert TeacherTrainer(teacher_config(), Plain(), tmp_path).run()
    TeacherTrainer(teacher_config(), small_images(), tmp_path).run()
    TeacherTrainer(teacher_config(), Plain(), tmp_path).run()
    with pytest.raises(ValueError, match="data_sha256 was"):
        TeacherTrainer(teacher_config(), small_images(seed=1), tmp_path).run()


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path):
    first, second = (
        TeacherTrainer(teacher_config(images=images), small_images(), tmp_path)
        for images in (16, 24)
    )

    def meanwhile():
        with pytest.raises(ValueError, match="one that no other process trains in, got"):
            second.run()

    assert first.run(checkpoint_every=1, on_checkpoint=meanwhile)
    assert second.run()
    assert second.step == 3


def test_the_log_is_that_of_an_uninterrupted_run_and_says_where_it_resumed(tmp_path):
    def train(folder, images):
        TeacherTrainer(teacher_config(images=images), small_images(), folder).run(log_every=4)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]

    torch.set_num_threads(1)
    train(tmp_path / "stopped", 40)
    assert train(tmp_path / "stopped", 40) == train(tmp_path / "once", 40)
    lines = train(tmp_path / "stopped", 64)
    assert lines.pop(1) == {"step": 5, "images": 40, "resumed": True}
    assert lines == train(tmp_path / "whole", 64)


def test_every_checkpoint_is_told_of_and_again_where_a_run_resumes(tmp_path):
    told = []
    for images in (40, 64):
        run = TeacherTrainer(teacher_config(images=images), small_images(), tmp_path)
        assert run.run(checkpoint_every=2, on_checkpoint=lambda run=run: told.append(run.step))
    assert told == [2, 4, 5, 5, 6, 8]


def test_data_may_have_fewer_classes_than_the_network_and_not_more(tmp_path):
    pixels = small_images().pixels

    def teacher(classes):
        network = replace(TINY, num_classes=3)
        data = ImageData(pixels, labels=torch.arange(20) % classes)
        return TeacherTrainer(teacher_config(network=network), data, tmp_path / str(classes))

    seen = []
    for classes in (2, 3):
        run = teacher(classes)
        run.network.unet.emb_label.register_forward_pre_hook(lambda _, x: seen.append(x[0] != 0))
        assert run.run()
        assert torch.cat(seen).any(0).tolist() == [True, True, classes == 3]
    with pytest.raises(ValueError, match=r"most 3 classes \(network\.num_classes\), got 4"):
        teacher(4)


def test_a_teacher_starts_from_the_weights_of_a_prior(tmp_path):
    first = TeacherTrainer(teacher_config(seed=3), small_images(), tmp_path / "first")
    assert first.run()
    init = str(save_run_prior(first, "noise"))
    shipped = load_network(init).state_dict()
    again = TeacherTrainer(teacher_config(init=init), small_images(), tmp_path / "again")
    for name, value in again.network.state_dict().items():
        assert torch.allclose(value, shipped[name], atol=1e-6)
    assert again.learning_rate() < again.config.learning_rate  # warms up as a new run does
    again.run(seconds=0.0)
    (tmp_path / "first" / "prior.safetensors").unlink()  # a run that goes on needs it no more
    assert TeacherTrainer(teacher_config(init=init), small_images(), tmp_path / "again").run()


def test_a_student_starts_from_the_weights_of_a_prior(tmp_path):
    teacher = TeacherTrainer(teacher_config(), small_images(), tmp_path / "teacher").averaged(
        "teacher"
    )
    first = DistillationTrainer(distill_config(seed=3), small_images(), tmp_path / "first", teacher)
    assert first.run()
    init = str(save_run_prior(first, "noise"))
    config = distill_config(init=init)
    again = DistillationTrainer(config, small_images(), tmp_path / "again", teacher)
    for name, value in load_network(init).state_dict().items():
        assert torch.allclose(again.generator.state_dict()[name], value, atol=1e-6)
    config = distill_config(init=init, kind="controlled")
    with pytest.raises(ValueError, match="init must be a distilled prior of kind 'controlled'"):
        DistillationTrainer(config, small_images(), tmp_path / "other", teacher)
    with pytest.raises(ValueError, match="teacher must be a denoiser, got ConcatDenoiser"):
        TeacherTrainer(teacher_config(init=init), small_images(), tmp_path / "third")


def untrained_teacher(folder):
    return TeacherTrainer(teacher_config(), small_images(), folder).averaged("teacher")


def test_a_run_that_tempers_says_so_in_its_card(tmp_path):
    teacher = untrained_teacher(tmp_path / "teacher")
    for weight in (0.0, 1.0):
        config = distill_config(tempered_weight=weight, images=32)
        run = DistillationTrainer(config, small_images(), tmp_path / str(weight), teacher)
        run.run(seconds=0.0)
        assert load_prior(str(save_run_prior(run, "noise"))).has_mean is bool(weight)


@pytest.mark.parametrize("energy_images", [0, 1600])
def test_the_generator_learns_to_temper(tmp_path, energy_images):
    """Of images of one colour each the mean given u is about that of its pixels."""
    torch.set_num_threads(1)
    colours = torch.randint(0, 256, (64, 3, 1, 1), generator=torch.Generator().manual_seed(0))
    data = ImageData(colours.to(torch.uint8).expand(-1, -1, 8, 8).contiguous())
    config = distill_config(
        images=1600,
        batch_size=32,
        tempered_weight=10.0,
        learning_rate=0.03,
        generator_rate=1.0,
        energy_rate=1.0,
        energy_images=energy_images,
        adversarial_images=1600,
        decay_steps=200.0,
        sigma_min=0.3,
        sigma_max=0.6,
    )
    run = DistillationTrainer(config, data, tmp_path, untrained_teacher(tmp_path / "teacher"))
    x0 = next(data.batches(0, 32, seed=1)).images
    u = Observation(
        add_noise(x0, torch.full((32,), 0.4), torch.randn_like(x0)), torch.full((32,), 0.4)
    )

    @torch.no_grad()
    def error():
        drawn, _ = generate(run.generator.eval(), u, torch.zeros_like(x0), gamma=0.414)
        return float((drawn - x0).square().mean().sqrt())

    # A pixel by itself tells the colour to 0.31, all of them to 0.05.
    assert error() > 0.31
    run.run()
    assert error() < 0.28


def test_the_loss_of_tempered_draws_is_least_at_them_and_alike_at_all_levels():
    generator = torch.Generator().manual_seed(0)
    for level in (0.05, 0.5, 5.0):
        x0 = 0.5 * torch.randn(64, 3, 8, 8, generator=generator)
        sigma = torch.full((64,), level)
        u = add_noise(x0, sigma, torch.randn(x0.shape, generator=generator))
        mean = 0.25 / (0.25 + level**2) * u
        spread = level * 0.5 / math.hypot(level, 0.5)
        drawn = mean + spread * torch.randn(x0.shape, generator=generator)
        for temperature in (0.0, 0.6):
            share = torch.full((64,), temperature)
            best = mean + temperature * (drawn - mean)
            losses = [
                float(tempered_loss(factor * best, drawn, x0, share, sigma).mean())
                for factor in (1.0, 0.7, 1.3)
            ]
            assert losses[0] == min(losses)
            assert losses[0] == pytest.approx((1 - temperature) ** 2, abs=0.05)


def test_weights_of_another_shape_are_no_start(tmp_path):
    first = TeacherTrainer(teacher_config(), small_images(), tmp_path / "first")
    first.run(seconds=0.0)
    init = str(save_run_prior(first, "noise"))
    other = teacher_config(init=init, network=replace(TINY, channels=(16, 32)))
    with pytest.raises(
        ValueError, match=r"init must have the configured.*channels \(16, 16\), not"
    ):
        TeacherTrainer(other, small_images(), tmp_path / "second")
    with pytest.raises(TypeError, match="init must be the name or path of a prior, got ''"):
        teacher_config(init="")


@pytest.mark.parametrize("levels", [(0.01, 5.0), (0.002, 80.0)])
def test_a_runs_prior_keeps_its_range(tmp_path, levels):
    teacher = TeacherTrainer(teacher_config(), small_images(), tmp_path / "teacher").averaged(
        "teacher"
    )
    config = distill_config(sigma_min=levels[0], sigma_max=levels[1])
    run = DistillationTrainer(config, small_images(), tmp_path / "run", teacher)
    run.run(seconds=0.0)
    prior = load_prior(save_run_prior(run, "noise"))
    assert (prior.sigma_min, prior.sigma_max) == levels


def test_a_damaged_checkpoint_is_named(tmp_path):
    run = TeacherTrainer(teacher_config(), small_images(), tmp_path)
    run.run(seconds=0.0)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        TeacherTrainer(teacher_config(), small_images(), tmp_path).load()


def test_a_failed_write_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run = TeacherTrainer(teacher_config(), small_images(), tmp_path)
    run.run(seconds=0.0)
    before = (tmp_path / "state.safetensors").read_bytes()

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("ncvsd_inverse.training.checkpoint.save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space"):
        run.save()
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_lasting_divergence_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    run = TeacherTrainer(teacher_config(images=24), small_images(), tmp_path)
    run.run()
    before = (tmp_path / "state.safetensors").read_bytes()
    again = TeacherTrainer(teacher_config(images=800), small_images(), tmp_path)
    again.load()
    torch.nn.init.constant_(again.network.unet.out_gain, math.nan)
    with pytest.raises(DivergenceError, match="teacher was not finite for 20 steps in a row"):
        again.run(checkpoint_every=100)
    assert again.skipped == {"teacher": 20}
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_a_passing_divergence_is_skipped_and_counted(tmp_path):
    class OneBadBatch(ImageData):
        def batches(self, start, size, *, seed, rows=None):
            for number, batch in enumerate(super().batches(start, size, seed=seed, rows=rows)):
                bad = torch.full_like(batch.images, math.nan)
                yield Batch(bad, None) if number == 2 else batch

    run = TeacherTrainer(teacher_config(), OneBadBatch(small_images().pixels), tmp_path)
    lines = []
    assert run.run(log_every=1, on_log=lines.append)
    assert run.skipped == {"teacher": 1}
    assert lines[-1]["skipped_teacher"] == 1
    assert "loss_teacher" not in lines[2]
    assert all(bool(p.isfinite().all()) for p in run.network.parameters())


@pytest.mark.parametrize("kind", ["teacher", "concat"])
def test_microbatches_change_no_result(tmp_path, kind):
    torch.set_num_threads(1)
    logs = []
    for microbatch in (None, 3):
        data, folder = small_images(), tmp_path / str(microbatch)
        if kind == "teacher":
            run = TeacherTrainer(teacher_config(microbatch=microbatch), data, folder)
        else:
            teacher = TeacherTrainer(teacher_config(), data, tmp_path / "teacher").averaged(
                "teacher"
            )
            run = DistillationTrainer(distill_config(microbatch=microbatch), data, folder, teacher)
        lines = []
        run.run(log_every=1, on_log=lines.append)
        logs.append(lines)
    for whole, parts in zip(*logs, strict=True):
        for name in (n for n in whole if n.startswith("loss")):
            assert parts[name] == pytest.approx(whole[name], rel=1e-4)  # order of float32 sums


def test_an_average_of_another_length_comes_from_snapshots(tmp_path):
    stds = (0.05, 0.10, 0.15)
    run = TeacherTrainer(
        teacher_config(images=320, ema_stds=stds), small_images(), tmp_path / "all"
    )
    run.run()
    truth = run.averages["teacher"].averages[0.10].state_dict()

    few = teacher_config(images=320, ema_stds=(0.05, 0.15))
    other = TeacherTrainer(few, small_images(), tmp_path / "two")
    with pytest.raises(CheckpointError, match="snapshots"):
        other.averaged("teacher", 0.10)
    other.run(snapshot_every=4)
    made = other._combined("teacher", 0.10)
    last = run.network.state_dict()
    for name in (name for name, _ in run.network.named_parameters()):
        error = (made[name] - truth[name]).norm()
        # Far nearer to the true average than the last weights are; halves round to 2^-11.
        assert error < 0.1 * (last[name] - truth[name]).norm() + 1e-3 * truth[name].norm(), name


def test_a_teacher_of_another_shape_is_refused_by_name(tmp_path):
    teacher = TeacherTrainer(teacher_config(), small_images(), tmp_path).averaged("teacher")
    other = UNetShape(resolution=8, channels=(16, 32), blocks=1, attention=(), patch=2)
    with pytest.raises(ValueError, match=r"channels \(16, 16\), not \(16, 32\)"):
        DistillationTrainer(distill_config(network=other), small_images(), tmp_path / "d", teacher)


def test_a_teacher_is_loaded_from_its_run(tmp_path):
    run = TeacherTrainer(teacher_config(), small_images(), tmp_path)
    run.run()
    loaded, x = load_teacher(tmp_path), torch.randn(2, 3, 8, 8)
    sigma = torch.tensor([0.5, 2.0])
    with torch.no_grad():
        assert torch.equal(loaded(x, sigma), run.averaged("teacher")(x, sigma))


def test_configuration_round_trip_and_errors(tmp_path):
    config = distill_config()
    assert DistillConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    text = "images = 8\n[network]\nresolution = 8\nchannels = [16]\n"
    (tmp_path / "run.toml").write_text(text)
    assert TeacherConfig.from_toml(tmp_path / "run.toml").network.channels == (16,)
    with pytest.raises(ValueError, match="unknown keys: leaning_rate"):
        TeacherConfig.from_dict(teacher_config().to_dict() | {"leaning_rate": 1.0})
    with pytest.raises(ValueError, match="lacks the key 'network'"):
        TeacherConfig.from_dict({"images": 8})
    with pytest.raises(ValueError, match="batch_size"):
        teacher_config(batch_size=0)


def test_power_ema_has_the_stated_profile():
    # Fed with the one-hot history of its steps, an average shows the weight it gives each step.
    for std in (0.05, 0.10):
        steps = 400
        module = nn.Linear(steps, 1, bias=False)
        nn.init.zeros_(module.weight)
        average = PowerEMA(module, (std,))
        for step in range(1, steps + 1):
            module.weight.data.zero_()
            module.weight.data[0, step - 1] = 1
            average.update(module, step)
        weights = average.averages[std].weight[0].double()
        places = (torch.arange(steps) + 0.5) / steps
        mean = (weights * places).sum()
        spread = (weights * (places - mean) ** 2).sum().sqrt()
        assert abs(float(weights.sum()) - 1) < 1e-4
        assert abs(float(spread) - std) < 0.002  # 400 steps resolve the profile to this
        assert power_exponent(std) > 0


def test_losses_vanish_at_the_known_optimum():
    prior = mixture()
    source = torch.Generator().manual_seed(0)
    images = prior.draw(64, generator=source)
    sigma, t = torch.full((64,), 0.7), torch.full((64,), 0.9)
    y = Observation(add_noise(images, sigma, torch.randn(images.shape, generator=source)), sigma)

    class ExactScore(nn.Module):
        """The score model of a perfect generator: the posterior mean given both views."""

        def forward(self, x, t, condition, sigma):
            return prior.denoise(*combine_observations(condition, sigma, x, t))

    generated = prior.sample(y.image, sigma, generator=source).requires_grad_()
    eps = torch.randn(images.shape, generator=source)
    zero = torch.zeros(64, 1, 1, 1)
    loss = distillation_loss(prior.denoise, ExactScore(), generated, zero, y, t, eps)
    loss.sum().backward()
    assert float(loss.detach().abs().max()) < 1e-8
    assert float(generated.grad.abs().max()) < 1e-4

    class Undecided(nn.Module):
        def forward(self, x, *_):
            return torch.zeros(len(x))

    halves = discriminator_losses(Undecided(), images, generated, y, t, (eps, eps))
    assert all(torch.allclose(half, torch.full((64,), math.log(2))) for half in halves)


def test_energy_is_least_for_posterior_draws():
    prior = GaussianMixturePrior(
        torch.tensor([0.5, 0.5]),
        torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)]),
        torch.stack([0.25 * torch.eye(16), 0.04 * torch.eye(16)]),
    )
    source = torch.Generator().manual_seed(0)
    images, sigma = prior.draw(4000, generator=source), torch.full((4000,), 0.7)
    u = add_noise(images, sigma, torch.randn(images.shape, generator=source))
    mean = prior.denoise(u, 0.7)
    first, second = (prior.sample(u, 0.7, generator=source) for _ in range(2))

    def energy(spread, shift=0.0):
        draws = tuple(mean + shift + spread * (draw - mean) for draw in (first, second))
        return energy_loss(draws, images, sigma, patch=2)

    exact = energy(1.0)
    assert exact.shape == (4000,)
    for other in (energy(0.0), energy(0.7), energy(1.4), energy(1.0, shift=0.1)):
        worse = other - exact
        assert float(worse.mean()) > 4 * float(worse.std()) / 4000**0.5
    # Images that differ by 1 everywhere: no detail, and two bands above the coarse one.
    zeros = torch.zeros(2, 3, 16, 16)
    known = energy_loss((zeros, zeros), zeros + 1, torch.full((2,), 0.7))
    whole, coarse = (0.7**-2 + 0.5**-2) ** 0.5, ((0.7 / 4) ** -2 + 0.4**-2) ** 0.5
    assert known.tolist() == pytest.approx([whole + coarse / 3] * 2)


@pytest.mark.parametrize("wave", [(1, 2), (4, 8)])
def test_energy_tells_misplaced_detail_at_every_scale(wave):
    # Draws whose pixels have the right law, each on its own, but vary at another scale.
    def stripes(period, phases):
        places = torch.arange(64).expand(64, 64)
        return torch.cos(2 * math.pi * (places / (2 * period) + phases[:, None, None, None]))

    source = torch.Generator().manual_seed(0)
    phases = torch.rand(3, 500, generator=source)
    images, sigma = stripes(wave[0], phases[0]), torch.full((500,), 1.0)
    right = energy_loss(tuple(stripes(wave[0], p) for p in phases[1:]), images, sigma)
    wrong = energy_loss(tuple(stripes(wave[1], p) for p in phases[1:]), images, sigma)
    worse = wrong - right
    assert float(worse.mean()) > 4 * float(worse.std()) / 500**0.5


def test_energy_teaches_the_generator(tmp_path):
    teacher = TeacherTrainer(teacher_config(), small_images(), tmp_path / "teacher").averaged(
        "teacher"
    )
    ends = []
    for weight in (0.0, 4.0):
        config = distill_config(energy_weight=weight)
        run = DistillationTrainer(config, small_images(), tmp_path / str(weight), teacher)
        run.run()
        ends.append(parameters(run))
    changed = {
        name.split(".")[0] for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])
    }
    assert "generator" in changed


def test_a_start_by_the_energy_score_leaves_the_other_networks_alone(tmp_path):
    teacher = TeacherTrainer(teacher_config(), small_images(), tmp_path / "teacher").averaged(
        "teacher"
    )
    config = distill_config(images=24, energy_images=16, energy_rate=0.25, adversarial_images=0)
    run = DistillationTrainer(config, small_images(), tmp_path / "run", teacher)
    states, lines = [parameters(run)], []
    run.run(log_every=1, on_log=lambda line: (lines.append(line), states.append(parameters(run))))
    moved = [
        {name.split(".")[0] for name in new if not torch.equal(new[name], old[name])}
        for old, new in itertools.pairwise(states)
    ]
    assert moved == [{"generator"}] * 2 + [{"generator", "score", "discriminator"}]
    assert ["loss_score" in line for line in lines] == [False, False, True]


def test_the_energy_score_has_a_learning_rate_of_its_own(tmp_path):
    teacher = TeacherTrainer(teacher_config(), small_images(), tmp_path / "teacher").averaged(
        "teacher"
    )
    rates = []
    for energy_images in (8, 0):
        config = distill_config(images=8, energy_images=energy_images, energy_rate=0.25)
        run = DistillationTrainer(config, small_images(), tmp_path / str(energy_images), teacher)
        highest = run.learning_rate()
        run.run()
        rates.append(run.optimizers["generator"].param_groups[0]["lr"] / highest)
    assert rates == pytest.approx([0.25, config.generator_rate])


@pytest.mark.parametrize("gamma", [0.414, 0.0])
def test_pictures_of_a_run_can_be_drawn_at_any_time(tmp_path, gamma):
    images = small_images().images(torch.arange(4))
    teacher = TeacherTrainer(teacher_config(), small_images(), tmp_path / "teacher")
    config = distill_config(gamma=gamma)
    student = DistillationTrainer(
        config, small_images(), tmp_path / "student", teacher.averaged("teacher")
    )
    before = parameters(student)
    for run, rows in ((teacher, 1 + 2 * 4 + 1), (student, 1 + 3 * 4 + 3)):
        grid = picture_grid(run, images)
        assert grid.shape == (3, rows * 10 + 2, 4 * 10 + 2)  # 8 pixels and a frame of 2
        assert float(grid.abs().max()) <= 1
    assert all(torch.equal(value, before[key]) for key, value in parameters(student).items())


# Dropout in a teacher's training.


def images(num=20):
    generator = torch.Generator().manual_seed(0)
    return ImageData(torch.randint(0, 256, (num, 3, 8, 8), generator=generator, dtype=torch.uint8))


def config(**changes):
    settings = {"network": TINY, "images": 48, "batch_size": 8, "warmup_images": 16}
    return TeacherConfig(**settings | {"precision": "float32", "dropout": 0.2} | changes)


def weights(run):
    return torch.cat([value.flatten() for value in run.network.state_dict().values()])


def test_values_are_dropped_between_the_convolutions_of_every_block():
    torch.manual_seed(0)
    network = Denoiser(TINY, dropout=0.25)
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    seen = []
    for block in blocks:
        block.conv_res1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    x, sigma = torch.randn(64, 3, 8, 8), torch.full((64,), 0.5)
    network.eval()
    plain = network(x, sigma)
    assert torch.equal(network(x, sigma), plain)
    whole = seen[0]  # the first block's input does not depend on what others drop
    seen.clear()
    network.train()
    network(x, sigma)
    assert len(seen) == len(blocks)
    for values in seen:
        share, error = float((values == 0).float().mean()), (0.25 * 0.75 / values.numel()) ** 0.5
        assert abs(share - 0.25) < 4 * error
    kept = seen[0] != 0
    assert torch.allclose(seen[0][kept], whole[kept] / 0.75, rtol=1e-5)


def test_students_have_no_dropout():
    teacher = Denoiser(TINY, dropout=0.25)
    for kind in (ConcatDenoiser, ControlledDenoiser):
        student = kind.from_teacher(teacher)
        assert {m.dropout for m in student.modules() if isinstance(m, Block)} == {0.0}


def test_a_resumed_run_drops_what_the_uninterrupted_one_does(tmp_path):
    torch.set_num_threads(1)
    whole = TeacherTrainer(config(), images(), tmp_path / "whole")
    whole.run()
    assert TeacherTrainer(config(images=24), images(), tmp_path / "parts").run()
    torch.rand(5)  # what others draw from the shared random state is of no account
    resumed = TeacherTrainer(config(), images(), tmp_path / "parts")
    resumed.run()
    assert torch.equal(weights(resumed), weights(whole))

    for change in ({"dropout": 0.0}, {"microbatch": 4}):
        other = TeacherTrainer(config(**change), images(), tmp_path / str(change))
        other.run()
        assert not torch.equal(weights(other), weights(whole))


def test_what_is_dropped_follows_from_seed_step_and_process(tmp_path, monkeypatch):
    run = TeacherTrainer(config(), images(), tmp_path)

    def draw():
        with run._seeded_dropout():
            return tuple(torch.rand(3).tolist())

    state = torch.get_rng_state()
    draws = [draw()]
    assert draw() == draws[0]
    assert torch.equal(torch.get_rng_state(), state)
    run.step = 1
    draws.append(draw())
    monkeypatch.setattr(Accelerator, "process_index", property(lambda _: 1))
    draws.append(draw())
    run.config = config(seed=1)
    draws.append(draw())
    assert len(set(draws)) == 4


def test_a_trained_teacher_drops_nothing(tmp_path):
    run = TeacherTrainer(config(), images(), tmp_path)
    run.run()
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        for teacher in (load_teacher(tmp_path), run.averaged("teacher")):
            assert torch.equal(teacher(x, sigma), teacher(x, sigma))


def test_a_run_of_before_there_was_dropout_goes_on_without(tmp_path):
    TeacherTrainer(config(dropout=0.0), images(), tmp_path).run(seconds=0.0)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    del settings["dropout"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"other settings: dropout was 0\.0 and is 0\.2"):
        TeacherTrainer(config(), images(), tmp_path).run(seconds=0.0)
    TeacherTrainer(config(dropout=0.0), images(), tmp_path).run(seconds=0.0)


@pytest.mark.parametrize(
    ("value", "error"), [(1.0, ValueError), (-0.1, ValueError), ("much", TypeError)]
)
def test_wrong_shares_are_refused(value, error):
    with pytest.raises(error, match="dropout must"):
        config(dropout=value)
