"""A denoiser tried on a shipped photograph."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ncvsd_inverse.images import read_image
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.priors.diffusion import DiffusionPrior
from ncvsd_inverse.priors.ncvsd import NCVSDPrior

__all__ = ["LEVELS", "DenoisingError", "denoising_errors", "photograph"]

PHOTOGRAPH = Path(__file__).parent.parent / "assets" / "photographs" / "cat.png"
LEVELS = (0.1, 0.5, 2.0)
"""Noise stds at which a denoiser is tried, image units."""
LEAST_SIDE = 64


@dataclass(frozen=True)
class DenoisingError:
    """Mean squared errors at one noise level, image units.

    Attributes:
        sigma: noise std.
        noisy: of the noisy photograph.
        denoised: of the denoised one.
        scaled: of the noisy one after the scaling that is best on average.
    """

    sigma: float
    noisy: float
    denoised: float
    scaled: float

    @property
    def ratio(self) -> float:
        """What denoising leaves of the error; infinite where it is no number."""
        ratio = self.denoised / self.noisy
        return ratio if math.isfinite(ratio) else math.inf

    def __str__(self) -> str:
        return (
            f"{self.noisy:.3g} to {self.denoised:.3g} at noise std {self.sigma} "
            f"({self.scaled:.3g} by scaling)"
        )


def photograph(channels: int, side: int, multiple: int) -> Tensor:
    """Return the photograph for a network of square images.

    Of a large one it is the middle: a denoiser works on parts of images too, in less time and
    memory. A side of at least 64 pixels is kept, and four where the network is coarsest.

    Args:
        channels: C, 1 or 3.
        side: side of the network's images, pixels.
        multiple: what sides must be a multiple of.

    Returns:
        The photograph, shape (1, C, H, H), in [-1, 1].
    """
    picture = read_image(PHOTOGRAPH)
    if channels == 1:
        picture = picture.mean(1, keepdim=True)
    whole = nn.functional.interpolate(picture, (side, side), mode="bicubic", antialias=True)
    kept = min(side, max(LEAST_SIDE // multiple, 4) * multiple)
    middle = slice((side - kept) // 2, (side + kept) // 2)
    return whole[..., middle, middle].clamp(-1, 1)


@torch.no_grad()
def denoising_errors(
    prior: NCVSDPrior | DiffusionPrior, x0: Tensor, levels: Sequence[float] = LEVELS
) -> list[DenoisingError]:
    """Denoise a photograph at those of `levels` that the prior knows, one call each.

    Of a generative denoiser one draw is judged, whose error is up to twice that of the mean; one
    with classes takes its first.

    Args:
        prior: the prior, on the CPU, without an image shape.
        x0: the photograph, shape (1, C, H, W), in [-1, 1].
        levels: noise stds, image units.
    """
    known = prior.conditioned_on(0) if prior.num_classes else prior
    errors = []
    for sigma in levels:
        if not known.sigma_min <= sigma <= known.sigma_max:
            continue
        generator = torch.Generator().manual_seed(0)
        u = x0 + sigma * draw_normal(x0, generator)
        out = (
            known.sample(u, sigma, generator=generator)
            if isinstance(known, NCVSDPrior)
            else known.denoise(u, sigma)
        )
        noisy, denoised = (float((image - x0).square().mean()) for image in (u, out))
        power = float(x0.square().mean())
        errors.append(DenoisingError(sigma, noisy, denoised, power / (power / sigma**2 + 1)))
    return errors
