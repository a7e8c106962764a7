"""`ncvsd solve`: pictures restored, one or a folder of them."""

from pathlib import Path
from typing import Annotated

import typer

from ncvsd_inverse import __version__, list_tasks
from ncvsd_inverse.checks import check_count, check_falling, check_positive, check_share
from ncvsd_inverse.cli.folder import (
    Place,
    card_digest,
    clear_leftovers,
    find_pictures,
    process_place,
    read_levels,
    read_sigma_y,
    report_failures,
)
from ncvsd_inverse.cli.inputs import in_tiles, load_named, open_folder
from ncvsd_inverse.cli.models import ARRAYS, TASKS, Boundary, Model, Simulation
from ncvsd_inverse.cli.options import Device, PriorName, Restarts, Samples, Seed
from ncvsd_inverse.cli.restoring import Restoration
from ncvsd_inverse.images import SUFFIXES
from ncvsd_inverse.machine import progress_bar
from ncvsd_inverse.operators.blind import KernelPrior
from ncvsd_inverse.priors import DiffusionPrior
from ncvsd_inverse.priors.own_statistics import SIDE, lacks_statistics, with_own_statistics
from ncvsd_inverse.priors.tiled import TILE
from ncvsd_inverse.sampling.solve import Estimate, Method

__all__ = [
    "solve",
]

NFE, BLIND_NFE = 10, 20
"""Network calls where none are asked for: half of the latter look for the kernel."""


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
    levels = None
    if schedule is not None:
        levels = list(check_falling("--schedule", read_levels(schedule)))  # as JSON holds them
    if not any(source.exists() for source in sources):
        raise ValueError(f"IN must be a file or folder that exists, got {sources[0]}")
    given = read_sigma_y(sigma_y)
    model: Simulation | Model
    if simulate:
        of_a_model = {
            "--blind": blind or None,
            "--kernel": kernel,
            "--blur-std": blur_std,
            "--boundary": boundary,
            "--scale": scale,
            "--peak": peak,
            "--kernel-size": kernel_size,
            "--kernel-prior": kernel_prior,
        }
        for option, asked in of_a_model.items():
            if asked is not None:
                raise ValueError(f"{option} must come without --simulate")
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
        if peak is not None and given is not None:
            raise ValueError(
                "--sigma-y must come without --task poisson: counts have their own noise"
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
    read_measured = model.reader(loaded)  # which says what is wrong with a kernel or mask
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
    run = Restoration(
        prior=loaded,
        where=where,
        tile=None if loaded is whole else tile,
        read_measured=read_measured,
        place_of=place_of,
        noise=level,
        is_simulated=simulate,
        settings=settings,
        asked={
            "nfe": nfe,
            "num_samples": samples,
            "restarts": restarts,
            "estimate": estimate,
            "temperature": temperature,
            "sigma_lik": sigma_lik,
            "method": method,
            "schedule": levels,
            "progress": found == 1,
        },
        seed=seed,
    )
    with progress_bar("pictures", len(share), shown=process == 0 and len(share) > 1) as advance:
        done, failures = run.restore(share, advance)
    bad += failures
    if len(share) > 1:
        before = len(share) - done - len(failures)
        typer.echo(f"{done} pictures restored, {before} finished before, {len(bad)} failed")
    report_failures(bad, found)
