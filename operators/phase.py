"""Phase retrieval; it must not know any prior or sampler."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_count, check_images
from ncvsd_inverse.numerics import working_dtype
from ncvsd_inverse.operators.base import BaseOperator, check_image_shape


class PhaseRetrieval(BaseOperator):
    """The amplitude of the Fourier transform of the zero-padded image, each channel alone.

    y = |F P (x + 1)/2|: P pads with `pad` zeros on every side and F is the orthonormal 2-D
    Fourier transform. Not linear. Shifts and turns by 180 degrees of (x + 1)/2 inside the padded
    frame leave y unchanged, as does its sign (which [-1, 1] excludes), so the posterior has
    several modes.

    Args:
        pad: zeros on every side, pixels, >= 0; at least half the image separates most images
            from all others but the ambiguities above.

    Raises:
        ValueError: if pad < 0.
    """

    family = "phase_retrieval"

    lipschitz = 0.5
    """Bound on ||A(x) - A(x')|| / ||x - x'||: F and P keep norms, (x + 1)/2 halves them."""

    def __init__(self, pad: int) -> None:
        self.pad = check_count("pad", pad, least=0)

    def __call__(self, x: Tensor) -> Tensor:
        """Return amplitudes, shape (B, C, H + 2 pad, W + 2 pad), all >= 0."""
        check_images("x", x)
        unit = (x.to(working_dtype(x.dtype)) + 1) / 2
        padded = torch.nn.functional.pad(unit, (self.pad,) * 4)
        amplitude: Tensor = torch.fft.fft2(padded, norm="ortho").abs()
        return amplitude.to(x.dtype)

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (B, C, H, W) for measurements (B, C, H + 2 pad, W + 2 pad)."""
        batch, channels, height, width = check_image_shape("y_shape", y_shape)
        if min(height, width) <= 2 * self.pad:
            raise ValueError(
                f"y_shape must exceed twice pad = {self.pad} in height and width, "
                f"got {tuple(y_shape)}"
            )
        return batch, channels, height - 2 * self.pad, width - 2 * self.pad
