"""Settings chosen on validation images, by one budget for all methods, kept as JSON data."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from baselines.interface import Grid, Method, Settings
from harness.cache import hash_code, write_json
from harness.problems import KnownProblem
from harness.runner import Row, Setup, applies, run_row
from ncvsd_inverse.checks import check_choice

__all__ = ["open_tuning", "read_tuned", "tune"]

_MOST_TRIALS = 9
"""Combinations of settings that any method may try."""

_CALLS = 10
"""Network calls at which methods are tuned that have rows at so many."""


def open_tuning(setup: Setup, methods: Sequence[Method], path: Path) -> dict[str, Any]:
    """Return what a tuning's file holds, or a new one would.

    Raises:
        ValueError: if a grid is too large, or `path` holds the tuning of other settings.
    """
    (metric,) = setup.metrics
    header = {
        "prior": setup.prior,
        "prior_sha256": dict(setup.prior_sha256),
        "data": setup.images.name,
        "data_sha256": setup.images.sha256(len(setup.images.x0)),
        "images": len(setup.images.x0),
        "size": list(setup.images.size),
        "seed": setup.seed,
        "metric": metric,
    }
    for method in methods:
        count = len(list(_combinations(method.grid)))
        if count > _MOST_TRIALS:
            raise ValueError(
                f"the grid of {method.name} must have at most {_MOST_TRIALS} combinations, "
                f"got {count}"
            )
    content = _read(path) if path.exists() else {**header, "tasks": {}}
    differing = [name for name in header if content.get(name) != header[name]]
    if differing:
        raise ValueError(
            f"--out must be the tuning of the same settings, got {path}, where other: "
            + ", ".join(differing)
        )
    return content


def tune(
    setup: Setup,
    problems: Mapping[str, KnownProblem],
    methods: Sequence[Method],
    path: Path,
    content: dict[str, Any],
    report: Callable[[str], None],
) -> None:
    """Try every combination of each method's grid and keep the best, task by task.

    All methods see the same images and measurements and are run at ten calls, if they have such a
    row, else at the smallest number of calls they have. The score is the mean of the one metric of
    `setup` over the images. A combination with which an image fails has none and is never chosen;
    if all fail, nothing is. Trials that `content` holds of the same grid and code are kept, so that
    a stopped run goes on.

    Args:
        setup: images, networks and one metric.
        problems: the tasks by name.
        methods: the methods; those without a grid are left out.
        path: the JSON file, written after every combination.
        content: what it holds; filled in place.
        report: called with a line on each combination.
    """
    for problem in problems.values():
        for method in methods:
            if not method.grid or not applies(method, problem):
                continue
            for line in _Search(setup, problem, method, content).trials():
                write_json(path, content)
                report(line)


class _Search:
    """The trials of one method on one task, an entry of the file's content.

    Args:
        setup: images, networks and metric.
        problem: the task.
        method: the method.
        content: the file's content, filled in place.
    """

    def __init__(
        self, setup: Setup, problem: KnownProblem, method: Method, content: dict[str, Any]
    ) -> None:
        self.setup = setup
        self.problem = problem
        self.method = method
        known = {
            "nfe": _calls(method),
            "code": hash_code(method.run),
            "grid": {name: list(values) for name, values in method.grid.items()},
        }
        tried = content["tasks"].setdefault(problem.task.name, {})
        before = tried.get(method.name, {})
        same = all(before.get(name) == value for name, value in known.items())
        new: dict[str, Any] = {**known, "trials": [], "settings": None}
        self.entry = before if same and before else new
        tried[method.name] = self.entry

    def trials(self) -> Iterator[str]:
        """Make the trials that are missing; yield a line after each."""
        (metric,) = self.setup.metrics
        done = [trial["settings"] for trial in self.entry["trials"]]
        for settings in _combinations(self.method.grid):
            if dict(settings) in done:
                continue
            score = self._score(settings)
            self.entry["trials"].append({"settings": dict(settings), "score": score})
            scored = [trial for trial in self.entry["trials"] if trial["score"] is not None]
            choose = max if metric == "psnr" else min
            best = choose(scored, key=lambda trial: trial["score"]) if scored else None
            self.entry["settings"] = best and best["settings"]
            shown = ", ".join(f"{name} {value:g}" for name, value in settings.items())
            outcome = "failed" if score is None else f"{metric} {score:.4f}"
            yield f"{self.problem.task.name} {self.method.name}: {shown}: {outcome}"

    def _score(self, settings: Settings) -> float | None:
        row = Row(
            task=self.problem.task.name,
            method=self.method,
            nfe=_calls(self.method),
            settings={**self.method.settings, **settings},
            tuned=False,
            draws=1,
            images=len(self.problem.x0),
        )
        (entries,) = run_row(self.setup, self.problem, row).values.values()
        numbers = [entry for entry in entries if entry is not None]
        return fmean(numbers) if len(numbers) == len(entries) else None


def read_tuned(path: Path, methods: Mapping[str, Method]) -> dict[str, dict[str, Settings]]:
    """Return the settings that tuning chose, by task and method.

    Raises:
        ValueError: if the file is no tuning, or names a setting that a method does not have.
    """
    chosen: dict[str, dict[str, Settings]] = {}
    for task, entries in _read(path)["tasks"].items():
        for name, entry in entries.items():
            if entry["settings"] is None or name not in methods:
                continue
            for setting in entry["settings"]:
                check_choice(f"{path}: a setting of {name}", setting, methods[name].settings)
            chosen.setdefault(task, {})[name] = entry["settings"]
    return chosen


def _combinations(grid: Grid) -> Iterator[Settings]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be the JSON file of a tuning: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        raise ValueError(f"{path} must be the JSON file of a tuning, got no tasks")
    return content


def _calls(method: Method) -> int:
    return _CALLS if _CALLS in method.calls else min(method.calls)
