"""Moves towards a measurement against dense least squares, for every family and noise level."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

from ncvsd_inverse import operators as ops
from ncvsd_inverse.machine import Cache
from ncvsd_inverse.priors.covariance import DenseCovariance, SpectralCovariance
from ncvsd_inverse.sampling import dense_solves, linear_solves
from ncvsd_inverse.sampling.linear_solves import LinearSolver
from ncvsd_inverse.sampling.matheron import Matheron
from tests.operators.cases import COMPOSITIONS, LOCAL, MIXING, dense, normal, some

LEVELS = (1.0, 0.05, 1e-3, 1e-6, 1e-8)


def make_covariance(channels, height, width, power=3.0, dtype=torch.float64):
    """A covariance like that of photographs, channels correlated."""
    rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    columns = torch.fft.rfftfreq(width, dtype=torch.float64)
    values = (rows**2 + columns**2 + 1 / max(height, width) ** 2) ** (-power / 2)
    mixing = torch.linalg.qr(normal(channels, channels, seed=3))[0].contiguous()
    shares = torch.tensor([1.5, 0.3, 0.1]).double()[:channels, None, None]
    spectrum = shares * 0.25 * values / values.mean()
    return SpectralCovariance(mixing.to(dtype), spectrum.to(dtype), width)


def roots_of(covariance, image_shape):
    """The symmetric root of a covariance as a matrix, (N, N)."""
    size = math.prod(image_shape)
    units = torch.eye(size, dtype=torch.float64).view(size, *image_shape)
    return covariance.colour(units).flatten(1).T


@dataclass
class Setting:
    """A misfit of draws of a law, and the exact move."""

    operator: object
    covariance: object
    like: torch.Tensor
    misfit: torch.Tensor
    root: torch.Tensor
    matrix: torch.Tensor
    sigma_lik: float

    @classmethod
    def of(cls, case, sigma_lik, covariance=None):
        batch, *image_shape = case.shape
        covariance = covariance or make_covariance(*image_shape)
        root, matrix = roots_of(covariance, image_shape), dense(case.operator, case.shape)
        truth = normal(batch, math.prod(image_shape), seed=1) @ root.T
        noise = sigma_lik * normal(*matrix.shape[:2], seed=2)
        misfit = (matrix @ truth[..., None])[..., 0] + noise
        like = torch.zeros(case.shape, dtype=torch.float64)
        return cls(
            case.operator,
            covariance,
            like,
            misfit.view(case.y_shape),
            root,
            matrix,
            sigma_lik,
        )

    def error(self, images):
        """Root mean square error of a move, in stds of the law, of the worst image."""
        left, values, right = torch.linalg.svd(self.matrix @ self.root, full_matrices=False)
        seen = (left.mT @ self.misfit.flatten(1)[..., None])[..., 0]
        exact = (right.mT @ (seen * values / (values**2 + self.sigma_lik**2))[..., None])[..., 0]
        moved = torch.linalg.solve(self.root, images.flatten(1).T).T
        return float((moved - exact).square().mean(1).sqrt().max())


CASES = {case.name: case for case in LOCAL + MIXING + COMPOSITIONS}
CLOSED = (
    ["sr2", "sr3", "sr4", "sr2_box", "sr3_box", "gaussian", "denoise", "luma", "mean", "sense_all"]
    + ["fourier_odd", "fourier_even", "fourier_all", "lines", "mri", "lines_grey", "sense_1"]
    + [f"blur_circular_{kind}" for kind in ("odd", "even", "full", "images", "even_image")]
)
"""Families whose move has a closed form, or matrices that are small enough to invert."""

HARD = [name for name in CASES if "reflect" in name or "replicate" in name or name == "motion"]
"""Mirrored borders: the rest of the blur is all that tells some pixels from others."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sigma_lik", LEVELS)
def test_moves_are_those_of_dense_matrices(name, sigma_lik):
    setting = Setting.of(CASES[name], sigma_lik)
    solver = LinearSolver(setting.operator, sigma_lik)
    move = solver.move(setting.misfit, setting.covariance, setting.like)
    error = setting.error(move.images)
    if name in CLOSED:
        # Rounding of y alone moves the result by eps / s stds.
        assert solver.iterations == 0
        assert error < 1e-11 + 1e-15 / sigma_lik
    elif name in HARD:
        # At 0.001 a blur of 5x7 pixels hides some images nearly, and iterations stop between.
        assert error < {1.0: 0.01, 0.05: 0.05, 1e-3: 0.3}.get(sigma_lik, 0.01)
    else:
        assert error < 0.05
    assert move.error.shape == (len(setting.like),)


@pytest.mark.parametrize("name", CASES)
def test_iterations_can_be_exact(name, monkeypatch):
    monkeypatch.setattr(LinearSolver, "tolerance", 1e-9)
    setting = Setting.of(CASES[name], 0.05)
    solver = LinearSolver(setting.operator, 0.05)
    move = solver.move(setting.misfit, setting.covariance, setting.like)
    assert setting.error(move.images) < 1e-6


@pytest.mark.parametrize("name", ["inpaint_random", "inpaint_images", "motion", "sense_35"])
def test_the_error_is_measured(name, monkeypatch):
    """A solve that is cut short says by about how much, in stds."""
    setting = Setting.of(CASES[name], 0.05)
    for iterations, least in ((1, 0.02), (500, 0.0)):
        monkeypatch.setattr(LinearSolver, "max_iterations", iterations)
        move = LinearSolver(setting.operator, 0.05).move(
            setting.misfit, setting.covariance, setting.like
        )
        error = setting.error(move.images)
        assert error >= least
        assert 0.3 * error < float(move.error.max()) < 20 * error + 1e-9


MASKS = {
    "box": ops.Inpaint.box((16, 18), (7, 10)).mask[0, 0],
    "odd box": ops.Inpaint.box((15, 17), (5, 9)).mask[0, 0],
    "corner": ~torch.nn.functional.pad(torch.ones(5, 6).bool(), (0, 12, 0, 11)),
    "few known": ops.Inpaint.random((16, 18), 0.2, seed=1).mask[0, 0],
    "few unknown": ops.Inpaint.random((16, 18), 0.9, seed=1).mask[0, 0],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_of_masks_agree_with_iterations(mask, dtype, monkeypatch):
    height, width = MASKS[mask].shape
    operator = ops.Inpaint(MASKS[mask])
    covariance = make_covariance(3, height, width, dtype=dtype)
    like = torch.zeros(5, 3, height, width, dtype=dtype)
    misfit = operator(normal(5, 3, height, width).to(dtype))
    monkeypatch.setattr(dense_solves, "STEEP", 1.0)
    by_matrix = LinearSolver(operator, 0.05)
    direct = by_matrix.move(misfit, covariance, like)
    assert by_matrix.iterations == 0
    assert float(direct.error.max()) < (1e-3 if dtype == torch.float32 else 1e-9)
    monkeypatch.setattr(dense_solves, "MOST_PIXELS", 0)
    monkeypatch.setattr(LinearSolver, "tolerance", 1e-9)
    iterated = LinearSolver(operator, 0.05)
    exact = iterated.move(misfit.double(), covariance.double(), like.double())
    assert iterated.iterations > 0
    tolerance = 1e-4 if dtype == torch.float32 else 1e-7
    assert_close(direct.images.double(), exact.images, rtol=0, atol=tolerance)


def test_a_skewed_covariance_is_solved_without_mirrors(monkeypatch):
    monkeypatch.setattr(LinearSolver, "tolerance", 1e-10)
    covariance = make_covariance(2, 8, 6)
    tilt = torch.linspace(0.5, 2, 8).double()[:, None]
    inner = torch.tensor([False, True, True, False])  # columns that stand for two frequencies
    spectrum = covariance.spectrum * torch.where(inner, tilt, torch.ones(1))
    skewed = SpectralCovariance(covariance.mixing, spectrum, 6)
    assert covariance.is_even
    assert not skewed.is_even
    operator = ops.Inpaint.box((8, 6), 4)
    like = torch.zeros(4, 2, 8, 6, dtype=torch.float64)
    misfit = operator(normal(4, 2, 8, 6))
    move = LinearSolver(operator, 0.1).move(misfit, skewed, like)
    root = roots_of(skewed, (2, 8, 6))
    matrix = dense(operator, (1, 2, 8, 6))[0]
    inner = matrix @ root @ root.T @ matrix.T + 0.01 * torch.eye(len(matrix)).double()
    expected = misfit.flatten(1) @ torch.linalg.solve(inner, matrix @ root @ root.T)
    assert_close(move.images.flatten(1), expected, rtol=0, atol=1e-7)


def test_matrices_are_kept_and_shared(monkeypatch):
    made = []
    monkeypatch.setattr(dense_solves, "KEPT_MASKS", Cache(256, 2**20))
    factor = dense_solves.Box.factor
    monkeypatch.setattr(dense_solves.Box, "factor", lambda *given: made.append(1) or factor(*given))
    covariance = make_covariance(3, 16, 16)
    operator = ops.Inpaint.box((16, 16), 8)

    def move(images, sigma_lik=0.05):
        like = torch.zeros(images, 3, 16, 16, dtype=torch.float64)
        solver = LinearSolver(operator, sigma_lik)
        solver.move(operator(normal(images, 3, 16, 16)), covariance, like)
        return solver.iterations

    assert move(1) == 0
    assert move(8) == 0
    assert len(made) == 1
    assert move(8, sigma_lik=0.06) == 0
    assert len(made) == 2
    assert 0 < dense_solves.KEPT_MASKS.nbytes < 2**20


def test_what_is_kept_is_bounded():
    kept = Cache(256, 1000)
    for size in (100, 90, 80):
        kept.get(size, lambda size=size: torch.zeros(size))
    assert kept.nbytes <= 1000
    kept.get("large", lambda: torch.zeros(500))
    assert kept.nbytes == 0  # more than it may hold


def test_dense_covariances_are_solved_by_least_squares():
    root = normal(12, 12, seed=5) * torch.logspace(0, -3, 12, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(root @ root.T)
    covariance = DenseCovariance(vectors, values.clamp(min=1e-12), (1, 3, 4))
    case = next(case for case in LOCAL if case.name == "sr3")
    small = type(case)("mask", ops.Inpaint(some(3, 4)), (2, 1, 3, 4), (2, 1, 3, 4), "")
    for sigma_lik in LEVELS:
        setting = Setting.of(small, sigma_lik, covariance)
        move = LinearSolver(small.operator, sigma_lik).move(
            setting.misfit, covariance, setting.like
        )
        assert setting.error(move.images) < 1e-9 + 1e-14 / sigma_lik


@pytest.mark.parametrize("name", ["inpaint", "sr2", "gaussian", "motion", "luma", "sense_35"])
def test_small_noise_is_taken_in_double(name):
    """Draws of float32 for sigma_lik far below its rounding of large misfits."""
    case, sigma_lik = CASES[name], 1e-5
    setting = Setting.of(case, sigma_lik)
    single = make_covariance(*case.shape[1:], dtype=torch.float32)
    conditioner = Matheron(case.operator, setting.misfit.float(), sigma_lik)
    drawn = conditioner.draw(setting.like.float(), single, temperature=0.0)
    assert drawn.dtype == torch.float32
    assert setting.error(drawn.double()) < 0.05


class SinglePrecision:
    """A user's operator that knows float32 alone."""

    def __init__(self):
        self.gains = torch.linspace(0.5, 2, 12).view(1, 1, 3, 4)

    def __call__(self, x):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return self.gains * x

    adjoint = __call__

    def input_shape(self, y_shape):
        return tuple(y_shape)


def test_an_operator_of_single_precision_is_rounded_to():
    operator, y = SinglePrecision(), normal(2, 1, 3, 4).float()
    conditioner = Matheron(operator, y, 1e-4)
    drawn = conditioner.draw(torch.zeros(2, 1, 3, 4), make_covariance(1, 3, 4, dtype=torch.float32))
    assert float((operator(drawn) - y).abs().max()) < 1e-3


def test_a_blur_is_solved_at_once_among_the_vectors_that_it_keeps_best(monkeypatch):
    monkeypatch.setattr(LinearSolver, "SMALL", 0)
    operator = ops.GaussianBlur(1.0, 5, boundary="reflect")
    covariance = make_covariance(3, 16, 12)
    like = torch.zeros(2, 3, 16, 12, dtype=torch.float64)
    steps = {}
    for exact in (2, 8, 16):
        monkeypatch.setattr(LinearSolver, "EXACT", exact)
        monkeypatch.setattr(linear_solves, "KEPT_TENSORS", Cache(8, 2**20))
        solver = LinearSolver(operator, 0.05)
        move = solver.move(operator(normal(2, 3, 16, 12)), covariance, like)
        assert float(move.error.max()) < LinearSolver.tolerance
        steps[exact] = solver.iterations
    assert steps[16] == 2  # a step, and a look at what is left
    assert steps[16] < steps[8] < steps[2]


def test_what_rounding_leaves_of_a_kept_inverse_is_solved_again():
    covariance = make_covariance(3, 12, 14, dtype=torch.float32)
    operator = ops.GaussianBlur(1.0, 5, boundary="reflect")
    like = torch.zeros(4, 3, 12, 14)
    root = roots_of(make_covariance(3, 12, 14), (3, 12, 14))
    truth = (normal(4, 504) @ root.T).view(like.shape)
    solver = LinearSolver(operator, 6.1e-3)
    move = solver.move(operator(truth).float(), covariance, like)
    assert not solver.needs_double(covariance, like)
    assert solver.iterations == 0
    assert float(move.error.max()) < LinearSolver.tolerance


@pytest.mark.parametrize("power", [3.0, 5.0])
def test_holes_are_solved_whatever_the_range_of_the_spectrum(power, monkeypatch):
    """Steps of the iterations get small long before their error does."""
    monkeypatch.setattr(LinearSolver, "_find_dense", lambda *_: None)
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    known = torch.ones(48, 48, dtype=torch.bool)
    for row, column in ((10, 12), (30, 33), (38, 9)):
        known &= (rows - row) ** 2 + (columns - column) ** 2 > 49
    covariance = make_covariance(3, 48, 48, power)
    like = torch.zeros(2, 3, 48, 48, dtype=torch.float64)
    operator = ops.Inpaint(known)
    truth = covariance.colour(normal(*like.shape, seed=1))
    misfit = operator(truth) + operator.measured(1e-3 * normal(*like.shape, seed=2))
    rough = LinearSolver(operator, 1e-3).move(misfit, covariance, like)
    assert float(rough.error.max()) < 0.011
    monkeypatch.setattr(LinearSolver, "tolerance", 1e-6)
    exact = LinearSolver(operator, 1e-3).move(misfit, covariance, like)
    # Errors are in stds given y, which in the holes are far above the noise.
    assert float((rough.images - exact.images).square().mean().sqrt()) < 0.01


@pytest.mark.parametrize("noise", [1e-3, 5e-3])
def test_writing_is_filled_in_until_the_bound_of_the_error_is_small(noise, monkeypatch):
    """Steps get small before it does; the images of a batch go on each by itself."""
    monkeypatch.setattr(LinearSolver, "_find_dense", lambda *_: None)
    known = torch.ones(48, 48, dtype=torch.bool)
    for place in range(4, 48, 8):
        known[place : place + 2, 4:44] = False
        known[4:44, place : place + 2] = False
    covariance = make_covariance(3, 48, 48, 5.0)
    like = torch.zeros(2, 3, 48, 48, dtype=torch.float64)
    operator = ops.Inpaint(known)
    scale = torch.tensor([1.0, 1e-3], dtype=torch.float64).view(2, 1, 1, 1)
    misfit = scale * operator(covariance.colour(normal(*like.shape, seed=1)))
    move = LinearSolver(operator, noise).move(misfit, covariance, like)
    assert 0 < float(move.error.max()) < 0.05
    alone = LinearSolver(operator, noise).move(misfit[1:], covariance, like[1:])
    torch.testing.assert_close(move.images[1:], alone.images, rtol=0, atol=1e-12)
