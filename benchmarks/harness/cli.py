"""The command lines of run.py, tune.py and report.py."""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NoReturn, TypeAlias

import torch
from torch import Tensor

from baselines.interface import Method, Models
from baselines.registry import find_methods
from harness.cache import Cache, describe_environment, make_key, make_record, narrow
from harness.headline import MARKS, headline
from harness.problems import (
    DATA_VARIABLE,
    KnownProblem,
    find_test_set,
    find_validation_set,
    load_images,
    make_problem,
)
from harness.records import METRICS, RECORDS, Record, read_records
from harness.runner import Row, Setup, choose_calls, plan_rows, run_row
from harness.scores import applicable, choose_metrics
from harness.tuning import (
    Plan,
    estimate_costs,
    fit_plan,
    list_searches,
    open_tuning,
    read_tuned,
    tune,
)
from ncvsd_inverse import CheckpointError, list_tasks, load_prior, write_image
from ncvsd_inverse.checks import check_choice, check_count
from ncvsd_inverse.files import write_between
from ncvsd_inverse.machine import find_device
from ncvsd_inverse.metrics import SMALLEST_SIDE
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior
from ncvsd_inverse.protocols import SIGMA_Y
from ncvsd_inverse.tasks import task_title

__all__ = ["present", "run", "run_report", "run_tuning"]

_GLANCE_CALLS, _GLANCE_IMAGES, _IMAGES = 10, 16, 100
"""Network calls and images of a run that asks for neither calls nor methods, and images of others:
the first run takes a minute."""

_PICTURES = 4
"""Images of each row whose estimates are kept as pictures."""

_TUNED = Path(__file__).parent.parent / "tuned"
"""Folder of the settings that tuning chose, one file a prior."""

_Methods: TypeAlias = Mapping[str, Method]


def run(methods: _Methods, arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark of a command line; return the exit status, 2 for bad input.

    Args:
        methods: what can be run, by name.
        arguments: of the command line; None: those of this process.
    """
    try:
        args = _run_parser().parse_args(arguments)
        glances = not args.methods and not args.nfe
        if glances:
            args.nfe = [_GLANCE_CALLS]
        if args.images is None:
            args.images = _GLANCE_IMAGES if glances else _IMAGES
        setup, problems, chosen, notices = _prepare(args, methods)
        rows = _plan(args, methods, setup, problems, chosen)
        cache = Cache(args.out)
        cache.claim(_shared_settings(setup), setup.images.hashes)
    except (ValueError, TypeError, CheckpointError, OSError) as error:
        return _refuse(error)
    process, processes = _place()
    if glances:
        notices.append(
            f"a glance: {args.images} images, methods at {_GLANCE_CALLS} calls; --nfe, --methods "
            "and --images ask for others"
        )
    if process == 0:
        for notice in notices:
            print(notice)
        _keep_problems(cache, problems)
    environment = {**describe_environment(setup.device), "batch_size": str(setup.batch_size)}
    with _together(processes):
        for number in range(process, len(rows), processes):
            row = rows[number]
            record, known = _measure(cache, setup, problems[row.task], row, environment)
            state = ", as recorded" if known else ""
            print(f"[{number + 1}/{len(rows)}] {_summary(record)}{state}", flush=True)
    if process == 0:
        present(read_records(args.out), args.out)
    return 0


def run_tuning(methods: _Methods, arguments: Sequence[str] | None = None) -> int:
    """Tune the methods of a command line; return the exit status, 2 for bad input.

    Args:
        methods: what can be tuned, by name.
        arguments: of the command line; None: those of this process.
    """
    try:
        args = _tune_parser().parse_args(arguments)
        if not args.hours > 0:
            raise ValueError(f"--hours must be positive, got {args.hours:g}")
        check_count("--trials", args.trials)
        args.data = args.data or find_validation_set(args.prior)
        if args.data is None:
            raise ValueError(
                "--data must be given, as there is no validation set of --prior in the folder that "
                f"{DATA_VARIABLE} names"
            )
        setup, problems, chosen, notices = _prepare(args, methods)
        path = args.out or _tuned_file(setup.prior)
        if args.out is None:
            path.parent.mkdir(exist_ok=True)
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise ValueError(f"--out must be a file in a writable folder, got {path}")
        small = min(setup.images.size) < SMALLEST_SIDE["lpips"]
        names = ["psnr"] if small else ["lpips-alex", "lpips-vgg"]
        metrics, _ = choose_metrics(names, setup.images.x0, 1)
        setup = replace(setup, metrics=metrics)
        calls = _calls(args.calls, chosen, args.methods, flag="--calls")
        searches = list_searches(problems, chosen, calls)
        content = open_tuning(setup, {"images": args.images, "trials": args.trials}, path)
        for notice in notices:
            print(notice)
        if "plan" in content:
            plan = Plan(**content["plan"])
            print(f"as in {path}: {plan.describe()}", flush=True)
        else:
            costs = estimate_costs(setup, problems, searches)
            plan = fit_plan(
                searches,
                costs,
                images=len(setup.images.x0),
                trials=args.trials,
                hours=args.hours,
            )
            content["plan"] = asdict(plan)
            print(plan.describe(), flush=True)
    except (ValueError, TypeError, CheckpointError, OSError) as error:
        return _refuse(error)
    started = time.monotonic()
    made = tune(setup, problems, searches, plan, path, content, partial(print, flush=True))
    print(f"{path}: {made} new trials in {(time.monotonic() - started) / 3600:.3g} hours")
    return 0


def run_report(arguments: Sequence[str] | None = None) -> int:
    """Present the records of a folder once more; return the exit status, 2 for bad input."""
    parser = _Parser(description="Write tables, plots, picture grids and the report of a run.")
    parser.add_argument("folder", type=Path, help="results that run.py wrote")
    parser.add_argument("--readme", type=Path, help="file to write the headline into")
    try:
        args = parser.parse_args(arguments)
        records = read_records(args.folder)
        if not records:
            raise ValueError(f"folder must hold {RECORDS}, got {args.folder}")
        if args.readme is not None:
            write_between(args.readme, MARKS, headline(records))
        present(records, args.folder)
    except (ValueError, OSError) as error:
        return _refuse(error)
    return 0


def present(records: Sequence[Record], out: Path) -> None:
    """Write tables, plots, picture grids and the report of all records, and print a table."""
    from rich.console import Console
    from rich.table import Table

    from harness.pictures import write_grids
    from harness.plots import write_plots
    from harness.report import write_report
    from harness.tables import COLUMNS, show_calls, used_columns, write_tables

    columns = [column for column in used_columns(records) if column.name in METRICS]
    seconds = next(column for column in COLUMNS if column.name == "seconds")
    for task, of_task in groupby(sorted(records, key=_place_in_console), lambda r: r.task):
        rows = list(of_task)
        title = f"{task_title(task)}, {' and '.join(map(str, _numbers(rows)))} images"
        table = Table(title=title, box=None, title_justify="left", padding=(0, 1, 0, 0))
        for head in ("method", "calls"):
            table.add_column(head, no_wrap=True)
        for head in (*(column.name.removeprefix("lpips-") for column in columns), "s"):
            table.add_column(head, no_wrap=True, justify="right")
        for record in rows:
            failed = f" ({len(record.failures)} failed)" if record.failures else ""
            means = [column.show(column.value(record)) for column in (*columns, seconds)]
            table.add_row(record.method + failed, show_calls(record), *means)
        Console().print(table)
    for write in (write_tables, write_plots, write_grids, write_report):
        for path in write(records, out):
            print(path)


def _place_in_console(record: Record) -> tuple[int, int, float, str]:
    """Return where a row is shown: by task, number of images, calls and name."""
    return list_tasks().index(record.task), -record.images, record.nfe, record.method


def _numbers(records: Sequence[Record]) -> list[int]:
    """Return the numbers of images of some rows."""
    return sorted({record.images for record in records}, reverse=True)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are exceptions like those of any other bad input."""

    def error(self, message: str) -> NoReturn:
        """Raise the error."""
        raise ValueError(message)


def _shared_arguments(
    parser: argparse.ArgumentParser, *, images: int | None, all_tasks: bool
) -> None:
    """Add the arguments that both commands have."""
    add = parser.add_argument
    names = ", ".join(list_tasks())
    tasks = f"{names}, or all" + ("; all" if all_tasks else "")
    add("--task", nargs="+", action="extend", required=not all_tasks, help=tasks)
    add("--prior", default="ncvsd_faces64", help="distilled prior, a name or path")
    add("--teacher", help="its teacher, a name or path; PRIOR_teacher")
    add("--methods", nargs="+", help="names, or module:NAME or FILE.py:NAME of your own; all")
    number = (
        f"{_IMAGES}; {_GLANCE_IMAGES} without --methods and --nfe" if images is None else images
    )
    add("--images", type=int, default=images, help=f"images, from the first ({number})")
    add("--size", type=int, default=96, help="side of crops for priors of any size (%(default)s)")
    add("--batch-size", type=int, default=16, help="images at a time (%(default)s)")
    add("--seed", type=int, default=0, help="of measurements and methods (%(default)s)")
    add("--device", help="cpu, cuda, ...; cuda where there is one")


def _run_parser() -> argparse.ArgumentParser:
    parser = _Parser(description="Hold restoration methods side by side, per network call.")
    _shared_arguments(parser, images=None, all_tasks=False)
    add = parser.add_argument
    calls = f"network calls, where a method can run; {_GLANCE_CALLS}, of named methods their own"
    add("--nfe", type=int, nargs="+", help=calls)
    add("--slow-images", type=int, default=20, help="images of over 100 calls (%(default)s)")
    add("--draws", type=int, default=1, help="draws an image of methods that sample (%(default)s)")
    add("--metrics", nargs="+", help=f"{', '.join(METRICS)}; all that can be computed")
    add("--data", type=Path, help=f"folder or zip of images; the prior's in ${DATA_VARIABLE}")
    add("--tuned", type=Path, help="settings that tune.py chose; those that come with the prior")
    add("--out", type=Path, default=Path("benchmark"), help="folder of results (%(default)s)")
    return parser


def _tune_parser() -> argparse.ArgumentParser:
    parser = _Parser(description="Choose the settings of methods on validation images.")
    _shared_arguments(parser, images=32, all_tasks=True)
    add = parser.add_argument
    numbers = [4, 10, 20, 100, 1000]
    add("--calls", type=int, nargs="+", default=numbers, help="network calls (%(default)s)")
    add("--trials", type=int, default=8, help="trials of each search (%(default)s)")
    add("--hours", type=float, default=12.0, help="time it may take, else cut (%(default)s)")
    add("--data", type=Path, help=f"folder or zip of images; the prior's in ${DATA_VARIABLE}")
    add("--out", type=Path, help="JSON file, gone on with if there; where run.py looks for it")
    parser.set_defaults(draws=1, metrics=("psnr",))
    return parser


def _prepare(
    args: argparse.Namespace, methods: _Methods
) -> tuple[Setup, dict[str, KnownProblem], list[Method], list[str]]:
    """Check what was asked for and load it: setup, problems, methods, and lines to print."""
    args.task = args.task or ["all"]
    for task in args.task:
        check_choice("--task", task, [*list_tasks(), "all"])
    chosen = find_methods(args.methods, methods) if args.methods else list(methods.values())
    for name in ("images", "size", "batch_size", "draws"):
        check_count(f"--{name.replace('_', '-')}", getattr(args, name))
    check_count("--seed", args.seed, least=0)
    device = find_device(args.device)
    student = load_prior(args.prior, device=device)
    if not isinstance(student, NCVSDPrior):
        raise ValueError(f"--prior must be a distilled prior, got {args.prior}, a teacher")
    stem = args.prior.removesuffix(".json").removesuffix(".safetensors")
    teacher = load_prior(args.teacher or f"{stem}_teacher", device=device)
    if not isinstance(teacher, DiffusionPrior):
        raise ValueError(f"--teacher must be a teacher, got {args.teacher}, a distilled prior")
    notices = []
    source = args.data or find_test_set(args.prior)
    if source is None:
        notices.append(
            "no --data, and no test set in the folder that "
            f"{DATA_VARIABLE} names: two pictures that ship with the package stand in"
        )
    images = load_images(source, args.images, prior=student, size=args.size)
    if len(images.x0) < args.images and source is not None:
        notices.append(f"{source} has {len(images.x0)} images")
    metrics, without = choose_metrics(args.metrics, images.x0, args.draws)
    setup = Setup(
        models=Models(teacher, student, min(teacher.sigma_max, student.sigma_max)),
        prior=Path(stem).name,
        prior_sha256={"student": _digest(student), "teacher": _digest(teacher)},
        card_sha256=_card_sha256(student),
        images=images,
        metrics=metrics,
        seed=args.seed,
        batch_size=args.batch_size,
        device=device,
    )
    tasks = list_tasks() if "all" in args.task else list(dict.fromkeys(args.task))
    problems = {name: make_problem(name, images, seed=args.seed, device=device) for name in tasks}
    return setup, problems, chosen, notices + without


def _plan(
    args: argparse.Namespace,
    methods: _Methods,
    setup: Setup,
    problems: Mapping[str, KnownProblem],
    chosen: Sequence[Method],
) -> list[Row]:
    """Return the rows that were asked for."""
    check_count("--slow-images", args.slow_images)
    calls = {method.name: method.calls for method in chosen}
    if args.nfe:
        calls = _calls(args.nfe, chosen, args.methods, flag="--nfe")
    own = _tuned_file(setup.prior)
    tuned = args.tuned or (own if own.exists() else None)
    known = {**methods, **{method.name: method for method in chosen}}
    rows = plan_rows(
        problems,
        chosen,
        calls=calls,
        images=len(setup.images.x0),
        slow_images=args.slow_images,
        draws=args.draws,
        tuned={} if tuned is None else read_tuned(tuned, known),
    )
    if not rows:
        raise ValueError(
            "--methods must have one that takes the operator of --task, got "
            f"{', '.join(method.name for method in chosen)} for {', '.join(problems)}"
        )
    return rows


def _calls(
    asked: Sequence[int], chosen: Sequence[Method], named: Sequence[str] | None, *, flag: str
) -> dict[str, tuple[int, ...]]:
    """Return the numbers of network calls by method; ValueError if a named one has none."""
    for nfe in asked:
        check_count(flag, nfe)
    calls = {method.name: choose_calls(method, asked, named=bool(named)) for method in chosen}
    for method in chosen:
        if named and not calls[method.name]:
            raise ValueError(
                f"{flag} must be at least {method.least_calls} for {method.name}, got "
                f"{', '.join(map(str, asked))}"
            )
    return calls


def _tuned_file(prior: str) -> Path:
    """Return where the settings that were tuned for a prior are kept."""
    return _TUNED / f"{prior.removeprefix('ncvsd_')}.json"


def _shared_settings(setup: Setup) -> dict[str, object]:
    """Return what all rows of a results folder share, beside the images."""
    return {
        "prior": setup.prior,
        "prior_sha256": dict(setup.prior_sha256),
        "seed": setup.seed,
        "sigma_y": SIGMA_Y,
        "size": setup.images.size,
    }


def _measure(
    cache: Cache,
    setup: Setup,
    problem: KnownProblem,
    row: Row,
    environment: Mapping[str, str],
) -> tuple[Record, bool]:
    """Return the record of a row, and whether it was there; a new one is kept with its pictures."""
    task = problem.task
    record = cache.find(make_key(setup, row, task), applicable(setup.metrics, row.draws))
    known = record is not None
    if record is None:

        def keep(number: int, x0: Tensor) -> None:
            if number < _PICTURES:
                name = f"{row.method.name}-{row.nfe}"
                write_image(cache.picture(row.task, name, number), x0)

        outcome = run_row(setup, problem, row, keep)
        record = make_record(setup, row, task, outcome, environment)
        cache.save(record)
    if row.also is not None:
        fewer = replace(row, images=row.also, also=None)
        cache.save(narrow(record, setup, fewer, task))
    return record, known


def _summary(record: Record) -> str:
    """Return a line on a record."""
    means = {name: record.mean(name) for name in record.values}
    shown = [f"{name} {mean:.4g}" for name, mean in means.items() if mean is not None]
    failed = f", {len(record.failures)} failed" if record.failures else ""
    return (
        f"{record.task} {record.method}-{record.nfe}: {record.images} images{failed}, "
        f"{record.seconds:.3g} s each, {', '.join(shown)}"
    )


def _keep_problems(cache: Cache, problems: Mapping[str, KnownProblem]) -> None:
    """Write the first images of each task and their measurements as pictures."""
    for name, problem in problems.items():
        for number in range(min(_PICTURES, len(problem.x0))):
            image = slice(number, number + 1)
            write_image(cache.picture(name, "truth", number), problem.x0[image])
            seen = problem.task.picture(problem.y[image])
            if seen is not None:
                write_image(cache.picture(name, "measurement", number), seen)


def _digest(prior: NCVSDPrior | DiffusionPrior) -> str:
    """Return a hash of a prior's weights and of what its card makes of them."""
    assert prior.card is not None
    return prior.card.weights_digest


def _card_sha256(prior: NCVSDPrior) -> str:
    """Return a hash of a prior's statistics and settings of points, "" for neither."""
    card = prior.card
    if card is None or (card.statistics is None and card.points is None):
        return ""
    statistics = None if card.statistics is None else card.statistics.to_dict()
    points = None if card.points is None else sorted(map(str, card.points.items()))
    return hashlib.sha256(json.dumps([statistics, points]).encode()).hexdigest()


def _place() -> tuple[int, int]:
    """Return the number of this process and how many there are, as launchers tell."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def _together(processes: int) -> Iterator[None]:
    """End when all processes have come to the end."""
    if processes == 1:
        yield
        return
    # Processes wait for the slowest: the default would give up after half an hour.
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _refuse(error: Exception) -> int:
    if _place()[0] == 0:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
