"""NCVSD: the toolkit's own solver with the distilled student, and the paper's settings of it.

`ncvsd` returns one draw of `solve`, `ncvsd-point` what it returns by default, with the settings of
the prior's card. `ncvsd-published` is the split Gibbs loop of the paper with its schedule, its
tuned noise level of the likelihood and its average along the chain, which is no draw of the
posterior either.

`teacher-gaussian` is the same loop with the teacher alone: a draw is its mean plus Gaussian noise
of the covariance that was measured for the level, in one call, also known as Jacobian-free
posterior sampling. Its temperature is below 1, and the likelihood has less noise than `sigma_y`, as
covariances that are the same everywhere move edges too little.

Where the operator is not linear a chain can end in a wrong mode, so calls that suffice are spent on
several chains of `ncvsd`; the one that fits the measurement best is kept and the calls of all are
counted.

Source:
    Peng et al., arXiv 2506.09416.
"""

import math
from dataclasses import replace
from typing import Literal

from torch import Tensor

from baselines.interface import Ladder, Method, Models, Problem, Settings
from ncvsd_inverse import karras, solve
from ncvsd_inverse.priors import DiffusionPrior
from ncvsd_inverse.protocols import LinearOperator, Prior

__all__ = ["OURS", "TEACHER_LAST"]

TEACHER_LAST = 0.05
"""Last level of `teacher-gaussian` where its first is set."""

_CHAINS, _LEAST_CALLS = (5, 4), 4
"""How many chains are run if the operator is not linear, the first that leaves each at least so
many calls, the same for all; else one."""


def _run(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Draw one posterior sample an image; exactly `nfe` calls of the student."""
    return _solve(problem, models.student, nfe)


def _run_point(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Estimate an image as `solve` does by default; exactly `nfe` calls of the student."""
    return _solve(problem, models.student, nfe, estimate="point")


def _run_teacher(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Estimate an image at a temperature below 1; exactly `nfe` calls of the teacher.

    The settings are the temperature, the `noise` that the likelihood assumes over sigma_y, and the
    `first` level; 0 takes the schedule of `solve`.
    """
    teacher = models.teacher
    if not isinstance(teacher, Prior):
        teacher = DiffusionPrior(teacher.denoise, image_shape=problem.shape[1:])
    return _solve(
        problem,
        teacher,
        nfe,
        temperature=settings["temperature"],
        sigma_lik=settings["noise"] * problem.sigma_y,
        first=settings["first"],
    )


def _run_published(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Estimate an image by the published loop and settings; exactly `nfe` calls of the student."""
    return _solve(problem, models.student, nfe, preset="ncvsd")


def _solve(
    problem: Problem,
    prior: Prior,
    nfe: int,
    *,
    preset: Literal["ncvsd"] | None = None,
    estimate: Literal["sample", "point"] = "sample",
    temperature: float | None = None,
    sigma_lik: float | None = None,
    first: float = 0.0,
) -> Tensor:
    chains = 1 if preset else _chains(problem, nfe)
    calls = nfe // chains
    return solve(
        problem.y,
        operator=problem.operator,
        prior=prior,
        nfe=calls,
        sigma_y=problem.sigma_y,
        schedule=karras(calls, first, TEACHER_LAST, 7.0) if first else None,
        preset=preset,
        estimate="ema" if preset else estimate,
        temperature=temperature,
        sigma_lik=sigma_lik,
        restarts=chains,
        seed=problem.keys,
    ).x0


def _chains(problem: Problem, nfe: int) -> int:
    if isinstance(problem.operator, LinearOperator):
        return 1
    fits = (count for count in _CHAINS if nfe % count == 0 and nfe // count >= _LEAST_CALLS)
    return next(fits, 1)


_DRAW = Method(
    name="ncvsd",
    title="NCVSD (ours)",
    run=_run,
    network="student",
    samples=True,
    linear_only=False,
    calls=(4, 10, 20, 50),
    reference="peng2025ncvsd",
)

OURS = (
    _DRAW,
    replace(_DRAW, name="ncvsd-point", title="NCVSD (ours), point", run=_run_point, samples=False),
    Method(
        name="teacher-gaussian",
        title="Teacher + Gaussian, our loop",
        run=_run_teacher,
        network="teacher",
        samples=False,
        linear_only=False,
        calls=(4, 10, 20, 50),
        reference="peng2025ncvsd",
        settings={"temperature": 0.7, "noise": 0.7, "first": 0.0},
        search={
            "temperature": Ladder(math.sqrt(2), most=1.0),
            "noise": Ladder(math.sqrt(2)),
            "first": Ladder(values=(0.0, 0.2, 0.4, 0.8, 1.6)),
        },
    ),
    Method(
        name="ncvsd-published",
        title="NCVSD, published loop",
        run=_run_published,
        network="student",
        samples=False,
        linear_only=False,
        calls=(50,),
        reference="peng2025ncvsd",
    ),
)
