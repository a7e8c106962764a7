"""Settings chosen on validation images, by one budget for all methods, kept as JSON data.

A method's settings are searched for each task and number of network calls by as many trials as
those of any other method. `Search` says which values each trial takes; `Plan` how many trials and
images the time allows.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from baselines.interface import Ladder, Method, Settings
from harness.cache import hash_code, write_json
from harness.problems import KnownProblem
from harness.records import check_number
from harness.runner import MANY_CALLS, Row, Setup, applies, run_row
from ncvsd_inverse.checks import check_choice
from ncvsd_inverse.machine import time_now

__all__ = [
    "Cost",
    "Plan",
    "Position",
    "Search",
    "Tuned",
    "estimate_costs",
    "fit_plan",
    "list_searches",
    "open_tuning",
    "read_tuned",
    "tune",
]

_FEW_CALLS = 20
"""Most network calls of a trial that has all images; above, a search has half of the images and
three quarters of the trials, and starts from what fewer calls found."""

_SLOW_IMAGES = 8
"""Images of the trials at more than 100 network calls."""

_LEAST_IMAGES, _LEAST_TRIALS = 8, 4
"""What is left at least of images and trials when they are cut."""

_FINEST = 5
"""How often a step is halved."""

_FARTHEST = 6
"""Most whole steps from the best, where nothing nearer is new."""

_PROBE_IMAGES, _PROBE_CALLS = 8, (4, 10)
"""Images and network calls of the runs from whose time that of all is estimated."""

Position: TypeAlias = tuple[float, ...]
"""Where a trial is: steps from the start, one number for each setting."""

Tuned: TypeAlias = Mapping[str, Mapping[str, Mapping[int, Settings]]]
"""Settings that tuning chose by task, method and number of network calls."""


class Search:
    """A pattern search: where the best so far is on an edge, it widens; else it looks between.

    A trial moves one setting from the best position so far: first, in the order of the settings, a
    whole step outwards where no farther value of that setting was tried; then whole steps, half
    steps and so on to either side, then farther ones. What comes next follows from the scores so
    far and from nothing else. It ends early where bounds and listed values leave nothing new.

    Args:
        method: whose settings are searched.
        calls: network calls of its runs.
        start: where the search begins; names that are not searched are of no account.
    """

    def __init__(self, method: Method, calls: int, start: Settings) -> None:
        self.ladders = method.search
        self.calls = calls
        self.start = {name: start[name] for name in method.search}

    def settings(self, position: Position) -> dict[str, float]:
        """Return the values at a position, by name."""
        return {
            name: ladder.value(self.start[name], steps, self.calls)
            for (name, ladder), steps in zip(self.ladders.items(), position, strict=True)
        }

    def propose(self, tried: Mapping[Position, float]) -> Position | None:
        """Return where the next trial is; None if there is nothing new.

        Args:
            tried: scores by position, in the order of the trials; lower is better, infinite where
                the trial failed.
        """
        if not tried:
            return (0.0,) * len(self.ladders)
        best = min(tried, key=lambda position: tried[position])
        known = [self.settings(position) for position in tried]
        for candidate in (*self._outwards(best, known), *self._around(best)):
            if self.settings(candidate) not in known:
                return candidate
        return None

    def edges(self, tried: Mapping[Position, float]) -> list[str]:
        """Return the settings of which the best value is the largest or smallest that was tried."""
        best = self.settings(min(tried, key=lambda position: tried[position]))
        known = [self.settings(position) for position in tried]
        return [
            name
            for name in self.ladders
            if best[name] in (max(s[name] for s in known), min(s[name] for s in known))
        ]

    def _outwards(self, best: Position, known: Sequence[Settings]) -> Iterator[Position]:
        values = self.settings(best)
        for place, name in enumerate(self.ladders):
            for way, farthest in ((1.0, max), (-1.0, min)):
                if values[name] == farthest(settings[name] for settings in known):
                    yield self._moved(best, place, way)

    def _around(self, best: Position) -> Iterator[Position]:
        near = (0.5**halvings for halvings in range(_FINEST + 1))
        for steps in (*near, *range(2, _FARTHEST + 1)):
            for place in range(len(best)):
                for way in (1.0, -1.0):
                    yield self._moved(best, place, way * steps)

    def _moved(self, position: Position, place: int, steps: float) -> Position:
        name, ladder = list(self.ladders.items())[place]
        moved = ladder.bound(self.start[name], position[place] + steps, self.calls)
        return (*position[:place], moved, *position[place + 1 :])


@dataclass(frozen=True)
class Plan:
    """How many images and trials a tuning has, the same for all methods.

    Attributes:
        images: of each trial at up to 20 network calls; half as many up to 100.
        trials: of each search at up to 20 network calls; three quarters as many up to 100.
        slow_images: of each trial at more than 100.
        slow_trials: of each search at more than 100.
        hours: estimated time on this machine.
        cut: what was left out, and why; "" if nothing was.
    """

    images: int
    trials: int
    slow_images: int
    slow_trials: int
    hours: float = 0.0
    cut: str = ""

    def effort(self, calls: int) -> tuple[int, int]:
        """Return images and trials of a search at so many network calls."""
        if calls > MANY_CALLS:
            return self.slow_images, self.slow_trials
        if calls > _FEW_CALLS:
            return max((self.images + 1) // 2, self.slow_images), (3 * self.trials + 3) // 4
        return self.images, self.trials

    def describe(self) -> str:
        """Return a line on the plan."""
        return (
            f"{self.images} images and {self.trials} trials, "
            + "".join(
                f"above {calls} calls {images} and {trials}, "
                for calls in (_FEW_CALLS, MANY_CALLS)
                for images, trials in [self.effort(calls + 1)]
            )
            + f"estimated {self.hours:.3g} hours"
            + (f"; cut: {self.cut}" if self.cut else "")
        )


@dataclass(frozen=True)
class Cost:
    """Seconds of a run for each image: `fixed` and `call` for each network call."""

    fixed: float
    call: float = 0.0

    def seconds(self, calls: int) -> float:
        """Return the seconds of an image."""
        return self.fixed + self.call * calls


_Searches: TypeAlias = Sequence[tuple[str, Method, int]]
"""Task, method and network calls of each search."""

_Costs: TypeAlias = Mapping[tuple[str, str], Cost]
"""What runs cost, by task and method."""


def list_searches(
    problems: Mapping[str, KnownProblem],
    methods: Sequence[Method],
    calls: Mapping[str, Sequence[int]],
) -> list[tuple[str, Method, int]]:
    """Return the searches, task by task; methods without free settings have none.

    Args:
        problems: the tasks by name.
        methods: the methods.
        calls: by method name, its numbers of network calls.
    """
    return [
        (task, method, nfe)
        for task, problem in problems.items()
        for method in methods
        if method.search and applies(method, problem)
        for nfe in sorted(calls[method.name])
    ]


def estimate_costs(
    setup: Setup, problems: Mapping[str, KnownProblem], searches: _Searches
) -> dict[tuple[str, str], Cost]:
    """Return what runs cost, from timed ones at few calls, each after one that is not timed."""
    num = min(_PROBE_IMAGES, len(setup.images.x0))
    costs = {}
    for task, method, _ in searches:
        if (task, method.name) in costs:
            continue
        most = max(nfe for name, other, nfe in searches if (name, other) == (task, method))
        few = sorted({min(max(nfe, method.least_calls), most) for nfe in _PROBE_CALLS})
        _time_run(setup, problems[task], method, few[0], 1)
        times = [_time_run(setup, problems[task], method, nfe, num) / num for nfe in few]
        call = max(0.0, (times[-1] - times[0]) / (few[-1] - few[0])) if len(few) > 1 else 0.0
        costs[task, method.name] = Cost(max(0.0, times[-1] - call * few[-1]), call)
    return costs


def _time_run(setup: Setup, problem: KnownProblem, method: Method, nfe: int, images: int) -> float:
    started = time_now(setup.device)
    run_row(setup, problem, _row(problem, method, nfe, method.settings_at(nfe), images))
    return time_now(setup.device) - started


def fit_plan(searches: _Searches, costs: _Costs, *, images: int, trials: int, hours: float) -> Plan:
    """Return the largest plan that fits the hours: images are cut first, then trials.

    Args:
        searches: what is searched.
        costs: what runs cost.
        images: most images of a trial.
        trials: most trials of a search.
        hours: what it may take.

    Raises:
        ValueError: if the smallest plan takes longer.
    """
    least_images, least_trials = min(_LEAST_IMAGES, images), min(_LEAST_TRIALS, trials)
    sizes = [(num, trials) for num in range(images, least_images - 1, -1)]
    sizes += [(least_images, num) for num in range(trials - 1, least_trials - 1, -1)]
    full = 0.0
    for num, tries in sizes:
        plan = Plan(num, tries, min(_SLOW_IMAGES, num), (tries + 1) // 2)
        took = _hours(plan, searches, costs)
        full = full or took
        if took <= hours:
            cut = f"{images} images and {trials} trials would take {full:.3g} hours of {hours:.3g}"
            return replace(plan, hours=float(f"{took:.3g}"), cut="" if took == full else cut)
    raise ValueError(
        f"--hours must be at least {took:.3g} for these tasks, methods and calls, with "
        f"{least_images} images and {least_trials} trials, got {hours:g}"
    )


def _hours(plan: Plan, searches: _Searches, costs: _Costs) -> float:
    seconds = 0.0
    for task, method, nfe in searches:
        seconds += math.prod(plan.effort(nfe)) * costs[task, method.name].seconds(nfe)
    return seconds / 3600


def open_tuning(setup: Setup, asked: Mapping[str, object], path: Path) -> dict[str, Any]:
    """Return what a tuning's file holds, or a new one would.

    Args:
        setup: images, networks and the metrics of the score.
        asked: the numbers of images and trials that were asked for.
        path: the file.

    Raises:
        ValueError: if `path` holds the tuning of other settings.
    """
    header = {
        "prior": setup.prior,
        "prior_sha256": dict(setup.prior_sha256),
        "data": setup.images.name,
        "data_sha256": setup.images.sha256(len(setup.images.x0)),
        "size": list(setup.images.size),
        "seed": setup.seed,
        "score": _name_score(setup.metrics),
        "asked": dict(asked),
    }
    content = _read(path) if path.exists() else {**header, "tasks": {}}
    differing = [name for name in header if content.get(name) != header[name]]
    if differing:
        raise ValueError(
            f"--out must be the tuning of the same settings, got {path}, where other: "
            + ", ".join(differing)
        )
    return content


def _name_score(metrics: Sequence[str]) -> str:
    return metrics[0] if len(metrics) == 1 else f"geometric mean of {' and '.join(metrics)}"


def tune(
    setup: Setup,
    problems: Mapping[str, KnownProblem],
    searches: _Searches,
    plan: Plan,
    path: Path,
    content: dict[str, Any],
    report: Callable[[str], None],
) -> int:
    """Search the settings of each method at each number of calls and keep the best.

    All methods see the same images and measurements and have the same number of trials; one whose
    bounds leave nothing new has fewer. The score is the geometric mean of the metrics' means over
    the images, those of the tables. A trial with which an image fails has none and is never chosen;
    if all fail, nothing is. Trials that `content` holds of the same search and code are kept, so
    that a stopped run goes on to the same end.

    Args:
        setup: images, networks, and the metrics of the score: one, or several where lower is
            better.
        problems: the tasks by name.
        searches: task, method and network calls, the fewest calls first.
        plan: numbers of images and trials.
        path: the JSON file, written after every trial.
        content: what it holds; filled in place.
        report: called with a line on each trial.

    Returns:
        How many trials were made.
    """
    made = 0
    for task, method, nfe in searches:
        entry = _Entry(setup, problems[task], method, nfe, plan, content)
        for line in entry.trials():
            write_json(path, content)
            report(line)
            made += 1
    return made


class _Entry:
    """The search of one method on one task at one number of calls, an entry of the file.

    Args:
        setup: images, networks and metrics.
        problem: the task.
        method: the method.
        nfe: network calls.
        plan: numbers of images and trials.
        content: the file's content, filled in place.
    """

    def __init__(
        self,
        setup: Setup,
        problem: KnownProblem,
        method: Method,
        nfe: int,
        plan: Plan,
        content: dict[str, Any],
    ) -> None:
        self.setup = setup
        self.problem = problem
        self.method = method
        self.nfe = nfe
        self.images, self.most = plan.effort(nfe)
        entries = content["tasks"].setdefault(problem.task.name, {}).setdefault(method.name, {})
        self.starts = _starts(method, nfe, entries)
        first, *others = self.starts
        known = {
            "code": hash_code(method.run),
            "images": self.images,
            "fixed": {
                name: value for name, value in method.settings.items() if name not in method.search
            },
            "start": first,
            **({"other_starts": others} if others else {}),
            "search": {name: _describe(ladder) for name, ladder in method.search.items()},
        }
        new = {**known, "trials": [], "settings": None, "score": None, "edge": []}
        before = entries.get(str(nfe), {})
        same = all(before.get(name) == value for name, value in known.items())
        self.entry: dict[str, Any] = before if before and same else new
        entries[str(nfe)] = self.entry

    def trials(self) -> Iterator[str]:
        """Make the trials that are missing; yield a line after each."""
        made, best = 0, math.inf
        search, tried = Search(self.method, self.nfe, self.starts[0]), dict[Position, float]()
        for start in self.starts[: self.most]:
            score, is_new = self._score(made, start)
            made += 1
            if made == 1 or score < best:
                best, search = score, Search(self.method, self.nfe, start)
                tried = {(0.0,) * len(start): score}
            if is_new:
                self._choose(search, tried)
                yield self._line()
        while made < self.most:
            position = search.propose(tried)
            if position is None:
                return
            tried[position], is_new = self._score(made, search.settings(position))
            made += 1
            if is_new:
                self._choose(search, tried)
                yield self._line()

    def _score(self, number: int, settings: Settings) -> tuple[float, bool]:
        """Return the score of a trial, lower is better, and whether it was made just now."""
        done: list[dict[str, Any]] = self.entry["trials"]
        is_new = number == len(done)
        if is_new:
            done.append({"settings": dict(settings), **self._try(settings)})
        score = done[number]["score"]
        lower = len(self.setup.metrics) > 1
        return math.inf if score is None else score if lower else -score, is_new

    def _try(self, settings: Settings) -> dict[str, Any]:
        given = self.method.settings_at(self.nfe, settings)
        row = _row(self.problem, self.method, self.nfe, given, self.images)
        try:
            outcome = run_row(self.setup, self.problem, row)
        except ValueError as error:  # settings that do not go together
            return {"score": None, "failure": " ".join(str(error).split())}
        if outcome.failures:
            return {"score": None, "failure": next(iter(outcome.failures.values()))}
        means = [
            fmean(entry for entry in entries if entry is not None)
            for entries in outcome.values.values()
        ]
        score = means[0] if len(means) == 1 else math.prod(means) ** (1 / len(means))
        return {"score": score}

    def _choose(self, search: Search, tried: Mapping[Position, float]) -> None:
        """Write the best trial, which the search has, into the entry."""
        best = search.settings(min(tried, key=lambda position: tried[position]))
        trial = next(trial for trial in self.entry["trials"] if trial["settings"] == best)
        if trial["score"] is not None:
            self.entry |= {name: trial[name] for name in ("settings", "score")}
            self.entry["edge"] = search.edges(tried)

    def _line(self) -> str:
        trial = self.entry["trials"][-1]
        shown = ", ".join(f"{name} {value:g}" for name, value in trial["settings"].items())
        score = trial["score"]
        outcome = f"failed: {trial['failure']}" if score is None else f"{score:.4f}"
        number = len(self.entry["trials"])
        where = f"{self.problem.task.name} {self.method.name}-{self.nfe}"
        return f"{where} [{number}/{self.most}] {shown}: {outcome}"


def _starts(method: Method, nfe: int, entries: Mapping[str, Any]) -> list[Settings]:
    """Return where a search starts: above 20 calls with what the most calls below found.

    Above 100 calls the method's own settings, which are meant for so many, are tried too.
    """
    own = {name: method.settings[name] for name in method.search}
    below = [int(calls) for calls, entry in entries.items() if entry["settings"] is not None]
    below = [calls for calls in below if calls < nfe]
    if nfe <= _FEW_CALLS or not below:
        return [own]
    found = {**own, **entries[str(max(below))]["settings"]}
    first = {name: found[name] for name in method.search}
    return [first, own] if nfe > MANY_CALLS and first != own else [first]


def _describe(ladder: Ladder) -> dict[str, Any]:
    """Return a ladder as JSON holds it."""
    most = None if ladder.most == math.inf else ladder.most
    return {**asdict(ladder), "most": most, "values": list(ladder.values)}


def _row(problem: KnownProblem, method: Method, nfe: int, settings: Settings, images: int) -> Row:
    return Row(
        task=problem.task.name,
        method=method,
        nfe=nfe,
        settings=settings,
        tuned=None,
        draws=1,
        images=images,
    )


def read_tuned(path: Path, methods: Mapping[str, Method]) -> Tuned:
    """Return the settings that tuning chose, by task, method and number of network calls.

    Raises:
        ValueError: if the file is no tuning, or names a setting that a method does not have.
    """
    chosen: dict[str, dict[str, dict[int, Settings]]] = {}
    for task, found in _read(path)["tasks"].items():
        for name, entries in _object(path, found).items():
            if name not in methods:
                continue
            for calls, entry in _object(path, entries).items():
                is_count = calls.isascii() and calls.isdecimal() and len(calls) < 10
                if not is_count or not isinstance(entry, dict) or "settings" not in entry:
                    raise ValueError(
                        f"{path} must have entries by number of calls, got {calls} for {name}: "
                        "it was written by an older tune.py"
                    )
                if entry["settings"] is None:
                    continue
                for setting, value in _object(path, entry["settings"]).items():
                    check_choice(f"{path}: a setting of {name}", setting, methods[name].settings)
                    check_number(f"{path}: {setting} of {name}", value)
                by_calls = chosen.setdefault(task, {}).setdefault(name, {})
                by_calls[int(calls)] = entry["settings"]
    return chosen


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be the JSON file of a tuning: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        raise ValueError(f"{path} must be the JSON file of a tuning, got no tasks")
    return content


def _object(path: Path, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be the JSON file of a tuning, got a {type(value).__name__}")
    return value
