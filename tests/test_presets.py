"""Shipped configurations: all are valid, and the published ones have the published sizes."""

import pytest
import torch

from ncvsd_inverse.distill.presets import (
    list_presets,
    load_distill_config,
    load_teacher_config,
)
from ncvsd_inverse.networks import ControlledDenoiser

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


def test_every_preset_is_valid():
    assert {"faces64", "natural", "ffhq256_xs"} <= set(list_presets("teacher"))
    assert set(PUBLISHED) | {"faces64", "natural"} == set(list_presets("distill"))
    for name in list_presets("teacher"):
        load_teacher_config(name)
    for name in list_presets("distill"):
        load_distill_config(name)


@pytest.mark.parametrize("name", ["faces64", "natural"])
def test_students_have_their_teachers_shape(name):
    teacher, student = load_teacher_config(name), load_distill_config(name)
    assert (teacher.network, teacher.any_size) == (student.network, student.any_size)


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
