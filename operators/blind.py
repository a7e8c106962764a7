"""Blurs whose kernel is not known."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_choice, check_count
from ncvsd_inverse.operators.base import check_image_shape
from ncvsd_inverse.operators.blur import Blur, Boundary
from ncvsd_inverse.protocols import KernelFamily

__all__ = ["FAMILIES", "BlindBlur", "KernelPrior"]

KernelPrior: TypeAlias = Literal["smooth", "gaussian", "defocus", "motion"]


class BlindBlur:
    """A blur with an unknown kernel, which `solve` finds together with the image.

    It stands for `Blur(kernel, boundary)` with an odd square kernel of sum 1 and no negative
    weight, the same for all channels. What is known of the kernel is its law:

    - "smooth": any kernel, the more likely the smaller the squared differences of neighbours are
      beside its squares;
    - "gaussian": a Gaussian of unknown std;
    - "defocus": a disc of unknown radius;
    - "motion": a straight line of unknown length and angle.

    Kernel and image can move against each other; kernels are centred, so that the picture stays
    where it is in y.

    Args:
        kernel_size: side of the kernel, pixels, odd, >= 3; the kernel must fit into it.
        boundary: see `Blur`; "replicate" or "valid" for a photograph.
        prior: the law of the kernel.

    Raises:
        ValueError: if an argument is out of range.
    """

    sigma_y: float | None = None
    """Noise std of the measurements, as for other operators: not known."""

    def __init__(
        self,
        kernel_size: int,
        boundary: Boundary = "circular",
        prior: KernelPrior = "smooth",
    ) -> None:
        self.kernel_size = check_count("kernel_size", kernel_size, least=3)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        check_choice("boundary", boundary, get_args(Boundary))
        check_choice("prior", prior, get_args(KernelPrior))
        self.boundary: Boundary = boundary
        self.prior: KernelPrior = prior

    def __repr__(self) -> str:
        given = f"{self.kernel_size}, boundary={self.boundary!r}, prior={self.prior!r}"
        return f"BlindBlur({given})"

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (B, C, H, W) of the images that give measurements of `y_shape`."""
        batch, channels, height, width = check_image_shape("y_shape", y_shape)
        more = self.kernel_size - 1 if self.boundary == "valid" else 0
        return batch, channels, height + more, width + more

    def with_kernel(self, kernel: Tensor) -> Blur:
        """Return the blur with a kernel, shape (kh, kw) or as `Blur` takes it."""
        return Blur(kernel, self.boundary)

    @property
    def family(self) -> KernelFamily | None:
        """The kernels that it may have; None: any."""
        return FAMILIES.get(self.prior)


def _places(size: int) -> tuple[Tensor, Tensor]:
    """Return row and column of each weight, from the centre."""
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    return axis[:, None], axis[None]


def _gaussian(numbers: Sequence[float], size: int) -> Tensor:
    rows, columns = _places(size)
    weights = torch.exp(-0.5 * (rows**2 + columns**2) / numbers[0] ** 2)
    return weights / weights.sum()


def _disc(numbers: Sequence[float], size: int) -> Tensor:
    rows, columns = _places(size)
    weights = (numbers[0] + 0.5 - (rows**2 + columns**2).sqrt()).clamp(0, 1)
    return weights / weights.sum()


def _line(numbers: Sequence[float], size: int) -> Tensor:
    length, degrees = numbers
    rows, columns = _places(size)
    down, right = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    along, across = columns * right - rows * down, columns * down + rows * right
    beyond = (along.abs() - (length - 1) / 2).clamp(min=0)
    weights = (1 - (beyond**2 + across**2).sqrt()).clamp(min=0)
    return weights / weights.sum()


FAMILIES: Mapping[str, KernelFamily] = {
    "gaussian": KernelFamily(
        ("std in pixels",), (math.inf,), lambda size: ((0.3, size / 4),), _gaussian
    ),
    "defocus": KernelFamily(
        ("radius in pixels",), (math.inf,), lambda size: ((0.3, size / 2),), _disc
    ),
    "motion": KernelFamily(
        ("length in pixels", "angle in degrees"),
        (math.inf, 180.0),
        lambda size: ((1.0, float(size)), (0.0, 180.0)),
        _line,
    ),
}
"""Families of kernels by the name of their law; angles are those of a plane, against the clock."""
