"""The metrics of restored images by name."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from harness.records import METRICS
from ncvsd_inverse import CheckpointError, Task
from ncvsd_inverse.checks import check_choice
from ncvsd_inverse.metrics import COVERAGE_DRAWS, coverage, crps, lpips, psnr, ssim

__all__ = ["applicable", "choose_metrics", "score"]

_Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_SINGLE: dict[str, _Distance] = {
    "psnr": psnr,
    "ssim": ssim,
    "lpips-alex": partial(lpips, net="alex"),
    "lpips-squeeze": partial(lpips, net="squeeze"),
    "lpips-vgg": partial(lpips, net="vgg"),
}
"""Metrics of one image (B, C, H, W) and its truth -> (B,)."""

_SEVERAL: dict[str, _Distance] = {
    "psnr-mean": lambda draws, x0: psnr(draws.mean(0), x0),
    "crps": crps,
    "coverage": coverage,
}
"""Metrics of draws (S, B, C, H, W) and the truth -> (B,)."""

_LEAST_DRAWS = {"psnr-mean": 2, "crps": 2, "coverage": COVERAGE_DRAWS}
"""Draws an image that the metrics of several draws need."""


def choose_metrics(
    asked: Sequence[str] | None, x0: Tensor, draws: int
) -> tuple[tuple[str, ...], list[str]]:
    """Return the metrics to compute, and a line on each that is left out.

    Args:
        asked: names; None: all that this machine, the images and the draws allow.
        x0: the true images, shape (N, C, H, W).
        draws: draws an image.

    Raises:
        ValueError: if a metric that was asked for is unknown or does not fit images or draws.
        CheckpointError: if the weights of one that was asked for are missing.
    """
    chosen, notices = [], []
    for name in METRICS if asked is None else dict.fromkeys(asked):
        check_choice("--metrics", name, METRICS)
        least = _LEAST_DRAWS.get(name, 1)
        if draws < least:
            if asked is not None:
                raise ValueError(f"--draws must be at least {least} for {name}, got {draws}")
            continue
        try:
            if name in _SINGLE:
                _SINGLE[name](x0[:1], x0[:1])
        except (CheckpointError, ValueError) as error:
            if asked is not None:
                raise
            notices.append(f"without {name}: {' '.join(str(error).split())}")
        else:
            chosen.append(name)
    return tuple(chosen), notices


def applicable(metrics: Sequence[str], draws: int) -> tuple[str, ...]:
    """Return those of `metrics` that so many draws an image allow."""
    return tuple(name for name in metrics if draws >= _LEAST_DRAWS.get(name, 1))


def score(
    metrics: Sequence[str], draws: Tensor, x0: Tensor, y: Tensor, task: Task
) -> Mapping[str, list[float]]:
    """Return each metric's values, one an image.

    Args:
        metrics: names; those of several draws are left out where there are too few.
        draws: restored images, shape (S, B, C, H, W); the first counts for single images.
        x0: true images, shape (B, C, H, W).
        y: measurements, shape (B, ...).
        task: their operator and noise level.
    """
    values = {}
    for name in applicable(metrics, len(draws)):
        if name in _SINGLE:
            value = _SINGLE[name](draws[0], x0)
        elif name in _SEVERAL:
            value = _SEVERAL[name](draws, x0)
        else:
            value = _residual(draws[0], y, task)
        values[name] = [float(entry) for entry in value]
    return values


def _residual(x0: Tensor, y: Tensor, task: Task) -> Tensor:
    """Return ||y - A x0|| / (sigma_y sqrt(number of measured entries)), shape (B,)."""
    misfit = torch.linalg.vector_norm((y - task.operator(x0)).flatten(1), dim=1)
    result: Tensor = misfit / (task.sigma_y * task.operator.count_measured(y).to(y.dtype).sqrt())
    return result
