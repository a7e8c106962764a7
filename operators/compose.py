"""One forward model after another."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import check_count, check_images
from ncvsd_inverse.numerics import Map, filter_periodic
from ncvsd_inverse.operators.base import BaseOperator
from ncvsd_inverse.protocols import (
    Generators,
    HasNoiseLevel,
    LinearForm,
    LinearOperator,
    Operator,
    OperatorTraits,
    StructuredOperator,
)

__all__ = ["Compose"]


class Compose(BaseOperator):
    """A forward model applied to what another one gives.

    y = outer(inner(x)); for linear parts A = A_outer A_inner, and the result then has
    `adjoint`, y -> A_inner^T A_outer^T y. There is no `solve_normal`: the likelihood step runs
    conjugate gradients. What the inner part does not measure is an image value of 0 to the outer
    one. Noise is that of the outer part: on its measured entries only.

    Args:
        outer: an operator on images of the shape that `inner` gives.
        inner: an operator whose measurements have shape (B, C, H, W).

    Attributes:
        sigma_y: noise std that the outer part names, units of y, or None.

    Raises:
        TypeError: if a part is no operator.
        ValueError: (on use) if the parts do not fit.
    """

    family = "composed"

    def __new__(cls, outer: Operator, inner: Operator) -> "Compose":
        """Choose the class: a composition has an adjoint only if both parts do."""
        linear = isinstance(outer, LinearOperator) and isinstance(inner, LinearOperator)
        return super().__new__(_LinearCompose if linear else Compose)

    def __repr__(self) -> str:
        return f"Compose({self.outer!r}, {self.inner!r})"

    def __init__(self, outer: Operator, inner: Operator) -> None:
        for name, part in (("outer", outer), ("inner", inner)):
            if not isinstance(part, Operator):
                raise TypeError(
                    f"{name} must be callable and have input_shape, got {type(part).__name__}"
                )
        self.outer = outer
        self.inner = inner
        self.gain = OperatorTraits.of(outer).gain * OperatorTraits.of(inner).gain
        self.sigma_y = outer.sigma_y if isinstance(outer, HasNoiseLevel) else None
        self._runs = 1

    def __getnewargs__(self) -> tuple[Operator, Operator]:
        return self.outer, self.inner

    def __call__(self, x: Tensor) -> Tensor:
        """Return outer(inner(x)), shape (B, ...)."""
        check_images("x", x)
        return self._in_runs(lambda part: self.outer(self._between(self.inner(part))), x)

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (B, C, H, W) of the images that give measurements of `y_shape`."""
        return tuple(self.inner.input_shape(self.outer.input_shape(y_shape)))

    def measure(self, x: Tensor, sigma_y: float, *, generator: Generators = None) -> Tensor:
        """Simulate y = A(x) + sigma_y * eps with eps standard normal where the outer part measures.

        Args:
            x: images, shape (B, C, H, W), in [-1, 1].
            sigma_y: noise std, > 0, in units of y.
            generator: one source of randomness, or one for each of the B images.

        Returns:
            Measurements; entries that the outer part does not measure are 0.
        """
        if not isinstance(self.outer, BaseOperator):
            return super().measure(x, sigma_y, generator=generator)
        between = self._in_runs(self.inner, check_images("x", x))
        return self.outer.measure(self._between(between), sigma_y, generator=generator)

    def measured(self, y: Tensor) -> Tensor:
        """Return measurements (B, ...) with 0 in the entries that the outer part does not."""
        measured = OperatorTraits.of(self.outer).measured
        return y if measured is None else self._in_runs(measured, y)

    def count_measured(self, y: Tensor) -> Tensor:
        """Return how many entries of each measurement are measured, integers of shape (B,)."""
        count = OperatorTraits.of(self.outer).count_measured
        return super().count_measured(y) if count is None else self._in_runs(count, y)

    @property
    def takes_complex(self) -> bool:
        """Whether complex numbers may stand for pairs of real and imaginary part."""
        return OperatorTraits.of(self.outer).takes_complex

    def repeated(self, times: int) -> "Compose":
        """Return the operator for a batch that is tiled `times` times along dimension 0.

        Parts that cannot repeat themselves meet one run of the batch at a time.
        """
        times = check_count("times", times)
        parts = (self.outer, self.inner)
        repeats = [OperatorTraits.of(part).repeated for part in parts]
        if all(repeats):
            outer, inner = (repeat(times) for repeat in repeats if repeat is not None)
            same = outer is self.outer and inner is self.inner
            return self if same else Compose(outer, inner)
        tiled = Compose(self.outer, self.inner)
        tiled._runs = self._runs * times
        return tiled

    def _in_runs(self, call: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        if self._runs == 1:
            return call(batch)
        return torch.cat([call(run) for run in batch.chunk(self._runs)])

    def _between(self, image: Tensor) -> Tensor:
        if image.ndim != 4:
            raise ValueError(
                "inner must give measurements of shape (B, C, H, W) to compose, "
                f"got {tuple(image.shape)}"
            )
        return image


class _LinearCompose(Compose):
    """A composition of two matrices."""

    outer: LinearOperator
    inner: LinearOperator

    def adjoint(self, y: Tensor) -> Tensor:
        """Return A_inner^T A_outer^T y, shape (B, C, H, W)."""
        return self._in_runs(lambda part: self.inner.adjoint(self.outer.adjoint(part)), y)

    def linear_form(self, like: Tensor) -> LinearForm | None:
        """Return the steps for images `like` (B, C, H, W), where those of the parts combine."""
        parts = (self.outer, self.inner)
        outer, inner = (part if isinstance(part, StructuredOperator) else None for part in parts)
        if outer is None or inner is None or self._runs != 1:
            return None
        first = inner.linear_form(like)
        between = self._between(inner(like))
        second = outer.linear_form(between)
        return None if first is None or second is None else _combine(second, first)


def _combine(outer: LinearForm, inner: LinearForm) -> LinearForm | None:
    """Return the steps of two forms, the inner first; None if they are not those of a form."""
    own, before = _steps(outer), _steps(inner)
    if not own:
        return inner
    channels_alike = inner.mask is None or inner.mask.shape[1] == 1
    if own == {"weights"} and inner.weights is None and channels_alike:
        return replace(inner, weights=outer.weights)
    if own == {"mask"} and inner.mask is not None and outer.mask is not None:
        return replace(inner, mask=inner.mask & nn.functional.pad(outer.mask, inner.margins))
    if not before <= {"weights", "transfer"} or "weights" in own & before:
        return None
    weights = inner.weights if outer.weights is None else outer.weights
    if inner.transfer is None:
        return replace(outer, weights=weights)
    transfer, forward, backward = inner.transfer, outer.forward, outer.backward
    if outer.axes is not None:
        forward, backward = (
            partial(_along_axes, rows=rows, columns=columns)
            for rows, columns in (outer.axes, [axis.T for axis in outer.axes])
        )
    blur, unblur = (partial(filter_periodic, gains=gains) for gains in (transfer, transfer.conj()))
    return replace(
        outer,
        weights=weights,
        transfer=transfer if outer.transfer is None else outer.transfer * transfer,
        axes=None,
        forward=None if forward is None else _chain(blur, forward),
        backward=None if backward is None else _chain(backward, unblur),
    )


def _steps(form: LinearForm) -> set[str]:
    """Return the names of the steps that do something."""
    done = {
        name
        for name in ("weights", "transfer", "mask", "shares")
        if getattr(form, name) is not None
    }
    return done | ({"stride"} if form.stride > 1 else set())


def _along_axes(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return rows @ images @ columns.T


def _chain(first: Map, last: Map) -> Map:
    return lambda x: last(first(x))
