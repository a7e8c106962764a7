"""`ncvsd encode`: pictures as latents, to train on."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ncvsd_inverse.cli.options import Device
from ncvsd_inverse.machine import find_device

__all__ = [
    "encode",
]


def encode(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Zip, folder or dataset folder of pictures.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Zip of latents to write.")],
    vae: Annotated[
        str | None,
        typer.Option("--vae", help="A name on Hugging Face or a folder; stabilityai/sd-vae-ft-mse"),
    ] = None,
    size: Annotated[int, typer.Option("--size", help="Side that pictures are brought to.")] = 512,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch", help="Pictures at a time.")
    ] = 8,
    labels: Annotated[
        bool, typer.Option("--labels/--no-labels", help="Write the classes of the pictures too.")
    ] = True,
    half: Annotated[
        bool, typer.Option("--half", help="Store float16, in half the room of float32.")
    ] = False,
    workers: Annotated[
        int, typer.Option("--workers", help="Processes that decode pictures; 0: none besides.")
    ] = 2,
    device: Device = None,
) -> None:
    """Encode pictures to latents of the Stable Diffusion VAE, to train the imagenet512 presets on.

    Pictures are resized to cover a square and cropped around the centre. DST appears when it is
    whole.
    """
    from ncvsd_inverse.priors.latent import SD_VAE
    from ncvsd_inverse.training.data.latents import encode_images

    encoded = encode_images(
        source,
        target,
        vae=vae or SD_VAE,
        size=size,
        batch_size=batch_size,
        labels=labels,
        half=half,
        workers=workers,
        device=find_device(device),
        progress=sys.stderr.isatty(),
    )
    typer.echo(f"{target}: {encoded.images} latents, {encoded.num_classes} classes")
    for name in encoded.skipped:
        typer.echo(f"skipped {name}")
