"""Photon counts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_images, check_positive
from ncvsd_inverse.numerics import check_generator, working_dtype
from ncvsd_inverse.operators.base import BaseOperator, check_image_shape
from ncvsd_inverse.protocols import Generators

__all__ = ["Poisson"]


class Poisson(BaseOperator):
    """Count photons in each entry alone, as root counts whose noise has about the std 1.

    The count k of an entry x is a Poisson number of mean r = peak (x + 1)/2. With

        y = 2 sqrt(k + 3/8)    and    A(x) = 2 sqrt(r + 1/8 + exp(-5 r / 4) / 4),

    A(x) is the mean of y, to 0.0011 at any r, and the std of y - A(x) tends to 1 with growing r:
    it is 0.85 at r = 1, 0.96 at 2 and 1 to 0.01 from 3 on. So the Gaussian likelihood of y with
    sigma_y = 1 stands for that of k. Not linear. For x < -1 A continues along its tangent at -1,
    so that a gradient leads back.

    The error of that likelihood, for one pixel with a Gaussian prior of mean 0 and std 0.5 on
    [-1, 1] and peaks of 5, 20 and 100: posterior means are off by 0.059, 0.029 and 0.006 posterior
    stds (root mean square over counts), posterior stds by factors of 1.02, 1.00 and 1.00.

    Counts of what another operator makes of x are `Compose(Poisson(peak), operator)`: r is then
    peak (operator(x) + 1)/2.

    Args:
        peak: mean count at x = 1 (white), > 0; at x = -1 (black) it is 0.

    Attributes:
        sigma_y: 1.0, the noise std of y.

    Raises:
        ValueError: if peak is not positive.

    Source:
        Anscombe, Biometrika 35 (1948), for y; Makitalo & Foi, IEEE Trans. Image Processing 20
        (2011), for taking its mean, not 2 sqrt(r + 3/8); this formula of the mean is fitted here.
    """

    family = "poisson"

    sigma_y = 1.0

    def __init__(self, peak: float) -> None:
        self.peak = check_positive("peak", peak)
        self.gain = math.sqrt(self.peak / 2)  # slope at mid-grey

    def __call__(self, x: Tensor) -> Tensor:
        """Return mean root counts, shape (B, C, H, W); at least sqrt(3/2) on [-1, 1]."""
        rate = self._rate(x)
        real = rate.clamp(min=0)
        mean = 2 * (real + 1 / 8 + (-5 / 4 * real).exp() / 4).sqrt()
        slope = (1 - 5 / 16) / math.sqrt(3 / 8)
        return (mean + slope * (rate - real)).to(x.dtype)

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return `y_shape`."""
        return check_image_shape("y_shape", y_shape)

    def stabilise(self, counts: Tensor) -> Tensor:
        """Return y = 2 sqrt(counts + 3/8) for counts >= 0 of a camera, shape (B, C, H, W)."""
        check_images("counts", counts)
        if not bool((counts >= 0).all()):
            raise ValueError(f"counts must be at least 0, got {float(counts.min())}")
        return 2 * (counts + 3 / 8).sqrt()

    def measure(self, x: Tensor, sigma_y: float = 1.0, *, generator: Generators = None) -> Tensor:
        """Draw counts and return their y, shape (B, C, H, W).

        Args:
            x: images, shape (B, C, H, W), in [-1, 1]; below -1 nothing is counted.
            sigma_y: 1, as photons alone make the noise.
            generator: one source of randomness, or one for each of the B images.

        Raises:
            ValueError: if sigma_y is not 1 or the number of generators is not B.
        """
        if sigma_y != 1:
            raise ValueError(f"sigma_y must be 1 for photon counts (see peak), got {sigma_y}")
        rate = self._rate(x).clamp(min=0)
        check_generator(generator, rate)
        if generator is None or isinstance(generator, torch.Generator):
            counts = torch.poisson(rate, generator=generator)
        else:
            pairs = zip(rate, generator, strict=True)
            counts = torch.stack([torch.poisson(image, generator=own) for image, own in pairs])
        return self.stabilise(counts).to(x.dtype)

    def _rate(self, x: Tensor) -> Tensor:
        """Return the mean counts of x, at the precision of sums; negative below x = -1."""
        return self.peak * (check_images("x", x).to(working_dtype(x.dtype)) + 1) / 2
