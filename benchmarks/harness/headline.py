"""The rows and claims that the project's README shows, from records."""

import math
from collections.abc import Sequence

from harness.records import CONFIDENCE, Record
from harness.runner import is_ours
from harness.tables import OURS_CALLS, OURS_SHOWN
from ncvsd_inverse import list_tasks
from ncvsd_inverse.tasks import task_title

__all__ = ["MARKS", "headline"]

MARKS = ("<!-- written by benchmarks/report.py -->", "<!-- end of benchmarks/report.py -->")
"""Between which README holds what `headline` returns."""

_METRICS = {"psnr": ("PSNR", 2), "lpips-alex": ("lpips-alex", 4), "lpips-vgg": ("lpips-vgg", 4)}
"""What is shown, with its name and decimals."""

_DRAW = "ncvsd"
"""Method whose row is a single draw."""

_TEACHER = "teacher-gaussian"
"""Our loop with the teacher alone, beside which distillation shows what it buys."""


def headline(records: Sequence[Record]) -> str:
    """Return Markdown: ours beside the best of the others at each number of calls, and the count.

    The best is that with the least geometric mean of the two lpips. Rows count that are over as
    many images as any.

    Args:
        records: rows of one prior; tasks without our point estimate or without a rival are left
            out.

    Raises:
        ValueError: if no task has both.
    """
    most = max((record.images for record in records), default=0)
    whole = [r for r in records if r.images == most and not r.failures and _score(r) < math.inf]
    present = {record.task for record in whole}
    ours = {(r.task, r.method): r for r in whole if r.nfe == OURS_CALLS and _is_ours(r)}
    rivals = [r for r in whole if not _is_ours(r) and r.network != "none"]
    tasks = [
        task
        for task in list_tasks()
        if task in present
        and (task, OURS_SHOWN) in ours
        and any(rival.task == task for rival in rivals)
    ]
    if not tasks:
        raise ValueError(f"records must have {OURS_SHOWN} at {OURS_CALLS} calls beside rivals")
    shared = [{r.nfe for r in rivals if r.task == task} for task in tasks]
    counts = [calls for calls in sorted(set.intersection(*shared)) if calls >= OURS_CALLS]
    heads = ["task", f"ours, {OURS_CALLS} calls", "a draw of ours"]
    heads += [f"best other, {calls} calls" for calls in counts]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    won = {calls: _Count() for calls in counts}
    drawn, beside = _Count(), _Count()
    for task in tasks:
        point, draw = ours[task, OURS_SHOWN], ours.get((task, _DRAW))
        cells = [task_title(task), _figures(point), "-" if draw is None else _figures(draw)]
        for calls in counts:
            best = min((r for r in rivals if (r.task, r.nfe) == (task, calls)), key=_score)
            cells.append(f"{_figures(best)} {best.title}")
            won[calls].add(point, best)
            if calls == OURS_CALLS and draw is not None and best.samples:
                drawn.add(draw, best)
        lines.append("| " + " | ".join(cells) + " |")
        if teacher := ours.get((task, _TEACHER)):
            beside.add(point, teacher)
    for calls, count in won.items():
        start = f"Against the best other of {calls} calls, by {CONFIDENCE:.0%} intervals, ours is"
        lines += ["", f"{start} {count}."]
    if drawn.rows:
        start = (
            f"Those of {OURS_CALLS} calls are single draws in {drawn.rows} of {len(tasks)} tasks;"
        )
        lines += ["", f"{start} beside them a draw of ours is {drawn}."]
    if beside.rows:
        lines += ["", f"Against our own loop with the undistilled teacher it is {beside}."]
    return "\n".join(lines)


class _Count:
    """How often a row is ahead, level and behind, by metric."""

    def __init__(self) -> None:
        self.rows = 0
        self._places = {name: [0, 0, 0] for name in _METRICS}

    def add(self, point: Record, other: Record) -> None:
        """Count a row beside another."""
        self.rows += 1
        for name, places in self._places.items():
            places[_standing(point, other, name)] += 1

    def __str__(self) -> str:
        return "; ".join(
            f"by {_METRICS[name][0]} ahead in {ahead}, level in {level} and behind in {behind}"
            for name, (ahead, level, behind) in self._places.items()
        )


def _is_ours(record: Record) -> bool:
    return is_ours(record.method) or record.method == _TEACHER


def _score(record: Record) -> float:
    """Return the geometric mean of the two lpips."""
    alex, vgg = record.mean("lpips-alex"), record.mean("lpips-vgg")
    return math.inf if alex is None or vgg is None else math.sqrt(alex * vgg)


def _figures(record: Record) -> str:
    """Return the means of a row."""
    values = ((record.mean(name), decimals) for name, (_, decimals) in _METRICS.items())
    return " / ".join("-" if mean is None else f"{mean:.{decimals}f}" for mean, decimals in values)


def _standing(point: Record, best: Record, name: str) -> int:
    """Return 0 if ours is clearly ahead over the same images, 2 if clearly behind, else 1."""
    gap = point.difference(best, name)
    if gap is None or not gap.is_clear:
        return 1
    return 0 if (gap.mean > 0) == (name == "psnr") else 2
