r"""Compare priors by where their statistics come from, and by how many images were generated.

    python experiments/statistics/self_measured.py --data DIR/faces64/test.zip --images 16 \
        --out experiments/statistics/records.jsonl
    python experiments/statistics/self_measured.py --prior ncvsd_natural --size 96 --images 12 \
        --data DIR/natural/test.zip --out experiments/statistics/records.jsonl
    python experiments/statistics/self_measured.py --data DIR/faces64/val.zip --images 16 \
        --draws 2 --rows shipped 4 8 16 32 128 --calls 10 \
        --out experiments/statistics/records.jsonl
    python experiments/statistics/self_measured.py --prior ncvsd_natural --size 256 \
        --data DIR/natural/val.zip --images 3 --draws 2 --measure-at 256 \
        --rows shipped 2 4 8 16 --calls 10 --tasks inpaint_random sr4x deblur_gaussian \
        --out experiments/statistics/records.jsonl

Rows: `shipped`, the student with the statistics of its card, measured on validation images; `own`,
with those that it measures from images that it generates, or from NUMBER of them; `teacher` and
`teacher-own`, draws of one call of the teacher, likewise; `gibbs`, the student in the published
loop, which needs none. Prints PSNR and lpips-alex of the first draw and CRPS of all; a stopped run
goes on with the same command.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncvsd_inverse import solve
from ncvsd_inverse.files import write_whole
from ncvsd_inverse.images import centre_crop, read_images
from ncvsd_inverse.metrics import crps, lpips, psnr
from ncvsd_inverse.priors import load_prior
from ncvsd_inverse.priors.own_statistics import own_statistics
from ncvsd_inverse.protocols import SIGMA_Y, Prior
from ncvsd_inverse.sampling.solve import Method
from ncvsd_inverse.tasks import make_task

ROWS = ("shipped", "own", "teacher", "teacher-own", "gibbs")
TASKS = ("inpaint_box", "inpaint_random", "sr4x", "deblur_gaussian", "deblur_motion")


def main() -> None:
    """Judge what is missing, keep it, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", default="ncvsd_faces64", help="a student (%(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="zip or folder of images")
    parser.add_argument("--images", type=int, default=100, help="most images (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of crops (%(default)s)")
    parser.add_argument("--draws", type=int, default=8, help="draws an image (%(default)s)")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--calls", nargs="+", type=int, default=[4, 10])
    parser.add_argument("--measure-at", type=int, help="side of generated images of any size")
    parser.add_argument("--out", type=Path, required=True, help="file of records, one a run")
    args = parser.parse_args()
    size = (args.size, args.size)
    images = torch.cat([centre_crop(x, size) for x in read_images(args.data, args.images)])
    settings = {
        "prior": args.prior,
        "images": len(images),
        "size": args.size,
        "draws": args.draws,
    }
    lines = args.out.read_text(encoding="utf-8").splitlines() if args.out.exists() else []
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    found = next((record for record in records if settings.items() <= record.items()), None)
    if found is None:
        found = dict(settings)
        records.append(found)
    for row in args.rows:
        prior: Prior | None = None
        for calls in args.calls:
            for task in args.tasks:
                if (key := f"{row} | {calls} | {task}") in found:
                    continue
                if prior is None:
                    begun = time.perf_counter()
                    prior = find_prior(args.prior, row, args.measure_at)
                    found[f"{row} seconds"] = round(time.perf_counter() - begun, 1)
                method: Method = "gibbs" if row == "gibbs" else "conditioning"
                found[key] = judge(task, prior, images, calls, args.draws, method)
                write_whole(args.out, "".join(json.dumps(record) + "\n" for record in records))
    print(f"{args.prior}, {len(images)} images, {args.draws} draws: PSNR / lpips-alex / CRPS\n")
    print("\n".join(table(found, args.rows, args.calls, args.tasks)))


def find_prior(name: str, row: str, side: int | None) -> Prior:
    """Return the prior of a row, with its statistics."""
    prior = load_prior(f"{name}_teacher" if row.startswith("teacher") else name)
    if row in ("shipped", "teacher", "gibbs"):
        return prior
    shape = None if prior.image_shape is not None or side is None else (3, side, side)
    number = int(row) if row.isdecimal() else None
    return prior.with_statistics(own_statistics(prior, images=number, image_shape=shape))


def judge(
    name: str, prior: Prior, images: Tensor, calls: int, draws: int, method: Method
) -> list[float]:
    """Return PSNR and lpips-alex of the first draw and CRPS of all, means over images."""
    operator = make_task(name, (images.shape[2], images.shape[3])).operator
    y = operator.measure(images, SIGMA_Y, generator=torch.Generator().manual_seed(1))
    result = solve(
        y,
        operator=operator,
        prior=prior,
        nfe=calls,
        num_samples=draws,
        method=method,
        estimate="sample",
    )
    scores = (
        psnr(result.x0, images),
        lpips(result.x0.clamp(-1, 1), images),
        crps(result.samples, images),
    )
    return [round(float(score.mean()), 5) for score in scores]


def table(
    found: dict[str, Any], rows: Sequence[str], calls: Sequence[int], tasks: Sequence[str]
) -> list[str]:
    """Return a Markdown table."""
    lines = ["| statistics | calls | " + " | ".join(tasks) + " |"]
    lines.append("|" + "---|" * (len(tasks) + 2))
    for number in calls:
        for row in rows:
            cells = [found[f"{row} | {number} | {task}"] for task in tasks]
            texts = [f"{p:.2f} / {lp:.4f} / {c:.4f}" for p, lp, c in cells]
            lines.append(f"| {row} | {number} | " + " | ".join(texts) + " |")
    seconds = ", ".join(f"{row} {found[f'{row} seconds']} s" for row in rows)
    return [*lines, "", f"Loading and measuring: {seconds}."]


if __name__ == "__main__":
    main()
