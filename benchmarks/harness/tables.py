"""Records as tables in Markdown, LaTeX and CSV."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Self

from harness.published import (
    ABSENT,
    CAPTION,
    NOTES,
    REFERENCES,
    SCORE_NAMES,
    published_rows,
    read_references,
    show_scores,
)
from harness.records import CONFIDENCE, METRICS, NETWORKS, Record
from ncvsd_inverse import list_tasks
from ncvsd_inverse.checks import check_choice
from ncvsd_inverse.files import write_whole
from ncvsd_inverse.tasks import task_title

__all__ = [
    "CALLS_MEANING",
    "COLUMNS",
    "GOALS",
    "KIND_MEANING",
    "Column",
    "ImageSet",
    "best_rows",
    "caption_notes",
    "csv_table",
    "difference_table",
    "find_ours",
    "latex",
    "latex_table",
    "markdown_table",
    "show_calls",
    "show_kind",
    "show_settings",
    "show_tuned",
    "split_by_task",
    "used_columns",
    "write_file",
    "write_tables",
]

GOALS = {
    "higher": "↑",
    "lower": "↓",
    "one": "→ 1",
    "nominal": "→ 0.9",
}
"""How a table shows which way is better."""


OURS_SHOWN, OURS_CALLS = "ncvsd-point", 10
"""Method and network calls of the row that others are held against."""


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        name: a metric, "seconds" or "peak_mib".
        title: its heading.
        decimals: how many are shown.
        meaning: what it measures, one sentence.
    """

    name: str
    title: str
    decimals: int
    meaning: str

    @property
    def better(self) -> str:
        """Which way is better, a key of `GOALS`."""
        return METRICS.get(self.name, "lower")

    def value(self, record: Record) -> float | None:
        """Return the value of a row, the mean over its images where it is a metric."""
        if self.name in METRICS:
            return record.mean(self.name)
        return record.seconds if self.name == "seconds" else record.peak_mib

    def error(self, record: Record) -> float | None:
        """Return the standard error of a metric's mean."""
        return record.error(self.name) if self.name in METRICS else None

    def show(self, value: float | None) -> str:
        """Return a value as text, seconds to three digits and the rest to `decimals`."""
        if value is None:
            return ABSENT
        decimals = self.decimals
        if self.name == "seconds":
            decimals = next((n for n, bound in ((3, 1), (2, 10), (1, 100)) if value < bound), 0)
        return f"{value:.{decimals}f}"


COLUMNS = (
    Column(
        "psnr",
        "PSNR",
        2,
        "Peak signal-to-noise ratio in dB; the peak is the width of the images' range.",
    ),
    Column("ssim", "SSIM", 3, "Structural similarity (wang2004ssim)."),
    Column(
        "lpips-alex", "LPIPS-alex", 3, "Distance of AlexNet features, LPIPS 0.1 (zhang2018lpips)."
    ),
    Column(
        "lpips-squeeze",
        "LPIPS-squeeze",
        3,
        "Distance of SqueezeNet features, LPIPS 0.1 (zhang2018lpips).",
    ),
    Column(
        "lpips-vgg",
        "LPIPS-vgg",
        3,
        "Distance of VGG features as piq computes it (kastryulin2022piq), the variant of the "
        "published rows.",
    ),
    Column(
        "residual",
        "residual",
        3,
        "||y - A(x)|| / (sigma_y sqrt(m)) for m measured numbers: 1 where the estimate explains "
        "the measurement to within its noise.",
    ),
    Column(
        "coverage",
        "coverage",
        3,
        "Share of pixels inside their own 90% interval of the draws: 0.9 where the spread of the "
        "draws is right.",
    ),
    Column(
        "crps",
        "CRPS",
        4,
        "Continuous ranked probability score of the draws a pixel, images in [-1, 1], in its fair "
        "form (gneiting2007crps, ferro2014fair).",
    ),
    Column("psnr-mean", "PSNR of mean", 2, "PSNR in dB of the mean of an image's draws."),
    Column(
        "seconds",
        "seconds",
        2,
        "Wall seconds for one restored image, or for one draw of a sampler.",
    ),
    Column("peak_mib", "peak MiB", 0, "Peak memory of the process while the row was measured."),
)
"""All columns of numbers, in the order of the tables; a table leaves out empty metrics."""

CALLS_MEANING = (
    "Forward passes of a network for one restored image or one draw, as counted; where there are "
    "backward passes they follow behind a plus sign."
)
KIND_MEANING = "“sample”: draws from the posterior; “point”: one estimate an image."


@dataclass(frozen=True)
class ImageSet:
    """What rows must share to be held against each other."""

    task: str
    data: str
    size: tuple[int, int]
    images: int
    data_sha256: str
    prior: str
    sigma_y: float
    seed: int

    @classmethod
    def of(cls, record: Record) -> Self:
        """Return the set that a record was measured on."""
        return cls(
            record.task,
            record.data,
            record.size,
            record.images,
            record.data_sha256,
            record.prior,
            record.sigma_y,
            record.seed,
        )

    @property
    def title(self) -> str:
        """The set in words."""
        return (
            f"{self.images} {'image' if self.images == 1 else 'images'} of {self.data}, "
            f"{self.size[0]}x{self.size[1]}, prior {self.prior}, sigma_y {self.sigma_y:g}, "
            f"seed {self.seed}"
        )


def split_by_task(records: Iterable[Record]) -> dict[str, dict[ImageSet, list[Record]]]:
    """Return the records by task, then by image set, in the order in which they are shown.

    Tasks come in the order of `list_tasks()`, large image sets before small ones of the same
    data; within a set the student's rows come first and methods without network last.

    Raises:
        ValueError: if a task is unknown.
    """
    tasks = list_tasks()

    def place(record: Record) -> tuple[object, ...]:
        where = ImageSet.of(record)
        return (
            tasks.index(check_choice("task", record.task, tasks)),
            (where.data, -where.images, where.data_sha256, where.prior, where.size),
            (where.sigma_y, where.seed),
            NETWORKS.index(check_choice("network", record.network, NETWORKS)),
            (record.method, record.nfe, record.key),
        )

    ordered = sorted(records, key=place)
    return {
        task: {where: list(rows) for where, rows in groupby(of_task, ImageSet.of)}
        for task, of_task in groupby(ordered, lambda record: record.task)
    }


def show_calls(record: Record) -> str:
    """Return the counted passes, "forward" or "forward+backward"."""
    counts = [record.forward, record.backward] if record.backward else [record.forward]
    return "+".join(f"{count:.0f}" if count == round(count) else f"{count:.1f}" for count in counts)


def show_kind(record: Record) -> str:
    """Return "sample" or "point"."""
    return "sample" if record.samples else "point"


def used_columns(records: Iterable[Record]) -> list[Column]:
    """Return the columns in which at least one record has a value."""
    rows = list(records)
    return [
        column for column in COLUMNS if any(column.value(record) is not None for record in rows)
    ]


def best_rows(records: Sequence[Record], column: Column) -> frozenset[str]:
    """Return the keys of the rows of one image set that are best in a column.

    Of a metric that is better higher or lower they are the best mean and all rows that are not
    clearly behind it, by the interval of the difference over the same images; of others those that
    are best as it is shown. Memory has no best: it is that of the whole process. A row with failed
    images is measured on fewer images than the others and takes no part; nor is there a best of
    one.
    """
    distance: Callable[[float], float] = {
        "higher": lambda value: -value,
        "lower": lambda value: value,
        "one": lambda value: abs(value - 1),
        "nominal": lambda value: abs(value - 0.9),
    }[column.better]
    scores = {
        record.key: round(distance(float(column.show(value))), 6)
        for record in records
        if not record.failures and (value := column.value(record)) is not None
    }
    if len(scores) < 2 or column.name == "peak_mib":
        return frozenset()
    least = min(scores.values())
    best = {key for key, score in scores.items() if score == least}
    if column.name in METRICS and column.better in ("higher", "lower"):
        first = next(record for record in records if record.key in best)
        for record in records:
            gap = record.difference(first, column.name) if record.key in scores else None
            if gap is not None and not gap.is_clear:
                best.add(record.key)
    return frozenset(best)


def find_ours(records: Sequence[Record]) -> Record | None:
    """Return the row that differences are taken to: our point estimate of ten calls, or near."""
    ours = [record for record in records if record.method == OURS_SHOWN and not record.failures]
    return min(ours, key=lambda record: abs(math.log(record.nfe / OURS_CALLS)), default=None)


def difference_table(records: Sequence[Record]) -> list[str]:
    """Return Markdown lines: what the other rows of an image set have above ours, by interval."""
    ours = find_ours(records)
    columns = [column for column in used_columns(records) if column.better in ("higher", "lower")]
    columns = [column for column in columns if column.name in METRICS]
    if ours is None:
        return []
    lines = [
        f"Mean difference to {_markdown(ours.title)}, {ours.nfe} calls, over the same images, with "
        f"its {CONFIDENCE:.0%} interval; bold where ours is clearly ahead:",
        "",
        *_markdown_head(["method", "calls", *(column.title for column in columns)], left=1),
    ]
    found = False
    for record in records:
        gaps = [record.difference(ours, column.name) for column in columns]
        if record.key == ours.key or not any(gaps):
            continue
        found = True
        cells = []
        for column, gap in zip(columns, gaps, strict=True):
            if gap is None:
                cells.append(ABSENT)
                continue
            text = f"{gap.mean:+.{column.decimals}f} ± {column.show(gap.margin)}"
            behind = gap.mean < 0 if column.better == "higher" else gap.mean > 0
            cells.append(f"**{text}**" if gap.is_clear and behind else text)
        lines.append(_markdown_row([_markdown(record.title), show_calls(record), *cells]))
    return [*lines, ""] if found else []


def write_tables(records: Sequence[Record], out: Path) -> list[Path]:
    """Write `tables.md`, `tables.tex` and `tables.csv`, and the works that they cite.

    Args:
        records: rows of any tasks.
        out: the results folder.

    Returns:
        The files.

    Raises:
        ValueError: if a task is unknown.
        OSError: if a file cannot be written.
    """
    tasks = split_by_task(records)
    ordered = [record for sets in tasks.values() for rows in sets.values() for record in rows]
    notes = caption_notes(records)
    if any(published_rows(task) for task in tasks):
        notes += [*NOTES, f"Keys of citations are those of `{REFERENCES.name}`."]
    sections = [markdown_table(task, sets) for task, sets in tasks.items()]
    sections.append("\n".join(["## Notes", "", *(f"- {note}" for note in notes), ""]))
    floats = [latex_table(task, sets) for task, sets in tasks.items()]
    head = f"% Needs \\usepackage{{booktabs}}; the works are in {REFERENCES.name}.\n"
    texts = {
        "tables.md": "\n".join(["# Results by task", "", *sections]),
        "tables.tex": head + "\n".join(floats),
        "tables.csv": csv_table(ordered),
        REFERENCES.name: REFERENCES.read_text(encoding="utf-8"),
    }
    return [write_file(out / name, text.encode()) for name, text in texts.items()]


def write_file(path: Path, content: bytes) -> Path:
    """Write a file, whole or not at all, and the folders above it; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    return path


def caption_notes(records: Iterable[Record]) -> list[str]:
    """Return what must be known to read a table of these records."""
    rows = list(records)
    notes = [
        "n: images. Bold: the best of a column among the rows of the same images, and what is not "
        f"clearly behind it ({CONFIDENCE:.0%} interval of the difference over the images, by "
        "Student's t); after ± a mean has its standard error, a difference its interval; rows with "
        "failed images are averages over the others and take no part."
    ]
    draws = sorted({record.draws for record in rows if record.samples})
    if any(count > 1 for count in draws):
        counts = " or ".join(str(count) for count in draws)
        notes.append(
            f"Samplers have {counts} draws an image: coverage, CRPS and PSNR of the mean use all, "
            "the others the first."
        )
    return notes


def markdown_table(task: str, sets: dict[ImageSet, list[Record]]) -> str:
    """Return a task's section in Markdown, one table an image set, then the published rows."""
    rows_of_all = [record for rows in sets.values() for record in rows]
    columns = used_columns(rows_of_all)
    lines = [f"## {task_title(task)} (`{task}`)", ""]
    heads = [f"{column.title} {GOALS[column.better]}" for column in columns]
    for where, rows in sets.items():
        best = {column.name: best_rows(rows, column) for column in columns}
        lines += [f"**{_markdown(where.title)}**", ""]
        lines += _markdown_head(["method", "kind", "calls", "n", *heads, "failures"], left=2)
        for record in rows:
            cells = []
            for column in columns:
                text, error = column.show(column.value(record)), column.error(record)
                text = f"**{text}**" if record.key in best[column.name] else text
                cells.append(text if error is None else f"{text} ± {column.show(error)}")
            first = [_markdown(record.title), show_kind(record), show_calls(record)]
            lines.append(_markdown_row([*first, str(record.images), *cells, _failures(record)]))
        lines += ["", *difference_table(rows)]
    if published_rows(task):
        lines += ["### Published, not comparable", "", CAPTION, ""]
        heads = ["method", "calls", *SCORE_NAMES, "cite", "measured by"]
        lines += _markdown_head(heads, left=1)
        for row, scores in published_rows(task):
            cites = [f"`{row.reference}`", f"`{row.measured_by}`" if row.measured_by else ABSENT]
            lines.append(_markdown_row([row.title, str(row.nfe), *show_scores(scores), *cites]))
        lines.append("")
    return "\n".join(lines)


def _markdown_head(cells: Sequence[str], *, left: int) -> list[str]:
    rules = ["---"] * left + ["---:"] * (len(cells) - left)
    return [_markdown_row(cells), _markdown_row(rules)]


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{char}" if char in "\\`*_[]|~" else char for char in plain)


def _failures(record: Record) -> str:
    return str(len(record.failures))


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\N{EN DASH}": "--",
    "±": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "Π": r"$\Pi$",
    "π": r"$\pi$",
    "Σ": r"$\Sigma$",
    "\N{GREEK SMALL LETTER SIGMA}": r"$\sigma$",
    "→": r"$\rightarrow$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "“": "``",
    "”": "''",
} | {char: f"\\{char}" for char in "&%$#_{}"}


def latex(text: str) -> str:
    """Return text that LaTeX sets as it is; what a plain LaTeX has no sign for becomes "?"."""
    signs = (_LATEX.get(char, char if char <= "ÿ" else "?") for char in " ".join(text.split()))
    return "".join(signs)


def latex_table(task: str, sets: dict[ImageSet, list[Record]]) -> str:
    """Return a task's tables in LaTeX, for a document that loads booktabs."""
    rows_of_all = [record for rows in sets.values() for record in rows]
    columns, known = used_columns(rows_of_all), read_references()
    heads = [f"{column.title} {GOALS[column.better]}" for column in columns]
    heads = ["method", "kind", "calls", "n", *heads, "failed"]
    lines = []
    for where, rows in sets.items():
        best = {column.name: best_rows(rows, column) for column in columns}
        title = rf"\multicolumn{{{len(heads)}}}{{l}}{{\emph{{{latex(where.title)}}}}}"
        lines += [r"\midrule", rf"{title} \\", r"\midrule"]
        for record in rows:
            cite = rf"~\cite{{{record.reference}}}" if record.reference in known else ""
            cells = [latex(record.title) + cite, show_kind(record), show_calls(record)]
            cells.append(str(record.images))
            for column in columns:
                text = latex(column.show(column.value(record)))
                cells.append(rf"\textbf{{{text}}}" if record.key in best[column.name] else text)
            lines.append(_latex_row([*cells, _failures(record)]))
    caption = " ".join([f"{task_title(task)}.", *caption_notes(rows_of_all)])
    tables = [_latex_float(caption, task, heads, "ll", lines)]
    if published_rows(task):
        lines = [r"\midrule"]
        for row, scores in published_rows(task):
            values = [latex(text) for text in show_scores(scores)]
            by = rf"\cite{{{row.measured_by}}}" if row.measured_by else "--"
            title = rf"{latex(row.title)}~\cite{{{row.reference}}}"
            lines.append(_latex_row([title, str(row.nfe), *values, by]))
        heads = ["method", "calls", *SCORE_NAMES, "measured by"]
        caption = " ".join([f"{task_title(task)}.", CAPTION, *NOTES])
        tables.append(_latex_float(caption, f"{task}-published", heads, "l", lines))
    return "\n".join(tables)


def _latex_float(
    caption: str, label: str, heads: Sequence[str], left: str, lines: Sequence[str]
) -> str:
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering",
            r"\scriptsize",
            r"\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{latex(caption)}}}",
            rf"\label{{tab:{label.replace('_', '-')}}}",
            rf"\begin{{tabular}}{{{left}{'r' * (len(heads) - len(left))}}}",
            r"\toprule",
            _latex_row([latex(head) for head in heads]),
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ]
    )


def _latex_row(cells: Sequence[str]) -> str:
    return rf"{' & '.join(cells)} \\"


def csv_table(records: Sequence[Record]) -> str:
    """Return records as CSV, one line each: means, standard errors, counts and settings."""
    metrics = [column for column in COLUMNS if column.name in METRICS]
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    plain = "task,method,title,network,kind,prior,nfe,forward,backward,data,height,width,images"
    counts = "failures,draws,sigma_y,seed"
    last = "seconds,peak_mib,tuned,settings,failed,reference,data_sha256,key"
    means = [name for column in metrics for name in (column.name, f"{column.name}-error")]
    writer.writerow([*plain.split(","), *counts.split(","), *means, *last.split(",")])
    for record in records:
        numbers = [
            number for column in metrics for number in (column.value(record), column.error(record))
        ]
        failed = "; ".join(f"{image}: {what}" for image, what in record.failures.items())
        title, prior, data, reference, key, settings, failed = map(
            _no_formula,
            (
                *(record.title, record.prior, record.data, record.reference, record.key),
                *(show_settings(record), failed),
            ),
        )
        writer.writerow(
            [
                *(record.task, record.method, title, record.network, show_kind(record)),
                *(prior, record.nfe, f"{record.forward:g}", f"{record.backward:g}"),
                *(data, *record.size, record.images, len(record.failures), record.draws),
                *(f"{record.sigma_y:g}", record.seed),
                *("" if number is None else f"{number:.6g}" for number in numbers),
                *(f"{record.seconds:.6g}", f"{record.peak_mib:.6g}"),
                *(show_tuned(record), settings, failed),
                *(reference, _no_formula(record.data_sha256), key),
            ]
        )
    return sheet.getvalue()


def _no_formula(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "@", "+", "-", "\t", "\r")) else text


def show_tuned(record: Record) -> str:
    """Return whether the settings of a row come from tuning and, if it is known, at what calls."""
    if record.tuned_calls is None:
        return "yes" if record.tuned else "no"
    return f"at {record.tuned_calls} calls"


def show_settings(record: Record) -> str:
    """Return the settings of a row as "name=value; ..."."""
    return "; ".join(f"{name}={value:g}" for name, value in sorted(record.settings.items()))
