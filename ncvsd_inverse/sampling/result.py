"""What `solve` returns."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from ncvsd_inverse.sampling.chains import Method

__all__ = ["Estimate", "Result"]

Estimate: TypeAlias = Literal["sample", "mean", "ema"]


@dataclass(frozen=True, eq=False)
class Result:
    """Restored images. S is num_samples and B the number of measurements.

    Attributes:
        x0: the estimate, shape (B, C, H, W): the first sample, the mean of the samples, or the
            average along the first chain, as `estimate` asked.
        samples: end of every chain, shape (S, B, C, H, W).
        mean: mean of the samples, shape (B, C, H, W).
        std: standard deviation of the samples (divisor S - 1), shape (B, C, H, W); None if S = 1.
        nfe: network forward passes for each returned sample, restarts included, as counted.
        seconds: wall time of the sampling.
        residual: ||y - A x0|| / (sigma_y sqrt(number of measured entries)) of the estimate, shape
            (B,); about 1 when sigma_y is the noise level of y.
        schedule: the levels of rho that ran, largest first, image units.
        sigma_lik: noise std that was assumed, units of y.
        method: the loop that ran.
        converged: whether every linear solve ended within 0.1 of the std of what it conditions.
    """

    x0: Tensor
    samples: Tensor
    mean: Tensor
    std: Tensor | None
    nfe: int
    seconds: float
    residual: Tensor
    schedule: tuple[float, ...]
    sigma_lik: float
    method: Method
    converged: bool
