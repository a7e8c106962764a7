"""Priors of latents, whose draws a variational autoencoder (VAE) turns into pictures.

Source: Karras et al., arXiv 2312.02696, whose VAE, pixel range and constants these are.
"""

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor

from ncvsd_inverse.machine import extra
from ncvsd_inverse.priors.ncvsd import NCVSDPrior
from ncvsd_inverse.protocols import Generators, NetworkTraits

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = [
    "LATENT_CHANNELS",
    "LATENT_SIGMA",
    "SD_VAE",
    "LatentPrior",
    "decode_latents",
    "latent_constants",
    "load_vae",
]

SD_VAE = "stabilityai/sd-vae-ft-mse"
"""Name on Hugging Face of the VAE whose latents the constants below are for."""

LATENT_CHANNELS = 4
"""Channels of a latent; its file holds as many means and then as many stds."""

LATENT_SIGMA = 0.5
"""Std of each channel of a latent that is trained on."""

_loading = threading.Lock()

_RAW_MEANS = (5.81, 3.25, 0.12, -2.15)
_RAW_STDS = (4.17, 4.62, 3.71, 3.28)


class LatentPrior:
    """A distilled prior of latents that generates pictures; `solve` needs one of pixels.

    Args:
        prior: a prior of latents of 4 channels, as the `imagenet512_*` presets train them.
        vae: name on Hugging Face, or folder, of the VAE that decodes them; it is loaded when
            pictures are first asked for.

    Attributes:
        prior: the prior of latents, whose `sample` draws these.

    Raises:
        ValueError: if the prior is not one of latents.
    """

    def __init__(self, prior: NCVSDPrior, *, vae: str | Path = SD_VAE) -> None:
        channels = NetworkTraits.of(prior.network).image_channels
        if channels != LATENT_CHANNELS:
            raise ValueError(
                f"prior must be one of latents of {LATENT_CHANNELS} channels, got {channels}"
            )
        self.prior = prior
        self.vae = vae
        self.nfe_per_sample = prior.nfe_per_sample
        self._loaded: AutoencoderKL | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_loaded": None}  # the VAE is named, and loaded where it is used

    def conditioned_on(self, label: int) -> Self:
        """Return a prior of the pictures of one class; arguments as for `NCVSDPrior`."""
        return type(self)(self.prior.conditioned_on(label), vae=self.vae)

    def generate(
        self, num: int, num_steps: Literal[1, 2, 4] = 4, seed: int = 0, *, batch_size: int = 16
    ) -> Tensor:
        """Draw latents from pure noise and decode them, one at a time.

        Args:
            num: number of pictures, >= 1.
            num_steps: network calls for each latent: 1, 2 or 4.
            seed: >= 0; picture i is a function of (seed, i).
            batch_size: latents at a time, >= 1.

        Returns:
            Pictures, shape (num, 3, H, W), float32, in [-1, 1]; sides 8 times a latent's.

        Raises:
            ImportError: if the package diffusers is not installed.
            ValueError: if an argument is out of range or there is no such VAE.
        """
        latents = self.prior.generate(num, num_steps, seed, batch_size=batch_size)
        with _loading:
            if self._loaded is None:
                self._loaded = load_vae(self.vae, device=latents.device)
        return decode_latents(self._loaded, latents)

    def sample(self, u: Tensor, sigma: float | Tensor, *, generator: Generators = None) -> Tensor:
        """Refuse: a measurement is one of pixels.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "prior must be one of pixels to restore images, got one of latents; it can `generate`"
        )


def load_vae(
    vae: str | Path = SD_VAE, *, device: torch.device | str = "cpu", download: bool = True
) -> "AutoencoderKL":
    """Load a VAE between pictures and latents, from safetensors only.

    Args:
        vae: a name on Hugging Face, or a folder that diffusers has saved.
        device: where it computes.
        download: whether a name may be downloaded; else it must be on this machine.

    Raises:
        ImportError: if the package diffusers is not installed.
        ValueError: if there is no such VAE, or it is not one from 3 channels to 4 and back.
    """
    with extra("latents"):
        from diffusers import AutoencoderKL
    try:
        loaded = AutoencoderKL.from_pretrained(
            str(vae), local_files_only=not download, use_safetensors=True
        )
    # Its errors are of many kinds, those of safetensors and of the download among them.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"vae must be a VAE on Hugging Face or a folder of one, got {vae}: {reason}"
        ) from error
    channels = (loaded.config.in_channels, loaded.config.latent_channels)
    if channels != (3, LATENT_CHANNELS):
        raise ValueError(
            f"vae must lead from 3 channels to {LATENT_CHANNELS}, "
            f"got {channels[0]} to {channels[1]} in {vae}"
        )
    return loaded.to(device).eval().requires_grad_(False)


@torch.no_grad()
def decode_latents(vae: "AutoencoderKL", latents: Tensor) -> Tensor:
    """Return the pictures that latents stand for, one at a time.

    Args:
        vae: the VAE, on the device of the latents.
        latents: float32 (B, 4, H, W), std 0.5 a channel.

    Returns:
        Pictures (B, 3, side, side) in [-1, 1]; the side is 8 times as long for the usual VAE.
    """
    raw_means, scales = latent_constants(latents.device)
    raw = latents / scales + raw_means
    pixels = torch.cat([vae.decode(one[None]).sample for one in raw])
    return pixels.clamp(0, 1) * 2 - 1


def latent_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the means of raw latents and what brings them to std 0.5, each (1, 4, 1, 1)."""
    constants = torch.tensor([_RAW_MEANS, _RAW_STDS], device=device, dtype=torch.float32)
    means, stds = constants.view(2, 1, -1, 1, 1)
    return means, LATENT_SIGMA / stds
