"""What `solve` returns."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_shape
from ncvsd_inverse.files import whole_files
from ncvsd_inverse.images import encode_image, plot_pictures
from ncvsd_inverse.sampling.chains import Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Estimate", "Result"]

Estimate: TypeAlias = Literal["point", "sample", "mean", "ema"]

SHOWN = 8
"""Most images that a notebook or a plot shows."""

MEANINGS = {
    "point": "point estimate",
    "sample": "posterior sample",
    "mean": "mean of the samples",
    "ema": "average along the chain",
}
"""What each estimate is, in words."""


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Restored images. S is num_samples and B the number of measurements.

    It prints in a few lines, and a notebook shows its images.

    Attributes:
        x0: the estimate, shape (B, C, H, W), of the kind that `estimate` names.
        samples: posterior draws, shape (S, B, C, H, W); the one image of `x0` where S = 1, which is
            no draw if it is a point estimate.
        mean: mean of the samples, shape (B, C, H, W).
        std: standard deviation of the samples (divisor S - 1), shape (B, C, H, W); None if S = 1.
        nfe: network forward passes for each returned sample, restarts included, as counted.
        seconds: wall time of the sampling.
        residual: ||y - A x0|| / (sigma_y sqrt(number of measured entries)) of the estimate, shape
            (B,); about 1 when sigma_y is the noise level of y.
        schedule: the levels of the calls that made `x0`, largest first, image units.
        sigma_lik: noise std that was assumed, units of y; a mean over measurements.
        sigma_y: noise std of y, units of y, shape (B,).
        sigma_y_std: how sure it is, a std, shape (B,); None where it was given.
        estimate: what `x0` is: a "point" estimate, the first "sample", the "mean" of the samples,
            or an average along the first chain, "ema".
        method: the loop that ran.
        converged: whether every linear solve ended within 0.1 of the std of what it conditions.
        y: the measurements, shape (B, ...).
        kernel: what a `BlindBlur` turned out to be, shape (B, 1, n, n), as `Blur` takes it; None
            for other operators.
        kernel_std: how sure each of its weights is, a std, shape (B, 1, n, n).
        kernel_numbers: for kernels of a family the P numbers that tell them apart, each with its
            std, shape (B, P, 2): the std of a "gaussian", the radius of a "defocus", or length and
            angle of a "motion"; None for others.
    """

    x0: Tensor
    samples: Tensor
    mean: Tensor
    std: Tensor | None
    nfe: int
    seconds: float
    residual: Tensor
    schedule: tuple[float, ...]
    sigma_lik: float
    sigma_y: Tensor
    sigma_y_std: Tensor | None
    estimate: Estimate
    method: Method
    converged: bool
    y: Tensor
    kernel: Tensor | None = None
    kernel_std: Tensor | None = None
    kernel_numbers: Tensor | None = None

    def __repr__(self) -> str:
        count, *shape = self.x0.shape
        size = " x ".join(map(str, shape))
        number = "1 image" if count == 1 else f"{count} images"
        several = (
            f", {len(self.samples)} samples each with their std" if self.std is not None else ""
        )
        levels = f"{self.schedule[0]:.3g}"
        if len(self.schedule) > 1:
            levels += f" to {self.schedule[-1]:.3g}"
        found = (
            "" if self.sigma_y_std is None else f" found, give or take {_span(self.sigma_y_std)}"
        )
        kernel = "" if self.kernel is None else "kernel, kernel_std, "
        solves = "" if self.converged else "; linear solves fell short"
        return (
            f"{number} of {size}, {self.x0.dtype}: {MEANINGS[self.estimate]}{several}\n"
            f"{self.method} loop, {self.nfe} network calls at levels {levels}, "
            f"{self.seconds:.2g} s{solves}\n"
            f"noise of y {_span(self.sigma_y)}{found}, assumed {self.sigma_lik:.3g}\n"
            f"residual {_span(self.residual)} (about 1 where the noise of y is right)\n"
            f"{kernel}x0, samples, mean, std; save(folder), plot(truth=None)"
        )

    @classmethod
    def joined(cls, results: Sequence["Result"]) -> Self:
        """Return results of one measurement each as that of all."""
        first = results[0]

        def together(name: str, dim: int = 0) -> Tensor:
            return torch.cat([getattr(result, name) for result in results], dim)

        return cls(
            x0=together("x0"),
            samples=together("samples", 1),
            mean=together("mean"),
            std=None if first.std is None else together("std"),
            nfe=first.nfe,
            seconds=sum(result.seconds for result in results),
            residual=together("residual"),
            schedule=first.schedule,
            sigma_lik=sum(result.sigma_lik for result in results) / len(results),
            sigma_y=together("sigma_y"),
            sigma_y_std=None if first.sigma_y_std is None else together("sigma_y_std"),
            estimate=first.estimate,
            method=first.method,
            converged=all(result.converged for result in results),
            y=together("y"),
            **{
                name: None if getattr(first, name) is None else together(name)
                for name in ("kernel", "kernel_std", "kernel_numbers")
            },
        )

    def _repr_png_(self) -> bytes:
        """Return the first images side by side, as notebooks show them."""
        shown = self.x0[:SHOWN].detach().float().cpu()
        return encode_image(torch.cat(list(shown), dim=2)[None])

    def plot(self, truth: Tensor | None = None) -> "Figure":
        """Return a matplotlib figure: measurement, estimate and, of several samples, std.

        Measurements that are no pictures are left out; the std is shown from 0, black, to its
        largest, white. The first eight images are shown.

        Args:
            truth: true images, shape (B, C, H, W); shown first.

        Raises:
            ValueError: if `truth` has another shape.
        """
        columns = {"measurement": self.y, "estimate": self.x0, "std": _as_grey(self.std)}
        if truth is not None:
            check_shape("truth", truth, self.x0.shape)
            columns = {"truth": truth, **columns}
        pictures = {
            title: torch.split(images[:SHOWN].detach().float().cpu(), 1)
            for title, images in columns.items()
            if images is not None and images.ndim == 4 and images.shape[1] in (1, 3)
        }
        return plot_pictures(list(zip(*pictures.values(), strict=True)), list(pictures))

    def save(self, folder: str | Path) -> None:
        """Write the images and what is known of them; older files of the same names are replaced.

        For image i the folder, made if need be, gets i.png and, of several samples, i_std.png;
        result.safetensors holds x0, samples, std and kernels, and result.json the figures.

        Args:
            folder: the folder.

        Raises:
            ValueError: if the images are not of one or three channels.
            OSError: if a file cannot be written.
        """
        from safetensors.torch import save_file  # which refuses tensors that share memory

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {f"{i}.png": x for i, x in enumerate(torch.split(self.x0, 1))}
        spread = _as_grey(self.std)
        if spread is not None:
            pictures |= {f"{i}_std.png": x for i, x in enumerate(torch.split(spread, 1))}
        tensors = {"x0": self.x0, "samples": self.samples}
        more = {"std": self.std, "kernel": self.kernel, "kernel_std": self.kernel_std}
        tensors |= {name: tensor for name, tensor in more.items() if tensor is not None}
        numbers = self.kernel_numbers
        figures = {
            "estimate": self.estimate,
            "method": self.method,
            "nfe": self.nfe,
            "seconds": self.seconds,
            "residual": self.residual.tolist(),
            "sigma_y": self.sigma_y.tolist(),
            "sigma_y_std": None if self.sigma_y_std is None else self.sigma_y_std.tolist(),
            "kernel_numbers": None if numbers is None else numbers.tolist(),
            "sigma_lik": self.sigma_lik,
            "schedule": self.schedule,
            "converged": self.converged,
        }
        contents = {name: encode_image(x) for name, x in pictures.items()}
        contents["result.json"] = (json.dumps(figures, indent=2) + "\n").encode()
        paths = [folder / name for name in (*contents, "result.safetensors")]
        with whole_files(*paths) as parts:
            for part, content in zip(parts, contents.values(), strict=False):
                part.write_bytes(content)
            save_file({name: x.clone() for name, x in tensors.items()}, parts[-1])


def _span(values: Tensor) -> str:
    """Return the smallest and largest of some numbers, or the one they are."""
    low, high = f"{float(values.min()):.3g}", f"{float(values.max()):.3g}"
    return low if low == high else f"{low} to {high}"


def _as_grey(std: Tensor | None) -> Tensor | None:
    """Return a std (B, C, H, W) as pictures (B, 1, H, W) from -1, none, to 1, the largest."""
    if std is None:
        return None
    spread = std.mean(1, keepdim=True)
    return 2 * spread / spread.max().clamp(min=1e-12) - 1
