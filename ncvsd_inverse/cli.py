"""The command `ncvsd`; it calls the public API and holds no mathematics."""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

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
from ncvsd_inverse.images import (
    centre_crop_to_multiple,
    read_image,
    resize_cover,
    write_atomically,
    write_image,
)
from ncvsd_inverse.metrics import psnr, ssim
from ncvsd_inverse.operators import Inpaint
from ncvsd_inverse.plots import GridRow, save_picture_grid
from ncvsd_inverse.priors import load_card
from ncvsd_inverse.protocols import Prior
from ncvsd_inverse.solver import Estimate, Method
from ncvsd_inverse.tasks import Task, list_tasks, make_task

ASSETS = Path(__file__).parent / "assets"
DEMO_TASKS = ("inpaint_box", "inpaint_random", "sr4x", "deblur_gaussian")

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
    try:
        app()
    except (ValueError, CheckpointError, DivergenceError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)


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
    """Restore a few shipped photographs; needs no network."""
    from rich.console import Console
    from rich.table import Table

    loaded, where = _load(prior, device)
    paths = sorted(ASSETS.glob("*.png"))
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
    typer.echo(f"{result.nfe} network calls a sample, {samples} samples; see {out / 'demo.png'}")


@app.command("solve")
def solve_files(
    files: Annotated[list[Path], typer.Argument(metavar="IN...", help="Picture files.")],
    task: Annotated[str, typer.Option("--task", help=", ".join(list_tasks()))],
    prior: PriorName,
    nfe: Nfe = 10,
    sigma_y: Annotated[
        float | None, typer.Option("--sigma-y", help="Noise std in [-1, 1] units; 0.05.")
    ] = None,
    samples: Samples = 1,
    estimate: Annotated[Estimate, typer.Option("--estimate", help="What is written.")] = "sample",
    method: Annotated[Method, typer.Option("--method", help="The sampler.")] = "gibbs",
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
    device: Device = None,
) -> None:
    """Restore degraded pictures, or with --simulate degrade clean ones and restore them.

    IN is the measurement of the task: the small picture for sr4x, the blurred one for deblur_*,
    the incomplete one, with --mask, for inpaint_*. For each IN the output folder gets
    NAME_restored.png, NAME.json (settings and figures), NAME_std.png for several samples and,
    with --simulate, NAME_measurement.png.
    """
    names = [path.stem for path in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"IN must have names that differ, as outputs do, got {twice[0]} twice")
    loaded, where = _load(prior, device)
    seen = None if mask is None else read_image(mask).mean((0, 1)) > 0
    prepare = _prepare_clean if simulate else _prepare_measurement
    jobs = [prepare(path, task, sigma_y, seen, loaded, seed) for path in files]
    _open_folder(out)
    for path, job in zip(files, jobs, strict=True):
        result = solve(
            job.y.to(where),
            operator=job.task.operator,
            prior=loaded,
            nfe=nfe,
            sigma_y=job.task.sigma_y,
            num_samples=samples,
            estimate=estimate,
            method=method,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
        settings = {
            "input": str(path),
            "task": job.task.name,
            "prior": prior,
            "simulated": simulate,
            "mask": None if mask is None else str(mask),
            "sigma_y": job.task.sigma_y,
            "samples": samples,
            "estimate": estimate,
            "method": method,
            "seed": seed,
            "device": str(where),
            "version": __version__,
        }
        _write_result(out, path.stem, job, result, settings)


@app.command()
def priors(
    name: Annotated[str | None, typer.Argument(help="Print the card of this prior.")] = None,
) -> None:
    """List the priors that there are, or print the card of one."""
    if name is not None:
        typer.echo(load_card(name).to_json())
        return
    for known in list_priors():
        try:
            card = load_card(known)
        except CheckpointError:
            typer.echo(f"{known}: not on this machine, `ncvsd priors {known}` says why")
        else:
            shape = "any size" if card.image_shape is None else "x".join(map(str, card.image_shape))
            typer.echo(f"{known}: {shape}, {' '.join(card.intended_use.split())}")


@dataclass(frozen=True)
class _Job:
    """One picture to restore: y of shape (1, ...), and the true image where it is known."""

    task: Task
    y: Tensor
    truth: Tensor | None


def _prepare_clean(
    path: Path,
    name: str,
    sigma_y: float | None,
    mask: Tensor | None,
    prior: Prior,
    seed: int,
) -> _Job:
    """Degrade a clean picture, cropped and resized to what the prior takes."""
    truth = _fit(path, read_image(path), prior)
    task = _make_task(name, sigma_y, mask, _sides(truth), seed)
    return _Job(task, _simulate(task, truth, seed), truth)


def _prepare_measurement(
    path: Path,
    name: str,
    sigma_y: float | None,
    mask: Tensor | None,
    prior: Prior,
    seed: int,
) -> _Job:
    """Read a degraded picture; ValueError unless it can be a measurement of the task."""
    if name == "phase_retrieval":
        raise ValueError(
            "--task must be one whose measurement is a picture, got phase_retrieval: "
            "add --simulate, or call ncvsd_inverse.solve on the amplitudes"
        )
    if name.startswith("inpaint") and mask is None:
        raise ValueError(f"--mask must be given for {name}, unless IN are clean (--simulate)")
    y = read_image(path)
    # Only the size of the image is asked here, which does not depend on the size the task is for.
    sides = make_task(name, 64).operator.input_shape(tuple(y.shape))[-2:]
    fixed = getattr(prior, "image_shape", None)
    if fixed is not None and tuple(sides) != tuple(fixed[-2:]):
        height, width = (fixed[-2] * y.shape[-2] // sides[0], fixed[-1] * y.shape[-1] // sides[1])
        raise ValueError(
            f"{path} must have {width} x {height} pixels for {name}, as this prior restores images "
            f"of {fixed[-1]} x {fixed[-2]}, got {y.shape[-1]} x {y.shape[-2]}"
        )
    task = _make_task(name, sigma_y, mask, (sides[0], sides[1]), seed)
    return _Job(task, y if mask is None else y * mask, None)


def _make_task(
    name: str, sigma_y: float | None, mask: Tensor | None, sides: tuple[int, int], seed: int
) -> Task:
    """Return a named task with the noise level and mask of the command line, where given."""
    task = make_task(name, sides, seed=seed)
    if mask is not None and not name.startswith("inpaint"):
        raise ValueError(f"--mask must come with an inpainting task, got {name}")
    if mask is not None and tuple(mask.shape) != sides:
        raise ValueError(
            f"--mask must have the size of the image, {sides[1]} x {sides[0]} pixels, "
            f"got {mask.shape[1]} x {mask.shape[0]}"
        )
    return Task(
        name,
        task.operator if mask is None else Inpaint(mask),
        task.sigma_y if sigma_y is None else sigma_y,
    )


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
        multiple = getattr(getattr(prior, "network", None), "size_multiple", 8)
        fitted = centre_crop_to_multiple(x, multiple)
    if fitted.shape != x.shape:
        old, new = (f"{width} x {height}" for height, width in (_sides(x), _sides(fitted)))
        typer.echo(f"{path}: {old} pixels fitted to {new} around the centre, for this prior")
    return fitted


def _load(name: str, device: str | None) -> tuple[Prior, torch.device]:
    """Load a prior and say where and how it computes."""
    name_of_device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.empty(0, device=name_of_device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device must be usable here, got {device!r}: {reason}") from None
    prior = load_prior(name, device=where)
    network = getattr(prior, "network", None)
    dtypes = (
        {str(weight.dtype) for weight in network.parameters()} if network is not None else set()
    )
    precision = " and ".join(sorted(dtypes)).replace("torch.", "") or "the dtype of y"
    typer.echo(f"{name} computes on {where} in {precision}, {torch.get_num_threads()} CPU threads")
    return prior, where


def _open_folder(folder: Path) -> None:
    """Make the output folder; ValueError unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out must be a writable folder, got {folder}: {error}") from None


def _write_result(
    folder: Path, name: str, job: _Job, result: Result, settings: dict[str, object]
) -> None:
    """Write pictures and figures of one restored image and print its line."""
    restored = folder / f"{name}_restored.png"
    figures: dict[str, object] = {
        "nfe": result.nfe,
        "residual": float(result.residual[0]),
        "seconds": result.seconds,
        "schedule": result.schedule,
        "sigma_lik": result.sigma_lik,
    }
    line = f"{restored}: residual {float(result.residual[0]):.2f}"
    if job.truth is not None:
        figures["psnr"] = float(psnr(result.x0.cpu(), job.truth))
        line += f", {figures['psnr']:.1f} dB"
        write_image(folder / f"{name}_measurement.png", _to_picture(job.task, job.y))
    if result.std is not None:
        spread = result.std.mean(1, keepdim=True)
        figures["std_shown_white"] = float(spread.max())
        write_image(folder / f"{name}_std.png", 2 * spread / spread.max().clamp(min=1e-12) - 1)
    write_image(restored, result.x0)
    content = json.dumps({**settings, **figures}, indent=2) + "\n"
    write_atomically(folder / f"{name}.json", lambda file: file.write(content.encode()))
    typer.echo(f"{line}, {result.nfe} network calls a sample, {result.seconds:.1f} s")


def _sides(x: Tensor) -> tuple[int, int]:
    """Return height and width of images (B, C, H, W)."""
    return x.shape[-2], x.shape[-1]


def _to_size(y: Tensor, sides: tuple[int, int]) -> Tensor:
    """Return a measured picture enlarged to the size of the image."""
    if _sides(y) == sides:
        return y
    return torch.nn.functional.interpolate(y, sides, mode="bicubic")


def _to_picture(task: Task, y: Tensor) -> Tensor:
    """Return a measurement as a picture; Fourier amplitudes by their logarithm, 0 in the middle."""
    if task.name != "phase_retrieval":
        return y
    shown: Tensor = torch.fft.fftshift(torch.log1p(y), dim=(-2, -1))
    return 2 * shown / shown.max() - 1


if __name__ == "__main__":
    main()
