r"""PSNR and lpips-alex of estimates at temperatures below 1, on validation images.

    python experiments/few_step/temperatures.py --data DIR/faces64/val.zip --skip 8 --images 24

For every task, noise (`sigma_lik` over `sigma_y`) and first level it prints a row over temperatures
of chains of ten calls that end at 0.05. The first eight images are those that
`benchmarks/tune.py` saw then, so this leaves them out with `--skip 8`.
"""

import argparse
from itertools import islice, product
from pathlib import Path

import torch

from ncvsd_inverse import solve
from ncvsd_inverse.images import centre_crop, read_images
from ncvsd_inverse.metrics import lpips, psnr
from ncvsd_inverse.priors import load_prior
from ncvsd_inverse.protocols import SIGMA_Y
from ncvsd_inverse.schedules import karras
from ncvsd_inverse.tasks import make_task

TASKS = ("inpaint_box", "inpaint_random", "sr4x", "deblur_gaussian", "deblur_motion")
LAST = 0.05


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", default="ncvsd_faces64", help="its name (%(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="zip or folder of images")
    parser.add_argument("--skip", type=int, default=0, help="images left out (%(default)s)")
    parser.add_argument("--images", type=int, default=24, help="how many (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of crops (%(default)s)")
    parser.add_argument("--calls", type=int, default=10, help="of a chain (%(default)s)")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--noise", nargs="+", type=float, default=[0.6])
    parser.add_argument("--first", nargs="+", type=float, default=[0.4, 1.5, 6.0])
    parser.add_argument(
        "--temperatures", nargs="+", type=float, default=[0.1, 0.25, 0.4, 0.5, 0.65, 0.8]
    )
    args = parser.parse_args()
    prior, size = load_prior(args.prior), (args.size, args.size)
    pictures = islice(read_images(args.data), args.skip, args.skip + args.images)
    images = torch.cat([centre_crop(x, size) for x in pictures])
    print("task, noise, first level:", *(f"T = {t:g}" for t in args.temperatures), sep=" | ")
    for name, noise, first in product(args.tasks, args.noise, args.first):
        operator = make_task(name, args.size).operator
        y = operator.measure(images, SIGMA_Y, generator=torch.Generator().manual_seed(0))
        row = []
        for temperature in args.temperatures:
            x0 = solve(
                y,
                operator=operator,
                prior=prior,
                nfe=args.calls,
                schedule=karras(args.calls, first, LAST),
                sigma_y=SIGMA_Y,
                sigma_lik=noise * SIGMA_Y,
                temperature=temperature,
                estimate="sample",
            ).x0.clamp(-1, 1)
            scores = float(psnr(x0, images).mean()), float(lpips(x0, images).mean())
            row.append(f"{scores[0]:.2f} {scores[1]:.4f}")
        print(f"{name} {noise:g} {first:g}", *row, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
