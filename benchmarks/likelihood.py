"""Time one exact draw of the likelihood step, beside deepinv's prox_l2 of the same operator.

    python benchmarks/likelihood.py

A draw is two tensors of normal numbers, one adjoint and one solve; prox_l2 is one adjoint and one
solve. Times are medians in milliseconds after a warm-up.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ncvsd_inverse.operators import GaussianBlur, Inpaint, SuperResolution
from ncvsd_inverse.protocols import SIGMA_Y
from ncvsd_inverse.sampling.likelihood import ExactGaussian

if TYPE_CHECKING:
    from deepinv.physics import LinearPhysics

RHO = 0.5
HEADER = ("images", "operator", "draw", "solve", "deepinv prox_l2", "target")


@dataclass(frozen=True)
class Row:
    """One operator, ours and deepinv's, on images of one shape."""

    name: str
    ours: Inpaint | GaussianBlur | SuperResolution
    theirs: "LinearPhysics"
    target: str


def make_rows(shape: tuple[int, int, int, int], targets: tuple[str, str, str]) -> Iterator[Row]:
    """Yield the three operators of the targets for images of `shape`, (B, C, H, W)."""
    from deepinv.physics import BlurFFT, Downsampling, Inpainting

    _, channels, height, width = shape
    image = (channels, height, width)
    size, std = (61, 3.0) if height >= 256 else (15, 1.5)
    inpaint = Inpaint.random((height, width), keep=0.3)
    blur = GaussianBlur(std, size)
    mask = inpaint.mask[0].float().expand(image)
    yield Row("inpainting", inpaint, Inpainting(image, mask=mask), targets[0])
    kernel = blur.kernel.float()
    yield Row(f"circular blur {size} px", blur, BlurFFT(image, filter=kernel), targets[1])
    theirs = Downsampling(image, filter="bicubic", factor=4, padding="circular")
    yield Row("bicubic SR x4", SuperResolution(4), theirs, targets[2])


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Return the median time of `run` in milliseconds, after a tenth of the repeats as warm-up."""
    for _ in range(max(2, repeats // 10)):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def time_row(row: Row, shape: tuple[int, int, int, int], repeats: int) -> tuple[str, ...]:
    """Return the table row of one operator."""
    generators = [torch.Generator().manual_seed(item) for item in range(shape[0])]
    x = torch.rand(shape, generator=generators[0]) * 2 - 1
    y = row.ours.measure(x, SIGMA_Y, generator=generators)
    step = ExactGaussian(row.ours, y, SIGMA_Y)
    gain = (RHO / SIGMA_Y) ** 2
    their_y = row.theirs.A(x)
    with torch.no_grad():
        draw = median_ms(lambda: step.sample(x, RHO, generator=generators), repeats)
        solve = median_ms(lambda: row.ours.solve_normal(x, a=gain, b=1.0), repeats)
        theirs = median_ms(lambda: row.theirs.prox_l2(x, their_y, gain), repeats)
    return (
        " x ".join(str(side) for side in shape),
        row.name,
        f"{draw:.2f}",
        f"{solve:.2f}",
        f"{theirs:.2f}",
        row.target,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50, help="timed runs of each (median)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    large, small = (1, 3, 256, 256), (8, 3, 64, 64)
    table: list[tuple[str, ...]] = [HEADER]
    table += [time_row(row, large, settings.repeats) for row in make_rows(large, ("3", "30", "40"))]
    table += [time_row(row, small, settings.repeats) for row in make_rows(small, ("1", "1", "-"))]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    print(f"milliseconds, float32, CPU, {settings.threads} threads, torch {torch.__version__}")
    for cells in table:
        left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
        print("  ".join(left + right))


if __name__ == "__main__":
    main()
