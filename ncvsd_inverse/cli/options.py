"""Options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from ncvsd_inverse import list_priors

__all__ = [
    "Batch",
    "Config",
    "Data",
    "Device",
    "Images",
    "Init",
    "Microbatch",
    "Nfe",
    "PriorName",
    "Restarts",
    "RunFolder",
    "Samples",
    "Seconds",
    "Seed",
    "Shard",
    "complete_preset",
    "complete_prior",
]


def complete_prior(incomplete: str) -> list[str]:
    """Return the names of priors that begin so, for a shell."""
    return [name for name in list_priors() if name.startswith(incomplete)]


def complete_preset(incomplete: str) -> list[str]:
    """Return the names of presets that begin so, for a shell."""
    from ncvsd_inverse.training.presets import list_presets

    return [name for name in list_presets("teacher") if name.startswith(incomplete)]


PriorName = Annotated[
    str,
    typer.Option(
        "--prior", help="A name of `ncvsd priors`, or a path.", autocompletion=complete_prior
    ),
]
Nfe = Annotated[int, typer.Option("--nfe", help="Network forward passes a sample.")]
Restarts = Annotated[
    int, typer.Option("--restarts", help="Chains for each sample; the best fit is kept.")
]
Samples = Annotated[int, typer.Option("--samples", help="Posterior samples for each image.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same result.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, ...; cuda where there is one.")
]
Config = Annotated[
    str,
    typer.Argument(
        help="A preset's name or the path of a TOML file.", autocompletion=complete_preset
    ),
]
Data = Annotated[Path, typer.Option("--data", help="Zip, folder or dataset folder of images.")]
RunFolder = Annotated[
    Path,
    typer.Option("--out", "-o", file_okay=False, help="Folder of the run, resumed if any."),
]
Images = Annotated[int | None, typer.Option("--images", help="Images to train on in all.")]
Batch = Annotated[int | None, typer.Option("--batch-size", help="Images in a step.")]
Microbatch = Annotated[
    int | None, typer.Option("--microbatch", help="Most images of a process in one pass.")
]
Seconds = Annotated[
    float, typer.Option("--seconds", min=0, help="Stop at a checkpoint after this.")
]
Init = Annotated[
    str | None,
    typer.Option("--init", help="A prior whose weights the run starts from, optimiser fresh."),
]
Shard = Annotated[
    bool, typer.Option("--fsdp", help="Spread the networks over the processes, to fit larger ones.")
]
