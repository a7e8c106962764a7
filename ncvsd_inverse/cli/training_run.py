"""Steps that `ncvsd train` and `ncvsd distill` share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer

if TYPE_CHECKING:
    from ncvsd_inverse.training import DistillationTrainer, TeacherTrainer
    from ncvsd_inverse.training.config import TrainConfig
    from ncvsd_inverse.training.data import TrainingData

__all__ = [
    "given_options",
    "read_training_data",
    "run_training",
    "show_config",
]


def show_config(load: Callable[[str], "TrainConfig"]) -> Any:  # noqa: ANN401
    """Return the option that prints the settings of a preset, or of a file, and ends.

    Args:
        load: reads settings by the name of a preset or the path of a file.
    """

    def show(preset: str | None) -> None:
        if preset is not None:
            typer.echo(load(preset).to_toml(), nl=False)
            raise typer.Exit

    return typer.Option(
        "--show-config",
        metavar="PRESET",
        callback=show,
        is_eager=True,
        help="Print the settings of a preset as TOML, and end: a start for one's own.",
    )


def given_options(changes: Mapping[str, object]) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in changes.items() if value is not None}


def read_training_data(source: Path, settings: "TrainConfig") -> "TrainingData":
    """Read training images as a configuration wants them."""
    from ncvsd_inverse.training import read_data

    side = settings.network.resolution
    return read_data(
        source,
        crop=side if settings.any_size else None,
        resolution=None if settings.any_size else side,
        channels=settings.network.image_channels,
        flip=settings.flip,
        labels=settings.network.num_classes > 0,
        most_classes=settings.network.num_classes or None,
    )


def run_training(run: "TeacherTrainer | DistillationTrainer", source: Path, seconds: float) -> None:
    """Run to the end or for `seconds`, with a bar, and leave a prior in the run's folder."""
    from ncvsd_inverse.training.export import keep_run_statistics, save_run_prior
    from ncvsd_inverse.training.progress import ProgressReport

    if not run.accelerator.is_main_process:
        with run.opened():
            run.run(seconds=seconds)
            run.accelerator.wait_for_everyone()
        return
    with run.opened():
        typer.echo(
            f"{run.folder}: {run.accelerator.num_processes} process(es) on {run.device}, "
            f"{run.config.compute_dtype}, {torch.get_num_threads()} CPU threads"
            + (f", resumed after {run.images_seen} images" if run.images_seen else "")
        )
        batch = next(run.data.batches(0, run.config.batch_size, seed=run.config.seed))
        report = ProgressReport(run, batch.images)
        with report.showing():
            done = run.run(
                seconds=seconds, on_log=report.on_log, on_checkpoint=report.on_checkpoint
            )
        stem = save_run_prior(run, source.name)
        keep_run_statistics(run, stem)
    state = "finished" if done else "stopped, the same command goes on"
    typer.echo(f"{state} after {run.images_seen} images; load_prior('{stem}')")
    # A process that ended before would take the others with it.
    run.accelerator.wait_for_everyone()
