"""Compressed sensing: few random mixtures of all pixels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ncvsd_inverse.checks import (
    Size,
    check_count,
    check_floating,
    check_images,
    check_share,
    check_size,
)
from ncvsd_inverse.machine import Cache
from ncvsd_inverse.numerics import working_dtype
from ncvsd_inverse.operators.base import LinearBase

__all__ = ["CompressedSensing"]


class CompressedSensing(LinearBase):
    """Measure some coefficients of a random orthonormal transform of each channel.

    y = R T x for the n = H W pixels of a channel, row by row. R keeps m = round(ratio * n) rows
    (at least 1) drawn at random. P is a random permutation, D and D' are diagonals of random
    signs, and H is the orthonormal Walsh-Hadamard matrix of side N, the largest power of two that
    is at most n: H[i, j] = (-1)^(ones in the binary digits of i & j) / sqrt(N). Then

    - T = H D P if n = N;
    - T = (I (+) H) D' (H (+) I) D P otherwise, with (+) the block diagonal: H acts on the first N
      entries, then on the last N, which overlap.

    Nothing is padded, so T is orthonormal and A A^T = I for every size; a row mixes all pixels if
    n = N, and otherwise N of them or nearly all. All channels share R and T. `solve_normal` is
    closed form: A^T A = T^T diag(kept) T.

    Args:
        size: height and width of the images, or one side of square ones, pixels.
        ratio: share of the coefficients that is measured, in (0, 1].
        seed: of all that is random, >= 0; the same seed gives the same matrix on every device.

    Attributes:
        num_measured: m.

    Raises:
        ValueError: if an argument is out of range or (on use) images have another size.

    Source:
        Do, Gan, Nguyen & Tran, IEEE Trans. Signal Processing 60 (2012), structurally random
        matrices; the second window is ours.
    """

    family = "compressed_sensing"

    def __init__(self, size: Size, ratio: float = 0.5, seed: int = 0) -> None:
        self.size = check_size("size", size)
        self.ratio = check_share("ratio", ratio)
        self.seed = check_count("seed", seed, least=0)
        pixels = self.size[0] * self.size[1]
        self.num_measured = max(1, round(self.ratio * pixels))
        self._side = 1 << (pixels.bit_length() - 1)
        self._starts = (0,) if self._side == pixels else (0, pixels - self._side)
        generator = torch.Generator().manual_seed(self.seed)
        with torch.inference_mode(False):  # else no later gradient could pass through them
            self._order = torch.randperm(pixels, generator=generator)
            drawn = torch.randperm(pixels, generator=generator)[: self.num_measured]
            # Places, not a mask: a GPU would be waited for to count a mask's pixels.
            self._kept = drawn.sort().values
            coins = torch.randint(2, (len(self._starts), pixels), generator=generator)
            self._signs = (2 * coins - 1).to(torch.int8)
        self._tables: Cache[tuple[Tensor, Tensor, Tensor, Tensor]] = Cache()

    def __call__(self, x: Tensor) -> Tensor:
        """Return coefficients, shape (B, C, m)."""
        self._check("x", x)
        _, _, kept, _ = self._on(x.device)
        return self._transform(x)[..., kept].to(x.dtype)

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (B, C, H, W) for measurements (B, C, m)."""
        if len(y_shape) != 3 or min(y_shape) < 1 or y_shape[2] != self.num_measured:
            raise ValueError(
                f"y_shape must be (B, C, {self.num_measured}), all at least 1, got {tuple(y_shape)}"
            )
        return int(y_shape[0]), int(y_shape[1]), *self.size

    def adjoint(self, y: Tensor) -> Tensor:
        """Return T^T R^T y, shape (B, C, H, W)."""
        check_floating("y", y)
        if y.ndim != 3 or 0 in y.shape or y.shape[2] != self.num_measured:
            raise ValueError(f"y must have shape (B, C, {self.num_measured}), got {tuple(y.shape)}")
        _, _, kept, _ = self._on(y.device)
        working = y.to(working_dtype(y.dtype))
        coefficients = working.new_zeros(*y.shape[:2], len(self._order))
        coefficients[..., kept] = working
        return self._transform_back(coefficients).to(y.dtype)

    def _solve_normal(self, rhs: Tensor, a: float, b: float) -> Tensor:
        self._check("rhs", rhs)
        coefficients = self._transform(rhs) / self._eigenvalues(rhs, a, b)
        return self._transform_back(coefficients).to(rhs.dtype)

    @property
    def is_diagonal(self) -> bool:
        """True: A^T A is diagonal in the transform's basis."""
        return True

    def solve_normal_spread(self, rhs: Tensor, eps: Tensor, *, a: float, b: float) -> Tensor:
        """Return M^-1 rhs + M^(-1/2) eps for M = a A^T A + b I, shape (B, C, H, W)."""
        self._check("rhs", rhs)
        scale = self._eigenvalues(rhs, a, b).rsqrt()
        coefficients = (self._transform(rhs) * scale + self._transform(eps)) * scale
        return self._transform_back(coefficients).to(rhs.dtype)

    def _eigenvalues(self, like: Tensor, a: float, b: float) -> Tensor:
        """Return the eigenvalues of a A^T A + b I, shape (n,), in the order of coefficients."""
        _, _, kept, _ = self._on(like.device)
        dtype = working_dtype(like.dtype)
        values = torch.full((len(self._order),), b, dtype=dtype, device=like.device)
        values[kept] += a
        return values

    def _transform(self, images: Tensor) -> Tensor:
        """Return all coefficients T x of images (B, C, H, W), shape (B, C, n)."""
        order, _, _, signs = self._on(images.device)
        z = images.to(working_dtype(images.dtype)).flatten(2)[..., order]
        for start, flips in zip(self._starts, signs, strict=True):
            z = self._mix_window(z * flips, start)
        return z

    def _transform_back(self, z: Tensor) -> Tensor:
        """Return T^T z, shape (B, C, H, W), for coefficients (B, C, n)."""
        _, inverse, _, signs = self._on(z.device)
        for start, flips in zip(reversed(self._starts), signs.flip(0), strict=True):
            z = self._mix_window(z, start) * flips
        return z[..., inverse].reshape(*z.shape[:2], *self.size)

    def _mix_window(self, z: Tensor, start: int) -> Tensor:
        """Apply H, its own inverse, to the N entries of the last axis from `start`."""
        before, window, after = z.tensor_split((start, start + self._side), dim=-1)
        return torch.cat((before, hadamard(window), after), dim=-1)

    def _check(self, name: str, images: Tensor) -> None:
        check_images(name, images)
        if tuple(images.shape[2:]) != self.size:
            raise ValueError(
                f"{name} must have the height and width of size, {self.size}, "
                f"got {tuple(images.shape[2:])}"
            )

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return permutation, its inverse, kept rows (m,) and signs (windows, n) on a device."""

        def compute() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            order, kept, signs = (
                table.to(device) for table in (self._order, self._kept, self._signs)
            )
            return order, order.argsort(), kept, signs

        return self._tables.get(device, compute)


def hadamard(z: Tensor) -> Tensor:
    """Return the orthonormal Walsh-Hadamard transform of the last axis, a power of two long."""
    side = z.shape[-1]
    half = 1
    while half < side:
        first, second = z.reshape(*z.shape[:-1], -1, 2, half).unbind(-2)
        z = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        half *= 2
    return z / math.sqrt(side)
