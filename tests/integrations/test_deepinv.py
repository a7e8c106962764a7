"""deepinv's physics as operators against dense matrices and posteriors; our models in deepinv."""

import copy
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ncvsd_inverse
from ncvsd_inverse.images import read_image
from ncvsd_inverse.integrations.deepinv import as_deepinv_denoiser, as_deepinv_reconstructor
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.operators import Inpaint
from ncvsd_inverse.operators import deepinv_physics as bridge
from ncvsd_inverse.operators.deepinv_physics import (
    LinearPhysicsOperator,
    SolvablePhysicsOperator,
    adapt,
    from_deepinv,
)
from ncvsd_inverse.priors import DiffusionPrior, GaussianPrior, NCVSDPrior
from ncvsd_inverse.priors.registry import load_network
from ncvsd_inverse.protocols import LinearOperator, Operator, SolvableOperator
from ncvsd_inverse.sampling.likelihood import likelihood_step
from ncvsd_inverse.sampling.linear_solves import LinearSolver
from ncvsd_inverse.sampling.solve import solve

pytestmark = pytest.mark.filterwarnings("ignore")  # deepinv's own
SIGMA_Y = 0.05


@pytest.fixture(scope="module")
def dp():
    import deepinv.physics

    return deepinv.physics


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def kernel(*shape):
    weights = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return weights / weights.sum()


def some(*shape):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.4).double()


def complex_sensing(dp):
    class Sensing(dp.LinearPhysics):
        """A complex matrix that is no convolution, for one channel of 5 x 4 pixels."""

        def __init__(self):
            super().__init__()
            parts = [normal(7, 20, seed=seed) / 5 for seed in (3, 4)]
            self.register_buffer("matrix", torch.complex(*parts))

        def A(self, x, **_):
            return x.flatten(1).to(self.matrix.dtype) @ self.matrix.T

        def A_adjoint(self, y, **_):
            return (y @ self.matrix.conj()).reshape(-1, 1, 5, 4)

    return Sensing()


# What it is called, how it is made, its image shape, whether its prox_l2 is exact.
PHYSICS = [
    ("inpainting", lambda dp: dp.Inpainting((3, 5, 4), mask=some(3, 5, 4)), (3, 5, 4), True),
    ("blurfft", lambda dp: dp.BlurFFT((3, 5, 6), filter=kernel(1, 1, 3, 2)), (3, 5, 6), True),
    (
        "downsampling",
        lambda dp: dp.Downsampling((2, 8, 6), filter=kernel(1, 1, 3, 3), factor=2),
        (2, 8, 6),
        True,
    ),
    ("decimation", lambda dp: dp.Downsampling((1, 8, 6), filter=None, factor=2), (1, 8, 6), False),
    ("blur", lambda dp: dp.Blur(kernel(1, 1, 3, 2), padding="reflect"), (2, 5, 6), False),
    ("blur_valid", lambda dp: dp.Blur(kernel(1, 1, 3, 2), padding="valid"), (2, 5, 6), False),
    ("mri", lambda dp: dp.MRI(mask=some(6, 5)), (2, 6, 5), True),
    (
        "multicoil",
        lambda dp: dp.MultiCoilMRI(
            mask=some(6, 5), coil_maps=torch.complex(normal(3, 6, 5), normal(3, 6, 5, seed=1))
        ),
        (2, 6, 5),
        False,
    ),
    (
        "tomography",
        lambda dp: dp.Tomography(5, 6, normalize=False, dtype=torch.float64),
        (1, 6, 6),
        False,
    ),
    ("decolorize", lambda dp: dp.Decolorize(), (3, 4, 4), False),
    (
        "stacked",
        lambda dp: dp.stack(
            dp.Inpainting((2, 5, 6), mask=some(2, 5, 6)), dp.Blur(kernel(1, 1, 2, 2))
        ),
        (2, 5, 6),
        False,
    ),
    ("complex", complex_sensing, (1, 5, 4), False),
]
CASES = pytest.mark.parametrize(
    ("make", "shape", "exact"), [case[1:] for case in PHYSICS], ids=[case[0] for case in PHYSICS]
)


def made(dp, make):
    return make(dp).double()


def dense(call, shape):
    """Return the matrix of a linear map of images (1, *shape), by its columns."""
    units = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, 1, *shape)
    return torch.stack([call(unit).flatten() for unit in units], 1)


@CASES
def test_a_physics_is_the_matrix_that_it_is(dp, make, shape, exact):
    physics = made(dp, make)
    x = normal(2, *shape, seed=5)
    operator, y = from_deepinv(physics, physics.A((x + 1) / 2))
    assert isinstance(operator, SolvableOperator) is exact
    assert isinstance(operator, LinearOperator)
    assert operator.input_shape(y.shape) == x.shape
    assert y.dtype == torch.float64
    assert not y.is_complex()
    # The offset is gone: what is left is linear in our x.
    torch.testing.assert_close(y, operator(x), atol=1e-6, rtol=1e-6)
    operator = from_deepinv(physics, physics.A(x[:1]))[0]
    matrix = dense(operator, shape)
    torch.testing.assert_close(matrix @ x[0].flatten(), operator(x[:1]).flatten())
    transposed = dense(operator.adjoint, operator(x[:1]).shape[1:])
    # BlurFFT and Downsampling keep Fourier coefficients in single precision.
    torch.testing.assert_close(transposed, matrix.T, atol=2e-7, rtol=0)
    if not exact:
        return
    for a, b in ((0.0, 2.0), (0.3, 2.0), (1e3, 0.5), (1e6, 1.0)):
        normal_matrix = a * matrix.T @ matrix + b * torch.eye(len(matrix.T), dtype=torch.float64)
        rhs = normal_matrix @ x[0].flatten()
        solved = operator.solve_normal(rhs.reshape(1, *shape), a=a, b=b)
        error = (solved.flatten() - x[0].flatten()).norm() / x[0].norm()
        # Single precision of the coefficients, times the root of the condition at most.
        assert error < 1e-6 * (1 + (a / b) ** 0.5)
    with pytest.raises(ValueError, match="b must be positive"):
        operator.solve_normal(x[:1], a=1.0, b=0.0)


@pytest.mark.parametrize("name", ["inpainting", "mri", "tomography", "stacked"])
def test_draws_of_the_likelihood_step_are_exact(dp, name):
    make, shape, _ = next(case[1:] for case in PHYSICS if case[0] == name)
    physics, num, rho = made(dp, make), 4000, 0.3
    x = normal(1, *shape, seed=5)
    # One physics, one measurement, many draws.
    operator, y = from_deepinv(physics, physics.A(x / 2))
    matrix = dense(operator, shape)
    step = likelihood_step(operator, y.expand(num, *y.shape[1:]).clone(), SIGMA_Y)
    draws = step.sample(x.expand(num, *shape), rho, generator=torch.Generator().manual_seed(0))
    precision = matrix.T @ matrix / SIGMA_Y**2 + torch.eye(x.numel()) / rho**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (matrix.T @ y.flatten() / SIGMA_Y**2 + x.flatten() / rho**2)
    white = torch.linalg.cholesky(precision).T @ (draws.flatten(1) - mean).T
    assert white.mean(1).abs().max() < 4.5 / num**0.5
    seen = white @ white.T / num
    error = (seen - torch.eye(len(seen))).abs().max()
    assert error < 5.5 * (2 / num) ** 0.5


def gaussian_prior(shape):
    height, width = shape[1:]
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)
    spectrum = 0.3 / (0.1 + rows**2 + columns**2)
    spectrum = (spectrum / spectrum.mean() * 0.25).double().expand(shape)
    return GaussianPrior.stationary(normal(*shape, seed=8) / 4, spectrum)


def exact_posterior(prior, operator, y, shape):
    """Return mean (D,) and covariance (D, D) of x given y by dense algebra."""
    flat = dense(operator, shape)
    columns = prior.denoise(prior_mean(prior, shape) + dense_units(shape), 1.0)
    shrink = (columns - prior_mean(prior, shape)).flatten(1)  # C (C + I)^-1
    covariance = torch.linalg.inv(torch.linalg.inv(shrink) - torch.eye(len(shrink)))
    mean = prior_mean(prior, shape).flatten()
    gain = covariance @ flat.T
    gain = gain @ torch.linalg.inv(flat @ gain + SIGMA_Y**2 * torch.eye(len(flat)))
    return mean + gain @ (y.flatten() - flat @ mean), covariance - gain @ flat @ covariance


def dense_units(shape):
    return torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)


def prior_mean(prior, shape):
    return prior.denoise(torch.zeros(1, *shape, dtype=torch.float64), 1e6)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "conditioning") for name in ("inpainting", "blurfft", "mri", "tomography")),
        *((name, "gibbs") for name in ("inpainting", "blurfft", "mri")),
    ],
)
def test_solve_finds_the_posterior(dp, name, method):
    make, shape, _ = next(case[1:] for case in PHYSICS if case[0] == name)
    physics = made(dp, make)
    physics.noise_model = dp.GaussianNoise(SIGMA_Y)
    prior = gaussian_prior(shape)
    truth = prior.draw(1, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(4)
    y = physics((truth + 1) / 2)  # what a user of deepinv has
    num = 400
    # Gibbs forgets its start at levels of many rho and ends at one far below the posterior's std.
    levels = {"conditioning": [1.0, 0.1], "gibbs": torch.logspace(0.5, -2, 120).tolist()}[method]
    result = solve(
        y,
        operator=physics,
        prior=prior,
        nfe=len(levels),
        schedule=levels,
        num_samples=num,
        method=method,
        estimate="sample",
    )
    assert result.sigma_lik == pytest.approx(SIGMA_Y)
    operator, centred = from_deepinv(physics, y)
    mean, covariance = exact_posterior(prior, operator, centred, shape)
    error = (result.mean.flatten() - mean) / covariance.diagonal().sqrt()
    bias = 0 if method == "conditioning" else 0.1
    assert error.abs().max() < 4.5 / num**0.5 + bias
    ratio = result.std.flatten() / covariance.diagonal().sqrt()
    assert ratio.mean() == pytest.approx(1, abs=0.03 + bias)
    assert 0.5 < float(result.residual) < 1.5


def test_deepinvs_mask_and_ours_give_the_same_images(dp, monkeypatch):
    monkeypatch.setattr(LinearSolver, "tolerance", 1e-10)
    mask, prior = some(6, 5), gaussian_prior((1, 6, 5))
    physics = dp.Inpainting((1, 6, 5), mask=mask[None]).double()
    x = prior.draw(2, generator=torch.Generator().manual_seed(3))
    y = mask * (x + SIGMA_Y * normal(2, 1, 6, 5))
    ours = solve(y, operator=Inpaint(mask), prior=prior, sigma_y=SIGMA_Y)
    # Half the noise, since deepinv's range of images is half of ours.
    theirs = solve(mask * (y + 1) / 2, operator=physics, prior=prior, sigma_y=SIGMA_Y / 2)
    assert ours.schedule == theirs.schedule
    torch.testing.assert_close(theirs.samples, ours.samples)
    torch.testing.assert_close(theirs.residual, ours.residual)


def test_solve_takes_a_physics_as_it_takes_its_adaptation(dp):
    physics = dp.Inpainting(
        (1, 6, 5), mask=some(1, 6, 5).float(), noise_model=dp.GaussianNoise(0.1)
    )
    y = physics(torch.rand(2, 1, 6, 5))
    prior = gaussian_prior((1, 6, 5))
    direct = solve(y, operator=physics, prior=prior, nfe=2)
    operator, centred = from_deepinv(physics, y)
    adapted = solve(centred, operator=operator, prior=prior, nfe=2)
    assert torch.equal(direct.x0, adapted.x0)
    assert float(direct.sigma_y[0]) == pytest.approx(0.1)
    assert direct.schedule == adapted.schedule


def test_a_physics_that_is_not_linear_is_sampled(dp):
    class Squares(dp.Physics):
        def A(self, x, **_):
            return x**2

    physics = Squares(noise_model=dp.GaussianNoise(SIGMA_Y))
    x = normal(1, 1, 4, 4) / 4
    y = physics((x + 1) / 2)
    operator, same = from_deepinv(physics, y)
    assert isinstance(operator, Operator)
    assert not isinstance(operator, LinearOperator)
    assert torch.equal(same, y)
    torch.testing.assert_close(operator(x), ((x + 1) / 2) ** 2)
    assert operator.input_shape(y.shape) == x.shape
    prior = GaussianPrior(torch.zeros(1, 4, 4), 0.0625 * torch.eye(16))
    result = solve(y, operator=physics, prior=prior, nfe=10, num_samples=20)
    # In most pixels the curve is nearly its tangent, and y fixes x to about 0.1 / (1 + x).
    assert (result.mean - x).abs().mean() < 0.1
    assert result.method == "conditioning"


def test_phase_retrieval_is_taken_once_its_images_are_known(dp):
    physics = dp.PhaseRetrieval(complex_sensing(dp)).double()
    x = normal(2, 1, 5, 4)
    with pytest.raises(ValueError, match="is given as image_shape"):
        from_deepinv(physics, physics(x))
    operator, y = from_deepinv(physics, physics((x + 1) / 2), image_shape=(1, 5, 4))
    assert operator.input_shape(y.shape) == x.shape
    torch.testing.assert_close(operator(x), y)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(operator(x).sum(), x)
    matrix = physics.B.matrix
    expected = (matrix.mH @ (matrix @ ((x.detach() + 1) / 2).flatten(1).T.cdouble())).real
    torch.testing.assert_close(gradient, expected.T.reshape(x.shape))


def test_sigma_y_is_that_of_the_noise_model(dp):
    x = torch.rand(2, 1, 4, 4)

    def sigma_y(noise):
        physics = dp.Denoising(noise)
        return from_deepinv(physics, x)[0].sigma_y

    assert sigma_y(dp.GaussianNoise(0.2)) == pytest.approx(0.2)
    assert sigma_y(dp.GaussianNoise(torch.tensor([0.2, 0.2]))) == pytest.approx(0.2)
    assert sigma_y(dp.ZeroNoise()) is None
    for noise in (dp.PoissonNoise(0.1), dp.GaussianNoise(torch.tensor([0.2, 0.3]))):
        with pytest.raises(ValueError, match="sigma_y must be given"):
            sigma_y(noise)
    parts = [dp.Denoising(dp.GaussianNoise(0.2)), dp.Denoising(dp.GaussianNoise(0.2))]
    stacked = dp.stack(*parts)
    assert from_deepinv(stacked, stacked.A(x))[0].sigma_y == pytest.approx(0.2)
    parts[0].noise_model = dp.GaussianNoise(0.3)
    with pytest.raises(ValueError, match="sigma_y must be given"):
        _ = from_deepinv(stacked, stacked.A(x))[0].sigma_y


def test_the_physics_stays_as_it_is_and_names_its_units(dp, caplog):
    physics = dp.Downsampling((1, 8, 8), filter="bicubic", factor=2)
    y = physics(torch.rand(1, 1, 8, 8))
    before = {name: value.clone() for name, value in physics.state_dict().items()}
    bridge._say_units.cache_clear()
    with caplog.at_level(logging.INFO):
        operator, centred = from_deepinv(physics, y.double())
        from_deepinv(physics, y)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "[0, 1]" in caplog.text
    assert "[-1, 1]" in repr(operator)
    assert centred.dtype == torch.float32  # the precision of the physics
    assert operator.family == "superres"
    assert operator.repeated(2) is operator
    assert all(torch.equal(value, before[name]) for name, value in physics.state_dict().items())


def test_a_physics_with_a_mask_for_each_image_meets_runs_of_them(dp):
    masks = some(2, 1, 6, 5)
    physics = dp.Inpainting((1, 6, 5), mask=masks, noise_model=dp.GaussianNoise(SIGMA_Y)).double()
    y = physics(normal(2, 1, 6, 5))
    operator, centred = from_deepinv(physics, y)
    twice = operator.repeated(2)
    assert twice is not operator
    x = normal(4, 1, 6, 5, seed=1)
    torch.testing.assert_close(twice(x), masks.repeat(2, 1, 1, 1) * x / 2)
    torch.testing.assert_close(twice.adjoint(x), masks.repeat(2, 1, 1, 1) * x / 2)
    solved = twice.solve_normal(x, a=4.0, b=1.0)
    torch.testing.assert_close(solved, x / (1 + masks.repeat(2, 1, 1, 1)))
    prior = gaussian_prior((1, 6, 5))
    both = solve(centred, operator=operator, prior=prior, nfe=2, num_samples=3, method="gibbs")
    alone = dp.Inpainting((1, 6, 5), mask=masks[1:]).double()
    operator, centred = from_deepinv(alone, y[1:])
    one = solve(
        centred,
        operator=operator,
        prior=prior,
        nfe=2,
        num_samples=3,
        method="gibbs",
        sigma_y=both.sigma_lik,
        seed=[(0, 1)],
    )
    torch.testing.assert_close(both.samples[:, 1:], one.samples)


def test_only_measured_entries_count(dp):
    mask = some(1, 6, 5).float()
    physics = dp.Inpainting((1, 6, 5), mask=mask, noise_model=dp.GaussianNoise(0.1))
    operator, y = from_deepinv(physics, physics(torch.rand(2, 1, 6, 5)))
    assert operator.count_measured(y).tolist() == [int(mask.sum())] * 2


@pytest.mark.parametrize("kind", ["pixels", "pixels of each image", "frequencies"])
def test_what_is_not_measured_is_of_no_account(dp, kind):
    shape = (2, 6, 5) if kind == "frequencies" else (1, 6, 5)
    mask = some(2 if kind == "pixels of each image" else 1, 1, 6, 5).float()
    noise = dp.GaussianNoise(SIGMA_Y)
    if kind == "frequencies":
        physics = dp.MRI(mask=mask, img_size=shape, noise_model=noise).double()
    else:
        physics = dp.Inpainting(shape, mask=mask, noise_model=noise).double()
    y = physics(torch.rand(2, *shape).double())
    junk = torch.where(mask != 0, y, 30.0)
    settings = {"operator": physics, "prior": gaussian_prior(shape), "nfe": 2, "num_samples": 2}
    clean, other = solve(y, **settings), solve(junk, **settings)
    assert torch.equal(other.x0, clean.x0)
    assert torch.equal(other.residual, clean.residual)
    assert float(clean.residual.max()) < 3
    operator, packed = from_deepinv(physics, junk)
    count = mask.expand(y.shape).flatten(1).count_nonzero(1)
    for same in (operator, copy.deepcopy(operator)):
        assert torch.equal(same.count_measured(packed), count)
        assert torch.equal(same.adjoint(packed), operator.adjoint(packed))


def test_what_does_not_fit_is_refused(dp):
    physics = dp.Inpainting((1, 6, 5), mask=0.5)
    with pytest.raises(TypeError, match="must be a deepinv physics, got int"):
        from_deepinv(3, torch.rand(1, 1, 6, 5))
    with pytest.raises(TypeError, match="y must be a torch tensor or a TensorList, got list"):
        from_deepinv(physics, [torch.rand(1, 1, 6, 5)])
    with pytest.raises(ValueError, match="y must be finite"):
        from_deepinv(physics, torch.full((1, 1, 6, 5), math.nan))
    with pytest.raises(ValueError, match="y must be a measurement of physics"):
        from_deepinv(physics, torch.rand(1, 1, 7, 5))
    with pytest.raises(ValueError, match="by image_shape: images"):
        from_deepinv(physics, torch.rand(1, 1, 6, 5), image_shape=(1, 6))
    operator, _ = from_deepinv(physics, torch.rand(1, 1, 6, 5))
    with pytest.raises(ValueError, match="y_shape must be"):
        operator.input_shape((1, 1, 7, 5))
    nearly = dp.Tomography(5, 12, normalize=False, adjoint_via_backprop=False)
    with pytest.raises(ValueError, match="adjoint_via_backprop=True"):
        from_deepinv(nearly, nearly.A(torch.rand(1, 1, 12, 12)))


def test_what_is_no_physics_passes_and_loads_no_deepinv():
    y = torch.rand(1, 1, 4, 4)
    assert adapt("operator", y) == ("operator", y)
    code = (
        "import sys, ncvsd_inverse.operators.deepinv_physics as p\n"
        "import ncvsd_inverse.integrations.deepinv\n"
        "assert p.adapt(abs, 3) == (abs, 3)\n"
        "assert 'deepinv' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


class Distilled:
    """A prior without a mean: draws of the Gaussian posterior, one network call each."""

    nfe_per_sample = 1

    def __init__(self, exact):
        self.exact = exact

    def sample(self, u, sigma, *, generator=None):
        return self.exact.sample(u, sigma, generator=generator)


def test_priors_are_denoisers_in_unit_range():
    prior = gaussian_prior((1, 4, 4))
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    expected = (prior.denoise(2 * x - 1, 0.4) + 1) / 2
    for sigma in (0.2, torch.tensor(0.2), torch.full((3,), 0.2), torch.full((3, 1, 1, 1), 0.2)):
        torch.testing.assert_close(as_deepinv_denoiser(prior)(x, sigma), expected)
    diffusion = DiffusionPrior(prior.denoise, num_steps=2)
    torch.testing.assert_close(as_deepinv_denoiser(diffusion)(x, 0.2), expected)
    draw = as_deepinv_denoiser(Distilled(prior))
    assert torch.equal(draw(x, 0.2), draw(x, 0.2))
    assert torch.equal(draw(x, 0.2)[:1], draw(x[:1], 0.2))
    assert not torch.equal(draw(x, 0.2), as_deepinv_denoiser(Distilled(prior), seed=1)(x, 0.2))
    many = as_deepinv_denoiser(Distilled(prior), draws=400)(x, 0.2)
    assert (draw(x, 0.2) - expected).std() > 0.05
    # A draw's std is below that of the noise, 0.2, and 400 of them have a 20th of it.
    assert (many - expected).abs().max() < 4.5 * 0.2 / 20
    level = torch.tensor([0.1, 0.2, 0.4])
    each = as_deepinv_denoiser(prior)(x, level)
    torch.testing.assert_close(each[2], as_deepinv_denoiser(prior)(x[2:], 0.4)[0])


@pytest.mark.parametrize("tempers", [False, True])
def test_a_student_is_a_denoiser_by_its_mean_or_by_draws(tempers):
    network = load_network("ncvsd_faces64").eval()
    student = NCVSDPrior(network, image_shape=(3, 64, 64), tempers=tempers)
    x = torch.rand(1, 3, 64, 64)
    cleaned = as_deepinv_denoiser(student)(x, 0.1)
    drawn = student.sample(2 * x - 1, 0.2, generator=make_generators([(0, 0)]))
    expected = student.denoise(2 * x - 1, 0.2) if tempers else drawn
    torch.testing.assert_close(2 * cleaned - 1, expected)


def test_the_denoiser_serves_deepinvs_algorithms_and_moves_its_network(dp):
    from deepinv.optim import L2, PGD, PnP

    network = torch.nn.Conv2d(1, 1, 1)
    prior = DiffusionPrior(lambda x, sigma: x / (1 + sigma[:, None, None, None] ** 2), num_steps=2)
    prior.network = network
    assert list(as_deepinv_denoiser(prior).parameters()) == list(network.parameters())
    gaussian = GaussianPrior(torch.zeros(1, 6, 5), 0.25 * torch.eye(30))
    physics = dp.Inpainting((1, 6, 5), mask=some(1, 6, 5).float())
    y = physics(torch.rand(1, 1, 6, 5))
    denoiser = as_deepinv_denoiser(gaussian)
    algorithm = PGD(
        prior=PnP(denoiser), data_fidelity=L2(), stepsize=1.0, sigma_denoiser=0.05, max_iter=200
    )
    found = algorithm(y, physics)
    # A fixed point: the denoised image that knows y.
    stepped = found - physics.A_adjoint(physics.A(found) - y)
    torch.testing.assert_close(denoiser(stepped, 0.05), found, atol=1e-3, rtol=0)


def test_the_solver_is_a_reconstructor_in_deepinvs_test(dp):
    import deepinv

    prior = gaussian_prior((1, 8, 8))
    truth = prior.draw(4, generator=torch.Generator().manual_seed(0)).float()
    images = ((truth + 1) / 2).float()
    physics = dp.Inpainting(
        (1, 8, 8), mask=some(1, 8, 8).float(), noise_model=dp.GaussianNoise(0.05)
    )
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(images, physics(images)), batch_size=2)
    model = as_deepinv_reconstructor(prior, nfe=4, num_samples=16, estimate="mean", seed=3)
    scores = deepinv.test(
        model, loader, physics, metrics=deepinv.metric.PSNR(), verbose=False, plot_images=False
    )
    assert scores["PSNR"] > scores["PSNR no learning"] + 3
    y = physics(images[:2])
    found = model(y, physics)
    result = solve(y, operator=physics, prior=prior, nfe=4, num_samples=16, estimate="mean", seed=3)
    assert torch.equal(found, (result.x0 + 1) / 2)


class Images(Dataset):
    """Images without measurements, as deepinv's benchmarks have them."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


@pytest.mark.parametrize("name", ["inpainting", "deblurring", "reduction", "denoising"])
def test_the_solver_fits_the_call_of_deepinvs_benchmarks(dp, name):
    """What deepinv_bench.run_benchmark does with a model, but for the data and benchopt."""
    import deepinv

    noise = dp.GaussianNoise(0.3 if name == "denoising" else 0.05)
    blur = dp.blur.gaussian_blur(sigma=(1.0, 1.0))
    physics = {
        "inpainting": dp.Inpainting((1, 16, 16), mask=0.5, noise_model=noise),
        "deblurring": dp.BlurFFT((1, 16, 16), filter=blur, noise_model=noise),
        "reduction": dp.Downsampling(factor=2, filter="bicubic"),  # no size, no noise
        "denoising": dp.Denoising(noise),
    }[name]
    prior = gaussian_prior((1, 16, 16))
    truth = prior.draw(3, generator=torch.Generator().manual_seed(0)).float()
    model = as_deepinv_reconstructor(prior, nfe=4, num_samples=8, estimate="mean")
    assert isinstance(model, torch.nn.Module)
    # The benchmark tells rows apart by what the model prints, and sets its device.
    assert "nfe=4, sigma_y=None, num_samples=8, estimate='mean'" in str(model)
    model.to("cpu")
    model.device = "cpu"
    scores = []
    for tested in (model, torch.nn.Identity()):
        if tested is not model:
            tested.forward = lambda y, physics: physics.A_adjoint(y)
        found = deepinv.test(
            tested,
            DataLoader(Images((truth + 1) / 2)),
            physics,
            online_measurements=True,
            device="cpu",
            metrics=[deepinv.loss.PSNR(), deepinv.loss.SSIM()],
            compare_no_learning=False,
            verbose=False,
        )
        scores.append(found["PSNR"])
    assert scores[0] > scores[1] + 1


def test_images_of_sides_that_the_network_does_not_take_are_restored(dp):
    import deepinv

    picture = read_image(Path(ncvsd_inverse.__file__).parent / "assets/photographs/cat.png")
    truth = (picture[..., 30:71, 80:127] + 1) / 2
    model = as_deepinv_reconstructor("ncvsd_natural", nfe=4)
    blur = dp.blur.gaussian_blur(sigma=(1.0, 1.0))
    mask = some(1, 41, 47).float()
    for physics, sigma, share in (
        (dp.Denoising(dp.GaussianNoise(0.1)), 0.1, 1.0),
        (dp.Inpainting((3, 41, 47), mask=mask, noise_model=dp.GaussianNoise(0.02)), 0.02, mask),
        (dp.Blur(filter=blur, padding="reflect", noise_model=dp.GaussianNoise(0.02)), 0.02, 1.0),
    ):
        torch.manual_seed(0)
        y = physics(truth)
        found = model(y, physics)
        assert found.shape == truth.shape
        # A draw explains y as well as the truth does, and is far better than the noisy picture.
        misfit = (share * (physics.A(found) - y)).square().mean() / (
            sigma**2 * float(torch.as_tensor(share).mean())
        )
        assert 0.6 < float(misfit) < 1.4
        assert deepinv.metric.PSNR()(found, truth) > 24
    # Images that fit are given to the solver as they are.
    y = physics(truth[..., :40, :40])
    result = solve(y, operator=physics, prior=model.prior, nfe=4)
    assert torch.equal(model(y, physics), (result.x0 + 1) / 2)


def test_models_say_what_they_need():
    prior = gaussian_prior((1, 4, 4))
    with pytest.raises(ValueError, match="draws must be at least 1"):
        as_deepinv_denoiser(prior, draws=0)
    with pytest.raises(TypeError, match="prior must have a sample method, got int"):
        as_deepinv_denoiser(3)
    with pytest.raises(TypeError, match="prior must have a sample method, got int"):
        as_deepinv_reconstructor(3)


def test_classes_differ_by_what_they_can():
    assert issubclass(SolvablePhysicsOperator, LinearPhysicsOperator)
    assert not hasattr(LinearPhysicsOperator, "solve_normal")
