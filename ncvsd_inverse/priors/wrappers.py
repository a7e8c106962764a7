"""Denoisers of other libraries, in memory, as E[x0 | x] for images in [-1, 1]."""

import math
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import check_choice
from ncvsd_inverse.networks.library import Prediction, VPDenoiser
from ncvsd_inverse.priors.base import as_module, check_output

__all__ = [
    "NoisePredictor",
    "UnitRange",
    "read_diffusers",
]


class UnitRange(nn.Module):
    """A denoiser of images in [0, 1], such as deepinv's, as one of images in [-1, 1]."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        if not callable(denoiser):
            raise TypeError(f"denoiser must be callable, got {type(denoiser).__name__}")
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoise `x` (B, C, H, W) of noise std `sigma` (B,)."""
        x0: Tensor = self.denoiser((x + 1) / 2, sigma / 2)
        return 2 * x0 - 1


class NoisePredictor(VPDenoiser):
    """A network that predicts noise at the times of a schedule, as a denoiser.

    Args:
        function: (x_t, t) -> prediction.
        alphas_cumprod: squared scales of the image at each time, shape (T,).
        prediction: what it predicts.

    Attributes:
        sigma_min: noise std of the first time, image units.
        sigma_max: of the last.
        compute_dtype: None: its network is the user's, and so is the autocast.

    Raises:
        ValueError: if the scales do not decrease within (0, 1), or the prediction is unknown.
    """

    def __init__(
        self,
        function: nn.Module | Callable[[Tensor, Tensor], Tensor],
        alphas_cumprod: Tensor | Sequence[float],
        prediction: Prediction,
    ) -> None:
        check_choice("prediction", prediction, get_args(Prediction))
        alphas = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if alphas.ndim != 1 or len(alphas) < 2 or not bool((alphas.diff() < 0).all()):
            raise ValueError(
                "alphas_cumprod must have shape (T,) with T >= 2 and decrease, got shape "
                f"{tuple(alphas.shape)}"
            )
        if not (float(alphas[-1]) > 0 and float(alphas[0]) < 1):
            raise ValueError(
                "alphas_cumprod must lie within (0, 1), got "
                f"{float(alphas[-1]):g} to {float(alphas[0]):g}"
            )
        super().__init__(as_module(function), prediction=prediction, num_levels=len(alphas))
        self.compute_dtype = None
        self.log_sigmas.copy_(((1 - alphas) / alphas).log() / 2)
        self.sigma_min = math.exp(float(self.log_sigmas[0]))
        self.sigma_max = math.exp(float(self.log_sigmas[-1]))

    def predict(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        """Call the network on scaled images (B, C, H, W) at times (B,); labels are not taken."""
        return check_output(self.network(x, time))


class _TupleOutput(nn.Module):
    """A network of diffusers that returns its prediction as a tensor."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Predict for scaled images (B, C, H, W) at times (B,)."""
        out: Tensor = self.unet(x, time, return_dict=False)[0]
        return out


def read_diffusers(
    unet: nn.Module, scheduler: object
) -> tuple[_TupleOutput, Tensor, Prediction, Sequence[int]]:
    """Return network, `alphas_cumprod`, prediction and image shape of a diffusers pair.

    Raises:
        TypeError: if `unet` is no unconditional network in pixels, or `scheduler` no VP schedule.
    """
    config = getattr(unet, "config", None)
    side, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
    if type(unet).__name__ != "UNet2DModel" or not isinstance(channels, int):
        raise TypeError(
            f"unet must be a UNet2DModel of diffusers, got {type(unet).__name__}; of a pipeline "
            "give pipeline.unet, pipeline.scheduler"
        )
    if getattr(config, "num_class_embeds", None):
        raise TypeError("unet must be one without classes; save it and load_prior(folder) instead")
    height, width = (side, side) if isinstance(side, int) else tuple(side or (0, 0))
    if not (height and width):
        raise TypeError(f"unet must name the size of its images, got sample_size {side!r}")
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas, Tensor):
        raise TypeError(
            "scheduler must have alphas_cumprod, as DDPMScheduler has, got "
            f"{type(scheduler).__name__}"
        )
    settings = getattr(scheduler, "config", None)
    prediction: Prediction = getattr(settings, "prediction_type", "epsilon")
    return _TupleOutput(unet), alphas, prediction, (channels, height, width)
