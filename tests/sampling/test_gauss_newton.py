"""Gauss-Newton conditioning against Matheron's rule, stationarity and automatic derivatives."""

import math

import pytest
import torch
from torch.testing import assert_close

from ncvsd_inverse import operators as ops
from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.numerics import draw_normal, make_generators
from ncvsd_inverse.priors.covariance import SpectralCovariance
from ncvsd_inverse.sampling.gauss_newton import GaussNewton
from ncvsd_inverse.sampling.linear_solves import LinearSolver
from ncvsd_inverse.sampling.matheron import Matheron

SIGMA_LIK = 0.05


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def make_covariance(height, width, variance=0.09):
    """A covariance of images of two colours whose variances fall with frequency."""
    rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    columns = torch.fft.fftfreq(width, dtype=torch.float64)
    values = (rows**2 + columns**2 + 1 / max(height, width) ** 2) ** -1.25
    values = variance / values.mean() * values
    spectrum = values[..., : width // 2 + 1] * torch.tensor([1.6, 0.4]).view(2, 1, 1).double()
    return SpectralCovariance(torch.linalg.qr(normal(2, 2, seed=3))[0], spectrum, width)


class Plain:
    """A user's operator: an operator without the methods beyond the protocol's."""

    def __init__(self, operator):
        self.operator = operator

    def __call__(self, x):
        return self.operator(x)

    def input_shape(self, y_shape):
        return self.operator.input_shape(y_shape)


class Saturating(Plain):
    """A smooth operator of a different size, with no method of its own."""

    def __init__(self):
        super().__init__(ops.SuperResolution(2, filter="box"))

    def __call__(self, x):
        return torch.tanh(2 * self.operator(x))


def problem(operator, batch=3, size=(8, 12)):
    """Return images, their measurements and the covariance they were drawn with."""
    covariance = make_covariance(*size)
    truth = covariance.colour(normal(batch, 2, *size, seed=1))
    y = operator(truth)
    return truth, y + SIGMA_LIK * normal(*y.shape, seed=2), covariance


def energy(v, x, y, operator, covariance):
    """The sum that a draw without perturbation minimises, of each image."""
    move = covariance.coordinates(v - x)
    misfit = (y - operator(v)).square().flatten(1).sum(1) / SIGMA_LIK**2
    return misfit + (move.square() / covariance.variances).flatten(1).sum(1)


@pytest.mark.parametrize("operator", [ops.GaussianBlur(1.0, 5), ops.SuperResolution(2)])
@pytest.mark.parametrize("steps", [1, 3])
def test_of_a_linear_operator_it_is_matherons_rule(operator, steps, monkeypatch):
    for solver in (LinearSolver, GaussNewton):
        monkeypatch.setattr(solver, "tolerance", 1e-11)
    _, y, covariance = problem(operator)
    x = covariance.colour(normal(3, 2, 8, 12, seed=5))
    given = GaussNewton(Plain(operator), y, SIGMA_LIK, steps=steps, iterations=400)
    exact = Matheron(operator, y, SIGMA_LIK)
    for temperature in (1.0, 0.3):
        sources = [torch.Generator().manual_seed(6) for _ in range(2)]
        moved = given.draw(x, covariance, generator=sources[0], temperature=temperature)
        right = exact.draw(x, covariance, generator=sources[1], temperature=temperature)
        assert_close(moved, right, rtol=1e-6, atol=1e-7)


def test_many_steps_reach_a_minimum():
    operator = Saturating()
    truth, y, covariance = problem(operator)
    x = truth + 0.05 * normal(*truth.shape, seed=7)
    given = GaussNewton(operator, y, SIGMA_LIK, steps=40, iterations=60)
    found = given.draw(x, covariance, temperature=0.0).requires_grad_()
    value = energy(found, x, y, operator, covariance)
    (gradient,) = torch.autograd.grad(value.sum(), found)
    start = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(energy(start, x, y, operator, covariance).sum(), start)
    # Gauss-Newton leaves out curvature, so convergence is linear where the misfit is not 0.
    assert gradient.norm() < 1e-3 * first.norm()


class Searchless(ops.PhaseRetrieval):
    """Phase retrieval with derivatives of its own but no search."""

    search = None


def test_no_step_raises_the_energy_of_any_image():
    operator = Searchless(4)
    _, y, covariance = problem(operator, batch=16)
    x = covariance.colour(normal(16, 2, 8, 12, seed=8))
    before = energy(x, x, y, operator, covariance)
    for steps in range(1, 6):
        given = GaussNewton(operator, y, SIGMA_LIK, steps=steps, iterations=100)
        after = energy(given.draw(x, covariance, temperature=0.0), x, y, operator, covariance)
        assert (after <= before * (1 + 1e-9)).all()
        before = after


class Cliff(Plain):
    """An operator whose tangent points far past the minimum: full steps never end."""

    def __init__(self):
        super().__init__(ops.GaussianBlur(0.5, 3))

    def __call__(self, x):
        return torch.atan(20 * x)


def test_steps_that_overshoot_are_halved(monkeypatch):
    operator, covariance = Cliff(), make_covariance(8, 12)
    y, x = torch.zeros(2, 2, 8, 12, dtype=torch.float64), 0.2 * normal(2, 2, 8, 12, seed=8)
    given = GaussNewton(operator, y, SIGMA_LIK, steps=1, iterations=200)
    before = energy(x, x, y, operator, covariance)
    found = given.draw(x, covariance, temperature=0.0)
    assert (energy(found, x, y, operator, covariance) <= before).all()
    assert not found.equal(x)
    monkeypatch.setattr(GaussNewton, "HALVINGS", -1)
    wild = given.draw(x, covariance, temperature=0.0)
    assert (energy(wild, x, y, operator, covariance) > before).any()


def test_own_derivatives_are_those_of_autograd():
    operator = Searchless(3)
    _, y, covariance = problem(operator)
    x = covariance.colour(normal(3, 2, 8, 12, seed=9))
    own, automatic = (
        GaussNewton(A, y, SIGMA_LIK, steps=3).draw(
            x, covariance, generator=torch.Generator().manual_seed(1)
        )
        for A in (operator, Plain(operator))
    )
    assert_close(own, automatic)


def test_phase_retrieval_linearises():
    operator, x, v = ops.PhaseRetrieval(3), normal(2, 1, 5, 7), normal(2, 1, 5, 7, seed=1)
    value, push, pull = operator.linearise(x)
    assert_close(value, operator(x))
    step = 1e-6
    assert_close(push(v), (operator(x + step * v) - operator(x - step * v)) / (2 * step))
    r = normal(*value.shape, seed=2)
    assert_close((push(v) * r).flatten(1).sum(1), (v * pull(r)).flatten(1).sum(1))
    dark = operator.linearise(-torch.ones_like(x))
    assert dark[1](v).equal(torch.zeros_like(value))
    assert dark[2](r).equal(torch.zeros_like(x))


def test_images_do_not_depend_on_each_other():
    operator = ops.PhaseRetrieval(4)
    _, y, covariance = problem(operator)
    mean = torch.zeros(1, 2, 8, 12, dtype=torch.float64)

    def run(rows):
        given = GaussNewton(operator, y[rows], SIGMA_LIK, steps=2)
        sources = make_generators([(7, i) for i in rows])
        x = given.start(mean, covariance, y.new_zeros(len(rows), 2, 8, 12), generator=sources)
        return given.draw(x, covariance, generator=sources)

    assert_close(run([0, 1, 2])[1:], run([1, 2]))


def aligned(batch=12):
    """Images around a lopsided mean, of which the waves tell the way up."""
    covariance = make_covariance(16, 16, variance=0.09)
    rows = torch.linspace(-1, 1, 16, dtype=torch.float64)
    shape = torch.exp(-4 * ((rows[:, None] + 0.3) ** 2 + (rows - 0.2) ** 2))
    mean = (1.2 * shape - 0.6).expand(1, 2, 16, 16)
    return mean, covariance, (mean + covariance.colour(normal(batch, 2, 16, 16))).clamp(-1, 1)


def test_search_ends_nearer_to_the_truth_than_gauss_newton():
    mean, covariance, truth = aligned()
    operator = ops.PhaseRetrieval(8)
    y = operator.measure(truth, 0.02, generator=torch.Generator().manual_seed(3))
    errors = []
    for A in (operator, Plain(operator)):
        given = GaussNewton(A, y, 0.02)
        x = given.start(mean, covariance, truth, generator=torch.Generator().manual_seed(4))
        assert x.shape == truth.shape
        errors.append((x - truth).square().flatten(1).mean(1).sqrt())
    assert (errors[0] < errors[1]).all()
    assert float(errors[0].mean()) < 0.75 * float(errors[1].mean())


def test_search_stays_within_the_range_and_at_the_truth():
    _, _, truth = aligned(4)
    operator = ops.PhaseRetrieval(8)

    def keep(view, sigma):
        assert sigma > 0
        return view

    found = operator.search(operator(truth), truth, keep, sigma_y=1e-3)
    assert_close(found, truth)
    wild = operator.search(
        operator(truth), 5 * normal(4, 2, 16, 16, seed=5), keep, sigma_y=0.05, iterations=3
    )
    assert float(wild.abs().max()) <= 1


class Found(Plain):
    """Phase retrieval whose search finds what it is given, at first each second image turned."""

    def __init__(self, operator):
        super().__init__(operator)
        self.searches = 0

    def search(self, y, x, shrink, *, sigma_y, iterations):
        assert iterations == GaussNewton.START_SEARCH
        self.searches += 1
        turned = (torch.arange(len(x)) % 2 == 1) & (self.searches == 1)
        return torch.where(turned[:, None, None, None], x.flip(-2, -1), x)

    def symmetries(self, x):
        return x, x.flip(-2, -1)


def test_the_likeliest_start_is_kept():
    mean, covariance, truth = aligned()
    operator = Found(ops.PhaseRetrieval(8))
    y = operator(truth)
    sources = make_generators([(1, i) for i in range(len(truth))])
    kept = GaussNewton(operator, y, SIGMA_LIK).start(mean, covariance, truth, generator=sources)
    sources = make_generators([(1, i) for i in range(len(truth))])
    drawn = mean + covariance.colour(draw_normal(truth, sources))
    energies = [energy(x, mean, y, operator, covariance) for x in (drawn, drawn.flip(-2, -1))]
    assert (energies[0] < energies[1]).all()
    assert_close(kept, drawn)


class Told(Plain):
    """Phase retrieval whose search is told where to end, and keeps what it was given."""

    def __init__(self, operator, truth):
        super().__init__(operator)
        self.truth = truth

    def search(self, y, x, shrink, *, sigma_y, iterations):
        self.given = y, x, shrink, sigma_y, iterations
        return self.truth

    def symmetries(self, x):
        return (x,)


def test_a_draw_begins_where_the_search_ends():
    mean, covariance, truth = aligned()
    plain = ops.PhaseRetrieval(8)
    operator = Told(plain, truth)
    y = plain(truth)
    x = mean + covariance.colour(normal(12, 2, 16, 16, seed=9))
    given = GaussNewton(operator, y, SIGMA_LIK, sigma_y=0.07)
    found = given.draw(x, covariance, temperature=0.0)
    stuck = GaussNewton(Plain(plain), y, SIGMA_LIK).draw(x, covariance, temperature=0.0)
    energies = [energy(end, x, y, plain, covariance) for end in (found, truth)]
    assert (energies[0] <= energies[1]).all()
    errors = [float((end - truth).square().mean()) for end in (found, stuck)]
    assert errors[0] < 0.5 * errors[1], errors
    seen, begun, shrink, sigma_y, iterations = operator.given
    assert_close((seen, begun), (y, x))
    assert (sigma_y, iterations) == (0.07, GaussNewton.DRAW_SEARCH)
    # What a view tells of an image, around the draw: all without noise, nothing with much.
    assert_close(shrink(truth, 1e-6), truth, rtol=0, atol=1e-6)
    assert_close(shrink(truth, 1e6), x, rtol=0, atol=1e-6)


def test_phase_retrieval_knows_its_symmetries():
    operator, x = ops.PhaseRetrieval(3), normal(2, 3, 5, 7)
    same, turned = operator.symmetries(x)
    assert same is x
    assert not torch.allclose(turned, x)
    assert_close(operator(turned), operator(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma_lik": 0.0}, "sigma_lik must be positive"),
        ({"sigma_y": 0.0}, "sigma_y must be positive"),
        ({"steps": 0}, "steps must be"),
        ({"iterations": 0}, "iterations must be"),
        ({"y": torch.full((1, 2, 16, 20), math.nan)}, "y must be finite"),
    ],
)
def test_wrong_arguments(arguments, message):
    settings = {"y": torch.zeros(1, 2, 16, 20), "sigma_lik": 0.1, **arguments}
    with pytest.raises(ValueError, match=message):
        GaussNewton(ops.PhaseRetrieval(4), **settings)


def test_wrong_images_and_temperatures():
    covariance = make_covariance(8, 12)
    given = GaussNewton(ops.PhaseRetrieval(4), torch.zeros(1, 2, 16, 20).double(), 0.1)
    with pytest.raises(ValueError, match="x must have shape"):
        given.draw(torch.zeros(1, 2, 8, 13), covariance)
    with pytest.raises(ValueError, match="temperature must be"):
        given.draw(torch.zeros(1, 2, 8, 12).double(), covariance, temperature=-1.0)
    operator, y = ops.PhaseRetrieval(4), torch.zeros(1, 2, 16, 20).double()
    with pytest.raises(ValueError, match="sigma_y must be positive"):
        operator.search(y, torch.zeros(1, 2, 8, 12).double(), lambda x, _: x, sigma_y=0.0)
    with pytest.raises(ValueError, match="iterations must be"):
        operator.search(
            y, torch.zeros(1, 2, 8, 12).double(), lambda x, _: x, sigma_y=0.1, iterations=0
        )


class Exploding(Plain):
    """An operator that leaves the finite numbers away from 0."""

    def __call__(self, x):
        return x * torch.where(x.abs() > 0.5, math.inf, 1.0)


def test_numbers_that_are_not_finite_are_an_error():
    y = torch.ones(1, 2, 8, 12, dtype=torch.float64)
    given = GaussNewton(Exploding(ops.GaussianBlur(1.0, 3)), y, 0.01, steps=1)
    with pytest.raises(DivergenceError, match="finite numbers"):
        given.draw(0 * y, make_covariance(8, 12, variance=10.0))
