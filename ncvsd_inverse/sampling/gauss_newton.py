"""Draws conditioned on a non-linear measurement, by Gauss-Newton steps."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ncvsd_inverse.checks import (
    check_count,
    check_finite,
    check_floating,
    check_images,
    check_non_negative,
    check_positive,
    check_shape,
)
from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.machine import Signal
from ncvsd_inverse.numerics import (
    conjugate_gradient,
    draw_normal,
    jacobian,
    squared_norm,
    white_probe,
    working_dtype,
)
from ncvsd_inverse.protocols import (
    Covariance,
    Generators,
    GlobalSearch,
    Linearisable,
    Operator,
    Tangent,
)

__all__ = ["GaussNewton"]


class GaussNewton:
    """Turns draws of a Gaussian law into approximate draws given y = A(x) + s n, for a smooth A.

    For x of covariance S and standard normal e, the minimum over v of

        ||y + s e - A(v)||^2 / s^2 + (v - x)^T S^-1 (v - x)

    is an exact draw given y if A is linear (Matheron's rule). For other A it is approximate: it is
    the local minimum nearest to x, without the weight that would make its law exact. With
    S = L L^T, v = x + L w and J the Jacobian of A at v, a Gauss-Newton step adds to w the solution
    d of

        (I + L^T J^T J L / s^2) d = L^T J^T (y + s e - A(v)) / s^2 - w,

    found by a few conjugate gradient iterations, preconditioned as if J^T J were a multiple of I.
    A step that raises the sum is halved until it does not, or left out.

    Steps begin at x, or, for an operator with a `GlobalSearch`, where its search from x ends.

    Args:
        operator: a forward model that does not mix images. A `Linearisable` one gives its own
            derivatives; others are differentiated automatically.
        y: measurements, shape (B, ...).
        sigma_lik: noise std s that is assumed, > 0, in units of y.
        steps: Gauss-Newton steps of a draw, >= 1.
        iterations: most conjugate gradient iterations of a step, >= 1.
        sigma_y: noise std of y, > 0, for searches and for the choice of a start, which too small a
            sigma_lik would mislead; None takes sigma_lik.

    Attributes:
        error: 0, as steps are approximate by design, shape (B,).

    Raises:
        ValueError: if sigma_lik or sigma_y <= 0, steps or iterations < 1, or y is not finite.

    Source:
        Bardsley, Solonen, Haario & Laine, SIAM J. Sci. Comput. 36 (2014), who perturb the data of
        non-linear least squares likewise and then correct the law, which is left out here.
    """

    tolerance: ClassVar[float] = 1e-3
    """Relative residual at which conjugate gradients stop."""

    HALVINGS: ClassVar[int] = 3
    """Halvings after which a step is left out."""

    START_SEARCH: ClassVar[int] = 60
    """Iterations of an operator's own search for images to begin at."""

    DRAW_SEARCH: ClassVar[int] = 20
    """Iterations of an operator's own search from a draw."""

    def __init__(
        self,
        operator: Operator,
        y: Tensor,
        sigma_lik: float,
        *,
        steps: int = 2,
        iterations: int = 5,
        sigma_y: float | None = None,
    ) -> None:
        self.operator = operator
        self.sigma_lik = check_positive("sigma_lik", sigma_lik)
        self._sigma_y = self.sigma_lik if sigma_y is None else check_positive("sigma_y", sigma_y)
        self.steps = check_count("steps", steps)
        self.iterations = check_count("iterations", iterations)
        self._y = check_finite("y", check_floating("y", y)).to(working_dtype(y.dtype))
        self._image_shape = tuple(operator.input_shape(y.shape))
        self.error = self._y.new_zeros(len(self._y))
        self._gram: Tensor | None = None

    def start(
        self,
        mean: Tensor,
        covariance: Covariance,
        like: Tensor,
        *,
        generator: Generators = None,
        rough: bool = True,
    ) -> Tensor:
        """Return images to begin at: Gaussian draws conditioned on y.

        An operator with a `GlobalSearch` searches from a draw, then again from each other image
        that gives the same y as what was found; the one of least Gaussian energy given y is kept.

        Args:
            mean: mean image, shape (1, C, H, W).
            covariance: covariance of images.
            like: a tensor of the images' shape (B, C, H, W), dtype and device.
            generator: one source of randomness, or one for each image.
            rough: whether noise follows; of no account here, see `Matheron`.

        Returns:
            Images, the shape of `like`.
        """
        x = mean + covariance.colour(draw_normal(like, generator))
        if not isinstance(self.operator, GlobalSearch):
            return self.draw(x, covariance, generator=generator)
        operator = self.operator
        found = [self._search(operator, x, mean, covariance, self.START_SEARCH)]
        for other in operator.symmetries(found[0])[1:]:
            found.append(self._search(operator, other, mean, covariance, self.START_SEARCH))
        energies = []
        for x in found:
            move = covariance.coordinates(x - mean) / covariance.variances.sqrt()
            misfit = (self._y - self.operator(x)) / self._sigma_y
            energies.append(squared_norm(move) + squared_norm(misfit))
        likeliest = torch.stack(energies).argmin(0)
        chosen = likeliest.reshape(1, -1, 1, 1, 1)
        return torch.stack(found).take_along_dim(chosen, 0)[0]

    def draw(
        self,
        x: Tensor,
        covariance: Covariance,
        *,
        generator: Generators = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Condition draws of a Gaussian law on y, approximately.

        Args:
            x: draws, shape (B, C, H, W).
            covariance: covariance S of their law.
            generator: one source of randomness, or one for each image.
            temperature: factor on the noise e, >= 0.

        Returns:
            Draws given y, the shape of x.

        Raises:
            ValueError: if x has not the shape of the images that give y, or temperature < 0.
            DivergenceError: if a value or a derivative of A is not finite.
        """
        check_shape("x", check_images("x", x), self._image_shape)
        check_non_negative("temperature", temperature)
        target = self._y + temperature * self.sigma_lik * draw_normal(self._y, generator)
        precision = 1 / self.sigma_lik**2
        root = covariance.variances.sqrt()
        begin = x
        if isinstance(self.operator, GlobalSearch):
            begin = self._search(self.operator, x, x, covariance, self.DRAW_SEARCH)
        w = covariance.coordinates(begin - x) / root
        value, push, pull = self._tangent(begin)
        energy = precision * squared_norm(target - value) + squared_norm(w)
        if self._gram is None:
            self._gram = _mean_gram(x, push)
        inverse = 1 / (1 + precision * self._gram[..., None] * covariance.variances)

        left_the_finite = Signal(x.device)
        for _ in range(self.steps):

            def gather(misfit: Tensor, pull: Callable[[Tensor], Tensor] = pull) -> Tensor:
                return precision * root * covariance.coordinates(pull(misfit))

            def apply(
                d: Tensor,
                push: Callable[[Tensor], Tensor] = push,
                gather: Callable[[Tensor], Tensor] = gather,
            ) -> Tensor:
                return d + gather(push(covariance.images(root * d)))

            step = conjugate_gradient(
                apply,
                gather(target - value) - w,
                rtol=self.tolerance,
                max_iterations=self.iterations,
                precondition=lambda r: inverse * r,
            )
            share = torch.ones_like(energy)
            is_settled = Signal(x.device)
            for halving in range(self.HALVINGS + 2):
                tried = w + share.reshape(-1, 1, 1, 1, 1) * step
                value, push, pull = self._tangent(x + covariance.images(root * tried))
                new_energy = precision * squared_norm(target - value) + squared_norm(tried)
                if left_the_finite.seen(~torch.isfinite(new_energy).all()):
                    raise DivergenceError("Gauss-Newton left the finite numbers")
                # Rounding alone may raise the sum of a step of length nothing.
                worse = (new_energy > energy) & (share > 0)
                if is_settled.seen(~worse.any()):
                    break
                smaller = share / 2 if halving < self.HALVINGS else torch.zeros_like(share)
                share = torch.where(worse, smaller, share)
            w, energy = tried, new_energy
        return x + covariance.images(root * w)

    def _tangent(self, x: Tensor) -> Tangent:
        if isinstance(self.operator, Linearisable):
            return self.operator.linearise(x)
        return jacobian(self.operator, x)

    def _search(
        self,
        operator: GlobalSearch,
        x: Tensor,
        mean: Tensor,
        covariance: Covariance,
        iterations: int,
    ) -> Tensor:
        """Return where the operator's own search from x ends, for images of a Gaussian law."""

        def shrink(u: Tensor, sigma: float) -> Tensor:
            gain = covariance.variances / (covariance.variances + sigma**2)
            return mean + covariance.images(gain * covariance.coordinates(u - mean))

        return operator.search(self._y, x, shrink, sigma_y=self._sigma_y, iterations=iterations)


def _mean_gram(x: Tensor, push: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean of the diagonal of J^T J of each image, seen by one probe, (B, 1, 1, 1)."""
    probe = white_probe(x)
    seen = squared_norm(push(probe)) / squared_norm(probe)
    return seen.reshape(-1, 1, 1, 1)
