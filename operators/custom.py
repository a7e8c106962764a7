"""Forward models of the user's own: made of a function, and checked."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_images, check_positive, check_triple, describe_type
from ncvsd_inverse.operators.base import BaseOperator
from ncvsd_inverse.protocols import LinearOperator, Operator, OperatorTraits, SolvableOperator

__all__ = ["check_operator", "from_function"]

TOLERANCE = 1e-4
"""Relative difference of two ways to the same number in float32 that is rounding."""

ABOUT_ONE = 2.0
"""Gains that this factor does not take beyond 1 count as 1."""


def from_function(
    function: Callable[[Tensor], Tensor],
    input_shape: Sequence[int],
    *,
    linear: bool | None = None,
    family: str | None = None,
    gain: float | None = None,
) -> BaseOperator:
    """Return the forward model of a function; of a linear one with its adjoint, by autograd.

    >>> reduced = from_function(lambda x: torch.nn.functional.avg_pool2d(x, 4), (3, 64, 64))
    >>> y = reduced.measure(torch.zeros(1, 3, 64, 64), 0.05)
    >>> y.shape, reduced.adjoint(y).shape
    (torch.Size([1, 3, 16, 16]), torch.Size([1, 3, 64, 64]))

    Args:
        function: maps images (B, C, H, W) to noiseless measurements (B, ...), each by itself, with
            operations that autograd knows.
        input_shape: shape (C, H, W) of the images.
        linear: whether it is a matrix; None: found out on random images.
        family: the kind of problem, by which default settings are looked up, as "blur".
        gain: about how much y changes with its images, > 0; None: measured on a smooth random image
            if the function is linear, and 1 if that is within a factor 2, or if it is not linear.

    Raises:
        TypeError: if the function does not return a tensor that autograd can follow.
        ValueError: if the shape or the gain is wrong, or a measurement does not begin with the
            batch.
    """
    shape = check_triple("input_shape", input_shape)
    if gain is not None:
        check_positive("gain", gain)
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")
    source = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, *shape, generator=source)
    y = function(a)
    if not isinstance(y, Tensor):
        raise TypeError(f"function must return a tensor, got {type(y).__name__}")
    if y.ndim < 2 or len(y) != 2:
        raise ValueError(
            f"function must return measurements (B, ...) of images (B, C, H, W), got "
            f"{tuple(y.shape)} of {tuple(a.shape)}"
        )
    if linear is None:
        added = function(2 * a + b)
        linear = _differ(added, 2 * y + function(b)) <= TOLERANCE
    if not linear:
        return _FunctionOperator(function, shape, family, gain or 1.0)
    gain = gain or _measure_gain(function, a)
    operator = _MatrixOperator(function, shape, family, gain)
    try:
        operator.adjoint(y)
    except RuntimeError as error:
        raise TypeError(f"function must use operations that autograd knows: {error}") from error
    return operator


def _measure_gain(function: Callable[[Tensor], Tensor], white: Tensor) -> float:
    """Return how much larger a smooth image is in the entries of y that are not 0; about 1: 1."""
    rows, columns = (torch.fft.fftfreq(side)[:, None] for side in white.shape[2:])
    falling = 1 / (rows**2 + columns.T**2).sqrt().clamp(min=1 / max(white.shape[2:]))
    x = torch.fft.ifft2(falling * torch.fft.fft2(white)).real
    y = function(x)
    told = y[y != 0]
    if not len(told):
        return 1.0
    gain = float(told.abs().square().mean().sqrt() / x.square().mean().sqrt())
    return 1.0 if 1 / ABOUT_ONE < gain < ABOUT_ONE else gain


class _FunctionOperator(BaseOperator):
    """A function as a forward model."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        family: str | None,
        gain: float,
    ) -> None:
        self.function = function
        self.family = family
        self.gain = gain
        self._shape = shape

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the function makes of images (B, C, H, W)."""
        check_images("x", x)
        return self.function(x)

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the images, whatever y's is."""
        return (y_shape[0], *self._shape)


class _MatrixOperator(_FunctionOperator):
    """A linear function as a forward model."""

    def adjoint(self, y: Tensor) -> Tensor:
        """Return A^T y, shape (B, C, H, W)."""
        x = y.new_zeros(self.input_shape(y.shape))
        outcome = torch.func.vjp(self.function, x)
        images: Tensor = outcome[1](y)[0]
        return images


def check_operator(operator: Operator, image_shape: Sequence[int]) -> None:
    """Check a forward model on random images.

    Shapes: `input_shape` is the inverse of the call; batch: an image's measurement does not depend
    on the others; `measured` keeps what A gives; linear ones: A is additive, `adjoint` is its
    transpose, `solve_normal` solves (a A^T A + b I) x = rhs.

    >>> from ncvsd_inverse.operators import SuperResolution
    >>> check_operator(SuperResolution(4), (3, 64, 64))  # silent where all is well

    Args:
        operator: the forward model.
        image_shape: shape (C, H, W) of images that it takes.

    Raises:
        TypeError: if it lacks a method.
        ValueError: if something does not hold; all that does not is named, with how far it is off.
    """
    if isinstance(operator, type) or not isinstance(operator, Operator):
        raise TypeError(
            f"operator must be callable and have input_shape, got {describe_type(operator)}"
        )
    shape = check_triple("image_shape", image_shape)
    source = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=source)
    x, other = draw(2, *shape), draw(2, *shape)
    y = operator(x)
    if not isinstance(y, Tensor) or y.ndim < 2 or len(y) != 2:
        came = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"operator must return measurements (B, ...) with B = 2, got {came}")
    back = tuple(operator.input_shape(tuple(y.shape)))
    if back != tuple(x.shape):
        raise ValueError(
            f"operator.input_shape must return {tuple(x.shape)} for {tuple(y.shape)}, got {back}"
        )
    traits = OperatorTraits.of(operator)
    pairs = {}
    if traits.repeated is not None and traits.repeated(2) is operator:
        alone = torch.cat([operator(x[:1]), operator(x[1:])])
        pairs["operator(x) of an image must not depend on the others"] = (y, alone)
    if traits.measured is not None:
        pairs["operator.measured must keep all that operator(x) gives"] = (traits.measured(y), y)
    if isinstance(operator, LinearOperator):
        pairs |= _linear_pairs(operator, x, other, y, draw)
    faults = [
        f"{rule} (relative difference {_differ(*pair):.2g})"
        for rule, pair in pairs.items()
        if not _differ(*pair) <= TOLERANCE
    ]
    if faults:
        raise ValueError("; ".join(faults))


def _linear_pairs(
    operator: LinearOperator, x: Tensor, other: Tensor, y: Tensor, draw: Callable[..., Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what must agree for a matrix, by the rule."""
    v = draw(*y.shape)
    measured = OperatorTraits.of(operator).measured
    v = v if measured is None else measured(v)
    rule = "operator must be additive, as it has an adjoint"
    pairs = {rule: (operator(2 * x + other), 2 * y + operator(other))}
    back = operator.adjoint(v)
    if back.shape != x.shape:
        raise ValueError(
            f"operator.adjoint must return {tuple(x.shape)} for {tuple(v.shape)}, got "
            f"{tuple(back.shape)}"
        )
    inner = torch.stack([(y * v).sum(), (y * v).abs().sum()])
    outer = torch.stack([(x * back).sum(), (y * v).abs().sum()])
    pairs["operator.adjoint must be the transpose"] = (inner, outer)
    if isinstance(operator, SolvableOperator):
        a, b = 3.0, 0.5
        solved = operator.solve_normal(other, a=a, b=b)
        again = a * operator.adjoint(operator(solved)) + b * solved
        pairs["operator.solve_normal must solve (a A^T A + b I) x = rhs"] = (again, other)
    return pairs


def _differ(one: Tensor, two: Tensor) -> float:
    """Return the relative difference of two tensors; infinity for other shapes."""
    if one.shape != two.shape:
        return float("inf")
    size = max(float(two.norm()), float(one.norm()), 1e-12)
    return float((one - two).norm()) / size
