"""Annealing levels as plain data; it must not know what anneals.

Every function returns a strictly decreasing tuple of stds in image units.
"""

from ncvsd_inverse.checks import check_count, check_positive


def karras(
    num: int, largest: float = 80.0, smallest: float = 0.002, exponent: float = 7.0
) -> tuple[float, ...]:
    """Return `num` levels, evenly spaced after taking the `exponent`-th root.

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
    check_count("num", num)
    check_positive("smallest", smallest)
    check_positive("exponent", exponent)
    if not largest > smallest:
        raise ValueError(f"largest must be above smallest = {smallest}, got {largest}")
    if num == 1:
        return (float(largest),)
    high, low = largest ** (1 / exponent), smallest ** (1 / exponent)
    inner = [(high + i / (num - 1) * (low - high)) ** exponent for i in range(1, num - 1)]
    return (float(largest), *inner, float(smallest))
