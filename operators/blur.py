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
    check_non_negative,
    check_positive,
)
from ncvsd_inverse.machine import Cache
from ncvsd_inverse.numerics import conjugate_gradient, working_dtype
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
        return self._crop(self._filter(extended, self._transfer(extended))).to(x.dtype)

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
        filtered = self._filter(widened, self._transfer(widened).conj())
        return self._extend_transposed(filtered).to(y.dtype)

    def repeated(self, times: int) -> "Blur":
        """Return the operator for a batch that is tiled `times` times along dimension 0."""
        check_count("times", times)
        if self.kernel.shape[0] == 1:
            return self
        return Blur(self.kernel.repeat(times, 1, 1, 1), boundary=self.boundary)

    def _solve_normal(self, rhs: Tensor, a: float, b: float) -> Tensor:
        self._check("rhs", rhs, rhs.shape)
        working = rhs.to(working_dtype(rhs.dtype))
        power = self._transfer(working).abs().square()
        if self.boundary == "circular":
            return self._filter(working, 1 / (a * power + b)).to(rhs.dtype)
        # The floor keeps what differs at the edges from being amplified by a / b: without it the
        # preconditioner costs iterations, with it it saves up to half of them.
        floor = 0.03 * power.amax(dim=(-2, -1), keepdim=True)
        inverse = 1 / (a * (power + floor) + b)
        solution = conjugate_gradient(
            lambda x: a * self.adjoint(self(x)) + b * x,
            working,
            rtol=self.tolerances[working.dtype],
            max_iterations=self.max_iterations,
            precondition=lambda residual: self._filter(residual, inverse),
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

    @staticmethod
    def _filter(images: Tensor, transfer: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(images) * transfer
        filtered: Tensor = torch.fft.irfft2(spectrum, s=images.shape[-2:])
        return filtered

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
        check_positive("std", std)
        check_count("kernel_size", kernel_size)
        offsets = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
        axis = torch.exp(-0.5 * (offsets / std) ** 2)
        kernel = torch.outer(axis, axis)
        super().__init__(kernel / kernel.sum(), boundary)
        self.std = std


class MotionBlur(Blur):
    """Blur along the path of a shaken camera; the matrix is Blur's.

    The heading starts at random. Its rate of turn is a smooth random function of time, and so is
    the speed, so that the camera dwells at some points. The path is centred on its mean, shrunk to
    the kernel if it leaves it, spread over the four nearest pixels at each instant, and normalised
    to sum 1.

    Args:
        kernel_size: side of the kernel, pixels, >= 1.
        intensity: in [0, 1], from nearly straight and even to strongly shaken.
        seed: the same seed gives the same kernel, >= 0.
        boundary: see Blur.

    Raises:
        ValueError: if an argument is out of range.
    """

    family = "motion_blur"

    def __init__(
        self,
        kernel_size: int,
        intensity: float,
        seed: int = 0,
        boundary: Boundary = "circular",
    ) -> None:
        check_count("kernel_size", kernel_size)
        check_count("seed", seed, least=0)
        if check_non_negative("intensity", intensity) > 1:
            raise ValueError(f"intensity must be in [0, 1], got {intensity}")
        path = _camera_path(intensity, torch.Generator().manual_seed(seed))
        super().__init__(_draw_path(path, kernel_size), boundary)
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


def _camera_path(intensity: float, generator: torch.Generator, steps: int = 4000) -> Tensor:
    """Return positions (row, column) of the camera over one exposure, shape (steps, 2).

    The unit of length is the side of the kernel; the path is 0.75 long and centred on its mean.
    """

    def smooth_noise(correlation: float) -> Tensor:
        """Draw a smooth function of time on [0, 1], standard normal at each instant."""
        frequencies = torch.randn(16, 1, dtype=torch.float64, generator=generator) / correlation
        phases = torch.rand(16, 1, dtype=torch.float64, generator=generator) * 2 * math.pi
        time = torch.linspace(0, 1, steps, dtype=torch.float64)
        return torch.cos(frequencies * time + phases).sum(dim=0) * math.sqrt(2 / 16)

    start = torch.rand((), dtype=torch.float64, generator=generator) * 2 * math.pi
    turn_rate = 0.3 + 8 * intensity + 10 * intensity**2
    heading = start + (turn_rate * smooth_noise(0.15)).cumsum(dim=0) / steps
    speed = torch.exp((0.2 + 0.4 * intensity) * smooth_noise(0.1))
    speed = 0.75 * speed / speed.sum()
    moves = torch.stack((heading.cos(), heading.sin()), dim=1) * speed[:, None]
    path = moves.cumsum(dim=0)
    return path - path.mean(dim=0)


def _draw_path(path: Tensor, size: int) -> Tensor:
    """Return the normalised kernel of a path in units of its side, shape (size, size)."""
    reach = (size - 1) // 2
    positions = path * size
    largest = float(positions.abs().max())
    if largest > reach:
        positions = positions * (reach / largest)
    positions = positions + size // 2
    corner = positions.floor().clamp(max=size - 1)
    kernel = torch.zeros(size, size, dtype=torch.float64)
    for row in (0, 1):
        for column in (0, 1):
            pixel = corner + torch.tensor([row, column])
            weight = (1 - (positions - pixel).abs()).clamp(min=0).prod(dim=1)
            index = pixel.long().clamp(max=size - 1)
            kernel.index_put_((index[:, 0], index[:, 1]), weight, accumulate=True)
    return kernel / kernel.sum()
