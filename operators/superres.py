"""Super-resolution."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_choice, check_count, check_images
from ncvsd_inverse.machine import Cache
from ncvsd_inverse.numerics import working_dtype
from ncvsd_inverse.operators.base import LinearBase, check_image_shape
from ncvsd_inverse.protocols import LinearForm

__all__ = ["SuperResolution"]

Filter = Literal["bicubic", "box"]


class SuperResolution(LinearBase):
    """Measure a smaller image, each channel alone.

    y = R_H x R_W^T, that is A = R_H (x) R_W (Kronecker product), where R_n has shape
    (n / factor, n) and rows that sum to 1.

    - "bicubic": the antialiased convention of MATLAB's imresize. With f the factor and k the
      cubic kernel with a = -1/2, R[i, j] is the sum of k((c_i - t) / f) / f, c_i =
      f*i + (f - 1)/2, over all integers t that are j after mirroring at the edges (edge pixel
      repeated), divided by the sum of the row.
    - "box": the mean of factor x factor blocks.

    >>> SuperResolution(2, filter="box")(torch.arange(4.0).view(1, 1, 2, 2))
    tensor([[[[1.5000]]]])

    The solve is exact: with the full singular bases R_n = U S V^T, A^T A is diagonal in
    V_H (x) V_W. Matrices are kept per image side, none is larger than side x side.

    Args:
        factor: how many times smaller y is on each axis, >= 1.
        filter: "bicubic" or "box".

    Raises:
        ValueError: if factor < 1, the filter is unknown or (on use) an image side does not
            divide by the factor.
    """

    family = "superres"

    def __init__(self, factor: int, filter: Filter = "bicubic") -> None:
        self.factor = check_count("factor", factor)
        check_choice("filter", filter, get_args(Filter))
        self.filter: Filter = filter
        self._matrices: Cache[Tensor] = Cache()
        self._systems: Cache[tuple[Tensor, Tensor, Tensor]] = Cache()
        self._spectra: Cache[tuple[Tensor, Tensor]] = Cache()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the smaller images, shape (B, C, H / factor, W / factor)."""
        check_images("x", x)
        height, width = self._check_sides("x", x)
        working = x.to(working_dtype(x.dtype))
        small = self._matrix(height, working) @ working @ self._matrix(width, working).T
        return small.to(x.dtype)

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (B, C, factor * h, factor * w) for measurements (B, C, h, w)."""
        batch, channels, height, width = check_image_shape("y_shape", y_shape)
        return batch, channels, height * self.factor, width * self.factor

    def adjoint(self, y: Tensor) -> Tensor:
        """Return R_H^T y R_W, shape (B, C, factor * h, factor * w)."""
        _, _, height, width = self.input_shape(check_images("y", y).shape)
        working = y.to(working_dtype(y.dtype))
        large = self._matrix(height, working).T @ working @ self._matrix(width, working)
        return large.to(y.dtype)

    def _solve_normal(self, rhs: Tensor, a: float, b: float) -> Tensor:
        height, width = self._check_sides("rhs", rhs)
        working = rhs.to(working_dtype(rhs.dtype))
        basis_h, power_h = self._spectrum(height, working)
        basis_w, power_w = self._spectrum(width, working)
        coefficients = basis_h.T @ working @ basis_w
        coefficients /= a * torch.outer(power_h, power_w) + b
        return (basis_h @ coefficients @ basis_w.T).to(rhs.dtype)

    def linear_form(self, like: Tensor) -> LinearForm:
        """Return the steps for images `like` (B, C, H, W).

        The filter of a row far from the edges, periodic, and every `factor`-th pixel. "box" has no
        other rows.
        """
        sides = self._check_sides("like", like)
        working = like.to(working_dtype(like.dtype))
        rows, columns = (self._periodic_gains(side, working) for side in sides)
        transfer = torch.outer(rows, columns[: like.shape[3] // 2 + 1])
        return LinearForm(
            transfer=transfer[None, None],
            stride=self.factor,
            exact=self.filter == "box",
            axes=(self._matrix(sides[0], working), self._matrix(sides[1], working)),
        )

    def _periodic_gains(self, side: int, like: Tensor) -> Tensor:
        """Return the Fourier transform (side,) of the filter whose outputs are pixels 0, f, ..."""
        row = side // self.factor // 2
        weights = self._matrix(side, like)[row]
        # A correlation: weights at positive offsets take from pixels further on.
        gains: Tensor = torch.fft.fft(weights.roll(-self.factor * row)).conj()
        return gains

    def _check_sides(self, name: str, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"{name} must have a height and width that divide by factor = {self.factor}, "
                f"got {(height, width)}"
            )
        return height, width

    def _matrix(self, side: int, like: Tensor) -> Tensor:
        """Return R, shape (side / factor, side), in the dtype and device of `like`."""
        key = side, like.dtype, like.device
        return self._matrices.get(key, lambda: self._build_matrix(side).to(like))

    def singular_system(self, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return U, S and V of the reduction R = U S V^T of one axis, float64 on the CPU.

        Args:
            side: length of the axis, pixels, a multiple of `factor`.

        Returns:
            U, shape (side / factor, side / factor); the singular values, largest first, shape
            (side / factor,); V with the kernel of R in its last columns, shape (side, side).
        """

        def compute() -> tuple[Tensor, Tensor, Tensor]:
            left, values, right_t = torch.linalg.svd(self._build_matrix(side))
            return left, values, right_t.T.contiguous()

        return self._systems.get(side, compute)

    def _spectrum(self, side: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return V, shape (side, side), and the eigenvalues of R^T R, shape (side,)."""

        def compute() -> tuple[Tensor, Tensor]:
            _, values, basis = self.singular_system(side)
            power = torch.nn.functional.pad(values.square(), (0, side - len(values)))
            return basis.to(like), power.to(like)

        return self._spectra.get((side, like.dtype, like.device), compute)

    def _build_matrix(self, side: int) -> Tensor:
        if self.filter == "box":
            block = torch.full((1, self.factor), 1 / self.factor, dtype=torch.float64)
            return torch.kron(torch.eye(side // self.factor, dtype=torch.float64), block)
        return _bicubic_matrix(side, self.factor)


def _bicubic_matrix(side: int, factor: int) -> Tensor:
    """Return the antialiased bicubic reduction of one axis, shape (side / factor, side), float64.

    Source:
        Keys, IEEE Trans. ASSP 29 (1981), for the kernel.
    """
    rows = torch.arange(side // factor)
    centres = factor * rows + (factor - 1) / 2
    taps = torch.arange(-2 * factor, 2 * factor + 1) + factor * rows[:, None] + (factor - 1) // 2
    weights = _cubic((centres[:, None] - taps).double() / factor)
    weights = weights / weights.sum(dim=1, keepdim=True)
    inside = taps % (2 * side)
    mirrored = torch.where(inside < side, inside, 2 * side - 1 - inside)
    return torch.zeros(len(rows), side, dtype=torch.float64).scatter_add_(1, mirrored, weights)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -1/2, zero beyond 2."""
    d = distance.abs()
    near = 1.5 * d**3 - 2.5 * d**2 + 1
    far = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return torch.where(d <= 1, near, torch.where(d <= 2, far, torch.zeros_like(d)))
