"""Records on disk, found again by what determines their values."""

import ast
import hashlib
import inspect
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch

import ncvsd_inverse
from baselines.interface import Run
from harness.records import RECORDS, Record, check_text, read_lines, read_records
from harness.runner import Outcome, Row, Setup
from ncvsd_inverse import Task
from ncvsd_inverse.files import clear_parts, write_whole

__all__ = [
    "Cache",
    "describe_environment",
    "hash_code",
    "make_key",
    "make_record",
    "narrow",
    "write_json",
]

_SCHEMA = 1
"""Changes when records of before can no longer be used."""

OWN_CODE = (
    "baselines",
    "ncvsd_inverse.priors.covariance",
    "ncvsd_inverse.priors.statistics",
    "ncvsd_inverse.sampling",
    "ncvsd_inverse.schedules",
)
"""Modules whose code is part of the methods that use it: a change of it measures them anew."""

OWN_PACKAGES = ("baselines", "ncvsd_inverse")

_MOST_BYTES = 2**26
"""Largest file of settings."""

_LIBRARIES = ("torch", "numpy", "deepinv", "lpips", "piq")


@cache
def hash_code(run: Run) -> str:
    """Return the SHA-256 of a method's code.

    That is the module of `run`, those of functions that it was given as a partial one, and, of
    `OWN_CODE`, what these use, and so on. What changes no value is left out: comments, docstrings,
    annotations, `__all__`, the names of modules, and from where in this repository something is
    imported.
    """
    waiting = [sys.modules[name] for name in _modules_of(run)]
    found: dict[str, str] = {}
    while waiting:
        module = waiting.pop()
        if module.__name__ in found:
            continue
        found[module.__name__] = _bare_code(inspect.getsource(module))
        for value in vars(module).values():
            used = value.__name__ if isinstance(value, ModuleType) else _home(value)
            if used in sys.modules and _is_in(used, OWN_CODE):
                waiting.append(sys.modules[used])
    return hashlib.sha256("".join(sorted(found.values())).encode()).hexdigest()


def _modules_of(function: object) -> list[str]:
    """Return the modules of a function and, if it is partial, of the functions it was given."""
    if not isinstance(function, partial):
        return [_home(function)]
    given = [part for part in (*function.args, *function.keywords.values()) if callable(part)]
    return [name for part in (function.func, *given) for name in _modules_of(part)]


def _home(value: object) -> str:
    home = getattr(value, "__module__", None)
    return home if isinstance(home, str) else ""


def _is_in(module: str, packages: Iterable[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _bare_code(source: str) -> str:
    return ast.dump(_Barer().visit(ast.parse(source)))


class _Barer(ast.NodeTransformer):
    """Takes out of a module's tree what changes no value."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        return None if _is_in(node.module or "", OWN_PACKAGES) else node

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        return None if names == ["__all__"] else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)


def make_key(setup: Setup, row: Row, task: Task) -> str:
    """Return the SHA-256 of all that determines the values of a row."""
    known = {
        "schema": _SCHEMA,
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
    if row.method.network == "student" and setup.card_sha256:
        known["card_sha256"] = setup.card_sha256
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
        tuned=row.tuned is not None,
        tuned_calls=row.tuned,
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


class Cache:
    """The folder of a run's results, which several processes may fill at the same time.

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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                clear_parts(self.folder, (path.name, RECORDS))
                held = path.exists()
                images = self._check_settings(path, settings, hashes) if held else hashes
                write_json(path, {**settings, "images": images})
        except OSError as error:
            raise ValueError(
                f"--out must be a writable folder, got {self.folder}: {error}"
            ) from None

    def _check_settings(
        self, path: Path, settings: Mapping[str, object], hashes: Sequence[str]
    ) -> Sequence[str]:
        """Return the hashes of all images known; ValueError if the folder is of other settings."""
        held, before = _read_settings(path)
        wanted = json.loads(json.dumps(settings))
        differing = [
            f"{name} is {held.get(name)!a} there and {wanted.get(name)!a} here"
            for name in sorted(held.keys() | wanted.keys())
            if held.get(name) != wanted.get(name)
        ]
        shared = min(len(before), len(hashes))
        if before[:shared] != list(hashes[:shared]):
            differing.append("the images of --data are others")
        if differing:
            raise ValueError(
                f"--out must be a folder of the same settings, got {self.folder}: "
                + "; ".join(differing)
            )
        return max(before, hashes, key=len)

    def find(self, key: str, metrics: Iterable[str]) -> Record | None:
        """Return the record of a key if it is there with all of `metrics`."""
        for record in read_records(self.folder):
            if record.key == key and set(metrics) <= set(record.values):
                return record
        return None

    def save(self, record: Record) -> None:
        """Write a record in place of an older one of the same row and number of images.

        Damaged lines stay, in front.
        """
        with self._locked():
            held = read_lines(self.folder)
            records = {each.row: each for each in held.records}
            if records.get(record.row) != record:
                records[record.row] = record
                lines = [records[row].to_json().encode() for row in sorted(records)]
                content = b"".join(line + b"\n" for line in (*held.damaged, *lines))
                write_whole(self.folder / RECORDS, content)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from writing; the system lets go of the lock of one that ends."""
        import fcntl  # Unix alone has it

        with (self.folder / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

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


def _read_settings(path: Path) -> tuple[dict[str, object], list[str]]:
    """Return the settings of a results folder and the hashes of its images."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it must be a file of at most {_MOST_BYTES} bytes")
        held = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(held, dict) or not isinstance(held.get("images"), list):
            raise ValueError("it must be an object with a list of images")
        images = [check_text("images", name) for name in held.pop("images")]
        return {check_text("a name", name): value for name, value in held.items()}, images
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be the settings of a results folder: {error}") from None


def describe_environment(device: torch.device) -> dict[str, str]:
    """Return what does not determine the values: commit, versions, hardware and date."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "ncvsd-inverse": ncvsd_inverse.__version__,
        **{package: version(package) for package in _LIBRARIES},
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
