"""Blurs: convolution with a known kernel."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ncvsd_inverse.checks import (
    check_choice,
    check_count,
    check_finite,
    check_floating,
    check_images,
    check_positive,
    check_share,
)
from ncvsd_inverse.machine import Cache
from ncvsd_inverse.numerics import conjugate_gradient, filter_periodic, working_dtype
from ncvsd_inverse.operators.base import LinearBase, check_broadcasts, check_image_shape
from ncvsd_inverse.protocols import LinearForm

__all__ = ["Blur", "GaussianBlur", "MotionBlur"]

Boundary = Literal["circular", "reflect", "replicate", "valid"]


class Blur(LinearBase):
    """Convolve each channel with a kernel.

    y[i] = sum_j kernel[j] x[i - (j - c)] on each axis, c = size // 2 the kernel's centre: a true
    convolution, so a point becomes the kernel (not flipped) and nothing shifts. Outside the
    image, x is

    - "circular": periodic: A = F^-1 diag(F kernel) F with F the 2-D Fourier transform;
    - "reflect": mirrored about the edge pixel, which is not repeated (torch's "reflect");
    - "replicate": the edge pixel;
    - "valid": unknown: y keeps only what needs no outside and has sides n - size + 1.

    For the last three, A = K P with P the extension and K the convolution that keeps what needs
    no outside. All are applied by FFT on the extended image, exactly. `solve_normal` is closed
    form for "circular"; for the others it runs conjugate gradients, preconditioned by the
    circular blur, until the residual is at most `tolerances[dtype]` times the right-hand side
    (or for `max_iterations`); rounding adds about eps * a / b to it.

    Args:
        kernel: weights, shape (kh, kw) or (1 or B, 1 or C, kh, kw), used as they are (no
            normalisation), at most as large as the image. It is copied.
        boundary: "circular", "reflect", "replicate" or "valid".

    Raises:
        TypeError: if kernel is no floating-point tensor.
        ValueError: if kernel has another shape, is not finite or all zero, if the boundary is
            unknown, or (on use) if the kernel is larger than the image.
    """

    family = "blur"

    tolerances: ClassVar[dict[torch.dtype, float]] = {torch.float32: 1e-6, torch.float64: 1e-10}
    """Relative residual at which conjugate gradients stop, by the dtype they run in."""

    max_iterations: ClassVar[int] = 10_000
    """Most conjugate gradient iterations of a solve; a / b = 400 takes about 100, 4e5 2000."""

    def __init__(self, kernel: Tensor, boundary: Boundary = "circular") -> None:
        check_floating("kernel", kernel)
        if kernel.ndim not in (2, 4) or 0 in kernel.shape:
            raise ValueError(
                "kernel must have shape (kh, kw) or (1 or B, 1 or C, kh, kw), "
                f"got {tuple(kernel.shape)}"
            )
        check_finite("kernel", kernel)
        self.kernel = kernel.detach().clone().reshape(*[1] * (4 - kernel.ndim), *kernel.shape)
        if not bool(self.kernel.flatten(2).any(dim=2).all()):
            raise ValueError("kernel must have a weight other than 0, got all zeros")
        check_choice("boundary", boundary, get_args(Boundary))
        self.boundary: Boundary = boundary
        height, width = kernel.shape[-2:]
        before = (height - 1 - height // 2, width - 1 - width // 2)
        after = (height // 2, width // 2)
        self._margins = (before[1], after[1], before[0], after[0])
        self._transfers: Cache[Tensor] = Cache()

    def __call__(self, x: Tensor) -> Tensor:
        """Return blurred images, shape (B, C, H, W), or (B, C, H - kh + 1, W - kw + 1)."""
        self._check("x", check_images("x", x), x.shape)
        extended = self._extend(x.to(working_dtype(x.dtype)))
        return self._crop(filter_periodic(extended, self._transfer(extended))).to(x.dtype)

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (B, C, H, W) of the images that give measurements of `y_shape`."""
        batch, channels, height, width = check_image_shape("y_shape", y_shape)
        if self.boundary == "valid":
            height += self.kernel.shape[-2] - 1
            width += self.kernel.shape[-1] - 1
        return batch, channels, height, width

    def adjoint(self, y: Tensor) -> Tensor:
        """Return A^T y, shape (B, C, H, W)."""
        self._check("y", check_images("y", y), self.input_shape(y.shape))
        widened = self._crop_transposed(y.to(working_dtype(y.dtype)))
        filtered = filter_periodic(widened, self._transfer(widened).conj())
        return self._extend_transposed(filtered).to(y.dtype)

    def repeated(self, times: int) -> "Blur":
        """Return the operator for a batch that is tiled `times` times along dimension 0."""
        times = check_count("times", times)
        if self.kernel.shape[0] == 1:
            return self
        return Blur(self.kernel.repeat(times, 1, 1, 1), boundary=self.boundary)

    def _solve_normal(self, rhs: Tensor, a: float, b: float) -> Tensor:
        self._check("rhs", rhs, rhs.shape)
        working = rhs.to(working_dtype(rhs.dtype))
        power = self._transfer(working).abs().square()
        if self.boundary == "circular":
            return filter_periodic(working, 1 / (a * power + b)).to(rhs.dtype)
        # The floor keeps what differs at the edges from being amplified by a / b: without it the
        # preconditioner costs iterations, with it it saves up to half of them.
        floor = 0.03 * power.amax(dim=(-2, -1), keepdim=True)
        inverse = 1 / (a * (power + floor) + b)
        solution = conjugate_gradient(
            lambda x: a * self.adjoint(self(x)) + b * x,
            working,
            rtol=self.tolerances[working.dtype],
            max_iterations=self.max_iterations,
            precondition=lambda residual: filter_periodic(residual, inverse),
        )
        return solution.to(rhs.dtype)

    @property
    def is_diagonal(self) -> bool:
        """True for the circular boundary: A^T A is diagonal in Fourier space."""
        return self.boundary == "circular"

    def solve_normal_spread(self, rhs: Tensor, eps: Tensor, *, a: float, b: float) -> Tensor:
        """Return M^-1 rhs + M^(-1/2) eps for M = a A^T A + b I, shape (B, C, H, W).

        Raises:
            TypeError: unless the boundary is "circular".
        """
        if not self.is_diagonal:
            return super().solve_normal_spread(rhs, eps, a=a, b=b)
        self._check("rhs", rhs, rhs.shape)
        working = rhs.to(working_dtype(rhs.dtype))
        scale = (a * self._transfer(working).abs().square() + b).rsqrt()
        spectrum = torch.fft.rfft2(working) * scale + torch.fft.rfft2(eps.to(working))
        drawn: Tensor = torch.fft.irfft2(spectrum * scale, s=rhs.shape[-2:])
        return drawn.to(rhs.dtype)

    def linear_form(self, like: Tensor) -> LinearForm | None:
        """Return the steps for images `like` (B, C, H, W); None if channels differ."""
        if self.kernel.shape[1] != 1:
            return None
        self._check("like", like, like.shape)
        transfer = self._transfer(like.to(working_dtype(like.dtype)))
        if self.boundary == "circular":
            return LinearForm(transfer=transfer)
        if self.boundary == "valid":
            inside = torch.ones(1, 1, *like.shape[2:], dtype=torch.bool, device=like.device)
            kept = functional.pad(self._crop(inside), self._margins)
            return LinearForm(transfer=transfer, mask=kept, margins=self._margins)
        axes = self._axes(like)
        if axes is not None:
            return LinearForm(transfer=transfer, exact=False, axes=axes)
        return LinearForm(transfer=transfer, exact=False, forward=self, backward=self.adjoint)

    def _axes(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the matrices of rows and columns, if the kernel is a product of two."""
        if self.kernel.shape[0] > 1:
            return None
        left, values, right = torch.linalg.svd(self.kernel[0, 0].double())
        rounding = 10 * torch.finfo(self.kernel.dtype).eps
        if len(values) > 1 and float(values[1]) > rounding * float(values[0]):
            return None
        parts = (left[:, 0] * values[0], right[0])
        rows, columns = (
            self._axis(part, side).to(like)
            for part, side in zip(parts, like.shape[2:], strict=True)
        )
        return rows, columns

    def _axis(self, weights: Tensor, side: int) -> Tensor:
        """Return the matrix (side, side) of an axis for a kernel of one column."""
        alone = Blur(weights[:, None], boundary=self.boundary)
        units = torch.eye(side, dtype=weights.dtype, device=weights.device)[:, None, :, None]
        return alone(units)[:, 0, :, 0].T.contiguous()

    def _check(self, name: str, images: Tensor, image_shape: Sequence[int]) -> None:
        check_broadcasts("kernel", self.kernel, name, images)
        sides, kernel_sides = tuple(image_shape[-2:]), tuple(self.kernel.shape[-2:])
        if kernel_sides[0] > sides[0] or kernel_sides[1] > sides[1]:
            raise ValueError(
                f"kernel must be at most as large as the image, {sides}, got {kernel_sides}"
            )

    def _transfer(self, like: Tensor) -> Tensor:
        """Return the half spectrum of the kernel, its centre at the origin, for images `like`."""
        height, width = like.shape[-2:]
        kh, kw = self.kernel.shape[-2:]

        def compute() -> Tensor:
            padded = functional.pad(self.kernel.to(like), (0, width - kw, 0, height - kh))
            centred = padded.roll((-(kh // 2), -(kw // 2)), dims=(-2, -1))
            spectrum: Tensor = torch.fft.rfft2(centred)
            return spectrum

        return self._transfers.get((height, width, like.dtype, like.device), compute)

    def _extend(self, images: Tensor) -> Tensor:
        """Add the pixels outside the image that the kernel reaches."""
        if self.boundary in ("circular", "valid"):
            return images
        return functional.pad(images, self._margins, mode=self.boundary)

    def _extend_transposed(self, images: Tensor) -> Tensor:
        """Add the pixels outside back to those they copy, and drop them."""
        if self.boundary in ("circular", "valid"):
            return images
        left, right, top, bottom = self._margins
        folded = _fold(images, left, right, self.boundary)
        return _fold(folded.mT, top, bottom, self.boundary).mT

    def _crop(self, images: Tensor) -> Tensor:
        """Drop the pixels that the circular convolution wrapped around."""
        if self.boundary == "circular":
            return images
        left, right, top, bottom = self._margins
        height, width = images.shape[-2:]
        return images[..., top : height - bottom, left : width - right]

    def _crop_transposed(self, y: Tensor) -> Tensor:
        return y if self.boundary == "circular" else functional.pad(y, self._margins)


class GaussianBlur(Blur):
    """Blur with a normalised Gaussian: kernel[i, j] ~ exp(-((i - c)^2 + (j - c)^2) / (2 std^2)).

    The matrix is Blur's; c = kernel_size // 2.

    Args:
        std: standard deviation, > 0, pixels.
        kernel_size: side of the kernel, pixels, >= 1.
        boundary: see Blur.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, std: float, kernel_size: int, boundary: Boundary = "circular") -> None:
        std = check_positive("std", std)
        kernel_size = check_count("kernel_size", kernel_size)
        offsets = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
        axis = torch.exp(-0.5 * (offsets / std) ** 2)
        kernel = torch.outer(axis, axis)
        super().__init__(kernel / kernel.sum(), boundary)
        self.std = std
        self.kernel_size = kernel_size


class MotionBlur(Blur):
    """Blur along the random path of a shaken camera; the matrix is Blur's.

    The law of the kernels is the one behind the published tables of motion blur (61 pixels,
    intensity 0.5). With d the diagonal of the kernel and U a uniform variable on [0, 1], a new one
    at each mention:

    - The path is a chain of straight steps. Lengths are draws of Beta(1, 30) times
      (1.1 - intensity) d, none above L = 0.75 d (U + intensity^2 U); it ends when their sum is at
      least L. The first step only says where the second begins.
    - With m = pi intensity U, the first heading is uniform in [-m, m]. Later ones are triangular
      on [0, m + 0.1], most likely intensity m, on the side of the one before; with a
      probability that is itself drawn, from Beta(2, 20), they change sides.
    - The mean of the corners lies on the kernel's centre (so the mean of the weights lies some
      pixels beside it), after a rotation by pi U.
    - The path is drawn white on black, in 256 grey levels and pixels of half the size. It is no
      whiter where it crosses itself, and lost where it leaves the kernel. Its width is
      max(1, w / 150) and it is blurred by a Gaussian of std w / 100, both rounded down to whole
      half pixels, with w = 2 d. Lanczos' filter reduces it, columns then rows, each time cut to
      the grey levels there are; the result is divided by its sum.

    Args:
        kernel_size: side of the kernel, pixels, >= 1.
        intensity: in [0, 1], from a straight line to a long, strongly shaken path.
        seed: the same seed gives the same kernel, >= 0.
        boundary: see Blur.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        The law of github.com/LeviBorodenko/motionblur, which DPS, DAPS, PnP-DM and NCVSD use; the
        code and the seeds are our own. `experiments/operators/motion_kernels.py` compares the two.
    """

    family = "motion_blur"

    def __init__(
        self,
        kernel_size: int,
        intensity: float,
        seed: int = 0,
        boundary: Boundary = "circular",
    ) -> None:
        kernel_size = check_count("kernel_size", kernel_size)
        seed = check_count("seed", seed, least=0)
        intensity = check_share("intensity", intensity, or_zero=True)
        corners = _shaken_path(intensity, torch.Generator().manual_seed(seed))
        super().__init__(_draw_path(corners, kernel_size), boundary)
        self.kernel_size = kernel_size
        self.intensity = intensity
        self.seed = seed


def _fold(images: Tensor, before: int, after: int, boundary: Boundary) -> Tensor:
    """Transpose of extending the last axis by `before` and `after` pixels."""
    width = images.shape[-1] - before - after
    inside = images[..., before : before + width].clone()
    left, right = images[..., :before], images[..., before + width :]
    if boundary == "reflect":
        inside[..., 1 : before + 1] += left.flip(-1)
        inside[..., width - 1 - after : width - 1] += right.flip(-1)
    else:
        inside[..., 0] += left.sum(-1)
        inside[..., -1] += right.sum(-1)
    return inside


def _shaken_path(intensity: float, generator: torch.Generator, most_steps: int = 1024) -> Tensor:
    """Return corners (row, column) of a path of MotionBlur, shape (n, 2), in diagonals, mean 0.

    `most_steps` is twice what the longest path takes on average.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    length = 0.75 * (1 - uniform() + intensity**2 * uniform())
    scale = 1.1 - intensity
    # P(Beta(1, 30) <= t) = 1 - (1 - t)^30, inverted up to the longest step allowed.
    allowed = 1 - (1 - (length / scale).clamp(max=1)) ** 30
    steps = scale * (1 - (1 - allowed * uniform(most_steps)) ** (1 / 30))
    steps = steps[: int((steps.cumsum(dim=0) < length).sum()) + 1]

    widest = math.pi * intensity * uniform()
    first = widest * (2 * uniform(1) - 1)
    # The second smallest of 21 uniform variables is a draw of Beta(2, 20).
    changes = uniform(len(steps) - 1) < uniform(21).sort().values[1]
    # At intensity 0 the first heading has no side and the path is straight.
    sides = first.sign() * (1 - 2 * changes.double()).cumprod(dim=0)
    angles = _triangular(uniform(len(steps) - 1), float(intensity * widest), float(widest) + 0.1)
    headings = torch.cat((first, sides * angles)) + math.pi * uniform()
    moves = torch.stack((headings.sin(), headings.cos()), dim=1) * steps[:, None]
    corners = moves.cumsum(dim=0)
    return corners - corners.mean(dim=0)


def _triangular(u: Tensor, mode: float, largest: float) -> Tensor:
    """Return the quantiles u of the triangular law on [0, largest]."""
    rising = (u * mode * largest).sqrt()
    falling = largest - ((1 - u) * (largest - mode) * largest).sqrt()
    return torch.where(u * largest < mode, rising, falling)


def _draw_path(corners: Tensor, size: int) -> Tensor:
    """Return the normalised kernel of a path in units of its diagonal, shape (size, size)."""
    fine = 2 * size
    diagonal = math.sqrt(2) * fine
    width = max(1, int(diagonal / 150))
    # The line is width pixels wide: this is the first of them, in rows and in columns.
    origin = 2 * (size // 2) + 1 - width / 2
    pixels = _pixels_between((corners * diagonal + origin).round().long())
    pen = torch.arange(width)
    pixels = (pixels[:, None] + torch.cartesian_prod(pen, pen).view(-1, 2)).flatten(0, 1)
    rows, columns = pixels[((pixels >= 0) & (pixels < fine)).all(dim=1)].T
    line = torch.zeros(fine, fine, dtype=torch.float64)
    line[rows, columns] = 1
    blur = _gaussian_matrix(fine, int(diagonal / 100))
    reduce = _lanczos_half(size)
    narrowed = (blur @ line @ blur.T @ reduce.T).clamp(0, 1)
    kernel = (255 * (reduce @ narrowed).clamp(0, 1)).round()
    return kernel / kernel.sum()


def _pixels_between(corners: Tensor) -> Tensor:
    """Return the pixels of straight lines from corner to corner, both of integers, shape (n, 2).

    A line has one pixel in each row or in each column, whichever it crosses more of. Whole numbers
    make it the same on every machine.
    """
    pieces = [corners[:1]]
    for start, move in zip(corners[:-1], corners.diff(dim=0), strict=True):
        count = max(1, int(move.abs().max()))
        step = torch.arange(1, count + 1)[:, None]
        pieces.append(start + torch.div(2 * step * move + count, 2 * count, rounding_mode="floor"))
    return torch.cat(pieces)


def _gaussian_matrix(side: int, std: int) -> Tensor:
    """Return the matrix (side, side) of a Gaussian blur, rows of sum 1; std 0 is none."""
    offsets = torch.arange(side, dtype=torch.float64)
    offsets = offsets[:, None] - offsets
    weights = torch.exp(-0.5 * (offsets / std) ** 2) if std > 0 else (offsets == 0).double()
    return weights / weights.sum(dim=1, keepdim=True)


def _lanczos_half(size: int) -> Tensor:
    """Return the matrix (size, 2 size) that reduces by two with Lanczos' filter of three lobes."""
    fine = (torch.arange(2 * size, dtype=torch.float64) - 0.5) / 2
    offsets = torch.arange(size, dtype=torch.float64)[:, None] - fine
    weights = torch.sinc(offsets) * torch.sinc(offsets / 3) * (offsets.abs() < 3)
    return weights / weights.sum(dim=1, keepdim=True)
