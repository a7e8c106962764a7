"""Kill commands at random moments, start them again until they end, and look at what came of it.

    python experiments/security/kill.py --kills 50

Each command runs undisturbed once. Then it is started in another folder, killed by SIGKILL at a
moment that is uniform in the time that the first run took, and started again, until it ends; then
the next folder follows, until it was killed as often as `--kills` says. After each kill what it had
kept must be whole and no less than before; at each end everything must be, bit by bit, what the
undisturbed run left, but for times, and no temporary file may lie about. Prints a table, and exits
with 1 if something was lost, differs or failed.

Training keeps its state every 8 steps here, in place of 200, for kills to hit the writing of files.
All is small: 10 kills each take about a minute on one CPU core.
"""

import argparse
import importlib
import itertools
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ncvsd_inverse.cli
from ncvsd_inverse import load_prior
from ncvsd_inverse.training.checkpoint import read_checkpoint
from ncvsd_inverse.training.trainer import CHECKPOINT, LOG, Trainer

ROOT = Path(__file__).parents[2]
HEAVY = (
    "deepinv",
    "matplotlib.pyplot",
    "ncvsd_inverse.integrations.deepinv",
    "scipy.stats",
    "tensorboard",
    "torchvision",
)
"""What commands import as they go: it is imported once, as each start is a fork of this process."""

OFTEN = {"checkpoint_every": 8, "snapshot_every": 16, "log_every": 4}
TIMES = ("seconds", "images_per_second", "peak_mib", "environment")
"""Entries of records and logs that no two runs share."""

SETTINGS = """
images = {images}
batch_size = 4
precision = "float32"
warmup_images = 8
[network]
resolution = 8
channels = [16, 16]
blocks = 1
attention = []
"""


@dataclass(frozen=True)
class Command:
    """A command to kill.

    Attributes:
        words: as it is typed, in a folder that holds the inputs.
        out: the folder that it writes to.
        kept: how much of its work is on the disk, 0 for none; an error if it is damaged.
    """

    words: str
    out: str
    kept: Callable[[Path], int]


def steps_kept(out: Path) -> int:
    """Return the step of a run's checkpoint."""
    if not (out / CHECKPOINT).exists():
        return 0
    return int(read_checkpoint(out / CHECKPOINT)[1]["step"])


def pictures_kept(out: Path) -> int:
    """Return how many pictures have a record that says they are whole, and are."""
    found = {path: json.loads(path.read_bytes()) for path in out.rglob("*.json")}
    finished = {path: record for path, record in found.items() if all(record["outputs"].values())}
    for path, record in finished.items():
        with Image.open(path.parent / record["restored"]) as picture:
            picture.load()
    return len(finished)


def statistics_kept(out: Path) -> int:
    """Return 1 if the prior has statistics, 0 if it has none; its weights are checked."""
    return int(load_prior(out / "prior").statistics is not None)


def rows_kept(out: Path) -> int:
    """Return the number of records of a benchmark."""
    records = out / "records.jsonl"
    return len([*map(json.loads, records.read_text().splitlines())]) if records.exists() else 0


COMMANDS = {
    "train": Command("ncvsd train teacher.toml --data pictures -o out", "out", steps_kept),
    "distill": Command(
        "ncvsd distill student.toml --teacher teacher --data pictures -o out", "out", steps_kept
    ),
    "statistics": Command(
        "ncvsd statistics measured/prior --images 128", "measured", statistics_kept
    ),
    "solve": Command(
        "ncvsd solve in --task denoise --sigma-y 0.1 --nfe 2 -o out", "out", pictures_kept
    ),
    "benchmark": Command(
        f"python {ROOT / 'benchmarks' / 'run.py'} --task sr4x --data faces.zip --images 2 "
        "--methods ncvsd pinv --nfe 1 2 --metrics psnr --out out",
        "out",
        rows_kept,
    ),
}


def run(words: Sequence[str], folder: Path, seconds: float | None = None) -> bool:
    """Run a command in a process of its own; tell whether it ended before it was killed.

    Args:
        words: the command.
        folder: where it runs.
        seconds: after how long it is killed; None: never.

    Raises:
        RuntimeError: if it fails; with what it printed last.
    """
    printed = folder / "printed.txt"
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for number, path in enumerate((Path(os.devnull), printed, printed)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        os._exit(_execute(list(words)))
    end = float("inf") if seconds is None else time.monotonic() + seconds
    status = None
    while time.monotonic() < end and status is None:
        ended, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
        time.sleep(0.001)
    if status is None:
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{' '.join(words)}: {printed.read_text()[-2000:]}")
    return status == 0


def _execute(words: list[str]) -> int:
    """Run a command in this process; return its exit status."""
    defaults = Trainer.run.__kwdefaults__
    assert defaults is not None
    defaults.update(OFTEN)
    try:
        if words[0] == "ncvsd":
            sys.argv = words
            ncvsd_inverse.cli.main()
        else:
            sys.argv = words[1:]
            sys.path.insert(0, str(Path(words[1]).parent))
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def write_inputs(folder: Path) -> None:
    """Write what the commands read."""
    source = np.random.default_rng(0)

    def picture(height: int, width: int) -> Image.Image:
        pixels = source.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)

    for name in ("pictures", "in", "measured"):
        (folder / name).mkdir(parents=True)
    for number in range(12):
        picture(8, 8).save(folder / "pictures" / f"{number}.png")
    for number in range(6):  # of as many sizes, as those of one are restored together
        picture(16, 16 + 8 * number).save(folder / "in" / f"{number}.png")
    with zipfile.ZipFile(folder / "faces.zip", "w") as archive:
        for number in range(2):
            with archive.open(f"{number}.png", "w") as file:
                picture(64, 64).save(file, "png")
    (folder / "teacher.toml").write_text(SETTINGS.format(images=240))
    (folder / "student.toml").write_text(SETTINGS.format(images=160))
    run(["ncvsd", "train", "teacher.toml", "--data", "pictures", "-o", "teacher"], folder)
    for suffix in (".safetensors", ".json"):
        shutil.copy(folder / "teacher" / f"prior{suffix}", folder / "measured")
    card = folder / "measured" / "prior.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"statistics": None}))


def without_times(entries: object) -> object:
    """Return JSON without what no two runs share."""
    if isinstance(entries, Mapping):
        return {k: without_times(v) for k, v in entries.items() if k not in TIMES}
    return entries


def results(out: Path) -> dict[str, object]:
    """Return what a command left, by file; times, plots and reports, which show them, are not."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or name.startswith(("tensorboard/", ".lock")):
            continue
        if path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_bytes()))
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [without_times(x) for x in lines if name != LOG or "resumed" not in x]
        elif path.suffix in (".safetensors", ".png"):
            found[name] = path.read_bytes()
    return found


@dataclass
class Outcome:
    """What came of a command's kills.

    Attributes:
        kills: times that it was killed.
        ends: times that it ended after kills.
        lost: kills after which less was kept than before, or something damaged.
        differing: files at ends that are not those of the undisturbed run.
        torn: temporary files at ends.
    """

    kills: int
    ends: int
    lost: list[str]
    differing: list[str]
    torn: list[str]


def kill_often(command: Command, kills: int, folder: Path, source: random.Random) -> Outcome:
    """Kill a command so often, and compare what it leaves with what it leaves undisturbed."""
    words = command.words.split()

    def places() -> Iterator[Path]:
        number = 0
        while True:
            place = folder / f"{command.words.split()[1].split('/')[-1]}_{number}" / "place"
            shutil.copytree(folder / "inputs", place)
            yield place
            shutil.rmtree(place)
            number += 1

    fresh = places()
    place = next(fresh)
    started = time.monotonic()
    run(words, place)
    took = time.monotonic() - started
    expected = results(place / command.out)
    outcome = Outcome(0, 0, [], [], [])
    while outcome.kills < kills:
        place, kept, ended = next(fresh), 0, False
        while not ended:
            moment = source.uniform(0, took) if outcome.kills < kills else None
            ended = run(words, place, moment)
            outcome.kills += not ended
            try:
                now = command.kept(place / command.out)
            except Exception as error:
                outcome.lost.append(f"damaged after a kill: {error}")
                break
            if now < kept:
                outcome.lost.append(f"{kept} kept, then {now}")
            kept = now
        outcome.ends += ended
        outcome.torn += [path.name for path in place.rglob("*.part")]
        got = results(place / command.out)
        names = sorted(expected.keys() | got.keys())
        outcome.differing += [name for name in names if expected.get(name) != got.get(name)]
    return outcome


def main() -> None:
    """Kill the commands and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="of each command (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in HEAVY:
        importlib.import_module(name)
    print("| command | kills | ends | lost or damaged | differing files | torn files | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    bad = False
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"XDG_CACHE_HOME": f"{scratch}/cache", "OMP_NUM_THREADS": "1"}
        write_inputs(Path(scratch, "inputs"))
        for name in args.commands:
            started = time.monotonic()
            source = random.Random(f"{args.seed} {name}")
            outcome = kill_often(COMMANDS[name], args.kills, Path(scratch), source)
            faults = (outcome.lost, outcome.differing, outcome.torn)
            counts = (outcome.kills, outcome.ends, *map(len, faults))
            seconds = time.monotonic() - started
            row = " | ".join([name, *map(str, counts), f"{seconds:.0f}"])
            print(f"| {row} |", flush=True)
            for line in itertools.chain(*faults):
                print(f"{name}: {line}", file=sys.stderr)
            bad |= any(faults)
    sys.exit(bad)


if __name__ == "__main__":
    main()
