"""Measured rows of the benchmark as plain data, and the file that holds them."""

import json
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, NoReturn, Self

from scipy.stats import t as student_t

from ncvsd_inverse import list_tasks
from ncvsd_inverse.checks import check_choice, check_count

__all__ = [
    "CONFIDENCE",
    "METHOD_NAME",
    "METRICS",
    "NETWORKS",
    "RECORDS",
    "Difference",
    "Record",
    "check_number",
    "check_text",
    "read_lines",
    "read_records",
]

RECORDS = "records.jsonl"
"""The file of a results folder that holds its records, one a line."""

METRICS = {
    "psnr": "higher",
    "ssim": "higher",
    "lpips-alex": "lower",
    "lpips-squeeze": "lower",
    "lpips-vgg": "lower",
    "residual": "one",
    "psnr-mean": "higher",
    "crps": "lower",
    "coverage": "nominal",
}
"""Metric names and which way is better; a residual is right at 1, coverage at 0.9.

"psnr-mean" is the PSNR of the mean of an image's draws; it, "crps" and "coverage" (share of pixels
within their own 90% interval) are of methods that sample and need several draws an image.
"""

NETWORKS = ("student", "teacher", "none")
"""Which network a method may have, in the order of tables."""

METHOD_NAME = re.compile(r"\w[\w.+-]*")
"""Names of methods, which are names of folders too."""

MOST_BYTES = 2**28
"""Largest file of records; one of ours with 200 rows of 100 images has 2 MB."""

LONGEST = 1000
"""Most characters of a text in a record."""

LARGEST = 1e30
"""Largest absolute value of a number in a record."""


CONFIDENCE = 0.95
"""Of the intervals of differences."""


class Difference(NamedTuple):
    """A mean difference over images and half the width of its interval, by Student's t."""

    mean: float
    margin: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.mean) > self.margin


@dataclass(frozen=True, kw_only=True)
class Record:
    """One method on one task with one number of calls, over a set of images.

    Attributes:
        key: hash of all that determines the values; records of one key are the same row.
        task: task name.
        prior: name of the student.
        prior_sha256: hash of the weights of student and teacher (and of the spread that a
            card sets), by "student" and "teacher".
        method: name of the method.
        title: its name in tables.
        network: "student", "teacher" or "none".
        samples: whether it draws from the posterior.
        reference: its BibTeX key.
        nfe: network passes asked for.
        settings: its settings.
        tuned: whether they come from tuning.
        data: name of the images, as a file name without its folders.
        data_sha256: hash of the images' pixels.
        size: height and width.
        images: how many.
        draws: draws for each image; the first counts for the metrics of single images.
        sigma_y: noise std of the measurements.
        seed: of measurements and methods.
        forward: forward passes for each image and draw, as counted.
        backward: backward passes likewise.
        seconds: wall seconds for each image and draw.
        peak_mib: peak memory of the process while it ran, MiB.
        values: for each metric one number an image, None where the image failed.
        failures: image number -> what went wrong.
        environment: commit, versions, hardware, date: what does not determine the values.
        tuned_calls: network passes at which tuning found the settings; None where it did not, and
            in rows of before, which were tuned at one number of passes for all.
    """

    key: str
    task: str
    prior: str
    prior_sha256: Mapping[str, str]
    method: str
    title: str
    network: str
    samples: bool
    reference: str
    nfe: int
    settings: Mapping[str, float]
    tuned: bool
    data: str
    data_sha256: str
    size: tuple[int, int]
    images: int
    draws: int
    sigma_y: float
    seed: int
    forward: float
    backward: float
    seconds: float
    peak_mib: float
    values: Mapping[str, tuple[float | None, ...]]
    failures: Mapping[str, str]
    environment: Mapping[str, str]
    tuned_calls: int | None = None

    @property
    def row(self) -> tuple[str, str, int, int]:
        """Task, method, network passes and images: a results folder holds one record of each."""
        return self.task, self.method, self.nfe, self.images

    def mean(self, metric: str) -> float | None:
        """Return a metric's mean over the images that did not fail; None without any."""
        known = self._known(metric)
        return fmean(known) if known else None

    def error(self, metric: str) -> float | None:
        """Return the standard error of `mean`; None with fewer than two images."""
        known = self._known(metric)
        return stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None

    def difference(self, other: "Record", metric: str) -> "Difference | None":
        """Return how far a metric of this row is above that of another, over the same images.

        None unless both have at least two images in common, of the same data.
        """
        if (self.data_sha256, self.seed) != (other.data_sha256, other.seed):
            return None
        pairs = zip(self.values.get(metric, ()), other.values.get(metric, ()), strict=False)
        gaps = [own - theirs for own, theirs in pairs if own is not None and theirs is not None]
        if len(gaps) < 2:
            return None
        quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1))
        return Difference(fmean(gaps), quantile * stdev(gaps) / math.sqrt(len(gaps)))

    def _known(self, metric: str) -> list[float]:
        return [value for value in self.values.get(metric, ()) if value is not None]

    def to_json(self) -> str:
        """Return the record as one line of JSON, without the line end."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a record; ValueError if it is none, or a field is not of its type and range."""
        try:
            entries = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a record must be JSON: {error}") from None
        if not isinstance(entries, dict):
            raise ValueError(f"a record must be an object, got {type(entries).__name__}")
        known = fields(cls)
        optional = {field.name for field in known if field.default is not MISSING}
        lacking = [field.name for field in known if field.name not in {*entries, *optional}]
        if lacking:
            raise ValueError(f"a record must have all its fields, got none of {lacking}")
        names = [field.name for field in known]
        found: dict[str, Any] = {}
        for name, value in entries.items():
            try:
                found[name] = _READERS[check_choice("a field", name, names)](name, value)
            except TypeError as error:
                raise ValueError(str(error)) from None
        record = cls(**found)
        for metric, row in record.values.items():
            if len(row) != record.images:
                raise ValueError(
                    f"values of {metric} must be one for each of {record.images} images, "
                    f"got {len(row)}"
                )
        for image in record.failures:
            if not (image.isascii() and image.isdecimal() and len(image) < 10):
                raise ValueError(f"failures must be by number of image, got {image!r}")
        return record


def check_text(name: str, value: object) -> str:
    """Return a text; ValueError unless it is one short line of characters that can be shown."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {type(value).__name__}")
    if len(value) > LONGEST:
        raise ValueError(f"{name} must have at most {LONGEST} characters, got {len(value)}")
    if bad := [char for char in value if unicodedata.category(char) in ("Cc", "Cs")]:
        raise ValueError(f"{name} must have no control characters, got {bad[0]!a}")
    return value


def check_number(name: str, value: object, *, least: float = -LARGEST) -> float:
    """Return a number as it is; ValueError unless it is one, in [least, 1e30]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {type(value).__name__}")
    if not least <= value <= LARGEST:
        came = value if isinstance(value, float) else f"an integer of {value.bit_length()} bits"
        raise ValueError(f"{name} must be from {least:g} to {LARGEST:g}, got {came}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"numbers must be finite, got {name}")


def _read_choice(*choices: str) -> Callable[[str, object], str]:
    return lambda name, value: check_choice(name, check_text(name, value), choices)


def _read_method(name: str, value: object) -> str:
    if not METHOD_NAME.fullmatch(check_text(name, value)):
        raise ValueError(f"{name} must be letters, digits and . + - _, got {value!r}")
    return str(value)


def _read_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {type(value).__name__}")
    return value


def _read_count(least: int) -> Callable[[str, Any], int]:
    return lambda name, value: check_count(name, value, least=least)


def _read_amount(name: str, value: object) -> float:
    return check_number(name, value, least=0.0)


def _read_size(name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{name} must be height and width")
    return check_count(name, value[0]), check_count(name, value[1])


def _read_mapping(
    entry: Callable[[str, object], object],
) -> Callable[[str, object], dict[str, Any]]:
    def read(name: str, value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, got {type(value).__name__}")
        return {check_text(name, key): entry(name, each) for key, each in value.items()}

    return read


def _read_row(name: str, value: object) -> tuple[float | None, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be lists, got {type(value).__name__}")
    return tuple(None if each is None else check_number(name, each) for each in value)


_READERS: dict[str, Callable[[str, Any], object]] = {
    **dict.fromkeys(("key", "prior", "title", "reference", "data", "data_sha256"), check_text),
    "task": _read_choice(*list_tasks()),
    "prior_sha256": _read_mapping(check_text),
    "method": _read_method,
    "network": _read_choice(*NETWORKS),
    "samples": _read_flag,
    "nfe": _read_count(0),
    "settings": _read_mapping(check_number),
    "tuned": _read_flag,
    "size": _read_size,
    "images": _read_count(1),
    "draws": _read_count(1),
    "sigma_y": _read_amount,
    "seed": _read_count(0),
    **dict.fromkeys(("forward", "backward", "seconds", "peak_mib"), _read_amount),
    "values": _read_mapping(_read_row),
    "failures": _read_mapping(check_text),
    "environment": _read_mapping(check_text),
    "tuned_calls": lambda name, value: None if value is None else check_count(name, value, least=0),
}
"""What reads each field of a record from JSON, by name; ValueError or TypeError if it is wrong."""


class Lines(NamedTuple):
    """The lines of a file of records.

    Attributes:
        records: those that could be read.
        damaged: the others, as they are.
        notes: what to say of these.
    """

    records: list[Record]
    damaged: list[bytes]
    notes: list[str]


def read_records(folder: Path) -> list[Record]:
    """Read the records of a results folder, in the order of their lines; none if it has no file.

    A line that is damaged or was cut off is left out with a warning that names it: its row is
    measured anew.

    Raises:
        ValueError: if the file is too large to be one of records.
    """
    lines = read_lines(folder)
    for note in lines.notes:
        warnings.warn(note, stacklevel=2)
    return lines.records


def read_lines(folder: Path) -> Lines:
    """Read the file of a results folder without a warning; see `read_records`."""
    path, lines = folder / RECORDS, Lines([], [], [])
    if not path.is_file():
        return lines
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} must have at most {MOST_BYTES} bytes, got {size}")
    *whole, rest = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            lines.records.append(Record.from_json(line))
        except ValueError as error:
            lines.damaged.append(line)
            what = " ".join(str(error).split())
            lines.notes.append(f"{path}: line {number} is damaged and left out: {what}")
    if rest:
        try:
            lines.records.append(Record.from_json(rest))
        except ValueError:
            lines.notes.append(f"{path}: the last line was cut off and is left out")
    return lines
