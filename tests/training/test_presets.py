"""Shipped configurations: all are valid, and the published ones have the published sizes."""

import pytest
import torch

from ncvsd_inverse.networks import ControlledDenoiser, Denoiser
from ncvsd_inverse.training.presets import (
    list_presets,
    load_distill_config,
    load_teacher_config,
)

# Parameters of the generator in millions, from the paper.
PUBLISHED = {
    "ffhq256_xs": 146.2,
    "imagenet64_s": 368.2,
    "imagenet64_m": 653.5,
    "imagenet64_l": 1020.1,
    "imagenet512_s": 368.2,
    "imagenet512_m": 653.5,
    "imagenet512_l": 1020.1,
}


# Parameters of EDM2's networks in millions, and images that they saw in units of 2^20; from the
# paper and, where that gives no figure, its published training configurations.
TEACHERS = {
    "imagenet64_s": (280.2, 1024),
    "imagenet64_m": (497.8, 2048),
    "imagenet64_l": (777.5, 1024),
    "imagenet512_s": (280.2, 2048),
    "imagenet512_m": (497.8, 2048),
    "imagenet512_l": (777.5, 1792),
}

OWN = {"faces64", "natural"}


def test_every_preset_is_valid():
    for stage in ("teacher", "distill"):
        assert set(PUBLISHED) | OWN == set(list_presets(stage))
    for name in list_presets("teacher"):
        load_teacher_config(name)
    for name in list_presets("distill"):
        load_distill_config(name)


@pytest.mark.parametrize("name", [*PUBLISHED, *sorted(OWN)])
def test_students_have_their_teachers_shape_and_data(name):
    teacher, student = load_teacher_config(name), load_distill_config(name)
    for setting in ("network", "any_size", "sigma_data", "flip"):
        assert getattr(teacher, setting) == getattr(student, setting), setting


@pytest.mark.parametrize("name", TEACHERS)
def test_published_teachers_have_the_published_settings(name):
    config = load_teacher_config(name)
    millions, length = TEACHERS[name]
    with torch.device("meta"):
        network = Denoiser(config.network)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.3)
    latents, size = name.startswith("imagenet512"), name[-1]
    assert config.images == length * 2**20
    assert (config.batch_size, config.warmup_images) == (2048, 10_000_000)
    assert config.learning_rate == {"s": 0.0100, "m": 0.0090, "l": 0.0080}[size]
    assert config.dropout == {"s": 0.0, "m": 0.10, "l": 0.10}[size]
    assert config.decay_steps == (70_000 if latents else 35_000)
    assert (config.t_mean, config.t_std) == ((-0.4, 1.0) if latents else (-0.8, 1.6))
    assert config.network.image_channels == (4 if latents else 3)
    assert not config.flip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets_have_the_published_number_of_parameters(name):
    config = load_distill_config(name)
    assert config.kind == "controlled"
    with torch.device("meta"):
        network = ControlledDenoiser(config.network)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED[name], abs=0.05)


def test_unknown_presets_and_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config must be one of .*faces64"):
        load_teacher_config("face64")
    with pytest.raises(ValueError, match="file that exists"):
        load_distill_config(tmp_path / "none.toml")
