r"""Draw two faces restored in each task beside those of the benchmark.

    python experiments/operators/pictures.py --data DIR/faces64/val.zip

`pictures.jpg`, beside this script, has a row a task beyond the benchmark's and for each face the
truth, the measurement and a sample of `solve` with the prior ncvsd_faces64. Measurements that are
no pictures are shown as A^T y, photon counts as k / peak. PSNR, residual and seconds are printed.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ncvsd_inverse import solve
from ncvsd_inverse.images import read_images
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.operators import Poisson
from ncvsd_inverse.priors import load_prior
from ncvsd_inverse.protocols import LinearOperator, Operator
from ncvsd_inverse.tasks import list_tasks, make_task

MORE_TASKS = [name for name in list_tasks(all=True) if name not in list_tasks()]
COLUMNS = ("truth", "measurement", "estimate")


def main() -> None:
    """Restore, print the figures and write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="zip or folder of 64x64 faces")
    parser.add_argument("--skip", type=int, default=0, help="faces left out first (%(default)s)")
    parser.add_argument("--nfe", type=int, default=10, help="network calls (%(default)s)")
    parser.add_argument("--task", choices=MORE_TASKS, help="only this one, no picture")
    args = parser.parse_args()
    prior = load_prior("ncvsd_faces64")
    truths = torch.cat(list(read_images(args.data, args.skip + 2)))[-2:]
    names = [args.task] if args.task else MORE_TASKS
    figure = Figure(figsize=(6 * 1.25 + 0.3, 1.25 * len(names) + 0.3), layout="constrained")
    axes = figure.subplots(len(names), 6, squeeze=False)
    print(f"{'task':20} {'PSNR, dB':12} {'residual':12} s a face")
    for place, name in zip(axes, names, strict=True):
        task = make_task(name, 64)
        sources = make_generators([(0, face) for face in range(2)])
        y = task.operator.measure(truths, task.sigma_y, generator=sources)
        result = solve(
            y,
            operator=task.operator,
            prior=prior,
            nfe=args.nfe,
            sigma_y=task.sigma_y,
        )
        shown = (truths, _picture(task.operator, y), result.x0)
        for column, axis in enumerate(place):
            face, kind = divmod(column, 3)
            pixels = ((shown[kind][face].clamp(-1, 1) + 1) / 2).permute(1, 2, 0)
            axis.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        place[0].set_ylabel(name.replace("_", "\n"), fontsize="small")
        quality = psnr(result.x0, truths)
        for face in range(2):
            place[3 * face + 2].set_xlabel(f"{float(quality[face]):.1f} dB", fontsize="x-small")
        numbers = [" ".join(f"{float(v):.2f}" for v in row) for row in (quality, result.residual)]
        print(f"{name:20} {numbers[0]:12} {numbers[1]:12} {result.seconds / 2:.1f}")
    for axis, title in zip(axes[0], COLUMNS * 2, strict=True):
        axis.set_title(title, fontsize="small")
    if not args.task:
        figure.savefig(Path(__file__).with_suffix(".jpg"), dpi=96)


def _picture(operator: Operator, y: Tensor) -> Tensor:
    """Return measurements as pictures, (B, 1 or 3, H, W)."""
    if isinstance(operator, Poisson):
        return 2 * (y.square() / 4 - 3 / 8) / operator.peak - 1
    if y.ndim != 4 and isinstance(operator, LinearOperator):
        return operator.adjoint(y)
    return y


if __name__ == "__main__":
    main()
