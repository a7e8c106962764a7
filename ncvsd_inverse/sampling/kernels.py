"""The kernel of a blur, from images that err by a Gaussian of known covariance.

If the image is x + e with e normal of covariance S, diagonal over frequencies f and mixtures of
colours c, then y = k * (x + e) + n is normal too, and the kernel is what makes most of

    log p(y | x, k) = -1/2 sum_fc |y_fc - k_f x_fc|^2 / V_fc + log V_fc,
    V_fc = |k_f|^2 S_fc + s^2.

The second term keeps the kernel from shrinking to a point, as it does where x stands for the image
itself. Where y is not periodic, the misfit fades out towards the edges before it is transformed
(Whittle's likelihood with a taper).

Source: Whittle, Estimation and information in stationary time series (1953); Dahlhaus, Spectral
analysis with tapered data (1983). The nearest published method, which takes the mean of |y - k * x|
over a cloud of draws x, is Fast Diffusion EM: Laroche, Almansa & Coupete, WACV 2024. Levin et al.,
Understanding and evaluating blind deconvolution algorithms, CVPR 2009, on why images must not
stand for their law.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ncvsd_inverse.machine import exact_arithmetic
from ncvsd_inverse.priors.covariance import SpectralCovariance
from ncvsd_inverse.protocols import Covariance, KernelFamily, LinearOperator, UnknownKernel

__all__ = ["FoundKernel", "KernelLikelihood", "KernelTracker", "centred", "without_dust"]

SMOOTHNESS = 30.0
"""Weight of the law of smooth kernels: nats for squared differences as large as the squares."""

STARTS = (0.7, 2.0)
"""Stds of the Gaussians at which the first search begins, pixels."""

FIRST_STEPS, STEPS = 50, 25
"""Most iterations of the first search and of those of a sweep."""

DUST = 0.1
"""Sums of three by three weights that count as nothing, as a share of the largest."""

AVERAGED = 0.5
"""Share of the sweeps, the last ones, whose kernels are averaged."""

GRID = 12
"""Values of each number of a family that are tried first."""

NOISE_ENDS = (math.log(1e-7), 2.0)
"""Logarithms of the smallest and largest noise variance that a fit takes, squared units of y."""


class FoundKernel(NamedTuple):
    """A kernel.

    Attributes:
        kernel: weights, shape (n, n), float64.
        std: how sure each is, a std, shape (n, n).
        sigma: noise std of y, units of y.
        numbers: what tells it apart in its family, (mean, std) each; () of any kernel.
    """

    kernel: Tensor
    std: Tensor
    sigma: float
    numbers: tuple[tuple[float, float], ...] = ()


class KernelLikelihood:
    """The likelihood of a kernel, given images of known error.

    Args:
        y: measurements of one kernel, shape (B, C, h, w).
        blur: what is known of it.
    """

    def __init__(self, y: Tensor, blur: UnknownKernel) -> None:
        self._y = y.detach().double().cpu()
        self.size = blur.kernel_size
        self._half = self.size // 2
        self._periodic = blur.boundary == "circular"
        self._extension = blur.boundary
        height, width = y.shape[2:]
        edges = [self._edge(side) for side in (height, width)]
        self._taper = edges[0][:, None] * edges[1]
        weights = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64)
        weights[0] = 1
        if width % 2 == 0:
            weights[-1] = 1
        self._weights = weights  # columns between the first and the last stand for two

    def _edge(self, side: int) -> Tensor:
        """Return the weights of an axis, of mean square 1, 0 where pixels beyond the edge reach."""
        weights = torch.ones(side, dtype=torch.float64)
        if self._periodic:
            return weights
        nothing = 0 if self._extension == "valid" else min(self._half // 2, side // 8)
        fade = max(1, min(max(self._half, 8), side // 4))
        rise = torch.sin((torch.arange(fade, dtype=torch.float64) + 0.5) * (math.pi / 2 / fade))
        ramp = torch.cat((torch.zeros(nothing, dtype=torch.float64), rise**2))
        weights[: len(ramp)] = ramp
        weights[side - len(ramp) :] = ramp.flip(0)
        return weights / weights.square().mean().sqrt()

    @exact_arithmetic()
    def given(self, x: Tensor, covariance: SpectralCovariance, factor: float = 1.0) -> None:
        """Take images (B, C, H, W) and the covariance of their errors for images as large as y."""
        covariance = SpectralCovariance(
            covariance.mixing.cpu(), covariance.spectrum.cpu(), self._y.shape[3]
        ).double()
        x = x.detach().double().cpu()
        if self._extension in ("replicate", "reflect"):
            x = functional.pad(x, [self._half] * 4, mode=self._extension)
        self._sides = x.shape[2:]
        self._x: Tensor = torch.fft.rfft2(covariance.mix(x))
        self._mixed = covariance.mix(self._y)
        self._spectrum = factor * covariance.spectrum
        self._observed: Tensor = torch.fft.rfft2(self._mixed)

    def value(self, kernel: Tensor, variance: float) -> tuple[float, Tensor, float]:
        """Return -log p(y | x, kernel) and its derivatives in kernel and noise variance."""
        pixels = self._y.shape[2] * self._y.shape[3]
        gains = self._transfer(kernel, self._y.shape[2:])
        misfit = self._misfit(kernel)
        spread = gains.abs().square() * self._spectrum + variance
        power = (misfit.real.square() + misfit.imag.square()).mean(0) / pixels
        value = 0.5 * float((self._weights * (power / spread + spread.log())).sum())
        slopes = 0.5 * (1 / spread - power / spread**2)
        slope = float((self._weights * slopes).sum())
        by_gain = 2 * (slopes * self._spectrum).sum(0) * gains
        gradient = self._weights_of(by_gain * pixels, self._y.shape[2:])
        return value, gradient - self._pull(misfit / spread), slope

    def information(self, kernel: Tensor, variance: float) -> Tensor:
        """Return what y tells of each pair of weights if x is held, shape (n^2, n^2).

        Of the information in V it has nothing.
        """
        height, width = self._y.shape[2:]
        spread = self._transfer(kernel, self._y.shape[2:]).abs().square() * self._spectrum
        seen = self._x
        if not self._periodic:
            inside = self._inside(torch.fft.irfft2(self._x, s=self._sides))
            seen = torch.fft.rfft2(self._taper * inside)
        power = (seen.abs().square().mean(0) / (spread + variance)).sum(0)
        lags = torch.fft.irfft2(power, s=(height, width))
        places = torch.cartesian_prod(torch.arange(self.size), torch.arange(self.size))
        rows, columns = (places[:, None] - places).unbind(2)
        matrix: Tensor = lags[rows % height, columns % width]
        return matrix

    def _transfer(self, kernel: Tensor, sides: Sequence[int]) -> Tensor:
        """Return the half spectrum of a kernel, its centre at the origin."""
        height, width = sides
        padded = functional.pad(kernel, (0, width - self.size, 0, height - self.size))
        spectrum: Tensor = torch.fft.rfft2(padded.roll((-self._half, -self._half), dims=(0, 1)))
        return spectrum

    def _weights_of(self, spectrum: Tensor, sides: Sequence[int]) -> Tensor:
        """Return the part of an image, by its half spectrum, that a kernel covers."""
        whole: Tensor = torch.fft.irfft2(spectrum, s=tuple(sides))
        return whole.roll((self._half, self._half), dims=(0, 1))[: self.size, : self.size]

    def _misfit(self, kernel: Tensor) -> Tensor:
        """Return the half spectrum of y - kernel * x, faded out at the edges."""
        blurred = self._x * self._transfer(kernel, self._sides)
        if self._periodic:
            return self._observed - blurred
        inside = self._inside(torch.fft.irfft2(blurred, s=self._sides))
        misfit: Tensor = torch.fft.rfft2(self._taper * (self._mixed - inside))
        return misfit

    def _pull(self, spectrum: Tensor) -> Tensor:
        """Return the transpose of kernel -> kernel * x, faded out, of what has a half spectrum."""
        images, sides = len(self._y), self._y.shape[2:]
        if not self._periodic:
            faded = self._taper * torch.fft.irfft2(spectrum, s=sides)
            spectrum = torch.fft.rfft2(self._outside(faded))
        return self._weights_of((self._x.conj() * spectrum).sum((0, 1)), self._sides) / images

    def _inside(self, x: Tensor) -> Tensor:
        """Drop what is beyond the edges of y."""
        height, width = self._y.shape[2:]
        half = self._half
        return x[..., half : half + height, half : half + width]

    def _outside(self, y: Tensor) -> Tensor:
        """Put zeros beyond the edges of y."""
        return functional.pad(y, [self._half] * 4)


class KernelTracker:
    """Follows the kernel of one measurement along its chains, which share it.

    Args:
        y: the measurement, repeated for each chain, shape (chains, C, h, w).
        blur: what is known of it.
        sigma: noise std of y, units of y; None: not known, and fitted too.
        first: where a search for the noise begins.

    Attributes:
        kernel: the latest kernel, shape (n, n), float64.
        sigma: noise std of y.
    """

    def __init__(
        self, y: Tensor, blur: UnknownKernel, sigma: float | None, *, first: float = 0.05
    ) -> None:
        self.blur = blur
        self.sigma = first if sigma is None else sigma
        self._noise_is_known = sigma is not None
        self._likelihood = KernelLikelihood(y, blur)
        self._like = y
        self._kernels: list[Tensor] = []
        self._numbers: list[tuple[float, ...]] = []
        self.kernel = torch.zeros(())

    def start(self, mean: Tensor, covariance: Covariance) -> LinearOperator:
        """Begin with the most likely kernel for a Gaussian law of images.

        Args:
            mean: mean image, shape (1, C, H, W).
            covariance: covariance of images as large as y.
        """
        self._take(mean.expand(len(self._like), *mean.shape[1:]), covariance, 1.0)
        size, family = self.blur.kernel_size, self.blur.family
        if family is not None:
            return self._search(family)
        gaussians = [_gaussian(std, size) for std in STARTS]
        ends = [self._climb(kernel, FIRST_STEPS) for kernel in gaussians]
        _, self.kernel, self.sigma = min(ends, key=lambda end: end[0])
        return self._operator()

    def update(self, x: Tensor, covariance: Covariance, *, factor: float) -> LinearOperator:
        """Move the kernel to the most likely one and return its blur.

        Args:
            x: images (chains, C, H, W) that err by a Gaussian.
            covariance: its covariance for images as large as y.
            factor: a factor on it.
        """
        self._take(x, covariance, factor)
        if self.blur.family is not None:
            return self._search(self.blur.family)
        _, self.kernel, self.sigma = self._climb(self.kernel, STEPS)
        self._kernels.append(self.kernel)
        return self._operator()

    def found(self) -> FoundKernel:
        """Return the mean of the kernels of the last sweeps, and their spread.

        The variance of a weight is that over the sweeps and that of the last one, where the
        likelihood is nearly Gaussian, together.
        """
        count = max(len(self._kernels), len(self._numbers))
        last = max(1, math.ceil(AVERAGED * count))
        if self.blur.family is not None:
            numbers = self._spread_of_numbers(self.blur.family, last)
            return self._of_family(self.blur.family, numbers)
        kernels = torch.stack(self._kernels[-last:])
        mean = kernels.mean(0)
        over_sweeps = kernels.var(0) if last > 1 else torch.zeros_like(mean)
        mean, spread = centred(without_dust(mean), over_sweeps + self._variances(mean))
        return FoundKernel(mean, spread.sqrt(), self.sigma)

    def _of_family(
        self, family: KernelFamily, numbers: tuple[tuple[float, float], ...]
    ) -> FoundKernel:
        """Return the kernel of a family with some numbers, (mean, std) each."""
        centre = [mean for mean, _ in numbers]
        kernel = family.draw(centre, self.blur.kernel_size)
        spread = torch.zeros_like(kernel)
        for place, (mean, std) in enumerate(numbers):
            moved = family.draw([*centre[:place], mean + std, *centre[place + 1 :]], len(kernel))
            spread = spread + (moved - kernel).square()
        return FoundKernel(kernel, spread.sqrt(), self.sigma, numbers)

    def _take(self, x: Tensor, covariance: Covariance, factor: float) -> None:
        if not isinstance(covariance, SpectralCovariance):
            raise TypeError(
                "prior must have a covariance of frequencies for a BlindBlur, got "
                f"{type(covariance).__name__}"
            )
        self._likelihood.given(x, covariance, factor)

    def _operator(self) -> LinearOperator:
        return self.blur.with_kernel(self.kernel.to(self._like))

    def _climb(self, kernel: Tensor, steps: int) -> tuple[float, Tensor, float]:
        """Return -log of the most likely density, its kernel and its noise, from a kernel on."""
        from scipy.optimize import minimize

        size = self.blur.kernel_size

        def energy(place: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            weights = torch.from_numpy(place[:-1].copy()).view(size, size)
            total = float(weights.sum().clamp(min=1e-6))
            kernel, variance = weights / total, math.exp(place[-1])
            value, gradient, slope = self._likelihood.value(kernel, variance)
            rough, rougher = _roughness(kernel)
            gradient = gradient + SMOOTHNESS * rougher
            gradient = (gradient - (gradient * kernel).sum()) / total
            slope = 0.0 if self._noise_is_known else slope * variance
            return value + SMOOTHNESS * rough, np.append(gradient.numpy().ravel(), slope)

        level = 2 * math.log(self.sigma)
        ends = (level, level) if self._noise_is_known else NOISE_ENDS
        result = minimize(
            energy,
            np.append(kernel.numpy().ravel(), level),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None)] * size**2 + [ends],
            options={"maxiter": steps, "maxcor": 20},
        )
        weights = torch.from_numpy(result.x[:-1]).view(size, size)
        return float(result.fun), weights / weights.sum(), math.exp(result.x[-1] / 2)

    def _variances(self, kernel: Tensor) -> Tensor:
        """Return the variance of each weight by the Gaussian law about a kernel."""
        information = self._likelihood.information(kernel, self.sigma**2)
        units = torch.eye(kernel.numel(), dtype=kernel.dtype).view(-1, *kernel.shape)
        rough = 2 * SMOOTHNESS * _differences(units).flatten(1) / float(kernel.square().sum())
        covariance: Tensor = torch.linalg.inv(information + rough)
        sums = covariance.sum(1)
        variances: Tensor = covariance.diagonal() - sums.square() / sums.sum()  # weights sum to 1
        return variances.clamp(min=0).view_as(kernel)

    def _search(self, family: KernelFamily) -> LinearOperator:
        """Move to the most likely numbers of a family: the best of a grid, then downhill."""
        from scipy.optimize import minimize, minimize_scalar

        ranges = family.ranges(self.blur.kernel_size)
        axes = [low + (np.arange(GRID) + 0.5) / GRID * (high - low) for low, high in ranges]
        known = [np.array(numbers) for numbers in self._numbers[-1:]]
        grid = [np.array(numbers) for numbers in itertools.product(*axes)]
        best = min([*known, *grid], key=self._energy)
        result = minimize(
            self._energy,
            best,
            method="Nelder-Mead",
            bounds=[
                (None, None) if math.isfinite(period) else ends
                for period, ends in zip(family.periods, ranges, strict=True)
            ],
            options={
                "initial_simplex": np.stack(
                    [best, *(best + row for row in np.diag(np.ptp(ranges, axis=1) / (2 * GRID)))]
                ),
                "maxiter": STEPS,
            },
        )
        self._numbers.append(tuple(result.x.tolist()))
        self.kernel = family.draw(self._numbers[-1], self.blur.kernel_size)
        if not self._noise_is_known:
            fitted = minimize_scalar(
                lambda level: self._likelihood.value(self.kernel, math.exp(level))[0],
                bounds=NOISE_ENDS,
                method="bounded",
            )
            self.sigma = math.exp(fitted.x / 2)
        return self._operator()

    def _energy(self, numbers: NDArray[np.float64]) -> float:
        """Return -log p(y | x, kernel) of the kernel with some numbers in its family."""
        assert self.blur.family is not None
        kernel = self.blur.family.draw(numbers.tolist(), self.blur.kernel_size)
        return self._likelihood.value(kernel, self.sigma**2)[0]

    def _spread_of_numbers(
        self, family: KernelFamily, last: int
    ) -> tuple[tuple[float, float], ...]:
        """Return mean and std of the numbers, over the last sweeps and by the last likelihood."""
        numbers = torch.tensor(self._numbers[-last:], dtype=torch.float64)
        latest = numbers[-1]
        periods = torch.tensor(family.periods, dtype=torch.float64)
        away = numbers - latest
        away = torch.where(periods.isfinite(), away - periods * (away / periods).round(), away)
        spread = away.var(0) if last > 1 else torch.zeros_like(latest)
        steps = [0.02 * (high - low) for low, high in family.ranges(self.blur.kernel_size)]
        curvature = torch.tensor(_second_differences(self._energy, latest.numpy(), steps))
        values, vectors = torch.linalg.eigh(curvature)
        sure = (vectors**2 / values.clamp(min=1e-12)).sum(1)
        means = latest + away.mean(0)
        return tuple(zip(means.tolist(), (spread + sure).sqrt().tolist(), strict=True))


def centred(kernel: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Return a kernel and what belongs to its weights, moved so that its mean is at the centre.

    They move by whole pixels, and no farther than no weight is lost.
    """
    size = len(kernel)
    places = torch.arange(size, dtype=kernel.dtype) - size // 2
    moves = []
    for axis in (0, 1):
        sums = kernel.sum(1 - axis)
        used = sums.nonzero()[:, 0]
        wanted = -round(float(sums @ places / sums.sum()))
        moves.append(max(-int(used[0]), min(wanted, size - 1 - int(used[-1]))))
    return kernel.roll(moves, (0, 1)), spread.roll(moves, (0, 1))


def without_dust(kernel: Tensor) -> Tensor:
    """Return a kernel without the weights that stand alone far below the others."""
    sums = functional.avg_pool2d(kernel[None, None], 3, stride=1, padding=1)[0, 0]
    kept = torch.where(sums < DUST * sums.max(), 0.0, kernel)
    return kept / kept.sum()


def _roughness(kernel: Tensor) -> tuple[float, Tensor]:
    """Return squared differences of neighbours over squares, and the derivative in the kernel."""
    squares = kernel.square().sum()
    differences = _differences(kernel[None])[0]
    rough = (kernel * differences).sum() / squares
    return float(rough), 2 * (differences - rough * kernel) / squares


def _differences(kernels: Tensor) -> Tensor:
    """Return four times a weight less its neighbours, 0 beyond the edges, shape (B, n, n)."""
    around = functional.pad(kernels, [1] * 4)
    neighbours = around[:, 2:, 1:-1] + around[:, :-2, 1:-1]
    neighbours = neighbours + around[:, 1:-1, 2:] + around[:, 1:-1, :-2]
    return 4 * kernels - neighbours


def _second_differences(
    energy: Callable[[NDArray[np.float64]], float],
    place: NDArray[np.float64],
    steps: Sequence[float],
) -> NDArray[np.float64]:
    """Return the matrix of second derivatives of a function of a few numbers."""
    moves = np.diag(steps)
    count = len(steps)
    matrix = np.empty((count, count))
    for i, j in itertools.product(range(count), repeat=2):
        corners = (
            sign * other * energy(place + sign * moves[i] + other * moves[j])
            for sign in (1, -1)
            for other in (1, -1)
        )
        matrix[i, j] = sum(corners) / (4 * steps[i] * steps[j])
    return matrix


def _gaussian(std: float, size: int) -> Tensor:
    axis = torch.exp(-0.5 * ((torch.arange(size, dtype=torch.float64) - size // 2) / std) ** 2)
    kernel = torch.outer(axis, axis)
    return kernel / kernel.sum()
