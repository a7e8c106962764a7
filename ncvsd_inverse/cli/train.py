"""`ncvsd train`: a diffusion teacher."""

from dataclasses import replace
from typing import Annotated

import typer

from ncvsd_inverse.cli.options import (
    Batch,
    Config,
    Data,
    Images,
    Init,
    Microbatch,
    RunFolder,
    Seconds,
    Shard,
)
from ncvsd_inverse.cli.training_run import given_options, read_training_data, run_training

__all__ = [
    "train",
]


def _show_config(preset: str | None) -> None:
    """Print the settings of a preset, or of a file, and end."""
    if preset is not None:
        from ncvsd_inverse.training.presets import load_teacher_config

        typer.echo(load_teacher_config(preset).to_toml(), nl=False)
        raise typer.Exit


def train(
    config: Config,
    data: Data,
    out: RunFolder,
    images: Images = None,
    batch_size: Batch = None,
    microbatch: Microbatch = None,
    init: Init = None,
    seconds: Seconds = float("inf"),
    shard: Shard = False,
    show_config: Annotated[
        str | None,
        typer.Option(
            "--show-config",
            metavar="PRESET",
            callback=_show_config,
            is_eager=True,
            help="Print the settings of a preset as TOML, and end: a start for one's own.",
        ),
    ] = None,
) -> None:
    """Train a diffusion teacher; the same command goes on after a stop.

    Runs on one process, or on many under `accelerate launch` or `torchrun`; --fsdp, or
    `accelerate launch --use_fsdp`, shards the networks over them.
    """
    from ncvsd_inverse.training import TeacherTrainer
    from ncvsd_inverse.training.presets import load_teacher_config

    changes = {"images": images, "batch_size": batch_size, "microbatch": microbatch, "init": init}
    settings = replace(load_teacher_config(config), **given_options(changes))
    pictures = read_training_data(data, settings)
    run_training(TeacherTrainer(settings, pictures, out, shard=shard), data, seconds)
