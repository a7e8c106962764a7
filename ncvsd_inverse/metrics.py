"""Metrics: PSNR, SSIM by piq, LPIPS by lpips, CRPS and coverage of draws, FD-alex.

Images are clamped to [-1, 1] first, except for `crps` and `coverage`: a picture cannot show more.
They may be of any floating-point dtype; values are computed and returned in float32 or wider, and
neither autocast nor torch's default dtype changes them.
"""

import os
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import (
    check_choice,
    check_finite,
    check_floating,
    check_images,
    check_on_device,
    check_shape,
)
from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.machine import exact_arithmetic
from ncvsd_inverse.numerics import Moments, ensemble_crps, frechet_distance, working_dtype

__all__ = [
    "COVERAGE_DRAWS",
    "SMALLEST_SIDE",
    "WEIGHTS_VARIABLE",
    "alex_features",
    "coverage",
    "crps",
    "fd_alex",
    "lpips",
    "psnr",
    "ssim",
]

WEIGHTS_VARIABLE = "NCVSD_WEIGHTS"
"""Environment variable that names a folder with lpips_alex_features.safetensors and the like."""

NOMINAL_COVERAGE = 0.9
"""Share of pixels that the intervals of `coverage` hold on average if the draws are right."""

COVERAGE_DRAWS = 19
"""Fewest draws that span such an interval: (19 - 1) / (19 + 1) = 0.9."""

SMALLEST_SIDE = {"psnr": 1, "ssim": 11, "lpips": 32, "alex_features": 32}
"""Pixels below which a metric's windows or networks do not fit the image."""

_PSNR_CAP = 80.0

_SHIPPED = Path(__file__).parent / "assets"
"""Where AlexNet's weights are, in half precision."""

_networks: dict[tuple[str, str | None, torch.device], nn.Module] = {}
_loading = threading.Lock()


@exact_arithmetic()
def psnr(x: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, peak to peak 2, at most 80: the value of equal images.

    >>> psnr(torch.full((1, 3, 8, 8), 0.2), torch.zeros(1, 3, 8, 8))
    tensor([20.0000])

    Args:
        x: restored images, shape (B, C, H, W), in [-1, 1].
        reference: true images, the shape of x.

    Returns:
        One value an image, shape (B,).

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if the shapes differ or a value is not finite.
    """
    x01, reference01 = _unit_pair(x, reference, metric="psnr")
    error = (x01.double() - reference01.double()).square().flatten(1).mean(1)
    decibel: Tensor = -10 * error.log10()
    return decibel.clamp(max=_PSNR_CAP).to(x01.dtype)


@exact_arithmetic()
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
    unit = _unit_pair(x, reference, metric="ssim")
    import piq  # takes seconds: only once the images are fine

    result: Tensor = piq.ssim(*unit, data_range=1.0, reduction="none", downsample=False)
    return result


@exact_arithmetic()
@torch.no_grad()
def lpips(
    x: Tensor, reference: Tensor, *, net: Literal["alex", "squeeze", "vgg"] = "alex"
) -> Tensor:
    """Learned perceptual distance (LPIPS 0.1) at the images' own size; 0 if equal.

    The network's weights come from the folder that the environment variable NCVSD_WEIGHTS names,
    file `lpips_{net}_features.safetensors` (torchvision's `features.*` weights), if it is there,
    else for "alex" from the package, in half precision, which moves no value by 0.001, and for the
    others from torchvision's download.

    "alex" and "squeeze" are the networks of the lpips package. "vgg" averages where that package
    takes the maximum, as `piq.LPIPS(replace_pooling=True)` does: what tables of restoration
    papers mostly call LPIPS.

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
    check_choice("net", net, ("alex", "squeeze", "vgg"))
    x01, reference01 = _unit_pair(x, reference, metric="lpips")
    _check_rgb(x, metric="LPIPS")
    model = _lpips_model(net, x.device)
    distance: Tensor = model(2 * x01.float() - 1, 2 * reference01.float() - 1)
    return distance.flatten()


@exact_arithmetic()
def crps(draws: Tensor, reference: Tensor) -> Tensor:
    """Continuous ranked probability score of posterior draws, averaged over pixels.

    It judges the law of each pixel: lower is better, and the true posterior has the lowest mean.
    The fair score, which does not depend on the number of draws but by chance. Of the absolute
    error of a single image it is the generalisation. Nothing is clamped.

    Args:
        draws: independent draws for each image, shape (S, B, C, H, W), S >= 2, in [-1, 1].
        reference: true images, shape (B, C, H, W).

    Returns:
        One value an image, shape (B,), in units of the images.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if the shapes do not fit or a value is not finite.

    Source:
        Gneiting & Raftery, JASA 102 (2007); fair form: Ferro, QJRMS 140 (2014).
    """
    draws, reference = _checked_draws(draws, reference, least=2)
    return ensemble_crps(draws, reference).flatten(1).mean(1)


@exact_arithmetic()
def coverage(draws: Tensor, reference: Tensor) -> Tensor:
    """Share of pixels that lie within the 90% interval of their own draws: 0.9 if these are right.

    If truth and S draws follow one law, the truth is below the j-th smallest draw with probability
    j / (S + 1), whatever the law. So [j-th smallest, j-th largest] holds it with probability
    1 - 2j / (S + 1), which is 0.9 at j = 0.05 (S + 1). Between whole j the shares of the two
    neighbouring intervals are averaged with the weights that make 0.9; no shape of the law is
    assumed. Fewer than 19 draws span no such interval. Nothing is clamped.

    Args:
        draws: independent draws for each image, shape (S, B, C, H, W), S >= 19, in [-1, 1].
        reference: true images, shape (B, C, H, W).

    Returns:
        One value an image, shape (B,), in [0, 1].

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if the shapes do not fit or a value is not finite.
    """
    draws, reference = _checked_draws(draws, reference, least=COVERAGE_DRAWS)
    # Rounded, so that 19 draws give 1 and not a little less.
    place = round((1 - NOMINAL_COVERAGE) / 2 * (len(draws) + 1), 9)
    outer = int(place)
    ordered = draws.sort(0).values

    def share(rank: int) -> Tensor:
        inside = (ordered[rank - 1] <= reference) & (reference <= ordered[-rank])
        return inside.to(reference.dtype).flatten(1).mean(1)

    wide, narrow = share(outer), share(outer + 1)
    return wide + (place - outer) * (narrow - wide)


@exact_arithmetic()
@torch.no_grad()
def alex_features(x: Tensor) -> Tensor:
    """What FD-alex compares: the last of AlexNet's five ReLU stages, averaged over its pixels.

    Exactly: x is clamped to [-1, 1] and kept at its own size; of each channel the LPIPS package's
    shift (-.030, -.088, -.188) is subtracted and it is divided by its scale (.458, .448, .450);
    then torchvision's AlexNet, `features` 0 to 11 (five convolutions with ReLU and two
    max-pools), with the ImageNet weights that LPIPS uses; then the mean over height and width.
    Weights are found as for `lpips`.

    The last stage alone was chosen by measurement, over all five joined (1,152 numbers). Against
    2,000 aligned 64x64 faces, with another 2,000 it gives 4.6 (pure chance); these blurred by a
    Gaussian of std 0.4, 0.6, 1.0 pixels 5.4, 23, 106; with noise of std 0.02, 0.05, 0.1, 0.2 it
    gives 5.0, 13, 74, 478; as JPEG of quality 90, 60, 30, 10 it gives 5.3, 7.5, 17, 75; with the
    right half of another face 34; 500 of them four times over 11. All five joined also grow with
    blur, noise and compression, but these stand out less from chance: blur 0.6 is 3.6 times the
    value of chance (here 5.1), noise 0.1 is 6.8 times (16), JPEG 10 is 11 times (16), halves 5.4
    times (7.5); the repeated faces 2.5 times both ways.

    Args:
        x: images, shape (B, 3, H, W), in [-1, 1], H and W at least 32.

    Returns:
        Features, shape (B, 256), float32.

    Raises:
        TypeError: if x is no floating-point tensor.
        ValueError: if x is too small, not RGB, or not finite.
        CheckpointError: if the weights are neither in that folder nor can be downloaded.
    """
    _check_images("x", x, metric="alex_features")
    _check_rgb(x, metric="AlexNet")
    model = _lpips_model("alex", x.device)
    backbone, scaled = model.get_submodule("net"), model.get_submodule("scaling_layer")
    features: Tensor = backbone(scaled(x.clamp(-1, 1).float())).relu5.mean((2, 3))
    return features


def fd_alex(x: Iterable[Tensor], reference: Iterable[Tensor]) -> float:
    """Fréchet distance of two sets of images in pooled AlexNet features: FD-alex.

    The squared 2-Wasserstein distance of the Gaussians fitted to the `alex_features` of both
    sets, in float64. It is no FID, whose features are Inception's, and compares with none. Small
    sets are farther apart by chance, so compare values of equal numbers only.

    Args:
        x: batches of images, each of shape (B, 3, H, W), at least 2 images in all.
        reference: batches of the other images, likewise.

    Returns:
        The distance, >= 0 up to rounding.

    Raises:
        ValueError: if a set has fewer than two images; otherwise as `alex_features`.
    """
    first, second = (
        sum((Moments.of(alex_features(batch)) for batch in batches), Moments.none())
        for batches in (x, reference)
    )
    return frechet_distance(first, second)


def _checked_draws(draws: Tensor, reference: Tensor, *, least: int) -> tuple[Tensor, Tensor]:
    """Return both in one dtype; raise unless `draws` are finite and `least` or more an image."""
    check_finite("reference", check_images("reference", reference))
    check_finite("draws", check_floating("draws", draws))
    if draws.ndim != 5 or len(draws) < least:
        raise ValueError(
            f"draws must have shape (at least {least}, B, C, H, W), got {tuple(draws.shape)}"
        )
    check_shape("draws", draws, (len(draws), *reference.shape))
    check_on_device("reference", reference, draws.device)
    return _in_one_dtype(draws, reference)


def _in_one_dtype(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the wider dtype of the two, float32 or wider."""
    dtype = working_dtype(torch.promote_types(x.dtype, reference.dtype))
    return x.to(dtype), reference.to(dtype)


def _unit_pair(x: Tensor, reference: Tensor, *, metric: str) -> tuple[Tensor, Tensor]:
    """Return both images clamped and mapped to [0, 1]."""
    _check_images("x", x, metric=metric)
    check_finite("reference", check_images("reference", reference))
    check_shape("reference", reference, x.shape)
    check_on_device("reference", reference, x.device)
    x, reference = _in_one_dtype(x, reference)
    return (x.clamp(-1, 1) + 1) / 2, (reference.clamp(-1, 1) + 1) / 2


def _check_images(name: str, x: Tensor, *, metric: str) -> None:
    """ValueError unless `x` are finite images that the metric's windows or network fit."""
    check_finite(name, check_images(name, x))
    least = SMALLEST_SIDE[metric]
    if min(x.shape[-2:]) < least:
        raise ValueError(
            f"{name} must be at least {least} pixels high and wide for {metric}, "
            f"got {tuple(x.shape)}"
        )


def _check_rgb(x: Tensor, *, metric: str) -> None:
    if x.shape[1] != 3:
        raise ValueError(f"x must have 3 channels for {metric}, got {tuple(x.shape)}")


def _lpips_model(net: str, device: torch.device) -> nn.Module:
    """Return the LPIPS network on a device, loaded once: threads share it."""
    folder = os.environ.get(WEIGHTS_VARIABLE)
    key = (net, folder, device)
    with _loading:
        if key not in _networks:
            _networks[key] = _load_lpips(net, folder).to(device, torch.float32)
        return _networks[key]


def _load_lpips(net: str, folder: str | None) -> nn.Module:
    import lpips as package

    file = f"lpips_{net}_features.safetensors"
    places = (*(() if folder is None else (Path(folder),)), _SHIPPED)
    stored = next((place / file for place in places if (place / file).exists()), None)
    with warnings.catch_warnings():
        # The package calls torchvision by names that torchvision has deprecated.
        warnings.simplefilter("ignore")
        try:
            model = package.LPIPS(net=net, pnet_rand=stored is not None, verbose=False)
        except OSError as error:
            looked = f"{WEIGHTS_VARIABLE} is not set" if folder is None else f"not in {folder}"
            raise CheckpointError(
                f"LPIPS ({net}) needs {file} in the folder that {WEIGHTS_VARIABLE} names "
                f"({looked}), or torchvision's download, which failed: {error}; to make the file, "
                "save the features.* weights of torchvision's network as safetensors"
            ) from error
    if stored is not None:
        _load_features(model.net, stored)
    if net == "vgg":
        _average_pools(model.net)
    frozen: nn.Module = model.requires_grad_(False).eval()
    return frozen


def _average_pools(backbone: nn.Module) -> None:
    """Replace every 2 x 2 maximum of a backbone's slices by the mean."""
    for stage in backbone.children():
        for name, layer in stage.named_children():
            if isinstance(layer, nn.MaxPool2d):
                setattr(stage, name, nn.AvgPool2d(2))


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
