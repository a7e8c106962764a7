"""Priors whose denoising posterior has a closed form: Gaussians and mixtures of Gaussians."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from ncvsd_inverse.checks import (
    check_count,
    check_finite,
    check_floating,
    check_image_size,
    check_images,
    check_level,
    check_positive,
    check_shape,
)
from ncvsd_inverse.machine import Cache, exact_arithmetic
from ncvsd_inverse.numerics import draw_normal, expand_level, hartley
from ncvsd_inverse.priors.covariance import DenseCovariance, SpectralCovariance
from ncvsd_inverse.protocols import Covariance, Generators, Statistics

__all__ = ["GaussianMixturePrior", "GaussianPrior"]


class GaussianPrior:
    """Images that are one multivariate Gaussian; draws of x0 given u are exact.

    With u = x0 + sigma * eps and covariance C, the posterior of x0 is Gaussian with mean
    m + C (C + sigma^2 I)^-1 (u - m) and covariance sigma^2 C (C + sigma^2 I)^-1. Parameters are
    kept in float64 and cast once for each dtype and device of `u`.

    >>> prior = GaussianPrior(torch.zeros(1, 2, 2), 0.25 * torch.eye(4))
    >>> prior.sample(torch.ones(5, 1, 2, 2), 0.5).shape
    torch.Size([5, 1, 2, 2])

    Args:
        mean: the mean image m, shape (C, H, W).
        covariance: symmetric positive semi-definite, shape (D, D), D = C * H * W, pixels in the
            order of `mean.flatten()`.

    Attributes:
        image_shape: (C, H, W).
        nfe_per_sample: 1.
        sigma_min: 0.0, any positive level is exact.
        sigma_max: infinity, likewise.
        statistics: mean and covariances for sampling by conditioning, exact.

    Raises:
        ValueError: if a shape is wrong, an entry is not finite, or `covariance` is not symmetric
            positive semi-definite up to the rounding of its dtype.
    """

    @exact_arithmetic()
    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        _check_mean(mean)
        check_floating("covariance", covariance)
        check_shape("covariance", covariance, (mean.numel(), mean.numel()))
        self._set(mean, *_eigen("covariance", covariance, _triple(mean.shape)))

    @classmethod
    @exact_arithmetic()
    def stationary(cls, mean: Tensor, spectrum: Tensor) -> Self:
        """Return a Gaussian whose covariance is a circular convolution of each channel.

        Everything stays diagonal in Fourier space: no (D, D) matrix is formed. Channels are
        independent of each other.

        Args:
            mean: the mean image, shape (C, H, W).
            spectrum: variance of each coefficient of the orthonormal 2-D FFT of an image minus
                the mean, in the layout of `torch.fft.fft2` (frequency 0 first), shape (C, H, W)
                or (1, H, W) for all channels. These are the eigenvalues of the covariance.

        Raises:
            ValueError: if a shape is wrong, or `spectrum` is not finite, not >= 0, or differs
                between a frequency and its negative (no real image could have it).
        """
        _check_mean(mean)
        check_floating("spectrum", spectrum)
        channels, height, width = mean.shape
        if tuple(spectrum.shape) not in {(channels, height, width), (1, height, width)}:
            raise ValueError(
                f"spectrum must have shape ({channels} or 1, {height}, {width}), "
                f"got {tuple(spectrum.shape)}"
            )
        check_finite("spectrum", spectrum)
        values = spectrum.detach().to("cpu", torch.float64)
        if float(values.min()) < 0:
            raise ValueError(f"spectrum must be non-negative, got {float(values.min()):g}")
        negative = values.flip(1, 2).roll((1, 1), (1, 2))
        tolerance = 100 * torch.finfo(spectrum.dtype).eps * float(values.max())
        if float((values - negative).abs().max()) > tolerance:
            raise ValueError("spectrum must be the same at a frequency and its negative")
        variances = ((values + negative) / 2).expand(channels, height, width).flatten()
        prior = cls.__new__(cls)
        prior._set(mean, variances, _Hartley((channels, height, width)))
        return prior

    def _set(self, mean: Tensor, variances: Tensor, basis: "_Basis") -> None:
        self.image_shape = _triple(mean.shape)
        self.nfe_per_sample = 1
        self.sigma_min = 0.0
        self.sigma_max = math.inf
        self._temperature = 1.0
        self._like = torch.empty(0, dtype=mean.dtype, device=mean.device)
        self._law = _CachedLaw(_exact_law(mean, variances, basis))
        self.statistics: Statistics = _GaussianStatistics(self._law, self.image_shape)

    @exact_arithmetic()
    def sample(self, u: Tensor, sigma: float | Tensor, *, generator: Generators = None) -> Tensor:
        """One exact draw of x0 ~ p(x0 | u).

        Args:
            u: noisy images x0 + sigma * eps, shape (B, C, H, W).
            sigma: noise std, > 0, image units; a float or shape (B,).
            generator: None, one generator, or one for each image.

        Returns:
            Draws, same shape, dtype and device as u.

        Raises:
            ValueError: if a shape is wrong or sigma is not positive and finite.
        """
        x, level = _flatten("u", u, sigma, self.image_shape)
        law = self._law.cast(x)
        eps = self._temperature * draw_normal(x, generator)
        coordinates = law.posterior_draw(law.coordinates(x), level, eps)
        return law.pixels(coordinates).reshape(u.shape).to(u.dtype)

    def tempered(self, temperature: float) -> Self:
        """Return this prior with the std of its draws given u scaled by a factor > 0."""
        twin = copy.copy(self)
        twin._temperature = self._temperature * check_positive("temperature", temperature)
        return twin

    @exact_arithmetic()
    def denoise(self, u: Tensor, sigma: float | Tensor) -> Tensor:
        """Return the posterior mean E[x0 | u]: an exact teacher.

        Args:
            u: noisy images, shape (B, C, H, W).
            sigma: noise std, > 0, image units; a float or shape (B,).

        Returns:
            Means, same shape, dtype and device as u.

        Raises:
            ValueError: if a shape is wrong or sigma is not positive and finite.
        """
        x, level = _flatten("u", u, sigma, self.image_shape)
        law = self._law.cast(x)
        coordinates = law.posterior_mean(law.coordinates(x), level)
        return law.pixels(coordinates).reshape(u.shape).to(u.dtype)

    @exact_arithmetic()
    def draw(self, num: int, *, generator: Generators = None) -> Tensor:
        """Draw `num` images from the prior, shape (num, C, H, W), dtype and device of `mean`."""
        eps = _draw_standard(self._like, num, math.prod(self.image_shape), generator)
        law = self._law.cast(eps)
        images = law.pixels(law.variances.sqrt() * eps)
        return images.reshape(num, *self.image_shape).to(self._like.dtype)


class GaussianMixturePrior:
    """Images that are a mixture of multivariate Gaussians; draws of x0 given u are exact.

    A draw picks component k with its posterior probability given u, then draws from that
    component's Gaussian posterior.

    Args:
        weights: probability of each component, >= 0 with sum 1, shape (K,).
        means: mean images, shape (K, C, H, W).
        covariances: symmetric positive semi-definite, shape (K, D, D), D = C * H * W.

    Attributes:
        image_shape: (C, H, W).
        nfe_per_sample: 1.
        sigma_min: 0.0, any positive level is exact.
        sigma_max: infinity, likewise.
        statistics: the average over u of the covariance given u, level by level, for sampling by
            conditioning; approximate, as that of one u differs from it.

    Raises:
        ValueError: if a shape is wrong, an entry is not finite, a covariance is not symmetric
            positive semi-definite, or the weights are no probabilities.
    """

    @exact_arithmetic()
    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        check_images("means", means)
        check_finite("means", means)
        num, dim = means.shape[0], means[0].numel()
        check_floating("weights", weights)
        check_shape("weights", weights, (num,))
        check_finite("weights", weights)
        total = float(weights.double().sum())
        if float(weights.min()) < 0 or abs(total - 1) > 1e-6:
            raise ValueError(f"weights must be non-negative with sum 1, got sum {total:.7g}")
        check_floating("covariances", covariances)
        check_shape("covariances", covariances, (num, dim, dim))
        self.image_shape = _triple(means.shape[1:])
        self.nfe_per_sample = 1
        self.sigma_min = 0.0
        self.sigma_max = math.inf
        self._like = torch.empty(0, dtype=means.dtype, device=means.device)
        self._log_weights = weights.detach().to("cpu", torch.float64).log()
        self._components = [
            _CachedLaw(
                _exact_law(mean, *_eigen(f"covariances[{k}]", covariances[k], self.image_shape))
            )
            for k, mean in enumerate(means)
        ]
        self.statistics: Statistics = _MixtureStatistics(self)

    @exact_arithmetic()
    def sample(self, u: Tensor, sigma: float | Tensor, *, generator: Generators = None) -> Tensor:
        """One exact draw of x0 ~ p(x0 | u).

        Args:
            u: noisy images x0 + sigma * eps, shape (B, C, H, W).
            sigma: noise std, > 0, image units; a float or shape (B,).
            generator: None, one generator, or one for each image.

        Returns:
            Draws, same shape, dtype and device as u.

        Raises:
            ValueError: if a shape is wrong or sigma is not positive and finite.
        """
        x, level = _flatten("u", u, sigma, self.image_shape)
        laws = self._laws(x)
        log_probabilities, coordinates = self._posterior(x, level, laws)
        chosen = _draw_index(log_probabilities, generator)
        eps = draw_normal(x, generator)
        out = torch.empty_like(x)
        for k, law in enumerate(laws):
            own = chosen == k
            draws = law.posterior_draw(coordinates[k][own], level[own], eps[own])
            out[own] = law.pixels(draws)
        return out.reshape(u.shape).to(u.dtype)

    @exact_arithmetic()
    def denoise(self, u: Tensor, sigma: float | Tensor) -> Tensor:
        """Return the posterior mean E[x0 | u]: an exact teacher.

        Args:
            u: noisy images, shape (B, C, H, W).
            sigma: noise std, > 0, image units; a float or shape (B,).

        Returns:
            Means, same shape, dtype and device as u.

        Raises:
            ValueError: if a shape is wrong or sigma is not positive and finite.
        """
        x, level = _flatten("u", u, sigma, self.image_shape)
        laws = self._laws(x)
        log_probabilities, coordinates = self._posterior(x, level, laws)
        out = torch.zeros_like(x)
        for k, law in enumerate(laws):
            mean = law.pixels(law.posterior_mean(coordinates[k], level))
            out = out + log_probabilities[:, k, None].exp() * mean
        return out.reshape(u.shape).to(u.dtype)

    @exact_arithmetic()
    def draw(self, num: int, *, generator: Generators = None) -> Tensor:
        """Draw `num` images from the prior, shape (num, C, H, W), dtype and device of `means`."""
        eps = _draw_standard(self._like, num, math.prod(self.image_shape), generator)
        out = _draw_mixture(self._laws(eps), self._log_weights, eps, generator)
        return out.reshape(num, *self.image_shape).to(self._like.dtype)

    def _laws(self, like: Tensor) -> list["_Law"]:
        return [component.cast(like) for component in self._components]

    def _posterior(
        self, x: Tensor, level: Tensor, laws: Sequence["_Law"]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return log p(k | u), shape (B, K), and each component's coordinates of u, (B, D)."""
        coordinates = [law.coordinates(x) for law in laws]
        log_densities = [
            law.log_density(own, level) for law, own in zip(laws, coordinates, strict=True)
        ]
        joint = torch.stack(log_densities, dim=1) + self._log_weights.to(x)
        return joint - joint.logsumexp(dim=1, keepdim=True), coordinates


_LEAST_VARIANCE = 1e-12
"""Least variance of a covariance that is handed out, over its largest: roots divide elsewhere."""

_MIXTURE_IMAGES = 1024
"""Noisy images over which a mixture's covariance is averaged."""


@dataclass(frozen=True, eq=False)
class _GaussianStatistics:
    """What a Gaussian knows exactly."""

    law: "_CachedLaw"
    image_shape: tuple[int, int, int]
    note: ClassVar[str] = ""

    @exact_arithmetic()
    def mean_image(self, like: Tensor) -> Tensor:
        return self.law.cast(like).mean.reshape(1, *self.image_shape)

    @exact_arithmetic()
    def covariance(self, sigma: float, like: Tensor) -> Covariance:
        law = self.law.cast(like)
        left = law.variances
        if not math.isinf(sigma):
            left = left * sigma**2 / (left + sigma**2)
        left = left.clamp(min=_LEAST_VARIANCE * float(left.max()))
        return law.basis.covariance(left)


class _MixtureStatistics:
    """Mean of a mixture, its covariance, and the average covariance given a noisy image."""

    note = (
        "the covariances of a GaussianMixturePrior are averages over what a noisy image may be; "
        "draws by conditioning are approximate"
    )

    def __init__(self, prior: GaussianMixturePrior) -> None:
        self._prior = prior
        self._kept: Cache[_Eigenpairs] = Cache(128)

    @exact_arithmetic()
    def mean_image(self, like: Tensor) -> Tensor:
        weights = self._prior._log_weights.exp()
        means = torch.stack([part.exact.mean for part in self._prior._components])
        return (weights @ means).reshape(1, *self._prior.image_shape).to(like)

    @exact_arithmetic()
    def covariance(self, sigma: float, like: Tensor) -> Covariance:
        kept = self._kept.get(sigma, lambda: self._average(sigma))
        values, vectors = (part.to(like) for part in kept)
        return DenseCovariance(vectors, values, self._prior.image_shape)

    def _average(self, sigma: float) -> "_Eigenpairs":
        """Return E[Cov[x0 | u]]: within components in closed form, between them by Monte Carlo."""
        prior = self._prior
        weights = prior._log_weights.exp()
        laws = [part.exact for part in prior._components]
        if math.isinf(sigma):
            posteriors = torch.stack([law.mean for law in laws])[None]
            probabilities = weights[None]
            gains = [law.variances for law in laws]
        else:
            source = torch.Generator().manual_seed(0)
            # The same numbers wherever the prior lives.
            cpu = torch.empty(0, dtype=torch.float64)
            eps = _draw_standard(cpu, _MIXTURE_IMAGES, math.prod(prior.image_shape), source)
            x0 = _draw_mixture(laws, prior._log_weights, eps, source)
            u = x0 + sigma * torch.randn(x0.shape, generator=source, dtype=torch.float64)
            level = expand_level(sigma, u)
            log_probabilities, coordinates = prior._posterior(u, level, laws)
            probabilities = log_probabilities.exp()
            posteriors = torch.stack(
                [
                    law.pixels(law.posterior_mean(own, level))
                    for law, own in zip(laws, coordinates, strict=True)
                ],
                1,
            )
            gains = [law.variances * sigma**2 / (law.variances + sigma**2) for law in laws]
        mean = torch.einsum("nk,nkd->nd", probabilities, posteriors)
        apart = (probabilities.sqrt()[..., None] * (posteriors - mean[:, None])).flatten(0, 1)
        total = apart.T @ apart / len(mean)
        for weight, law, gain in zip(weights, laws, gains, strict=True):
            root = law.basis.synthesise(torch.diag(gain.sqrt()))
            total += weight * (root.T @ root)
        values, vectors = torch.linalg.eigh(total)
        return _Eigenpairs(values.clamp(min=_LEAST_VARIANCE * float(values[-1])), vectors)


class _Eigenpairs(NamedTuple):
    """Eigenvalues (D,) and eigenvectors (D, D) of a covariance."""

    values: Tensor
    vectors: Tensor


class _Basis(Protocol):
    """A real orthonormal basis of flattened images in which a covariance is diagonal."""

    def to(self, like: Tensor) -> "_Basis": ...
    def analyse(self, x: Tensor) -> Tensor: ...
    def synthesise(self, coordinates: Tensor) -> Tensor: ...
    def covariance(self, variances: Tensor) -> Covariance: ...


@dataclass(frozen=True)
class _Eigenvectors:
    """The columns of an orthogonal matrix, (D, D)."""

    vectors: Tensor
    image_shape: tuple[int, int, int]

    def to(self, like: Tensor) -> "_Eigenvectors":
        return _Eigenvectors(self.vectors.to(like), self.image_shape)

    def covariance(self, variances: Tensor) -> Covariance:
        return DenseCovariance(self.vectors, variances, self.image_shape)

    def analyse(self, x: Tensor) -> Tensor:
        return x @ self.vectors

    def synthesise(self, coordinates: Tensor) -> Tensor:
        return coordinates @ self.vectors.T


@dataclass(frozen=True)
class _Hartley:
    """The 2-D Hartley basis cos + sin of each channel: real, orthonormal and its own inverse.

    It diagonalises every symmetric circular convolution with the eigenvalues of the FFT, and
    being real it turns real white noise into real white noise.
    """

    shape: tuple[int, int, int]

    def to(self, like: Tensor) -> "_Hartley":
        return self

    def analyse(self, x: Tensor) -> Tensor:
        return hartley(x.reshape(-1, *self.shape)).flatten(1)

    def synthesise(self, coordinates: Tensor) -> Tensor:
        return self.analyse(coordinates)

    def covariance(self, variances: Tensor) -> Covariance:
        channels, _, width = self.shape
        half = variances.reshape(self.shape)[..., : width // 2 + 1]
        return SpectralCovariance(
            torch.eye(channels, dtype=variances.dtype).to(variances), half, width
        )


@dataclass(frozen=True)
class _Law:
    """A Gaussian in the coordinates of its eigenbasis: independent, mean 0, given variances."""

    mean: Tensor
    variances: Tensor
    basis: _Basis

    def to(self, like: Tensor) -> "_Law":
        return _Law(self.mean.to(like), self.variances.to(like), self.basis.to(like))

    def coordinates(self, x: Tensor) -> Tensor:
        return self.basis.analyse(x - self.mean)

    def pixels(self, coordinates: Tensor) -> Tensor:
        return self.mean + self.basis.synthesise(coordinates)

    def posterior_mean(self, coordinates: Tensor, level: Tensor) -> Tensor:
        return coordinates * self._gain(level)

    def posterior_draw(self, coordinates: Tensor, level: Tensor, eps: Tensor) -> Tensor:
        gain = self._gain(level)
        return coordinates * gain + level * gain.sqrt() * eps

    def log_density(self, coordinates: Tensor, level: Tensor) -> Tensor:
        """Return log p(u) of noisy images given their coordinates, up to one constant, (B,)."""
        variances = self.variances + level**2
        return -0.5 * (coordinates**2 / variances + variances.log()).sum(1)

    def _gain(self, level: Tensor) -> Tensor:
        return self.variances / (self.variances + level**2)


class _CachedLaw:
    """A law in float64 on the CPU, and its casts to the dtypes and devices asked for so far."""

    def __init__(self, exact: _Law) -> None:
        self.exact = exact
        self._casts: Cache[_Law] = Cache()

    def cast(self, like: Tensor) -> _Law:
        return self._casts.get((like.dtype, like.device), lambda: self.exact.to(like))


def _exact_law(mean: Tensor, variances: Tensor, basis: _Basis) -> _Law:
    owned = mean.detach().clone().flatten().to("cpu", torch.float64)
    return _Law(owned, variances, basis)


def _check_mean(mean: Tensor) -> None:
    """Raise unless `mean` is a finite floating-point tensor of shape (C, H, W), none 0."""
    check_floating("mean", mean)
    if mean.ndim != 3 or 0 in mean.shape:
        raise ValueError(f"mean must have shape (C, H, W), got {tuple(mean.shape)}")
    check_finite("mean", mean)


def _eigen(
    name: str, covariance: Tensor, image_shape: tuple[int, int, int]
) -> tuple[Tensor, _Eigenvectors]:
    """Return eigenvalues (D,) >= 0 and eigenvectors of a covariance (D, D), in float64."""
    check_finite(name, covariance)
    matrix = covariance.detach().to("cpu", torch.float64)
    rounding = torch.finfo(covariance.dtype).eps * float(matrix.abs().max())
    if float((matrix - matrix.T).abs().max()) > 100 * rounding:
        raise ValueError(f"{name} must be symmetric")
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    if float(values[0]) < -10 * len(matrix) * rounding:
        raise ValueError(
            f"{name} must be positive semi-definite, got the eigenvalue {float(values[0]):g}"
        )
    return values.clamp(min=0), _Eigenvectors(vectors, image_shape)


def _flatten(
    name: str, u: Tensor, sigma: float | Tensor, image_shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Return images as (B, D) and levels as (B, 1), both in at least float32, after checks."""
    check_images(name, u)
    check_image_size(name, u.shape[1:], image_shape=image_shape)
    check_level("sigma", sigma)
    x = u.flatten(1).to(_working_dtype(u))
    return x, expand_level(sigma, x)


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _draw_standard(like: Tensor, num: int, dim: int, generator: Generators) -> Tensor:
    """Draw standard normals (num, dim) on the device of `like`, in at least float32."""
    shape = (check_count("num", num), dim)
    return draw_normal(like.new_empty(shape, dtype=_working_dtype(like)), generator)


def _draw_mixture(
    laws: Sequence["_Law"], log_weights: Tensor, eps: Tensor, generator: Generators
) -> Tensor:
    """Turn standard normals (B, D) into draws of a mixture of laws, (B, D)."""
    chosen = _draw_index(log_weights.to(eps).expand(len(eps), -1), generator)
    out = torch.empty_like(eps)
    for k, law in enumerate(laws):
        own = chosen == k
        out[own] = law.pixels(law.variances.sqrt() * eps[own])
    return out


def _draw_index(log_probabilities: Tensor, generator: Generators) -> Tensor:
    """Draw one index for each row of log-probabilities (B, K): the largest after Gumbel noise."""
    log_uniform: Tensor = torch.special.log_ndtr(draw_normal(log_probabilities, generator))
    return (log_probabilities - (-log_uniform).log()).argmax(dim=1)


def _triple(shape: Sequence[int]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, height, width
