"""Distances between restored and true images, thin over piq and lpips; they must not know why.

Images are clamped to [-1, 1] first: a picture cannot show more.
"""

import os
import warnings
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import check_choice, check_finite, check_images, check_shape
from ncvsd_inverse.errors import CheckpointError

WEIGHTS_VARIABLE = "NCVSD_WEIGHTS"
"""Environment variable that names a folder with lpips_alex_features.safetensors and the like."""

SMALLEST_SIDE = {"psnr": 1, "ssim": 11, "lpips": 32}
"""Pixels below which a metric's windows or networks do not fit the image."""


def psnr(x: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, peak to peak 2; 80 dB for equal images.

    Args:
        x: restored images, shape (B, C, H, W), in [-1, 1].
        reference: true images, the shape of x.

    Returns:
        One value an image, shape (B,).

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if the shapes differ or a value is not finite.
    """
    import piq

    unit = _unit_pair(x, reference, metric="psnr")
    result: Tensor = piq.psnr(*unit, data_range=1.0, reduction="none")
    return result


def ssim(x: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (11-pixel Gaussian window of std 1.5, no downsampling), 1 if equal.

    Args:
        x: restored images, shape (B, C, H, W), in [-1, 1], H and W at least 11.
        reference: true images, the shape of x.

    Returns:
        One value an image, shape (B,).

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if the shapes differ, are too small, or a value is not finite.

    Source:
        Wang et al., IEEE TIP 2004.
    """
    import piq

    unit = _unit_pair(x, reference, metric="ssim")
    result: Tensor = piq.ssim(*unit, data_range=1.0, reduction="none", downsample=False)
    return result


@torch.no_grad()
def lpips(x: Tensor, reference: Tensor, *, net: Literal["alex", "squeeze"] = "alex") -> Tensor:
    """Learned perceptual distance (LPIPS 0.1) at the images' own size; 0 if equal.

    The network's weights come from the folder that the environment variable NCVSD_WEIGHTS names,
    file `lpips_{net}_features.safetensors`, if it is set, else from torchvision's download.

    Args:
        x: restored images, shape (B, 3, H, W), in [-1, 1], H and W at least 32.
        reference: true images, the shape of x.
        net: backbone; values of different backbones do not compare.

    Returns:
        One value an image, shape (B,), float32.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if the shapes differ, are too small or not RGB, or a value is not finite.
        CheckpointError: if the weights are neither in that folder nor can be downloaded.

    Source:
        Zhang et al., arXiv 1801.03924.
    """
    check_choice("net", net, ("alex", "squeeze"))
    x01, reference01 = _unit_pair(x, reference, metric="lpips")
    if x.shape[1] != 3:
        raise ValueError(f"x must have 3 channels for LPIPS, got {tuple(x.shape)}")
    model = _lpips_model(net, os.environ.get(WEIGHTS_VARIABLE)).to(x.device)
    distance: Tensor = model(2 * x01.float() - 1, 2 * reference01.float() - 1)
    return distance.flatten()


def _unit_pair(x: Tensor, reference: Tensor, *, metric: str) -> tuple[Tensor, Tensor]:
    """Return both images clamped and mapped to [0, 1]."""
    for name, images in (("x", x), ("reference", reference)):
        check_finite(name, check_images(name, images))
    check_shape("reference", reference, x.shape)
    least = SMALLEST_SIDE[metric]
    if min(x.shape[-2:]) < least:
        raise ValueError(
            f"x must be at least {least} pixels high and wide for {metric}, got {tuple(x.shape)}"
        )
    return (x.clamp(-1, 1) + 1) / 2, (reference.clamp(-1, 1) + 1) / 2


@cache
def _lpips_model(net: str, folder: str | None) -> nn.Module:
    """Return the LPIPS network on the CPU or wherever its last call left it."""
    import lpips as package

    with warnings.catch_warnings():
        # The package calls torchvision by names that torchvision has deprecated.
        warnings.simplefilter("ignore")
        try:
            model = package.LPIPS(net=net, pnet_rand=folder is not None, verbose=False)
        except OSError as error:
            raise CheckpointError(
                f"the weights of LPIPS ({net}) must be downloadable by torchvision, or lie in the "
                f"folder that {WEIGHTS_VARIABLE} names (it is not set): {error}"
            ) from error
    if folder is not None:
        _load_features(model.net, Path(folder) / f"lpips_{net}_features.safetensors")
    frozen: nn.Module = model.requires_grad_(False).eval()
    return frozen


def _load_features(backbone: nn.Module, path: Path) -> None:
    """Fill the slices of an LPIPS backbone from torchvision's `features.*` weights."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{WEIGHTS_VARIABLE} must name a folder with a readable {path.name}, "
            f"got {path.parent}: {error}"
        ) from error
    # Slices number their layers as torchvision's `features` does: "slice2.3.weight" is features.3.
    features = {
        name: stored.get(f"features.{name.split('.', 1)[1]}") for name in backbone.state_dict()
    }
    missing = [name for name, weight in features.items() if weight is None]
    if missing:
        raise CheckpointError(f"{path} must hold torchvision's features, got none for {missing[0]}")
    backbone.load_state_dict(features)
