"""Named restoration tasks: operator, noise level, title, and the measurement as a picture."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ncvsd_inverse.checks import Size, check_choice, check_count, check_size
from ncvsd_inverse.operators import (
    HDR,
    Colorize,
    Compose,
    CompressedSensing,
    GaussianBlur,
    Inpaint,
    MaskedFourier,
    MotionBlur,
    PhaseRetrieval,
    Poisson,
    SuperResolution,
)
from ncvsd_inverse.operators.base import BaseOperator
from ncvsd_inverse.protocols import SIGMA_Y

__all__ = ["TYPICAL_MOTION", "Task", "list_tasks", "make_task", "task_title"]

TYPICAL_MOTION = 6
"""Seed of the kernel of seed 0, which covers about as many pixels as the mean of its law does."""


@dataclass(frozen=True)
class Task:
    """A restoration problem.

    Attributes:
        name: one of `list_tasks(all=True)`.
        operator: the forward model A.
        sigma_y: noise std of the measurements, > 0, in units of y.
    """

    name: str
    operator: BaseOperator
    sigma_y: float

    @property
    def title(self) -> str:
        """Its name for readers."""
        return task_title(self.name)

    @property
    def takes_mask(self) -> bool:
        """Whether a mask of the user's may stand in for the named one."""
        return isinstance(self.operator, Inpaint)

    def picture(self, y: Tensor) -> Tensor | None:
        """Return measurements as pictures (B, 1 or 3, h, w) in [-1, 1]; None if they are none.

        Fourier coefficients are shown by the logarithm of their amplitudes, frequency 0 in the
        middle; photon counts are scaled to the largest.
        """
        return _TASKS[self.name].picture(y)


def list_tasks(*, all: bool = False) -> list[str]:
    """Return the names of the tasks that the benchmark runs; `all`: that `make_task` accepts."""
    return [name for name, entry in _TASKS.items() if all or entry.is_benchmarked]


def task_title(name: str) -> str:
    """Return the name of a task for readers; ValueError if there is no such task."""
    check_choice("task", name, _TASKS)
    return _TASKS[name].title


def make_task(name: str, size: Size, *, seed: int = 0) -> Task:
    """Return a named task for images of one size, at sigma_y 0.05 (but for "poisson").

    >>> make_task("sr4x", 64).operator
    SuperResolution(factor=4, filter='bicubic')

    - "inpaint_box": a centred box of half the height and half the width is missing.
    - "inpaint_random": 70% of the pixels are missing.
    - "sr4x": bicubic reduction by 4.
    - "deblur_gaussian", "deblur_motion" (intensity 0.5): circular blur. With s the shorter side,
      the kernel has 2 floor(0.12 s) + 1 pixels a side and the Gaussian std is 1 + s / 128.
    - "phase_retrieval": Fourier amplitudes, padded by half the longer side on every side.

    And, with `list_tasks(all=True)`, with s and the Gaussian kernel as above:

    - "colorize": the grey image (luma) of colours.
    - "hdr": values doubled, then clipped to [-1, 1].
    - "compressed_sensing": half as many random mixtures of all pixels as there are pixels.
    - "mri": a quarter of the columns of Fourier coefficients, 8% around frequency 0 among them.
    - "deblur_sr2x": Gaussian blur, then bicubic reduction by 2.
    - "poisson": photon counts of mean 20 at white, as root counts of sigma_y 1.

    Args:
        name: one of `list_tasks(all=True)`.
        size: height and width of the images, or one side of square ones; pixels, >= 8.
        seed: of the random masks and mixtures and the motion kernel, >= 0.

    Raises:
        ValueError: if the name is unknown or the size too small.
    """
    check_choice("task", name, _TASKS)
    sides = check_size("size", size, least=8)
    operator = _TASKS[name].make(sides, check_count("seed", seed, least=0))
    return Task(name, operator, operator.sigma_y or SIGMA_Y)


def _kernel_size(size: tuple[int, int]) -> int:
    return 2 * int(0.12 * min(size)) + 1


def _gaussian(size: tuple[int, int]) -> GaussianBlur:
    return GaussianBlur(1 + min(size) / 128, _kernel_size(size))


def _as_it_is(y: Tensor) -> Tensor | None:
    return y


def _not_at_all(y: Tensor) -> Tensor | None:
    return None


def _scaled(y: Tensor) -> Tensor | None:
    return 2 * y / y.max() - 1


def _amplitudes(y: Tensor) -> Tensor | None:
    return _scaled(torch.fft.fftshift(torch.log1p(y.clamp(min=0)), dim=(-2, -1)))


def _coefficients(y: Tensor) -> Tensor | None:
    return _amplitudes(torch.linalg.vector_norm(y, dim=-1))


@dataclass(frozen=True)
class _Entry:
    """What is known of a task: its title, its operator by size and seed, its y as a picture."""

    title: str
    make: Callable[[tuple[int, int], int], BaseOperator]
    picture: Callable[[Tensor], Tensor | None] = _as_it_is
    is_benchmarked: bool = True


_TASKS = {
    "inpaint_box": _Entry(
        "Box inpainting", lambda size, seed: Inpaint.box(size, (size[0] // 2, size[1] // 2))
    ),
    "inpaint_random": _Entry(
        "Random inpainting", lambda size, seed: Inpaint.random(size, keep=0.3, seed=seed)
    ),
    "sr4x": _Entry("Super-resolution x4", lambda size, seed: SuperResolution(4)),
    "deblur_gaussian": _Entry("Gaussian deblurring", lambda size, seed: _gaussian(size)),
    "deblur_motion": _Entry(
        "Motion deblurring",
        lambda size, seed: MotionBlur(_kernel_size(size), 0.5, seed=seed + TYPICAL_MOTION),
    ),
    "phase_retrieval": _Entry(
        "Phase retrieval", lambda size, seed: PhaseRetrieval((max(size) + 1) // 2), _amplitudes
    ),
    "colorize": _Entry("Colourisation", lambda size, seed: Colorize(), is_benchmarked=False),
    "hdr": _Entry("High dynamic range", lambda size, seed: HDR(), is_benchmarked=False),
    "compressed_sensing": _Entry(
        "Compressed sensing",
        lambda size, seed: CompressedSensing(size, seed=seed),
        _not_at_all,
        is_benchmarked=False,
    ),
    "mri": _Entry(
        "Magnetic resonance imaging",
        lambda size, seed: MaskedFourier.lines(size, seed=seed),
        _coefficients,
        is_benchmarked=False,
    ),
    "deblur_sr2x": _Entry(
        "Gaussian deblurring with super-resolution x2",
        lambda size, seed: Compose(SuperResolution(2), _gaussian(size)),
        is_benchmarked=False,
    ),
    "poisson": _Entry(
        "Photon counts", lambda size, seed: Poisson(20.0), _scaled, is_benchmarked=False
    ),
}
