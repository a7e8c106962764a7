"""The baselines that run through deepinv, and the classics, against dense matrices and oracles."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from baselines import classics, deepinv_methods
from baselines.interface import Models, Problem
from baselines.physics import (
    BLUR_FLOOR,
    OwnDraws,
    TeacherDenoiser,
    UnitDenoiser,
    deepinv_reconstructor_method,
    make_decomposed_physics,
    make_physics,
    pseudo_inverse,
    singular_system,
    unit_measurement,
    unit_problem,
)
from ncvsd_inverse import operators as ops
from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.machine import count_passes
from ncvsd_inverse.numerics import draw_normal, make_generators
from ncvsd_inverse.priors import DiffusionPrior, GaussianPrior

SIDE = 8
SIGMA_Y = 0.05
SAMPLERS = {method.name: method for method in deepinv_methods.METHODS}
CLASSICS = {method.name: method for method in classics.METHODS}
EVERY = {**SAMPLERS, **CLASSICS}
CALLS = {"ddrm": 30, "diffpir": 30}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def lopsided_kernel(channels=1):
    """Return kernels that no symmetry spares and whose singular values are not small."""
    kernel = 0.1 * normal(1, channels, 3, 4, seed=9).abs()
    kernel[..., 1, 2] += 1
    return kernel / kernel.sum((2, 3), keepdim=True)


MASK = torch.rand(2, SIDE, SIDE, generator=torch.Generator().manual_seed(5)) < 0.5
DECOMPOSED = {
    "denoise": ops.Denoise(),
    "box": ops.Inpaint.box((SIDE, SIDE), 4),
    "mask": ops.Inpaint(MASK),
    "bicubic": ops.SuperResolution(4),
    "means": ops.SuperResolution(2, filter="box"),
    "gaussian": ops.GaussianBlur(1.0, 5),
    "lopsided": ops.Blur(lopsided_kernel()),
    "by_channel": ops.Blur(lopsided_kernel(2)),
}
LINEAR = {**DECOMPOSED, "reflect": ops.Blur(lopsided_kernel(), boundary="reflect")}


def dense(function, shape):
    """Return the matrix of a linear function of images of `shape`, (C, H, W)."""
    basis = torch.eye(torch.Size(shape).numel(), dtype=torch.float64)
    return function(basis.reshape(-1, *shape)).flatten(1).T


@dataclass(frozen=True)
class Oracle:
    """A stationary Gaussian prior, one measurement of a draw, and the exact posterior.

    Attributes:
        problem: the measurement, repeated with a key for each replica.
        models: the prior's denoiser as the teacher.
        mean: of the posterior, shape (D,).
        variance: of the posterior, summed over pixels.
    """

    problem: Problem
    models: Models
    mean: torch.Tensor
    variance: float


def make_oracle(operator, replicas, side=SIDE):
    frequencies = torch.fft.fftfreq(side, dtype=torch.float64) * side
    spectrum = (1 + frequencies[:, None] ** 2 + frequencies**2) ** -1.5
    spectrum = 0.08 * spectrum / spectrum.mean()
    average = torch.full((1, side, side), 0.3, dtype=torch.float64)
    prior = GaussianPrior.stationary(average, spectrum[None])
    basis = torch.eye(side**2, dtype=torch.float64).reshape(-1, side, side)
    columns = torch.fft.ifft2(torch.fft.fft2(basis) * spectrum).real
    covariance = columns.flatten(1)
    generator = torch.Generator().manual_seed(3)
    y = operator.measure(prior.draw(1, generator=generator), SIGMA_Y, generator=generator)
    matrix = dense(operator, (1, side, side))
    inner = matrix @ covariance @ matrix.T + SIGMA_Y**2 * torch.eye(len(matrix))
    gain = torch.linalg.solve(inner, matrix @ covariance).T
    mean = average.flatten() + gain @ (y.flatten() - matrix @ average.flatten())
    problem = Problem(
        y=y.float().repeat(replicas, 1, 1, 1),
        operator=operator,
        sigma_y=SIGMA_Y,
        keys=tuple((7, replica) for replica in range(replicas)),
    )
    teacher = DiffusionPrior(prior.denoise)
    variance = float((covariance - gain @ matrix @ covariance).trace())
    return Oracle(problem, Models(teacher=teacher, student=prior), mean, variance)


def run(method, oracle, calls=None, **settings):
    calls = CALLS.get(method.name, 0) if calls is None else calls
    return method.run(oracle.problem, oracle.models, calls, {**method.settings, **settings})


# Physics


@pytest.mark.parametrize("name", LINEAR)
def test_physics_are_the_operator(name):
    operator, x = LINEAR[name], normal(3, 2, SIDE, SIDE)
    y = operator(x) + normal(*operator(x).shape, seed=1)
    physics = make_physics(operator, y.device)
    assert torch.equal(physics.A(x), operator(x))
    inner = (physics.A(x) * y).sum()
    assert torch.allclose(inner, (x * physics.A_adjoint(y)).sum(), rtol=1e-9)

    matrix = dense(operator, (2, SIDE, SIDE))
    flat = y.flatten(1).T
    floor = BLUR_FLOOR if isinstance(operator, ops.Blur) else 0.0
    inverse = torch.linalg.pinv(matrix)
    if floor:
        normal_matrix = matrix.T @ matrix + floor * torch.eye(matrix.shape[1])
        inverse = torch.linalg.solve(normal_matrix, matrix.T)
    # Masks and reductions: 1e-8 over the smallest squared value, 0.004; conjugate gradients: 1e-10.
    assert torch.allclose(physics.A_dagger(y).flatten(1).T, inverse @ flat, rtol=1e-5, atol=1e-5)

    z, gamma = normal(3, 2, SIDE, SIDE, seed=2), torch.tensor(30.0)
    expected = torch.linalg.solve(
        30 * matrix.T @ matrix + torch.eye(matrix.shape[1]),
        30 * matrix.T @ flat + z.flatten(1).T,
    )
    prox = physics.prox_l2(z, y, gamma)
    assert torch.allclose(prox.flatten(1).T, expected, atol=1e-7)


@pytest.mark.parametrize("name", LINEAR)
def test_the_pseudo_inverse_explains_noiseless_data(name):
    operator = LINEAR[name]
    y = operator(normal(2, 2, SIDE, SIDE))
    explained = operator(pseudo_inverse(operator, y))
    # A blur loses floor / s^2 of a coefficient with the small singular value s.
    tolerance = 0.05 if isinstance(operator, ops.Blur) else 1e-5
    assert float((explained - y).norm()) < tolerance * float(y.norm())


@pytest.mark.parametrize("name", LINEAR)
def test_residuals_agree_between_the_units(name):
    operator, x = LINEAR[name], normal(2, 2, SIDE, SIDE)
    y = operator(x) + SIGMA_Y * normal(*operator(x).shape, seed=1)
    unit = unit_measurement(operator, y) - operator((x + 1) / 2)
    assert torch.allclose(2 * unit, y - operator(x), atol=1e-12)


def test_nonlinear_physics_only_go_forward():
    operator = ops.PhaseRetrieval(4)
    x = normal(2, 1, SIDE, SIDE)
    physics = make_physics(operator, x.device)
    assert torch.equal(physics.A(x), operator(x))
    with pytest.raises(TypeError, match="operator must have adjoint"):
        pseudo_inverse(operator, operator(x))


@pytest.mark.parametrize("name", DECOMPOSED)
def test_the_singular_system_is_that_of_the_matrix(name):
    operator, shape = DECOMPOSED[name], (2, SIDE, SIDE)
    y = operator(torch.zeros(1, *shape, dtype=torch.float64))
    system = singular_system(operator, y)
    matrix = dense(operator, shape)
    left = dense(system.left, shape)
    right = dense(system.right, shape)
    values = system.values.flatten()
    identity = torch.eye(len(values), dtype=torch.float64)
    assert torch.allclose(right.T @ right, identity, atol=1e-10)
    assert torch.allclose(dense(system.right_adjoint, shape), right.T, atol=1e-10)
    assert torch.allclose(dense(system.left_adjoint, y.shape[1:]), left.T, atol=1e-10)
    assert torch.allclose(left @ left.T, torch.eye(len(matrix), dtype=torch.float64), atol=1e-7)
    assert torch.allclose(left * values @ right.T, matrix, atol=1e-7)
    expected = torch.linalg.svdvals(matrix)
    assert torch.allclose(values.sort(descending=True).values[: len(expected)], expected, atol=1e-7)

    physics = make_decomposed_physics(operator, y, SIGMA_Y)
    x, other = normal(3, *shape), normal(3, *y.shape[1:], seed=1)
    assert torch.allclose(physics.A(x), operator(x), atol=1e-7)
    assert torch.allclose(physics.A_adjoint(other), operator.adjoint(other), atol=1e-7)
    assert physics.mask.shape == (1, *shape)


@pytest.mark.parametrize(
    ("operator", "error", "match"),
    [
        (LINEAR["reflect"], TypeError, "operator must be a mask, a circular blur or a reduction"),
        (ops.Inpaint(MASK[:, None]), ValueError, "mask must be one for all images, got 2"),
        (ops.Blur(torch.rand(2, 1, 3, 3)), ValueError, "kernel must be one for all images, got 2"),
    ],
)
def test_other_operators_have_no_singular_system(operator, error, match):
    with pytest.raises(error, match=match):
        singular_system(operator, torch.zeros(2, 1, SIDE, SIDE))


# Denoisers and draws


def test_denoisers_keep_units_levels_and_gradients():
    teacher = make_oracle(ops.Denoise(), 1).models.teacher
    denoiser = TeacherDenoiser(teacher, sigma_max=10.0)
    x = normal(3, 1, SIDE, SIDE)
    levels = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    assert torch.equal(denoiser(x, levels.reshape(3, 1, 1, 1)), teacher.denoise(x, levels))
    assert torch.allclose(denoiser(5 * x, 50.0), teacher.denoise(x, 10.0), atol=1e-12)

    unit = UnitDenoiser(denoiser)
    assert torch.equal(unit((x + 1) / 2, 0.25), (denoiser((x + 1) / 2 * 2 - 1, 0.5) + 1) / 2)
    # The denoiser is linear, with a symmetric matrix: its gradient is its own difference.
    direction, start = normal(3, 1, SIDE, SIDE, seed=1), x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((unit(start, 0.25) * direction).sum(), start)
    expected = unit(x + direction, 0.25) - unit(x, 0.25)
    assert torch.allclose(gradient, expected, atol=1e-10)


def test_draws_are_each_images_own():
    before = torch.random.get_rng_state()
    like = torch.zeros(2, 3, dtype=torch.float64)
    keys = [(1,), (2,)]
    with OwnDraws(make_generators(keys), scale=2.0):
        scaled = torch.randn_like(like)
    with OwnDraws(make_generators(keys)):
        filled = torch.empty_like(like).normal_()
    expected = draw_normal(like, make_generators(keys))
    assert torch.equal(scaled, 2 * expected)
    assert torch.equal(filled, expected)
    assert torch.equal(torch.random.get_rng_state(), before)


# Methods


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("calls", [2, 7])
def test_calls_are_those_asked_for(name, calls):
    oracle = make_oracle(DECOMPOSED["box"], 3)
    images = []
    hook = oracle.models.teacher.network.register_forward_hook(
        lambda module, arguments, output: images.append(len(arguments[0]))
    )
    x0 = run(SAMPLERS[name], oracle, calls)
    hook.remove()
    assert images == [3] * calls
    assert x0.shape == oracle.problem.shape
    assert x0.dtype == torch.float32
    assert not x0.requires_grad


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("case", ["box", "bicubic", "lopsided"])
def test_images_do_not_depend_on_their_batch(name, case):
    oracle = make_oracle(DECOMPOSED[case], 3)
    problem = oracle.problem
    shifts = torch.tensor([0.0, 0.3, -0.4]).reshape(3, 1, 1, 1)
    shifted = problem.y + problem.operator(shifts.expand(problem.shape))
    oracle = replace(oracle, problem=replace(problem, y=shifted))
    y, before = shifted.clone(), torch.random.get_rng_state()
    calls = 8 if name in SAMPLERS else 0
    together = run(EVERY[name], oracle, calls)
    assert torch.equal(oracle.problem.y, y)
    assert torch.equal(torch.random.get_rng_state(), before)
    single = replace(oracle.problem, y=y[1:2], keys=oracle.problem.keys[1:2])
    alone = run(EVERY[name], replace(oracle, problem=single), calls)
    # Sums are ordered otherwise in a batch of another size: rounding, grown by the sampler.
    assert torch.allclose(together[1:2], alone, atol=1e-4)
    if EVERY[name].samples:
        keys = tuple((8, replica) for replica in range(3))
        other = replace(oracle, problem=replace(oracle.problem, keys=keys))
        assert not torch.allclose(run(EVERY[name], other, calls), together, atol=0.05)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("case", ["box", "means", "gaussian"])
def test_methods_come_near_the_posterior_of_a_gaussian(name, case):
    oracle = make_oracle(DECOMPOSED[case], 48 if name in SAMPLERS else 1)
    # These images are rougher than the photographs that the default weight is for.
    settings = {"weight": 2.0} if name == "tv" else {}
    x0 = run(EVERY[name], oracle, **settings).double().flatten(1)
    naive = pseudo_inverse(oracle.problem.operator, oracle.problem.y)[:1].flatten(1).double()

    def distance(image):
        return float((image - oracle.mean).square().sum()) / oracle.variance

    found = distance(x0.mean(0))
    if name != "pinv":
        assert found < distance(naive)
    if name in SAMPLERS:
        # None is exact: bias is at most 0.12 and spread 0.45 to 1.05 with this many calls.
        spread = float(x0.var(0).sum()) / oracle.variance
        assert found < 0.2
        assert 0.35 < spread < 1.3


def test_ddrm_without_data_draws_from_the_prior():
    # With sigma_y above all singular values nothing counts as measured.
    oracle = make_oracle(DECOMPOSED["denoise"], 64)
    oracle = replace(oracle, problem=replace(oracle.problem, sigma_y=1.5))
    x0 = run(SAMPLERS["ddrm"], oracle, 100, eta=0.1).double().flatten(1)
    spread = float(x0.var(0).sum()) / (0.08 * SIDE**2)
    # 64 draws know it to about 0.1; with deepinv's noise, too small by sqrt 2, it is 0.47.
    assert 0.7 < spread < 1.3


@pytest.mark.parametrize("name", EVERY)
def test_an_operator_that_is_not_linear_is_refused(name):
    oracle = make_oracle(ops.Denoise(), 4)
    operator = ops.PhaseRetrieval(4)
    problem = replace(oracle.problem, operator=operator, y=operator(oracle.problem.y))
    assert EVERY[name].linear_only
    with pytest.raises(TypeError, match="operator must"):
        run(EVERY[name], replace(oracle, problem=problem), 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_divergence_is_reported(name):
    class Broken(nn.Module):
        def forward(self, x, sigma):
            return x * float("nan")

    oracle = make_oracle(DECOMPOSED["box"], 2)
    models = replace(oracle.models, teacher=DiffusionPrior(Broken()))
    with pytest.raises(DivergenceError, match="x0 must stay finite"):
        run(SAMPLERS[name], replace(oracle, models=models), 3)


def test_methods_describe_themselves():
    for name, method in EVERY.items():
        assert set(method.search) == set(method.settings)
        assert method.network == ("teacher" if name in SAMPLERS else "none")
        assert method.samples == (name in SAMPLERS)
        assert (method.calls == (0,)) == (name in CLASSICS)
        for setting, ladder in method.search.items():
            assert ladder.value(method.settings[setting], 0, 100) == method.settings[setting]


# Reconstructors of deepinv


class Ridge(nn.Module):
    """The minimiser of ||A x - y||^2 / 2 + weight ||x - 1/2||^2 / 2."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, y, physics):
        grey = torch.full_like(physics.A_adjoint(y), 0.5)
        return physics.prox_l2(grey, y, 1 / self.weight)


class Noise(nn.Module):
    def forward(self, y, physics):
        like = physics.A_adjoint(y)
        return torch.rand_like(like) + torch.randn(like.shape)


def plug_and_play(denoiser, sigma, calls, settings):
    from deepinv.optim import L2, PGD, PnP

    return PGD(
        prior=PnP(denoiser),
        data_fidelity=L2(),
        stepsize=settings["stepsize"],
        sigma_denoiser=2 * sigma,
        max_iter=calls,
    )


@pytest.mark.parametrize("case", ["box", "means", "lopsided", "reflect"])
def test_a_reconstructor_is_given_the_problem_in_its_own_units(case):
    oracle, given = make_oracle(LINEAR[case], 2), []
    problem = oracle.problem

    def make(denoiser, sigma, calls, settings):
        given.append((sigma, calls))
        return Ridge(settings["weight"])

    method = deepinv_reconstructor_method("ridge", "Ridge", make, settings={"weight": 0.2})
    assert (method.network, method.samples, method.linear_only) == ("none", False, True)
    found = run(method, oracle, 0)
    operator = problem.operator
    expected = operator.solve_normal(operator.adjoint(problem.y), a=1.0, b=0.2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert given == [(SIGMA_Y / 2, 0)] * 2
    y, physics, sigma = unit_problem(problem)
    assert float(physics.noise_model.sigma) == pytest.approx(sigma)
    assert torch.equal(y, unit_measurement(operator, problem.y))


def test_a_reconstructor_has_the_teacher_as_its_denoiser():
    oracle = make_oracle(DECOMPOSED["box"], 3)
    method = deepinv_reconstructor_method(
        "pnp", "PnP", plug_and_play, calls=(4, 20), settings={"stepsize": 1.0}
    )
    assert method.network == "teacher"
    with count_passes(oracle.models.networks) as passes:
        found = run(method, oracle, 20)
    assert passes.forward == 3 * 20
    # A fixed point: the denoised image that knows y, all in [-1, 1].
    operator, problem = oracle.problem.operator, oracle.problem
    stepped = found - operator.adjoint(operator(found) - problem.y)
    denoised = oracle.models.teacher.denoise(stepped, 2 * SIGMA_Y)
    assert (denoised - found).abs().max() < 0.1 * (found - 0.3).abs().max()


def test_draws_of_a_reconstructor_are_each_images_own():
    oracle = make_oracle(DECOMPOSED["box"], 3)
    method = deepinv_reconstructor_method(
        "noise", "Noise", lambda *_: Noise(), samples=True, linear_only=False
    )
    before = torch.random.get_rng_state()
    found = run(method, oracle, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    single = replace(oracle.problem, y=oracle.problem.y[1:2], keys=oracle.problem.keys[1:2])
    assert torch.equal(run(method, replace(oracle, problem=single), 0), found[1:2])
    assert not torch.allclose(found[0], found[1], atol=0.1)


def test_a_reconstructor_of_another_kind_is_refused_and_phases_go_forward():
    oracle = make_oracle(DECOMPOSED["box"], 1)
    method = deepinv_reconstructor_method("wrong", "Wrong", lambda *_: torch.relu)
    with pytest.raises(TypeError, match="make must return a module, got builtin"):
        run(method, oracle, 0)
    empty = Ridge(1.0)
    empty.forward = lambda y, physics: physics.A_adjoint(y) / 0
    nan = deepinv_reconstructor_method("nan", "NaN", lambda *_: empty)
    with pytest.raises(DivergenceError, match="x0 must stay finite"):
        run(nan, oracle, 0)
    operator = ops.PhaseRetrieval(4)
    x = normal(1, 1, SIDE, SIDE, dtype=torch.float32)
    problem = replace(oracle.problem, operator=operator, y=operator(x))
    y, physics, sigma = unit_problem(problem)
    assert (torch.equal(y, problem.y), sigma) == (True, SIGMA_Y)
    torch.testing.assert_close(physics.A((x + 1) / 2), problem.y, rtol=0, atol=1e-4)


# Classics


@pytest.mark.parametrize("case", ["box", "bicubic", "lopsided"])
def test_the_wiener_filter_is_the_mean_of_its_gaussian(case):
    operator, sides = DECOMPOSED[case], (SIDE, 12)
    if case == "box":
        operator = ops.Inpaint.box(sides, 4)
    y = operator.measure(0.5 * normal(2, 1, *sides), SIGMA_Y, generator=make_generators([(1,)] * 2))
    problem = Problem(y=y, operator=operator, sigma_y=SIGMA_Y, keys=((1,), (2,)))
    found = classics.run_wiener(problem, None, 0, {"std": 0.4, "exponent": 2.5})

    squared = (
        torch.fft.fftfreq(sides[0]).double()[:, None] ** 2 + torch.fft.fftfreq(12).double() ** 2
    )
    spectrum = (squared + (0.5 / 12) ** 2) ** -1.25
    spectrum = 0.4**2 * spectrum / spectrum.mean()
    covariance = dense(lambda x: torch.fft.ifft2(torch.fft.fft2(x) * spectrum).real, (1, *sides))
    assert torch.allclose(covariance.diagonal(), torch.tensor(0.16).double(), atol=1e-6)
    matrix = dense(operator, (1, *sides))
    inner = matrix @ covariance @ matrix.T + SIGMA_Y**2 * torch.eye(len(matrix))
    expected = covariance @ matrix.T @ torch.linalg.solve(inner, y.flatten(1).T)
    assert torch.allclose(found.flatten(1).T, expected, atol=1e-5)


def test_total_variation_moves_two_halves_together():
    # The halves of an image H x W with one edge of length H each hold H W / 2 pixels: the minimum
    # moves both by weight * sigma_y^2 * H / (H W / 2).
    y = torch.zeros(1, 1, 6, SIDE)
    y[..., SIDE // 2 :] = 0.5
    problem = Problem(y=y, operator=ops.Denoise(), sigma_y=SIGMA_Y, keys=((1,),))
    x0 = classics.run_tv(problem, None, 0, {"weight": 40.0})
    moved = 40 * SIGMA_Y**2 * 2 / SIDE
    assert torch.allclose(x0[..., : SIDE // 2], torch.tensor(moved), atol=2e-3)
    assert torch.allclose(x0[..., SIDE // 2 :], torch.tensor(0.5 - moved), atol=2e-3)


@pytest.mark.parametrize("case", ["box", "bicubic", "lopsided"])
def test_total_variation_is_at_its_minimum(case):
    oracle = make_oracle(DECOMPOSED[case], 1)

    def cost(x):
        across = nn.functional.pad(x.diff(dim=-1), (0, 1))
        down = nn.functional.pad(x.diff(dim=-2), (0, 0, 0, 1))
        misfit = (oracle.problem.operator(x) - oracle.problem.y).square().sum()
        variation = (across**2 + down**2).sqrt().sum()
        return float(misfit / (2 * SIGMA_Y**2) + 5 * variation)

    x0 = run(CLASSICS["tv"], oracle, weight=5.0)
    for weight in (3.5, 7.0):
        assert cost(x0) < cost(run(CLASSICS["tv"], oracle, weight=weight))
    for direction in (x0, normal(*x0.shape, dtype=torch.float32)):
        for step in (-0.02, 0.02):
            assert cost(x0) < cost(x0 + step * direction)
