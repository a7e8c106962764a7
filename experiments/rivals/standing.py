r"""Show where all methods stand at 4, 10, 20 and 100 network calls on held-out validation faces.

    python experiments/rivals/standing.py --data DIR/faces64/val.zip --out standing
    python experiments/rivals/standing.py --out standing --write

The faces are those after the ones that the settings were tuned on, one draw of each. The first
command runs `benchmarks/run.py` on them; a stopped run goes on with the same command. The second
writes the tables of README.md here.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from baselines.registry import METHODS
from harness.cli import run
from harness.records import Record, read_records
from ncvsd_inverse.files import write_between
from ncvsd_inverse.images import read_images, write_image

FOLDER = Path(__file__).parent
TITLES = {
    "inpaint_box": "box inpainting",
    "inpaint_random": "70% missing",
    "sr4x": "SR x4",
    "deblur_gaussian": "Gaussian blur",
    "deblur_motion": "motion blur",
}
TASKS = tuple(TITLES)
CALLS = (4, 10, 20, 100)
METRICS = {"psnr": 2, "lpips-alex": 4, "lpips-vgg": 4}
"""What is shown, with its decimals."""

MARKS = ("<!-- written by standing.py -->", "<!-- end of standing.py -->")


def measure(
    data: Path, out: Path, calls: list[int], methods: list[str], images: int, skip: int
) -> int:
    """Run the benchmark on the images after those of the tuning; return its exit status."""
    faces = out / "faces"
    faces.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(islice(read_images(data), skip, skip + images)):
        write_image(faces / f"{number:03d}.png", image)
    options = {
        "--task": TASKS,
        "--nfe": calls,
        "--methods": methods,
        "--metrics": METRICS,
        "--images": [images],
        "--data": [faces],
        "--out": [out / "results"],
    }
    return run(METHODS, [str(part) for name in options for part in (name, *options[name])])


def write_tables(out: Path) -> None:
    """Write a table for each number of calls, the best of each figure in bold."""
    found = read_records(out / "results")
    most = max(record.images for record in found)  # ours have rows of fewer images too
    records = [r for r in found if r.nfe in (0, *CALLS) and r.images == most]
    blocks = []
    for calls in CALLS:
        rows = [record for record in records if record.nfe == calls]
        if rows:
            blocks.append(f"**{calls} calls**\n\n" + table(rows))
    without = [record for record in records if record.nfe == 0]
    blocks.append("**without a network**\n\n" + table(without))
    write_between(FOLDER / "README.md", MARKS, "\n\n".join(blocks))


def table(records: list[Record]) -> str:
    """Return a table of methods by tasks."""
    lines = ["| method | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 1) + "|"]
    found = {(record.title, record.task): record for record in records}
    for title in dict.fromkeys(method.title for method in METHODS.values()):
        if any((title, task) in found for task in TASKS):
            cells = [cell(found.get((title, task)), records) for task in TASKS]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(record: Record | None, records: list[Record]) -> str:
    """Return the figures of a row on a task, bold where they are the best of the table."""
    if record is None:
        return ""
    rivals = [other for other in records if other.task == record.task]
    parts = []
    for name, decimals in METRICS.items():
        texts = [f"{mean:.{decimals}f}" for other in rivals if (mean := other.mean(name))]
        best = (max if name == "psnr" else min)(texts, key=float)
        own = f"{record.mean(name) or 0:.{decimals}f}"
        parts.append(f"**{own}**" if own == best else own)
    return " ".join(parts)


def main() -> int:
    """Measure, or write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="zip or folder of the validation faces")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--images", type=int, default=32, help="how many (%(default)s)")
    parser.add_argument("--skip", type=int, default=32, help="that were tuned on (%(default)s)")
    parser.add_argument("--nfe", type=int, nargs="+", default=list(CALLS), choices=CALLS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--write", action="store_true", help="write the tables into README.md")
    args = parser.parse_args()
    if args.write:
        write_tables(args.out)
        return 0
    if args.data is None:
        parser.error("--data must be given")
    return measure(args.data, args.out, args.nfe, args.methods, args.images, args.skip)


if __name__ == "__main__":
    sys.exit(main())
