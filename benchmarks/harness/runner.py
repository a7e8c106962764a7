"""Rows of the benchmark: which there are, and how one is measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from baselines.interface import Method, Models, Problem, Settings
from harness.problems import Images, KnownProblem
from harness.scores import applicable, score
from ncvsd_inverse import DivergenceError
from ncvsd_inverse.checks import check_shape
from ncvsd_inverse.machine import PeakMemory, count_passes, time_now
from ncvsd_inverse.protocols import LinearOperator

__all__ = [
    "Cost",
    "Outcome",
    "Row",
    "Setup",
    "applies",
    "choose_calls",
    "is_ours",
    "measure_call",
    "nearest_calls",
    "plan_rows",
    "run_row",
]

MANY_CALLS = 100
"""Methods of more network passes than this are run on fewer images."""

OURS = "ncvsd"
"""What the names of our own methods begin with."""


@dataclass(frozen=True, eq=False)
class Setup:
    """What all rows share.

    Attributes:
        models: the networks.
        prior: name of the student.
        prior_sha256: of the weights of student and teacher, by "student" and "teacher".
        card_sha256: of the statistics and settings of points that the student carries, or "".
        images: the true images.
        metrics: names of the metrics.
        seed: of measurements and methods.
        batch_size: most images at a time.
        device: where everything runs.
    """

    models: Models
    prior: str
    prior_sha256: Mapping[str, str]
    card_sha256: str
    images: Images
    metrics: tuple[str, ...]
    seed: int
    batch_size: int
    device: torch.device


@dataclass(frozen=True, eq=False)
class Row:
    """One method on one task with one number of network passes.

    Attributes:
        task: task name.
        method: the method.
        nfe: network passes for each image.
        settings: its settings.
        tuned: network passes at which tuning found them; None: they are the method's own.
        draws: draws for each image.
        images: how many, from the first.
        also: fewer images, over which the row is recorded a second time; None: it is not.
    """

    task: str
    method: Method
    nfe: int
    settings: Settings
    tuned: int | None
    draws: int
    images: int
    also: int | None = None


@dataclass(frozen=True)
class Cost:
    """What calls took. The sum of two is that of both.

    Attributes:
        images: images restored.
        forward: images that went through a network.
        backward: gradients of images that went back through a network.
        seconds: wall time.
        peak: most bytes held at any time.
    """

    images: int = 0
    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    peak: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """Return the cost of both."""
        return Cost(
            self.images + other.images,
            self.forward + other.forward,
            self.backward + other.backward,
            self.seconds + other.seconds,
            max(self.peak, other.peak),
        )


class Outcome(NamedTuple):
    """What a method achieved.

    Attributes:
        values: for each metric one number an image, None where the image failed.
        failures: image number -> what went wrong.
        cost: what the restored images took.
    """

    values: dict[str, tuple[float | None, ...]]
    failures: dict[str, str]
    cost: Cost


def is_ours(method: str) -> bool:
    """Return whether a method, by name, is one of this library's own."""
    return method.startswith(OURS)


def applies(method: Method, problem: KnownProblem) -> bool:
    """Return whether a method takes the operator of a task."""
    return not method.linear_only or isinstance(problem.task.operator, LinearOperator)


def choose_calls(method: Method, asked: Sequence[int], *, named: bool) -> tuple[int, ...]:
    """Return those of the numbers of network passes that were asked for at which a method is run.

    Those are the numbers at which it can be run; above 100, as far as its own rows go.

    Args:
        method: the method; (0,) without a network.
        asked: numbers of network passes.
        named: whether the method was asked for by name, and so is run above 100 too.
    """
    if method.network == "none":
        return (0,)
    most = math.inf if named else max(MANY_CALLS, *method.calls)
    return tuple(nfe for nfe in asked if method.least_calls <= nfe <= most)


def nearest_calls(tuned: Mapping[int, Settings], calls: int) -> int | None:
    """Return which of the tuned numbers of calls is the nearest by ratio; None if there is none.

    Of two that are as near it is the smaller. Above 100 none of up to 100 is near enough: what few
    calls want is far from what many do.
    """

    def ratio(known: int) -> float:
        return abs(math.log(max(known, 1) / max(calls, 1)))

    near = [known for known in sorted(tuned) if calls <= MANY_CALLS or known > MANY_CALLS]
    return min(near, key=ratio, default=None)


def plan_rows(
    problems: Mapping[str, KnownProblem],
    methods: Sequence[Method],
    *,
    calls: Mapping[str, Sequence[int]],
    images: int,
    slow_images: int,
    draws: int,
    tuned: Mapping[str, Mapping[str, Mapping[int, Settings]]],
) -> list[Row]:
    """Return the rows of a run, task by task; methods that do not apply to a task have none.

    Args:
        problems: the tasks by name.
        methods: the methods.
        calls: by method name, the numbers of network passes to run it at.
        images: images for methods of up to 100 passes.
        slow_images: images for those of more; beside such, our own are recorded over these too.
        draws: draws an image for methods that sample; the others give one estimate.
        tuned: settings by task, method and network passes, in place of the methods' own; those of
            the nearest number of passes are taken.
    """
    rows = []
    few = min(slow_images, images)
    for task, problem in problems.items():
        fitting = [method for method in methods if applies(method, problem)]
        rivals = (method for method in fitting if not is_ours(method.name))
        has_slow = any(nfe > MANY_CALLS for rival in rivals for nfe in calls[rival.name])
        for method in fitting:
            better = tuned.get(task, {}).get(method.name, {})
            for nfe in dict.fromkeys(calls[method.name]):
                known = nearest_calls(better, nfe)
                found = None if known is None else better[known]
                slow = nfe > MANY_CALLS and not is_ours(method.name)
                rows.append(
                    Row(
                        task=task,
                        method=method,
                        nfe=nfe,
                        settings=method.settings_at(nfe, found),
                        tuned=known,
                        draws=draws if method.samples else 1,
                        images=few if slow else images,
                        also=few if is_ours(method.name) and has_slow and few < images else None,
                    )
                )
    return rows


def run_row(
    setup: Setup,
    problem: KnownProblem,
    row: Row,
    keep: Callable[[int, Tensor], None] | None = None,
) -> Outcome:
    """Restore and judge the images of a row, batch by batch.

    A batch that diverges is restored again image by image, so that only what fails by itself is
    a failure. Passes, seconds and memory are those of the calls that returned.

    Args:
        setup: what all rows share.
        problem: the row's task on all images.
        row: the row.
        keep: called with the number of each restored image and its first estimate (1, C, H, W).
    """
    numbers = range(row.images)
    pending = [
        numbers[first : first + setup.batch_size]
        for first in range(0, row.images, setup.batch_size)
    ]
    values: dict[str, list[float | None]] = {
        name: [None] * row.images for name in applicable(setup.metrics, row.draws)
    }
    failures: dict[str, str] = {}
    cost = Cost()
    while pending:
        batch = pending.pop(0)
        part = slice(batch.start, batch.stop)
        try:
            draws, spent = _restore(setup, problem, row, batch)
        except DivergenceError as error:
            if len(batch) > 1:
                pending[:0] = [range(i, i + 1) for i in batch]
            else:
                failures[str(batch.start)] = " ".join(str(error).split())
            continue
        cost += spent
        scores = score(setup.metrics, draws, problem.x0[part], problem.y[part], problem.task)
        for name, found in scores.items():
            values[name][part] = found
        for number, x0 in zip(batch, draws[0], strict=True):
            if keep is not None:
                keep(number, x0[None])
    return Outcome({name: tuple(entries) for name, entries in values.items()}, failures, cost)


def _restore(setup: Setup, problem: KnownProblem, row: Row, batch: range) -> tuple[Tensor, Cost]:
    """Return draws of the images of a batch, (S, B, C, H, W); DivergenceError if one fails."""
    part = slice(batch.start, batch.stop)
    draws, cost = [], Cost()
    for draw in range(row.draws):
        given = Problem(
            problem.y[part],
            problem.task.operator,
            problem.task.sigma_y,
            keys=tuple((setup.seed, image, draw) for image in batch),
        )
        x0, spent = measure_call(
            partial(row.method.run, given, setup.models, row.nfe, row.settings),
            setup.models,
            setup.device,
        )
        check_shape(f"the images restored by {row.method.name}", x0, problem.x0[part].shape)
        if not bool(x0.isfinite().all()):
            raise DivergenceError("the restored image must be finite, got NaN or infinity")
        draws.append(x0)
        cost += spent
    return torch.stack(draws), cost


def measure_call(
    call: Callable[[], Tensor], models: Models, device: torch.device
) -> tuple[Tensor, Cost]:
    """Return the images (B, C, H, W) that a call restores, and what it took.

    Args:
        call: restores a batch by the networks of `models`.
        models: the networks whose passes are counted.
        device: where it computes, and whose peak memory is measured during the call; see
            `PeakMemory`.
    """
    memory = PeakMemory(device)
    with count_passes(models.networks) as passes:
        memory.reset()
        started = time_now(device)
        restored = call()
        seconds = time_now(device) - started
    peak = memory.peak()
    return restored, Cost(len(restored), passes.forward, passes.backward, seconds, peak)
