"""Measured rows of the benchmark as plain data, and the file that holds them."""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Self

__all__ = ["METRICS", "RECORDS", "Record", "read_records"]

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

    def _known(self, metric: str) -> list[float]:
        return [value for value in self.values.get(metric, ()) if value is not None]

    def to_json(self) -> str:
        """Return the record as one line of JSON, without the line end."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a record; ValueError if it is none."""
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a record must be JSON: {error}") from None
        names = {field.name for field in fields(cls)}
        given = {"tuned_calls": None, **entries} if isinstance(entries, dict) else {}
        if set(given) != names:
            wrong = names ^ set(given)
            raise ValueError(f"a record must have its fields, wrong: {', '.join(sorted(wrong))}")
        entries["size"] = tuple(entries["size"])
        entries["values"] = {name: tuple(row) for name, row in entries["values"].items()}
        return cls(**entries)


def read_records(folder: Path) -> list[Record]:
    """Read the records of a results folder, in the order of their lines; none if it has no file.

    A last line that was cut off is left out with a warning: its row is measured anew.

    Raises:
        ValueError: if another line is damaged.
    """
    path = folder / RECORDS
    if not path.exists():
        return []
    records = []
    *whole, rest = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            records.append(Record.from_json(line))
        except ValueError as error:
            raise ValueError(
                f"{path}: line {number} is damaged, delete it to measure it anew: {error}"
            ) from None
    if rest:
        try:
            records.append(Record.from_json(rest))
        except ValueError:
            warnings.warn(f"{path}: the last line was cut off and is left out", stacklevel=2)
    return records
