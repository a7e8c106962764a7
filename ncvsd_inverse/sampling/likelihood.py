"""The likelihood step: draws of u given the current image x0 and the measurement y.

p(u | x0, y) ~ exp(-||y - A(u)||^2 / (2 sigma_lik^2) - ||u - x0||^2 / (2 rho^2)).
"""

from typing import ClassVar

import torch
from torch import Tensor

from ncvsd_inverse.checks import (
    check_count,
    check_finite,
    check_floating,
    check_images,
    check_positive,
    check_shape,
)
from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.machine import Signal
from ncvsd_inverse.numerics import draw_normal, jacobian, squared_norm, white_probe, working_dtype
from ncvsd_inverse.priors.covariance import SpectralCovariance
from ncvsd_inverse.protocols import (
    DiagonalOperator,
    Generators,
    LikelihoodStep,
    LinearOperator,
    Operator,
    OperatorTraits,
    SolvableOperator,
)
from ncvsd_inverse.sampling.matheron import Matheron

__all__ = ["ExactGaussian", "Langevin", "likelihood_step"]


def likelihood_step(operator: Operator, y: Tensor, sigma_lik: float) -> LikelihoodStep:
    """Return the sampler that suits the operator: exact if it has an adjoint, else Langevin.

    Args:
        operator: a forward model.
        y: measurements, shape (B, ...).
        sigma_lik: noise std that the likelihood assumes, > 0, in units of y.

    Raises:
        ValueError: if sigma_lik <= 0 or y is not finite.
    """
    if isinstance(operator, LinearOperator):
        return ExactGaussian(operator, y, sigma_lik)
    return Langevin(operator, y, sigma_lik)


class ExactGaussian:
    """Exact draws of u for a linear operator: the normal with precision A^T A / s^2 + I / rho^2.

    With s = sigma_lik and standard normal e_y and e_x, the solution u of

        (k A^T A + I) u = k A^T (y + s e_y) + x0 + rho e_x,    k = rho^2 / s^2,

    has exactly that law. Where A^T A is diagonal in a fast basis, M = k A^T A + I has a root and
    one standard normal does: u = M^-1 (k A^T y + x0) + M^(-1/2) rho e_x. For k above `STEEP`, where
    rounding would leak into what A does not see, and for operators without `solve_normal`, u is
    x0 + rho e_x conditioned on y by Matheron's rule, which is the same law.

    Args:
        operator: a forward model with an adjoint.
        y: measurements, shape (B, ...).
        sigma_lik: noise std that the likelihood assumes, > 0, in units of y.

    Attributes:
        error: largest error of a solve so far, root mean square in units of rho, shape (B,).

    Raises:
        ValueError: if sigma_lik <= 0 or y is not finite.

    Source:
        Papandreou & Yuille, NIPS 2010 (perturb, then solve).
    """

    STEEP: ClassVar[float] = 1e4
    """Largest k of a solve in normal equations."""

    def __init__(self, operator: LinearOperator, y: Tensor, sigma_lik: float) -> None:
        self.operator = operator
        self.sigma_lik = check_positive("sigma_lik", sigma_lik)
        check_finite("y", check_floating("y", y))
        self._y = y.to(working_dtype(y.dtype))
        self._adjoint_y = operator.adjoint(self._y)
        self._conditioner = Matheron(operator, self._y, sigma_lik)

    @property
    def error(self) -> Tensor:
        """Largest error of a solve so far."""
        return self._conditioner.error

    def sample(self, x0: Tensor, rho: float, *, generator: Generators = None) -> Tensor:
        """One exact draw of u ~ p(u | x0, y).

        Args:
            x0: current images, shape (B, C, H, W), in [-1, 1].
            rho: coupling std, > 0, image units.
            generator: one source of randomness, or one for each of the B images.

        Returns:
            A draw, same shape, dtype and device as x0.

        Raises:
            ValueError: if rho <= 0 or x0 has not the shape of the images that give y.
        """
        center = self._checked(x0, rho)
        eps_x = draw_normal(center, generator)
        gain = (rho / self.sigma_lik) ** 2
        operator = self.operator
        if gain > self.STEEP or not isinstance(operator, SolvableOperator):
            u = self._condition(center + rho * eps_x, rho, generator)
        elif isinstance(operator, DiagonalOperator) and operator.is_diagonal:
            rhs = gain * self._adjoint_y + center
            u = operator.solve_normal_spread(rhs, rho * eps_x, a=gain, b=1.0)
        else:
            eps_y = draw_normal(self._y, generator)
            rhs = gain * (self._adjoint_y + self.sigma_lik * operator.adjoint(eps_y))
            u = operator.solve_normal(rhs + center + rho * eps_x, a=gain, b=1.0)
        return u.to(x0.dtype)

    def project(self, x0: Tensor, rho: float, *, generator: Generators = None) -> Tensor:
        """Draw x0 given y as if its only error were white noise of std rho.

        What y does not tell stays as it is. Arguments, result and errors as for `sample`.
        """
        return self._condition(self._checked(x0, rho), rho, generator).to(x0.dtype)

    def _checked(self, x0: Tensor, rho: float) -> Tensor:
        check_shape("x0", check_images("x0", x0), self._adjoint_y.shape)
        check_positive("rho", rho)
        if working_dtype(x0.dtype) != self._y.dtype or x0.device != self._y.device:
            self._y = self._y.to(x0.device, working_dtype(x0.dtype))
            self._adjoint_y = self._adjoint_y.to(self._y)
            self._conditioner = Matheron(self.operator, self._y, self.sigma_lik)
        return x0.to(self._y.dtype)

    def _condition(self, x: Tensor, rho: float, generator: Generators) -> Tensor:
        _, channels, height, width = x.shape
        spectrum = x.new_full((channels, height, width // 2 + 1), rho**2)
        mixing = torch.eye(channels, dtype=x.dtype, device=x.device)
        white = SpectralCovariance(mixing, spectrum, width)
        return self._conditioner.draw(x, white, generator=generator)


class Langevin:
    """Metropolis-adjusted Langevin draws of u for any differentiable operator.

    Each call starts at x0 + rho * eps and makes `steps` moves

        u' = u - h grad E(u) + sqrt(2 h) eps,
        E(u) = ||y - A(u)||^2 / (2 sigma_lik^2) + ||u - x0||^2 / (2 rho^2),

    each accepted or not, image by image, so that the law of u is kept exactly; a draw is as good
    as the number of steps lets the chain forget its start. The step size h starts from the
    largest curvature ||J||^2 / sigma_lik^2 + 1 / rho^2, ||J|| being `operator.lipschitz` where
    there is one and else estimated at x0 by power iterations. It adapts to `TARGET` acceptance
    during the first half of the steps and stays fixed in the second.

    Args:
        operator: a forward model, differentiable by autograd, that does not mix images.
        y: measurements, shape (B, ...).
        sigma_lik: noise std that the likelihood assumes, > 0, in units of y.
        steps: moves a draw, >= 1.

    Attributes:
        error: 0, as no linear system is solved, shape (B,).
        acceptance: mean acceptance probability of the last draw's second half, shape (B,);
            None before the first draw.
        step_size: h of the last draw's second half, shape (B,), squared image units; None before.

    Raises:
        ValueError: if sigma_lik <= 0, steps < 1 or y is not finite.

    Source:
        Roberts & Rosenthal, J. R. Stat. Soc. B 60 (1998), for the acceptance and the scaling of
        h with dimension.
    """

    TARGET: ClassVar[float] = 0.574
    """Acceptance probability at which a chain in many dimensions moves fastest."""

    POWER_ITERATIONS: ClassVar[int] = 8
    """Iterations of the estimate of ||J||; the adaptation corrects what it misses."""

    def __init__(
        self, operator: Operator, y: Tensor, sigma_lik: float, *, steps: int = 100
    ) -> None:
        self.operator = operator
        self.sigma_lik = check_positive("sigma_lik", sigma_lik)
        self.steps = check_count("steps", steps)
        check_finite("y", check_floating("y", y))
        self.error = y.new_zeros(len(y))
        self.acceptance: Tensor | None = None
        self.step_size: Tensor | None = None
        self._y = y
        self._image_shape = tuple(operator.input_shape(y.shape))
        self._lipschitz = OperatorTraits.of(operator).lipschitz

    def sample(self, x0: Tensor, rho: float, *, generator: Generators = None) -> Tensor:
        """One approximate draw of u ~ p(u | x0, y), the last state of the chain.

        Args:
            x0: current images, shape (B, C, H, W), in [-1, 1].
            rho: coupling std, > 0, image units.
            generator: one source of randomness, or one for each of the B images.

        Returns:
            A draw, same shape, dtype and device as x0.

        Raises:
            ValueError: if rho <= 0 or x0 has not the shape of the images that give y.
            DivergenceError: if an energy or its gradient is not finite.
        """
        check_shape("x0", check_images("x0", x0), self._image_shape)
        check_positive("rho", rho)
        center = x0.detach().to(working_dtype(x0.dtype))
        y = self._y.to(center)
        curvature = self._squared_jacobian_norm(center) / self.sigma_lik**2 + 1 / rho**2
        step_size = 1.36 * center[0].numel() ** (-1 / 3) / curvature
        adapting = self.steps // 2
        acceptance = torch.zeros_like(step_size)
        left_the_finite = Signal(center.device)
        u = center + rho * draw_normal(center, generator)
        energy, gradient = self._energy(u, center, y, rho)
        for step in range(self.steps):
            h = _per_image(step_size, u)
            eps = draw_normal(u, generator)
            proposal = u - h * gradient + (2 * h).sqrt() * eps
            new_energy, new_gradient = self._energy(proposal, center, y, rho)
            way_back = u - proposal + h * new_gradient
            log_ratio = energy - new_energy + squared_norm(eps) / 2
            log_ratio = log_ratio - squared_norm(way_back) / (4 * step_size)
            if left_the_finite.seen(~torch.isfinite(log_ratio).all()):
                raise DivergenceError(
                    f"Langevin sampler left the finite numbers at rho = {rho:.6g}, "
                    f"step {step}, step size {float(step_size.max()):.6g}"
                )
            # Half the squared norm of two standard normals is -log of a uniform number.
            threshold = squared_norm(draw_normal(u.new_empty(u.shape[0], 2), generator)) / 2
            accepted = log_ratio > -threshold
            energy = torch.where(accepted, new_energy, energy)
            u = torch.where(_per_image(accepted, u), proposal, u)
            gradient = torch.where(_per_image(accepted, u), new_gradient, gradient)
            probability = log_ratio.clamp(max=0).exp()
            if step < adapting:
                gain = 1 - 0.8 * step / adapting
                step_size = step_size * (gain * (probability - self.TARGET)).exp()
            else:
                acceptance += probability / (self.steps - adapting)
        self.acceptance, self.step_size = acceptance, step_size
        return u.to(x0.dtype)

    def _energy(self, u: Tensor, center: Tensor, y: Tensor, rho: float) -> tuple[Tensor, Tensor]:
        """Return E(u), shape (B,), and its gradient, shape (B, C, H, W)."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            misfit = squared_norm(y - self.operator(u)) / (2 * self.sigma_lik**2)
            energy = misfit + squared_norm(u - center) / (2 * rho**2)
            (gradient,) = torch.autograd.grad(energy.sum(), u)
        return energy.detach(), gradient

    def _squared_jacobian_norm(self, x: Tensor) -> Tensor:
        """Return ||J||^2 at each image of x, shape (B,)."""
        if self._lipschitz is not None:
            return x.new_full((x.shape[0],), float(self._lipschitz) ** 2)
        _, push, pull = jacobian(self.operator, x)
        direction = white_probe(x)
        for _ in range(self.POWER_ITERATIONS):
            norm = squared_norm(direction).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
            direction = direction / _per_image(norm, x)
            direction = pull(push(direction))
        return squared_norm(direction).sqrt()


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    """Return values (B,) in a shape that broadcasts over `like`, (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
