"""The roles that parts of the toolkit play for one another; it must not know who plays them.

A user's own class needs no inheritance: having the methods is enough.
"""

from collections.abc import Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""Where random numbers come from: torch's global state, one generator, or one an image."""


@runtime_checkable
class Operator(Protocol):
    """A forward model, batch first: y = A(x) + noise."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to noiseless measurements (B, ...)."""
        ...

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (B, C, H, W) of the images that give measurements of `y_shape`."""
        ...


@runtime_checkable
class LinearOperator(Operator, Protocol):
    """A forward model that is a matrix A."""

    def adjoint(self, y: Tensor) -> Tensor:
        """Map measurements (B, ...) to A^T y, shape (B, C, H, W)."""
        ...


@runtime_checkable
class SolvableOperator(LinearOperator, Protocol):
    """A linear forward model that inverts its own regularised normal equations."""

    def solve_normal(self, rhs: Tensor, *, a: float, b: float) -> Tensor:
        """Return (a A^T A + b I)^-1 rhs, shape (B, C, H, W); a >= 0, b > 0."""
        ...


@runtime_checkable
class DiagonalOperator(SolvableOperator, Protocol):
    """A solvable operator that can, where `is_diagonal`, also take the root of the inverse."""

    @property
    def is_diagonal(self) -> bool:
        """Whether `solve_normal_spread` can be called."""
        ...

    def solve_normal_spread(self, rhs: Tensor, eps: Tensor, *, a: float, b: float) -> Tensor:
        """Return M^-1 rhs + M^(-1/2) eps for M = a A^T A + b I, shape (B, C, H, W)."""
        ...


@runtime_checkable
class Prior(Protocol):
    """A sampler of clean images given noisy ones."""

    nfe_per_sample: int

    def sample(self, u: Tensor, sigma: float | Tensor, *, generator: Generators = None) -> Tensor:
        """Draw x0 ~ p(x0 | u) for u = x0 + sigma * eps, shape (B, C, H, W)."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """Something that returns posterior means; a mean is no draw."""

    def denoise(self, u: Tensor, sigma: float | Tensor, /) -> Tensor:
        """Return E[x0 | u] for u = x0 + sigma * eps, shape (B, C, H, W)."""
        ...


@runtime_checkable
class Generator(Protocol):
    """A prior that draws images from nothing, and can keep statistics of them.

    Attributes:
        image_shape: the one shape (C, H, W) of its images, or None when any size works.
    """

    image_shape: tuple[int, int, int] | None

    def generate(self, num: int) -> Tensor:
        """Draw `num` images, shape (num, C, H, W); one of any size takes `size=(H, W)` too."""
        ...


class LikelihoodStep(Protocol):
    """A sampler of the split variable given the current image and the measurement."""

    def sample(self, x0: Tensor, rho: float, *, generator: Generators = None) -> Tensor:
        """Draw u ~ p(u | x0, y) for the coupling std rho, shape (B, C, H, W)."""
        ...
