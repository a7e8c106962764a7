"""High dynamic range from clipped values."""

from collections.abc import Sequence

from torch import Tensor

from ncvsd_inverse.checks import check_images, check_positive
from ncvsd_inverse.operators.base import BaseOperator, check_image_shape

__all__ = ["HDR"]


class HDR(BaseOperator):
    """An exposure that clips what is too dark or too bright, each entry alone.

    y = min(max(scale * x, -1), 1). Not linear. Where |x| < 1/scale, y tells x; a clipped entry
    tells only that scale * x is at least 1, or at most -1, and the gradient there is 0. Noise
    comes after the clipping: noisy measurements can leave [-1, 1].

    Args:
        scale: exposure, > 0; above 1 some of [-1, 1] is clipped.

    Attributes:
        lipschitz: bound on ||A(x) - A(x')|| / ||x - x'||: the scale.

    Raises:
        ValueError: if scale is not positive.

    Source:
        Zhang et al. (DAPS), arXiv 2407.01521, for the task, with scale 2.
    """

    family = "hdr"

    def __init__(self, scale: float = 2.0) -> None:
        self.scale = check_positive("scale", scale)
        self.lipschitz = self.scale

    def __call__(self, x: Tensor) -> Tensor:
        """Return clipped images, shape (B, C, H, W), in [-1, 1]."""
        return (self.scale * check_images("x", x)).clamp(-1, 1)

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return `y_shape`."""
        return check_image_shape("y_shape", y_shape)
