"""A restoration problem: measurements and their forward model, checked once at the door."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import Self, TypeAlias

import torch
from torch import Tensor

from ncvsd_inverse.checks import (
    as_value,
    check_finite,
    check_floating,
    check_positive,
    check_shape,
    describe_type,
)
from ncvsd_inverse.machine import check_device
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.protocols import SIGMA_Y, HasNoiseLevel, Operator, OperatorTraits

__all__ = ["Problem", "Seed"]

Seed: TypeAlias = int | Sequence[int | Sequence[int]]
"""An integer, or one integer or tuple of integers for each measurement."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A batch of measurements y = A(x0) + sigma_y * noise to restore.

    Attributes:
        y: measurements, shape (B, ...), 0 where the operator does not measure.
        operator: the forward model A, on images in [-1, 1].
        sigma_y: noise std, > 0, units of y.
        keys: for each measurement the integers that its random numbers follow from.
    """

    y: Tensor
    operator: Operator
    sigma_y: float
    keys: tuple[tuple[int, ...], ...]

    @classmethod
    def checked(cls, y: Tensor, operator: Operator, *, sigma_y: float | None, seed: Seed) -> Self:
        """Check what a user gave.

        Args:
            y: measurements, shape (B, ...), float32 or float64; complex64 or complex128 where the
                operator takes pairs of real and imaginary part. What it holds where the operator
                does not measure is of no account.
            operator: the forward model.
            sigma_y: noise std, > 0; None takes the operator's own, else 0.05.
            seed: see `solve`.

        Raises:
            TypeError: if an argument is of the wrong type or y of another dtype.
            ValueError: if y is no measurement of the operator, or an argument is out of range.
        """
        if isinstance(operator, type) or not isinstance(operator, Operator):
            raise TypeError(
                f"operator must be callable and have input_shape, got {describe_type(operator)}"
            )
        traits = OperatorTraits.of(operator)
        if traits.takes_complex and isinstance(y, Tensor) and y.is_complex():
            y = torch.view_as_real(y.resolve_conj())
        check_floating("y", y)
        check_device("y", y.device)
        if y.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"y must be float32 or float64, got {y.dtype}")
        if y.ndim < 2 or 0 in y.shape:
            raise ValueError(f"y must have shape (B, ...) with B >= 1, got {tuple(y.shape)}")
        check_finite("y", y)
        try:
            shape = tuple(operator.input_shape(tuple(y.shape)))
            expected = tuple(operator(y.new_zeros(shape)).shape)
        except (ValueError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"y must be a measurement of the operator, got shape {tuple(y.shape)}: {error}"
            ) from error
        check_shape("y", y, expected)
        if len(shape) != 4 or shape[0] != y.shape[0]:
            raise ValueError(
                f"y must come from as many images (B, C, H, W), got shape {tuple(y.shape)}, which "
                f"the operator traces to {shape}"
            )
        if sigma_y is None and isinstance(operator, HasNoiseLevel):
            sigma_y = operator.sigma_y
        if sigma_y == 0:
            least = torch.finfo(y.dtype).eps * max(1.0, float(y.abs().max()))
            raise ValueError(
                "sigma_y must be positive and finite, got 0: a y without noise still has its "
                "rounding, so take 0.002 for pictures of 8 bits in [-1, 1], and no less than "
                f"{least:.1g} for this y of {str(y.dtype)[6:]}"
            )
        level = SIGMA_Y if sigma_y is None else check_positive("sigma_y", sigma_y)
        if traits.measured is not None:
            y = traits.measured(y)
        return cls(y, operator, level, _read_keys(seed, len(y)))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape (B, C, H, W) of the images."""
        return tuple(self.operator.input_shape(tuple(self.y.shape)))

    @cached_property
    def traits(self) -> OperatorTraits:
        """What the operator says of itself."""
        return OperatorTraits.of(self.operator)

    def generators(self) -> list[torch.Generator]:
        """Return one generator an image, always in the same state."""
        return make_generators(self.keys, self.y.device)

    def misfit(self, x0: Tensor) -> Tensor:
        """Return ||y - A x0|| for images (B, C, H, W), shape (B,), float64."""
        error = self.y.double() - self.operator(x0).double()
        misfit: Tensor = torch.linalg.vector_norm(error.flatten(1), dim=1)
        return misfit

    def residual(self, x0: Tensor) -> Tensor:
        """Return ||y - A x0|| / (sigma_y sqrt(number of measured entries)), shape (B,).

        The norm is over measured entries; it is computed in float64 and returned in y's dtype.
        """
        traits = self.traits
        if traits.count_measured is not None:
            count = traits.count_measured(self.y)
        else:
            ones = torch.ones_like(self.y)
            seen = ones if traits.measured is None else traits.measured(ones)
            count = seen.flatten(1).count_nonzero(1)
        return (self.misfit(x0) / (self.sigma_y * count.double().sqrt())).to(self.y.dtype)

    def chains(self, *, num_samples: int, restarts: int, batch_size: int) -> list["Problem"]:
        """Cut restarts * num_samples chains of every image into problems of their own.

        The images of all problems together are in the order restart, sample, image. A chain's key
        is its image's with the sample and, after the first run, the restart, so that more of either
        leave the earlier chains as they were.

        Args:
            num_samples: chains for each image that are kept, >= 1.
            restarts: chains of which one is kept, >= 1.
            batch_size: most images of a problem, >= 1. An operator that holds something for each
                image needs B at least, and one that cannot say whether it does gets B.
        """
        images = len(self.y)
        keys = [
            (*key, sample, restart) if restart else (*key, sample)
            for restart in range(restarts)
            for sample in range(num_samples)
            for key in self.keys
        ]
        repeated = self.traits.repeated
        if repeated is not None and repeated(2) is not self.operator:
            batch_size = max(images, batch_size - batch_size % images)
        elif repeated is None:
            batch_size = images
        cuts = [
            range(first, min(first + batch_size, len(keys)))
            for first in range(0, len(keys), batch_size)
        ]
        return [
            Problem(
                self.y[[chain % images for chain in chains]],
                self.operator if repeated is None else repeated(max(1, len(chains) // images)),
                self.sigma_y,
                tuple(keys[chain] for chain in chains),
            )
            for chains in cuts
        ]


def _read_keys(seed: Seed, images: int) -> tuple[tuple[int, ...], ...]:
    """Return the random key of every image."""
    seed = as_value(seed)
    try:
        if isinstance(seed, Sequence):
            keys = tuple(
                tuple(map(_part, entry)) if isinstance(entry, Sequence) else (_part(entry),)
                for entry in seed
            )
        else:
            keys = tuple((_part(seed), image) for image in range(images))
    except TypeError:
        raise TypeError(
            f"seed must be an integer, or one integer or tuple an image, got {seed!r}"
        ) from None
    if len(keys) != images:
        raise ValueError(f"seed must be one or one for each of {images} images, got {len(keys)}")
    if any(part < 0 for key in keys for part in key):
        raise ValueError(f"seed must be non-negative, got {seed}")
    return keys


def _part(value: int) -> int:
    """Return an integer; TypeError for anything else, a boolean too."""
    if isinstance(value, bool | str):
        raise TypeError
    return index(value)
