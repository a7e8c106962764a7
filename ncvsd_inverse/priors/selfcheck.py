"""Tells how well a denoiser denoises, by a shipped photograph."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ncvsd_inverse.images import read_image
from ncvsd_inverse.networks import inference_dtype
from ncvsd_inverse.networks.library import LibraryDenoiser
from ncvsd_inverse.priors.diffusion import DiffusionPrior
from ncvsd_inverse.priors.ncvsd import NCVSDPrior

PHOTOGRAPH = Path(__file__).parent.parent / "assets" / "photographs" / "cat.png"
LEVELS = (0.1, 0.5, 2.0)
"""Noise stds at which a denoiser is tried, image units."""


@dataclass(frozen=True)
class DenoisingError:
    """Mean squared errors at one noise level, image units.

    Attributes:
        sigma: noise std.
        noisy: of the noisy photograph.
        denoised: of the denoised one.
    """

    sigma: float
    noisy: float
    denoised: float

    @property
    def ratio(self) -> float:
        """What denoising leaves of the error; infinite where it is no number."""
        ratio = self.denoised / self.noisy
        return ratio if math.isfinite(ratio) else math.inf

    def __str__(self) -> str:
        return f"{self.noisy:.2g} to {self.denoised:.2g} at noise std {self.sigma}"


def photograph(channels: int, height: int, width: int) -> Tensor | None:
    """Return the photograph at a size, (1, C, H, W), in [-1, 1]; None where C is not 1 or 3."""
    if channels not in (1, 3):
        return None
    picture = read_image(PHOTOGRAPH)
    if channels == 1:
        picture = picture.mean(1, keepdim=True)
    resized: Tensor = nn.functional.interpolate(
        picture, (height, width), mode="bicubic", antialias=True
    )
    return resized.clamp(-1, 1)


@torch.no_grad()
def denoising_errors(
    prior: NCVSDPrior | DiffusionPrior, x0: Tensor, levels: Sequence[float] = LEVELS
) -> list[DenoisingError]:
    """Denoise a photograph at those of `levels` that the prior knows, one call each.

    Of a generative denoiser one draw is judged, whose error is up to twice that of the mean; one
    with classes takes its first. Networks of libraries compute in bfloat16 where that is fast.

    Args:
        prior: the prior, on the CPU.
        x0: the photograph, shape (1, C, H, W), in [-1, 1].
        levels: noise stds, image units.
    """
    known = prior.conditioned_on(0) if getattr(prior.network, "num_classes", 0) else prior
    lowers = isinstance(prior.network, LibraryDenoiser) and inference_dtype() is torch.bfloat16
    errors = []
    for sigma in levels:
        if not known.sigma_min <= sigma <= known.sigma_max:
            continue
        generator = torch.Generator().manual_seed(0)
        u = x0 + sigma * torch.randn(x0.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=lowers):
            out = (
                known.sample(u, sigma, generator=generator)
                if isinstance(known, NCVSDPrior)
                else known.denoise(u, sigma)
            )
        noisy, denoised = (float((image - x0).square().mean()) for image in (u, out))
        errors.append(DenoisingError(sigma, noisy, denoised))
    return errors
