"""What looks wrong about a measurement or a result, in words."""

from dataclasses import replace

import torch
from torch import Tensor

from ncvsd_inverse.protocols import LinearOperator, Statistics
from ncvsd_inverse.sampling.noise import first_noise
from ncvsd_inverse.sampling.problem import Problem

__all__ = ["describe_measurement", "describe_residual"]

PICTURES = ("blur", "denoise", "inpainting", "motion_blur", "superres")
"""Families whose measurements are pictures."""

SMALLEST = 32
"""Side in pixels of y below which nothing is said of its pixels."""

OFF_SUM = 0.02
"""How far from 1 a kernel's sum is worth a word."""

ENOUGH = 1024
"""Entries of a measurement below which nothing is said of its residual."""

HIGH, LOW = 1.5, 0.7
"""Residuals beyond which a model does not fit."""

SURE = 4
"""Stds of an estimate that make it sure."""

VISIBLE = 0.005
"""Noise std of whose look something is said."""

CORRELATED, BRIGHTER, BLOCKS = 0.2, 0.2, 1.2
"""Correlation of neighbours in the noise, and of its square with brightness, and the step at the
edges of blocks over that elsewhere, beyond which noise is not white: photographs with white noise
stay below 0.1, 0.1 and 1.1."""


def describe_measurement(problem: Problem) -> list[str]:
    """Return what is odd about measured pictures and their model: range, kernel, blocks."""
    if problem.traits.family not in PICTURES:
        return []
    notes = []
    one = torch.ones(1, *problem.shape[1:], dtype=problem.y.dtype, device=problem.y.device)
    if _treats_all_alike(problem) and problem.traits.family != "inpainting":
        gain = float(problem.operator(one).median()) / problem.traits.gain
        if abs(gain - 1) > OFF_SUM:
            notes.append(
                f"the kernel sums to {gain:.3g}: y is taken to be so many times as bright as the "
                "picture; divide the kernel by its sum if it is not"
            )
    y = problem.y
    if min(y.shape[-2:]) < SMALLEST:
        return notes
    low, high = float(y.min()), float(y.max())
    if high > 20:
        notes.append(
            f"y reaches {high:.0f}: pictures are in [-1, 1] here, so y / 127.5 - 1 is meant if it "
            "holds 0 to 255"
        )
    elif high > 0.5 and low > -0.2 and float((y < 0).double().mean()) < 0.02:
        notes.append(
            "y lies in [0, 1]: pictures are in [-1, 1] here, so 2 y - 1 is meant if its black is 0"
        )
    has_many = min(y.shape[-2:]) >= 2 * SMALLEST
    if has_many and problem.traits.family != "inpainting" and _blockiness(y) > BLOCKS:
        notes.append(
            "y has blocks of 8 pixels, as from JPEG, whose errors are no white noise and are kept; "
            "sigma_y = 0.06 takes them for noise"
        )
    return notes


def describe_residual(
    problem: Problem, x0: Tensor, residual: Tensor, statistics: Statistics | None, *, known: bool
) -> list[str]:
    """Return what the residual of an estimate says of noise and model.

    Args:
        problem: the measurements.
        x0: the estimates, shape (B, C, H, W).
        residual: of them, see `Result`.
        statistics: of the prior, from which the noise is estimated where there is too much of it.
        known: whether sigma_y was given.
    """
    if problem.y[0].numel() < ENOUGH:
        return []
    notes = []
    most, least = float(residual.max()), float(residual.min())
    if most > HIGH:
        notes.append(
            f"the residual is {most:.2g}, where about 1 is right: y has more noise than sigma_y = "
            f"{problem.sigma_y:.3g}, or kernel, boundary, scale, mask or range of values are not "
            "those of y" + ('; sigma_y="auto" estimates the noise' if known else "")
        )
    can_tell = (
        _treats_all_alike(problem)
        and statistics is not None
        and isinstance(problem.operator, LinearOperator)
    )
    if known and least < LOW and can_tell:
        place = slice(int(residual.argmin()), int(residual.argmin()) + 1)
        one = replace(problem, y=problem.y[place], keys=problem.keys[place])
        found, std = first_noise(one, statistics)
        if found + SURE * std < LOW * problem.sigma_y:
            notes.append(
                f"the residual is {least:.2g} and the noise of y seems to be {found:.2g}, not "
                f'{problem.sigma_y:.3g}: a smaller sigma_y, or "auto", keeps more detail'
            )
    return notes + _describe_colour(problem, x0)


def _treats_all_alike(problem: Problem) -> bool:
    """Tell whether the operator is known to hold nothing for each image."""
    repeated = problem.traits.repeated
    return repeated is not None and repeated(2) is problem.operator


def _describe_colour(problem: Problem, x0: Tensor) -> list[str]:
    """Return how the noise of measured pictures is not white."""
    y = problem.y
    plain = problem.traits.family in ("denoise", "blur", "motion_blur", "superres")
    if not plain or min(y.shape[-2:]) < SMALLEST or problem.sigma_y < VISIBLE:
        return []
    signal = problem.operator(x0).to(y.dtype)
    rest = y - signal
    rest = rest - rest.mean()
    neighbours = _correlation(rest[..., 1:], rest[..., :-1]) + _correlation(
        rest[..., 1:, :], rest[..., :-1, :]
    )
    square, bright = rest.square().mean(1), signal.mean(1)
    notes = []
    if neighbours / 2 > CORRELATED:
        notes.append(
            f"the noise of neighbouring pixels is alike (correlation {neighbours / 2:.2f}), as "
            "after resizing or demosaicing: its estimate is too small; reduce y first, or give a "
            "larger sigma_y"
        )
    if _correlation(square - square.mean(), bright - bright.mean()) > BRIGHTER:
        notes.append(
            "the noise is stronger where y is brighter, as that of photons: operators.Poisson is "
            "for counts; a larger sigma_y for what is bright"
        )
    return notes


def _correlation(a: Tensor, b: Tensor) -> float:
    size = (a.square().mean() * b.square().mean()).sqrt().clamp(min=1e-12)
    return float((a * b).mean() / size)


def _blockiness(y: Tensor) -> float:
    """Return the mean step across the edges of blocks of 8 pixels over that elsewhere."""
    ratios = []
    for dim in (2, 3):
        steps = y.diff(dim=dim).abs().transpose(2, dim).mean((0, 1, 3))
        at_edge = torch.arange(len(steps), device=y.device) % 8 == 7
        ratios.append(float(steps[at_edge].mean() / steps[~at_edge].mean().clamp(min=1e-12)))
    return sum(ratios) / 2
