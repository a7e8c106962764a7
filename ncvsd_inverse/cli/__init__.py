"""The command `ncvsd`; it calls the public API and holds no mathematics."""

import hashlib
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import torch
import typer
from torch import Tensor

from ncvsd_inverse import (
    CheckpointError,
    DivergenceError,
    Result,
    __version__,
    list_priors,
    load_prior,
    solve,
)
from ncvsd_inverse.checks import check_count, check_image_size, check_positive
from ncvsd_inverse.evaluation.plots import GridRow, save_picture_grid
from ncvsd_inverse.files import write_whole
from ncvsd_inverse.images import (
    SUFFIXES,
    centre_crop,
    centre_crop_to_multiple,
    read_image,
    read_images,
    resize_cover,
    write_image,
)
from ncvsd_inverse.metrics import psnr, ssim
from ncvsd_inverse.numerics import draw_normal, make_generators
from ncvsd_inverse.operators import Inpaint
from ncvsd_inverse.priors import (
    DiffusionPrior,
    NCVSDPrior,
    PriorCard,
    PublishedPrior,
    describe_prior,
    load_card,
)
from ncvsd_inverse.priors.own_statistics import (
    SIDE,
    lacks_statistics,
    num_images,
    own_statistics,
    with_own_statistics,
)
from ncvsd_inverse.priors.registry import kept_file, search_folders
from ncvsd_inverse.priors.statistics import ImageStatistics
from ncvsd_inverse.priors.tiled import TILE, tiled
from ncvsd_inverse.protocols import Prior
from ncvsd_inverse.sampling.solve import Estimate, Method
from ncvsd_inverse.tasks import Task, list_tasks, make_task

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from ncvsd_inverse.evaluation import Evaluation, Generation
    from ncvsd_inverse.evaluation.posterior import PosteriorRatio
    from ncvsd_inverse.training import DistillRun, TeacherRun
    from ncvsd_inverse.training.config import TrainConfig
    from ncvsd_inverse.training.data.image_data import TrainingData

ASSETS = Path(__file__).parents[1] / "assets"
DEMO_TASKS = ("inpaint_box", "inpaint_random", "sr4x", "deblur_gaussian")
"""Tasks whose measurements are no pictures."""
PIXELS_TOGETHER = {"cpu": 2**18, "cuda": 2**22}
"""Pixels of pictures that are restored together, by device: 64 pictures of 64x64 and 1024."""

app = typer.Typer(
    help="Restore images with distilled generative denoisers as priors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PriorName = Annotated[str, typer.Option("--prior", help="A name of `ncvsd priors`, or a path.")]
Nfe = Annotated[int, typer.Option("--nfe", help="Network forward passes a sample.")]
Samples = Annotated[int, typer.Option("--samples", help="Posterior samples for each image.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same result.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, ...; cuda where there is one.")
]


def main() -> None:
    """Run the command; an expected error becomes one line on standard error and exit status 1."""
    warnings.showwarning = _show_warning
    try:
        app()
    except (ValueError, TypeError, ImportError, CheckpointError, DivergenceError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as a line on standard error, without where it comes from."""
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("ncvsd_demo"),
    prior: PriorName = "ncvsd_faces64",
    nfe: Nfe = 10,
    samples: Samples = 8,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Restore a few shipped pictures; needs no network.

    Two aligned portraits, or two photographs where the prior takes any size.
    """
    from rich.console import Console
    from rich.table import Table

    loaded, where = _load(prior, device)
    any_size = getattr(loaded, "image_shape", None) is None
    folder = ASSETS / "photographs" if any_size else ASSETS
    paths = sorted(folder.glob("*.png"))
    truths = torch.cat([_fit(path, read_image(path), loaded) for path in paths]).to(where)
    _open_folder(out)
    table = Table(
        *("task", "picture", "y", "sample", "mean", "SSIM", "residual", "s"),
        title="PSNR in dB of y, one sample, mean; SSIM of the sample; seconds a picture",
        box=None,
    )
    rows = []
    for name in DEMO_TASKS:
        task = make_task(name, _sides(truths), seed=seed)
        y = _simulate(task, truths, seed)
        result = solve(
            y,
            operator=task.operator,
            prior=loaded,
            nfe=nfe,
            sigma_y=task.sigma_y,
            num_samples=samples,
            seed=seed,
        )
        for i, path in enumerate(paths):
            image = slice(i, i + 1)
            truth, x0 = truths[image], result.x0[image]
            seen = _to_size(y[image], _sides(truths))
            quality = float(psnr(x0, truth))
            spread = None if result.std is None else result.std[image]
            write_image(out / f"{path.stem}_{name}.png", x0)
            rows.append(GridRow(name, truth, seen, x0, spread, quality))
            table.add_row(
                name,
                path.stem,
                f"{float(psnr(seen, truth)):.1f}",
                f"{quality:.1f}",
                f"{float(psnr(result.mean[image], truth)):.1f}",
                f"{float(ssim(x0, truth)):.3f}",
                f"{float(result.residual[i]):.2f}",
                f"{result.seconds / len(paths):.1f}",
            )
    save_picture_grid(out / "demo.png", rows)
    Console().print(table)
    typer.echo(
        f"{result.method} loop, {result.nfe} network calls a sample, {samples} samples; "
        f"see {out / 'demo.png'}"
    )


@app.command("solve")
def solve_files(
    sources: Annotated[
        list[Path], typer.Argument(metavar="IN...", help="Picture files, and folders of them.")
    ],
    task: Annotated[str, typer.Option("--task", help=", ".join(list_tasks(all=True)))],
    prior: PriorName,
    nfe: Nfe = 10,
    sigma_y: Annotated[
        float | None, typer.Option("--sigma-y", help="Noise std in [-1, 1] units; the task's.")
    ] = None,
    samples: Samples = 1,
    estimate: Annotated[Estimate, typer.Option("--estimate", help="What is written.")] = "sample",
    method: Annotated[
        Method | None, typer.Option("--method", help="The sampler; what suits the prior.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="Calls for each draw of a diffusion prior; 1."),
    ] = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path(
        "ncvsd_restored"
    ),
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Inpainting: white where IN is known.")
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="IN are clean: degrade them first.")
    ] = False,
    tile: Annotated[
        int,
        typer.Option("--tile", help="Side in pixels of what a prior of any size sees at once."),
    ] = TILE,
    device: Device = None,
) -> None:
    """Restore degraded pictures, or with --simulate degrade clean ones and restore them.

    IN is the measurement of the task: the small picture for sr4x, the blurred one for deblur_*,
    the incomplete one, with --mask, for inpaint_*. For each IN the output folder gets
    NAME_restored.png, NAME.json (settings and figures), NAME_std.png for several samples and,
    with --simulate, NAME_measurement.png. Folders are searched through; NAME is then the path
    within the folder.

    The same command goes on after a stop: a picture is skipped if NAME.json shows that this very
    file was restored with these settings. One that cannot be restored is named at the end, with
    exit status 1. Noise depends on --seed and NAME alone, not on which pictures there are. Under
    `accelerate launch -m ncvsd_inverse.cli solve ...` every process takes its share of pictures.
    """
    known = make_task(task, 64, seed=seed)
    if not simulate and not known.measures_picture:
        raise ValueError(
            f"--task must be one whose measurement is a picture, got {task}: "
            "add --simulate, or call ncvsd_inverse.solve on the measurement"
        )
    if not simulate and known.takes_mask and mask is None:
        raise ValueError(f"--mask must be given for {task}, unless IN are clean (--simulate)")
    if mask is not None and not known.takes_mask:
        raise ValueError(f"--mask must come with an inpainting task, got {task}")
    level = known.sigma_y if sigma_y is None else check_positive("sigma_y", sigma_y)
    seen = None if mask is None else read_image(mask).mean((0, 1)) > 0
    pictures = _find_pictures(sources, out)
    process, processes = _place()
    share = pictures[process::processes]
    whole, where = _load(prior, device)
    if steps is not None:
        if not isinstance(whole, DiffusionPrior):
            raise ValueError(f"--steps must come with a diffusion prior, got {prior}")
        whole = whole.with_steps(steps)
    if method != "gibbs" and not lacks_statistics(whole):
        # Before pictures are looked at: settings that tell finished ones hold the statistics.
        with_own_statistics(whole, (3, SIDE, SIDE))
    loaded = whole
    if isinstance(whole, NCVSDPrior | DiffusionPrior) and whole.image_shape is None:
        loaded = tiled(whole, tile)
    _open_folder(out)
    settings = {
        "task": task,
        "prior": prior,
        "prior_sha256": _card_digest(loaded),
        "simulated": simulate,
        "mask_sha256": None if mask is None else _sha256(mask.read_bytes()),
        "sigma_y": level,
        "nfe": nfe,
        "samples": samples,
        "estimate": estimate,
        "method": method,
        "steps": steps,
        "tile": None if loaded is whole else tile,
        "seed": seed,
        "version": __version__,
    }

    @lru_cache(maxsize=8)
    def make(sides: tuple[int, int]) -> Task:
        return _make_task(task, level, seen, sides, seed)

    bad: list[str] = []
    done = 0

    def read() -> Iterator[_Job]:
        for name, path in share:
            try:
                of_this = settings | {"input_sha256": _sha256(path.read_bytes())}
                if _is_finished(out, name, of_this):
                    advance()
                    continue
                key = (seed, int(_sha256(name.encode())[:16], 16))
                prepared: tuple[Task, Tensor, Tensor | None] = (
                    _prepare_clean(path, loaded, make, key)
                    if simulate
                    else _prepare_measurement(path, loaded, make, known)
                )
                yield _Job(name, path, key, *prepared, of_this | {"device": str(where)})
            except (OSError, ValueError) as error:
                bad.append(_name_once(path, error))
                advance()

    def restore(jobs: list[_Job]) -> Iterator[tuple[_Job, Result]]:
        try:
            result = solve(
                torch.cat([job.y for job in jobs]).to(where),
                operator=jobs[0].task.operator,
                prior=loaded,
                nfe=nfe,
                sigma_y=level,
                num_samples=samples,
                estimate=estimate,
                method=method,
                seed=[job.key for job in jobs],
                progress=len(pictures) == 1 and sys.stderr.isatty(),
            )
        except DivergenceError as error:
            if len(jobs) > 1:
                for job in jobs:
                    yield from restore([job])
            else:
                bad.append(_name_once(jobs[0].path, error))
                advance()
            return
        for place, job in enumerate(jobs):
            yield job, _one_image(result, place)

    most = PIXELS_TOGETHER.get(where.type, PIXELS_TOGETHER["cuda"])
    shown = sys.stderr.isatty() and process == 0 and len(share) > 1
    with _progress_bar(shown, len(share)) as advance:
        for jobs in _batch(read(), most // max(samples, 1)):
            for job, result in restore(jobs):
                _write_result(out, job, result)
                done += 1
                advance()
    if len(share) > 1:
        before = len(share) - done - len(bad)
        typer.echo(f"{done} pictures restored, {before} finished before, {len(bad)} failed")
    _report(bad, len(pictures))


@app.command()
def priors(
    name: Annotated[str | None, typer.Argument(help="Print the card of this prior.")] = None,
) -> None:
    """List the priors that there are, or print the card of one; no network is asked."""
    if name is not None:
        known = describe_prior(name)
        typer.echo(known.to_json() if isinstance(known, PriorCard) else _published_text(known))
        return
    for name in list_priors():
        try:
            known = describe_prior(name)
        except (ValueError, CheckpointError) as error:
            typer.echo(f"{name}: cannot be loaded, {' '.join(str(error).split())}")
            continue
        shape = "any size" if known.image_shape is None else "x".join(map(str, known.image_shape))
        if isinstance(known, PriorCard):
            typer.echo(f"{name}: {shape}, {' '.join(known.intended_use.split())}")
        else:
            typer.echo(f"{name}: {shape}, not on this machine; `ncvsd priors {name}` says more")


def _published_text(entry: PublishedPrior) -> str:
    """Return what is known of a published prior that is not ready on this machine."""
    kept = kept_file(entry)
    if kept is None:
        # The first folder is the package's own.
        folders = " or ".join(str(folder) for folder in search_folders()[1:])
        where = (
            "not on this machine; it is downloaded and converted when first used, or put "
            f"{entry.file} of {entry.repository}, as it is, into {folders}"
        )
    else:
        where = f"{kept}, converted when first used"
    lines = {
        "name": entry.name,
        "kind": entry.kind,
        "words": entry.words,
        "images": " x ".join(map(str, entry.image_shape)),
        "repository": f"{entry.repository} at Hugging Face",
        "revision": entry.revision or "recorded when first used",
        "file": f"{entry.file}, about {entry.megabytes} MB, a pickle that is never unpickled",
        "sha256": entry.sha256 or "recorded when first used",
        "where": where,
    }
    return "\n".join(f"{title}: {text}" for title, text in lines.items())


@app.command("convert")
def convert_file(
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
    from ncvsd_inverse.priors.convert import UNSAID, convert
    from ncvsd_inverse.priors.latent import LATENT_CHANNELS

    card = convert(
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


@app.command()
def statistics(
    prior: Annotated[str, typer.Argument(help="A name of `ncvsd priors`, or a path.")],
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
    """Measure the mean and covariances by which `solve` conditions a prior, and keep them.

    They go into the prior's card or, where that cannot be written, into the cache. `solve` does
    the same by itself for a prior without any, from images that the prior generates.
    """
    loaded, where = _load(prior, device)
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
    like = torch.zeros(16, len(measured.mean), *sides)
    noise = draw_normal(like, torch.Generator().manual_seed(0))
    for sigma in (*measured.levels, math.inf):
        std = float(measured.covariance(sigma, like).colour(noise).std())
        typer.echo(f"std of a pixel given a view at sigma {sigma:g}: {std:.4f}")
    typer.echo(f"kept in {kept}")


@app.command()
def evaluate(
    prior: Annotated[str, typer.Argument(help="A name of `ncvsd priors`, or a path.")],
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

    from ncvsd_inverse.evaluation import evaluate, evaluate_generation
    from ncvsd_inverse.evaluation.generation import BLOCK
    from ncvsd_inverse.evaluation.plots import save_evaluation_plot
    from ncvsd_inverse.metrics import alex_features

    stds = _parse_levels(levels)
    for name, value in (("samples", samples), ("teacher-samples", teacher_samples)):
        if value is not None:
            check_count(f"--{name}", value, least=2)
    own_teacher = teacher or _own_teacher(prior)
    judged, where = _load(prior, device)
    if not isinstance(judged, NCVSDPrior):
        raise ValueError(f"PRIOR must be a distilled prior, got {prior}, a teacher")
    reference, _ = _load(own_teacher, device)
    if not isinstance(reference, DiffusionPrior):
        raise ValueError(f"--teacher must be a teacher, got {own_teacher}, a distilled prior")
    truths = torch.cat([_fit_square(x, judged, size) for x in read_images(data, images)])
    typer.echo(f"{data}: {len(truths)} images of {truths.shape[-1]} x {truths.shape[-2]}")
    training = None
    if train is None:
        typer.echo("without --train, generation is not judged")
    else:
        training = (_fit_square(x, judged, size) for x in read_images(train))
        # What the long part needs is asked for before it starts.
        alex_features(truths[:1])
    _open_folder(out)
    truths, shown = truths.to(where), sys.stderr.isatty()
    evaluation = evaluate(
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


def _levels_table(evaluation: "Evaluation") -> _Table:
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


def _parts(ratio: "PosteriorRatio") -> tuple[str, ...]:
    figures = (ratio.ratio, ratio.variance, ratio.bias)
    return tuple(f"{figure.value:.2f}±{figure.error:.2f}" for figure in figures)


def _generation_table(generation: "Generation") -> _Table:
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
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--levels must be numbers with commas between, got {text!r}") from None


def _own_teacher(prior: str) -> str:
    """Return the name or path of the teacher that belongs to a prior."""
    own = f"{prior.removesuffix('.json').removesuffix('.safetensors')}_teacher"
    try:
        load_card(own)
    except (ValueError, CheckpointError) as error:
        raise ValueError(f"--teacher must be given, as there is no {own}: {error}") from None
    return own


def _fit_square(x: Tensor, prior: NCVSDPrior, size: int) -> Tensor:
    """Return a picture as a prior takes it: of its own size, else the centre `size` x `size`."""
    if prior.image_shape is None:
        return centre_crop(x, (size, size))
    sides = prior.image_shape[1:]
    return x if _sides(x) == sides else resize_cover(x, sides)


@dataclass(frozen=True)
class _Job:
    """One picture to restore.

    Attributes:
        name: path of the outputs in the output folder, without what they end in.
        path: the file.
        key: what its random numbers follow from.
        task: the task for images of this size.
        y: the measurement, shape (1, ...).
        truth: the true image (1, C, H, W), where it is known.
        settings: all that the result depends on, and the device.
    """

    name: str
    path: Path
    key: tuple[int, ...]
    task: Task
    y: Tensor
    truth: Tensor | None
    settings: Mapping[str, object]

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width of the image."""
        return self.task.operator.input_shape(tuple(self.y.shape))[-2:]


def _find_pictures(sources: list[Path], out: Path) -> list[tuple[str, Path]]:
    """Return names and paths of picture files and of those in folders, but for outputs."""
    found: list[tuple[str, Path]] = []
    for source in sources:
        if not source.is_dir():
            found.append((source.stem, source))
            continue
        inside = [
            (path.relative_to(source).with_suffix("").as_posix(), path)
            for path in sorted(source.rglob("*"))
            if path.suffix.lower() in SUFFIXES
            and not path.name.startswith(".")
            and out.resolve() not in path.resolve().parents
        ]
        if not inside:
            kinds = ", ".join(SUFFIXES)
            raise ValueError(f"{source} must hold pictures ({kinds}) outside --out, got none")
        found += inside
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"IN must have names that differ, as outputs do, got {twice} twice")
    return found


def _place() -> tuple[int, int]:
    """Return the number of this process and how many there are, as launchers tell."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _report(bad: list[str], pictures: int) -> None:
    """Wait for all processes, then in the first raise a ValueError that lists what failed."""
    process, processes = _place()
    everywhere = [bad]
    if processes > 1:
        # Launchers end all processes when one fails, so none may before all are done.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        everywhere = [[] for _ in range(processes)]
        torch.distributed.all_gather_object(everywhere, bad)
        torch.distributed.destroy_process_group()
    failed = sorted(line for part in everywhere for line in part)
    if failed and process == 0:
        count = f"{len(failed)} of {pictures} pictures could not be restored: "
        raise ValueError((count if pictures > 1 else "") + "; ".join(failed))


def _name_once(path: Path, error: Exception) -> str:
    text = str(error)
    return text if text.startswith(str(path)) else f"{path}: {text}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _is_finished(folder: Path, name: str, settings: Mapping[str, object]) -> bool:
    """Tell whether NAME was restored with these settings; say so if it was with others."""
    record = folder / f"{name}.json"
    if not (record.exists() and (folder / f"{name}_restored.png").exists()):
        return False
    try:
        before = json.loads(record.read_bytes())
    except ValueError:
        before = None
    found = before if isinstance(before, dict) else {}
    changed = [entry for entry in settings if found.get(entry, ...) != settings[entry]]
    if changed:
        typer.echo(f"{record} is of another {', '.join(changed)}: restored again")
    return not changed


def _batch(jobs: Iterable[_Job], pixels: int) -> Iterator[list[_Job]]:
    """Yield jobs of one image size together, about `pixels` at a time, and hold few others."""
    waiting: dict[tuple[int, ...], list[_Job]] = {}

    def held(size: tuple[int, ...]) -> int:
        return prod(size) * len(waiting[size])

    for job in jobs:
        waiting.setdefault(job.size, []).append(job)
        if held(job.size) + prod(job.size) > pixels:
            yield waiting.pop(job.size)
        elif sum(map(held, waiting)) > 4 * pixels:
            yield waiting.pop(max(waiting, key=held))
    yield from waiting.values()


def _one_image(result: Result, place: int) -> Result:
    """Return the result of one image of a batch, with its share of the time."""
    image = slice(place, place + 1)
    return replace(
        result,
        x0=result.x0[image],
        samples=result.samples[:, image],
        mean=result.mean[image],
        std=None if result.std is None else result.std[image],
        seconds=result.seconds / len(result.x0),
        residual=result.residual[image],
    )


@contextmanager
def _progress_bar(shown: bool, pictures: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each of `pictures` pictures."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("pictures", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Lines that go to a file or pipe must not be drawn above the bar.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=redirect) as bar:
        task = bar.add_task("pictures", total=pictures)
        yield lambda: bar.advance(task)


MakeTask = Callable[[tuple[int, int]], Task]


def _prepare_clean(
    path: Path, prior: Prior, make: MakeTask, key: tuple[int, ...]
) -> tuple[Task, Tensor, Tensor]:
    """Degrade a clean picture, cropped and resized to what the prior takes; return it too."""
    truth = _fit(path, read_image(path), prior)
    task = make(_sides(truth))
    y = task.operator.measure(truth, task.sigma_y, generator=make_generators([key]))
    return task, y, truth


def _prepare_measurement(
    path: Path, prior: Prior, make: MakeTask, known: Task
) -> tuple[Task, Tensor, None]:
    """Read a picture; ValueError unless it can be a measurement of the task, `known` at a size."""
    y = read_image(path)
    if known.name == "colorize":
        y = known.operator(y)
    # The size of the image does not depend on the size the task is for.
    sides = known.operator.input_shape(tuple(y.shape))[-2:]
    fixed = getattr(prior, "image_shape", None)
    if fixed is not None and tuple(sides) != tuple(fixed[-2:]):
        height, width = (fixed[-2] * y.shape[-2] // sides[0], fixed[-1] * y.shape[-1] // sides[1])
        raise ValueError(
            f"it must have {width} x {height} pixels for {known.name}, as this prior restores "
            f"images of {fixed[-1]} x {fixed[-2]}, got {y.shape[-1]} x {y.shape[-2]}"
        )
    check_image_size("its image", (3, *sides), multiple=_size_multiple(prior, 1))
    task = make((sides[0], sides[1]))
    # What a mask hides must not be seen.
    return task, task.operator(y) if known.takes_mask else y, None


def _make_task(
    name: str, sigma_y: float, mask: Tensor | None, sides: tuple[int, int], seed: int
) -> Task:
    """Return a named task with the noise level and mask of the command line."""
    task = make_task(name, sides, seed=seed)
    if mask is not None and tuple(mask.shape) != sides:
        raise ValueError(
            f"--mask must have the size of the image, {sides[1]} x {sides[0]} pixels, "
            f"got {mask.shape[1]} x {mask.shape[0]}"
        )
    return Task(name, task.operator if mask is None else Inpaint(mask), sigma_y)


def _simulate(task: Task, truth: Tensor, seed: int) -> Tensor:
    """Return noisy measurements of true images, each with its own noise."""
    sources = [torch.Generator(truth.device).manual_seed(seed + i) for i in range(len(truth))]
    return task.operator.measure(truth, task.sigma_y, generator=sources)


def _fit(path: Path, x: Tensor, prior: Prior) -> Tensor:
    """Return a clean picture cropped, and resized if need be, to a size that the prior takes."""
    fixed = getattr(prior, "image_shape", None)
    if fixed is not None:
        fitted = x if _sides(x) == tuple(fixed[-2:]) else resize_cover(x, tuple(fixed[-2:]))
    else:
        fitted = centre_crop_to_multiple(x, _size_multiple(prior, 8))
    if fitted.shape != x.shape:
        old, new = (f"{width} x {height}" for height, width in (_sides(x), _sides(fitted)))
        typer.echo(f"{path}: {old} pixels fitted to {new} around the centre, for this prior")
    return fitted


def _size_multiple(prior: Prior, unknown: int) -> int:
    """Return what the sides of images must be multiples of, `unknown` if the prior is silent."""
    multiple: int = getattr(getattr(prior, "network", None), "size_multiple", unknown)
    return multiple


def _find_device(device: str | None) -> torch.device:
    """Return the device that was asked for, else this process's own; ValueError if unusable."""
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device or own).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device must be usable here, got {device!r}: {reason}") from None


def _load(name: str, device: str | None) -> tuple[Prior, torch.device]:
    """Load a prior and say where and how it computes."""
    where = _find_device(device)
    prior = load_prior(name, device=where)
    network = getattr(prior, "network", None)
    dtypes = (
        {str(weight.dtype) for weight in network.parameters()} if network is not None else set()
    )
    precision = " and ".join(sorted(dtypes)).replace("torch.", "") or "the dtype of y"
    typer.echo(f"{name} computes on {where} in {precision}, {torch.get_num_threads()} CPU threads")
    return prior, where


def _card_digest(prior: Prior) -> str | None:
    """Return a hash of the card of a trained prior, with the statistics that it has now."""
    if not isinstance(prior, NCVSDPrior | DiffusionPrior) or prior.card is None:
        return None
    statistics = prior.statistics
    known = statistics if isinstance(statistics, ImageStatistics) else None
    return _sha256(replace(prior.card, statistics=known).to_json().encode())


def _open_folder(folder: Path) -> None:
    """Make the output folder; ValueError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out must be a writable folder, got {folder}: {error}") from None


def _write_result(folder: Path, job: _Job, result: Result) -> None:
    """Write pictures and figures of one restored image and print its line.

    The record goes first if there is one and comes last, so that it is never beside pictures of
    other settings.
    """
    paths = {
        kind: folder / f"{job.name}{kind}"
        for kind in (".json", "_measurement.png", "_std.png", "_restored.png")
    }
    for path in paths.values():
        path.unlink(missing_ok=True)
    paths[".json"].parent.mkdir(parents=True, exist_ok=True)
    figures: dict[str, object] = {
        "input": str(job.path),
        "calls": result.nfe,
        "loop": result.method,
        "residual": float(result.residual[0]),
        "seconds": result.seconds,
        "schedule": result.schedule,
        "sigma_lik": result.sigma_lik,
    }
    line = f"{paths['_restored.png']}: residual {float(result.residual[0]):.2f}"
    if job.truth is not None:
        figures["psnr"] = float(psnr(result.x0.cpu(), job.truth))
        line += f", {figures['psnr']:.1f} dB"
        seen = job.task.picture(job.y)
        if seen is not None:
            write_image(paths["_measurement.png"], seen)
    if result.std is not None:
        spread = result.std.mean(1, keepdim=True)
        figures["std_shown_white"] = float(spread.max())
        write_image(paths["_std.png"], 2 * spread / spread.max().clamp(min=1e-12) - 1)
    write_image(paths["_restored.png"], result.x0)
    content = json.dumps({**job.settings, **figures}, indent=2) + "\n"
    write_whole(paths[".json"], content)
    typer.echo(
        f"{line}, {result.method} loop, {result.nfe} network calls a sample, {result.seconds:.1f} s"
    )


def _sides(x: Tensor) -> tuple[int, int]:
    """Return height and width of images (B, C, H, W)."""
    return x.shape[-2], x.shape[-1]


def _to_size(y: Tensor, sides: tuple[int, int]) -> Tensor:
    """Return a measured picture enlarged to the size of the image."""
    if _sides(y) == sides:
        return y
    return torch.nn.functional.interpolate(y, sides, mode="bicubic")


Config = Annotated[str, typer.Argument(help="A preset's name or the path of a TOML file.")]
Data = Annotated[Path, typer.Option("--data", help="Zip, folder or dataset folder of images.")]
RunFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run, resumed if any.")]
Images = Annotated[int | None, typer.Option("--images", help="Images to train on in all.")]
Batch = Annotated[int | None, typer.Option("--batch-size", help="Images in a step.")]
Microbatch = Annotated[
    int | None, typer.Option("--microbatch", help="Most images of a process in one pass.")
]
Seconds = Annotated[float, typer.Option("--seconds", help="Stop at a checkpoint after this.")]
Init = Annotated[
    str | None,
    typer.Option("--init", help="A prior whose weights the run starts from, optimiser fresh."),
]
Shard = Annotated[
    bool, typer.Option("--fsdp", help="Spread the networks over the processes, to fit larger ones.")
]


@app.command()
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
) -> None:
    """Train a diffusion teacher; the same command goes on after a stop.

    Runs on one process, or on many under `accelerate launch` or `torchrun`; --fsdp, or
    `accelerate launch --use_fsdp`, shards the networks over them.
    """
    from ncvsd_inverse.training import TeacherRun
    from ncvsd_inverse.training.presets import load_teacher_config

    changes = {"images": images, "batch_size": batch_size, "microbatch": microbatch, "init": init}
    settings = replace(load_teacher_config(config), **_given(changes))
    pictures = _read_training_data(data, settings)
    _train(TeacherRun(settings, pictures, out, shard=shard), data, seconds)


@app.command()
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
) -> None:
    """Distil a teacher into a generative denoiser; the same command goes on after a stop.

    Runs on one process, or on many under `accelerate launch` or `torchrun`; --fsdp, or
    `accelerate launch --use_fsdp`, shards the networks over them.
    """
    from ncvsd_inverse.training import DistillRun, load_teacher
    from ncvsd_inverse.training.presets import load_distill_config

    changes = {"images": images, "batch_size": batch_size, "microbatch": microbatch, "init": init}
    settings = replace(load_distill_config(config), **_given(changes))
    pictures = _read_training_data(data, settings)
    run = DistillRun(settings, pictures, out, load_teacher(teacher), shard=shard)
    _train(run, data, seconds)


@app.command()
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
    batch_size: Annotated[int, typer.Option("--batch", help="Pictures at a time.")] = 8,
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
        device=_find_device(device),
        progress=sys.stderr.isatty(),
    )
    typer.echo(f"{target}: {encoded.images} latents, {encoded.num_classes} classes")
    for name in encoded.skipped:
        typer.echo(f"skipped {name}")


def _given(changes: Mapping[str, object]) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in changes.items() if value is not None}


def _read_training_data(source: Path, settings: "TrainConfig") -> "TrainingData":
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
    )


def _train(run: "TeacherRun | DistillRun", source: Path, seconds: float) -> None:
    """Run to the end or for `seconds`, watched, and leave a prior in the run's folder."""
    from ncvsd_inverse.training.watch import Watcher, keep_run_statistics, save_run_prior

    if not run.accelerator.is_main_process:
        run.run(seconds=seconds)
        run.accelerator.wait_for_everyone()
        return
    typer.echo(
        f"{run.folder}: {run.accelerator.num_processes} process(es) on {run.device}, "
        f"{run.config.compute_dtype}, {torch.get_num_threads()} CPU threads"
    )
    batch = next(run.data.batches(0, run.config.batch_size, seed=run.config.seed))
    watcher = Watcher(run, batch.images)
    with watcher.watching():
        done = run.run(seconds=seconds, on_log=watcher.on_log, on_checkpoint=watcher.on_checkpoint)
    stem = save_run_prior(run, source.name)
    keep_run_statistics(run, stem)
    state = "finished" if done else "stopped, the same command goes on"
    typer.echo(f"{state} after {run.images_seen} images; load_prior('{stem}')")
    # A process that ended before would take the others with it.
    run.accelerator.wait_for_everyone()
