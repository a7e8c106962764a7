"""Records on disk, found again by what determines them."""

import ast
import hashlib
import inspect
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch

import ncvsd_inverse
from baselines.interface import Run
from harness.records import Record
from harness.runner import Outcome, Row, Setup
from ncvsd_inverse.files import write_whole
from ncvsd_inverse.tasks import Task

SCHEMA = 1
"""Changes when records of before can no longer be used."""

OWN_CODE = (
    "baselines",
    "ncvsd_inverse.priors.covariance",
    "ncvsd_inverse.priors.statistics",
    "ncvsd_inverse.sampling",
    "ncvsd_inverse.schedules",
)
"""Modules whose code is part of the methods that use it: a change of it measures them anew."""

PACKAGES = ("torch", "numpy", "deepinv", "lpips", "piq")


@cache
def hash_code(run: Run) -> str:
    """Return the SHA-256 of a method's code, comments and docstrings left out.

    That is the module of `run` and, of `OWN_CODE`, what this uses, and so on.
    """
    function: object = run
    while isinstance(function, partial):
        function = function.func
    waiting = [sys.modules[function.__module__]]
    found: dict[str, str] = {}
    while waiting:
        module = waiting.pop()
        if module.__name__ in found:
            continue
        found[module.__name__] = _bare_code(inspect.getsource(module))
        for value in vars(module).values():
            used = value.__name__ if isinstance(value, ModuleType) else _home(value)
            if used in sys.modules and any(f"{used}.".startswith(f"{own}.") for own in OWN_CODE):
                waiting.append(sys.modules[used])
    return hashlib.sha256("".join(found[name] for name in sorted(found)).encode()).hexdigest()


def _home(value: object) -> str:
    home = getattr(value, "__module__", None)
    return home if isinstance(home, str) else ""


def _bare_code(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [  # type: ignore[attr-defined]
                part
                for part in body
                if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]
    return ast.dump(tree)


def make_key(setup: Setup, row: Row, task: Task) -> str:
    """Return the SHA-256 of all that determines the values of a row."""
    known = {
        "schema": SCHEMA,
        "task": row.task,
        "prior_sha256": dict(setup.prior_sha256),
        "method": row.method.name,
        "code": hash_code(row.method.run),
        "nfe": row.nfe,
        "settings": dict(row.settings),
        "data_sha256": setup.images.sha256(row.images),
        "images": row.images,
        "draws": row.draws,
        "sigma_y": task.sigma_y,
        "seed": setup.seed,
        "size": setup.images.size,
    }
    if row.method.network == "student" and setup.statistics_sha256:
        known["statistics_sha256"] = setup.statistics_sha256
    text = json.dumps(known, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def make_record(
    setup: Setup, row: Row, task: Task, outcome: Outcome, environment: Mapping[str, str]
) -> Record:
    """Return the record of a row that was run."""
    cost = outcome.cost
    restored = max(1, cost.images)
    return Record(
        key=make_key(setup, row, task),
        task=row.task,
        prior=setup.prior,
        prior_sha256=dict(setup.prior_sha256),
        method=row.method.name,
        title=row.method.title,
        network=row.method.network,
        samples=row.method.samples,
        reference=row.method.reference,
        nfe=row.nfe,
        settings=dict(row.settings),
        tuned=row.tuned,
        data=setup.images.name,
        data_sha256=setup.images.sha256(row.images),
        size=setup.images.size,
        images=row.images,
        draws=row.draws,
        sigma_y=task.sigma_y,
        seed=setup.seed,
        forward=cost.forward / restored,
        backward=cost.backward / restored,
        seconds=cost.seconds / restored,
        peak_mib=cost.peak / 2**20,
        values=outcome.values,
        failures=outcome.failures,
        environment=environment,
    )


def narrow(record: Record, setup: Setup, row: Row, task: Task) -> Record:
    """Return the record over the first `row.images` images of one over more; costs are kept."""
    return replace(
        record,
        key=make_key(setup, row, task),
        images=row.images,
        data_sha256=setup.images.sha256(row.images),
        values={name: entries[: row.images] for name, entries in record.values.items()},
        failures={
            number: reason for number, reason in record.failures.items() if int(number) < row.images
        },
    )


class Store:
    """The folder of a run's results.

    Args:
        folder: where it is or will be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, settings: Mapping[str, object], hashes: tuple[str, ...]) -> None:
        """Make the folder one of these settings.

        Args:
            settings: what all rows in the folder share, as JSON holds it.
            hashes: of the images; one run may use more of the same images than another.

        Raises:
            ValueError: if the folder cannot be written, or holds results of other settings.
        """
        path = self.folder / "settings.json"
        images = list(hashes)
        if path.exists():
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
                before = held.pop("images")
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} must be the settings of a results folder: {error}") from (
                    None
                )
            wanted = json.loads(json.dumps(settings))
            differing = [
                f"{name} is {held.get(name)} there and {wanted.get(name)} here"
                for name in sorted(held.keys() | wanted.keys())
                if held.get(name) != wanted.get(name)
            ]
            shared = min(len(before), len(images))
            if before[:shared] != images[:shared]:
                differing.append("the images of --data are others")
            if differing:
                raise ValueError(
                    f"--out must be a folder of the same settings, got {self.folder}: "
                    + "; ".join(differing)
                )
            images = max(before, images, key=len)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
            write_json(path, {**settings, "images": images})
        except OSError as error:
            raise ValueError(
                f"--out must be a writable folder, got {self.folder}: {error}"
            ) from None

    def find(self, row: Row, key: str, metrics: tuple[str, ...]) -> Record | None:
        """Return the record of a key if it is there with all of `metrics`."""
        path = self._path(row.task, row.method.name, row.nfe, key)
        if not path.exists():
            return None
        try:
            record = Record.from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged, delete it to measure it anew: {error}") from None
        return record if record.key == key and set(metrics) <= set(record.values) else None

    def save(self, record: Record) -> None:
        """Write a record in place of older ones of the same row and number of images."""
        path = self._path(record.task, record.method, record.nfe, record.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        older = [
            other
            for other in path.parent.glob(f"{record.method}-{record.nfe}-*.json")
            if other != path
            and Record.from_json(other.read_text(encoding="utf-8")).images == record.images
        ]
        write_whole(path, record.to_json())
        for other in older:
            other.unlink()

    def picture(self, task: str, folder: str, image: int) -> Path:
        """Return where a picture is kept; its folder is made.

        Args:
            task: task name.
            folder: "truth", "measurement", or METHOD-NFE for an estimate.
            image: number of the image.
        """
        path = self.folder / "pictures" / task / folder / f"{image}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _path(self, task: str, method: str, nfe: int, key: str) -> Path:
        return self.folder / "records" / task / f"{method}-{nfe}-{key[:8]}.json"


def describe_environment(device: torch.device) -> dict[str, str]:
    """Return what does not determine the values: commit, versions, hardware and date."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "ncvsd-inverse": ncvsd_inverse.__version__,
        **{package: version(package) for package in PACKAGES},
        "hardware": _hardware(device),
        "threads": str(torch.get_num_threads()),
        "processes": os.environ.get("WORLD_SIZE", "1"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """Return the commit of this file's repository, marked if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def write_json(path: Path, content: object) -> None:
    """Write a JSON file whole."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text)
