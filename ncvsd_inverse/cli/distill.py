"""`ncvsd distill`: a generative denoiser from a teacher."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

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
from ncvsd_inverse.cli.training_run import (
    given_options,
    read_training_data,
    run_training,
    show_config,
)

if TYPE_CHECKING:
    from ncvsd_inverse.training.config import DistillConfig

__all__ = [
    "distill",
]


def _load(config: str) -> "DistillConfig":
    from ncvsd_inverse.training.presets import load_distill_config

    return load_distill_config(config)


def distill(
    config: Config,
    teacher: Annotated[
        str, typer.Option("--teacher", help="A run's folder, a prior's name, or a path.")
    ],
    data: Data,
    out: RunFolder,
    images: Images = None,
    batch_size: Batch = None,
    microbatch: Microbatch = None,
    init: Init = None,
    seconds: Seconds = float("inf"),
    shard: Shard = False,
    preset: Annotated[str | None, show_config(_load)] = None,
) -> None:
    """Distil a teacher into a generative denoiser; the same command goes on after a stop.

    Runs on one process, or on many under `accelerate launch` or `torchrun`; --fsdp, or
    `accelerate launch --use_fsdp`, shards the networks over them.
    """
    from ncvsd_inverse.training import DistillationTrainer, load_teacher

    changes = {"images": images, "batch_size": batch_size, "microbatch": microbatch, "init": init}
    settings = replace(_load(config), **given_options(changes))
    pictures = read_training_data(data, settings)
    run = DistillationTrainer(settings, pictures, out, load_teacher(teacher), shard=shard)
    run_training(run, data, seconds)
