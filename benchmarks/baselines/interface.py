"""What a benchmarked method is given, what it returns, and what is known of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ncvsd_inverse.protocols import Denoiser, LinearOperator, NetworkBacked, Prior
from ncvsd_inverse.sampling import Problem

__all__ = ["Grid", "Method", "Models", "Problem", "Run", "Settings", "misfit_gradient"]

Settings: TypeAlias = Mapping[str, float]
"""The free settings of a method by name; counts are whole numbers."""

Grid: TypeAlias = Mapping[str, tuple[float, ...]]
"""For each setting that is tuned, the values to try."""


@dataclass(frozen=True)
class Models:
    """The networks that all methods share.

    Attributes:
        teacher: the denoiser, a network or analytic; gradients pass through it.
        student: the generative denoiser distilled from it.
        sigma_max: largest noise std that both know, image units.
    """

    teacher: Denoiser
    student: Prior
    sigma_max: float = 80.0

    @property
    def networks(self) -> list[nn.Module]:
        """The modules whose passes are counted."""
        models = (self.teacher, self.student)
        return [model.network for model in models if isinstance(model, NetworkBacked)]


Run: TypeAlias = Callable[[Problem, Models, int, Settings], Tensor]
"""(problem, models, network passes for each image, settings) -> images (B, C, H, W), no gradient.

The number of passes is a budget: a run makes as many forward passes of a network as it says or
fewer, and never more. What it really makes is counted from outside. No image's result depends on
the other images of the batch. DivergenceError if an image stops being finite.
"""


@dataclass(frozen=True)
class Method:
    """A method under test.

    Attributes:
        name: by which it is asked for and recorded.
        title: its name in tables.
        run: restores a batch; one draw or one point estimate an image.
        network: which network it calls.
        samples: whether it returns draws of the posterior; else a point estimate.
        linear_only: whether the operator must be linear.
        calls: network passes at which it is run unless others are asked for; (0,) without network.
        settings: values of all free settings, where tuning has not found others.
        grid: settings to tune and their values; empty where there is nothing to tune.
        reference: key of its paper in `references.bib`.
    """

    name: str
    title: str
    run: Run
    network: Literal["student", "teacher", "none"]
    samples: bool
    linear_only: bool
    calls: tuple[int, ...]
    reference: str
    settings: Settings = field(default_factory=dict)
    grid: Grid = field(default_factory=dict)


def misfit_gradient(problem: Problem, x: Tensor) -> Tensor:
    """Return the gradient of ||y - A(x)||^2 / 2, shape (B, C, H, W)."""
    if isinstance(problem.operator, LinearOperator):
        return problem.operator.adjoint(problem.operator(x) - problem.y)
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        misfit = (problem.operator(point) - problem.y).square().sum() / 2
        (gradient,) = torch.autograd.grad(misfit, point)
    return gradient
