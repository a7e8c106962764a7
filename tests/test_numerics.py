"""Numerical tools against what they stand for."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from ncvsd_inverse.machine import (
    callers_autocast,
    count_passes,
    exact_arithmetic,
    out_of_inference,
)
from ncvsd_inverse.numerics import (
    conjugate_gradient,
    draw_normal,
    ensemble_crps,
    expand_level,
    interpolate,
    make_generators,
    working_dtype,
)


def positive_definite(batch, size, condition, seed=0):
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(batch, size, size, dtype=torch.float64, generator=generator)
    basis, _ = torch.linalg.qr(random)
    values = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.mT


def times(matrix):
    return lambda x: (matrix @ x[..., None])[..., 0]


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradient_solves(condition, preconditioned, dtype):
    matrix = positive_definite(3, 20, condition).to(dtype)
    rhs = torch.randn(3, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    rtol = 1e-5 if dtype == torch.float32 else 1e-11
    x = conjugate_gradient(
        times(matrix),
        rhs,
        rtol=rtol,
        precondition=(lambda r: r / diagonal) if preconditioned else None,
    )
    residual = (times(matrix)(x) - rhs).norm(dim=1)
    # The recursive residual meets rtol; rounding of the true one grows with the condition.
    assert x.dtype == dtype
    assert (residual <= (rtol + 4 * torch.finfo(dtype).eps * condition) * rhs.norm(dim=1)).all()


def test_conjugate_gradient_stops_when_it_may():
    matrix = positive_definite(1, 30, 1e3)
    rhs = torch.ones(1, 30, dtype=torch.float64)
    calls = []

    def apply(x):
        calls.append(1)
        return times(matrix)(x)

    def count(**settings):
        calls.clear()
        conjugate_gradient(apply, rhs, **settings)
        return len(calls)

    inverse = torch.linalg.inv(matrix)
    assert count(rtol=1e-8) > count(rtol=1e-2) > 1
    assert count(rtol=1e-8, max_iterations=3) == 3
    assert count(rtol=1e-8, precondition=times(inverse)) == 1
    assert not conjugate_gradient(apply, torch.zeros_like(rhs)).any()


def test_conjugate_gradient_keeps_items_apart():
    # A diagonal matrix, so that no rounding of sums in another order grows along the iterations.
    values = torch.linspace(1, 30, 80, dtype=torch.float64).view(4, 20)
    rhs = torch.randn(4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rhs[1] *= 1e6
    rhs[2] = 0
    together = conjugate_gradient(lambda x: values * x, rhs, rtol=1e-2)
    for item in range(4):
        part = slice(item, item + 1)
        alone = conjugate_gradient(lambda x, part=part: values[part] * x, rhs[part], rtol=1e-2)
        torch.testing.assert_close(together[part], alone, rtol=1e-12, atol=1e-12)


def test_conjugate_gradient_stops_at_an_error_in_the_norm_of_the_matrix():
    matrix = positive_definite(4, 40, 1e3)
    rhs = torch.randn(4, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = torch.linalg.solve(matrix, rhs)
    for etol in (1e-1, 1e-4):
        error = conjugate_gradient(times(matrix), rhs, rtol=0.0, etol=etol) - exact
        energy = (error * times(matrix)(error)).sum(1).sqrt()
        assert (energy < 10 * etol).all()
        assert (energy > 1e-6 * etol).any()


def test_conjugate_gradient_leaves_finished_columns_out():
    """Each column is a problem of its own, and those that are done are not computed any more."""
    values = torch.stack([torch.linspace(1, top, 30) for top in (1, 10, 1000)]).double()
    rhs = torch.randn(2, 3, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    widths = []

    def maps(places):
        def apply(x):
            widths.append(x.shape[1])
            return values[places] * x

        return apply, None

    solved = conjugate_gradient(maps(torch.arange(3))[0], rhs, rtol=1e-9, narrow=maps)
    torch.testing.assert_close(solved, rhs / values, rtol=1e-7, atol=1e-9)
    assert widths == sorted(widths, reverse=True)
    assert set(widths) == {1, 2, 3}


def test_conjugate_gradient_marks_what_is_not_finite():
    rhs = torch.ones(2, 3)
    rhs[1, 1] = math.nan
    solved = conjugate_gradient(lambda x: x, rhs)
    assert torch.isfinite(solved).all(1).tolist() == [True, False]
    assert conjugate_gradient(lambda x: x * math.inf, torch.ones(2, 3)).isnan().all()


def test_interpolation_is_that_of_numpy(dtype):
    places = torch.tensor([0.1, 0.4, 2.0, 5.0], dtype=dtype)
    values = torch.tensor([3.0, -1.0, 0.5, 0.7], dtype=dtype)
    x = torch.tensor([0.0, 0.1, 0.2, 0.4, 1.0, 4.9, 5.0, 9.0], dtype=dtype)
    expected = np.interp(x.numpy(), places.numpy(), values.numpy())
    torch.testing.assert_close(interpolate(x, places, values).double(), torch.from_numpy(expected))
    assert (interpolate(x, places[:1], values[:1]) == 3).all()


@pytest.mark.parametrize(
    ("dtype", "working"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_working_dtype(dtype, working):
    assert working_dtype(dtype) == working


def test_generators_are_independent_of_their_neighbours():
    keys = [(0, 0), (0, 1), (1, 0), (1,), (0,), (7, 1), (7, 1, 0), (5, 2**40)]
    draws = [torch.randn(2000, generator=g) for g in make_generators(keys)]
    alone = torch.randn(2000, generator=make_generators([(1, 0)])[0])
    assert torch.equal(draws[2], alone)
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(keys))
    # Four and a half standard errors of a correlation of 2000 pairs.
    assert float(correlation.abs().max()) < 4.5 / math.sqrt(2000)


def test_draw_normal_takes_one_source_or_one_an_image(dtype, device):
    like = torch.empty(3, 2, 50, 50, dtype=dtype, device=device)
    keys = [(7, i) for i in range(3)]
    per_image = draw_normal(like, make_generators(keys, device))
    assert (per_image.shape, per_image.dtype) == (like.shape, dtype)
    assert per_image.device.type == device.type
    assert torch.equal(per_image[2:], draw_normal(like[2:], make_generators(keys[2:], device)))
    shared = torch.Generator(device).manual_seed(0)
    first, second = draw_normal(like, shared), draw_normal(like, shared)
    assert not torch.equal(first, second)
    assert torch.equal(first, draw_normal(like, torch.Generator(device).manual_seed(0)))
    assert draw_normal(like).shape == like.shape
    for draw in (per_image, first):
        # Four standard errors of the mean and of the variance.
        assert abs(float(draw.mean())) < 4 / math.sqrt(draw.numel())
        assert abs(float(draw.var()) - 1) < 4 * math.sqrt(2 / draw.numel())


def test_draw_normal_counts_its_generators():
    with pytest.raises(ValueError, match="generator must be one or one for each of 3 images"):
        draw_normal(torch.empty(3, 2), make_generators([(0,), (1,)]))


def test_expand_level():
    like = torch.zeros(3, 2, 4, 4, dtype=torch.float64)
    assert torch.equal(expand_level(0.5, like), torch.full((3, 1, 1, 1), 0.5).double())
    levels = torch.tensor([1.0, 2.0, 3.0])
    expanded = expand_level(levels, like)
    assert expanded.shape == (3, 1, 1, 1)
    assert expanded.dtype == torch.float64
    assert torch.equal((like + expanded)[:, 1, 2, 3], levels.double())
    assert expand_level(torch.tensor(2.0), like).unique().tolist() == [2.0]
    with pytest.raises(ValueError, match=r"sigma must be a float or have shape \(3,\)"):
        expand_level(torch.ones(2), like)


def test_threads_count_their_own_passes(at_once):
    network = nn.Linear(3, 1, bias=False)

    def count(images):
        counted = []
        for _ in range(50):
            x = torch.ones(images, 3)
            with count_passes([network, network]) as passes:
                network(x).sum().backward()
                network(x)
            counted.append((passes.forward, passes.backward))
        return counted

    counted = at_once([partial(count, images) for images in range(1, 9)])
    assert counted == [[(2 * images, images)] * 50 for images in range(1, 9)]
    assert not network._forward_hooks


def test_a_pass_that_is_spread_over_threads_counts_once():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            with ThreadPoolExecutor(2) as threads:
                return torch.cat(list(threads.map(self.inner, x.chunk(2))))

    network = Spread()
    seen = []
    with count_passes([network], on_pass=lambda passes: seen.append(passes.forward)) as passes:
        network(torch.zeros(4, 3))
    assert passes.forward == 4
    assert seen == [4]


def test_exact_arithmetic_nests_and_gives_the_callers_autocast_back():
    x = torch.rand(4, 4)

    def dtypes():
        with callers_autocast():
            inner = (x @ x).dtype
            with exact_arithmetic():
                assert (x @ x).dtype == torch.float32
                with callers_autocast():
                    assert (x @ x).dtype == inner
        assert (x @ x).dtype == torch.float32
        return inner

    with exact_arithmetic():
        assert dtypes() == torch.float32
        with torch.autocast("cpu", dtype=torch.float16), exact_arithmetic():
            assert dtypes() == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with exact_arithmetic(), exact_arithmetic():
            assert dtypes() == torch.bfloat16
            with callers_autocast(), torch.autocast("cpu", enabled=False), exact_arithmetic():
                assert dtypes() == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_scores_do_not_depend_on_the_callers_arithmetic(arithmetic):
    draws, truth = torch.rand(5, 8, dtype=torch.float32), torch.rand(8, dtype=torch.float32)
    expected = ensemble_crps(draws, truth)
    with arithmetic():
        assert torch.equal(ensemble_crps(draws, truth), expected)


@pytest.mark.parametrize("gradients", [True, False])
def test_exact_arithmetic_records_gradients_only_if_they_were(gradients):
    with torch.set_grad_enabled(gradients), exact_arithmetic():
        assert torch.is_grad_enabled() == gradients
    with torch.inference_mode(), exact_arithmetic():
        assert not torch.is_grad_enabled()
        assert not torch.zeros(1).is_inference()


def test_what_was_made_in_inference_mode_is_copied():
    class Holder:
        def __init__(self, tensor):
            self.inner = [{"tensor": tensor}, self]

    plain, module = torch.zeros(2), nn.Linear(2, 2)
    with torch.inference_mode():
        made = torch.ones(2)
        other = nn.Linear(2, 2)
    holder = Holder(made)
    for value in (plain, module, Holder(plain), "text"):
        assert out_of_inference(value) is value
    assert not out_of_inference(made).is_inference()
    copied = out_of_inference(holder)
    assert not copied.inner[0]["tensor"].is_inference()
    assert copied.inner[1] is copied
    assert holder.inner[0]["tensor"] is made
    assert not out_of_inference(other).weight.is_inference()
