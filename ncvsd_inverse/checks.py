"""The wording of shape, range and dtype errors.

Form: what must hold, then what came, with the argument named as the caller wrote it.
"""

import difflib
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ncvsd_inverse.errors import DivergenceError

__all__ = [
    "check_choice",
    "check_count",
    "check_finite",
    "check_floating",
    "check_image_size",
    "check_images",
    "check_level",
    "check_names",
    "check_noise_scale",
    "check_non_negative",
    "check_positive",
    "check_shape",
    "check_stays_finite",
]


def check_positive(name: str, value: float) -> float:
    """Return `value` as a float; ValueError unless it is a finite number > 0."""
    number = _as_number(name, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return number


def check_non_negative(name: str, value: float) -> float:
    """Return `value` as a float; ValueError unless it is a finite number >= 0."""
    number = _as_number(name, value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be non-negative and finite, got {value}")
    return number


def check_count(name: str, value: int, *, least: int = 1, most: int | None = None) -> int:
    """Return `value`; TypeError unless it is an integer, ValueError unless in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return value


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return `value`; ValueError that lists the choices (nearest first) unless it is one."""
    known = list(choices)
    if isinstance(value, str) and value in known:
        return value
    near = difflib.get_close_matches(str(value), known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{hint}")


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
    """Return `x`; ValueError that counts what is not finite."""
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
        if level.numel() == 0:
            raise ValueError(f"{name} must have at least one entry, got shape {tuple(level.shape)}")
        low, high = float(level.min()), float(level.max())
    else:
        low = high = _as_number(name, level)
    if not (low > 0 and high <= largest and math.isfinite(high)):
        bound = "finite" if math.isinf(largest) else f"at most {largest:g}"
        came = f"{low}" if low == high else f"{low} to {high}"
        raise ValueError(f"{name} must be positive and {bound}, got {came}")


def _as_number(name: str, value: float) -> float:
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    except OverflowError:  # an integer beyond all floats
        return math.inf if value > 0 else -math.inf


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
            f"got {pairs!r}"
        )
    return known
