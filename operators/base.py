"""Base classes of the forward models: simulated noise, counts, batches, normal equations."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ncvsd_inverse.checks import (
    check_count,
    check_images,
    check_non_negative,
    check_positive,
)
from ncvsd_inverse.machine import exact_arithmetic
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.protocols import Generators

__all__ = ["BaseOperator", "LinearBase", "check_broadcasts", "check_image_shape"]


EXACT = {"__call__", "adjoint", "measure", "_solve_normal", "solve_normal_spread"}
EXACT |= {"linearise", "search", "linear_form"}
"""Methods of operators that compute."""


class BaseOperator(ABC):
    """A forward model whose measurements are all noisy and that treats all images alike."""

    family: str | None
    """The kind of problem, by which default settings are looked up; None: no known one."""

    sigma_y: float | None = None
    """Noise std of the measurements, units of y; None: not known."""

    gain: float = 1.0
    """About how much y changes with the images: what makes noise of y noise of images."""

    lipschitz: float | None = None
    """Largest singular value of the Jacobian anywhere; None: not known."""

    def __repr__(self) -> str:
        names = inspect.signature(type(self)).parameters
        held = ((name, vars(self)[name]) for name in names if name in vars(self))
        shown = ", ".join(f"{name}={_describe(value)}" for name, value in held)
        return f"{type(self).__name__}({shown})"

    def __init_subclass__(cls, **given: object) -> None:
        """Let what a subclass defines compute in the dtypes of its tensors under any autocast."""
        super().__init_subclass__(**given)
        for name, method in list(vars(cls).items()):
            if name in EXACT and callable(method):
                setattr(cls, name, exact_arithmetic()(method))

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to noiseless measurements, dtype and device of x."""

    @abstractmethod
    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (B, C, H, W) of the images that give measurements of `y_shape`."""

    def measure(self, x: Tensor, sigma_y: float, *, generator: Generators = None) -> Tensor:
        """Simulate y = A(x) + sigma_y * eps with eps standard normal where A measures.

        Args:
            x: images, shape (B, C, H, W), in [-1, 1].
            sigma_y: noise std, > 0, in units of y.
            generator: one source of randomness, or one for each of the B images.

        Returns:
            Measurements; entries that A does not measure are 0.

        Raises:
            ValueError: if sigma_y <= 0 or x does not suit the operator.
        """
        check_images("x", x)
        sigma_y = check_positive("sigma_y", sigma_y)
        y = self(x)
        return self.measured(y + sigma_y * draw_normal(y, generator))

    def measured(self, y: Tensor) -> Tensor:
        """Return measurements (B, ...) with 0 in the entries that A does not measure."""
        return y

    def count_measured(self, y: Tensor) -> Tensor:
        """Return how many entries of each measurement are measured, integers of shape (B,)."""
        return self.measured(torch.ones_like(y)).flatten(1).count_nonzero(dim=1)

    def repeated(self, times: int) -> "BaseOperator":
        """Return the operator for a batch that is tiled `times` times along dimension 0.

        The tiled batch is x.repeat(times, 1, 1, 1): images 0 to B - 1, then 0 to B - 1 again.
        """
        check_count("times", times)
        return self


class LinearBase(BaseOperator):
    """A forward model that is a matrix A and solves its own regularised normal equations."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Map measurements (B, ...) to A^T y, shape (B, C, H, W)."""

    def solve_normal(self, rhs: Tensor, *, a: float, b: float) -> Tensor:
        """Return (a A^T A + b I)^-1 rhs.

        Args:
            rhs: shape (B, C, H, W).
            a: weight of A^T A, >= 0.
            b: weight of the identity, > 0.

        Returns:
            The solution, the shape, dtype and device of rhs.

        Raises:
            ValueError: if a < 0, b <= 0 or rhs does not suit the operator.
        """
        check_images("rhs", rhs)
        return self._solve_normal(rhs, check_non_negative("a", a), check_positive("b", b))

    @abstractmethod
    def _solve_normal(self, rhs: Tensor, a: float, b: float) -> Tensor: ...

    @property
    def is_diagonal(self) -> bool:
        """Whether A^T A is diagonal in a basis that makes `solve_normal_spread` as cheap."""
        return False

    def solve_normal_spread(self, rhs: Tensor, eps: Tensor, *, a: float, b: float) -> Tensor:
        """Return M^-1 rhs + M^(-1/2) eps for M = a A^T A + b I, if `is_diagonal`.

        Args:
            rhs: shape (B, C, H, W).
            eps: the shape of rhs; standard normals make a draw of precision M.
            a: weight of A^T A, >= 0.
            b: weight of the identity, > 0.
        """
        raise TypeError(f"{type(self).__name__} has no closed-form root")


def check_image_shape(name: str, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Return `shape` as a tuple; ValueError unless it is (B, C, H, W), all at least 1."""
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"{name} must be (B, C, H, W), all at least 1, got {tuple(shape)}")
    batch, channels, height, width = (int(size) for size in shape)
    return batch, channels, height, width


def check_broadcasts(name: str, stored: Tensor, images_name: str, images: Tensor) -> None:
    """ValueError unless `stored`, (1|B, 1|C, ...), fits the batch and channels of `images`."""
    if stored.shape[0] not in (1, images.shape[0]) or stored.shape[1] not in (1, images.shape[1]):
        raise ValueError(
            f"{images_name} must have the batch and channels of {name}, "
            f"{tuple(stored.shape[:2])} (1 fits any), got {tuple(images.shape[:2])}"
        )


def _describe(value: object) -> str:
    """Return an argument in words; of tensors the size, of masks what they hide."""
    if not isinstance(value, Tensor):
        return repr(value)
    size = " x ".join(str(side) for side in value.shape if side > 1) or "1"
    if value.dtype != torch.bool:
        return f"<{size}>"
    return f"<{size}, {float((~value).double().mean()):.0%} hidden>"
