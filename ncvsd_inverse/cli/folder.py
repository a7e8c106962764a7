"""Many pictures to restore: find them, skip finished ones, batch, write, report."""

import errno
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import typer
from torch import Tensor

from ncvsd_inverse import Result, write_image
from ncvsd_inverse.checks import check_positive
from ncvsd_inverse.files import clear_parts, file_sha256, write_whole
from ncvsd_inverse.images import SUFFIXES, Picture, write_picture
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.operators import BlindBlur
from ncvsd_inverse.operators.base import BaseOperator
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior
from ncvsd_inverse.priors.statistics import ImageStatistics
from ncvsd_inverse.protocols import Prior
from ncvsd_inverse.sources import FolderFiles, open_plain, read_at_most

__all__ = [
    "FULL",
    "MAX_BYTES",
    "Job",
    "Measured",
    "Place",
    "as_it_came",
    "batch_by_size",
    "card_digest",
    "check_size",
    "clear_leftovers",
    "cut_rim",
    "describe_result",
    "file_digest",
    "find_pictures",
    "is_finished",
    "name_once",
    "one_image",
    "process_place",
    "read_levels",
    "read_record",
    "read_sigma_y",
    "report_failures",
    "sha256",
    "std_picture",
    "suffix_for",
    "write_result",
]


OUTPUTS = ("_restored", "_measurement", "_std")
"""What the names of written pictures end in, before the suffix."""

SUFFIXES_OUT = (".png", ".tif")

KERNEL, KERNEL_SUFFIXES = "_kernel", (".png", ".npy")
"""What the names of a found kernel end in: a picture, enlarged, and its weights."""

KERNEL_ZOOM = 8
"""How many times a kernel is enlarged in its picture."""

RECORD = "restored"
"""Key of a record that names the restored picture, which tells that it is one of ours."""

WRITTEN = "outputs"
"""Key of a record that lists the written pictures with their SHA-256, null before all is done."""

RECORD_BYTES = 2**20
"""Longest file that is read to see whether it is a record."""

MAX_BYTES = 2**30
"""Longest file that is restored: more than any picture or array that is read."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of writing that every later picture would meet too."""


@dataclass(frozen=True)
class Place:
    """Where the outputs of a picture go.

    Attributes:
        stem: their path, without what they end in.
        file: the restored picture, if it is to be there and nothing else but a kernel.
        has_kernel: whether a kernel is found and written too.
    """

    stem: Path
    file: Path | None = None
    has_kernel: bool = False

    @property
    def record(self) -> Path:
        """The record of settings and figures."""
        return self.stem.with_name(f"{self.stem.name}.json")

    def output(self, kind: str, suffix: str = ".png") -> Path:
        """Return the path of one of `OUTPUTS`."""
        return self.stem.with_name(f"{self.stem.name}{kind}{suffix}")

    @property
    def outputs(self) -> list[Path]:
        """All pictures that may be written."""
        kernels = [self.output(KERNEL, suffix) for suffix in KERNEL_SUFFIXES if self.has_kernel]
        if self.file is not None:
            return [self.file, *kernels]
        pictures = [self.output(kind, suffix) for kind in OUTPUTS for suffix in SUFFIXES_OUT]
        return pictures + kernels

    def check_own(self) -> None:
        """ValueError if a file that would be written over has no record of ours."""
        found, known = read_record(self.record), {path.name for path in self.outputs}
        restored, own = found.get(RECORD), set[str]()
        if isinstance(restored, str) and Path(restored).name in known:
            listed = found.get(WRITTEN)
            own = known & listed.keys() if isinstance(listed, Mapping) else known
            own.add(self.record.name)
        for path in (self.record, *self.outputs):
            if os.path.lexists(path) and path.name not in own:
                raise ValueError(
                    f"{path} is there and has no record of ours: it is not written over; move it "
                    "or name another --out"
                )


@dataclass(frozen=True, eq=False)
class Measured:
    """A measurement and what was done to its image.

    Attributes:
        y: shape (1, ...).
        operator: its forward model.
        picture: the file, if it is a picture, whose depth and opacity the result takes.
        rim: rows and columns of the image around what y shows, which are cut off in the end.
        truth: the true image (1, C, H, W), where it is known.
        seen: the measurement as a picture to write, if any.
    """

    y: Tensor
    operator: BaseOperator | BlindBlur
    picture: Picture | None = None
    rim: tuple[int, int] = (0, 0)
    truth: Tensor | None = None
    seen: Tensor | None = None


@dataclass(frozen=True)
class Job:
    """One measurement to restore.

    Attributes:
        place: where its outputs go.
        path: the file.
        key: what its random numbers follow from.
        measured: what it holds.
        sigma_y: noise std of y; "auto": to be estimated.
        settings: all that the result depends on, and the device.
    """

    place: Place
    path: Path
    key: tuple[int, ...]
    measured: Measured
    sigma_y: float | Literal["auto"]
    settings: Mapping[str, object]

    @property
    def size(self) -> tuple[int, ...]:
        """Channels, height and width of the image."""
        measured = self.measured
        return measured.operator.input_shape(tuple(measured.y.shape))[1:]

    @property
    def together(self) -> tuple[object, ...]:
        """What jobs that are restored together have in common."""
        return (*self.size, self.measured.operator)


def find_pictures(
    sources: list[Path], out: Path, suffixes: Sequence[str] = SUFFIXES
) -> tuple[list[tuple[str, Path]], list[str]]:
    """Return names and paths of files and of those in folders, but for our own outputs.

    Names lack what they end in, unless two would then be the same. Beside them, a line for each
    that a folder has but is not to be opened.
    """
    found: list[tuple[Path, Path]] = []
    refused: list[str] = []

    def wanted(name: str) -> bool:
        return Path(name).suffix.lower() in suffixes and not name.startswith(".")

    for source in sources:
        if not source.is_dir():
            found.append((Path(source.name), source))
            continue
        files = FolderFiles(source, wanted)
        inside = [
            (Path(name), source / name)
            for name in files.names
            if not _is_output(source / name, source, out)
        ]
        if not (inside or files.refused):
            kinds = ", ".join(suffixes)
            raise ValueError(f"{source} must hold files ({kinds}) that are no outputs, got none")
        found += inside
        refused += [f"{source / name}: {reason}" for name, reason in files.refused.items()]
    short = [path.with_suffix("").as_posix() for path, _ in found]
    times = Counter(short)
    names = [
        name if times[name] == 1 else name + path.suffix.replace(".", "_")
        for name, (path, _) in zip(short, found, strict=True)
    ]
    twice, number = next(iter(Counter(names).most_common(1)), ("", 0))
    if number > 1:
        raise ValueError(f"IN must have names that differ, as outputs do, got {twice} twice")
    return [(name, path) for name, (_, path) in zip(names, found, strict=True)], refused


def _is_output(path: Path, source: Path, out: Path) -> bool:
    """Tell whether a file is one that this command wrote: it lies in its folder, or has a record.

    A folder that holds the source itself tells nothing.
    """
    folder = out.resolve()
    if folder in path.resolve().parents and folder not in (
        source.resolve(),
        *source.resolve().parents,
    ):
        return True
    for end in (*OUTPUTS, KERNEL):
        if path.stem.endswith(end):
            record = path.with_name(path.stem.removesuffix(end) + ".json")
            if RECORD in read_record(record):
                return True
    return read_record(path.with_suffix(".json")).get(RECORD) == path.name


def read_record(path: Path) -> Mapping[str, object]:
    """Return what a record holds; nothing if it is missing or none."""
    try:
        with open_plain(path) as file:
            found = json.loads(read_at_most(file, RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def process_place() -> tuple[int, int]:
    """Return the number of this process and how many there are, as launchers tell them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def read_levels(text: str) -> list[float]:
    """Return the levels of a schedule as the command line has it, separated by commas."""
    try:
        return [float(level) for level in text.split(",")]
    except ValueError:
        raise ValueError(f"--schedule must be numbers separated by commas, got {text!r}") from None


def read_sigma_y(text: str | None) -> float | Literal["auto"] | None:
    """Return a noise std as the command line has it."""
    if text is None or text == "auto":
        return None if text is None else "auto"
    try:
        number = float(text)
    except ValueError:
        raise ValueError(f"--sigma-y must be a number or auto, got {text!r}") from None
    return check_positive("--sigma-y", number)


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


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file; ValueError if it has no end or one too far off."""
    try:
        open_plain(path, MAX_BYTES).close()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return file_sha256(path)


def is_finished(place: Place, settings: Mapping[str, object]) -> bool:
    """Tell whether a picture was restored with these settings and is whole; else say why not."""
    found = read_record(place.record)
    written = found.get(WRITTEN)
    known = {path.name: path for path in place.outputs}
    if not isinstance(written, Mapping) or not written or not known.keys() >= written.keys():
        return False
    if None in written.values():
        return False
    for name, digest in written.items():
        if not known[name].is_file() or file_digest(known[name]) != digest:
            typer.echo(f"{known[name]} is not as it was written: restored again")
            return False
    changed = _differing(settings, found)
    if changed:
        typer.echo(f"{place.record} is of another {', '.join(changed)}: restored again")
    return not changed


def check_same_source(place: Place, path: Path, digest: str) -> None:
    """ValueError if the outputs are of another picture, of the same name in another folder."""
    found = read_record(place.record)
    other = found.get("input")
    if not isinstance(other, str) or found.get("input_sha256") == digest:
        return
    if Path(other).resolve() != path.resolve():
        raise ValueError(
            f"{place.record} is of another picture of this name, {other}: name another --out"
        )


def clear_leftovers(places: Iterable[Place]) -> None:
    """Remove what a killed run left half-written where outputs go."""
    names: dict[Path, set[str]] = {}
    for place in places:
        own = names.setdefault(place.record.parent, set())
        own.update(path.name for path in (place.record, *place.outputs))
    for folder, own in names.items():
        clear_parts(folder, own)


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
    """Yield jobs of one size and model together, about `pixels` at a time, and hold few others."""
    waiting: dict[tuple[object, ...], list[Job]] = {}

    def held(kind: tuple[object, ...]) -> int:
        return prod(waiting[kind][0].size[1:]) * len(waiting[kind])

    for job in jobs:
        if job.sigma_y == "auto":
            yield [job]
            continue
        waiting.setdefault(job.together, []).append(job)
        if held(job.together) + prod(job.size[1:]) > pixels:
            yield waiting.pop(job.together)
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
        sigma_y_std=None if result.sigma_y_std is None else result.sigma_y_std[image],
        y=result.y[image],
        kernel=None if result.kernel is None else result.kernel[image],
        kernel_std=None if result.kernel_std is None else result.kernel_std[image],
        kernel_numbers=None if result.kernel_numbers is None else result.kernel_numbers[image],
    )


def check_size(measured: Measured, image_shape: Sequence[int]) -> None:
    """ValueError unless a measurement is that of an image of the one shape (C, H, W)."""
    y, (height, width) = measured.y, measured.operator.input_shape(tuple(measured.y.shape))[2:]
    if (height, width) != tuple(image_shape[1:]):
        wanted = (image_shape[1] * y.shape[2] // height, image_shape[2] * y.shape[3] // width)
        if measured.rim != (0, 0):
            wanted = (image_shape[1] - 2 * measured.rim[0], image_shape[2] - 2 * measured.rim[1])
        raise ValueError(
            f"it must have {wanted[1]} x {wanted[0]} pixels, as this prior restores images of "
            f"{image_shape[2]} x {image_shape[1]}, got {y.shape[3]} x {y.shape[2]}; ncvsd_natural "
            "takes any size"
        )


def card_digest(prior: Prior) -> str | None:
    """Return a hash of the card of a trained prior, with the statistics that it has now."""
    if not isinstance(prior, NCVSDPrior | DiffusionPrior) or prior.card is None:
        return None
    statistics = prior.statistics
    known = statistics if isinstance(statistics, ImageStatistics) else None
    return sha256(replace(prior.card, statistics=known).to_json().encode())


def write_result(job: Job, result: Result) -> None:
    """Write pictures and figures of one restored image and print its line.

    The record comes first, unfinished, and last, so that pictures are never without one, nor beside
    one of other settings.

    Raises:
        ValueError: if a file of another's would be written over.
        OSError: if a file cannot be written.
    """
    place = job.place
    restored = as_it_came(job.measured, result.x0)
    figures: dict[str, object] = {
        "input": str(job.path),
        "estimate": result.estimate,
        "calls": result.nfe,
        "loop": result.method,
        "residual": float(result.residual[0]),
        "converged": result.converged,
        "sigma_y_found": None if result.sigma_y_std is None else float(result.sigma_y[0]),
        "seconds": result.seconds,
        "schedule": result.schedule,
        "sigma_lik": result.sigma_lik,
    }
    quality = None
    if job.measured.truth is not None:
        quality = float(psnr(result.x0.cpu(), job.measured.truth))
        figures["psnr"] = quality
    picture = place.file or place.output("_restored", suffix_for(restored))
    place.record.parent.mkdir(parents=True, exist_ok=True)
    place.check_own()
    listed = read_record(place.record).get(WRITTEN)
    known = listed if isinstance(listed, Mapping) else {}
    figures[RECORD] = picture.name
    unfinished = {RECORD: picture.name, WRITTEN: {path.name: None for path in place.outputs}}
    write_whole(place.record, json.dumps(unfinished) + "\n")
    kernels = {place.output(KERNEL, suffix) for suffix in KERNEL_SUFFIXES}
    before = {path for path in kernels if path.name in known}
    for path in {*place.outputs, *before}:
        if path != picture:
            path.unlink(missing_ok=True)
    written = [picture]
    if place.file is None and job.measured.seen is not None:
        written.append(place.output("_measurement"))
        write_image(written[-1], job.measured.seen)
    if place.file is None and result.std is not None:
        shown, figures["std_shown_white"] = std_picture(result.std, job.measured.rim)
        written.append(place.output("_std"))
        write_image(written[-1], shown)
    if result.kernel is not None and place.has_kernel:
        files = [place.output(KERNEL, suffix) for suffix in KERNEL_SUFFIXES]
        write_image(files[0], kernel_picture(result.kernel))
        write_kernel(files[1], result.kernel)
        written += files
        figures["kernel_std"] = relative_std(result)
        if result.kernel_numbers is not None:
            figures["kernel_numbers"] = result.kernel_numbers[0].tolist()
    write_picture(picture, restored)
    figures[WRITTEN] = {path.name: file_sha256(path) for path in written}
    write_whole(place.record, json.dumps({**job.settings, **figures}, indent=2) + "\n")
    typer.echo(f"{picture}: {describe_result(result, quality)}")


def describe_result(result: Result, quality: float | None = None) -> str:
    """Return in a line how one image was restored; `quality` is its PSNR, dB, where known."""
    line = f"residual {float(result.residual[0]):.2f}"
    if result.sigma_y_std is not None:
        found, sure = float(result.sigma_y[0]), float(result.sigma_y_std[0])
        line += f", noise std {found:.3g} found, give or take {sure:.1g}"
    if result.kernel is not None:
        height, width = kernel_sides(result.kernel)
        line += f", kernel {width} x {height} pixels found, give or take {relative_std(result):.0%}"
        for value, sure in (
            [] if result.kernel_numbers is None else result.kernel_numbers[0].tolist()
        ):
            line += f", {value:.3g} give or take {sure:.1g}"
    if quality is not None:
        line += f", {quality:.1f} dB"
    made = {"point": "point estimate", "mean": f"mean of {len(result.samples)} samples"}
    done = made.get(result.estimate, result.estimate)
    calls = f"{result.nfe} network calls" + (" a sample" if len(result.samples) > 1 else "")
    return f"{line}, {done}, {result.method} loop, {calls}, {result.seconds:.1f} s"


def kernel_sides(kernel: Tensor) -> tuple[int, int]:
    """Return height and width of what a kernel (1, 1, n, n) has above a twentieth of its peak."""
    rows, columns = (kernel[0, 0] > kernel.max() / 20).nonzero(as_tuple=True)
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


def relative_std(result: Result) -> float:
    """Return the std of all weights of a found kernel together, over their length."""
    assert result.kernel is not None
    assert result.kernel_std is not None
    return float(result.kernel_std.norm() / result.kernel.norm())


def kernel_picture(kernel: Tensor) -> Tensor:
    """Return a kernel (1, 1, n, n) as a picture, its largest weight white, enlarged."""
    shown = 2 * kernel.float().cpu() / float(kernel.max()) - 1
    return shown.repeat_interleave(KERNEL_ZOOM, 2).repeat_interleave(KERNEL_ZOOM, 3)


def write_kernel(path: Path, kernel: Tensor) -> None:
    """Write the weights (n, n) of a kernel (1, 1, n, n), as `--kernel` reads them."""
    contents = io.BytesIO()
    np.save(contents, kernel[0, 0].cpu().numpy())
    write_whole(path, contents.getvalue())


def std_picture(std: Tensor, rim: tuple[int, int]) -> tuple[Tensor, float]:
    """Return the mean std (1, C, H, W) of the channels as a grey picture, and what is white."""
    spread = cut_rim(std.mean(1, keepdim=True), rim)
    white = spread.max()
    return 2 * spread / white.clamp(min=1e-12) - 1, float(white)


def as_it_came(measured: Measured, x0: Tensor) -> Picture:
    """Return a restored image with the depth of the file, and its opacity in the new size."""
    x0 = cut_rim(x0.cpu(), measured.rim)
    if measured.picture is None:
        return Picture(x0)
    bits, alpha = measured.picture.bits, measured.picture.alpha
    if bits == 32 and x0.shape[1] == 3:
        bits = 16
    if alpha is not None and alpha.shape[2:] != x0.shape[2:]:
        alpha = torch.nn.functional.interpolate(
            alpha, x0.shape[2:], mode="bicubic", antialias=True
        ).clamp(0, 1)
    return Picture(x0, bits, alpha)


def suffix_for(picture: Picture) -> str:
    """Return what the name of a restored picture ends in: floats of grey are for TIFF."""
    return ".tif" if picture.bits == 32 and picture.x.shape[1] == 1 else ".png"


def cut_rim(x: Tensor, rim: tuple[int, int]) -> Tensor:
    """Return images without so many rows and columns on every side."""
    rows, columns = rim
    return x[..., rows : x.shape[-2] - rows, columns : x.shape[-1] - columns]
