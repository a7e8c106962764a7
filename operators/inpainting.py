"""Missing pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ncvsd_inverse.checks import (
    Size,
    check_count,
    check_finite,
    check_images,
    check_share,
    check_size,
)
from ncvsd_inverse.machine import Cache
from ncvsd_inverse.numerics import working_dtype
from ncvsd_inverse.operators.base import LinearBase, check_broadcasts, check_image_shape
from ncvsd_inverse.protocols import LinearForm

__all__ = ["Inpaint"]


class Inpaint(LinearBase):
    """Measure the pixels where the mask is 1.

    A = diag(mask): y has the shape of the image and is 0 where nothing is measured.

    >>> operator = Inpaint(torch.tensor([[True, False], [True, True]]))
    >>> operator(torch.ones(1, 1, 2, 2))
    tensor([[[[1., 0.],
              [1., 1.]]]])

    Args:
        mask: boolean, or 0 and 1; shape (H, W), (1 or C, H, W) or (1 or B, 1 or C, H, W). It is
            copied.

    Raises:
        TypeError: if mask is no real tensor.
        ValueError: if mask has another shape, holds anything but 0 and 1, or measures nothing.
    """

    family = "inpainting"

    def __init__(self, mask: Tensor) -> None:
        if not isinstance(mask, Tensor) or mask.is_complex():
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a boolean or real tensor, got {got}")
        if mask.ndim not in (2, 3, 4) or 0 in mask.shape:
            raise ValueError(
                "mask must have shape (H, W), (1 or C, H, W) or (1 or B, 1 or C, H, W), "
                f"got {tuple(mask.shape)}"
            )
        check_finite("mask", mask)
        if not bool(((mask == 0) | (mask == 1)).all()):
            low, high = float(mask.min()), float(mask.max())
            raise ValueError(f"mask must hold only 0 and 1, got values from {low} to {high}")
        self.mask = mask.detach().clone().bool().reshape(*[1] * (4 - mask.ndim), *mask.shape)
        if not bool(self.mask.flatten(1).any(dim=1).all()):
            raise ValueError("mask must measure at least one pixel of each image, got all zeros")
        self._placed: Cache[Tensor] = Cache()

    @classmethod
    def box(cls, size: Size, side: Size) -> "Inpaint":
        """Hide a centred box.

        Args:
            size: height and width of the images, or one side of square ones, pixels.
            side: side of the hidden square, or height and width of the hidden box, pixels.
        """
        height, width = check_size("size", size)
        box_height, box_width = check_size("side", side)
        if box_height > height or box_width > width:
            raise ValueError(f"side must be at most {height, width}, got {box_height, box_width}")
        top, left = (height - box_height) // 2, (width - box_width) // 2
        mask = torch.ones(height, width, dtype=torch.bool)
        mask[top : top + box_height, left : left + box_width] = False
        return cls(mask)

    @classmethod
    def random(cls, size: Size, keep: float = 0.3, seed: int = 0) -> "Inpaint":
        """Measure each pixel (all its channels) with probability `keep`.

        Args:
            size: height and width of the images, or one side of square ones, pixels.
            keep: probability of being measured, in (0, 1].
            seed: the same seed gives the same mask, >= 0.
        """
        keep = check_share("keep", keep)
        generator = torch.Generator().manual_seed(check_count("seed", seed, least=0))
        draws = torch.rand(check_size("size", size), generator=generator, dtype=torch.float32)
        return cls(draws < keep)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x where it is measured and 0 elsewhere, shape (B, C, H, W)."""
        return x * self._mask_for("x", x)

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return `y_shape`."""
        return check_image_shape("y_shape", y_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        """Return y where it is measured and 0 elsewhere, shape (B, C, H, W)."""
        return y * self._mask_for("y", y)

    def measured(self, y: Tensor) -> Tensor:
        """Return y with 0 where the mask is 0, whatever is there, shape (B, C, H, W)."""
        return y.where(self._mask_for("y", y) != 0, 0)

    def repeated(self, times: int) -> "Inpaint":
        """Return the operator for a batch that is tiled `times` times along dimension 0."""
        times = check_count("times", times)
        return self if self.mask.shape[0] == 1 else Inpaint(self.mask.repeat(times, 1, 1, 1))

    def _solve_normal(self, rhs: Tensor, a: float, b: float) -> Tensor:
        mask = self._mask_for("rhs", rhs).to(working_dtype(rhs.dtype))
        return (rhs / (a * mask + b)).to(rhs.dtype)

    @property
    def is_diagonal(self) -> bool:
        """True: A^T A is the mask."""
        return True

    def solve_normal_spread(self, rhs: Tensor, eps: Tensor, *, a: float, b: float) -> Tensor:
        """Return M^-1 rhs + M^(-1/2) eps for M = a A^T A + b I, shape (B, C, H, W)."""
        mask = self._mask_for("rhs", rhs).to(working_dtype(rhs.dtype))
        scale = (a * mask + b).rsqrt()
        return ((rhs * scale + eps) * scale).to(rhs.dtype)

    def linear_form(self, like: Tensor) -> LinearForm:
        """Return the steps for images `like` (B, C, H, W): the mask."""
        return LinearForm(mask=self.mask.to(like.device))

    def _mask_for(self, name: str, images: Tensor) -> Tensor:
        """Return the mask in the dtype and device of `images`, once they fit it."""
        check_images(name, images)
        if images.shape[-2:] != self.mask.shape[-2:]:
            raise ValueError(
                f"{name} must have the height and width of mask, {tuple(self.mask.shape[-2:])}, "
                f"got {tuple(images.shape[-2:])}"
            )
        check_broadcasts("mask", self.mask, name, images)
        key = images.dtype, images.device
        return self._placed.get(key, lambda: self.mask.to(images))
