"""Plain noise: the image itself is measured."""

from collections.abc import Sequence

from torch import Tensor

from ncvsd_inverse.checks import check_images
from ncvsd_inverse.operators.base import LinearBase, check_image_shape
from ncvsd_inverse.protocols import LinearForm

__all__ = ["Denoise"]


class Denoise(LinearBase):
    """The identity: A = I, so y is the image plus noise."""

    family = "denoise"

    def __call__(self, x: Tensor) -> Tensor:
        """Return x, shape (B, C, H, W)."""
        return check_images("x", x)

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return `y_shape`."""
        return check_image_shape("y_shape", y_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        """Return y, shape (B, C, H, W)."""
        return check_images("y", y)

    def _solve_normal(self, rhs: Tensor, a: float, b: float) -> Tensor:
        return rhs / (a + b)

    def linear_form(self, like: Tensor) -> LinearForm:
        """Return the steps: none."""
        return LinearForm()
