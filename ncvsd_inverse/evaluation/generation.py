"""Fréchet distances of generated images to the training images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_count, check_images, check_shape
from ncvsd_inverse.evaluation.draws import (
    GENERATION,
    HALVES,
    check_sound,
    check_teacher,
    reverse_diffusion,
)
from ncvsd_inverse.machine import track
from ncvsd_inverse.numerics import Moments, frechet_distance, make_generators
from ncvsd_inverse.protocols import Denoiser

__all__ = ["BLOCK", "Generating", "Generation", "GenerationFigure", "evaluate_generation"]

GENERATION_CALLS = 35
"""Network calls of each image that a teacher generates for comparison."""

BLOCK = 256
"""Images that are generated with one seed and held at a time."""


class Generating(Protocol):
    """A prior that draws images from noise alone in 1, 2 or 4 network calls."""

    def generate(
        self,
        num: int,
        num_steps: Literal[1, 2, 4] = 4,
        seed: int = 0,
        *,
        size: Sequence[int] | None = None,
        batch_size: int = 16,
    ) -> Tensor:
        """Draw images of `size` (H, W), shape (num, C, H, W)."""
        ...


@dataclass(frozen=True)
class GenerationFigure:
    """How far one set of images is from another.

    Attributes:
        name: what the images are.
        images: how many there are.
        reference: how many they are held against.
        distance: Fréchet distance of their features.
    """

    name: str
    images: int
    reference: int
    distance: float


@dataclass(frozen=True)
class Generation:
    """Fréchet distances of generated images, and of the training images among themselves.

    Attributes:
        figures: one of 1, 2 and 4 calls and of the teacher, each against all training images;
            then that of one half of the training images against the other.
        seed: of the noise and of the halves.
    """

    figures: tuple[GenerationFigure, ...]
    seed: int

    def to_dict(self) -> dict[str, object]:
        """Return all of it as what JSON can hold."""
        return asdict(self)


@torch.no_grad()
def evaluate_generation(
    prior: Generating,
    teacher: Denoiser,
    training: Iterable[Tensor],
    *,
    features: Callable[[Tensor], Tensor],
    samples: int = 10_000,
    teacher_samples: int | None = None,
    teacher_steps: int = GENERATION_CALLS,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> Generation:
    """Measure the Fréchet distance of generated images to the training images.

    Sums of the features are kept, and at most 256 images at a time. The fewer the images, the
    larger is the distance by chance: hold like numbers against each other. How far real images
    are apart is told by two random halves of the training images.

    Args:
        prior: generates in 1, 2 and 4 calls.
        teacher: the denoiser that it was distilled from; generates by its probability-flow ODE.
        training: batches of training images, each of shape (B, C, H, W), in [-1, 1], at least 4
            images in all; gone through once. Each batch is cut into random halves.
        features: images (B, C, H, W) -> features (B, D); with `metrics.alex_features` the
            distance is FD-alex.
        samples: images that the prior generates with each number of calls, >= 2.
        teacher_samples: images that the teacher generates, >= 2; None: `samples`.
        teacher_steps: denoiser calls of each of these, >= 2.
        seed: >= 0. The images do not depend on `batch_size`, except by rounding.
        batch_size: images that pass through a network at a time, >= 1.
        progress: show a bar on standard error for each set of images.

    Returns:
        The distances.

    Raises:
        ValueError: if an argument is out of range, or the images do not fit prior or teacher.
        TypeError: if `teacher` cannot denoise.
        DivergenceError: if a generated image is not finite.
    """
    teacher_samples = samples if teacher_samples is None else teacher_samples
    samples = check_count("samples", samples, least=2)
    teacher_samples = check_count("teacher_samples", teacher_samples, least=2)
    seed = check_count("seed", seed, least=0)
    batch_size = check_count("batch_size", batch_size)
    check_teacher(teacher)

    shape, halves = _training_halves(training, features, seed, progress)
    diffusion = reverse_diffusion(teacher, teacher_steps, shape)
    whole, size = halves[0] + halves[1], shape[1:]

    def held_against_training(
        name: str, num: int, generate: Callable[[int, int], Tensor]
    ) -> GenerationFigure:
        moments = Moments.none()
        blocks = _generated(generate, num, seed)
        for block in track(blocks, name, total=-(-num // BLOCK), shown=progress):
            check_sound(f"generation with {name}", block)
            moments += Moments.of(features(block))
        return GenerationFigure(name, num, whole.count, frechet_distance(moments, whole))

    def by_prior(num_steps: Literal[1, 2, 4]) -> Callable[[int, int], Tensor]:
        return lambda num, key: prior.generate(
            num, num_steps, key, size=size, batch_size=batch_size
        )

    def by_teacher(num: int, key: int) -> Tensor:
        return diffusion.generate(num, teacher_steps, key, size=size, batch_size=batch_size)

    return Generation(
        figures=(
            held_against_training("1 call", samples, by_prior(1)),
            held_against_training("2 calls", samples, by_prior(2)),
            held_against_training("4 calls", samples, by_prior(4)),
            held_against_training(f"teacher, {teacher_steps} calls", teacher_samples, by_teacher),
            GenerationFigure(
                "half of the training images, to the other half",
                halves[0].count,
                halves[1].count,
                frechet_distance(*halves),
            ),
        ),
        seed=seed,
    )


def _training_halves(
    training: Iterable[Tensor], features: Callable[[Tensor], Tensor], seed: int, progress: bool
) -> tuple[tuple[int, ...], tuple[Moments, Moments]]:
    """Return the shape (C, H, W) of the images and the moments of two random halves."""
    shape: tuple[int, ...] | None = None
    first, second = Moments.none(), Moments.none()
    for number, batch in enumerate(track(training, "batches of training images", shown=progress)):
        check_images("training", batch)
        shape = shape or tuple(batch.shape[1:])
        check_shape("training", batch, (len(batch), *shape))
        (source,) = make_generators([(seed, HALVES, number)])
        rows = features(batch)[torch.randperm(len(batch), generator=source)]
        # An odd batch gives its extra image to the half that is behind.
        cut = (len(batch) + (first.count <= second.count)) // 2
        first, second = first + Moments.of(rows[:cut]), second + Moments.of(rows[cut:])
    if shape is None or second.count < 2:
        raise ValueError(f"training must hold at least 4 images, got {first.count + second.count}")
    return shape, (first, second)


def _generated(generate: Callable[[int, int], Tensor], num: int, seed: int) -> Iterator[Tensor]:
    """Yield `num` images in blocks; `generate` takes a number of images and a seed."""
    for number, first in enumerate(range(0, num, BLOCK)):
        (source,) = make_generators([(seed, GENERATION, number)])
        yield generate(min(BLOCK, num - first), source.initial_seed())
