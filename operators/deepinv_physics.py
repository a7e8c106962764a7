"""deepinv's physics as forward models.

deepinv's images are in [0, 1], ours in [-1, 1]: its measurement of our image x is
y = A((x + 1) / 2) + n, with the noise n in units of its y.
"""

import copy
import logging
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_count, check_finite, check_non_negative, check_positive
from ncvsd_inverse.numerics import white_probe
from ncvsd_inverse.protocols import Operator

if TYPE_CHECKING:
    from deepinv.physics import Physics
    from deepinv.utils import TensorList

    Measured: TypeAlias = Tensor | TensorList
    """What a physics measures: real or complex, of any shape (B, ...), or several of them."""

__all__ = ["PhysicsOperator", "adapt", "from_deepinv"]

MISMATCH = 1e-3
"""Largest relative error of <A x, A x> = <x, A_adjoint A x> that counts as rounding."""


def adapt(operator: object, y: object) -> tuple[Any, Any]:
    """Return `from_deepinv(operator, y)` for a deepinv physics, both as they are for all else."""
    forward = sys.modules.get("deepinv.physics.forward")  # loaded if there is such a physics
    if forward is None or not isinstance(operator, forward.Physics):
        return operator, y
    return from_deepinv(operator, y)


@torch.no_grad()
def from_deepinv(
    physics: "Physics", y: "Measured", *, image_shape: Sequence[int] | None = None
) -> tuple[Operator, Tensor]:
    """Return a deepinv physics and its measurement in the form that `solve` takes.

    The operator takes images x in [-1, 1] where the physics takes (x + 1) / 2, in every channel
    (for MRI the real and the imaginary part). For a linear A that leaves a constant,
    which goes to the other side, so that the operator is linear too:

        y - A(1/2) = (A / 2) x + n.

    The noise, and so `sigma_y`, stays in units of the physics' y. For any other physics y stays
    and the operator is A((x + 1) / 2), differentiated by autograd.

    The adjoint is half of `A_adjoint`. Draws are solved by `prox_l2` where the class of the
    physics has its own and a trial shows it to be exact, otherwise by conjugate gradients. The
    noise model gives the operator's `sigma_y`; the sensor model is not modelled.

    Args:
        physics: any physics of images; its A, A_adjoint, prox_l2 and noise model are used.
        y: what it measured, as it gives it: real or complex, shape (B, ...), or a TensorList.
        image_shape: shape (C, H, W) of its images; None: what A_adjoint gives, else the
            `img_size` of the physics, else the shape of y.

    Returns:
        The operator and the measurements that belong to it, shape (B, ...), real, in the
        precision in which the physics computes. Complex entries have become pairs in a last
        dimension of length 2, the parts of a TensorList one row (B, M).

    Raises:
        TypeError: if `physics` is no deepinv physics or y is neither tensor nor TensorList.
        ValueError: if y is not finite or no measurement of `physics`, its images are not (C, H,
            W), or A_adjoint is only nearly the adjoint of A.
    """
    from deepinv.physics import LinearPhysics, Physics
    from deepinv.utils import TensorList

    if not isinstance(physics, Physics):
        raise TypeError(f"physics must be a deepinv physics, got {type(physics).__name__}")
    if not isinstance(y, Tensor | TensorList):
        raise TypeError(f"y must be a torch tensor or a TensorList, got {type(y).__name__}")
    _say_units()
    packed = check_finite("y", _pack(y))
    own = (w for name, w in physics.named_buffers() if not name.startswith("noise_model."))
    packed = packed.to(next((w for w in own if w.is_floating_point()), packed).dtype)
    shape = _find_image_shape(physics, y, packed, image_shape)
    if not isinstance(physics, LinearPhysics):
        return PhysicsOperator(physics, y, packed, shape), packed
    linear = LinearPhysicsOperator(physics, y, packed, shape)
    white = packed.new_full((packed.shape[0], *shape), 1.0)
    probe = white_probe(white)
    seen = linear(probe)
    power, pulled = (seen * seen).sum(), (probe * linear.adjoint(seen)).sum()
    if not bool((power - pulled).abs() <= MISMATCH * power):
        raise ValueError(
            "physics must have the exact adjoint of A as A_adjoint, got <x, A_adjoint A x> = "
            f"{float(pulled / power):.4g} <A x, A x>; Tomography has it with "
            "adjoint_via_backprop=True"
        )
    if _has_exact_prox(linear, probe):
        linear = SolvablePhysicsOperator(physics, y, packed, shape)
    # A row of A that sees nothing of an image of noise is 0.
    linear.seen = seen[:1] != 0 if linear.repeated(2) is linear else seen != 0
    return linear, packed - linear(white)


class PhysicsOperator:
    """A physics that is not linear, as a forward model of images in [-1, 1].

    Args:
        physics: the deepinv physics.
        like: a measurement of it, whose form others have.
        packed: the same as the operator gives it, shape (B, ...), real.
        image_shape: shape (C, H, W) of its images.

    Attributes:
        family: the kind of problem, by which defaults are looked up; None: no kind of ours.
        seen: which entries of y are measured, shape (1 or B, ...); None: not known.
        gain: 0.5, as deepinv's range of images is half of ours.
    """

    seen: Tensor | None = None
    gain = 0.5

    def __init__(
        self,
        physics: "Physics",
        like: "Measured",
        packed: Tensor,
        image_shape: tuple[int, int, int],
    ) -> None:
        self.physics = physics
        self.family = _family(physics)
        self._like = _form(like)
        self._image_shape = image_shape
        self._batch, *self._measured_shape = packed.shape
        self._is_common = self._takes_any_batch(packed)

    def __call__(self, x: Tensor) -> Tensor:
        """Return A((x + 1) / 2), real, shape (B, ...)."""
        return self._in_runs(self._forward, x)

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (B, C, H, W) of the images that give measurements of `y_shape`."""
        if list(y_shape[1:]) != self._measured_shape:
            wanted = ("B", *self._measured_shape)
            raise ValueError(f"y_shape must be {wanted}, got {tuple(y_shape)}")
        return (y_shape[0], *self._image_shape)

    @property
    def sigma_y(self) -> float | None:
        """Noise std by the noise model, in units of the physics' y; None if it adds none.

        Raises:
            ValueError: if the noise is not Gaussian with one std.
        """
        return _noise_std(self.physics)

    def count_measured(self, y: Tensor) -> Tensor:
        """Return how many entries of each y are measured, >= 1, integers of shape (B,).

        Where that is not known, those count that are not 0.
        """
        kept = y if self.seen is None else self.measured(torch.ones_like(y))
        return kept.flatten(1).count_nonzero(1).clamp(min=1)

    def measured(self, y: Tensor) -> Tensor:
        """Return measurements (B, ...) with 0 in the entries known not to be measured."""
        if self.seen is None:
            return y
        runs = len(y) // len(self.seen)
        return y.where(self.seen.to(y.device).repeat(runs, *[1] * (y.ndim - 1)), 0)

    def repeated(self, times: int) -> "PhysicsOperator":
        """Return the operator for a batch that is tiled `times` times along dimension 0.

        It is the operator itself unless the physics holds something for each image.
        """
        check_count("times", times)
        return self if self._is_common else copy.copy(self)

    def _forward(self, x: Tensor) -> Tensor:
        return _pack(self.physics.A((x + 1) / 2))

    def _in_runs(self, call: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """Return call(batch), in runs of as many images as the physics holds something for."""
        if self._is_common:
            return call(batch)
        firsts = range(0, len(batch), self._batch)
        return torch.cat([call(batch[first : first + self._batch]) for first in firsts])

    def _takes_any_batch(self, like: Tensor) -> bool:
        """Whether one more image than there are measurements changes nothing for the others."""
        source = torch.Generator().manual_seed(0)
        probe = torch.rand(self._image_shape, generator=source, dtype=torch.float32).to(like)
        try:
            seen = self._forward(probe.expand(self._batch + 1, *self._image_shape))
        except Exception:  # a wrong number of images can break a physics anywhere
            return False
        return bool(((seen - seen[:1]).abs() <= 1e-5 * seen.abs().max()).all())

    def __repr__(self) -> str:
        return f"<{type(self.physics).__name__} of deepinv, of (x + 1) / 2 for x in [-1, 1]>"


class LinearPhysicsOperator(PhysicsOperator):
    """A linear physics, as the matrix A / 2; arguments as for `PhysicsOperator`."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return A x / 2, real, shape (B, ...)."""
        return super().__call__(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Map measurements (B, ...) to A^T y / 2, shape (B, C, H, W)."""
        return self._in_runs(self._backward, y)

    def _forward(self, x: Tensor) -> Tensor:
        return _pack(self.physics.A(x / 2))

    def _backward(self, y: Tensor) -> Tensor:
        pulled: Tensor = self.physics.A_adjoint(_unpack(y, self._like))
        return pulled.real / 2  # for real images, also the adjoint of a complex matrix

    def _prox(self, z: Tensor, gamma: float) -> Tensor:
        """Return (gamma A^T A + I)^-1 z by `prox_l2`, shape (B, C, H, W)."""
        zeros = z.new_zeros(z.shape[0], *self._measured_shape)
        solved: Tensor = self.physics.prox_l2(z, _unpack(zeros, self._like), gamma)
        return solved.real


class SolvablePhysicsOperator(LinearPhysicsOperator):
    """A linear physics with its own `prox_l2`; arguments as for `PhysicsOperator`."""

    def solve_normal(self, rhs: Tensor, *, a: float, b: float) -> Tensor:
        """Return (a A^T A / 4 + b I)^-1 rhs, shape (B, C, H, W).

        Args:
            rhs: shape (B, C, H, W).
            a: weight of A^T A / 4, >= 0.
            b: weight of the identity, > 0.
        """
        gain = check_non_negative("a", a) / (4 * check_positive("b", b))
        if gain == 0:
            return rhs / b
        return self._in_runs(lambda part: self._prox(part, gain), rhs / b)


@cache
def _say_units() -> None:
    """Log, once, which range images have where."""
    logging.getLogger(__name__).info(
        "deepinv's physics takes images in [0, 1], solve returns them in [-1, 1]: "
        "y = A((x + 1) / 2), with the noise in units of y"
    )


def _pack(y: "Measured") -> Tensor:
    """Return a measurement as one real tensor (B, ...)."""
    if isinstance(y, Tensor):
        return torch.view_as_real(y.resolve_conj()) if y.is_complex() else y
    return torch.cat([_pack(part).flatten(1) for part in y], 1)


def _form(y: "Measured") -> "Measured":
    """Return a measurement of the same form that holds a single number for each tensor of `y`."""
    if isinstance(y, Tensor):
        return y.new_zeros(()).expand(y.shape)
    return type(y)([_form(part) for part in y])


def _unpack(packed: Tensor, like: "Measured") -> "Measured":
    """Return a tensor made by `_pack` in the form of the measurement `like`."""
    if isinstance(like, Tensor):
        return torch.view_as_complex(packed.contiguous()) if like.is_complex() else packed
    parts, start = [], 0
    for part in like:
        shape = _pack(part).shape[1:]
        row = packed[:, start : start + shape.numel()]
        parts.append(_unpack(row.reshape(-1, *shape), part))
        start += shape.numel()
    return type(like)(parts)


def _find_image_shape(
    physics: "Physics", y: "Measured", packed: Tensor, given: Sequence[int] | None
) -> tuple[int, int, int]:
    """Return the first shape (C, H, W) whose images give measurements shaped like `packed`."""
    faults = []
    for source in ("image_shape", "A_adjoint", "img_size", "y"):
        try:
            if source == "image_shape":
                shape = given
            elif source == "A_adjoint":
                shape = physics.A_adjoint(_unpack(packed, y)).shape[1:]
            else:
                shape = getattr(physics, "img_size", None) if source == "img_size" else y.shape[1:]
            if shape is None:
                continue
            if len(shape) != 3:
                raise ValueError(f"images must be (B, C, H, W), not (B, *{tuple(shape)})")
            came = _pack(physics.A(packed.new_full((packed.shape[0], *shape), 0.5))).shape
            if came != packed.shape:
                raise ValueError(f"images {tuple(shape)} give {tuple(came)}")
        except Exception as error:  # a wrong shape can break a physics anywhere
            faults.append(f"by {source}: {error}")
            if source == "image_shape":
                break
        else:
            channels, height, width = (int(size) for size in shape)
            return channels, height, width
    raise ValueError(
        f"y must be a measurement of physics, of images whose shape it tells or `from_deepinv` is "
        f"given as image_shape, got {tuple(packed.shape)}; {'; '.join(faults)}"
    )


def _has_exact_prox(operator: LinearPhysicsOperator, x: Tensor) -> bool:
    """Whether `prox_l2` is not deepinv's general one and gives x (B, C, H, W) back."""
    from deepinv.physics import LinearPhysics

    if getattr(operator.physics.prox_l2, "__func__", None) is LinearPhysics.prox_l2:
        return False
    try:
        rhs = 4 * operator.adjoint(operator(x)) + x
        solved = operator._in_runs(lambda part: operator._prox(part, 1.0), rhs)
    except Exception:  # not every physics has one for all its settings
        return False
    return bool((solved - x).norm() <= 1e-4 * x.norm())


def _family(physics: "Physics") -> str | None:
    from deepinv.physics import Blur, BlurFFT, Downsampling, Inpainting

    families = {Inpainting: "inpainting", Blur: "blur", BlurFFT: "blur", Downsampling: "superres"}
    return families.get(type(physics))


def _noise_std(physics: "Physics") -> float | None:
    from deepinv.physics import GaussianNoise, StackedPhysics, ZeroNoise

    parts = physics.physics_list if isinstance(physics, StackedPhysics) else [physics]
    stds = set()
    for model in (part.noise_model for part in parts):
        if isinstance(model, GaussianNoise):
            stds |= set(model.sigma.flatten().tolist())
        else:
            stds.add(0.0 if isinstance(model, ZeroNoise) else type(model).__name__)
    if len(stds) != 1 or not isinstance(std := stds.pop(), float):
        raise ValueError(
            "sigma_y must be given for a physics whose noise is not Gaussian with one std"
        )
    return std or None
