"""Picture grids of restorations, and plots of an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ncvsd_inverse.files import write_whole
from ncvsd_inverse.images import encode_figure, plot_pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ncvsd_inverse.evaluation.posterior import Figure as Measured
    from ncvsd_inverse.evaluation.posterior import LevelFigures, PosteriorRatio

__all__ = [
    "COLUMNS",
    "GridRow",
    "save_evaluation_plot",
    "save_picture_grid",
]

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
    spreads = [None if row.std is None else row.std.mean((0, 1))[None, None] for row in rows]
    widest = max((float(spread.max()) for spread in spreads if spread is not None), default=0.0)
    pictures = [
        (
            row.truth,
            row.measurement,
            row.estimate,
            None if spread is None else 2 * spread / (widest or 1.0) - 1,
        )
        for row, spread in zip(rows, spreads, strict=True)
    ]
    figure = plot_pictures(pictures, COLUMNS, [row.title for row in rows])
    for number, row in enumerate(rows):
        axis = figure.axes[len(COLUMNS) * number + 2]
        before = f"{axis.get_title()}, " if axis.get_title() else ""
        axis.set_title(f"{before}{row.psnr:.1f} dB", fontsize="medium" if before else "small")
    write_whole(path, encode_figure(figure))


def save_evaluation_plot(path: str | Path, levels: Sequence["LevelFigures"]) -> None:
    """Write a PNG of the figures of a prior over the noise level, with standard errors.

    Four panels: the posterior ratio beside 2 (posterior draws) and 1 (a mean); its parts, beside
    1 and 0; PSNR of the teacher and of the mean of the draws; CRPS.

    Args:
        path: the PNG file, written whole or not at all; an older one is replaced.
        levels: at least one.

    Raises:
        ValueError: if there is no level.
        OSError: if the file cannot be written.
    """
    if not levels:
        raise ValueError("levels must hold at least one level, got none")
    figure = _plot_levels(sorted(levels, key=lambda level: level.sigma))
    write_whole(path, encode_figure(figure))


def _plot_levels(levels: Sequence["LevelFigures"]) -> "Figure":
    from matplotlib.figure import Figure

    stds = [level.sigma for level in levels]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    (ratio, parts), (psnr, crps) = figure.subplots(2, 2, sharex=True)

    def plot(axis: "Axes", label: str, figures: Sequence["Measured"], style: str) -> None:
        values, errors = [each.value for each in figures], [each.error for each in figures]
        axis.errorbar(stds, values, errors, fmt=style, label=label, capsize=2, markersize=4)

    samplers: list[tuple[str, str, list[PosteriorRatio]]] = [
        ("prior", "-", [level.prior for level in levels])
    ]
    diffusion = [level.teacher for level in levels if level.teacher is not None]
    if len(diffusion) == len(levels):
        samplers.append(("teacher's diffusion", "--", diffusion))
    for name, line, ratios in samplers:
        plot(ratio, name, [each.ratio for each in ratios], f"C0o{line}")
        plot(parts, f"{name}: variance", [each.variance for each in ratios], f"C0o{line}")
        plot(parts, f"{name}: squared bias", [each.bias for each in ratios], f"C1s{line}")
    plot(psnr, "teacher's mean", [level.teacher_psnr for level in levels], "C2^-")
    plot(psnr, "mean of the prior's draws", [level.mean_psnr for level in levels], "C0o-")
    plot(crps, "prior", [level.crps for level in levels], "C0o-")
    for axis, title, references in (
        (ratio, "Posterior ratio: MSE of a draw / teacher's MSE", {2: "posterior", 1: "mean"}),
        (parts, "Its parts, over the teacher's MSE", {1: "variance", 0: "bias"}),
        (psnr, "PSNR in dB, over all pixels", {}),
        (crps, "CRPS a pixel", {}),
    ):
        for value, name in references.items():
            axis.axhline(value, color="0.4", linewidth=0.9, linestyle=":")
            axis.annotate(
                f"{name}: {value}",
                (1, value),
                xycoords=("axes fraction", "data"),
                xytext=(-3, 2),
                textcoords="offset points",
                horizontalalignment="right",
                fontsize="x-small",
                color="0.4",
            )
        axis.set_title(title, fontsize="medium")
        axis.set_xscale("log")
        axis.set_xticks(stds, [f"{std:g}" for std in stds])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        # Room for the names of the references beside the curves, and for the legend above them.
        axis.margins(0.18, 0.22)
        axis.legend(fontsize="x-small", ncols=2, loc="upper left")
    for axis in (psnr, crps):
        axis.set_xlabel("noise std sigma, images in [-1, 1]")
    return figure
