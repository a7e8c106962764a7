"""`ncvsd solve`: pictures restored, one or a folder of them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

import ncvsd_inverse
from ncvsd_inverse import Result, __version__, list_tasks
from ncvsd_inverse.checks import check_count, check_falling, check_positive, check_share
from ncvsd_inverse.cli.folder import (
    FULL,
    Job,
    Place,
    batch_by_size,
    card_digest,
    clear_leftovers,
    file_digest,
    find_pictures,
    is_finished,
    name_once,
    one_image,
    process_place,
    read_levels,
    read_sigma_y,
    report_failures,
    sha256,
    write_result,
)
from ncvsd_inverse.cli.inputs import in_tiles, load_named, open_folder
from ncvsd_inverse.cli.models import ARRAYS, TASKS, Boundary, Model, Simulation
from ncvsd_inverse.cli.options import Device, PriorName, Restarts, Samples, Seed
from ncvsd_inverse.images import SUFFIXES
from ncvsd_inverse.machine import progress_bar
from ncvsd_inverse.operators.blind import KernelPrior
from ncvsd_inverse.priors import DiffusionPrior
from ncvsd_inverse.priors.own_statistics import SIDE, lacks_statistics, with_own_statistics
from ncvsd_inverse.priors.tiled import TILE
from ncvsd_inverse.protocols import LinearOperator, UnknownKernel
from ncvsd_inverse.sampling.choices import LARGE
from ncvsd_inverse.sampling.solve import Estimate, Method

__all__ = [
    "solve",
]

NFE, BLIND_NFE = 10, 20
"""Network calls where none are asked for: half of the latter look for the kernel."""

PIXELS_TOGETHER = {"cpu": 2**18, "cuda": 2**22}
"""Pixels of pictures that are restored together, by device: 64 pictures of 64x64 and 1024."""


BASE_BYTES, BYTES_A_PIXEL = 0.8e9, 310
"""What a CPU needs: 0.86 GB at the peak for SR x4 to 500x375, 1.74 GB to 2000x1500 in 10 calls."""


def say_memory(path: Path, shape: Sequence[int], tile: int | None) -> None:
    """Print how a `LARGE` picture will be restored, and about how much memory that takes."""
    height, width = shape[-2:]
    size = (BASE_BYTES + BYTES_A_PIXEL * height * width) / 1e9
    parts = "" if tile is None else f" in tiles of {tile}"
    typer.echo(f"{path}: {width}x{height} pixels{parts}, about {size:.1f} GB of memory")


def _complete_task(incomplete: str) -> list[str]:
    """Return the names of tasks that begin so, for a shell."""
    return [
        name
        for name in {**TASKS, **dict.fromkeys(list_tasks(all=True))}
        if name.startswith(incomplete)
    ]


def solve(
    sources: Annotated[
        list[Path], typer.Argument(metavar="IN...", help="Picture files, and folders of them.")
    ],
    task: Annotated[
        str,
        typer.Option(
            "--task",
            help=f"{', '.join(TASKS)}; with --simulate {', '.join(list_tasks(all=True))}",
            autocompletion=_complete_task,
        ),
    ],
    prior: PriorName = "ncvsd_natural",
    nfe: Annotated[
        int | None,
        typer.Option("--nfe", help="Network forward passes a sample; 10, with --blind 20."),
    ] = None,
    sigma_y: Annotated[
        str | None,
        typer.Option(
            "--sigma-y",
            help="Noise std for values from -1 to 1 (0.0078 is one step of 8 bits); auto "
            "estimates it, the default where the task is linear; with --simulate the task's own.",
        ),
    ] = None,
    kernel: Annotated[
        Path | None, typer.Option("--kernel", help="deblur: the kernel, a picture or .npy.")
    ] = None,
    blur_std: Annotated[
        float | None, typer.Option("--blur-std", help="deblur: std of a Gaussian, in pixels.")
    ] = None,
    blind: Annotated[
        bool,
        typer.Option("--blind", help="deblur: nobody knows the kernel; it is found and written."),
    ] = False,
    kernel_size: Annotated[
        int | None,
        typer.Option("--kernel-size", help="deblur --blind: side of the kernel, odd; 31."),
    ] = None,
    kernel_prior: Annotated[
        KernelPrior | None,
        typer.Option("--kernel-prior", help="deblur --blind: what the kernel is like; smooth."),
    ] = None,
    boundary: Annotated[
        Boundary | None,
        typer.Option("--boundary", help="deblur: beyond the edges; valid, blind replicate."),
    ] = None,
    scale: Annotated[
        int | None, typer.Option("--scale", help="sr: how many times larger, 2, 3, 4 or 8.")
    ] = None,
    samples: Samples = 1,
    restarts: Restarts = 1,
    estimate: Annotated[
        Estimate | None,
        typer.Option("--estimate", help="What is written; point, or mean of several samples."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Factor on the noise of draws, at most 1."),
    ] = None,
    sigma_lik: Annotated[
        float | None, typer.Option("--sigma-lik", help="Noise std that the sampler assumes.")
    ] = None,
    method: Annotated[
        Method | None, typer.Option("--method", help="The sampler; what suits the prior.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="Falling noise levels of the calls, as in 3,0.8,0.2."),
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
        Path | None, typer.Option("--mask", help="inpaint: white where IN is known.")
    ] = None,
    peak: Annotated[
        float | None, typer.Option("--peak", help="poisson: the mean count of white.")
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

    IN is what was measured: a noisy, blurred, small or incomplete picture of any size, grey or
    colour, of 8 or 16 bits, which come back as they came; or an array (.npy, .pt), for k-space,
    amplitudes and counts. What was done to it the options say.

    For each IN the output folder gets NAME_restored.png, NAME.json (settings and figures),
    NAME_std.png for several samples, with --blind NAME_kernel.png, enlarged, and NAME_kernel.npy
    and, with --simulate, NAME_measurement.png. Folders are searched through; NAME is then the path
    within the folder. For one IN, -o may name a picture, which alone is then written, and NAME.json
    and the kernel beside it.

    The same command goes on after a stop: a picture is skipped if NAME.json shows that this very
    file was restored with these settings. One that cannot be restored is named at the end, with
    exit status 1. Files that NAME.json does not show to be outputs are not written over. Noise
    depends on --seed and NAME alone, not on which pictures there are. Under
    `accelerate launch -m ncvsd_inverse.cli solve ...` every process takes its share of pictures.
    """
    if nfe is None:
        nfe = BLIND_NFE if blind else NFE
    counts = {"--nfe": nfe, "--samples": samples, "--restarts": restarts, "--tile": tile}
    for name, value in counts.items():
        check_count(name, value)
    check_count("--seed", seed, least=0)
    if steps is not None:
        check_count("--steps", steps)
    if temperature is not None:
        check_share("--temperature", temperature)
    if sigma_lik is not None:
        check_positive("--sigma-lik", sigma_lik)
    levels = None if schedule is None else check_falling("--schedule", read_levels(schedule))
    if not any(source.exists() for source in sources):
        raise ValueError(f"IN must be a file or folder that exists, got {sources[0]}")
    given = read_sigma_y(sigma_y)
    model: Simulation | Model
    if simulate:
        if blind:
            raise ValueError("--blind must come without --simulate")
        model = Simulation(task, seed, None if given == "auto" else given, mask)
        level = model.level if given is None else given
    else:
        model = Model(
            task,
            kernel,
            blur_std,
            boundary,
            scale,
            mask,
            peak,
            blind,
            kernel_size,
            kernel_prior,
        )
        level = "auto" if given is None else given
    pictures, bad = find_pictures(sources, out, SUFFIXES if simulate else (*SUFFIXES, *ARRAYS))
    file = out if out.suffix.lower() in SUFFIXES and not out.is_dir() else None
    if file is not None and len(pictures) > 1:
        raise ValueError(f"--out must be a folder for {len(pictures)} pictures, got {out}")
    process, processes = process_place()
    share = pictures[process::processes]
    found = len(pictures) + len(bad)
    if process > 0:
        bad = []  # the first process names them
    whole, where = load_named(prior, device)
    if steps is not None:
        if not isinstance(whole, DiffusionPrior):
            raise ValueError(f"--steps must come with a diffusion prior, got {prior}")
        whole = whole.with_steps(steps)
    if method != "gibbs" and not lacks_statistics(whole):
        # Before pictures are looked at: settings that tell finished ones hold the statistics.
        with_own_statistics(whole, (3, SIDE, SIDE))
    loaded = in_tiles(whole, tile)
    read_measured = model.reader(loaded)
    open_folder(out if file is None else file.parent)

    def place_of(name: str) -> Place:
        if file is None:
            return Place(out / name, has_kernel=blind)
        return Place(file.with_suffix(""), file, has_kernel=blind)

    clear_leftovers(place_of(name) for name, _ in share)
    settings = {
        "task": task,
        "prior": prior,
        "prior_sha256": card_digest(loaded),
        "simulated": simulate,
        **model.settings(loaded),
        "sigma_y": level,
        "nfe": nfe,
        "samples": samples,
        "restarts": restarts,
        "asked": {
            "estimate": estimate,
            "temperature": temperature,
            "sigma_lik": sigma_lik,
            "schedule": levels,
        },
        "method": method,
        "steps": steps,
        "tile": None if loaded is whole else tile,
        "seed": seed,
        "version": __version__,
    }

    done = 0
    unusable = len(bad)

    def fail(path: Path, error: Exception) -> None:
        bad.append(name_once(path, error))
        advance(1)

    def prepare(name: str, path: Path, of_this: Mapping[str, object]) -> Job:
        key = (seed, int(sha256(os.fsencode(name))[:16], 16))
        measured = read_measured(path, key)
        own = measured.operator.sigma_y
        noise = level if own is None or simulate else own
        if noise == "auto" and not isinstance(measured.operator, LinearOperator | UnknownKernel):
            raise ValueError(f"--sigma-y must be a number for --task {task}")
        return Job(place_of(name), path, key, measured, noise, {**of_this, "device": str(where)})

    def read() -> Iterator[Job]:
        for name, path in share:
            try:
                of_this = settings | {"input_sha256": file_digest(path)}
                if is_finished(place_of(name), of_this):
                    advance(1)
                    continue
                place_of(name).check_own()
                job = prepare(name, path, of_this)
            except (OSError, ValueError, MemoryError, RuntimeError) as error:
                fail(path, error)
            else:
                yield job

    def restore(jobs: list[Job]) -> Iterator[tuple[Job, Result]]:
        shape = jobs[0].measured.operator.input_shape(jobs[0].measured.y.shape)
        if where.type == "cpu" and shape[-2] * shape[-1] > LARGE:
            say_memory(jobs[0].path, shape, None if loaded is whole else tile)
        try:
            result = ncvsd_inverse.solve(
                torch.cat([job.measured.y for job in jobs]).to(where),
                operator=jobs[0].measured.operator,
                prior=loaded,
                nfe=nfe,
                sigma_y=jobs[0].sigma_y,
                num_samples=samples,
                restarts=restarts,
                estimate=estimate,
                temperature=temperature,
                sigma_lik=sigma_lik,
                method=method,
                schedule=levels,
                seed=[job.key for job in jobs],
                progress=found == 1,
            )
        # Divergence, lack of memory, a size that does not fit: of one picture, for all is known.
        except (ValueError, MemoryError, RuntimeError) as error:
            if len(jobs) == 1:
                fail(jobs[0].path, error)
                return
            result = None
        if result is None:  # past the error, which holds what was in memory
            for job in jobs:
                yield from restore([job])
            return
        for place, job in enumerate(jobs):
            yield job, one_image(result, place)

    most = PIXELS_TOGETHER.get(where.type, PIXELS_TOGETHER["cuda"])
    shown = process == 0 and len(share) > 1
    with progress_bar("pictures", len(share), shown=shown) as advance:
        for jobs in batch_by_size(read(), most // max(samples, 1)):
            for job, result in restore(jobs):
                try:
                    write_result(job, result)
                except (OSError, ValueError) as error:
                    if isinstance(error, OSError) and error.errno in FULL:
                        raise
                    fail(job.path, error)
                    continue
                done += 1
                advance(1)
    if len(share) > 1:
        failed = len(bad) - unusable
        before = len(share) - done - failed
        typer.echo(f"{done} pictures restored, {before} finished before, {len(bad)} failed")
    report_failures(bad, found)
