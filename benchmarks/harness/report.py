"""One self-contained HTML page with all results of a run, from the template `report.html`."""

import base64
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from harness.pictures import Shown, find_pictures, open_picture
from harness.plots import svg_plots
from harness.published import (
    ABSENT,
    CAPTION,
    NOTES,
    PUBLISHED,
    SCORE_NAMES,
    published_rows,
    read_references,
    show_scores,
)
from harness.records import Record
from harness.tables import (
    CALLS_MEANING,
    COLUMNS,
    GOALS,
    KIND_MEANING,
    Column,
    ImageSet,
    best_rows,
    caption_notes,
    show_calls,
    show_kind,
    show_settings,
    show_tuned,
    split_by_task,
    used_columns,
    write_file,
)
from ncvsd_inverse import list_tasks
from ncvsd_inverse.tasks import task_title

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["CITE_FIRST", "MAX_BYTES", "write_report"]

MAX_BYTES = 2_000_000
"""Largest report."""

_QUALITIES = (None, 90, 75, 50)
"""Ways to encode pictures, tried in turn until the report is small enough; None is lossless."""

_CHOSEN = 4
"""Estimates that the viewer shows at first."""

_MOST_VALUES = 8
"""Most values of one fact, such as the dates of the rows, that are all named."""

CITE_FIRST = ("ncvsd_inverse", "peng2025ncvsd")
"""Keys of what to cite for this benchmark."""

_Content: TypeAlias = dict[str, object]
"""What the template fills in, by the names that it uses."""


def write_report(records: Sequence[Record], out: Path) -> list[Path]:
    """Write `report.html`: settings, tables, plots, a viewer of the pictures, and citations.

    The page loads nothing from elsewhere and has at most `MAX_BYTES`: pictures are encoded more
    coarsely, and left out from the last image on, until they fit; the page says so.

    Args:
        records: rows of any tasks.
        out: the results folder, with `pictures/TASK/{truth,measurement,METHOD-NFE}/IMAGE.png`.

    Returns:
        The file.

    Raises:
        ValueError: if a task is unknown, a picture cannot be read, or the page is too large
            without any picture.
        OSError: if the file cannot be written.
    """
    path = out / "report.html"
    shown = find_pictures(records, out)
    template, content = _load_template(), _content(records) | _script()
    for note, pictures in _encodings(shown):
        page = template.render(content, note=note, pictures=pictures).encode("utf-8")
        if len(page) <= MAX_BYTES:
            return [write_file(path, page)]
    raise ValueError(f"{path.name} must have at most {MAX_BYTES} bytes, got {len(page)}")


def _load_template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    ).get_template("report.html")


def _script() -> _Content:
    """Return the page's script, and the hash by which its policy lets this one alone run."""
    text = (Path(__file__).parent / "report.js").read_text(encoding="utf-8")
    code = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"script": text, "script_hash": f"sha256-{code}"}


def _content(records: Sequence[Record]) -> _Content:
    """Return everything on the page but its pictures."""
    known, columns = read_references(), used_columns(records)
    named = {record.reference for record in records} | {row.reference for row in PUBLISHED}
    meanings = " ".join(column.meaning for column in columns)
    cited = [
        work for key, work in known.items() if key in named or key in CITE_FIRST or key in meanings
    ]
    plots = svg_plots(records)
    return {
        "absent": ABSENT,
        "count": len(records),
        "facts": _facts(records),
        "tasks": [
            _task(task, sets, plots.get(task)) for task, sets in split_by_task(records).items()
        ],
        "published": _published(),
        "definitions": {"kind": KIND_MEANING, "calls": CALLS_MEANING}
        | {_heading(column): column.meaning for column in columns},
        "cited": cited,
        "cited_first": [known[key] for key in CITE_FIRST],
        "cited_too": [work for work in cited if work.key not in CITE_FIRST],
    }


def _facts(records: Sequence[Record]) -> dict[str, list[str]]:
    """Return what determines the rows and where they were made; of many values the ends."""
    facts: dict[str, set[str]] = {}
    for record in records:
        facts.setdefault("images", set()).add(ImageSet.of(record).title)
        facts.setdefault("hash of the images", set()).add(f"{record.data}: {record.data_sha256}")
        for name, digest in record.prior_sha256.items():
            facts.setdefault(f"weights of the {name}", set()).add(digest)
        for name, value in record.environment.items():
            facts.setdefault(name, set()).add(value)
    return {
        name: sorted(values)
        if len(values) <= _MOST_VALUES
        else [f"{min(values)} to {max(values)} ({len(values)} different)"]
        for name, values in facts.items()
    }


def _heading(column: Column) -> str:
    return f"{column.title} {GOALS[column.better]}"


def _task(task: str, sets: Mapping[ImageSet, Sequence[Record]], plot: str | None) -> _Content:
    """Return the section of a task.

    Args:
        task: its name.
        sets: its rows by image set.
        plot: its plot as SVG.
    """
    records = [record for rows in sets.values() for record in rows]
    columns = used_columns(records)
    code = base64.b64encode(plot.encode()).decode() if plot else ""
    return {
        "name": task,
        "title": task_title(task),
        "heads": [
            *({"name": name, "first": "ascending"} for name in ("method", "kind", "calls", "n")),
            *(
                {
                    "name": _heading(column),
                    "first": "descending" if column.better == "higher" else "ascending",
                }
                for column in columns
            ),
            {"name": "failed", "first": "descending"},
        ],
        "sets": [
            {"title": where.title, "rows": _rows(rows, columns)} for where, rows in sets.items()
        ],
        "notes": caption_notes(records),
        "plot": code and f"data:image/svg+xml;base64,{code}",
        "details": [
            {
                "title": record.title,
                "calls": show_calls(record),
                "images": record.images,
                "draws": record.draws,
                "settings": show_settings(record),
                "tuned": show_tuned(record),
                "failures": "; ".join(
                    f"image {name}: {what}" for name, what in record.failures.items()
                ),
                "key": record.key[:12],
            }
            for record in records
        ],
    }


def _rows(records: Sequence[Record], columns: Sequence[Column]) -> list[list[_Content]]:
    """Return the cells of an image set's rows."""
    best = {column.name: best_rows(records, column) for column in columns}
    return [
        [
            _cell(record.title, record.title),
            _cell(show_kind(record), show_kind(record), tag=True),
            _cell(record.forward + record.backward, show_calls(record)),
            _cell(record.images, str(record.images)),
            *(
                _cell(
                    value := column.value(record),
                    column.show(value),
                    error="" if (error := column.error(record)) is None else column.show(error),
                    best=record.key in best[column.name],
                )
                for column in columns
            ),
            _cell(len(record.failures), str(len(record.failures))),
        ]
        for record in records
    ]


def _cell(
    value: float | str | None,
    text: str,
    *,
    error: str = "",
    tag: bool = False,
    best: bool = False,
) -> _Content:
    """Return a cell that is sorted by `value` and shows `text`."""
    shown = "" if value is None else str(value)
    return {"value": shown, "text": text, "error": error, "tag": tag, "best": best}


def _published() -> _Content:
    tasks = [task for task in list_tasks() if published_rows(task)]
    nothing = (None, None, None)
    return {
        "caption": CAPTION,
        "scores": SCORE_NAMES,
        "tasks": [task_title(task) for task in tasks],
        "rows": [
            {
                "title": row.title,
                "nfe": row.nfe,
                "scores": [show_scores(row.scores.get(task, nothing)) for task in tasks],
                "reference": row.reference,
                "measured_by": row.measured_by,
            }
            for row in PUBLISHED
        ],
        "notes": NOTES,
    }


def _encodings(shown: Sequence[Shown]) -> Iterator[tuple[str, list[_Content]]]:
    """Yield ever smaller sets of pictures for the viewer, with what was lost in words."""
    count = max((len(each.truth) for each in shown), default=0)
    coded: dict[Path, str] = {}
    for quality in _QUALITIES if count else ():
        coded = {path: _data_address(path, quality) for path in _files(shown)}
        lossy = "" if quality is None else f"Pictures are WebP of quality {quality}. "
        yield lossy.strip(), [_task_pictures(each, coded, count) for each in shown]
    for kept in range(count - 1, 0, -1):
        note = f"{lossy}Left out to keep the page below {MAX_BYTES // 10**6} MB: all but the first "
        note += "image." if kept == 1 else f"{kept} images."
        yield note, [_task_pictures(each, coded, kept) for each in shown]
    yield ("All pictures were left out: they are too large for this page." if count else ""), []


def _files(shown: Sequence[Shown]) -> list[Path]:
    lists = [
        files
        for each in shown
        for files in (each.truth, each.measurement, *(row.files for row in each.estimates))
    ]
    return [path for files in lists for path in files if path is not None]


def _data_address(path: Path, quality: int | None) -> str:
    """Return a picture as a data address, lossless without a quality."""
    buffer = io.BytesIO()
    picture = open_picture(path)
    picture.save(buffer, "WEBP", lossless=quality is None, quality=quality or 100, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _task_pictures(shown: Shown, coded: Mapping[Path, str], kept: int) -> _Content:
    """Return the first `kept` images of a task for the viewer.

    Args:
        shown: the pictures.
        coded: them as data addresses.
        kept: images to show.
    """

    def column(
        title: str, files: Sequence[Path | None], notes: Sequence[str], chosen: bool = False
    ) -> _Content:
        images = [None if path is None else coded[path] for path in files[:kept]]
        return {"title": title, "images": images, "notes": notes[:kept], "chosen": chosen}

    columns = [column("truth", shown.truth, []), column("measurement", shown.measurement, [])]
    first = _first_chosen(shown)
    for place, row in enumerate(shown.estimates):
        notes = [_figures(row.record, number) for number in range(len(row.files))]
        columns.append(column(row.title, row.files, notes, place in first))
    names = [path.stem for path in shown.truth[:kept]]
    return {"title": task_title(shown.task), "names": names, "columns": columns}


def _first_chosen(shown: Shown) -> set[int]:
    """Return the places of the best estimate by LPIPS of each of the first few methods."""
    best: dict[str, tuple[float, int]] = {}
    for place, row in enumerate(shown.estimates):
        mean = row.record.mean("lpips-alex")
        score = (float("inf") if mean is None else mean, place)
        best[row.record.method] = min(best.get(row.record.method, score), score)
    return {place for _, place in sorted(best.values())[:_CHOSEN]}


def _figures(record: Record, number: int) -> str:
    """Return what was measured on one image, in words."""
    parts = []
    for column in COLUMNS:
        values = record.values.get(column.name, ())
        value = values[number] if number < len(values) else None
        if column.name in ("psnr", "lpips-alex") and value is not None:
            parts.append(f"{column.title} {column.show(value)}")
    return ", ".join(parts)
