"""The wording of shape, range and dtype errors.

Form: what must hold, then what came, with the argument named as the caller wrote it.
"""

import difflib
import math
import reprlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from ncvsd_inverse.errors import DivergenceError

__all__ = [
    "Size",
    "as_value",
    "check_choice",
    "check_count",
    "check_falling",
    "check_finite",
    "check_floating",
    "check_image_size",
    "check_images",
    "check_level",
    "check_names",
    "check_noise_scale",
    "check_non_negative",
    "check_on_device",
    "check_positive",
    "check_shape",
    "check_share",
    "check_size",
    "check_stays_finite",
    "check_triple",
    "describe_type",
]

Size: TypeAlias = int | Sequence[int]
"""Height and width, or one side of a square, pixels; integers of Python or numpy."""

Value = TypeVar("Value")

LARGEST = 2**63 - 1
"""Largest integer that torch takes."""


def check_positive(name: str, value: float) -> float:
    """Return `value` as a float; ValueError unless it is a finite number > 0."""
    number = _as_number(name, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be positive and finite, got {_show(value)}")
    return number


def check_non_negative(name: str, value: float) -> float:
    """Return `value` as a float; ValueError unless it is a finite number >= 0."""
    number = _as_number(name, value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be non-negative and finite, got {_show(value)}")
    return number


def check_share(name: str, value: float, *, or_zero: bool = False) -> float:
    """Return `value` as a float; ValueError unless it is in (0, 1], or in [0, 1] if `or_zero`."""
    number = _as_number(name, value)
    if not (0 < number <= 1 or (or_zero and number == 0)):
        raise ValueError(f"{name} must be in {'[' if or_zero else '('}0, 1], got {_show(value)}")
    return number


def check_count(name: str, value: int, *, least: int = 1, most: int | None = None) -> int:
    """Return `value` as an int; TypeError unless it is an integer, of Python or numpy.

    ValueError if it is below `least`, above `most` or does not fit into 64 bits.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {_show(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {_show(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {_show(value)}")
    if value > LARGEST:
        raise ValueError(f"{name} must be below 2^63, got {_show(value)}")
    return int(value)


def check_size(name: str, size: Size, *, least: int = 1) -> tuple[int, int]:
    """Return height and width as ints; error unless `size` is one integer or a pair of them."""
    sides = as_value(size)
    if isinstance(sides, int | np.integer):
        side = check_count(
            name, int(sides) if isinstance(sides, np.integer) else sides, least=least
        )
        return side, side
    if not isinstance(sides, Sequence) or isinstance(sides, str):
        raise TypeError(f"{name} must be one integer or (height, width), got {_show(size)}")
    if len(sides) != 2:
        raise ValueError(f"{name} must be one integer or (height, width), got {_show(size)}")
    height, width = (check_count(name, side, least=least) for side in sides)
    return height, width


def check_triple(name: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """Return (C, H, W) as ints; error unless `shape` is three integers, all at least 1."""
    entries = as_value(shape)
    if not isinstance(entries, Sequence) or isinstance(entries, str) or len(entries) != 3:
        raise ValueError(f"{name} must be (C, H, W), got {_show(shape)}")
    channels, height, width = (check_count(name, entry) for entry in entries)
    return channels, height, width


def describe_type(value: object) -> str:
    """Return the name of a value's type, or of the class that it is."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def as_value(value: Value) -> Value:
    """Return an array of numpy as the lists and numbers that it holds; anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    held: Value = value.tolist()
    return held


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return `value`; ValueError that lists the choices (nearest first) unless it is one."""
    known = list(choices)
    if isinstance(value, str) and value in known:
        return value
    near = difflib.get_close_matches(str(value), known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(known)}, got {_show(value)}{hint}")


def check_names(
    what: str, names: Iterable[str], known: Sequence[str], required: Iterable[str] = ()
) -> None:
    """ValueError that lists the known names unless `names` are of them, the required ones there.

    Args:
        what: whose names they are, for the message.
        names: those that came.
        known: all that there may be.
        required: those of them that must be there.
    """
    came = list(names)
    unknown = [str(name) for name in came if name not in known]
    missing = [name for name in required if name not in came]
    faults = []
    if unknown:
        faults.append(f"has unknown keys: {', '.join(unknown)}")
        near = {close for name in unknown for close in difflib.get_close_matches(name, known, n=1)}
        if near:
            faults[-1] += f" (did you mean {' or '.join(sorted(near))}?)"
    if missing:
        faults.append(f"lacks the key{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}")
    if faults:
        raise ValueError(f"{what} {' and '.join(faults)}; known are {', '.join(known)}")


def check_finite(name: str, x: Tensor) -> Tensor:
    """Return `x`; ValueError that counts what is not finite, or if it holds no values (meta)."""
    _check_holds_values(name, x)
    if x.dtype.is_floating_point and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name} must be finite, got {bad} of {x.numel()} values NaN or infinite")
    return x


def check_stays_finite(name: str, x: Tensor, where: str) -> Tensor:
    """Return `x`; DivergenceError that names `where` in a sampler unless all of it is finite."""
    if not bool(x.sum().isfinite()):
        raise DivergenceError(f"{name} must stay finite, got NaN or infinity in {where}")
    return x


def check_floating(name: str, x: Tensor) -> Tensor:
    """Return `x`; TypeError unless it is a tensor of real floating-point numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"{name} must be a floating-point tensor (images scaled to [-1, 1]), got {x.dtype}"
        )
    return x


def check_images(name: str, x: Tensor) -> Tensor:
    """Return `x`; error unless it is a floating-point tensor of shape (B, C, H, W), none 0."""
    check_floating(name, x)
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"{name} must have shape (B, C, H, W), got {tuple(x.shape)}")
    return x


def check_shape(name: str, x: Tensor, expected: Sequence[int]) -> Tensor:
    """Return `x`; ValueError unless its shape is `expected`."""
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(x.shape)}")
    return x


def check_image_size(
    name: str,
    size: Sequence[int],
    *,
    channels: int | None = None,
    image_shape: Sequence[int] | None = None,
    multiple: int = 1,
) -> None:
    """ValueError unless `size` = (C, H, W) is what takes it: a fixed shape, or sides that divide.

    Args:
        name: the argument, as the caller wrote it.
        size: channels, height and width that came.
        channels: the channels it must have; None: any.
        image_shape: the one shape (C, H, W) that it must have; None: any.
        multiple: what both sides must be a multiple of.
    """
    came = tuple(size)
    if image_shape is not None and came != tuple(image_shape):
        raise ValueError(f"{name} must hold images of shape {tuple(image_shape)}, got {came}")
    if channels is not None and came[0] != channels:
        raise ValueError(f"{name} must have {channels} channels, got {came[0]}")
    if came[1] % multiple or came[2] % multiple:
        raise ValueError(
            f"{name} must have sides that are multiples of {multiple}, got {came[1]} x {came[2]}"
        )


def check_level(name: str, level: float | Tensor, *, largest: float = math.inf) -> None:
    """ValueError unless a noise level, or each entry of a tensor of them, is in (0, largest].

    An infinite level is refused whatever `largest` is.
    """
    if isinstance(level, Tensor):
        _check_holds_values(name, level)
        if level.numel() == 0:
            raise ValueError(f"{name} must have at least one entry, got shape {tuple(level.shape)}")
        low, high = float(level.min()), float(level.max())
    else:
        low = high = _as_number(name, level)
    if not (low > 0 and high <= largest and math.isfinite(high)):
        bound = "finite" if math.isinf(largest) else f"at most {largest:g}"
        came = f"{low}" if low == high else f"{low} to {high}"
        raise ValueError(f"{name} must be positive and {bound}, got {came}")


def check_on_device(name: str, x: Tensor, device: torch.device) -> Tensor:
    """Return `x`; ValueError unless it is on a device."""
    if x.device != device:
        raise ValueError(f"{name} must be on the device {device}, got {x.device}")
    return x


def _check_holds_values(name: str, x: Tensor) -> None:
    if x.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the device meta")


def _as_number(name: str, value: float) -> float:
    """Return a real number, of Python, numpy or torch, as a float; TypeError for anything else."""
    scalar = value
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        scalar = value.item()
    if isinstance(scalar, bool) or not isinstance(scalar, Real):
        raise TypeError(f"{name} must be a number, got {_show(value)}")
    try:
        return float(scalar)
    except OverflowError:  # an integer beyond all floats
        return math.inf if scalar > 0 else -math.inf


_shown = reprlib.Repr()
_shown.maxstring, _shown.maxother = 200, 100


def _show(value: object) -> str:
    """Return what came, on one line of bounded length."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim > 0:
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return f"{kind} of shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    plain = value.item() if isinstance(value, np.generic) else value
    return " ".join(_shown.repr(plain).split())


def check_falling(
    name: str, levels: Sequence[float], *, or_infinite: bool = False
) -> tuple[float, ...]:
    """Return noise levels as floats; error unless they are numbers, > 0 and decreasing.

    The first must be finite, unless `or_infinite`.
    """
    entries = as_value(levels.detach().cpu().numpy() if isinstance(levels, Tensor) else levels)
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        raise TypeError(f"{name} must be a sequence of numbers, got {_show(levels)}")
    known = tuple(_as_number(name, level) for level in entries)
    falls = all(before > after for before, after in pairwise(known))
    if not (known and falls and known[-1] > 0 and (or_infinite or math.isfinite(known[0]))):
        finite = "" if or_infinite else "finite, "
        raise ValueError(f"{name} must be {finite}positive and decreasing, got {_show(known)}")
    return known


def check_noise_scale(name: str, pairs: object) -> tuple[tuple[float, float], ...]:
    """Return `pairs` (sigma, factor) as floats; ValueError unless positive, sigma increasing."""
    try:
        known = tuple(
            (_as_number(name, sigma), _as_number(name, factor))
            for sigma, factor in pairs  # type: ignore[attr-defined]
        )
    except (TypeError, ValueError):
        known = ((0.0, 0.0),)
    positive = all(0 < value < math.inf for pair in known for value in pair)
    if not (positive and all(low[0] < high[0] for low, high in pairwise(known))):
        raise ValueError(
            f"{name} must be pairs of positive numbers (sigma, factor), sigma increasing, "
            f"got {_show(pairs)}"
        )
    return known
