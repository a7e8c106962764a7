"""Many pictures to restore: find them, skip finished ones, batch, write, report."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch
import typer
from torch import Tensor

from ncvsd_inverse import Result, make_task, read_image, write_image
from ncvsd_inverse.checks import check_image_size
from ncvsd_inverse.cli.inputs import fit_picture, sides_of, size_multiple
from ncvsd_inverse.files import write_whole
from ncvsd_inverse.images import SUFFIXES
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.operators import Inpaint
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior
from ncvsd_inverse.priors.statistics import ImageStatistics
from ncvsd_inverse.protocols import Prior, PriorTraits
from ncvsd_inverse.tasks import Task

__all__ = [
    "Job",
    "batch_by_size",
    "card_digest",
    "find_pictures",
    "is_finished",
    "make_masked_task",
    "name_once",
    "one_image",
    "prepare_clean",
    "prepare_measurement",
    "process_place",
    "read_levels",
    "report_failures",
    "sha256",
    "write_result",
]


@dataclass(frozen=True)
class Job:
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


def find_pictures(sources: list[Path], out: Path) -> list[tuple[str, Path]]:
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


def process_place() -> tuple[int, int]:
    """Return the number of this process and how many there are, as launchers tell them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def read_levels(text: str) -> list[float]:
    """Return the levels of a schedule as the command line has it, separated by commas."""
    try:
        return [float(level) for level in text.split(",")]
    except ValueError:
        raise ValueError(f"--schedule must be numbers separated by commas, got {text!r}") from None


def report_failures(bad: list[str], pictures: int) -> None:
    """Wait for all processes, then in the first raise a ValueError that lists what failed."""
    process, processes = process_place()
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


def name_once(path: Path, error: Exception) -> str:
    """Return an error's text with the path before it, unless it begins with it."""
    text = str(error)
    return text if text.startswith(str(path)) else f"{path}: {text}"


def sha256(content: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def is_finished(folder: Path, name: str, settings: Mapping[str, object]) -> bool:
    """Tell whether NAME was restored with these settings; say so if it was with others."""
    record = folder / f"{name}.json"
    if not (record.exists() and (folder / f"{name}_restored.png").exists()):
        return False
    try:
        before = json.loads(record.read_bytes())
    except ValueError:
        before = None
    found = before if isinstance(before, dict) else {}
    changed = _differing(settings, found)
    if changed:
        typer.echo(f"{record} is of another {', '.join(changed)}: restored again")
    return not changed


def _differing(settings: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    """Return which settings a record does not hold, by name; those within others by their own."""
    names: list[str] = []
    for name, value in settings.items():
        was = found.get(name, ...)
        if isinstance(value, Mapping) and isinstance(was, Mapping):
            names += _differing(value, was)
        elif was != value:
            names.append(name)
    return names


def batch_by_size(jobs: Iterable[Job], pixels: int) -> Iterator[list[Job]]:
    """Yield jobs of one image size together, about `pixels` at a time, and hold few others."""
    waiting: dict[tuple[int, ...], list[Job]] = {}

    def held(size: tuple[int, ...]) -> int:
        return prod(size) * len(waiting[size])

    for job in jobs:
        waiting.setdefault(job.size, []).append(job)
        if held(job.size) + prod(job.size) > pixels:
            yield waiting.pop(job.size)
        elif sum(map(held, waiting)) > 4 * pixels:
            yield waiting.pop(max(waiting, key=held))
    yield from waiting.values()


def one_image(result: Result, place: int) -> Result:
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
        sigma_y=result.sigma_y[image],
        y=result.y[image],
    )


MakeTask: TypeAlias = Callable[[tuple[int, int]], Task]
"""Makes a task for images of some height and width."""


def prepare_clean(
    path: Path, prior: Prior, make: MakeTask, key: tuple[int, ...]
) -> tuple[Task, Tensor, Tensor]:
    """Degrade a clean picture, cropped and resized to what the prior takes; return it too."""
    truth = fit_picture(path, read_image(path), prior)
    task = make(sides_of(truth))
    y = task.operator.measure(truth, task.sigma_y, generator=make_generators([key]))
    return task, y, truth


def prepare_measurement(
    path: Path, prior: Prior, make: MakeTask, known: Task
) -> tuple[Task, Tensor, None]:
    """Read a picture; ValueError unless it can be a measurement of the task, `known` at a size."""
    y = read_image(path)
    if known.name == "colorize":
        y = known.operator(y)
    # The size of the image does not depend on the size the task is for.
    sides = known.operator.input_shape(tuple(y.shape))[-2:]
    fixed = PriorTraits.of(prior).image_shape
    if fixed is not None and tuple(sides) != fixed[1:]:
        height, width = (fixed[-2] * y.shape[-2] // sides[0], fixed[-1] * y.shape[-1] // sides[1])
        raise ValueError(
            f"it must have {width} x {height} pixels for {known.name}, as this prior restores "
            f"images of {fixed[-1]} x {fixed[-2]}, got {y.shape[-1]} x {y.shape[-2]}"
        )
    check_image_size("its image", (3, *sides), multiple=size_multiple(prior, 1))
    task = make((sides[0], sides[1]))
    # What a mask hides must not be seen.
    return task, task.operator(y) if known.takes_mask else y, None


def make_masked_task(
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


def card_digest(prior: Prior) -> str | None:
    """Return a hash of the card of a trained prior, with the statistics that it has now."""
    if not isinstance(prior, NCVSDPrior | DiffusionPrior) or prior.card is None:
        return None
    statistics = prior.statistics
    known = statistics if isinstance(statistics, ImageStatistics) else None
    return sha256(replace(prior.card, statistics=known).to_json().encode())


def write_result(folder: Path, job: Job, result: Result) -> None:
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
        "estimate": result.estimate,
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
    made = {"point": "point estimate", "mean": f"mean of {len(result.samples)} samples"}
    done = made.get(result.estimate, result.estimate)
    calls = f"{result.nfe} network calls" + (" a sample" if len(result.samples) > 1 else "")
    typer.echo(f"{line}, {done}, {result.method} loop, {calls}, {result.seconds:.1f} s")
