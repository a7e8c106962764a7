"""The noise std of a measurement, from what a Gaussian law of its image leaves unexplained.

With d = y - A x, where A x errs by a Gaussian of covariance k A S A^T, d is normal with covariance
k K + v I, K = A S A^T. The most likely noise variance v and factor k are fixed points of

    v = |r|^2 / tr P,   k <- k <A m, r> / (v tr(I - P)),
    m = k S A^T (k K + v I)^-1 d,   r = d - A m = P d,   P = v (k K + v I)^-1,

and v given all else is scaled inverse chi-squared with tr P degrees of freedom.

Source: MacKay, Bayesian interpolation, Neural Computation 4 (1992).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.priors.covariance import DenseCovariance, SpectralCovariance
from ncvsd_inverse.protocols import (
    SIGMA_Y,
    Covariance,
    LinearOperator,
    Statistics,
    StructuredOperator,
)
from ncvsd_inverse.sampling.linear_solves import LinearSolver
from ncvsd_inverse.sampling.matheron import for_double
from ncvsd_inverse.sampling.problem import Problem

__all__ = [
    "LEAST_NOISE",
    "DirectNoise",
    "Noise",
    "NoiseTracker",
    "check_alike",
    "first_noise",
    "mean_noise",
]

LEAST_NOISE = 5e-4
"""Smallest noise std that is told from none, units of y: an eighth of a step of 8 bits."""

FIRST_STEPS = 12
"""Most iterations of the estimate before the chain."""

SETTLED = 0.02
"""Change of log v and log k at which iterations stop."""

HIDES = 2.0
"""How many times the noise of y the noise before a call must be, seen through A, to hide it."""

WIDEST_RIM = 8
"""Most pixels at an edge that do not count."""

FARTHEST = 2.0
"""Largest change of log v and log k in an iteration."""

PROBE_STEP = 0.3
"""Length of the step along which a divergence is taken, in stds of the noise."""

STEPS = 127.5
"""Steps of 8 bits in a unit of [-1, 1]; their rounding has a std of 1 / (127.5 sqrt(12))."""

MOST_NOISE = 100.0
"""Largest noise std that is told, units of y."""

FACTORS = (0.02, 50.0)
"""Between which the factor k lies."""


class Noise(NamedTuple):
    """A noise std and the std of its law, units of y."""

    sigma: float
    std: float


def check_alike(problem: Problem) -> None:
    """ValueError unless the operator treats all images alike, so that each can go by itself."""
    repeated = problem.traits.repeated
    if repeated is not None and repeated(2) is not problem.operator:
        raise ValueError(
            "sigma_y must be a number for an operator that holds something for each image, got "
            "'auto': solve one image after the other"
        )


def first_noise(problem: Problem, statistics: Statistics | None) -> Noise:
    """Estimate the noise of one measurement with a Gaussian law of images; no network call.

    Raises:
        ValueError: if the operator is not linear or there is no such law.
    """
    if not isinstance(problem.operator, LinearOperator):
        raise ValueError("sigma_y must be a number for an operator that is not linear, got 'auto'")
    if statistics is None:
        raise ValueError("sigma_y must be a number for a prior without statistics, got 'auto'")
    like = problem.y.new_zeros(problem.shape)
    tracker = NoiseTracker(problem, Noise(SIGMA_Y, SIGMA_Y))
    covariance = statistics.covariance(math.inf, like)
    return tracker.update(like + statistics.mean_image(like), covariance, iterations=FIRST_STEPS)


def mean_noise(found: Sequence[Noise]) -> Noise:
    """Return the mean of estimates."""
    return Noise(*(math.fsum(values) / len(found) for values in zip(*found, strict=True)))


class NoiseTracker:
    """Follows the noise std of one measurement along its chains.

    Args:
        problem: the measurement, repeated for each chain, of a linear operator.
        start: where estimates begin.

    Attributes:
        noise: the latest estimate.
        gain: std of A n for white noise n of std 1.
    """

    def __init__(self, problem: Problem, start: Noise) -> None:
        y, operator = problem.y, problem.operator
        assert isinstance(operator, LinearOperator)
        self.operator = operator
        self.noise = start
        self._y = y.double()
        self._measured = problem.traits.measured or (lambda values: values)
        source = torch.Generator(y.device).manual_seed(0)
        self._probe = self._measured(draw_normal(self._y[:1], source)).expand_as(self._y)
        white = draw_normal(self._y.new_empty(problem.shape)[:1], source)
        seen = self._measured(for_double(operator, white)(white))
        entries = self._measured(torch.ones_like(self._y))
        self.gain = math.sqrt(float(seen.square().sum() / entries[:1].sum()))
        self._rough = y.ndim == 4 and math.prod(y.shape[2:]) > LinearSolver.SMALL
        self._inside = self._inner(entries, x=white) if self._rough else entries
        self._count = float(self._inside.sum())
        self._least = _least_noise(self._y, entries)

    def _inner(self, entries: Tensor, x: Tensor) -> Tensor:
        """Return the entries that count: none at the edges of what is solved as if periodic."""
        operator = self.operator
        form = operator.linear_form(x) if isinstance(operator, StructuredOperator) else None
        if form is None or form.exact or form.mask is not None:
            return entries
        inner = torch.zeros_like(entries)
        rims = [min(side // 8, WIDEST_RIM) for side in entries.shape[2:]]
        rows, columns = (
            slice(rim, side - rim) for rim, side in zip(rims, entries.shape[2:], strict=True)
        )
        inner[..., rows, columns] = 1
        return inner

    def tells(self, rho: float) -> bool:
        """Tell whether draws given images of noise std rho hardly know the noise of y.

        Images that were conditioned on y hold its noise; only more noise hides it.
        """
        return rho * self.gain >= HIDES * self.noise.sigma

    def update(
        self, x: Tensor, covariance: Covariance, *, factor: float = 1.0, iterations: int
    ) -> Noise:
        """Fit the noise to images.

        Args:
            x: images (chains, C, H, W) that err by a Gaussian.
            covariance: its covariance, up to a factor.
            factor: where the search for the factor begins.
            iterations: most of them.
        """
        x, covariance = x.double(), _in_double(covariance)
        operator = for_double(self.operator, x)
        misfit = self._measured(self._y - operator(x))
        start = torch.tensor(
            [2 * math.log(self.noise.sigma), math.log(factor)], dtype=torch.float64
        )
        ends = torch.tensor([(self._least**2, MOST_NOISE**2), FACTORS], dtype=torch.float64).log()
        search = _FixedPoint(start, *ends.T)
        for _ in range(iterations):
            search.advance(self._step(operator, x, misfit, covariance, search.place))
            if search.settled:
                break
        return self.noise

    def _total(self, a: Tensor, b: Tensor) -> float:
        """Return the inner product over the entries that count."""
        return float((self._inside * a * b).sum())

    def _step(
        self,
        operator: LinearOperator,
        x: Tensor,
        misfit: Tensor,
        covariance: Covariance,
        place: Tensor,
    ) -> Tensor:
        """Return how far a fixed-point step moves log v and log k from `place`; set the noise."""
        variance, factor = place.exp().tolist()
        solver = LinearSolver(operator, math.sqrt(variance), rough=self._rough)
        scaled = _scaled(covariance, factor)
        explained = self._measured(operator(solver.move(misfit, scaled, x).images))
        rest = misfit - explained
        probed = self._probe - self._measured(operator(solver.move(self._probe, scaled, x).images))
        size = self._total(self._probe, self._probe) / self._count
        free = min(max(self._total(self._probe, probed) / size, 1.0), self._count)
        found = max(self._total(rest, rest) / free, self._least**2)
        squares = min(self._total(probed, probed) / size, free)  # the trace of P^2
        # Fisher's information on log v and log k; all chains share one measurement.
        noise, both = squares / 2, (free - squares) / 2
        image = max((self._count - 2 * free + squares) / 2, 1e-9)
        known = max((noise - both**2 / image) / len(x), 0.1)
        self.noise = Noise(math.sqrt(found), math.sqrt(found / known) / 2)
        explaining = self._total(explained, rest) / variance / max(self._count - free, 1e-9)
        return torch.tensor(
            [math.log(found / variance), math.log(max(explaining, 1e-3))], dtype=torch.float64
        )


class DirectNoise:
    """Finds the noise std of a noisy image by the calls of a denoiser.

    Args:
        y: the image, repeated for each chain, shape (chains, C, H, W).
        start: where the search begins.
        most: largest noise std that is told.

    Attributes:
        noise: the latest estimate.
    """

    def __init__(self, y: Tensor, start: Noise, *, most: float = MOST_NOISE) -> None:
        self.noise = start
        source = torch.Generator(y.device).manual_seed(0)
        self._y, self._probe = y, draw_normal(y[:1], source).expand_as(y)
        self._least = _least_noise(y, torch.ones_like(y))
        place, least, most_place = (
            torch.tensor([2 * math.log(sigma)], dtype=torch.float64)
            for sigma in (start.sigma, self._least, most)
        )
        self._search = _FixedPoint(place, least, most_place)

    @property
    def settled(self) -> bool:
        """Whether another step would change little."""
        return self._search.settled

    @property
    def level(self) -> float:
        """The noise std of the next two calls."""
        return math.exp(float(self._search.place) / 2)

    def moved(self) -> Tensor:
        """Return the image of the second call, y a little farther."""
        return self._y + PROBE_STEP * self.level * self._probe

    def update(self, mean: Tensor, moved: Tensor) -> None:
        """Take in the denoised y and what `moved` became, both by calls at `level`."""
        level = self.level
        mean, moved = mean.double(), moved.double()
        slope = float(((moved - mean) * self._probe).mean()) / (PROBE_STEP * level)
        known = min(max(slope, 0.0), 1.0)
        found = float((self._y - mean).square().mean()) + known * level**2
        free = max(1 - known, 1e-3)  # of each entry, what the image does not explain
        std = math.sqrt(2 / (self._y[0].numel() * free**2)) / 2
        sigma = max(math.sqrt(found), self._least)
        self.noise = Noise(sigma, sigma * std)
        self._search.advance(torch.tensor([2 * math.log(sigma / level)], dtype=torch.float64))


class _FixedPoint:
    """A search for a fixed point, by secant steps of Anderson's mixing.

    Args:
        place: where it begins, float64.
        least: bounds on the place.
        most: bounds on the place.

    Attributes:
        place: the latest place.
        settled: whether the last step hardly moved.
    """

    def __init__(self, place: Tensor, least: Tensor, most: Tensor) -> None:
        self.place, self._least, self._most = place, least, most
        self.settled = False
        self._before: tuple[Tensor, Tensor] | None = None

    def advance(self, step: Tensor) -> None:
        """Move on, given the fixed-point step at `place`."""
        move = step
        if self._before is not None:
            changed = step - self._before[1]
            share = (step @ changed / (changed @ changed).clamp(min=1e-12)).clamp(-5, 0.9)
            move = step - share * (self.place - self._before[0] + changed)
        self._before = self.place, step
        place = self.place + move.clamp(-FARTHEST, FARTHEST)
        self.place = torch.clamp(place, self._least, self._most)
        self.settled = float(step.abs().max()) < SETTLED


def _least_noise(y: Tensor, entries: Tensor) -> float:
    """Return the least noise std of a measurement: that of rounding, if it came in 8 bits."""
    steps = (y + 1) * STEPS
    off = ((steps - steps.round()) * entries).abs().max()
    return 1 / (STEPS * math.sqrt(12)) if float(off) < 1e-3 else LEAST_NOISE


def _in_double(covariance: Covariance) -> Covariance:
    if isinstance(covariance, SpectralCovariance | DenseCovariance):
        return covariance.double()
    return covariance


def _scaled(covariance: Covariance, factor: float) -> Covariance:
    """Return a covariance times a factor."""
    if isinstance(covariance, SpectralCovariance | DenseCovariance):
        return covariance.scaled(factor)
    return covariance
