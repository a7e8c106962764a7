"""`ncvsd demo`: a few shipped pictures, degraded and restored."""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from ncvsd_inverse import make_task, read_image, solve, write_image
from ncvsd_inverse.checks import check_count
from ncvsd_inverse.cli.inputs import fit_picture, load_named, open_folder, sides_of
from ncvsd_inverse.cli.options import Device, Nfe, PriorName, Samples, Seed
from ncvsd_inverse.evaluation.plots import GridRow, save_picture_grid
from ncvsd_inverse.metrics import psnr, ssim
from ncvsd_inverse.protocols import PriorTraits
from ncvsd_inverse.tasks import Task

__all__ = [
    "ASSETS",
    "TASKS",
    "demo",
]

ASSETS = Path(__file__).parents[1] / "assets"

TASKS = ("inpaint_box", "inpaint_random", "sr4x", "deblur_gaussian")


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

    check_count("--nfe", nfe)
    check_count("--samples", samples)
    check_count("--seed", seed, least=0)
    loaded, where = load_named(prior, device)
    any_size = PriorTraits.of(loaded).image_shape is None
    folder = ASSETS / "photographs" if any_size else ASSETS
    paths = sorted(folder.glob("*.png"))
    truths = torch.cat([fit_picture(path, read_image(path), loaded) for path in paths]).to(where)
    open_folder(out)
    table = Table(
        *("task", "picture", "y", "estimate", "sample", "mean", "SSIM", "residual", "s"),
        title="PSNR in dB of y, estimate, one sample and their mean; SSIM and residual of the "
        "estimate; seconds a picture",
        box=None,
    )
    rows = []
    for name in TASKS:
        task = make_task(name, sides_of(truths), seed=seed)
        y = _simulate(task, truths, seed)
        restore = partial(
            solve,
            y,
            operator=task.operator,
            prior=loaded,
            nfe=nfe,
            sigma_y=task.sigma_y,
            seed=seed,
        )
        result, drawn = restore(), restore(num_samples=samples, estimate="sample")
        for i, path in enumerate(paths):
            image = slice(i, i + 1)
            truth, x0 = truths[image], result.x0[image]
            seen = _to_size(y[image], sides_of(truths))
            quality = float(psnr(x0, truth))
            spread = None if drawn.std is None else drawn.std[image]
            write_image(out / f"{path.stem}_{name}.png", x0)
            rows.append(GridRow(name, truth, seen, x0, spread, quality))
            table.add_row(
                name,
                path.stem,
                f"{float(psnr(seen, truth)):.1f}",
                f"{quality:.1f}",
                f"{float(psnr(drawn.samples[0, image], truth)):.1f}",
                f"{float(psnr(drawn.mean[image], truth)):.1f}",
                f"{float(ssim(x0, truth)):.3f}",
                f"{float(result.residual[i]):.2f}",
                f"{(result.seconds + drawn.seconds) / len(paths):.1f}",
            )
    save_picture_grid(out / "demo.png", rows)
    Console().print(table)
    typer.echo(
        f"{result.method} loop, {result.nfe} network calls for the estimate and for each of "
        f"{samples} samples; see {out / 'demo.png'}"
    )


def _simulate(task: Task, truth: Tensor, seed: int) -> Tensor:
    """Return noisy measurements of true images, each with its own noise."""
    sources = [torch.Generator(truth.device).manual_seed(seed + i) for i in range(len(truth))]
    return task.operator.measure(truth, task.sigma_y, generator=sources)


def _to_size(y: Tensor, sides: tuple[int, int]) -> Tensor:
    """Return a measured picture enlarged to the size of the image."""
    if sides_of(y) == sides:
        return y
    from kornia.geometry.transform import resize

    enlarged: Tensor = resize(y, sides, interpolation="bicubic", align_corners=False)
    return enlarged
