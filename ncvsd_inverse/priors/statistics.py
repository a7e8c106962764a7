"""Mean and covariances of images, level by level: as data, and how they are measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import (
    as_value,
    check_count,
    check_finite,
    check_images,
    check_level,
    check_shape,
    check_stays_finite,
)
from ncvsd_inverse.machine import Cache, callers_autocast, exact_arithmetic
from ncvsd_inverse.numerics import draw_normal, make_generators, working_dtype
from ncvsd_inverse.priors.covariance import SpectralCovariance
from ncvsd_inverse.protocols import Denoiser, Prior, PriorTraits

__all__ = ["LEVELS", "ImageStatistics", "measure_statistics"]

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 10.0)
"""Default noise stds of `measure_statistics`, image units."""

_NOISE_STREAM = 5

KEPT_BYTES = 16 * 2**20
"""What the covariances of images of some size may take that statistics keep, bytes."""

MEAN_SIDE = 16
"""Most rows and columns of the grid on which a mean image is kept."""


@dataclass(frozen=True, eq=False)
class ImageStatistics:
    """Mean and covariance of images, and the posterior covariance at each noise level.

    Covariances are stationary and isotropic: a variance for each of C mixtures of colours and each
    spatial frequency, whatever its direction. They are kept at a few frequencies and levels and
    interpolated linearly in the logarithm.

    Attributes:
        mean: the mean image on a grid as coarse as one pixel, shape (C, h, w), in [-1, 1].
        mixing: orthonormal mixtures of colours, shape (C, C).
        levels: noise stds, > 0, increasing, image units.
        radii: spatial frequencies, cycles per pixel, increasing from 0.
        spectra: variances of orthonormal Fourier coefficients, > 0, squared image units, shape
            (len(levels) + 1, C, len(radii)): the covariance given a noisy image at each level,
            then that of the images themselves.

    Raises:
        ValueError: if a shape or a value is out of range.
    """

    mean: Tensor
    mixing: Tensor
    levels: tuple[float, ...]
    radii: tuple[float, ...]
    spectra: Tensor
    _covariances: Cache[SpectralCovariance] = field(
        default_factory=lambda: Cache(256, KEPT_BYTES), init=False, repr=False
    )
    note: ClassVar[str] = ""

    def __post_init__(self) -> None:
        channels = self.mean.shape[0] if self.mean.ndim == 3 else 0
        if channels == 0:
            raise ValueError(f"mean must have shape (C, h, w), got {tuple(self.mean.shape)}")
        check_shape("mixing", self.mixing, (channels, channels))
        shape = (len(self.levels) + 1, channels, len(self.radii))
        check_shape("spectra", self.spectra, shape)
        for name in ("mean", "mixing", "spectra"):
            check_finite(name, getattr(self, name))
        for name, least in (("levels", 1e-6), ("radii", 0.0)):
            numbers = getattr(self, name)
            rises = all(a < b for a, b in pairwise(numbers))
            if not (numbers and rises and numbers[0] >= least and math.isfinite(numbers[-1])):
                raise ValueError(f"{name} must increase from at least {least:g}, got {numbers}")
        if float(self.spectra.min()) <= 0:
            raise ValueError(f"spectra must be positive, got {float(self.spectra.min()):g}")
        product = self.mixing @ self.mixing.T - torch.eye(channels, dtype=self.mixing.dtype).to(
            self.mixing
        )
        if float(product.abs().max()) > 1e-3:
            raise ValueError("mixing must have orthonormal rows")

    @classmethod
    def from_dict(cls, entries: object) -> Self:
        """Build statistics from what `to_dict` gave; ValueError if it is something else."""
        names = ("mean", "mixing", "levels", "radii", "spectra")
        if not isinstance(entries, Mapping) or set(entries) != set(names):
            raise ValueError(f"statistics must be an object with the fields {', '.join(names)}")
        arrays = {}
        for name, dims in zip(names, (3, 2, 1, 1, 3), strict=True):
            try:
                array = np.asarray(entries[name])
            except ValueError:  # lists of unequal lengths
                array = np.zeros(0)
            if array.ndim != dims or array.dtype.kind not in "iuf" or (abs(array) > 1e30).any():
                raise ValueError(f"statistics' {name} must be numbers in {dims} dimensions")
            arrays[name] = array.astype(np.float32)
        return cls(
            mean=torch.from_numpy(arrays["mean"]),
            mixing=torch.from_numpy(arrays["mixing"]),
            levels=tuple(arrays["levels"].tolist()),
            radii=tuple(arrays["radii"].tolist()),
            spectra=torch.from_numpy(arrays["spectra"]),
        )

    def to_dict(self) -> dict[str, object]:
        """Return everything as lists of numbers with four significant digits, for JSON."""

        def rounded(values: object) -> object:
            if isinstance(values, list):
                return [rounded(value) for value in values]
            return float(f"{values:.4g}")

        return {
            "mean": rounded(self.mean.tolist()),
            "mixing": [[float(f"{x:.6g}") for x in row] for row in self.mixing.tolist()],
            "levels": rounded(list(self.levels)),
            "radii": rounded(list(self.radii)),
            "spectra": rounded(self.spectra.tolist()),
        }

    def __eq__(self, other: object) -> bool:
        """Tell whether both are written alike."""
        return isinstance(other, ImageStatistics) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        """Return a hash that equal statistics share."""
        return hash((len(self.levels), len(self.radii)))

    def mean_image(self, like: Tensor) -> Tensor:
        """Return the mean image, shape (1, C, H, W), for images `like` (B, C, H, W)."""
        grid = self.mean[None].to(like)
        if grid.shape[2:] == like.shape[2:]:
            return grid
        return nn.functional.interpolate(grid, like.shape[2:], mode="bilinear")

    def covariance(self, sigma: float, like: Tensor) -> SpectralCovariance:
        """Return the covariance of images given a noisy image of noise std `sigma`.

        Args:
            sigma: > 0, image units; infinity for the covariance of the images themselves.
            like: images (B, C, H, W) whose size, dtype and device it takes.
        """
        check_shape("like", like, (like.shape[0], len(self.mean), *like.shape[2:]))
        key = (float(sigma), like.shape[2:], like.dtype, like.device)
        return self._covariances.get(key, lambda: self._covariance(sigma, like))

    def _covariance(self, sigma: float, like: Tensor) -> SpectralCovariance:
        height, width = like.shape[2:]
        rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
        columns = torch.fft.rfftfreq(width, dtype=torch.float64)[None]
        radius = (rows**2 + columns**2).sqrt().numpy()
        logs = [np.interp(radius, self.radii, row) for row in self._log_spectra(sigma).numpy()]
        spectrum = torch.from_numpy(np.exp(np.stack(logs))).to(like)
        return SpectralCovariance(self.mixing.to(like), spectrum, width)

    def _log_spectra(self, sigma: float) -> Tensor:
        """Return the logarithm of the variances (C, len(radii)) at noise std `sigma`."""
        logs = self.spectra.double().log()
        if sigma > self.levels[-1]:
            # Far above the images' own std a noisy image tells nothing.
            return logs[-1] if math.isinf(sigma) else logs[-2]
        if sigma < self.levels[0]:
            # Far below, all but its noise.
            return logs[0] + 2 * math.log(sigma / self.levels[0])
        place = float(np.interp(math.log(sigma), np.log(self.levels), range(len(self.levels))))
        low = min(int(place), len(self.levels) - 2) if len(self.levels) > 1 else 0
        share = place - low
        return (1 - share) * logs[low] + share * logs[low + 1]


@exact_arithmetic()
@torch.no_grad()
def measure_statistics(
    prior: Prior,
    images: Tensor,
    *,
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
    batch_size: int = 32,
) -> ImageStatistics:
    """Measure mean and covariance of images, and the posterior covariance at each noise level.

    The covariance of x0 given u = x0 + sigma * eps is that of x0 - E[x0 | u]. A prior with
    `denoise` gives the mean: variances are the mean squares of the Fourier coefficients of
    x0 - E[x0 | u]. A prior that only draws gives x0' ~ p(x0 | u), and x0 - x0' has twice the
    covariance. Each image is used once a level.

    Args:
        prior: the sampler; one of any image size is measured at that of `images`.
        images: clean images, shape (B, C, H, W), in [-1, 1]: that it was not trained on, or that
            it generated. The lowest frequencies have few coefficients: 128 images of 64x64 do.
        levels: noise stds, > 0, increasing, image units.
        seed: >= 0; of noise and draws.
        batch_size: images at a time, >= 1.

    Returns:
        Statistics for `prior.with_statistics`. The mean image is kept for a prior of one image
        shape; for others it is one colour.

    Raises:
        ValueError: if an argument is out of range or the images do not fit the prior.
    """
    check_finite("images", check_images("images", images))
    if len(images) < 2:
        raise ValueError(f"images must hold at least 2, got {len(images)}")
    traits = PriorTraits.of(prior)
    levels = as_value(levels)
    for level in levels:
        check_level("levels", level, largest=traits.sigma_max)
    if not levels or any(low >= high for low, high in pairwise(levels)):
        raise ValueError(f"levels must increase and be at least one, got {levels}")
    seed = check_count("seed", seed, least=0)
    batch_size = check_count("batch_size", batch_size)
    clean = images.to(working_dtype(images.dtype))
    side = 1 if traits.image_shape is None else min(MEAN_SIDE, *images.shape[2:])
    mean = nn.functional.adaptive_avg_pool2d(clean.mean(0), side)
    deviation = clean - nn.functional.interpolate(mean[None], clean.shape[2:], mode="bilinear")
    if not bool(deviation.any()):
        raise ValueError(f"images must differ from their mean, got {len(images)} that do not")
    # A draw differs from the truth by the deviations of both from the mean.
    share = 1.0 if isinstance(prior, Denoiser) else 0.5
    differences = [_restored_minus_truth(prior, clean, s, seed, batch_size) for s in levels]
    everything = [*((difference, share) for difference in differences), (deviation, 1.0)]
    colours = [torch.einsum("bchw,bdhw->cd", e, e) for e, _ in everything]
    total = torch.stack([c / c.trace() for c in colours]).sum(0)
    mixing = torch.linalg.eigh(total)[1].T.flip(0)
    bins, radii = _radial_bins(*clean.shape[2:])
    spectra = torch.stack([share * _radial_mean(e, mixing, bins) for e, share in everything])
    return ImageStatistics(
        mean=mean.cpu(),
        mixing=mixing.cpu(),
        levels=tuple(map(float, levels)),
        radii=radii,
        spectra=spectra.clamp(min=1e-12).cpu(),
    )


def _restored_minus_truth(
    prior: Prior, clean: Tensor, sigma: float, seed: int, batch_size: int
) -> Tensor:
    """Return x0' - x0 (B, C, H, W) for the mean or a draw x0' given a noisy version of x0."""
    parts = []
    for first in range(0, len(clean), batch_size):
        x0 = clean[first : first + batch_size]
        # Images that a prior generated may come from the noise of (seed, i).
        keys = [(seed, first + i, _NOISE_STREAM) for i in range(len(x0))]
        sources = make_generators(keys, x0.device)
        u = x0 + sigma * draw_normal(x0, sources)
        with callers_autocast():
            if isinstance(prior, Denoiser):
                restored = prior.denoise(u, sigma)
            else:
                restored = prior.sample(u, sigma, generator=sources)
        check_stays_finite("what the prior returns", restored, f"its call at sigma = {sigma:g}")
        parts.append(restored - x0)
    return torch.cat(parts)


def _radial_bins(height: int, width: int) -> tuple[Tensor, tuple[float, ...]]:
    """Return the bin of each frequency (H, W), bins widening outwards, and their mean radii."""
    rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    columns = torch.fft.fftfreq(width, dtype=torch.float64)[None]
    radius = (rows**2 + columns**2).sqrt()
    step = 1 / max(height, width)
    edges = [step / 2]
    while edges[-1] < float(radius.max()):
        edges.append(max(edges[-1] + step, 1.15 * edges[-1]))
    bins = torch.bucketize(radius, torch.tensor(edges, dtype=torch.float64))
    places, bins = torch.unique(bins, return_inverse=True)
    radii = [float(radius[bins == place].mean()) for place in range(len(places))]
    return bins, tuple(radii)


def _radial_mean(x: Tensor, mixing: Tensor, bins: Tensor) -> Tensor:
    """Return the mean power of images (B, C, H, W) by mixture and bin, shape (C, bins)."""
    waves = torch.fft.fft2(torch.einsum("kc,bchw->bkhw", mixing, x), norm="ortho")
    power = waves.abs().square().mean(0).flatten(1)
    flat = bins.flatten().to(power.device)
    totals = power.new_zeros(len(power), int(flat.max()) + 1).index_add_(1, flat, power)
    means: Tensor = totals / torch.bincount(flat)
    return means
