"""What every operator must do, against its dense matrix."""

import copy
import math
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ncvsd_inverse import operators as ops
from ncvsd_inverse.machine import Cache
from ncvsd_inverse.protocols import DiagonalOperator, LinearOperator, Operator, SolvableOperator
from tests.operators.cases import (
    BOUNDARIES,
    COMPOSITIONS,
    SOLVABLE,
    Case,
    dense,
    each,
    make_compositions,
    make_local,
    make_mixing,
    normal,
    positive,
    seeded,
    some,
)

HOLD_IMAGES = {
    "inpaint_images",
    "inpaint_all",
    *(f"blur_{boundary}_{kind}" for boundary in BOUNDARIES for kind in ("images", "all")),
    "masks_blurs",
    "user_inner",
    "user_outer",
}
"""Operators with something for each image of a batch."""

OTHERS = [
    Case("hdr", ops.HDR(), (2, 2, 5, 7), (2, 2, 5, 7), "hdr"),
    Case("phase", ops.PhaseRetrieval(2, True), (2, 2, 5, 7), (2, 2, 9, 11), "phase_retrieval"),
    Case("poisson", ops.Poisson(20.0), (2, 2, 5, 7), (2, 2, 5, 7), "poisson"),
    Case("mixed", ops.Compose(ops.HDR(), ops.Denoise()), (1, 1, 2, 3), (1, 1, 2, 3), "composed"),
]
"""Operators that are no matrices."""


@each(SOLVABLE + COMPOSITIONS)
def test_adjoint_is_the_transpose(case):
    matrix = dense(case.operator, case.shape)
    v = normal(*case.y_shape)
    expected = (matrix.mT @ v.flatten(1)[..., None])[..., 0].view(case.shape)
    # Float64 rounding of sums of at most a hundred terms.
    torch.testing.assert_close(case.operator.adjoint(v), expected, rtol=1e-11, atol=1e-11)


@each(SOLVABLE)
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (400.0, 1e-4), (0.0, 0.5), (3.0, 100.0)])
def test_solve_normal_inverts_the_matrix(case, a, b):
    matrix = dense(case.operator, case.shape)
    rhs = normal(*case.shape)
    system = a * matrix.mT @ matrix + b * torch.eye(matrix.shape[2], dtype=torch.float64)
    expected = torch.linalg.solve(system, rhs.flatten(1)).view(case.shape)
    solution = case.operator.solve_normal(rhs, a=a, b=b)
    # Closed forms lose a few units of rounding times the condition number, conjugate gradients
    # stop at a residual of 1e-10, which the condition number multiplies in the solution.
    condition = 1 + a / b * float(torch.linalg.matrix_norm(matrix, ord=2).max()) ** 2
    iterates = isinstance(case.operator, ops.Blur) and case.operator.boundary != "circular"
    unit = 2e-10 if iterates else 1e-14
    assert (solution - expected).norm() <= unit * condition * expected.norm()
    if iterates:
        residual = (system @ solution.flatten(1)[..., None])[..., 0] - rhs.flatten(1)
        assert residual.norm() <= (1e-10 + 1e-15 * condition) * rhs.norm()


@each(SOLVABLE)
@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (400.0, 1e-2)])
def test_solve_normal_spread_adds_the_root_of_the_inverse(case, a, b):
    rhs, eps = normal(*case.shape), normal(*case.shape, seed=9)
    if not case.operator.is_diagonal:
        with pytest.raises(TypeError, match="no closed-form root"):
            case.operator.solve_normal_spread(rhs, eps, a=a, b=b)
        return
    matrix = dense(case.operator, case.shape)
    system = a * matrix.mT @ matrix + b * torch.eye(matrix.shape[2], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(system)
    root = vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT
    expected = (
        torch.linalg.solve(system, rhs.flatten(1)) + (root @ eps.flatten(1)[..., None])[..., 0]
    )
    drawn = case.operator.solve_normal_spread(rhs, eps, a=a, b=b)
    torch.testing.assert_close(drawn, expected.view(case.shape), rtol=1e-8, atol=1e-8)


@each(SOLVABLE + COMPOSITIONS)
def test_operators_print_what_they_are_on_a_line(case):
    shown = repr(case.operator)
    assert shown.startswith(type(case.operator).__name__.removeprefix("_Linear") + "(")
    assert "\n" not in shown
    assert len(shown) < 200


def test_what_operators_print():
    mask = torch.tensor([[True, False], [False, False]])
    assert repr(ops.Inpaint(mask)) == "Inpaint(mask=<2 x 2, 75% hidden>)"
    blur = "GaussianBlur(std=2.0, kernel_size=9, boundary='reflect')"
    assert repr(ops.GaussianBlur(2, 9, boundary="reflect")) == blur
    assert repr(ops.Blur(torch.ones(3, 5))) == "Blur(kernel=<3 x 5>, boundary='circular')"
    shown = repr(ops.Compose(ops.SuperResolution(2), ops.GaussianBlur(2, 9, boundary="reflect")))
    assert shown == f"Compose(SuperResolution(factor=2, filter='bicubic'), {blur})"
    assert repr(ops.Denoise()) == "Denoise()"


@each(SOLVABLE + COMPOSITIONS)
def test_shapes_and_roles(case):
    assert case.operator(normal(*case.shape)).shape == case.y_shape
    assert case.operator.input_shape(case.y_shape) == case.shape
    assert case.operator.family == case.family
    solvable = case.family != "composed"
    for role in (Operator, LinearOperator):
        assert isinstance(case.operator, role)
    for role in (SolvableOperator, DiagonalOperator):
        assert isinstance(case.operator, role) == solvable


@each(SOLVABLE + COMPOSITIONS)
def test_images_of_a_batch_do_not_mix(case):
    x, y = normal(*case.shape), normal(*case.y_shape, seed=1)
    changed_x, changed_y = x.clone(), y.clone()
    changed_x[1], changed_y[1] = 7.0, 7.0
    op = case.operator
    assert torch.equal(op(x)[0], op(changed_x)[0])
    assert torch.equal(op.adjoint(y)[0], op.adjoint(changed_y)[0])
    if case.family != "composed":
        first, second = (op.solve_normal(z, a=10.0, b=0.1)[0] for z in (x, changed_x))
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@each(SOLVABLE + COMPOSITIONS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtype_and_device_are_kept_and_never_narrowed(case, kind, device):
    op = case.operator
    x, y = (normal(*shape).to(device, kind) for shape in (case.shape, case.y_shape))
    calls = [(op, x), (op.adjoint, y)]
    if case.family != "composed":
        calls.append((lambda rhs: op.solve_normal(rhs, a=2.0, b=0.5), x))
    # Parts of a composition round to the dtype of the image between them.
    tolerance = 30 * torch.finfo(kind).eps if kind != torch.float64 else 1e-9
    for call, given in calls:
        result, exact = call(given), call(given.double())
        assert (result.dtype, result.device.type) == (kind, device.type)
        assert (result.double() - exact).norm() <= tolerance * exact.norm()
    y = op.measure(x, 0.1)
    assert (y.dtype, y.device.type, y.shape) == (kind, device.type, case.y_shape)


@each(make_local() + make_mixing() + make_compositions())
def test_gradients_pass_after_inference_mode(case):
    """What is kept from the first call must serve a later one that needs gradients."""
    x, weights = normal(*case.shape), normal(*case.y_shape, seed=1)
    with torch.inference_mode():
        case.operator(x.float())
        case.operator(x)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad((case.operator(x) * weights).sum(), x)
    torch.testing.assert_close(gradient, case.operator.adjoint(weights))
    if case.family != "composed":
        # Not of a plain sum: torch 2.6 cannot transform gradients that are one expanded number.
        ones = torch.ones_like(x)
        case.operator.solve_normal(x, a=1.0, b=1.0).backward(ones)
        expected = case.operator.solve_normal(ones, a=1.0, b=1.0)
        torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=1e-6)


@each(SOLVABLE + COMPOSITIONS)
def test_repeated_serves_a_tiled_batch(case):
    x, y = normal(6, *case.shape[1:]), normal(6, *case.y_shape[1:], seed=1)
    tiled = case.operator.repeated(3)
    for sample in range(3):
        part = slice(2 * sample, 2 * sample + 2)
        torch.testing.assert_close(tiled(x)[part], case.operator(x[part]))
        torch.testing.assert_close(tiled.adjoint(y)[part], case.operator.adjoint(y[part]))
    holds_images = case.name in HOLD_IMAGES
    assert (tiled is case.operator) != holds_images
    if holds_images:
        twice = case.operator.repeated(3).repeated(2)
        torch.testing.assert_close(twice(x.repeat(2, 1, 1, 1))[6:], tiled(x))
    assert torch.equal(tiled.count_measured(y), case.operator.count_measured(y[:2]).repeat(3))


def measured_entries(case):
    """Where noise must lie, in the shape of the measurement."""
    if case.family == "masked_fourier" or case.name == "lines_grey":
        mask = getattr(case.operator, "outer", case.operator).mask
        return mask[..., None].expand(case.y_shape)
    if case.family == "inpainting":
        return case.operator.mask.expand(case.y_shape)
    if case.name in ("mask_blur", "masks_blurs"):
        return case.operator.outer.mask.expand(case.y_shape)
    return torch.ones(case.y_shape, dtype=torch.bool)


@each(SOLVABLE + COMPOSITIONS + [Case("hdr", ops.HDR(), (2, 2, 5, 7), (2, 2, 5, 7), "hdr")])
def test_noise_lies_on_measured_entries_only(case):
    x, sigma_y, repeats = normal(*case.shape), 0.3, 400
    clean, measured = case.operator(x), measured_entries(case)
    generator = seeded(5)
    draws = [case.operator.measure(x, sigma_y, generator=generator) for _ in range(repeats)]
    eps = (torch.stack(draws) - clean) / sigma_y
    assert (torch.stack(draws)[:, ~measured] == 0).all()
    count = int(measured.sum()) * repeats
    # Four standard errors of the mean and of the variance of standard normals.
    assert abs(float(eps[:, measured].mean())) <= 4 / math.sqrt(count)
    assert abs(float(eps[:, measured].square().mean()) - 1) <= 4 * math.sqrt(2 / count)
    assert torch.equal(case.operator.count_measured(clean), measured.flatten(1).sum(dim=1))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(
    ("make", "given"),
    [
        (ops.Inpaint, some(6, 8)),
        (ops.Inpaint, some(2, 3, 6, 8).double()),
        (ops.MaskedFourier, some(6, 8)),
        (ops.MaskedFourier, some(6, 8).double()),
        (ops.Blur, positive(3, 4)),
        (ops.Blur, positive(2, 1, 3, 4)),
    ],
)
def test_operators_own_what_they_are_given(make, given, used):
    """A mask or kernel that changes later, or needs gradients, changes nothing."""
    given, x = given.clone(), normal(2, 3, 6, 8)
    expected, op = make(given.clone()), make(given)
    if used:
        op(x)
    given.copy_(given.logical_not() if make is not ops.Blur else 2 * given)
    y = op(x)
    assert torch.equal(y, expected(x))
    assert torch.equal(op.adjoint(y), expected.adjoint(y))
    assert torch.equal(op.measured(y + 1), expected.measured(y + 1))
    assert torch.equal(op.solve_normal(x, a=2.0, b=1.0), expected.solve_normal(x, a=2.0, b=1.0))
    if given.is_floating_point():
        op = make(given.requires_grad_())
        assert not any(op(x).requires_grad for _ in range(2))
        assert torch.equal(op(x), copy.deepcopy(op)(x))


def test_operators_made_in_inference_mode_pass_gradients():
    with torch.inference_mode():
        cases = make_local() + make_mixing()
    for case in cases:
        x = normal(*case.shape).requires_grad_()
        y = case.operator(x)
        torch.autograd.grad(case.operator.adjoint(y), x, torch.ones_like(x))


@each(make_local() + make_mixing() + make_compositions() + OTHERS)
def test_operators_survive_pickles_and_copies(case):
    """Without what they keep from their first use."""
    op, x = case.operator, normal(*case.shape)
    unused, y = len(pickle.dumps(op)), op(x)
    op(x.float())
    stored = pickle.dumps(op)
    assert len(stored) == unused
    for twin in (pickle.loads(stored), copy.deepcopy(op), copy.copy(op)):
        assert torch.equal(twin(x), y)
        assert isinstance(twin, LinearOperator) == isinstance(op, LinearOperator)
        if isinstance(op, SolvableOperator):
            found, expected = (
                part.solve_normal(part.adjoint(y), a=2.0, b=1.0) for part in (twin, op)
            )
            assert torch.equal(found, expected)


@pytest.fixture
def restless():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize(
    "make",
    [
        lambda: ops.Inpaint(some(8, 8)),
        lambda: ops.GaussianBlur(1.0, 3),
        lambda: ops.SuperResolution(2),
        lambda: ops.CompressedSensing((8, 8)),
        lambda: ops.MaskedFourier(some(8, 8)),
    ],
)
def test_threads_may_share_an_operator_from_its_first_use(make):
    images = [normal(1, 1, 8, 8, dtype=kind) for kind in (torch.float32, torch.float64)]

    def use(op, x):
        return op(x), op.solve_normal(x, a=2.0, b=1.0)

    expected = [use(make(), x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            op = make()
            found = pool.map(partial(use, op), 100 * images)
            for results, wanted in zip(found, 100 * expected, strict=True):
                torch.testing.assert_close(results, wanted, rtol=0, atol=0)


def test_operators_keep_little_of_many_sizes():
    blur, reduction = ops.GaussianBlur(1.0, 3), ops.SuperResolution(1)
    for side in range(3, 40):
        for op in (blur, reduction):
            op.solve_normal(torch.ones(1, 1, side, side), a=1.0, b=1.0)
            op(torch.ones(1, 1, side, side))
    kept = (blur._transfers, reduction._matrices, reduction._systems, reduction._spectra)
    assert [len(cache) for cache in kept] == [16] * 4


@pytest.mark.usefixtures("restless")
def test_a_cache_computes_an_entry_once_and_drops_the_one_unused_longest():
    cache, computed = Cache(2), []

    def compute(key):
        computed.append(key)
        time.sleep(0.01)
        return [key]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda key: cache.get(key, lambda: compute(key)), [0, 1] * 4))
    assert found == [[0], [1]] * 4
    assert sorted(computed) == [0, 1]
    cache.get(0, lambda: "anew")
    cache.get(2, lambda: compute(2))
    assert len(cache) == 2
    assert cache.get(0, lambda: "anew") == [0]
    assert cache.get(1, lambda: "anew") == "anew"
    assert len(copy.deepcopy(cache)) == len(pickle.loads(pickle.dumps(cache))) == 0


@each(SOLVABLE + COMPOSITIONS)
def test_measure_takes_one_generator_an_image(case):
    x, op = normal(*case.shape), case.operator
    first = op.measure(x, 0.1, generator=[seeded(0), seeded(1)])
    again = op.measure(x, 0.1, generator=[seeded(7), seeded(1)])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], again[0])


@each(SOLVABLE)
def test_everything_an_operator_makes_is_on_the_device_of_its_images(case):
    """Fake tensors of a GPU that is not there: two devices in one operation are an error."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            x = torch.empty(case.shape, dtype=torch.float32, device="cuda")
            y = case.operator(x)
            back = case.operator.adjoint(y)
            solved = case.operator.solve_normal(back, a=2.0, b=1.0)
        except RuntimeError as error:
            if "driver" not in str(error):
                raise
            pytest.skip("torch asks for a driver to pad")
        assert {part.device.type for part in (y, back, solved)} == {"cuda"}
