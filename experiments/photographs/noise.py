r"""How near the estimated noise of a measurement comes to the true one.

    python experiments/photographs/noise.py --data DIR --images 20

`solve(sigma_y="auto")` on so many validation faces and 96x96 centres of validation photographs: the
median of the estimate over the truth, and how often it is within 10%, by task and noise std.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ncvsd_inverse import load_prior, make_task, solve
from ncvsd_inverse.files import write_between
from ncvsd_inverse.images import centre_crop, read_images
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.operators import Denoise, SuperResolution
from ncvsd_inverse.operators.base import BaseOperator

MARKS = ("<!-- written by noise.py -->", "<!-- end of noise.py -->")
LEVELS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
TASKS = ("deblur_gaussian", "deblur_motion", "inpaint_box", "inpaint_random", "sr4x")
WITHIN = 0.1


def operators(side: int) -> Iterator[tuple[str, BaseOperator]]:
    """Yield names and forward models."""
    yield "denoise", Denoise()
    yield "sr2x", SuperResolution(2)
    for name in TASKS:
        yield name, make_task(name, side).operator


def ratios(images: Tensor, operator: BaseOperator, prior: str, sigma_y: float) -> Tensor:
    """Return estimates over the truth, one an image."""
    sources = make_generators([(1, place) for place in range(len(images))])
    y = operator.measure(images, sigma_y, generator=sources)
    return solve(y, operator=operator, prior=load_prior(prior), sigma_y="auto").sigma_y / sigma_y


def main() -> None:
    """Print a table, and with --write put it into README.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--images", type=int, default=20, help="of each kind (%(default)s)")
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="noise stds")
    parser.add_argument("--write", action="store_true", help="write the table into README.md")
    args = parser.parse_args()
    faces = torch.cat(list(read_images(args.data / "faces64" / "val.zip", args.images)))
    photographs = torch.cat(
        [
            centre_crop(x, (96, 96))
            for x in read_images(args.data / "natural" / "val.zip", args.images)
        ]
    )
    head = "| | " + " | ".join(f"{level:g}" for level in args.levels) + " | within 10% |"
    lines = [head, "|---" * (len(args.levels) + 2) + "|"]
    near: list[Tensor] = []
    for kind, images, prior in (
        ("faces", faces, "ncvsd_faces64"),
        ("photographs", photographs, "ncvsd_natural"),
    ):
        for name, operator in operators(images.shape[-1]):
            cells, hits = [], []
            for level in args.levels:
                found = ratios(images, operator, prior, level)
                hits.append(((found - 1).abs() < WITHIN).double())
                cells.append(f"{float(found.median()):.2f} ({float(hits[-1].mean()):.0%})")
            share = float(torch.cat(hits).mean())
            near += hits
            lines.append(f"| {kind}, {name} | " + " | ".join(cells) + f" | {share:.0%} |")
            sys.stdout.write(lines[-1] + "\n")
            sys.stdout.flush()
    lines.append(f"| all | {'| ' * len(args.levels)}| {float(torch.cat(near).mean()):.0%} |")
    sys.stdout.write(lines[-1] + "\n")
    if args.write:
        write_between(Path(__file__).with_name("README.md"), MARKS, "\n".join(lines))


if __name__ == "__main__":
    main()
