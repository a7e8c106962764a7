"""Annealing levels as plain data.

Every function returns a strictly decreasing tuple of stds in image units.
"""

import math
from collections.abc import Callable

from ncvsd_inverse.checks import check_count, check_positive

__all__ = [
    "karras",
    "variance_preserving",
]


def karras(
    num: int, largest: float = 80.0, smallest: float = 0.002, exponent: float = 7.0
) -> tuple[float, ...]:
    """Return `num` levels, evenly spaced after taking the `exponent`-th root.

    >>> [round(level, 3) for level in karras(4, largest=3.0, smallest=0.02)]
    [3.0, 0.811, 0.162, 0.02]

    Args:
        num: number of levels, >= 1; one level is `largest`.
        largest: first level, std in image units.
        smallest: last level, > 0 and < largest.
        exponent: > 0; large values put more levels near `smallest`.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Karras et al., arXiv 2206.00364, section 3 (their rho is our exponent).
    """
    exponent = check_positive("exponent", exponent)
    return _spaced(num, largest, smallest, lambda s: s ** (1 / exponent), lambda r: r**exponent)


def variance_preserving(
    num: int, largest: float = 80.0, smallest: float = 0.01
) -> tuple[float, ...]:
    """Return `num` levels, evenly spaced in the time t of the variance-preserving diffusion.

    With the published linear rate of noise, beta from 0.1 to 20 over t in [0, 1], an image shrunk
    and noised up to time t and then scaled back has noise of std

        sigma(t) = sqrt(exp(19.9 t^2 / 2 + 0.1 t) - 1).

    A thousand discrete steps run from about 157 to 0.01.

    Args:
        num: number of levels, >= 1; one level is `largest`.
        largest: first level, std in image units.
        smallest: last level, > 0 and < largest.

    Raises:
        ValueError: if an argument is out of range.

    Source:
        Song et al., arXiv 2011.13456; in terms of sigma, Karras et al., arXiv 2206.00364, table 1.
    """
    slope, start = 19.9, 0.1

    def time(sigma: float) -> float:
        return (math.sqrt(start**2 + 2 * slope * math.log1p(sigma**2)) - start) / slope

    def level(t: float) -> float:
        return math.sqrt(math.expm1(slope * t**2 / 2 + start * t))

    return _spaced(num, largest, smallest, time, level)


def _spaced(
    num: int,
    largest: float,
    smallest: float,
    warp: Callable[[float], float],
    unwarp: Callable[[float], float],
) -> tuple[float, ...]:
    """Return `num` levels, evenly spaced after `warp`; the ends are exact."""
    num = check_count("num", num)
    smallest = check_positive("smallest", smallest)
    largest = check_positive("largest", largest)
    if not largest > smallest:
        raise ValueError(f"largest must be above smallest = {smallest}, got {largest}")
    if num == 1:
        return (largest,)
    high, low = warp(largest), warp(smallest)
    inner = [unwarp(high + i / (num - 1) * (low - high)) for i in range(1, num - 1)]
    return (largest, *inner, smallest)
