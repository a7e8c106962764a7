r"""Time the conditioning step of `solve`, and show what its tolerance costs.

    python benchmarks/conditioning.py --data DIR/natural/test.zip

For each task of one image size it prints the time of one conditioning step, the median and the most
over the levels of a chain of ten calls, that of the chain's start, their conjugate gradient
iterations, and by how much the PSNR of the draws of `solve` at several tolerances is below that at
the smallest, on the first images of the data.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from ncvsd_inverse import load_prior, make_task, solve
from ncvsd_inverse.images import centre_crop, read_images
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.protocols import SIGMA_Y, Covariance, Generators
from ncvsd_inverse.sampling.matheron import Matheron

TASKS = ("inpaint_box", "inpaint_random", "sr4x", "deblur_gaussian", "deblur_motion")
TOLERANCES = (0.01, 0.001, 0.0001)
CALLS = 10


@contextmanager
def watched() -> Iterator[list[tuple[float, int]]]:
    """Yield a list that grows by seconds and iterations of every conditioning step."""
    kept: list[tuple[float, int]] = []
    draw = Matheron.draw

    def timed(
        step: Matheron,
        x: Tensor,
        covariance: Covariance,
        *,
        generator: Generators = None,
        temperature: float = 1.0,
    ) -> Tensor:
        started = time.perf_counter()
        out = draw(step, x, covariance, generator=generator, temperature=temperature)
        kept.append((time.perf_counter() - started, step.iterations))
        return out

    with mock.patch.object(Matheron, "draw", timed):
        yield kept


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", default="ncvsd_natural", help="its name (%(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="zip or folder of images")
    parser.add_argument("--size", type=int, default=256, help="side of crops (%(default)s)")
    parser.add_argument("--images", type=int, default=4, help="for PSNR (%(default)s)")
    parser.add_argument("--draws", type=int, default=4, help="of each, for PSNR (%(default)s)")
    args = parser.parse_args()
    prior = load_prior(args.prior)
    pictures = (x for x in read_images(args.data) if min(x.shape[-2:]) >= args.size)
    crops = [centre_crop(next(pictures), (args.size, args.size)) for _ in range(args.images)]
    images = torch.cat(crops)
    print(f"{args.prior}, {args.size} x {args.size}, {torch.get_num_threads()} threads")
    lost_at = ", ".join(f"{t:g}" for t in TOLERANCES)
    print(f"task               ms   most  start   iterations   dB lost at {lost_at}")
    for name in TASKS:
        operator = make_task(name, args.size).operator
        y = operator.measure(images, SIGMA_Y, generator=torch.Generator().manual_seed(0))
        quality = {}
        for tolerance in TOLERANCES:
            with mock.patch.object(Matheron, "tolerance", tolerance):
                drawn = solve(y, operator=operator, prior=prior, nfe=CALLS, num_samples=args.draws)
            quality[tolerance] = float(
                torch.stack([psnr(x0, images).mean() for x0 in drawn.samples]).mean()
            )
        solve(y[:1], operator=operator, prior=prior, nfe=1)
        with watched() as steps:
            solve(y[:1], operator=operator, prior=prior, nfe=CALLS)
        seconds, iterations = zip(*steps, strict=True)
        lost = [f"{quality[TOLERANCES[-1]] - quality[t]:+.3f}" for t in TOLERANCES]
        median, most = 1e3 * statistics.median(seconds[1:]), 1e3 * max(seconds[1:])
        count = f"{min(iterations)} to {max(iterations)}"
        times = f"{median:5.0f} {most:6.0f} {1e3 * seconds[0]:6.0f}"
        print(f"{name:15} {times}   {count:10}  ", *lost, flush=True)


if __name__ == "__main__":
    main()
