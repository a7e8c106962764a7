"""`ncvsd convert`: the checkpoint of others as a prior."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ncvsd_inverse import load_prior
from ncvsd_inverse.priors.own_statistics import SIDE, lacks_statistics, with_own_statistics

__all__ = [
    "convert",
]


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Checkpoint file, or folder of diffusers.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="FOLDER/NAME of NAME.safetensors and NAME.json.")
    ],
    licence: Annotated[
        str | None, typer.Option("--licence", help="Terms of use of the weights, for the card.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="What it was trained on, for the card.")
    ] = None,
    schedule: Annotated[
        Literal["linear", "cosine"] | None,
        typer.Option("--schedule", help="Noise schedule of ADM; both are tried if not given."),
    ] = None,
    head_channels: Annotated[
        int | None, typer.Option("--head-channels", help="Channels of an attention head.")
    ] = None,
    num_heads: Annotated[
        int | None, typer.Option("--num-heads", help="Attention heads of each block of ADM.")
    ] = None,
    attention_order: Annotated[
        Literal["legacy", "new"] | None,
        typer.Option("--attention-order", help="new for ADM's use_new_attention_order."),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", help="Side of the images, where nothing tells it.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Whether it must denoise a shipped photograph."),
    ] = True,
    measure: Annotated[
        bool,
        typer.Option(
            "--statistics/--no-statistics",
            help="Whether its statistics are measured at once; else when it is first used.",
        ),
    ] = True,
) -> None:
    """Write the checkpoint of others as a prior, and run no code that it holds."""
    from ncvsd_inverse.priors.convert import UNSAID
    from ncvsd_inverse.priors.convert import convert as convert_checkpoint
    from ncvsd_inverse.priors.latent import LATENT_CHANNELS

    target.parent.mkdir(parents=True, exist_ok=True)
    card = convert_checkpoint(
        source,
        target,
        licence=licence or UNSAID,
        data=data or UNSAID,
        schedule=schedule,
        head_channels=head_channels,
        num_heads=num_heads,
        attention_order=attention_order,
        size=size,
        check=check,
    )
    shape = "any size" if card.image_shape is None else "x".join(map(str, card.image_shape))
    stem = target.with_name(card.name)
    typer.echo(f"{source}: a {card.kind} prior of {shape}; load_prior({str(stem)!r})")
    if "schedule" in card.training:
        typer.echo(f"noise schedule: {card.training['schedule']}")
    tried = card.training["self_check"]
    if isinstance(tried, list):
        falls = (
            f"{row['noisy']:.3g} to {row['denoised']:.3g} at noise std {row['sigma']}"
            for row in tried
        )
        tried = f"mean squared error of a photograph {', '.join(falls)}"
    typer.echo(f"self-check: {tried}")
    of_latents = card.image_shape is not None and card.image_shape[0] == LATENT_CHANNELS
    if measure and not of_latents:
        loaded = load_prior(stem)
        if lacks := lacks_statistics(loaded):
            typer.echo(f"statistics: none, {lacks}; ncvsd statistics {stem} --data IMAGES")
        else:
            with_own_statistics(loaded, loaded.image_shape or (3, SIDE, SIDE))
            typer.echo("statistics: measured from images that it generated")
