"""Denoisers x0 = D(x, sigma) over networks whose architecture a library carries."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn

from ncvsd_inverse.machine import extra
from ncvsd_inverse.networks import Network, build_network
from ncvsd_inverse.networks.adm import ADMUNet
from ncvsd_inverse.networks.unet import MAX_BLOCKS, MAX_LEVELS

__all__ = [
    "ADM_LEVELS",
    "LIBRARY",
    "ADMDenoiser",
    "DiffusersDenoiser",
    "EDMDenoiser",
    "LibraryDenoiser",
    "Prediction",
    "VPDenoiser",
    "build_converted",
    "check_depth",
]

ADM_LEVELS = 1000

Prediction: TypeAlias = Literal["epsilon", "sample", "v_prediction"]


class LibraryDenoiser(nn.Module):
    """Base of denoisers x0 = D(x, sigma) whose network a library builds; they compute in float32.

    Lower precision would show: a network that predicts noise has its errors multiplied by sigma.

    Attributes:
        network: the library's network.
        image_channels: channels of the images.
        resolution: side of the images, pixels.
        size_multiple: what both sides must be a multiple of.
        num_classes: number of class labels, 0 for none.
        compute_dtype: dtype in which it computes, whatever autocast says.
    """

    image_channels: int
    resolution: int
    size_multiple: int
    num_classes = 0
    compute_dtype: torch.dtype | None = torch.float32

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def to_inference(self, dtype: torch.dtype) -> Self:
        """Make the network ready for passes, in place; it stays in float32 whatever `dtype` is."""
        return self.eval().requires_grad_(False)


class EDMDenoiser(LibraryDenoiser):
    """EDM's DDPM++ or NCSN++ by deepinv's `NCSNpp`; `arguments` are those of its constructor.

    Source: Karras et al., arXiv 2206.00364.
    """

    def __init__(self, arguments: Mapping[str, Any], *, sigma_data: float) -> None:
        from deepinv.models import NCSNpp

        super().__init__(NCSNpp(**arguments, pretrained=None, pixel_std=sigma_data))
        self.image_channels = arguments["in_channels"]
        self.resolution = arguments["img_resolution"]
        self.size_multiple = 1 << (len(arguments["channel_mult"]) - 1)
        self.num_classes = arguments["label_dim"]

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoise `x` (B, C, H, W) of noise std `sigma` (B,); without labels all are 0."""
        if labels is None and self.num_classes:
            labels = x.new_zeros(x.shape[0], self.num_classes)
        x0: Tensor = self.network(x.float(), sigma.float(), class_labels=labels)
        return x0.to(x.dtype)


class VPDenoiser(LibraryDenoiser):
    """Base of networks that were trained on c (x0 + sigma eps), c = 1/sqrt(1 + sigma^2), at times.

    The time of a sigma between two of its levels is interpolated linearly in log sigma; beyond
    the levels it is that of the first or last. Predictions are not clipped to [-1, 1].

    Args:
        network: the library's network.
        prediction: what it returns: "epsilon" eps, "sample" x0, "v_prediction"
            c eps - sqrt(1 - c^2) x0. Channels beyond those of the image, a learned variance, are
            dropped.
        num_levels: number of times.

    Attributes:
        log_sigmas: increasing, shape (num_levels,); stored with the weights.
    """

    log_sigmas: Tensor

    def __init__(self, network: nn.Module, *, prediction: Prediction, num_levels: int) -> None:
        super().__init__(network)
        self.prediction = prediction
        self.register_buffer("log_sigmas", torch.zeros(num_levels, dtype=torch.float32))

    def predict(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        """Call the network on scaled images (B, C, H, W) at times (B,)."""
        raise NotImplementedError

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoise `x` (B, C, H, W) of noise std `sigma` (B,); labels (B, K) are one-hot."""
        noisy, level = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        scale = (1 + level**2).rsqrt()
        out = self.predict(scale * noisy, self.time(sigma), labels)[:, : x.shape[1]]
        if self.prediction == "sample":
            return out.to(x.dtype)
        if self.prediction == "v_prediction":
            return (scale**2 * noisy - level * scale * out).to(x.dtype)
        return (noisy - level * out).to(x.dtype)

    def classes(self, labels: Tensor | None) -> Tensor | None:
        """Return the indices of one-hot labels (B, K); ValueError where classes need labels."""
        if self.num_classes and labels is None:
            raise ValueError("this prior needs a class: use prior.conditioned_on(label)")
        return None if labels is None else labels.argmax(1)

    def time(self, sigma: Tensor) -> Tensor:
        """Return the times of stds (B,), in [0, num_levels - 1]."""
        levels = self.log_sigmas
        wanted = sigma.float().log().clamp(levels[0], levels[-1])
        above = torch.searchsorted(levels, wanted).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        return above - 1 + (wanted - low) / (high - low)


class ADMDenoiser(VPDenoiser):
    """A network of guided diffusion; `arguments` are those of `ADMUNet`.

    Source: Dhariwal & Nichol, arXiv 2105.05233.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        network = ADMUNet(**arguments)
        super().__init__(network, prediction="epsilon", num_levels=ADM_LEVELS)
        self.image_channels = arguments["in_channels"]
        self.resolution = arguments["resolution"]
        self.size_multiple = 1 << (len(arguments["channels"]) - 1)
        self.num_classes = arguments["num_classes"]

    def predict(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        """Call the network; one trained with classes needs labels."""
        out: Tensor = self.network(x, time, self.classes(labels))
        return out


class DiffusersDenoiser(VPDenoiser):
    """A network of diffusers; `arguments` are those of `UNet2DModel`."""

    def __init__(
        self, arguments: Mapping[str, Any], *, prediction: Prediction, num_levels: int
    ) -> None:
        with extra("latents"):
            from diffusers import UNet2DModel

        network = UNet2DModel(**arguments)
        super().__init__(network, prediction=prediction, num_levels=num_levels)
        self.image_channels = arguments["in_channels"]
        self.resolution = arguments["sample_size"]
        self.size_multiple = 1 << (len(network.down_blocks) - 1)
        self.num_classes = arguments.get("num_class_embeds") or 0

    def predict(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        """Call the network; one trained with classes needs labels."""
        classes = self.classes(labels)
        out: Tensor = self.network(x, time, class_labels=classes, return_dict=False)[0]
        return out


LIBRARY: dict[str, Callable[..., LibraryDenoiser]] = {
    "edm": EDMDenoiser,
    "adm": ADMDenoiser,
    "diffusers": DiffusersDenoiser,
}
"""Kinds of networks, as cards name them, beside those of `networks.build_network`."""


DEPTHS = {
    "edm": ("channel_mult", "num_blocks"),
    "adm": ("channels", "blocks"),
    "diffusers": ("block_out_channels", "layers_per_block"),
}
"""What the levels, and the blocks of a level, are called in the arguments of each kind."""


def check_depth(config: Mapping[str, Any], num_tensors: int | None = None) -> None:
    """Check, without building it, that a network is not deeper than any, nor than its tensors.

    Args:
        config: what `build_converted` takes.
        num_tensors: how many tensors there are to fill it; None: not known. Each block has some.

    Raises:
        ValueError: if levels or blocks are no such numbers, or more than the bounds.
    """
    kind = config.get("kind")
    arguments, names = config, ("channels", "blocks")
    if isinstance(kind, str) and kind in DEPTHS:
        arguments, names = config.get("arguments", {}), DEPTHS[kind]
    if not isinstance(arguments, Mapping):
        raise ValueError(f"arguments must be an object, got {type(arguments).__name__}")
    levels, blocks = (arguments.get(name) for name in names)
    # What is left out is the library's own choice.
    if levels is not None and not (isinstance(levels, list | tuple) and len(levels) <= MAX_LEVELS):
        raise ValueError(f"{names[0]} must be a list of at most {MAX_LEVELS} levels")
    if blocks is not None and not (type(blocks) is int and 0 < blocks <= MAX_BLOCKS):
        raise ValueError(
            f"{names[1]} must be an integer from 1 to {MAX_BLOCKS}, got {str(blocks)[:100]}"
        )
    depth = len(levels or ()) * (blocks or 1)
    if num_tensors is not None and depth > num_tensors:
        raise ValueError(
            f"{names[1]} must fit the {num_tensors} tensors of its weights, got {blocks} at each "
            f"of {len(levels or ())} levels"
        )


def build_converted(config: Mapping[str, Any], device: str) -> Network | LibraryDenoiser:
    """Build the network of a card without drawing its weights; "meta" takes no memory for them.

    Raises:
        ValueError: if the configuration is wrong.
    """
    entries = dict(config)
    kind = entries.pop("kind", None)
    check_depth(config)
    try:
        with torch.device("meta"):
            if isinstance(kind, str) and kind in LIBRARY:
                network: Network | LibraryDenoiser = LIBRARY[kind](**entries)
            else:
                network = build_network(dict(config))
    except Exception as error:
        # A wrong configuration can break the construction anywhere.
        raise ValueError(f"its configuration cannot be built: {error}") from error
    network = network.float()  # libraries take torch's default dtype
    return network if device == "meta" else network.to_empty(device=device)
