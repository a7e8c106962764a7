"""Pictures of results; they must not know how the results came about."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ncvsd_inverse.checks import check_images
from ncvsd_inverse.images import write_atomically

COLUMNS = ("truth", "measurement", "estimate", "std")


@dataclass(frozen=True)
class GridRow:
    """One row of a picture grid; pictures have shape (1, 1 or 3, H, W), in [-1, 1].

    Attributes:
        title: written left of the row.
        truth: the true image.
        measurement: what was measured, as a picture of any size.
        estimate: the restored image.
        std: standard deviation of the samples, >= 0; None for a single sample.
        psnr: of the estimate, dB; written above it.
    """

    title: str
    truth: Tensor
    measurement: Tensor
    estimate: Tensor
    std: Tensor | None
    psnr: float


def save_picture_grid(path: str | Path, rows: Sequence[GridRow]) -> None:
    """Write a PNG with a row for each result: truth, measurement, estimate, std.

    The std is averaged over channels and shown from 0 (black) to the grid's largest (white).

    Args:
        path: the PNG file, written whole or not at all; an older one is replaced.
        rows: at least one.

    Raises:
        ValueError: if there is no row or a picture has another shape.
        OSError: if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    spreads = [None if row.std is None else row.std.mean((0, 1)).cpu().numpy() for row in rows]
    widest = max((float(spread.max()) for spread in spreads if spread is not None), default=0.0)
    figure = Figure(figsize=(1.7 * len(COLUMNS) + 0.5, 1.85 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(COLUMNS), squeeze=False)
    for place, row, spread in zip(axes, rows, spreads, strict=True):
        for axis in place:
            axis.set_xticks([])
            axis.set_yticks([])
        place[0].set_ylabel(row.title)
        for axis, picture in zip(place, (row.truth, row.measurement, row.estimate), strict=False):
            axis.imshow(_pixels(picture), cmap="gray", vmin=0, vmax=1)
        place[2].set_title(f"{row.psnr:.1f} dB", fontsize="small")
        if spread is not None:
            place[3].imshow(spread, cmap="gray", vmin=0, vmax=widest or 1.0)
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        over = axis.get_title()
        axis.set_title(f"{title}, {over}" if over else title, fontsize="medium")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def _pixels(x: Tensor) -> np.ndarray:
    """Return a picture as matplotlib takes it, (H, W, 3) or (H, W) in [0, 1]."""
    check_images("picture", x)
    if x.shape[0] != 1 or x.shape[1] not in (1, 3):
        raise ValueError(f"picture must have shape (1, 1 or 3, H, W), got {tuple(x.shape)}")
    pixels: np.ndarray = ((x[0].clamp(-1, 1) + 1) / 2).permute(1, 2, 0).cpu().numpy()
    return pixels if pixels.shape[2] == 3 else pixels[..., 0]
