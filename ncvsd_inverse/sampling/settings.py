"""Default and published settings, by operator family, as data.

A family is the `family` attribute of an operator; an operator without one gets the general row.
"""

import math
from typing import NamedTuple

from ncvsd_inverse.checks import check_choice
from ncvsd_inverse.protocols import SIGMA_Y, Point, Points
from ncvsd_inverse.schedules import karras

__all__ = [
    "DEFAULT_LEVELS",
    "FEW_LEVELS",
    "LONG_LEVELS",
    "POINTS",
    "PUBLISHED",
    "PUBLISHED_LEVELS",
    "Average",
    "Levels",
    "Published",
    "default_average",
    "default_schedule",
    "point_settings",
    "published_schedule",
    "published_sigma_lik",
]


class Levels(NamedTuple):
    """Ends and exponent of a Karras schedule, in image units."""

    largest: float
    smallest: float
    exponent: float


class Average(NamedTuple):
    """Exponential average of x0 over the sweeps of a chain.

    Each sweep with rho < `below` keeps weight `mu` on the past; earlier sweeps are forgotten.
    """

    mu: float
    below: float = math.inf


class Published(NamedTuple):
    """One column of the hyper-parameters of the NCVSD paper; beta = 2 sigma_lik^2."""

    average: Average
    beta: float


DEFAULT_LEVELS: dict[str, dict[str | None, Levels]] = {
    "conditioning": {
        None: Levels(3.0, 0.05, 7.0),
        "inpainting": Levels(6.0, 0.05, 7.0),
        "blur": Levels(0.8, 0.05, 7.0),
        "motion_blur": Levels(0.8, 0.05, 7.0),
        "superres": Levels(1.5, 0.05, 7.0),
    },
    "gibbs": {None: Levels(3.0, 0.02, 7.0), "phase_retrieval": Levels(10.0, 0.02, 7.0)},
}
"""Schedules by method and family.

For "conditioning" they are the best by CRPS of `experiments/few_step/schedules.py`, for up to
`FEW_LEVELS` levels. "gibbs" begins at rho = 3, six stds of the data: from there on up, u knows
nothing of a linear y.
"""

FEW_LEVELS = 10
"""Most levels of a chain that is short."""

LONG_LEVELS = Levels(6.0, 0.05, 7.0)
"""Schedule of "conditioning" for more than `FEW_LEVELS` levels.

Errors of single draws add up over many sweeps at low levels; sweeps at high levels forget them.
"""

POINTS: Points = {
    None: {
        1: Point(0.35, 0.7, 1.5, 0.05, 0.0),
        4: Point(0.35, 0.7, 3.0, 0.1, 0.0),
        10: Point(0.35, 0.7, 3.0, 0.05, 0.0),
    },
    "inpainting": {
        1: Point(0.35, 0.7, 1.5, 0.05, 0.0),
        2: Point(0.35, 0.7, 3.0, 0.2, 0.0),
        4: Point(0.35, 0.7, 3.0, 0.1, 0.0),
        10: Point(0.35, 0.5, 3.0, 0.05, 0.015),
    },
    "blur": {
        1: Point(0.35, 0.7, 0.3, 0.05, 0.0),
        2: Point(0.35, 0.7, 0.4, 0.2, 0.0),
        4: Point(0.35, 0.7, 0.4, 0.1, 0.0),
        10: Point(0.35, 0.6, 0.4, 0.07, 0.015),
    },
    "motion_blur": {
        1: Point(0.35, 0.7, 0.4, 0.05, 0.0),
        2: Point(0.35, 0.7, 0.4, 0.2, 0.0),
        4: Point(0.35, 0.7, 0.4, 0.1, 0.0),
        10: Point(0.35, 0.7, 0.4, 0.05, 0.015),
    },
    "superres": {
        1: Point(0.5, 1.0, 0.75, 0.05, 0.0),
        2: Point(0.5, 0.7, 0.75, 0.2, 0.0),
        4: Point(0.5, 0.7, 1.5, 0.1, 0.0),
        10: Point(0.4, 0.7, 1.5, 0.07, 0.0),
    },
}
"""Settings of point estimates for priors that bring none.

They lie between what `experiments/few_step/point.py` found for faces (16 to 24 images), which takes
temperatures of 0.1 to 0.5, and for photographs (8 images), which takes 0.5 to 0.75.
"""

PUBLISHED_LEVELS = Levels(80.0, 0.002, 2.0)
"""Published schedule; its last level is never called."""

PUBLISHED: dict[str, Published] = {
    "inpainting": Published(Average(0.2), 1e-4),
    "blur": Published(Average(0.6), 2e-3),
    "motion_blur": Published(Average(0.6), 4e-3),
    "superres": Published(Average(0.6), 1e-3),
    "phase_retrieval": Published(Average(0.6, below=0.2), 1e-3),
}
"""Tuned values of Peng et al., arXiv 2506.09416, at sigma_y = 0.05 on 256x256 images.

For motion blur their code (github.com/xypeng9903/ncvsd, presets/task/motion_deblur_circ.yaml) had
beta 3e-3 in January 2025, 4e-3 as in the paper from April on, and 3e-3 again since July 2025.
"""


def default_schedule(
    method: str, family: str | None, num: int, highest: float = math.inf
) -> tuple[float, ...]:
    """Return the default `num` levels of rho of a method for an operator family, largest first.

    None is above `highest`, the largest level that a prior knows.
    """
    rows = DEFAULT_LEVELS[method]
    levels = rows.get(family, rows[None])
    if method == "conditioning" and num > FEW_LEVELS:
        levels = LONG_LEVELS
    return karras(num, min(levels.largest, highest), levels.smallest, levels.exponent)


LEAST_LAST = 0.004
"""Least level of a last call, half a step of 8 bits: below, it has nothing to take away."""


def point_settings(family: str | None, calls: int, sigma_y: float, points: Points) -> Point:
    """Return how a point estimate of so many calls runs: the row nearest in the ratio of calls.

    Its smallest level and that of its last call go with the noise.

    Args:
        family: the operator's family.
        calls: network calls of the chain, >= 1.
        sigma_y: noise std of the measurement, image units.
        points: the rows.
    """
    rows = points.get(family, points[None])
    nearest = min(sorted(rows), key=lambda known: abs(math.log(known / calls)))
    point, scale = rows[nearest], sigma_y / SIGMA_Y
    smallest = min(point.smallest * scale, point.first)
    last = point.last * scale
    return point._replace(smallest=smallest, last=last if last >= LEAST_LAST else 0.0)


def default_average(family: str | None) -> Average:
    """Return the weights of `estimate="ema"`: the published ones, or 0.6 for other families."""
    return PUBLISHED[family].average if family in PUBLISHED else Average(0.6)


def published_schedule(num: int) -> tuple[float, ...]:
    """Return the first `num` of num + 1 published levels: 49 reproduce the paper's "50 NFE"."""
    return karras(num + 1, *PUBLISHED_LEVELS)[:num]


def published_sigma_lik(family: str | None) -> float:
    """Return the published noise std of the likelihood step, sqrt(beta / 2).

    Raises:
        ValueError: if nothing is published for the family.
    """
    check_choice("operator (its family, for preset='ncvsd')", family, PUBLISHED)
    return math.sqrt(PUBLISHED[str(family)].beta / 2)
