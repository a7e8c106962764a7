"""Draws conditioned on a linear measurement, by Matheron's rule."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import check_finite, check_floating, check_positive
from ncvsd_inverse.numerics import conjugate_gradient, draw_normal, working_dtype
from ncvsd_inverse.protocols import Covariance, Generators, LinearOperator

__all__ = ["Matheron"]


class Matheron:
    """Turns draws of a Gaussian law into draws of that law given y = A x + s n.

    For x of covariance S and standard normal e,

        x + S A^T (A S A^T + s^2 I)^-1 (y + s e - A x)

    has exactly the law of x given y. With S = L L^T, the correction is L w, where w solves

        (I + L^T A^T A L / s^2) w = L^T A^T (y + s e - A x) / s^2.

    L is diagonal in the coordinates of the covariance. If A^T A is a convolution of periodic
    images, it is diagonal there too and w is exact. For other A conjugate gradients find w,
    preconditioned by the diagonal of A^T A over frequencies. The matrix is at least I, so the
    residual bounds the error of w, in stds of x; iterations stop at a root mean square residual of
    `tolerance`.

    Args:
        operator: a linear forward model.
        y: measurements, shape (B, ...).
        sigma_lik: noise std s that is assumed, > 0, in units of y.

    Attributes:
        iterations: applications of A^T A in the last draw.

    Raises:
        ValueError: if sigma_lik <= 0 or y is not finite.

    Source:
        Journel & Huijbregts, Mining Geostatistics (1978), on conditional simulation; Doucet, A
        note on efficient conditional simulation of Gaussian distributions (2010).
    """

    tolerance: ClassVar[float] = 0.001
    """Root mean square residual at which conjugate gradients stop."""

    max_iterations: ClassVar[int] = 500
    """Most conjugate gradient iterations of a draw."""

    PROBES: ClassVar[int] = 8
    """Noise images through which the diagonal of A^T A is seen."""

    def __init__(self, operator: LinearOperator, y: Tensor, sigma_lik: float) -> None:
        self.operator = operator
        self.sigma_lik = check_positive("sigma_lik", sigma_lik)
        self._y = check_finite("y", check_floating("y", y)).to(working_dtype(y.dtype))
        self.iterations = 0
        self._gram: Tensor | None = None
        self._is_convolution = False

    def start(
        self,
        mean: Tensor,
        covariance: Covariance,
        like: Tensor,
        *,
        generator: Generators = None,
    ) -> Tensor:
        """Draw Gaussian images given y.

        Args:
            mean: mean image, shape (1, C, H, W).
            covariance: covariance of images.
            like: a tensor of the images' shape (B, C, H, W), dtype and device.
            generator: one source of randomness, or one for each image.

        Returns:
            Images, the shape of `like`.
        """
        x = mean + covariance.colour(draw_normal(like, generator))
        return self.draw(x, covariance, generator=generator)

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
        if self._gram is None:
            self._gram, self._is_convolution = self._diagonal(x, covariance)
        precision = 1 / self.sigma_lik**2
        noise = temperature * self.sigma_lik * draw_normal(self._y, generator)
        misfit = self.operator.adjoint(self._y + noise - self.operator(x))
        root = covariance.variances.sqrt()
        inverse = 1 / (1 + precision * covariance.variances * self._gram)
        rhs = precision * root * covariance.coordinates(misfit)
        self.iterations = 0

        def apply(w: Tensor) -> Tensor:
            self.iterations += 1
            seen = self.operator.adjoint(self.operator(covariance.images(root * w)))
            return w + precision * root * covariance.coordinates(seen)

        if self._is_convolution:
            w = inverse * rhs
        else:
            w = conjugate_gradient(
                apply,
                rhs,
                rtol=0.0,
                atol=self.tolerance * math.sqrt(x[0].numel()),
                max_iterations=self.max_iterations,
                precondition=lambda r: inverse * r,
            )
        return x + covariance.images(root * w)

    def _diagonal(self, like: Tensor, covariance: Covariance) -> tuple[Tensor, bool]:
        """Return the diagonal of A^T A in coordinates, (B, 1, H, W // 2 + 1, 1), and if it is all.

        Probes of white noise show it up to their own noise, which the mean over neighbouring
        frequencies and colours removes. Where A^T A is a convolution, one probe shows it exactly.
        """
        source = torch.Generator(like.device).manual_seed(0)
        ratios = []
        exact = torch.zeros(())
        for number in range(self.PROBES):
            white = torch.randn(like.shape[1:], generator=source, device=like.device)
            probe = white.to(like).expand(like.shape)
            sent = covariance.coordinates(probe)
            seen = covariance.coordinates(self.operator.adjoint(self.operator(probe)))
            power = (sent * sent).sum((1, 4), keepdim=True)
            overlap = (sent * seen).sum((1, 4), keepdim=True)
            if number == 0:
                exact = overlap / power
            elif number == 1:
                error = (seen - exact * sent).square().sum()
                if float(error) < 1e-8 * float(seen.square().sum()):
                    return exact.clamp(min=0), True
            ratios.append(torch.cat((overlap, power), 1))
        total = torch.stack(ratios).sum(0)[..., 0]
        rows = torch.stack([total.roll(step, 2) for step in range(-2, 3)]).mean(0)
        wide = nn.functional.pad(rows, (2, 2, 0, 0), mode="replicate")
        smooth = nn.functional.avg_pool2d(wide, (1, 5), 1)
        return (smooth[:, :1] / smooth[:, 1:]).clamp(min=0)[..., None], False
