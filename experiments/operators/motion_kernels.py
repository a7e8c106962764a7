r"""Compare the law of MotionBlur's kernels with that of the generator behind published tables.

    python experiments/operators/motion_kernels.py
    python experiments/operators/motion_kernels.py --authors DIR/motionblur

DIR/motionblur is a checkout of github.com/LeviBorodenko/motionblur; without it only ours are
measured. A row of the tables printed is one statistic of the kernels: its mean and std over the
draws, ours and theirs, the difference of the means in its standard errors, and their ratio.
`--picture FILE` draws kernels of both, one above the other.
"""

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ncvsd_inverse.operators import MotionBlur

Generator = Callable[[int, float, int], Tensor]


def main() -> None:
    """Draw kernels and print what they are like on average."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--authors", type=Path, help="folder of the authors' motionblur.py")
    parser.add_argument("--draws", type=int, default=1000, help="kernels a table (%(default)s)")
    parser.add_argument("--size", type=int, nargs="+", default=[61, 15], help="pixels (61 15)")
    parser.add_argument(
        "--intensity", type=float, nargs="+", default=[0.2, 0.5, 1.0], help="(0.2 0.5 1.0)"
    )
    parser.add_argument("--picture", type=Path, help="file of the picture (none by default)")
    args = parser.parse_args()
    generators: dict[str, Generator] = {"ours": _ours}
    if args.authors is not None:
        generators["theirs"] = _load_authors(args.authors / "motionblur.py")
    for size in args.size:
        for intensity in args.intensity:
            print(f"\n{size} pixels, intensity {intensity:g}, {args.draws} draws")
            measured = {
                name: torch.tensor(
                    [
                        list(kernel_statistics(draw(size, intensity, seed)).values())
                        for seed in range(args.draws)
                    ]
                )
                for name, draw in generators.items()
            }
            _print_table(measured)
    if args.picture is not None:
        _draw(generators, args.picture)


def kernel_statistics(kernel: Tensor) -> dict[str, float]:
    """Return what a kernel, shape (n, n), is like.

    Lengths are in pixels. The mean of |K(f)|^2 over all frequencies f is 1 / "effective pixels"
    by Parseval's theorem, so its spectrum is described by the share of frequencies, of an image
    four times its side, that it keeps at 0.05 or more.
    """
    side = len(kernel)
    places = torch.arange(side, dtype=kernel.dtype) - (side - 1) / 2
    row, column = kernel.sum(dim=1) @ places, kernel.sum(dim=0) @ places
    down, across = (places - row), (places - column)
    cross = down @ kernel @ across
    rows, columns = kernel.sum(dim=1) @ down**2, kernel.sum(dim=0) @ across**2
    variances = torch.linalg.eigvalsh(torch.stack((rows, cross, cross, columns)).view(2, 2))
    short, long = variances.clamp(min=0).sqrt().tolist()
    spectrum = torch.fft.fft2(kernel, s=(4 * side, 4 * side)).abs()
    return {
        "pixels above 1% of the largest": float((kernel > 0.01 * kernel.max()).sum()),
        "effective pixels, 1 / sum k^2": 1 / float(kernel.square().sum()),
        "std along the main axis": long,
        "std across it": short,
        "offset of the mean from the centre": math.hypot(row, column),
        "the same, rows only": float(row),
        "largest weight": float(kernel.max()),
        "frequencies kept": float((spectrum >= 0.05).double().mean()),
    }


def _ours(size: int, intensity: float, seed: int) -> Tensor:
    return MotionBlur(size, intensity, seed=seed).kernel[0, 0]


def _load_authors(path: Path) -> Generator:
    """Return the authors' generator, from their file."""
    spec = importlib.util.spec_from_file_location("motionblur", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def draw(size: int, intensity: float, seed: int) -> Tensor:
        np.random.seed(seed)  # noqa: NPY002 (theirs draws from the global source)
        kernel = module.Kernel(size=(size, size), intensity=intensity).kernelMatrix
        if not np.isfinite(kernel).all():
            raise SystemExit(
                f"the authors' generator drew nothing at {size} pixels: below 54 pixels its line "
                f"has width 0, which Pillow {PIL.__version__} does not draw; take pillow<13"
            )
        return torch.from_numpy(kernel).double()

    return draw


def _print_table(measured: dict[str, Tensor]) -> None:
    names = list(kernel_statistics(torch.eye(3, dtype=torch.float64)))
    for index, name in enumerate(names):
        columns = [values[:, index] for values in measured.values()]
        words = [f"{float(column.mean()):10.4g} {float(column.std()):8.3g}" for column in columns]
        if len(columns) == 2:
            ours, theirs = columns
            gap = float(ours.mean() - theirs.mean())
            error = math.sqrt(float(ours.var() + theirs.var()) / len(ours))
            words.append(f"{gap / error:+6.1f} {float(ours.mean() / theirs.mean()):7.3f}")
        print(f"{name:36}", *words)


def _draw(generators: dict[str, Generator], path: Path) -> None:
    """Write kernels of 61 pixels, a row an intensity of a generator."""
    intensities = (0.2, 0.5, 1.0)
    figure = Figure(figsize=(12, 1.25 * 3 * len(generators)), layout="constrained")
    axes = figure.subplots(3 * len(generators), 10, squeeze=False)
    for place, (name, draw) in enumerate(generators.items()):
        for row, intensity in enumerate(intensities):
            for seed, axis in enumerate(axes[3 * place + row]):
                axis.imshow(draw(61, intensity, seed), cmap="gray")
                axis.set_xticks([])
                axis.set_yticks([])
            axes[3 * place + row][0].set_ylabel(f"{name}, {intensity:g}", fontsize=9)
    figure.savefig(path, dpi=70)


if __name__ == "__main__":
    main()
