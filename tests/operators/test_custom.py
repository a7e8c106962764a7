"""Forward models made of functions, and the check of a user's own."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

from ncvsd_inverse import solve
from ncvsd_inverse.operators import (
    HDR,
    Blur,
    Colorize,
    Denoise,
    Inpaint,
    SuperResolution,
    check_operator,
    from_function,
)
from ncvsd_inverse.protocols import LinearOperator

SHAPE = (3, 16, 16)


def test_a_linear_function_is_the_operator_of_its_matrix(generator):
    operator = from_function(lambda x: avg_pool2d(x, 4), SHAPE)
    assert isinstance(operator, LinearOperator)
    check_operator(operator, SHAPE)
    known = SuperResolution(4, filter="box")
    x = torch.randn(2, *SHAPE, generator=generator)
    y = known(x)
    assert torch.allclose(operator(x), y, atol=1e-5)
    assert torch.allclose(operator.adjoint(y), known.adjoint(y), atol=1e-5)


def test_another_function_has_no_adjoint():
    operator = from_function(lambda x: (2 * x).clamp(-1, 1), SHAPE)
    assert not isinstance(operator, LinearOperator)
    check_operator(operator, SHAPE)


def test_solve_takes_a_function():
    x = torch.linspace(-0.5, 0.5, 3 * 64 * 64).view(1, 3, 64, 64)
    operator = from_function(lambda x: x.mean(1, keepdim=True), (3, 64, 64))
    result = solve(operator(x), operator=operator, prior="ncvsd_faces64", nfe=2, sigma_y=0.05)
    assert result.x0.shape == x.shape
    assert float(result.residual) < 2


MASK = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.3


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * MASK,
        lambda x: avg_pool2d(x, 2),
        lambda x: x.mean(1, keepdim=True),
        lambda x: torch.fft.fft2(x, norm="ortho").real,
    ],
    ids=["mask", "reduction", "grey", "frequencies"],
)
def test_the_gain_of_a_function_is_its_unit(function):
    assert from_function(function, SHAPE).gain == 1
    assert 50 < from_function(lambda x: 100 * function(x), SHAPE).gain < 200
    assert from_function(lambda x: 100 * function(x), SHAPE, gain=7.0).gain == 7


def test_a_point_estimate_does_not_depend_on_the_unit_of_y():
    x = torch.linspace(-0.5, 0.5, 3 * 64 * 64).view(1, 3, 64, 64)
    ends = []
    for unit in (1, 100):
        operator = from_function(lambda x, unit=unit: unit * x.mean(1, keepdim=True), (3, 64, 64))
        y = operator.measure(x, 0.05 * unit, generator=torch.Generator().manual_seed(0))
        result = solve(y, operator=operator, prior="ncvsd_faces64", nfe=4, sigma_y=0.05 * unit)
        ends.append(min(level for level in result.schedule if level))
    assert 0.5 < ends[1] / ends[0] < 2


@pytest.mark.parametrize(
    ("function", "shape", "error", "message"),
    [
        (lambda x: x, (3, 8), ValueError, r"input_shape must be \(C, H, W\), got \(3, 8\)"),
        ("f", SHAPE, TypeError, "function must be callable, got str"),
        (lambda x: x.numpy(), SHAPE, TypeError, "function must return a tensor, got ndarray"),
        (lambda x: x.mean(), SHAPE, ValueError, r"measurements \(B, ...\).* got \(\)"),
        (lambda x: torch.tensor(x.numpy()), SHAPE, TypeError, "operations that autograd knows"),
    ],
)
def test_functions_that_are_no_forward_model_are_refused(function, shape, error, message):
    with pytest.raises(error, match=message):
        from_function(function, shape)


@pytest.mark.parametrize(
    "operator", [Denoise(), Colorize(), HDR(), SuperResolution(2), Inpaint.random((16, 16))]
)
def test_our_operators_pass(operator):
    check_operator(operator, SHAPE)


class Flipped(Blur):
    """A blur whose transpose forgets to turn the kernel around."""

    def adjoint(self, y):
        return self(y)


class Shifted(Denoise):
    """A matrix plus a constant."""

    def __call__(self, x):
        return x + 0.1


class Mixed(Denoise):
    """Measures with what the other images of the batch hold."""

    def __call__(self, x):
        return x - x.mean(0, keepdim=True) / 2


class Misshapen(Denoise):
    """Traces measurements to images of another size."""

    def input_shape(self, y_shape):
        return (*y_shape[:3], y_shape[3] + 1)


class Unsolved(Denoise):
    """Returns the right side of its normal equations."""

    def _solve_normal(self, rhs, a, b):
        return rhs


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (Flipped(torch.tensor([[0.0, 0.2, 0.8]])), "operator.adjoint must be the transpose"),
        (Shifted(), "operator must be additive"),
        (Mixed(), "must not depend on the others"),
        (Misshapen(), "operator.input_shape must return"),
        (Unsolved(), "operator.solve_normal must solve"),
    ],
)
def test_what_does_not_hold_is_named(operator, message):
    with pytest.raises(ValueError, match=message):
        check_operator(operator, SHAPE)


def test_what_is_no_operator_is_refused():
    with pytest.raises(TypeError, match="operator must be callable and have input_shape, got int"):
        check_operator(3, SHAPE)
