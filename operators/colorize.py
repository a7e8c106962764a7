"""Colourisation: the grey image is measured."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_choice, check_image_size, check_images
from ncvsd_inverse.numerics import working_dtype
from ncvsd_inverse.operators.base import LinearBase, check_image_shape
from ncvsd_inverse.protocols import LinearForm

__all__ = ["Colorize"]

Grey = Literal["luma", "mean"]

WEIGHTS: dict[Grey, tuple[float, float, float]] = {
    "luma": (0.299, 0.587, 0.114),
    "mean": (1 / 3, 1 / 3, 1 / 3),
}
"""Weights of red, green and blue; their sum is 1, so grey values stay in [-1, 1]."""


class Colorize(LinearBase):
    """Measure a grey image: one mixture of the three colours at each pixel.

    y = sum_c w[c] x[c], that is A = w^T (x) I (Kronecker product) with w the weights of red, green
    and blue, so A A^T = |w|^2 I. A^T A = w w^T (x) I has the eigenvalue |w|^2 along w and 0 across
    it; `solve_normal` divides these two parts by their own eigenvalue.

    Args:
        grey: "luma" takes (0.299, 0.587, 0.114), for gamma-coded colours as in picture files;
            "mean" takes 1/3 of each.

    Raises:
        ValueError: if `grey` is unknown or (on use) the images have not three channels.

    Source:
        ITU-R Recommendation BT.601 for "luma".
    """

    family = "colorization"

    def __init__(self, grey: Grey = "luma") -> None:
        check_choice("grey", grey, get_args(Grey))
        self.grey: Grey = grey
        self.weights = WEIGHTS[grey]
        self._squared_norm = math.fsum(weight * weight for weight in self.weights)

    def __call__(self, x: Tensor) -> Tensor:
        """Return grey images, shape (B, 1, H, W)."""
        check_image_size("x", check_images("x", x).shape[1:], channels=3)
        return self._mix(x.to(working_dtype(x.dtype))).to(x.dtype)

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (B, 3, H, W) for measurements (B, 1, H, W)."""
        batch, channels, height, width = check_image_shape("y_shape", y_shape)
        check_image_size("y_shape", (channels, height, width), channels=1)
        return batch, 3, height, width

    def adjoint(self, y: Tensor) -> Tensor:
        """Return w y, shape (B, 3, H, W)."""
        check_image_size("y", check_images("y", y).shape[1:], channels=1)
        return self._spread(y.to(working_dtype(y.dtype))).to(y.dtype)

    def _solve_normal(self, rhs: Tensor, a: float, b: float) -> Tensor:
        along, across = self._split("rhs", rhs)
        return (along / (a * self._squared_norm + b) + across / b).to(rhs.dtype)

    @property
    def is_diagonal(self) -> bool:
        """True: A^T A is diagonal in colours of which one is grey."""
        return True

    def solve_normal_spread(self, rhs: Tensor, eps: Tensor, *, a: float, b: float) -> Tensor:
        """Return M^-1 rhs + M^(-1/2) eps for M = a A^T A + b I, shape (B, 3, H, W)."""
        along, across = self._split("rhs", rhs)
        along_eps, across_eps = self._split("eps", eps)
        seen, hidden = math.sqrt(a * self._squared_norm + b), math.sqrt(b)
        drawn = (along / seen + along_eps) / seen + (across / hidden + across_eps) / hidden
        return drawn.to(rhs.dtype)

    def linear_form(self, like: Tensor) -> LinearForm:
        """Return the steps for images `like` (B, 3, H, W): the mixture."""
        return LinearForm(weights=like.new_tensor(self.weights))

    def _split(self, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the parts of colours (B, 3, H, W) along the weights and across them."""
        check_image_size(name, images.shape[1:], channels=3)
        working = images.to(working_dtype(images.dtype))
        along = self._spread(self._mix(working)) / self._squared_norm
        return along, working - along

    def _mix(self, x: Tensor) -> Tensor:
        red, green, blue = (w * x[:, c : c + 1] for c, w in enumerate(self.weights))
        return red + green + blue

    def _spread(self, y: Tensor) -> Tensor:
        return torch.cat([weight * y for weight in self.weights], dim=1)
