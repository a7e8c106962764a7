"""`ncvsd train`: a diffusion teacher."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

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
    from ncvsd_inverse.training.config import TeacherConfig

__all__ = [
    "train",
]


def _load(config: str) -> "TeacherConfig":
    from ncvsd_inverse.training.presets import load_teacher_config

    return load_teacher_config(config)


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
    preset: Annotated[str | None, show_config(_load)] = None,
) -> None:
    """Train a diffusion teacher; the same command goes on after a stop.

    Runs on one process, or on many under `accelerate launch` or `torchrun`; --fsdp, or
    `accelerate launch --use_fsdp`, shards the networks over them.
    """
    from ncvsd_inverse.training import TeacherTrainer

    changes = {"images": images, "batch_size": batch_size, "microbatch": microbatch, "init": init}
    settings = replace(_load(config), **given_options(changes))
    pictures = read_training_data(data, settings)
    run_training(TeacherTrainer(settings, pictures, out, shard=shard), data, seconds)
