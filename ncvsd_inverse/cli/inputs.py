"""Priors, pictures and output folders as commands take them."""

import tempfile
from pathlib import Path

import torch
import typer
from torch import Tensor

from ncvsd_inverse import load_prior
from ncvsd_inverse.images import centre_crop_to_multiple, resize_cover
from ncvsd_inverse.machine import find_device
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior
from ncvsd_inverse.priors.tiled import tiled
from ncvsd_inverse.protocols import NetworkBacked, NetworkTraits, Prior, PriorTraits

__all__ = [
    "fit_picture",
    "in_tiles",
    "load_named",
    "open_folder",
    "sides_of",
    "size_multiple",
]


def load_named(name: str, device: str | None) -> tuple[Prior, torch.device]:
    """Load a prior and say where and how it computes."""
    where = find_device(device)
    prior = load_prior(name, device=where)
    weights = prior.network.parameters() if isinstance(prior, NetworkBacked) else ()
    dtypes = {str(weight.dtype) for weight in weights}
    precision = " and ".join(sorted(dtypes)).replace("torch.", "") or "the dtype of y"
    typer.echo(f"{name} computes on {where} in {precision}, {torch.get_num_threads()} CPU threads")
    return prior, where


def in_tiles(prior: Prior, tile: int) -> Prior:
    """Return a prior of any size as one that sees large images in tiles; another as it is."""
    if isinstance(prior, NCVSDPrior | DiffusionPrior) and prior.image_shape is None:
        return tiled(prior, tile)
    return prior


def open_folder(folder: Path) -> None:
    """Make the output folder; ValueError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out must be a writable folder, got {folder}: {error}") from None


def fit_picture(path: Path, x: Tensor, prior: Prior) -> Tensor:
    """Return a clean picture cropped, and resized if need be, to a size that the prior takes."""
    shape = PriorTraits.of(prior).image_shape
    if shape is None:
        fitted = centre_crop_to_multiple(x, size_multiple(prior, 8))
    else:
        sides = shape[1:]
        fitted = x if sides_of(x) == sides else resize_cover(x, sides)
    if fitted.shape != x.shape:
        old, new = (f"{width} x {height}" for height, width in (sides_of(x), sides_of(fitted)))
        typer.echo(f"{path}: {old} pixels fitted to {new} around the centre, for this prior")
    return fitted


def size_multiple(prior: Prior, unknown: int) -> int:
    """Return what the sides of images must be multiples of, `unknown` for one without network."""
    if not isinstance(prior, NetworkBacked):
        return unknown
    return NetworkTraits.of(prior.network).size_multiple


def sides_of(x: Tensor) -> tuple[int, int]:
    """Return height and width of images (B, C, H, W)."""
    return x.shape[-2], x.shape[-1]
