"""Fréchet distances of generated images: against known laws, and what is refused."""

import json

import pytest
import torch

from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.evaluation import evaluate_generation
from ncvsd_inverse.priors import (
    GaussianPrior,
)
from tests.evaluation.test_posterior import DIM, SHAPE, BrokenTeacher, gaussian


class Generator:
    """Generates Gaussian images that are farther off the fewer calls are made."""

    image_shape = SHAPE

    def __init__(self):
        self.asked = []

    def generate(self, num, num_steps=4, seed=0, *, size=None, batch_size=16):
        self.asked.append((num, num_steps, seed, size, batch_size))
        source = torch.Generator().manual_seed(seed % 2**63)
        return torch.randn(num, *SHAPE, generator=source) * 0.5 + 1 / num_steps


def training(num=1000, block=300):
    source = torch.Generator().manual_seed(7)
    images = torch.randn(num, *SHAPE, generator=source) * 0.5
    return [images[i : i + block] for i in range(0, num, block)]


def flat_features(x):
    return x.flatten(1)


def test_generation_is_held_against_the_training_images():
    generator = Generator()
    teacher = GaussianPrior(torch.zeros(SHAPE), 0.25 * torch.eye(DIM))
    result = evaluate_generation(
        generator,
        teacher,
        iter(training()),
        features=flat_features,
        samples=1000,
        teacher_samples=600,
        teacher_steps=10,
        batch_size=50,
    )
    one, two, four, by_teacher, halves = result.figures
    # Mean shifts of 1, 1/2 and 1/4 in each of 6 numbers; chance adds about 0.01.
    assert one.distance == pytest.approx(6, rel=0.1)
    assert two.distance == pytest.approx(6 / 4, rel=0.1)
    assert four.distance == pytest.approx(6 / 16, rel=0.15)
    # The teacher's 10 steps are narrow: about 0.4 of 1.5 in trace is the most it can lack.
    assert 0 <= by_teacher.distance < 0.4
    assert 0 < halves.distance < 0.05
    assert [figure.images for figure in result.figures] == [1000, 1000, 1000, 600, 500]
    assert [figure.reference for figure in result.figures] == [1000] * 4 + [500]
    assert by_teacher.name == "teacher, 10 calls"
    assert json.loads(json.dumps(result.to_dict()))["figures"][0]["name"] == "1 call"
    # In blocks, each with its own seed, the same for every number of calls.
    blocks = [entry for entry in generator.asked if entry[1] == 1]
    assert [entry[0] for entry in blocks] == [256, 256, 256, 232]
    assert len({entry[2] for entry in blocks}) == 4
    assert [entry[2] for entry in generator.asked if entry[1] == 4] == [e[2] for e in blocks]
    assert {entry[3:] for entry in generator.asked} == {(SHAPE[1:], 50)}


def test_equal_images_are_at_distance_zero():
    class Copy(Generator):
        def generate(self, num, num_steps=4, seed=0, *, size=None, batch_size=16):
            return torch.cat(training())[:num]

    teacher = GaussianPrior(torch.zeros(SHAPE), 0.25 * torch.eye(DIM))
    batches = [torch.cat(training())[:256]]
    result = evaluate_generation(
        Copy(), teacher, batches, features=flat_features, samples=256, teacher_steps=2
    )
    assert result.figures[0].distance == pytest.approx(0, abs=1e-9)


def test_the_halves_are_random_and_disjoint():
    marks = torch.arange(1001.0).reshape(-1, 1, 1, 1).expand(-1, *SHAPE).split(250)
    seen = []

    def features(x):
        mark = x.flatten(1)[:, :1]
        seen.append(mark)
        return torch.cat([mark % 2, (mark % 250 < 125).float()], dim=1)

    teacher = GaussianPrior(torch.zeros(SHAPE), 0.25 * torch.eye(DIM))
    result = evaluate_generation(
        Generator(), teacher, marks, features=features, samples=2, teacher_steps=2
    )
    halves = result.figures[-1]
    assert (halves.images, halves.reference) == (501, 500)
    # Every second image, or the first of each batch, would be 1 apart; chance is about 0.002.
    assert halves.distance < 0.02
    assert torch.equal(torch.cat(seen[:5]).flatten(), torch.arange(1001.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"training": []}, ValueError, "training must hold at least 4 images, got 0"),
        ({"training": [torch.zeros(3, *SHAPE)]}, ValueError, "at least 4 images, got 3"),
        (
            {"training": [torch.zeros(4, *SHAPE), torch.zeros(4, 1, 2, 4)]},
            ValueError,
            "training must have shape",
        ),
        ({"samples": 1}, ValueError, "samples must be at least 2"),
        ({"teacher_samples": 1}, ValueError, "teacher_samples must be at least 2"),
        ({"teacher": object()}, TypeError, "teacher must be a denoiser"),
        ({"teacher": BrokenTeacher()}, DivergenceError, "generation with teacher, 2 calls"),
    ],
)
def test_bad_arguments_of_generation(change, error, message):
    options = {"training": training(8), "teacher": gaussian(torch.float32), **change}
    teacher, images = options.pop("teacher"), options.pop("training")
    with pytest.raises(error, match=message):
        evaluate_generation(
            Generator(),
            teacher,
            images,
            **{"features": flat_features, "samples": 2, "teacher_steps": 2, **options},
        )


CARD = {
    "image_shape": [3, 32, 32],
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "licence": "research use only",
    "data": "noise",
    "training": {},
    "evaluation": {},
    "weaknesses": "knows nothing",
    "intended_use": "tests",
}
