"""What a benchmarked method is given, what it returns, and what is known of it."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import check_choice
from ncvsd_inverse.protocols import Denoiser, LinearOperator, NetworkBacked, Prior
from ncvsd_inverse.sampling import Problem

__all__ = ["Ladder", "Method", "Models", "Problem", "Run", "Settings", "misfit_gradient"]

Settings: TypeAlias = Mapping[str, float]
"""The free settings of a method by name; counts are whole numbers."""


@dataclass(frozen=True)
class Ladder:
    """The values that tuning may try of a setting, in steps from where its search starts.

    A step is a factor, and part of a step that part of it in logarithms; or it is the next of the
    listed values, for choices and for ranges that hold 0.

    Attributes:
        factor: of one step, > 1.
        least: smallest value, >= 0.
        most: largest value.
        values: all values, rising, in place of factors; each step leads to the next.
        kind: "count": whole numbers, at least 1; "calls": such of network calls, which are never
            more than those of the run.
    """

    factor: float = 2.0
    least: float = 0.0
    most: float = math.inf
    values: tuple[float, ...] = ()
    kind: Literal["real", "count", "calls"] = "real"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("real", "count", "calls"))
        if not self.factor > 1:
            raise ValueError(f"factor must be above 1, got {self.factor}")
        if not 0 <= self.least <= self.most:
            raise ValueError(f"least must be in [0, most], got {self.least}, most {self.most}")
        if any(low >= high for low, high in pairwise(self.values)):
            raise ValueError(f"values must rise, got {self.values}")

    def value(self, start: float, steps: float, calls: int) -> float:
        """Return the value `steps` from `start`, or the bound that lies before it.

        Args:
            start: value of no steps; one that may not be tried counts as the nearest that may.
            steps: up, or down if negative; parts of a step of listed values are left out.
            calls: network calls of the run.
        """
        steps = self.bound(start, steps, calls)
        if self.values:
            allowed, nearest = self._listed(start, calls)
            return allowed[nearest + int(steps)]
        least, most = self._range(calls)
        value = min(max(start, least), most)
        if steps:
            value = float(f"{value * self.factor**steps:.3g}")
        return min(max(value if self.kind == "real" else round(value), least), most)

    def bound(self, start: float, steps: float, calls: int) -> float:
        """Return `steps`, or the steps to the bound that lies before; see `value`."""
        if self.values:
            allowed, nearest = self._listed(start, calls)
            return min(max(steps, -nearest), len(allowed) - 1 - nearest)
        least, most = self._range(calls)
        value = min(max(start, least), most)
        down = math.log(least / value, self.factor) if least > 0 else -math.inf
        return min(max(steps, down), math.log(most / value, self.factor))

    def _range(self, calls: int) -> tuple[float, float]:
        """Return the least and the largest value."""
        if self.kind == "real":
            return self.least, self.most
        least = max(self.least, 1)
        return least, max(least, min(self.most, calls) if self.kind == "calls" else self.most)

    def _listed(self, start: float, calls: int) -> tuple[list[float], int]:
        """Return the listed values that may be tried, and the place of the one nearest `start`."""
        _, most = self._range(calls)
        allowed = [value for value in self.values if value <= most] or [self.values[0]]
        return allowed, min(range(len(allowed)), key=lambda place: abs(allowed[place] - start))


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
        reference: key of its paper in `references.bib`; "" for none.
        settings: values of all free settings, where tuning has not found others.
        search: settings to tune, from their values in `settings`; the first are tried first.
        least_calls: fewest network passes that it can be run at.
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
    search: Mapping[str, Ladder] = field(default_factory=dict)
    least_calls: int = 1

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ValueError(f"name must be letters, digits and . + - _, got {self.name!r}")
        check_choice("network", self.network, ("student", "teacher", "none"))
        least = 0 if self.network == "none" else self.least_calls
        if not self.calls or min(self.calls) < least:
            raise ValueError(f"calls must be at least {least} each, got {self.calls}")
        if self.network == "none" and set(self.calls) != {0}:
            raise ValueError(f"calls must be (0,) without a network, got {self.calls}")
        for name, ladder in self.search.items():
            check_choice("each name in search", name, self.settings)
            if not ladder.values and not self.settings[name] > 0:
                raise ValueError(
                    f"{name} must be positive to be searched by factors, got {self.settings[name]}"
                )

    def settings_at(self, calls: int, found: Settings | None = None) -> Settings:
        """Return the settings of a run of so many network passes.

        Args:
            calls: network passes of the run.
            found: settings in place of the method's own.
        """
        settings = {**self.settings, **(found or {})}
        for name, ladder in self.search.items():
            if ladder.kind == "calls":
                settings[name] = min(settings[name], calls)
        return settings


def misfit_gradient(problem: Problem, x: Tensor) -> Tensor:
    """Return the gradient of ||y - A(x)||^2 / 2, shape (B, C, H, W)."""
    if isinstance(problem.operator, LinearOperator):
        return problem.operator.adjoint(problem.operator(x) - problem.y)
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        misfit = (problem.operator(point) - problem.y).square().sum() / 2
        (gradient,) = torch.autograd.grad(misfit, point)
    return gradient
