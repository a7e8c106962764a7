"""Dense matrices for masks and small measurements, kept from call to call."""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ncvsd_inverse.machine import Cache
from ncvsd_inverse.numerics import digest

__all__ = [
    "KEPT_MASKS",
    "KEPT_TENSORS",
    "DenseMask",
    "MaskMatrices",
    "separable_covariance",
]

MASK_BYTES, TENSOR_BYTES = 128 * 2**20, 32 * 2**20
"""What matrices of masks and other ones may take together, bytes."""

MOST_PIXELS = 1536
"""Most pixels of a matrix; a hole that is a box has four, of a quarter of its pixels each."""

STEEP = 1000.0
"""Least condition of a matrix that iterations would find slow."""

KEPT_MASKS: Cache["DenseMask"] = Cache(256, MASK_BYTES)
"""The matrices of masks that were used last, by what they follow from."""

KEPT_TENSORS: Cache[Tensor] = Cache(256, TENSOR_BYTES)
"""Other matrices that were used last."""


def separable_covariance(rows: Tensor, columns: Tensor, function: Tensor) -> Tensor:
    """Return A S A^T for A = rows (x) columns and stationary S.

    Args:
        rows: shape (h, H).
        columns: shape (w, W).
        function: covariance function of S, periodic, shape (K, H, W).

    Returns:
        Shape (K, h w, h w).
    """
    apart = [_correlate(matrix) for matrix in (rows, columns)]
    along = torch.einsum("pij,kpq->kijq", apart[0], function)
    whole: Tensor = torch.einsum("kijq,qmn->kimjn", along, apart[1])
    size = len(rows) * len(columns)
    return whole.reshape(-1, size, size)


def _correlate(matrix: Tensor) -> Tensor:
    """Return sum_a R[i, a] R[j, a - p mod n] for R (m, n), shape (n, m, m)."""
    size = matrix.shape[1]
    place = torch.arange(size, device=matrix.device)
    shifted = matrix[:, (place - place[:, None]) % size]  # (m, p, a)
    correlated: Tensor = torch.einsum("ia,jpa->pij", matrix, shifted)
    return correlated


class Box(NamedTuple):
    """The inverse of the unknown block of a stationary precision, the unknown pixels a box.

    The block keeps images of the box that are even on an axis apart from odd ones: in the basis of
    `_by_parity` it is four smaller ones.

    Attributes:
        top: first row of the box.
        left: its first column.
        rows: orthonormal vectors of its height, the even ones first, (height, height).
        columns: those of its width, (width, width).
        inverses: even and even, even and odd, odd and even, odd and odd, each (K, n, n).
    """

    top: int
    left: int
    rows: Tensor
    columns: Tensor
    inverses: tuple[Tensor, ...]

    @classmethod
    def factor(cls, box: tuple[int, int, int, int], precision: Tensor) -> "Box":
        """Invert the block of a precision whose covariance function, (K, H, W), is even."""
        top, left, height, width = box
        kernel = precision[:, :height, :width]
        inverses = []
        for rows in _toeplitz_by_parity(kernel.transpose(1, 2)):  # (K, width, h, h)
            for block in _toeplitz_by_parity(rows.permute(0, 2, 3, 1)):  # (K, h, h, w, w)
                size = block.shape[1] * block.shape[3]
                ordered = block.permute(0, 1, 3, 2, 4).reshape(-1, size, size)
                inverses.append(torch.linalg.inv(ordered))
        rows, columns = (_by_parity(side, kernel) for side in (height, width))
        return cls(top, left, rows, columns, tuple(inverses))

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(inverse.nbytes for inverse in self.inverses)

    def solve(self, known: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor]:
        """Return waves of (T_KK + s^2)^-1 known, and what of the equations is left, as energy.

        Args:
            known: pixels, 0 where unknown, shape (B, K, H, W).
            noisy: spectrum of T + s^2 I, (1, K, H, W // 2 + 1).
        """
        size, height, width = known.shape[-2:], len(self.rows), len(self.columns)
        window = (..., slice(self.top, self.top + height), slice(self.left, self.left + width))
        precision = 1 / noisy
        begun = torch.fft.rfft2(known).mul_(precision)
        target = self.rows @ torch.fft.irfft2(begun, s=size)[window] @ self.columns.T
        middle = ((height + 1) // 2, (width + 1) // 2)
        inverses = iter(self.inverses)
        for row in (slice(middle[0]), slice(middle[0], height)):
            for column in (slice(middle[1]), slice(middle[1], width)):
                part = target[..., row, column]
                solved = next(inverses) @ part.flatten(2).permute(1, 2, 0)  # (K, n, B)
                target[..., row, column] = solved.permute(2, 0, 1).view(part.shape)
        filling = torch.zeros_like(known)
        filling[window] = -(self.rows.T @ target @ self.columns)
        waves = begun + torch.fft.rfft2(filling).mul_(precision)
        left = torch.fft.irfft2(waves, s=size)[window].square().sum((2, 3))
        return waves, (left * noisy.amax((2, 3))).sum(1)


def _by_parity(size: int, like: Tensor) -> Tensor:
    """Return orthonormal rows, (size, size): even vectors, then odd ones."""
    unit = torch.eye(size, dtype=like.dtype, device=like.device)
    even, odd = unit + unit.flip(0), unit - unit.flip(0)
    rows = torch.cat((even[: (size + 1) // 2], odd[: size // 2]))
    normalised: Tensor = nn.functional.normalize(rows, dim=1)
    return normalised


def _toeplitz_by_parity(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Return symmetric Toeplitz matrices of kernels (..., size) for even and for odd vectors."""
    size = kernel.shape[-1]
    place = torch.arange((size + 1) // 2, device=kernel.device)
    direct = kernel[..., (place[:, None] - place).abs()]
    mirrored = kernel[..., size - 1 - place[:, None] - place]
    even, odd = direct + mirrored, (direct - mirrored)[..., : size // 2, : size // 2]
    if size % 2:  # the entry in the middle is its own mirror image
        even[..., -1, :] *= 0.5**0.5
        even[..., -1] *= 0.5**0.5
    return even, odd


class Pixels(NamedTuple):
    """Cholesky factors of a stationary covariance, or of its precision, between some pixels.

    Attributes:
        places: the pixels, row by row, (n,).
        factors: lower triangular, one a mixture of colours, (n, n).
        are_known: whether the pixels are the known ones, with factors of T + s^2 I; else they are
            unknown, with factors of its inverse.
    """

    places: Tensor
    factors: tuple[Tensor, ...]
    are_known: bool

    @classmethod
    def factor(cls, places: Tensor, apart: Tensor, kernel: Tensor, are_known: bool) -> "Pixels":
        """Factor the matrices of a covariance function (K, H W) at `apart` (n n,) its entries."""
        size = len(places)
        factors = tuple(
            torch.linalg.cholesky(row.index_select(0, apart).view(size, size)) for row in kernel
        )
        return cls(places, factors, are_known)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.places.nbytes + sum(factor.nbytes for factor in self.factors)

    def solve(self, known: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor]:
        """Return waves of (T_KK + s^2)^-1 known, and what of the equations is left, as energy.

        Args:
            known: pixels, 0 where unknown, shape (B, K, H, W).
            noisy: spectrum of T + s^2 I, (1, K, H, W // 2 + 1).
        """
        size = known.shape[-2:]
        if self.are_known:
            waves = torch.fft.rfft2(self._inverted(known, 1.0))
            left = (known - torch.fft.irfft2(waves * noisy, s=size)).flatten(2)
            bound = 1 / noisy.amin((2, 3))
        else:
            begun = torch.fft.rfft2(known) / noisy
            filling = self._inverted(torch.fft.irfft2(begun, s=size), -1.0)
            waves = begun + torch.fft.rfft2(filling) / noisy
            left = torch.fft.irfft2(waves, s=size).flatten(2)
            bound = noisy.amax((2, 3))
        return waves, (left[..., self.places].square().sum(2) * bound).sum(1)

    def _inverted(self, x: Tensor, sign: float) -> Tensor:
        """Return images, 0 but at the pixels, where they are solutions for x, times a sign."""
        flat = x.flatten(2)
        out = torch.zeros_like(flat)
        for k, factor in enumerate(self.factors):
            right = sign * flat[:, k, self.places].T
            out[:, k, self.places] = torch.cholesky_solve(right, factor).T
        return out.view(x.shape)


DenseMask: TypeAlias = Box | Pixels


class MaskMatrices:
    """The matrices by which a mask is solved, where they are faster than iterations.

    Args:
        mask: the known pixels, boolean, shape (H, W).
    """

    def __init__(self, mask: Tensor) -> None:
        self._size = mask.shape
        self._digest = digest(mask)
        known, unknown = (part.flatten().nonzero()[:, 0] for part in (mask, ~mask))
        self._are_known = len(known) <= len(unknown)
        self._places = known if self._are_known else unknown
        self._box = _find_box(~mask) if len(unknown) <= 4 * MOST_PIXELS else None

    def find(
        self,
        noisy: Tensor,
        key: tuple[object, ...],
        *,
        condition: float,
        is_even: bool,
    ) -> DenseMask | None:
        """Return the matrices for T + s^2 I, made or kept; None if they are not worth it.

        Args:
            noisy: spectrum of T + s^2 I, shape (1, K, H, W // 2 + 1).
            key: what the spectrum follows from.
            condition: of T + s^2 I.
            is_even: whether T stays the same if images are mirrored on one axis.
        """
        box = self._box if is_even and condition > 2 else None
        if box is None and (not 0 < len(self._places) <= MOST_PIXELS or condition < STEEP):
            return None
        key = (self._digest, *key)

        def make() -> DenseMask:
            spectrum = noisy[0] if box is None and self._are_known else 1 / noisy[0]
            kernel = torch.fft.irfft2(spectrum, s=self._size)
            if box is not None:
                return Box.factor(box, kernel)
            apart = KEPT_TENSORS.get((self._digest, noisy.device), self._pairs)
            return Pixels.factor(self._places, apart, kernel.flatten(1), self._are_known)

        return KEPT_MASKS.get(key, make)

    def _pairs(self) -> Tensor:
        """Return where a covariance function (H W,) has the entry of each two pixels, (n n,)."""
        height, width = self._size
        rows, columns = self._places // width, self._places % width
        down = (rows[:, None] - rows) % height
        across = (columns[:, None] - columns) % width
        return (down * width + across).flatten().int()


def _find_box(unknown: Tensor) -> tuple[int, int, int, int] | None:
    """Return top, left, height and width of unknown pixels that fill a box; None of others."""
    rows, columns = (unknown.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    if not rows:
        return None
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    whole = bool(unknown[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())
    return (rows[0], columns[0], height, width) if whole else None
