"""Magnetic resonance imaging: some spatial frequencies."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ncvsd_inverse.checks import (
    Size,
    check_count,
    check_finite,
    check_floating,
    check_images,
    check_non_negative,
    check_positive,
    check_size,
)
from ncvsd_inverse.machine import Cache
from ncvsd_inverse.numerics import working_dtype
from ncvsd_inverse.operators.base import LinearBase
from ncvsd_inverse.protocols import LinearForm

__all__ = ["MaskedFourier"]


class MaskedFourier(LinearBase):
    """Measure the Fourier coefficients of each channel where the mask is 1.

    y = diag(mask) F x, kept as real numbers: y[..., 0] is the real and y[..., 1] the imaginary
    part and A stacks diag(mask) Re F on diag(mask) Im F. F is the orthonormal 2-D Fourier
    transform, F[k, l; i, j] = exp(-2 pi i (k i / H + l j / W)) / sqrt(H W), frequency 0 first;
    y is 0 where nothing is measured. Complex y, shape (B, C, H, W), is taken wherever y is.

    Centred, frequency 0 lies at row H // 2 and column W // 2 of y and mask: y = diag(mask) S F x
    with the permutation S of `torch.fft.fftshift`, so row k is that of frequency k - H // 2. The
    origin of x stays at its first pixel. fastMRI has it at pixel (H // 2, W // 2), which changes
    phases only: frequency (k, l) of its y times exp(-2 pi i (k (H // 2) / H + l (W // 2) / W)) is
    that of ours.

    Images are real, so a coefficient is the conjugate of the one at the negative frequency, and
    A^T A = F^H diag(s) F with s(k) = (mask(k) + mask(-k)) / 2: a pair of which one is measured
    counts half. `solve_normal` divides by a s + b in Fourier space. Both parts of a kept
    coefficient are measured and carry noise of std sigma_y each, also the imaginary parts (of
    frequency 0, say) that are 0 for every image.

    >>> operator = MaskedFourier.lines((64, 64), acceleration=4)
    >>> operator(torch.zeros(1, 1, 64, 64)).shape
    torch.Size([1, 1, 64, 64, 2])

    Args:
        mask: kept frequencies, boolean, or 0 and 1; shape (H, W), in the layout of y. It is
            copied.
        centred: whether frequency 0 is in the middle; False: first, as in `torch.fft.fft2`.

    Raises:
        TypeError: if mask is no real tensor.
        ValueError: if mask has another shape, holds anything but 0 and 1, or measures nothing.
    """

    family = "masked_fourier"

    takes_complex = True
    """Complex numbers may stand for pairs of real and imaginary part."""

    def __init__(self, mask: Tensor, centred: bool = False) -> None:
        if not isinstance(mask, Tensor) or mask.is_complex():
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a boolean or real tensor, got {got}")
        if mask.ndim != 2 or 0 in mask.shape:
            raise ValueError(f"mask must have shape (H, W), got {tuple(mask.shape)}")
        check_finite("mask", mask)
        if not bool(((mask == 0) | (mask == 1)).all()):
            low, high = float(mask.min()), float(mask.max())
            raise ValueError(f"mask must hold only 0 and 1, got values from {low} to {high}")
        self.mask = mask.detach().clone().bool()
        self.centred = centred
        self._num_kept = int(self.mask.count_nonzero())
        if self._num_kept == 0:
            raise ValueError("mask must measure at least one frequency, got all zeros")
        self._tables: Cache[tuple[Tensor, Tensor]] = Cache()

    @classmethod
    def lines(
        cls,
        size: Size,
        acceleration: float = 4.0,
        centre_fraction: float = 0.08,
        seed: int = 0,
        centred: bool = False,
    ) -> "MaskedFourier":
        """Measure whole columns of frequencies: all the lowest ones and some others at random.

        round(W / acceleration) columns are kept (at least 1): the round(centre_fraction * W)
        nearest to horizontal frequency 0, and others that are equally probable.

        Args:
            size: height H and width W of the images, or one side of square ones, pixels.
            acceleration: how many times fewer columns than W are kept, >= 1.
            centre_fraction: share of the W columns kept around frequency 0, in
                [0, 1 / acceleration].
            seed: the same seed gives the same frequencies, >= 0.
            centred: the layout of y, see above.

        Raises:
            ValueError: if an argument is out of range.

        Source:
            Zbontar et al. (fastMRI), arXiv 1811.08839, with a fixed number of columns where they
            draw each one by itself.
        """
        height, width = check_size("size", size)
        acceleration = check_positive("acceleration", acceleration)
        if not 1 <= acceleration <= width:
            raise ValueError(f"acceleration must be in [1, {width}], got {acceleration}")
        total = max(1, round(width / acceleration))
        centre = round(check_non_negative("centre_fraction", centre_fraction) * width)
        if centre > total:
            raise ValueError(
                f"centre_fraction must be at most 1 / acceleration = {1 / acceleration:g}, "
                f"got {centre_fraction}"
            )
        generator = torch.Generator().manual_seed(check_count("seed", seed, least=0))
        columns = torch.arange(-(centre // 2), width - centre // 2) % width
        others = centre + torch.randperm(width - centre, generator=generator)[: total - centre]
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[:, columns[:centre]] = True
        mask[:, columns[others]] = True
        return cls(torch.fft.fftshift(mask) if centred else mask, centred)

    def __call__(self, x: Tensor) -> Tensor:
        """Return coefficients, 0 where not measured, shape (B, C, H, W, 2)."""
        self._check_sides("x", check_images("x", x).shape)
        mask, _ = self._on(x)
        spectrum = torch.fft.fft2(x.to(mask.dtype), norm="ortho")
        if self.centred:
            spectrum = torch.fft.fftshift(spectrum, dim=(-2, -1))
        return (torch.view_as_real(spectrum) * mask).to(x.dtype)

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (B, C, H, W) for measurements (B, C, H, W, 2), or complex ones (B, C, H, W)."""
        if len(y_shape) not in (4, 5) or tuple(y_shape[4:]) not in ((), (2,)) or min(y_shape) < 1:
            raise ValueError(
                "y_shape must be (B, C, H, W, 2), or (B, C, H, W) of complex numbers, all at "
                f"least 1, got {tuple(y_shape)}"
            )
        self._check_sides("y_shape", y_shape)
        return tuple(int(size) for size in y_shape[:4])

    def adjoint(self, y: Tensor) -> Tensor:
        """Return the real part of F^H S^T diag(mask) y, shape (B, C, H, W); S = I if not centred.

        Args:
            y: shape (B, C, H, W, 2), or complex, shape (B, C, H, W).
        """
        pairs = self._pairs(y)
        mask, _ = self._on(pairs)
        real, imaginary = (pairs.to(mask.dtype) * mask).unbind(dim=4)
        spectrum = torch.complex(real, imaginary)
        if self.centred:
            spectrum = torch.fft.ifftshift(spectrum, dim=(-2, -1))
        waves: Tensor = torch.fft.ifft2(spectrum, norm="ortho")
        return waves.real.to(pairs.dtype)

    def measured(self, y: Tensor) -> Tensor:
        """Return y with 0 where the mask is 0, whatever is there, shape (B, C, H, W, 2)."""
        pairs = self._pairs(y)
        return pairs.where(self._on(pairs)[0] != 0, 0)

    def count_measured(self, y: Tensor) -> Tensor:
        """Return how many entries of each measurement are measured, integers of shape (B,)."""
        return torch.full((y.shape[0],), 2 * y.shape[1] * self._num_kept, device=y.device)

    def _solve_normal(self, rhs: Tensor, a: float, b: float) -> Tensor:
        self._check_sides("rhs", rhs.shape)
        _, share = self._on(rhs)
        spectrum = torch.fft.rfft2(rhs.to(share.dtype)) / (a * share + b)
        solution: Tensor = torch.fft.irfft2(spectrum, s=rhs.shape[-2:])
        return solution.to(rhs.dtype)

    @property
    def is_diagonal(self) -> bool:
        """True: A^T A is diagonal in Fourier space."""
        return True

    def solve_normal_spread(self, rhs: Tensor, eps: Tensor, *, a: float, b: float) -> Tensor:
        """Return M^-1 rhs + M^(-1/2) eps for M = a A^T A + b I, shape (B, C, H, W)."""
        self._check_sides("rhs", rhs.shape)
        _, share = self._on(rhs)
        scale = (a * share + b).rsqrt()
        spectrum = torch.fft.rfft2(rhs.to(share)) * scale + torch.fft.rfft2(eps.to(share))
        drawn: Tensor = torch.fft.irfft2(spectrum * scale, s=rhs.shape[-2:])
        return drawn.to(rhs.dtype)

    def linear_form(self, like: Tensor) -> LinearForm:
        """Return the steps for images `like` (B, C, H, W): how often coefficients are measured."""
        self._check_sides("like", like.shape)
        return LinearForm(shares=self._on(like)[1][None, None])

    def _pairs(self, y: Tensor) -> Tensor:
        """Return measurements, complex ones as pairs of real and imaginary part."""
        if isinstance(y, Tensor) and y.is_complex():
            y = torch.view_as_real(y.resolve_conj())
        check_floating("y", y)
        if y.ndim != 5 or 0 in y.shape or y.shape[4] != 2:
            raise ValueError(
                "y must have shape (B, C, H, W, 2), or (B, C, H, W) of complex numbers, got "
                f"{tuple(y.shape)}"
            )
        self._check_sides("y", y.shape)
        return y

    def _check_sides(self, name: str, shape: Sequence[int]) -> None:
        if tuple(shape[2:4]) != tuple(self.mask.shape):
            raise ValueError(
                f"{name} must have the height and width of mask, {tuple(self.mask.shape)}, "
                f"got {tuple(shape[2:4])}"
            )

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask (H, W, 1) as y has it and the half spectrum s, (H, W // 2 + 1).

        Both are on the device of `like` and in the dtype that its transforms use.
        """
        dtype = working_dtype(like.dtype)

        def compute() -> tuple[Tensor, Tensor]:
            mask = self.mask.to(like.device, dtype)
            first = torch.fft.ifftshift(mask) if self.centred else mask
            negative = first.flip(0, 1).roll((1, 1), (0, 1))
            share = (first + negative)[:, : mask.shape[1] // 2 + 1] / 2
            return mask[..., None], share

        return self._tables.get((dtype, like.device), compute)
