"""One self-contained HTML page with all results."""

import base64
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from harness.pictures import Shown, find_pictures, open_picture
from harness.plots import svg_plots
from harness.published import (
    CAPTION,
    NOTES,
    PUBLISHED,
    SCORE_NAMES,
    Reference,
    published_rows,
    read_references,
)
from harness.records import Record
from harness.tables import (
    ABSENT,
    CALLS_MEANING,
    COLUMNS,
    GOALS,
    KIND_MEANING,
    TASK_TITLES,
    Column,
    ImageSet,
    best_rows,
    caption_notes,
    show_calls,
    show_kind,
    show_settings,
    split_by_task,
    used_columns,
    write_file,
)

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 2_000_000
"""Largest report."""

QUALITIES = (None, 90, 75, 50)
"""Ways to encode pictures, tried in turn until the report is small enough; None is lossless."""

CHOSEN = 4
"""Estimates that the viewer shows at first."""

MOST_VALUES = 8
"""Most values of one fact, such as the dates of the rows, that are all named."""

CITE_FIRST = ("ncvsd_inverse", "peng2025ncvsd")
"""Keys of what to cite for this benchmark."""

Coded: TypeAlias = dict[Path, str]
"""Pictures as data addresses."""


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
    sections = [_what_was_run(records), _results(records)]
    ending = [_published(), _definitions(records), _citations(records)]
    for note, pictures in _encodings(shown):
        body = "\n".join([_head(records), *sections, _viewer(note, bool(pictures)), *ending])
        page = _fill_template(body, pictures)
        if len(page) <= MAX_BYTES:
            return [write_file(path, page)]
    raise ValueError(f"{path.name} must have at most {MAX_BYTES} bytes, got {len(page)}")


def _fill_template(body: str, pictures: list[dict[str, object]]) -> bytes:
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    start, rest = template.split("<!--BODY-->")
    middle, end = rest.split("<!--PICTURES-->")
    # Nothing inside a script element can end it once "<" is spelled as an escape of JSON.
    data = json.dumps(pictures, ensure_ascii=False).replace("<", "\\u003c")
    return "".join((start, f"{body}\n</main>", middle, data, end)).encode()


def _head(records: Sequence[Record]) -> str:
    links = [
        ("run", "What was run"),
        *((task, TASK_TITLES[task]) for task in split_by_task(records)),
    ]
    links += [("viewer", "Pictures"), ("published", "Published"), ("metrics", "Definitions")]
    links.append(("cite", "Cite"))
    entries = "".join(f'<li><a href="#{place}">{escape(name)}</a></li>' for place, name in links)
    return (
        "<header><h1>ncvsd-inverse benchmark</h1>"
        '<p class="soft">Image restoration with a generative denoiser and its peers: quality for '
        f"each number of network passes. {len(records)} rows.</p></header>"
        f"<nav><ul>{entries}</ul></nav><main>"
    )


def _what_was_run(records: Sequence[Record]) -> str:
    """List what determines the rows and where they were made; of many values the ends."""
    facts: dict[str, set[str]] = {}
    for record in records:
        facts.setdefault("images", set()).add(ImageSet.of(record).title)
        facts.setdefault("hash of the images", set()).add(f"{record.data}: {record.data_sha256}")
        for name, digest in record.prior_sha256.items():
            facts.setdefault(f"weights of the {name}", set()).add(digest)
        for name, value in record.environment.items():
            facts.setdefault(name, set()).add(value)
    entries = []
    for name, values in facts.items():
        ordered = sorted(values)
        if len(ordered) > MOST_VALUES:
            ordered = [f"{ordered[0]} to {ordered[-1]} ({len(ordered)} different)"]
        shown = "<br>".join(escape(value) for value in ordered)
        entries.append(f"<dt>{escape(name)}</dt><dd>{shown}</dd>")
    return f'<h2 id="run">What was run</h2><dl>{"".join(entries)}</dl>'


def _results(records: Sequence[Record]) -> str:
    plots, parts = svg_plots(records), []
    for task, sets in split_by_task(records).items():
        rows = [record for of_set in sets.values() for record in of_set]
        parts.append(f'<h2 id="{task}">{TASK_TITLES[task]}</h2>')
        parts.append(_table(sets, used_columns(rows)))
        parts += [f'<p class="soft">{escape(note)}</p>' for note in caption_notes(rows)]
        if task in plots:
            source = f"data:image/svg+xml;base64,{base64.b64encode(plots[task].encode()).decode()}"
            words = f"LPIPS and PSNR against network passes, {TASK_TITLES[task]}"
            parts.append(f'<figure><img class="plot" src="{source}" alt="{words}"></figure>')
        parts.append(_details(rows))
    return "\n".join(parts)


def _table(sets: dict[ImageSet, list[Record]], columns: Sequence[Column]) -> str:
    heads = [_sort_button("method", "ascending", left=True)]
    heads += [_sort_button(name, "ascending") for name in ("kind", "calls", "n")]
    for column in columns:
        first = "descending" if column.better == "higher" else "ascending"
        heads.append(_sort_button(f"{column.title} {GOALS[column.better]}", first))
    heads.append(_sort_button("failed", "descending"))
    bodies = []
    for where, rows in sets.items():
        title = f'<th colspan="{len(heads)}">{escape(where.title)}</th>'
        best = {column.name: best_rows(rows, column) for column in columns}
        lines = []
        for record in rows:
            calls = record.forward + record.backward
            cells = [
                _cell(record.title, escape(record.title)),
                _cell(show_kind(record), f'<span class="tag">{show_kind(record)}</span>'),
                _cell(calls, show_calls(record)),
                _cell(record.images, str(record.images)),
            ]
            for column in columns:
                value, error = column.value(record), column.error(record)
                text = column.show(value)
                text += "" if error is None else f" <small>±{column.show(error)}</small>"
                cells.append(_cell(value, text, best=record.key in best[column.name]))
            cells.append(_cell(len(record.failures), str(len(record.failures))))
            lines.append(f"<tr>{''.join(cells)}</tr>")
        bodies.append(f'<tbody><tr class="set">{title}</tr>{"".join(lines)}</tbody>')
    head = f"<thead><tr>{''.join(heads)}</tr></thead>"
    return f'<div class="scroll"><table class="sortable">{head}{"".join(bodies)}</table></div>'


def _sort_button(name: str, first: str, *, left: bool = False) -> str:
    kind = ' class="left"' if left else ""
    return f'<th{kind} data-first="{first}"><button>{escape(name)}</button></th>'


def _cell(value: float | str | None, text: str, *, best: bool = False) -> str:
    """Return a cell that shows `text`, which is HTML, and is sorted by `value`."""
    kind = ' class="best"' if best else ""
    return f'<td{kind} data-value="{"" if value is None else escape(str(value))}">{text}</td>'


def _details(rows: Sequence[Record]) -> str:
    """Return the settings, hashes and failures of a task's rows."""
    heads = ("method", "calls", "n", "draws", "settings", "tuned", "failures", "key")
    lines = []
    for record in rows:
        failures = "; ".join(f"image {name}: {what}" for name, what in record.failures.items())
        cells = [escape(record.title), show_calls(record), str(record.images), str(record.draws)]
        cells = [f"<td>{cell}</td>" for cell in cells]
        cells.append(f'<td class="wrap">{escape(show_settings(record)) or ABSENT}</td>')
        cells.append(f"<td>{'yes' if record.tuned else 'no'}</td>")
        cells.append(f'<td class="wrap">{escape(failures) or ABSENT}</td>')
        cells.append(f'<td class="left">{escape(record.key[:12])}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    table = _plain_table(heads, lines)
    return f"<details><summary>Settings and failures of each row</summary>{table}</details>"


def _plain_table(heads: Iterable[str], lines: Iterable[str]) -> str:
    words = ("settings", "failures", "key", "cite", "measured by")
    kinds = ((name, ' class="left"' if name in words else "") for name in heads)
    head = "".join(f"<th{kind}><span>{escape(name)}</span></th>" for name, kind in kinds)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _viewer(note: str, some: bool) -> str:
    title = '<h2 id="viewer">Truth, measurement, estimates</h2>'
    warning = f'<p class="warn">{escape(note)}</p>' if note else ""
    if not some:
        return title + (warning or "<p>This run left no pictures.</p>")
    return f"""{title}{warning}
<noscript><p class="warn">The viewer needs JavaScript.</p></noscript>
<div class="controls">
<label>Task <select id="task"></select></label> <label>Image <select id="image"></select></label>
</div>
<div id="methods" role="group" aria-label="Methods to show"></div>
<div id="panels"></div>
<h3>Compare</h3>
<div class="slider">
<div class="lens" id="lens"></div>
<div>
<label>Left <select id="left"></select></label>
<label>Right <select id="right"></select></label>
<label>Divide at <input type="range" id="split" min="0" max="100" value="50"></label>
</div>
</div>"""


def _encodings(shown: Sequence[Shown]) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """Yield ever smaller sets of pictures for the viewer, with what was lost in words."""
    count = max((len(each.truth) for each in shown), default=0)
    coded: Coded = {}
    for quality in QUALITIES if count else ():
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
    buffer = io.BytesIO()
    picture: Image = open_picture(path)
    picture.save(buffer, "WEBP", lossless=quality is None, quality=quality or 100, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _task_pictures(shown: Shown, coded: Coded, kept: int) -> dict[str, object]:
    """Return the first `kept` images of a task as the viewer takes them."""

    def column(
        title: str, files: Sequence[Path | None], notes: Sequence[str], chosen: bool = False
    ) -> dict[str, object]:
        images = [None if path is None else coded[path] for path in files[:kept]]
        return {"title": title, "images": images, "notes": notes[:kept], "chosen": chosen}

    columns = [column("truth", shown.truth, []), column("measurement", shown.measurement, [])]
    first = _first_chosen(shown)
    for place, row in enumerate(shown.estimates):
        notes = [_figures(row.record, number) for number in range(len(row.files))]
        columns.append(column(row.title, row.files, notes, place in first))
    names = [path.stem for path in shown.truth[:kept]]
    return {"title": TASK_TITLES[shown.task], "names": names, "columns": columns}


def _first_chosen(shown: Shown) -> set[int]:
    """Return the places of the best estimate by LPIPS of each of the first few methods."""
    best: dict[str, tuple[float, int]] = {}
    for place, row in enumerate(shown.estimates):
        mean = row.record.mean("lpips-alex")
        score = (float("inf") if mean is None else mean, place)
        best[row.record.method] = min(best.get(row.record.method, score), score)
    return {place for _, place in sorted(best.values())[:CHOSEN]}


def _figures(record: Record, number: int) -> str:
    """Return what was measured on one image, in words."""
    parts = []
    for column in COLUMNS:
        values = record.values.get(column.name, ())
        value = values[number] if number < len(values) else None
        if column.name in ("psnr", "lpips-alex") and value is not None:
            parts.append(f"{column.title} {column.show(value)}")
    return ", ".join(parts)


def _published() -> str:
    tasks = {task: title for task, title in TASK_TITLES.items() if published_rows(task)}
    heads = ["method", "calls", *tasks.values(), "cite", "measured by"]
    lines = []
    for row in PUBLISHED:
        cells = [f"<td>{escape(row.title)}</td><td>{row.nfe}</td>"]
        for task in tasks:
            scores = row.scores.get(task, (None, None, None))
            texts = [
                ABSENT if score is None else f"{score:.{decimals}f}"
                for score, decimals in zip(scores, (3, 2, 3), strict=True)
            ]
            cells.append(f"<td>{' / '.join(texts)}</td>")
        cells.append(f'<td class="left">{row.reference}</td>')
        cells.append(f'<td class="left">{row.measured_by or ABSENT}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    notes = "".join(f"<li>{escape(note)}</li>" for note in NOTES)
    return (
        '<h2 id="published">Published, not comparable</h2>'
        f'<p class="warn">{escape(CAPTION)}</p><p>{" / ".join(SCORE_NAMES)}</p>'
        f"{_plain_table(heads, lines)}<ul>{notes}</ul>"
    )


def _definitions(records: Sequence[Record]) -> str:
    meanings = {"kind": KIND_MEANING, "calls": CALLS_MEANING}
    meanings |= {
        f"{column.title} {GOALS[column.better]}": column.meaning for column in used_columns(records)
    }
    entries = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(what)}</dd>" for name, what in meanings.items()
    )
    return (
        f'<h2 id="metrics">Definitions</h2><dl>{entries}</dl>'
        '<p class="soft">↑ higher is better, ↓ lower is better, → the value that is right. '
        "± is the standard error of the mean over images.</p>"
    )


def _citations(records: Sequence[Record]) -> str:
    known = read_references()
    named = {record.reference for record in records} | {row.reference for row in PUBLISHED}
    meanings = " ".join(column.meaning for column in used_columns(records))
    used = [
        work for key, work in known.items() if key in named or key in CITE_FIRST or key in meanings
    ]
    works = "".join(
        f"<li>{escape(work.plain())} <span class='tag'>{escape(work.key)}</span></li>"
        for work in used
    )
    first = _bibtex([known[key] for key in CITE_FIRST])
    rest = _bibtex([work for work in used if work.key not in CITE_FIRST])
    return (
        '<h2 id="cite">How to cite</h2><p>Cite this software and the method that it implements, '
        f"and each method whose row you use.</p>{first}"
        f"<details><summary>BibTeX of all works named on this page</summary>{rest}</details>"
        f"<h3>Works</h3><ul>{works}</ul>"
    )


def _bibtex(works: Iterable[Reference]) -> str:
    text = "\n\n".join(work.text for work in works)
    return f"<pre>{escape(text)}</pre>"
