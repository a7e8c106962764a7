"""Shipped configurations: all are valid, and the published ones have the published sizes."""

from dataclasses import replace

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


NETWORK = {"resolution": "8", "channels": "[8, 16]", "attention": "[]", "blocks": "1"}


def write_settings(path, settings, network=None):
    lines = [f"{name} = {value}" for name, value in {"images": "10", **settings}.items()]
    lines += ["[network]"] if network is not None else []
    lines += [f"{name} = {value}" for name, value in {**NETWORK, **(network or {})}.items()]
    path.write_text("\n".join(lines[: None if network is not None else -len(NETWORK)]))
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": "'10'"}, "images must be an integer, got '10'"),
        ({"images": "1" + "0" * 400}, "images must be an integer of at most 64 bits"),
        ({"batch_size": "1000000000000"}, "batch_size must be at most 1000000"),
        ({"seed": "-1"}, "seed must be at least 0"),
        ({"learning_rate": "'1'"}, "learning_rate must be a number, got '1'"),
        ({"learning_rate": "true"}, "learning_rate must be a number, got True"),
        ({"learning_rate": "nan"}, "learning_rate must be finite"),
        ({"any_size": "'false'"}, "any_size must be true or false, got 'false'"),
        ({"betas": "[1.5, 0.9]"}, r"betas must lie in \[0, 1\)"),
        ({"betas": "[0.9]"}, "betas must be 2 numbers"),
        ({"betas": "[0.9, '0.9']"}, r"betas\[1\] must be a number"),
        ({"ema_stds": "[" + "0.1, " * 20 + "]"}, "ema_stds must be at most 16, got 20"),
        ({"t_mean": "1e300"}, r"t_mean must lie within \+-20"),
        ({"t_mean": "true"}, "t_mean must be a number"),
        ({"t_std": "1e300"}, "t_std must be at most 20"),
        ({"sigma_max": "1e300"}, "sigma_max must be above sigma_min = 0.002 and at most 1e"),
        ({"sigma_max": "'80'"}, "sigma_max must be a number, got '80'"),
        ({"num_levels": "1000000000000"}, "num_levels must be at most 1000000"),
        ({"adversarial_images": "'x'"}, "adversarial_images must be an integer, got 'x'"),
        ({"network": "3"}, "network must be a table of settings, got 3"),
        ({"network": "[1]"}, "network must be a table of settings"),
        (
            {"sigma_mn": "1"},
            r"configuration has unknown keys: sigma_mn \(did you mean sigma_min\?\); known are ",
        ),
    ],
)
def test_settings_are_typed_and_bounded(tmp_path, settings, message):
    path = tmp_path / "own.toml"
    write_settings(path, settings, None if "network" in settings else {})
    with pytest.raises(ValueError, match=rf"own\.toml must hold .*: {message}"):
        load_distill_config(path)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"head_channels": "-64"}, "head_channels must be at least 1, got -64"),
        ({"blocks": "100000"}, "blocks must be at most 100, got 100000"),
        ({"blocks": "1.5"}, "blocks must be an integer"),
        ({"channels": "'ab'"}, "channels must be a list of integers"),
        ({"channels": "[true]"}, r"channels\[0\] must be an integer, got True"),
        ({"resolution": "-8"}, "resolution must be at least 1"),
        ({"resolution": "9"}, "resolution must be a multiple of 2, got 9"),
        ({"blcks": "3"}, r"network has unknown keys: blcks \(did you mean blocks\?\); known are "),
    ],
)
def test_networks_are_typed_and_bounded(tmp_path, network, message):
    with pytest.raises(ValueError, match=rf"own\.toml must hold .*: {message}"):
        load_teacher_config(write_settings(tmp_path / "own.toml", {}, network))


def test_settings_come_back_from_their_own_toml(tmp_path):
    path = tmp_path / "shown.toml"
    for load, stage in ((load_teacher_config, "teacher"), (load_distill_config, "distill")):
        for name in list_presets(stage):
            path.write_text(load(name).to_toml())
            assert load(path) == load(name)
    path.write_text(replace(load(name), init='a\\b "c"', microbatch=4).to_toml())
    assert (load(path).init, load(path).microbatch) == ('a\\b "c"', 4)
