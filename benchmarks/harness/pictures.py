"""Restored pictures: which a run left, and grids of them."""

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.plots import without_mathematics
from harness.records import NETWORKS, Record
from harness.tables import show_calls, split_by_task, write_file
from ncvsd_inverse.tasks import task_title

__all__ = ["CELL", "GAP", "Estimates", "Shown", "find_pictures", "open_picture", "write_grids"]

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

CELL = 128
"""Least width of a picture in a grid, pixels; smaller pictures are enlarged without smoothing."""

MOST_PIXELS = 2**24
"""Most pixels of a picture that is shown."""

GAP, _TITLE = 4, 24
"""Pixels between pictures, and above all of them for the title."""

_PER_BAND = 10
"""Most columns beside one another; the others follow below."""


@dataclass(frozen=True)
class Estimates:
    """The pictures of one row.

    Attributes:
        record: the row.
        files: for each true picture the restored one; None where it failed.
    """

    record: Record
    files: tuple[Path | None, ...]

    @property
    def title(self) -> str:
        """The method and its calls."""
        record = self.record
        if record.network == "none":
            return record.title
        return f"{record.title}, {show_calls(record)} calls"


@dataclass(frozen=True)
class Shown:
    """The pictures of a task: the k-th of each list belongs to the k-th image.

    Attributes:
        task: name of the task.
        truth: the true pictures.
        measurement: what was measured, as pictures of any size.
        estimates: for each row that left pictures.
    """

    task: str
    truth: tuple[Path, ...]
    measurement: tuple[Path | None, ...]
    estimates: tuple[Estimates, ...]


def find_pictures(records: Sequence[Record], out: Path) -> list[Shown]:
    """Return the pictures of each task that are in `pictures/TASK/` of a results folder.

    Rows of one method and number of calls on several image sets share their pictures, since the
    first images of the sets are the same; they are listed once, for the largest set.

    Raises:
        ValueError: if a task is unknown.
    """
    found: list[Shown] = []
    for task, sets in split_by_task(records).items():
        folder = out / "pictures" / task
        found_truth = (path for path in folder.glob("truth/*.png") if path.is_file())
        truth = sorted(found_truth, key=lambda path: (len(path.stem), path.stem))
        names = [path.name for path in truth]
        rows: dict[str, Estimates] = {}
        for record in (record for of_set in sets.values() for record in of_set):
            place = f"{record.method}-{record.nfe}"
            files = _find(folder / place, names)
            if any(files):
                rows.setdefault(place, Estimates(record, files))
        if truth:
            # Of the largest sets come all rows before any of the others: order them anew.
            order = sorted(rows.values(), key=lambda each: _order(each.record))
            measurement = _find(folder / "measurement", names)
            found.append(Shown(task, tuple(truth), measurement, tuple(order)))
    return found


def _find(folder: Path, names: Sequence[str]) -> tuple[Path | None, ...]:
    paths = [folder / name for name in names]
    return tuple(path if path.is_file() else None for path in paths)


def _order(record: Record) -> tuple[int, str, int]:
    return NETWORKS.index(record.network), record.method, record.nfe


def write_grids(records: Sequence[Record], out: Path) -> list[Path]:
    """Write `grids/TASK.png` for each task that has pictures.

    A row is an image; its columns are the truth, the measurement, and the estimates: those with
    the student at every number of calls, of each other method the one with the most calls.

    Args:
        records: rows of any tasks.
        out: the results folder, with `pictures/TASK/{truth,measurement,METHOD-NFE}/IMAGE.png`.

    Returns:
        The files.

    Raises:
        ValueError: if a task is unknown or a picture cannot be read.
        OSError: if a file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    written: list[Path] = []
    for shown in find_pictures(records, out):
        buffer = io.BytesIO()
        FigureCanvasAgg(_draw_grid(shown)).print_png(buffer)
        written.append(write_file(out / "grids" / f"{shown.task}.png", buffer.getvalue()))
    return written


def _draw_grid(shown: Shown) -> "Figure":
    """Draw the pictures at whole multiples of their pixels, with names above the columns."""
    from matplotlib.figure import Figure
    from PIL.Image import Resampling

    columns = _columns(shown)
    width, height = open_picture(shown.truth[0]).size
    scale = -(-CELL // width)
    width, height = width * scale, height * scale
    names = [
        "\n".join([*textwrap.wrap(name, max(8, width // 8)), *calls]) for name, calls, _ in columns
    ]
    head = 12 + 16 * (1 + max(name.count("\n") for name in names))
    band = head + len(shown.truth) * (height + GAP)
    total = (
        _TITLE + band * -(-len(columns) // _PER_BAND),
        min(len(columns), _PER_BAND) * (width + GAP) - GAP,
    )
    canvas = np.full((*total, 3), 255, dtype=np.uint8)
    figure = Figure(figsize=(total[1] / 100, total[0] / 100), dpi=100)

    def write(text: str, x: float, y: float, ha: str = "center", va: str = "center") -> None:
        """Write at x pixels from the left and y from the top."""
        plain = without_mathematics(text)
        figure.text(x / total[1], 1 - y / total[0], plain, fontsize=9, ha=ha, va=va)

    for column, (_, _, files) in enumerate(columns):
        left = column % _PER_BAND * (width + GAP)
        first = _TITLE + column // _PER_BAND * band + head
        write(names[column], left + width / 2, first - 6, va="bottom")
        for row, file in enumerate(files):
            top = first + row * (height + GAP)
            cell = canvas[top : top + height, left : left + width]
            if file is None:
                cell[:] = 235
                write("no picture", left + width / 2, top + height / 2)
            else:
                enlarged = open_picture(file).resize((width, height), Resampling.NEAREST)
                cell[:] = np.asarray(enlarged)
    write(task_title(shown.task), 6, 6, ha="left", va="top")
    figure.figimage(canvas, zorder=-1)
    return figure


def _columns(shown: Shown) -> list[tuple[str, list[str], tuple[Path | None, ...]]]:
    """Return title, line on calls if there is one, and files of each column of a grid."""
    most = {each.record.method: each.record.nfe for each in shown.estimates}
    columns: list[tuple[str, list[str], tuple[Path | None, ...]]] = [
        ("truth", [], shown.truth),
        ("measurement", [], shown.measurement),
    ]
    for each in shown.estimates:
        record = each.record
        if record.network == "student" or record.nfe == most[record.method]:
            calls = [] if record.network == "none" else [f"{show_calls(record)} calls"]
            columns.append((record.title, calls, each.files))
    return columns


def open_picture(path: Path) -> "Image":
    """Read a PNG file as RGB; ValueError if it is none, or has too many pixels to be a result."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if math.prod(picture.size) > MOST_PIXELS:
                raise ValueError(f"it has more than {MOST_PIXELS} pixels")
            return picture.convert("RGB")
    except Exception as error:  # Pillow raises almost anything for a damaged file
        raise ValueError(f"{path} must be a readable picture: {error}") from error
