"""`ncvsd statistics`: mean and covariances of a prior, measured and kept."""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer

from ncvsd_inverse.cli.inputs import load_named
from ncvsd_inverse.cli.options import Device, complete_prior
from ncvsd_inverse.images import centre_crop, read_images
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior
from ncvsd_inverse.priors.own_statistics import SIDE, num_images, own_statistics

__all__ = [
    "statistics",
]


def statistics(
    prior: Annotated[
        str,
        typer.Argument(help="A name of `ncvsd priors`, or a path.", autocompletion=complete_prior),
    ],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder or zip of clean images; else the prior generates."),
    ] = None,
    images: Annotated[
        int | None, typer.Option("--images", help="How many; 32 of 64x64, 4 of 256x256.")
    ] = None,
    size: Annotated[
        int, typer.Option("--size", help="Side of the images, where a prior takes any size.")
    ] = SIDE,
    device: Device = None,
) -> None:
    """Measure the mean and covariances of a prior's images, which `solve` needs, and keep them.

    They go into the prior's card or, where that cannot be written, into the cache. `solve` does
    the same by itself for a prior without any, from images that the prior generates.
    """
    loaded, where = load_named(prior, device)
    assert isinstance(loaded, NCVSDPrior | DiffusionPrior)
    store = loaded.statistics_store
    if store is None:
        raise ValueError(
            f"PRIOR must be a copy of {prior} to measure it anew: give the path of one, this one "
            "comes with statistics"
        )
    sides = (size, size) if loaded.image_shape is None else loaded.image_shape[1:]
    shape = None if loaded.image_channels is None else (loaded.image_channels, *sides)
    clean = None
    if data is not None:
        number = num_images(sides) if images is None else images
        clean = torch.cat([centre_crop(x, sides) for x in read_images(data, number)]).to(where)
    measured = own_statistics(loaded, data=clean, images=images, image_shape=shape)
    kept = store.write(measured)
    like = torch.zeros(16, len(measured.mean), *sides, dtype=torch.float32)
    noise = draw_normal(like, torch.Generator().manual_seed(0))
    for sigma in (*measured.levels, math.inf):
        std = float(measured.covariance(sigma, like).colour(noise).std())
        typer.echo(f"std of a pixel given a noisy image at sigma {sigma:g}: {std:.4f}")
    typer.echo(f"kept in {kept}")
