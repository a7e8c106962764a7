r"""Compare schedules of `solve(method="conditioning")` on validation images, call by call.

    python experiments/few_step/schedules.py --data DIR/faces64/val.zip --images 16 \
        --out experiments/few_step/schedules.json

For every task and number of calls it restores the same measurements with the Karras schedules of
a grid of first and last levels, and keeps PSNR, lpips-alex and the CRPS of four draws. The best by
CRPS, a proper score of the whole law, are what `ncvsd_inverse/settings.py` holds by family. A
stopped run goes on with the same command; `--show` prints the table of an outcome.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from ncvsd_inverse import solve
from ncvsd_inverse.files import write_whole
from ncvsd_inverse.images import centre_crop, read_images
from ncvsd_inverse.metrics import crps, lpips, psnr
from ncvsd_inverse.priors import load_prior
from ncvsd_inverse.protocols import SIGMA_Y, Prior
from ncvsd_inverse.schedules import karras
from ncvsd_inverse.tasks import Task, make_task

TASKS = ("inpaint_box", "inpaint_random", "sr4x", "deblur_gaussian", "deblur_motion")
CALLS = (1, 2, 4, 10, 20, 50)
FIRST = (0.4, 0.8, 1.5, 3.0, 6.0)
LAST = (0.05, 0.1)
DRAWS = 4


def main() -> None:
    """Try what is missing of the grid, keep it, and print the best of each row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", default="ncvsd_faces64", help="its name (%(default)s)")
    parser.add_argument("--data", type=Path, help="zip or folder of validation images")
    parser.add_argument("--images", type=int, default=16, help="how many (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of crops (%(default)s)")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--calls", nargs="+", type=int, default=CALLS)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the outcome")
    parser.add_argument("--show", action="store_true", help="print the outcome, try nothing")
    args = parser.parse_args()
    trials = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    if not args.show:
        prior = load_prior(args.prior)
        size = (args.size, args.size)
        images = torch.cat([centre_crop(x, size) for x in read_images(args.data, args.images)])
        for name, calls in product(args.tasks, args.calls):
            row = trials.setdefault(f"{name} {calls}", {})
            for first, last in _grid(calls):
                if (key := f"{first:g} {last:g}") not in row:
                    levels = karras(calls, first, last)
                    row[key] = judge(make_task(name, args.size), prior, images, levels)
                    _write(args.out, json.dumps(trials, indent=1))
            print(name, calls, *_best(row), flush=True)
    for name, row in trials.items():
        print(f"{name}: best by CRPS, first and last level, CRPS, lpips-alex, PSNR:", *_best(row))


def judge(task: Task, prior: Prior, images: Tensor, levels: tuple[float, ...]) -> list[float]:
    """Return CRPS of four draws, lpips-alex and PSNR of the first, means over images."""
    y = task.operator.measure(images, SIGMA_Y, generator=torch.Generator().manual_seed(1))
    result = solve(
        y,
        operator=task.operator,
        prior=prior,
        nfe=len(levels),
        schedule=levels,
        method="conditioning",
        num_samples=DRAWS,
        estimate="sample",
    )
    scores = (
        crps(result.samples, images),
        lpips(result.x0.clamp(-1, 1), images),
        psnr(result.x0, images),
    )
    return [round(float(score.mean()), 5) for score in scores]


def _write(path: Path, text: str) -> None:
    write_whole(path, text)


def _grid(calls: int) -> list[tuple[float, float]]:
    """Return pairs of first and last level; with one call there is only the first."""
    if calls == 1:
        return [(first, first / 2) for first in (*LAST, *FIRST)]
    return [(first, last) for first, last in product(FIRST, LAST) if last < first]


def _best(row: dict[str, list[float]]) -> tuple[object, ...]:
    best = min(row, key=lambda levels: row[levels][0])
    return best, *row[best]


if __name__ == "__main__":
    main()
