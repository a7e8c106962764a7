"""Named restoration tasks: an operator and its noise level; they must not know any prior."""

from collections.abc import Callable
from dataclasses import dataclass

from ncvsd_inverse.checks import check_choice, check_count
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

SIGMA_Y = 0.05
"""Noise std of every named task whose operator has none of its own, in units of y."""


@dataclass(frozen=True)
class Task:
    """A restoration problem.

    Attributes:
        name: one of `list_tasks()` or `list_more_tasks()`.
        operator: the forward model A.
        sigma_y: noise std of the measurements, > 0, in units of y.
    """

    name: str
    operator: BaseOperator
    sigma_y: float


def list_tasks() -> list[str]:
    """Return the names of the tasks that the benchmark runs."""
    return list(_OPERATORS)


def list_more_tasks() -> list[str]:
    """Return the other names that `make_task` accepts."""
    return list(_MORE_OPERATORS)


def make_task(name: str, size: int | tuple[int, int], *, seed: int = 0) -> Task:
    """Return a named task for images of one size, at sigma_y 0.05 (but for "poisson").

    - "inpaint_box": a centred box of half the height and half the width is missing.
    - "inpaint_random": 70% of the pixels are missing.
    - "sr4x": bicubic reduction by 4.
    - "deblur_gaussian", "deblur_motion" (intensity 0.5): circular blur. With s the shorter side,
      the kernel has 2 floor(0.12 s) + 1 pixels a side and the Gaussian std is 1 + s / 128.
    - "phase_retrieval": Fourier amplitudes, padded by half the longer side on every side.

    And, beside those of `list_tasks()`, with s and the Gaussian kernel as above:

    - "colorize": the grey image (luma) of colours.
    - "hdr": values doubled, then clipped to [-1, 1].
    - "compressed_sensing": half as many random mixtures of all pixels as there are pixels.
    - "mri": a quarter of the columns of Fourier coefficients, 8% around frequency 0 among them.
    - "deblur_sr2x": Gaussian blur, then bicubic reduction by 2.
    - "poisson": photon counts of mean 20 at white, as root counts of sigma_y 1.

    Args:
        name: one of `list_tasks()` or `list_more_tasks()`.
        size: height and width of the images, or one side of square ones; pixels, >= 8.
        seed: of the random masks and mixtures and the motion kernel, >= 0.

    Raises:
        ValueError: if the name is unknown or the size too small.
    """
    makers = _OPERATORS | _MORE_OPERATORS
    check_choice("task", name, makers)
    height, width = (size, size) if isinstance(size, int) else size
    for side in (height, width):
        check_count("size", side, least=8)
    check_count("seed", seed, least=0)
    operator = makers[name]((height, width), seed)
    return Task(name, operator, getattr(operator, "sigma_y", None) or SIGMA_Y)


def _kernel_size(size: tuple[int, int]) -> int:
    return 2 * int(0.12 * min(size)) + 1


def _gaussian(size: tuple[int, int]) -> GaussianBlur:
    return GaussianBlur(1 + min(size) / 128, _kernel_size(size))


_OPERATORS: dict[str, Callable[[tuple[int, int], int], BaseOperator]] = {
    "inpaint_box": lambda size, seed: Inpaint.box(size, (size[0] // 2, size[1] // 2)),
    "inpaint_random": lambda size, seed: Inpaint.random(size, keep=0.3, seed=seed),
    "sr4x": lambda size, seed: SuperResolution(4),
    "deblur_gaussian": lambda size, seed: _gaussian(size),
    "deblur_motion": lambda size, seed: MotionBlur(_kernel_size(size), 0.5, seed=seed),
    "phase_retrieval": lambda size, seed: PhaseRetrieval((max(size) + 1) // 2),
}

_MORE_OPERATORS: dict[str, Callable[[tuple[int, int], int], BaseOperator]] = {
    "colorize": lambda size, seed: Colorize(),
    "hdr": lambda size, seed: HDR(),
    "compressed_sensing": lambda size, seed: CompressedSensing(size, seed=seed),
    "mri": lambda size, seed: MaskedFourier.lines(size, seed=seed),
    "deblur_sr2x": lambda size, seed: Compose(SuperResolution(2), _gaussian(size)),
    "poisson": lambda size, seed: Poisson(20.0),
}
