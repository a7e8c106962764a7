import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import sanity
from baselines import daps, ddnm, guided, ours, pnpdm, reddiff
from baselines.interface import Models, Problem, misfit_gradient
from ncvsd_inverse import DivergenceError, solve
from ncvsd_inverse.machine import count_passes
from ncvsd_inverse.numerics import hartley
from ncvsd_inverse.operators import Blur, GaussianBlur, Inpaint, PhaseRetrieval, SuperResolution
from ncvsd_inverse.priors import DiffusionPrior, GaussianPrior
from ncvsd_inverse.protocols import SIGMA_Y
from ncvsd_inverse.schedules import karras, variance_preserving
from ncvsd_inverse.tasks import list_tasks, make_task

OTHERS = (daps.METHOD, pnpdm.METHOD, reddiff.METHOD, ddnm.METHOD, *guided.METHODS)
RIVALS = {method.name: method for method in OTHERS}
METHODS = {method.name: method for method in ours.OURS} | RIVALS
SIDE = 16


def small_models(channels=3):
    """A Gaussian prior of small images as teacher and student, and the prior itself."""
    one = sanity.make_oracle(SIDE)
    spectrum = torch.fft.fft2(one.covariance[0].reshape(SIDE, SIDE)).real
    mean = torch.full((channels, SIDE, SIDE), sanity.MEAN, dtype=torch.float64)
    prior = GaussianPrior.stationary(mean, spectrum[None])
    teacher = DiffusionPrior(prior.denoise).with_statistics(prior.statistics)
    return Models(teacher, sanity.ExactStudent(prior)), prior


def make_problem(prior, operator, *, batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    y = operator.measure(prior.draw(batch, generator=generator), SIGMA_Y, generator=generator)
    return Problem(y.to(dtype), operator, SIGMA_Y, tuple((7, image) for image in range(batch)))


def settings_of(method, **others):
    """The method's own settings, short of what would not fit into a few calls."""
    few = {"ode_steps": 2, "grid": 4}
    own = {name: few.get(name, value) for name, value in method.settings.items()}
    return {**own, **others}


def run_counted(method, problem, models, nfe, **others):
    with count_passes(models.networks) as passes:
        restored = method.run(problem, models, nfe, settings_of(method, **others))
    return restored, passes.forward / len(problem.keys)


# What every method must do.


@pytest.mark.parametrize("task", list_tasks())
@pytest.mark.parametrize("name", METHODS)
def test_each_image_of_each_task_is_restored_by_itself_within_the_budget(name, task):
    method = METHODS[name]
    models, prior = small_models()
    operator = make_task(task, SIDE).operator
    if method.linear_only and task == "phase_retrieval":
        with pytest.raises(TypeError, match="operator must"):
            method.run(make_problem(prior, operator), models, 5, settings_of(method))
        return
    problem = make_problem(prior, operator)
    restored, calls = run_counted(method, problem, models, 5)
    assert restored.shape == problem.shape
    assert restored.dtype == torch.float64
    assert not restored.requires_grad
    assert restored.isfinite().all()
    assert calls == (4 if name == "daps" else 5)
    alone = Problem(problem.y[1:2], operator, SIGMA_Y, problem.keys[1:2])
    again = method.run(alone, models, 5, settings_of(method))
    torch.testing.assert_close(again, restored[1:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_float32_restores_what_float64_does(name):
    models, prior = small_models(1)
    errors = []
    for dtype in (torch.float32, torch.float64):
        problem = make_problem(prior, SuperResolution(4), batch=40, dtype=dtype)
        restored, _ = run_counted(METHODS[name], problem, models, 30)
        assert restored.dtype == dtype
        misfit = problem.operator(restored) - problem.y
        errors.append(float(misfit.square().mean().sqrt()))
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


@pytest.mark.parametrize("name", METHODS)
def test_other_keys_give_other_images(name):
    models, prior = small_models(1)
    problem = make_problem(prior, Inpaint.box((SIDE, SIDE), 8), batch=1)
    twice = Problem(problem.y.repeat(2, 1, 1, 1), problem.operator, SIGMA_Y, ((0,), (1,)))
    restored, _ = run_counted(METHODS[name], twice, models, 9)
    assert (restored[0] - restored[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", RIVALS)
def test_a_network_that_fails_is_a_divergence(name):
    _, prior = small_models(1)
    problem = make_problem(prior, SuperResolution(4), batch=2)

    class Fails(nn.Module):
        def forward(self, x, sigma):
            return x * math.nan

    models = Models(DiffusionPrior(Fails()), sanity.ExactStudent(prior))
    with pytest.raises(DivergenceError, match=r"must stay finite, got NaN or infinity in \w+ 1 of"):
        METHODS[name].run(problem, models, 9, settings_of(METHODS[name]))


@pytest.mark.parametrize("name", RIVALS)
def test_no_level_is_above_what_the_networks_know(name):
    models, prior = small_models(1)
    problem = make_problem(prior, SuperResolution(4), batch=1)
    levels = []
    hook = models.teacher.network.register_forward_hook(
        lambda module, args, output: levels.append(float(args[1].max()))
    )
    low = Models(models.teacher, models.student, sigma_max=5.0)
    METHODS[name].run(problem, low, 12, settings_of(METHODS[name]))
    hook.remove()
    # The grid of PnP-DM has the next lower level.
    assert max(levels) == pytest.approx(1.834 if name == "pnpdm" else 5.0, rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_known_of_a_method_fits_together(name):
    method = METHODS[name]
    for setting, ladder in method.search.items():
        start = method.settings[setting]
        assert ladder.value(start, 0, 1000) == start
        assert len({ladder.value(start, steps, 1000) for steps in (-2, -1, 0, 1, 2)}) >= 3
    entries = (Path(sanity.__file__).parent / "references.bib").read_text(encoding="utf-8")
    assert f"{{{method.reference}," in entries


def test_the_registry_names_every_method_once():
    from baselines import classics, deepinv_methods
    from baselines.registry import METHODS as ALL

    assert all(name == method.name for name, method in ALL.items())
    assert len(ALL) == len(METHODS) + len(deepinv_methods.METHODS) + len(classics.METHODS)


# Laws that linear algebra gives: with a stationary Gaussian prior and a circular blur every
# coordinate of the Hartley basis is a scalar chain of its own.


class ScalarChains:
    """Mean and variance of every coordinate of a chain, shape (8, 8)."""

    def __init__(self, replicas=3000):
        self.oracle = sanity.make_oracle(8)
        taps = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)  # none at the highest frequency
        self.operator = Blur(torch.outer(taps, taps))
        self.posterior = sanity.make_posterior(
            "deblur", self.oracle, self.operator, replicas=replicas, dtype=torch.float64
        )
        delta = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
        delta[..., 0, 0] = 1
        response = self.operator.adjoint(self.operator(delta))
        self.squares = torch.fft.fft2(response)[0, 0].real.clamp(min=0)
        self.variances = torch.fft.fft2(self.oracle.covariance[0].reshape(8, 8)).real
        self.prior_mean = hartley(torch.full((8, 8), sanity.MEAN, dtype=torch.float64))
        self.adjoint_y = hartley(self.operator.adjoint(self.posterior.problem.y[:1])[0, 0])
        self.mean = torch.zeros(8, 8, dtype=torch.float64)
        self.variance = torch.zeros(8, 8, dtype=torch.float64)

    def gain(self, level):
        return self.variances / (self.variances + level**2)

    def scale(self, factor, fresh=0.0):
        """The coordinates' distance from the prior mean shrinks; fresh noise joins."""
        self.mean = self.prior_mean + factor * (self.mean - self.prior_mean)
        self.variance = factor**2 * self.variance + fresh**2

    def noise(self, std):
        self.variance = self.variance + std**2

    def likelihood(self, rho):
        p = 1 / (self.squares / SIGMA_Y**2 + 1 / rho**2)
        self.mean = p * (self.adjoint_y / SIGMA_Y**2 + self.mean / rho**2)
        self.variance = p + (p / rho**2) ** 2 * self.variance

    def assert_law_of(self, restored):
        coordinates = hartley(restored)[:, 0]
        num = len(coordinates)
        # Four and a half standard errors: 64 entries are looked at.
        error = (coordinates.mean(0) - self.mean).abs() / (self.variance / num).sqrt()
        assert error.max() < 4.5
        error = (coordinates.var(0) / self.variance - 1).abs() / math.sqrt(2 / num)
        assert error.max() < 4.5


def test_daps_has_the_law_that_its_equations_give():
    chain = ScalarChains()
    models = Models(chain.oracle.models.teacher, chain.oracle.models.student, sigma_max=50.0)
    settings = {"ode_steps": 4, "tau": 0.02, "rate": 2e-4, "sigma_min": 0.1}
    restored, calls = run_counted(daps.METHOD, chain.posterior.problem, models, 20, **settings)
    assert calls == 20
    levels = (*karras(6, 50.0, 0.1)[:-1], 0.0)
    for number, (sigma, following) in enumerate(pairwise(levels)):
        chain.noise(sigma)
        for t, s in pairwise(karras(5, sigma, 0.01)):
            chain.scale(chain.gain(t) + s / t * (1 - chain.gain(t)))
        rate = 2e-4 * (1 - 0.99 * number / 6)
        precision = 2 * chain.squares / 0.02**2 + 1 / sigma**2
        pulled, fresh, share = torch.zeros(3, 8, 8, dtype=torch.float64)
        share += 1  # of x0 in u
        for _ in range(100):
            kept = 1 - rate * precision
            pulled = kept * pulled + rate * 2 * chain.adjoint_y / 0.02**2
            share = kept * share + rate / sigma**2
            fresh = kept**2 * fresh + 2 * rate
        chain.mean = share * chain.mean + pulled
        chain.variance = share**2 * chain.variance + fresh
        if following == 0:
            chain.assert_law_of(restored)


def test_pnpdm_has_the_law_that_its_equations_give():
    chain = ScalarChains()
    restored, calls = run_counted(
        pnpdm.METHOD, chain.posterior.problem, chain.oracle.models, 60, grid=20, rho_min=0.1
    )
    times = [1 - 0.999 * i / 19 for i in range(20)]
    start, slope = 0.10137120773, 17.3256765988
    sigmas = [math.sqrt(math.expm1(slope / 2 * t**2 + start * t)) for t in times]
    assert sigmas[0] == pytest.approx(80, rel=1e-3)
    assert sigmas[-1] == pytest.approx(0.0105, rel=0.01)
    schedule = pnpdm.plan(60, sigmas, 10.0, 0.1)
    assert calls == sum(sigma < rho for rho in schedule for sigma in sigmas)
    assert 55 < calls <= 60
    for rho in schedule:
        chain.likelihood(rho)
        steps = [*((t, s) for t, s in zip(times, sigmas, strict=True) if s < rho), (0.0, 0.0)]
        # Euler steps of dX = -(X / 2 + score) beta dt + sqrt(beta) dW for X = scale * x.
        for (t, sigma), (following, level) in pairwise(steps):
            beta, scale = (start + slope * t) * (t - following), (1 + sigma**2) ** -0.5
            towards = beta / (scale * sigma) ** 2
            grown = scale * math.sqrt(1 + level**2)
            gain = chain.gain(sigma)
            factor = grown * (1 + beta / 2 - towards * (1 - gain))
            chain.mean = factor * chain.mean + grown * towards * (1 - gain) * chain.prior_mean
            fresh = beta * (1 + level**2) if following else 0.0
            chain.variance = factor**2 * chain.variance + fresh
    chain.assert_law_of(restored)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_mmps_has_the_law_that_its_equations_give(eta):
    chain = ScalarChains()
    restored, calls = run_counted(
        RIVALS["mmps"], chain.posterior.problem, chain.oracle.models, 8, eta=eta, iterations=8
    )
    assert calls == 8
    levels = variance_preserving(8, 80.0)
    chain.noise(levels[0])
    for sigma, following in pairwise((*levels, 0.0)):
        # For a Gaussian prior the moments are the posterior's.
        gain = chain.gain(sigma)
        spread = sigma**2 * gain
        step = spread / (SIGMA_Y**2 + chain.squares * spread)
        kept = gain * (1 - step * chain.squares)
        target = (1 - step * chain.squares) * (1 - gain) * chain.prior_mean
        target = target + step * chain.adjoint_y
        fresh = eta * math.sqrt(1 - (following / sigma) ** 2)
        carried = math.sqrt(1 - fresh**2) * following / sigma
        factor = kept + carried * (1 - kept)
        chain.mean = factor * chain.mean + (1 - carried) * target
        chain.variance = factor**2 * chain.variance + (following * fresh) ** 2
    chain.assert_law_of(restored)


def test_pigdm_has_the_law_that_its_equations_give():
    chain = ScalarChains()
    restored, calls = run_counted(
        RIVALS["pigdm"], chain.posterior.problem, chain.oracle.models, 12, weight=0.8
    )
    assert calls == 12
    levels = variance_preserving(12, 80.0)
    chain.noise(levels[0])
    for sigma, following in pairwise((*levels, 0.0)):
        gain = chain.gain(sigma)
        ratio = SIGMA_Y**2 * (1 + sigma**2) / sigma**2
        pull = 0.8 * math.sqrt(1 + following**2) * gain / (chain.squares + ratio)
        fresh = math.sqrt(1 - (following / sigma) ** 2)
        carried = math.sqrt(1 - fresh**2) * following / sigma
        factor = gain + carried * (1 - gain) - pull * chain.squares * gain
        chain.scale(factor, following * fresh)
        chain.mean = chain.mean + pull * (chain.adjoint_y - chain.squares * chain.prior_mean)
    chain.assert_law_of(restored)


def test_dps_takes_steps_of_the_paper():
    # One step in the state of the discrete diffusion, as the paper writes it.
    models, prior = small_models(1)
    problem = make_problem(prior, SuperResolution(4), batch=2)
    generators, eps_type = problem.generators(), torch.float64
    sigma, last = variance_preserving(2, 80.0)
    eps, fresh = (
        torch.stack([torch.randn(1, SIDE, SIDE, generator=g, dtype=eps_type) for g in generators])
        for _ in range(2)
    )
    kept = [1 / (1 + s**2) for s in (sigma, last)]
    state = (math.sqrt(kept[0]) * sigma * eps).requires_grad_()
    for place, (before, after) in enumerate(pairwise((*kept, 1.0))):
        alpha = before / after
        x0 = models.teacher.denoise(state / math.sqrt(before), (sigma, last)[place]).clamp(-1, 1)
        norm = (problem.y - problem.operator(x0)).flatten(1).norm(dim=1).sum()
        (gradient,) = torch.autograd.grad(norm, state)
        mean = math.sqrt(after) * (1 - alpha) / (1 - before) * x0
        mean = mean + math.sqrt(alpha) * (1 - after) / (1 - before) * state
        std = math.sqrt((1 - alpha) * (1 - after) / (1 - before))
        state = (mean + std * fresh - 0.2 * gradient).detach().requires_grad_()
    restored = RIVALS["dps"].run(problem, models, 2, {"scale": 0.2})
    torch.testing.assert_close(restored, state.detach(), rtol=0, atol=1e-9)


def test_dps_goes_where_the_gradient_of_amplitudes_leads():
    models, prior = small_models(1)
    problem = make_problem(prior, PhaseRetrieval(4), batch=4)

    def misfit(scale):
        restored = RIVALS["dps"].run(problem, models, 100, {"scale": scale})
        return float((problem.operator(restored) - problem.y).norm())

    assert misfit(0.3) < 0.8 * misfit(1e-6)


def test_mmps_goes_back_through_the_network_once_for_each_iteration_and_once_more():
    models, prior = small_models(1)
    problem = make_problem(prior, SuperResolution(4), batch=2)
    with count_passes(models.networks) as passes:
        RIVALS["mmps"].run(problem, models, 3, {"iterations": 2, "eta": 1.0})
    assert (passes.forward, passes.backward) == (2 * 3, 2 * 3 * 3)


class UsersBlur:
    """A blur that shows nothing but what a linear operator must have."""

    def __init__(self, blur):
        self.blur = blur

    def __call__(self, x):
        return self.blur(x)

    def adjoint(self, y):
        return self.blur.adjoint(y)

    def input_shape(self, y_shape):
        return self.blur.input_shape(y_shape)


class UsersSolvableBlur(UsersBlur):
    def solve_normal(self, rhs, *, a, b):
        return self.blur.solve_normal(rhs, a=a, b=b)


@pytest.mark.parametrize(("eta", "null"), [(0.3, 0.3), (0.85, 0.5), (0.85, 1.0)])
def test_ddnm_has_the_law_that_its_equations_give(eta, null):
    chain = ScalarChains()
    restored, calls = run_counted(
        ddnm.METHOD, chain.posterior.problem, chain.oracle.models, 20, eta=eta, null=null
    )
    assert calls == 20
    levels = variance_preserving(20, 80.0)
    kept = math.sqrt(1 - eta**2)
    singular = chain.squares.sqrt()
    known = singular > 1e-4 * singular.max()
    assert 0 < known.sum() < known.numel()
    chain.noise(levels[0])
    for t, s in pairwise(levels):
        certain = known & (singular > SIGMA_Y / s)
        weight = torch.where(certain, 1.0, known * kept * singular * s / SIGMA_Y)
        share = torch.where(known, eta, null)
        fresh = torch.where(certain, (s**2 - SIGMA_Y**2 / chain.squares).clamp(0).sqrt(), share * s)
        gain = chain.gain(t)
        factor = (1 - weight) * gain + ~known * math.sqrt(1 - null**2) * s * (1 - gain) / t
        chain.scale(factor, fresh)
        target = chain.adjoint_y / chain.squares - chain.prior_mean
        chain.mean = chain.mean + torch.where(known, weight * target, 0.0)
    chain.scale(chain.gain(levels[-1]))
    chain.assert_law_of(restored)


@pytest.mark.parametrize("kind", [UsersBlur, UsersSolvableBlur])
def test_ddnm_by_solves_has_the_law_that_its_equations_give(kind):
    chain = ScalarChains(replicas=800)
    problem = chain.posterior.problem
    users = Problem(problem.y, kind(chain.operator), SIGMA_Y, problem.keys)
    restored, _ = run_counted(ddnm.METHOD, users, chain.oracle.models, 12, eta=0.5)
    levels = variance_preserving(12, 80.0)
    chain.noise(levels[0])
    for t, s in pairwise(levels):
        # With what A^+ y carries, the noise has variance s^2 in every coordinate.
        ratio = (SIGMA_Y / s) ** 2
        inverse = 1 / (chain.squares + ratio)
        total = s**2 - chain.squares * (SIGMA_Y * inverse) ** 2
        predicted = inverse * ratio * math.sqrt(0.75) * s
        gain = chain.gain(t)
        fresh = (total - predicted**2).sqrt()
        chain.scale(inverse * ratio * gain + predicted * (1 - gain) / t, fresh)
        chain.mean = chain.mean + inverse * (chain.adjoint_y - chain.squares * chain.prior_mean)
    chain.scale(chain.gain(levels[-1]))
    chain.assert_law_of(restored)


def test_ddnm_takes_each_image_by_its_own_largest_singular_value():
    models, prior = small_models(1)
    kernels = torch.tensor([1.0, 1e-5], dtype=torch.float64).view(2, 1, 1, 1)
    both = make_problem(prior, Blur(kernels), batch=2)
    faint = Problem(both.y[1:], Blur(kernels[1:]), SIGMA_Y, both.keys[1:])
    restored, _ = run_counted(ddnm.METHOD, both, models, 5)
    alone, _ = run_counted(ddnm.METHOD, faint, models, 5)
    torch.testing.assert_close(restored[1:], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "operator", [Inpaint.random((16, 12), 0.4), SuperResolution(4), GaussianBlur(1.5, 7)]
)
def test_singular_basis_diagonalises_the_operator(operator):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, 12, generator=generator, dtype=torch.float64)
    y = operator(x)
    basis = ddnm.singular_basis(operator, Problem(y, operator, SIGMA_Y, ((0,), (1,))))
    torch.testing.assert_close(basis.synthesise(basis.analyse(x)), x)
    torch.testing.assert_close(basis.analyse(x).square().sum(), x.square().sum())
    squares = basis.analyse(operator.adjoint(operator(basis.synthesise(torch.ones_like(x)))))
    expected = basis.analyse(operator.adjoint(y))
    torch.testing.assert_close(squares * basis.analyse(x), expected, rtol=0, atol=1e-10)


# The posterior, where a method can reach it.


@pytest.fixture(scope="module")
def oracle():
    return sanity.make_oracle(SIDE)


@pytest.fixture(scope="module")
def posteriors(oracle):
    return {each.name: each for each in sanity.make_posteriors(oracle, replicas=100)}


@pytest.mark.parametrize("name", ["inpaint_box", "sr4x", "deblur"])
def test_exact_draws_pass_the_sanity_check(posteriors, name):
    # A hundred draws: 0.1 for the mean on average over a few independent directions.
    posterior = posteriors[name]
    assert posterior.mean_error(posterior.exact) < 0.2
    assert posterior.spread(posterior.exact) == pytest.approx(1, abs=0.05)


READINGS = {
    # name, task, calls, settings: largest mean error, range of the spread; posterior stds
    ("ncvsd", "sr4x", 20): ({}, 0.2, (0.9, 1.1)),
    ("ncvsd-published", "sr4x", 50): ({}, 0.2, (0.7, 1.0)),
    ("pnpdm", "sr4x", 600): ({"rho_min": 0.1}, 0.25, (0.85, 1.15)),
    ("pnpdm", "deblur", 600): ({"rho_min": 0.1}, 0.3, (0.85, 1.15)),
    ("pnpdm", "inpaint_box", 600): ({"rho_min": 0.03}, 0.4, (0.8, 1.2)),
    ("daps", "sr4x", 200): ({}, 0.3, (0.7, 1.0)),
    ("daps", "inpaint_box", 200): ({}, 0.4, (0.4, 0.6)),
    ("mmps", "sr4x", 100): ({}, 0.3, (0.8, 1.1)),
    ("mmps", "deblur", 100): ({}, 0.3, (0.8, 1.1)),
    ("ddnm", "sr4x", 100): ({}, 0.2, (0.7, 1.0)),
    ("ddnm", "inpaint_box", 100): ({}, 0.4, (0.7, 1.0)),
}


@pytest.mark.parametrize("key", READINGS, ids=str)
def test_methods_reach_the_posterior_as_far_as_they_can(oracle, posteriors, key):
    name, task, nfe = key
    settings, most, (low, high) = READINGS[key]
    found = sanity.read(METHODS[name], posteriors[task], oracle.models, nfe, settings)
    assert 0.98 * nfe < found.calls <= nfe
    assert found.mean_error < most
    assert low < found.spread < high


# Ours.


@pytest.mark.filterwarnings("ignore:the schedule has one sweep only")
@pytest.mark.parametrize("name", [method.name for method in ours.OURS])
def test_phase_retrieval_spends_large_budgets_on_several_chains(monkeypatch, name):
    asked = []

    def fake(y, **arguments):
        asked.append((arguments["nfe"], arguments["restarts"]))
        return solve(y, **{**arguments, "nfe": 1, "schedule": None})

    monkeypatch.setattr(ours, "solve", fake)
    models, prior = small_models(1)
    problem = make_problem(prior, PhaseRetrieval(8), batch=1)
    settings = {"temperature": 0.6, "noise": 0.7, "first": 0.7}
    for nfe in (10, 16, 20, 49, 50):
        METHODS[name].run(problem, models, nfe, settings)
    several = [(10, 1), (4, 4), (4, 5), (49, 1), (10, 5)]
    single = [(nfe * chains, 1) for nfe, chains in several]
    assert asked == (single if name == "ncvsd-published" else several)
    linear = make_problem(prior, SuperResolution(4), batch=1)
    METHODS[name].run(linear, models, 40, settings)
    assert asked[-1] == (40, 1)


def test_ncvsd_is_what_a_user_gets():
    models, prior = small_models(1)
    problem = make_problem(prior, SuperResolution(4), batch=2)
    y, operator, student = problem.y, problem.operator, models.student
    arguments = {"operator": operator, "prior": student, "sigma_y": SIGMA_Y, "seed": problem.keys}
    draw = {**arguments, "estimate": "sample"}
    restored = METHODS["ncvsd"].run(problem, models, 4, {})
    assert restored.equal(solve(y, nfe=4, **draw).x0)
    restored = METHODS["ncvsd-point"].run(problem, models, 4, {})
    assert restored.equal(solve(y, nfe=4, **arguments).x0)
    cooler = {"temperature": 0.6, "sigma_lik": 0.5 * SIGMA_Y}
    of_teacher = {**draw, **cooler, "prior": models.teacher}
    for first, levels in ((0.0, None), (0.4, karras(4, 0.4, ours.TEACHER_LAST))):
        settings = {"temperature": 0.6, "noise": 0.5, "first": first}
        restored = METHODS["teacher-gaussian"].run(problem, models, 4, settings)
        assert restored.equal(solve(y, nfe=4, schedule=levels, **of_teacher).x0)
    restored = METHODS["ncvsd-published"].run(problem, models, 6, {})
    assert restored.equal(solve(y, nfe=6, preset="ncvsd", estimate="ema", **arguments).x0)


# PnP-DM.


def test_pnpdm_anneals_as_the_paper_in_a_hundred_sweeps():
    levels = pnpdm.annealed(100, 10.0, 0.3)
    for k, rho in enumerate(levels):
        assert rho == pytest.approx(max(10 * 0.9**k, 0.3), rel=0.02)


# RED-diff.


def test_reddiff_balances_misfit_and_denoising_residual(monkeypatch):
    # At one level sigma the gradient, averaged over eps, is zero at a ridge solution.
    chain = ScalarChains(replicas=60)
    sigma, weight = 0.5, 0.1
    monkeypatch.setattr(reddiff, "variance_preserving", lambda num, largest: (sigma,) * num)
    restored = reddiff.METHOD.run(
        chain.posterior.problem, chain.oracle.models, 400, {"rate": 0.01, "lambda": weight}
    )
    pull = weight * (1 - chain.gain(sigma))
    expected = (chain.adjoint_y + pull * chain.prior_mean) / (chain.squares + pull)
    error = hartley(restored).mean(0)[0] - expected
    assert error.abs().max() < 0.05
    assert (expected - chain.prior_mean).abs().max() > 0.5


def test_reddiff_weighs_both_terms_by_their_entries(monkeypatch):
    # At one level the gradient, averaged over eps, is zero at a ridge solution of another weight.
    prior = GaussianPrior.stationary(
        torch.full((1, 8, 8), 0.1).double(), torch.full((1, 8, 8), 0.2).double()
    )
    models = Models(DiffusionPrior(prior.denoise), sanity.ExactStudent(prior))
    operator, sigma, weight = SuperResolution(4, "box"), 0.5, 0.5
    problem = make_problem(prior, operator, batch=60)
    problem = Problem(problem.y[:1].expand_as(problem.y), operator, SIGMA_Y, problem.keys)
    monkeypatch.setattr(reddiff, "variance_preserving", lambda num, largest: (sigma,) * num)
    restored = reddiff.METHOD.run(problem, models, 400, {"rate": 0.01, "lambda": weight})
    pull = weight * sigma**2 / (0.2 + sigma**2)
    rhs = 16 * operator.adjoint(problem.y[:1]) + pull * 0.1
    expected = operator.solve_normal(rhs, a=16.0, b=pull)
    torch.testing.assert_close(restored.mean(0, keepdim=True), expected, rtol=0, atol=0.05)
    assert (expected - 0.1).abs().max() > 0.1


def test_small_gradients_take_reddiff_less_than_a_whole_step():
    # The authors' 1e-8 counts in means over an image of theirs, 3x256x256 entries.
    models, prior = small_models(1)
    problem = make_problem(prior, SuperResolution(4), batch=2)
    start = reddiff.METHOD.run(problem, models, 1, {"rate": 0.0, "lambda": 0.0})
    moved = reddiff.METHOD.run(problem, models, 1, {"rate": 1.0, "lambda": 0.0})
    gradient = start[0].numel() / problem.y[0].numel() * misfit_gradient(problem, start)
    expected = start - gradient / (gradient.abs() + 1e-8 * 3 * 256**2)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
    assert (expected - start).abs().min() < 0.95


@pytest.mark.parametrize("operator", [SuperResolution(4), PhaseRetrieval(8)])
def test_the_misfit_has_its_gradient(operator):
    _, prior = small_models(1)
    problem = make_problem(prior, operator, batch=2)
    x = torch.rand(problem.shape, dtype=torch.float64)
    direction = torch.rand(problem.shape, dtype=torch.float64)

    def loss(point):
        return (operator(point) - problem.y).square().sum((1, 2, 3)) / 2

    slope = (loss(x + 1e-5 * direction) - loss(x - 1e-5 * direction)) / 2e-5
    gradient = misfit_gradient(problem, x)
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), slope, rtol=1e-5, atol=0)


def test_reddiff_never_asks_the_network_for_gradients():
    models, prior = small_models(1)
    enabled = []
    models.teacher.network.register_forward_hook(
        lambda module, args, output: enabled.append(
            torch.is_grad_enabled() or args[0].requires_grad
        )
    )
    problem = make_problem(prior, PhaseRetrieval(8), batch=1)
    reddiff.METHOD.run(problem, models, 5, reddiff.METHOD.settings)
    assert enabled == [False] * 5


def test_reddiff_estimates_better_than_a_draw(oracle, posteriors):
    posterior = posteriors["inpaint_box"]
    restored = reddiff.METHOD.run(posterior.problem, oracle.models, 100, reddiff.METHOD.settings)
    own = ((restored - posterior.mean) / posterior.std).square().mean().sqrt()
    draw = ((posterior.exact - posterior.mean) / posterior.std).square().mean().sqrt()
    assert own < 0.9 * draw


# The levels of the variance-preserving diffusion.


def test_variance_preserving_levels_are_those_of_a_thousand_discrete_steps():
    kept = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().log1p().cumsum(0).exp()
    expected = ((1 - kept) / kept).sqrt().flip(0)
    levels = variance_preserving(1000, float(expected[0]), float(expected[-1]))
    assert levels[0] == float(expected[0])
    assert levels[-1] == float(expected[-1])
    assert all(before > after for before, after in pairwise(levels))
    torch.testing.assert_close(
        torch.tensor(levels, dtype=torch.float64), expected, rtol=0.03, atol=0
    )
    assert variance_preserving(1, 5.0) == (5.0,)
    with pytest.raises(ValueError, match="largest must be above smallest"):
        variance_preserving(3, 0.01, 0.02)


# The table.


def test_sanity_prints_each_method_beside_the_truth(capsys):
    sanity.main(["--methods", "ddnm", "reddiff", "--most-calls", "20", "--replicas", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("exact draws" in line for line in lines) == 3
    assert [line.split()[:4] for line in lines if "ddnm" in line] == [
        [task, "ddnm", "20", "20"] for task in ("inpaint_box", "sr4x", "deblur")
    ]
    assert not any("reddiff" in line for line in lines)
    with pytest.raises(ValueError, match=r"--methods must be one of .* did you mean ddnm"):
        sanity.main(["--methods", "dddnm"])
