import itertools
import math

import pytest

from ncvsd_inverse.sampling.settings import (
    PUBLISHED,
    default_average,
    default_schedule,
    published_schedule,
    published_sigma_lik,
)
from ncvsd_inverse.schedules import karras


@pytest.mark.parametrize("num", [2, 3, 10, 50])
@pytest.mark.parametrize("exponent", [1.0, 2.0, 7.0])
def test_karras_levels_fall_from_end_to_end(num, exponent):
    levels = karras(num, 80.0, 0.002, exponent)
    assert len(levels) == num
    assert (levels[0], levels[-1]) == (80.0, 0.002)
    assert all(a > b for a, b in itertools.pairwise(levels))
    roots = [level ** (1 / exponent) for level in levels]
    steps = [a - b for a, b in itertools.pairwise(roots)]
    assert max(steps) - min(steps) < 1e-9


def test_one_level_is_the_largest():
    assert karras(1, 3.0, 0.02) == (3.0,)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0,), "num"),
        ((5, 0.01, 0.02), "largest"),
        ((5, 3.0, 0.0), "smallest"),
        ((5, 3.0, math.nan), "smallest"),
        ((5, 3.0, 0.02, -1.0), "exponent"),
    ],
)
def test_bad_levels_name_the_argument(arguments, name):
    with pytest.raises(ValueError, match=name):
        karras(*arguments)


@pytest.mark.parametrize("family", [None, "inpainting", "phase_retrieval", "unheard_of"])
@pytest.mark.parametrize("num", [1, 2, 10, 50])
@pytest.mark.parametrize("method", ["conditioning", "gibbs"])
def test_every_family_has_a_default_schedule(method, family, num):
    levels = default_schedule(method, family, num)
    assert len(levels) == num
    assert levels[-1] > 0
    assert all(a > b for a, b in itertools.pairwise(levels))
    assert 0 <= default_average(family).mu < 1


def test_published_schedule_ends_where_the_published_runs_end():
    # Of 49 calls the last is at 0.051; ten calls would stop at 0.87.
    assert published_schedule(49)[0] == 80.0
    assert published_schedule(49)[-1] == pytest.approx(0.051, abs=5e-4)
    assert published_schedule(10)[-1] == pytest.approx(0.87, abs=5e-3)
    assert published_schedule(1) == (80.0,)


def test_published_noise_levels():
    assert published_sigma_lik("inpainting") == pytest.approx(math.sqrt(5e-5))
    assert published_sigma_lik("blur") == pytest.approx(math.sqrt(1e-3))
    assert PUBLISHED["phase_retrieval"].average.below == 0.2
    with pytest.raises(ValueError, match=r"operator.*preset.*got 'denoise'"):
        published_sigma_lik("denoise")


def test_long_chains_of_conditioning_begin_high():
    assert default_schedule("conditioning", "blur", 10)[0] == pytest.approx(0.8)
    for family in ("inpainting", "blur", "motion_blur", "superres", "phase_retrieval", None):
        levels = default_schedule("conditioning", family, 11)
        assert (levels[0], levels[-1]) == pytest.approx((6.0, 0.05))
    assert default_schedule("gibbs", "blur", 11)[0] == pytest.approx(3.0)
