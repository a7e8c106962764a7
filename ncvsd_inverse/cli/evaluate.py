"""`ncvsd evaluate`: a distilled prior judged against its teacher."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from torch import Tensor

from ncvsd_inverse import CheckpointError, __version__, load_card
from ncvsd_inverse.checks import check_count, check_level
from ncvsd_inverse.cli.inputs import load_named, open_folder, sides_of
from ncvsd_inverse.cli.options import Device, Seed, complete_prior
from ncvsd_inverse.evaluation import Evaluation, Generation, evaluate_generation
from ncvsd_inverse.evaluation import evaluate as evaluation_of
from ncvsd_inverse.evaluation.generation import BLOCK
from ncvsd_inverse.evaluation.plots import save_evaluation_plot
from ncvsd_inverse.evaluation.posterior import PosteriorRatio
from ncvsd_inverse.files import write_whole
from ncvsd_inverse.images import centre_crop, read_images, resize_cover
from ncvsd_inverse.metrics import alex_features
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = [
    "evaluate",
]


def evaluate(
    prior: Annotated[
        str,
        typer.Argument(help="A name of `ncvsd priors`, or a path.", autocompletion=complete_prior),
    ],
    data: Annotated[Path, typer.Option("--data", help="Folder or zip of images to judge by.")],
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="A name or path; PRIOR_teacher where there is.")
    ] = None,
    train: Annotated[
        Path | None, typer.Option("--train", help="Training images, to judge generation by.")
    ] = None,
    images: Annotated[
        int, typer.Option("--images", help="How many of --data, from the first.")
    ] = 64,
    draws: Annotated[int, typer.Option("--draws", help="Draws for each image and level.")] = 32,
    samples: Annotated[int, typer.Option("--samples", help="Images to generate.")] = 10_000,
    teacher_samples: Annotated[
        int | None, typer.Option("--teacher-samples", help="As many by the teacher; --samples.")
    ] = None,
    levels: Annotated[
        str, typer.Option("--levels", help="Noise stds in [-1, 1] units, commas between them.")
    ] = "0.05,0.1,0.2,0.5,1,2,5,10",
    teacher_steps: Annotated[
        int | None,
        typer.Option(
            "--teacher-steps", help="Judge 4 draws of the teacher's reverse diffusion too, N calls."
        ),
    ] = None,
    size: Annotated[
        int, typer.Option("--size", help="Side of the centre crop, where a prior takes any size.")
    ] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at a time.")] = 32,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path(
        "ncvsd_evaluation"
    ),
    device: Device = None,
) -> None:
    """Judge a distilled prior against its teacher and images that neither has seen.

    At each noise level: the PSNR of the teacher's mean; the posterior ratio MSE(one draw) /
    MSE(teacher's mean), 2 for posterior draws and 1 for a mean; its parts, the variance (1) and
    squared bias (0) of the draws; the PSNR of their mean; their CRPS. With --train, FD-alex of
    images generated in 1, 2 and 4 calls. Writes evaluation.json, .md and .png to the output
    folder.
    """
    from rich.console import Console

    stds = _parse_levels(levels)
    several = {"draws": draws, "samples": samples, "teacher-samples": teacher_samples}
    several |= {"images": images, "teacher-steps": teacher_steps}
    for name, value in several.items():
        if value is not None:
            check_count(f"--{name}", value, least=2)
    for name, number in (("size", size), ("batch-size", batch_size)):
        check_count(f"--{name}", number)
    check_count("--seed", seed, least=0)
    for name, source in (("data", data), ("train", train)):
        if source is not None and not source.exists():
            raise ValueError(f"--{name} must be a folder or a zip archive, got {source}: not there")
    own_teacher = teacher or _own_teacher(prior)
    judged, where = load_named(prior, device)
    if not isinstance(judged, NCVSDPrior):
        raise ValueError(f"PRIOR must be a distilled prior, got {prior}, a teacher")
    reference, _ = load_named(own_teacher, device)
    if not isinstance(reference, DiffusionPrior):
        raise ValueError(f"--teacher must be a teacher, got {own_teacher}, a distilled prior")
    truths = torch.cat([_fit_square("--data", x, judged, size) for x in read_images(data, images)])
    typer.echo(f"{data}: {len(truths)} images of {truths.shape[-1]} x {truths.shape[-2]}")
    training = None
    if train is None:
        typer.echo("without --train, generation is not judged")
    else:
        training = (_fit_square("--train", x, judged, size) for x in read_images(train))
        # What the long part needs is asked for before it starts.
        alex_features(truths[:1])
    open_folder(out)
    truths, shown = truths.to(where), sys.stderr.isatty()
    evaluation = evaluation_of(
        judged,
        reference,
        truths,
        levels=stds,
        draws=draws,
        teacher_steps=teacher_steps,
        seed=seed,
        batch_size=batch_size,
        progress=shown,
    )
    tables = [_levels_table(evaluation)]
    Console().print(tables[0].for_terminal())
    generation = None
    if training is not None:
        generation = evaluate_generation(
            judged,
            reference,
            _blocks(training, BLOCK, where),
            features=alex_features,
            samples=samples,
            teacher_samples=teacher_samples,
            seed=seed,
            batch_size=batch_size,
            progress=shown,
        )
        tables.append(_generation_table(generation))
        Console().print(tables[1].for_terminal())
    record = {
        "prior": prior,
        "teacher": own_teacher,
        "data": str(data),
        "train": None if train is None else str(train),
        "image_shape": list(truths.shape[1:]),
        "device": str(where),
        "version": __version__,
        **evaluation.to_dict(),
        "fd_alex": None if generation is None else generation.to_dict(),
    }
    title = f"# {prior}, judged by {own_teacher} on {len(truths)} images of {data}\n\n"
    text = title + "\n".join(table.in_markdown() for table in tables)
    content = json.dumps(record, indent=2, allow_nan=False) + "\n"
    save_evaluation_plot(out / "evaluation.png", evaluation.levels)
    write_whole(out / "evaluation.md", text)
    write_whole(out / "evaluation.json", content)
    typer.echo(f"see {out / 'evaluation.md'}, .png and .json")


def _blocks(pictures: Iterator[Tensor], num: int, device: torch.device) -> Iterator[Tensor]:
    """Yield pictures (1, C, H, W) together, `num` at a time."""
    while block := list(islice(pictures, num)):
        yield torch.cat(block).to(device)


@dataclass(frozen=True)
class _Table:
    """Rows of text under a title and a header."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def for_terminal(self) -> "RichTable":
        """Return it for rich to print."""
        from rich.table import Table as RichTable

        table = RichTable(*self.header, title=self.title, box=None)
        for row in self.rows:
            table.add_row(*row)
        return table

    def in_markdown(self) -> str:
        """Return it as Markdown text."""
        lines = (self.header, ("---",) * len(self.header), *self.rows)
        return f"{self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _levels_table(evaluation: Evaluation) -> _Table:
    """Return the figures over noise levels, with standard errors."""
    steps = evaluation.teacher_steps
    asked = () if steps is None else tuple(f"{steps} calls: {p}" for p in ("ratio", "var.", "bias"))
    return _Table(
        "Teacher's PSNR in dB; posterior ratio (2), variance (1) and squared bias (0) of the draws "
        f"over the teacher's MSE; PSNR of the mean of {evaluation.draws} draws and what it lacks "
        "in dB; CRPS"
        + ("" if steps is None else f"; the same of the teacher's diffusion in {steps} calls"),
        ("sigma", "teacher", "ratio", "var.", "bias", "mean", "lacks", "CRPS", *asked),
        [
            (
                f"{level.sigma:g}",
                f"{level.teacher_psnr.value:.2f}",
                *_parts(level.prior),
                f"{level.mean_psnr.value:.2f}",
                f"{level.psnr_gap.value:.2f}±{level.psnr_gap.error:.2f}",
                f"{level.crps.value:.4f}±{level.crps.error:.4f}",
                *(() if level.teacher is None else _parts(level.teacher)),
            )
            for level in evaluation.levels
        ],
    )


def _parts(ratio: PosteriorRatio) -> tuple[str, ...]:
    figures = (ratio.ratio, ratio.variance, ratio.bias)
    return tuple(f"{figure.value:.2f}±{figure.error:.2f}" for figure in figures)


def _generation_table(generation: Generation) -> _Table:
    """Return the distances of generated images to the training images."""
    return _Table(
        "FD-alex to the training images",
        ("images", "number", "against", "FD-alex"),
        [
            (row.name, str(row.images), str(row.reference), f"{row.distance:.2f}")
            for row in generation.figures
        ],
    )


def _parse_levels(text: str) -> tuple[float, ...]:
    try:
        levels = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--levels must be numbers with commas between, got {text!r}") from None
    for level in levels:
        check_level("--levels", level)
    return levels


def _own_teacher(prior: str) -> str:
    """Return the name or path of the teacher that belongs to a prior."""
    own = f"{prior.removesuffix('.json').removesuffix('.safetensors')}_teacher"
    try:
        load_card(own)
    except (ValueError, CheckpointError) as error:
        raise ValueError(f"--teacher must be given, as there is no {own}: {error}") from None
    return own


def _fit_square(option: str, x: Tensor, prior: NCVSDPrior, size: int) -> Tensor:
    """Return a picture as a prior takes it: of its own size, else the centre `size` x `size`."""
    if prior.image_shape is None:
        if min(sides_of(x)) < size:
            height, width = sides_of(x)
            raise ValueError(
                f"{option} must hold pictures of at least {size} x {size} pixels (--size), "
                f"got one of {width} x {height}"
            )
        return centre_crop(x, (size, size))
    sides = prior.image_shape[1:]
    return x if sides_of(x) == sides else resize_cover(x, sides)
