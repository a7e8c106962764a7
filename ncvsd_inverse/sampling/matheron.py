"""Draws conditioned on a linear measurement, by Matheron's rule."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_finite, check_floating, check_positive
from ncvsd_inverse.numerics import draw_normal, working_dtype
from ncvsd_inverse.priors.covariance import DenseCovariance, SpectralCovariance
from ncvsd_inverse.protocols import Covariance, Generators, LinearOperator
from ncvsd_inverse.sampling.linear_solves import LinearSolver

__all__ = ["Matheron", "for_double"]

START_ITERATIONS = 100
"""Most iterations of the first draw. What they leave is drowned by the noise that follows."""


class Matheron:
    """Turns draws of a Gaussian law into draws of that law given y = A x + s n.

    For x of covariance S and standard normal e,

        x + S A^T (A S A^T + s^2 I)^-1 (y + s e - A x)

    has exactly the law of x given y. `LinearSolver` finds the move, in float64 where float32 is too
    coarse for it.

    Args:
        operator: a linear forward model.
        y: measurements, shape (B, ...).
        sigma_lik: noise std s that is assumed, > 0, in units of y.
        rough: whether moves may be rough, see `LinearSolver`.

    Attributes:
        solver: what finds the moves in the precision of y.
        error: largest error of a draw so far but a rough first one, root mean square in stds of x
            given y, shape (B,).

    Raises:
        ValueError: if sigma_lik <= 0 or y is not finite.

    Source:
        Journel & Huijbregts, Mining Geostatistics (1978), on conditional simulation; Doucet, A
        note on efficient conditional simulation of Gaussian distributions (2010).
    """

    def __init__(
        self, operator: LinearOperator, y: Tensor, sigma_lik: float, *, rough: bool = False
    ) -> None:
        self.operator = operator
        self.sigma_lik = check_positive("sigma_lik", sigma_lik)
        self._y = check_finite("y", check_floating("y", y)).to(working_dtype(y.dtype))
        self.solver = LinearSolver(operator, self.sigma_lik, rough=rough)
        self._in_double: LinearSolver | None = None
        self.error = self._y.new_zeros(len(self._y))

    def with_noise(self, sigma_lik: float) -> "Matheron":
        """Return what conditions on the same y with another noise std; errors add up."""
        return self.with_operator(self.operator, sigma_lik)

    def with_operator(self, operator: LinearOperator, sigma_lik: float) -> "Matheron":
        """Return what conditions on the same y, seen through another operator; not roughly."""
        other = Matheron(operator, self._y, sigma_lik)
        other.error = self.error
        return other

    def start(
        self,
        mean: Tensor,
        covariance: Covariance,
        like: Tensor,
        *,
        generator: Generators = None,
        rough: bool = True,
    ) -> Tensor:
        """Draw Gaussian images given y, roughly where the law is hard to reach.

        Args:
            mean: mean image, shape (1, C, H, W).
            covariance: covariance of images.
            like: a tensor of the images' shape (B, C, H, W), dtype and device.
            generator: one source of randomness, or one for each image.
            rough: whether noise follows, so that a rough draw, whose error does not count, will do.

        Returns:
            Images, the shape of `like`.
        """
        x = mean + covariance.colour(draw_normal(like, generator))
        if not rough:
            return self.draw(x, covariance, generator=generator)
        images, _ = self._draw(x, covariance, generator, 1.0, START_ITERATIONS)
        return images

    def draw(
        self,
        x: Tensor,
        covariance: Covariance,
        *,
        generator: Generators = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Condition draws of a Gaussian law on y.

        Args:
            x: draws, shape (B, C, H, W).
            covariance: covariance S of their law.
            generator: one source of randomness, or one for each image.
            temperature: factor on the noise e, >= 0.

        Returns:
            Draws given y, the shape of x.
        """
        images, error = self._draw(x, covariance, generator, temperature)
        self.error = torch.maximum(self.error, error.to(self.error))
        return images

    def _draw(
        self,
        x: Tensor,
        covariance: Covariance,
        generator: Generators,
        temperature: float,
        iterations: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return draws given y, and the error of the move."""
        noise = temperature * self.sigma_lik * draw_normal(self._y, generator)
        y, begin, solver = self._y, x, self.solver
        if x.dtype != torch.float64 and solver.needs_double(covariance, x):
            y, begin, noise = y.double(), x.double(), noise.double()
            if isinstance(covariance, SpectralCovariance | DenseCovariance):
                covariance = covariance.double()
            if self._in_double is None:
                self._in_double = LinearSolver(
                    for_double(self.operator, begin), self.sigma_lik, rough=self.solver.rough
                )
            solver = self._in_double
        misfit = y + noise - solver.operator(begin)
        move = solver.move(misfit, covariance, begin, iterations=iterations)
        return (begin + move.images).to(x.dtype), move.error


def for_double(operator: LinearOperator, like: Tensor) -> LinearOperator:
    """Return the operator if it takes float64, else one that rounds to float32 on the way."""
    try:
        taken = operator(like).dtype == torch.float64
    except (RuntimeError, TypeError, ValueError):
        taken = False
    return operator if taken else _Rounded(operator)


class _Rounded:
    """An operator of float32, for images of float64."""

    def __init__(self, operator: LinearOperator) -> None:
        self._operator = operator

    def __call__(self, x: Tensor) -> Tensor:
        return self._operator(x.float()).double()

    def adjoint(self, y: Tensor) -> Tensor:
        return self._operator.adjoint(y.float()).double()

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        return self._operator.input_shape(y_shape)
