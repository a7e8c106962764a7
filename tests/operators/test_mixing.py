"""Colours, clipping, random mixtures, frequencies and compositions, against dense matrices."""

import math

import pytest
import torch

from ncvsd_inverse import operators as ops
from ncvsd_inverse import solve
from ncvsd_inverse.operators.compressed import hadamard
from ncvsd_inverse.priors import GaussianPrior
from ncvsd_inverse.protocols import LinearOperator, Operator
from ncvsd_inverse.schedules import karras
from tests.operators.cases import COMPOSITIONS, MIXING, Gains, dense, each, normal, seeded, some


def popcount(number):
    return bin(number).count("1")


def hadamard_matrix(side):
    entries = [[(-1.0) ** popcount(i & j) for j in range(side)] for i in range(side)]
    return torch.tensor(entries, dtype=torch.float64) / math.sqrt(side)


# The matrices that the docstrings state.


def test_colorize_is_the_stated_matrix():
    weights = {"luma": (0.299, 0.587, 0.114), "mean": (1 / 3, 1 / 3, 1 / 3)}
    for grey, values in weights.items():
        row = torch.tensor([values], dtype=torch.float64)
        expected = torch.kron(row, torch.eye(20, dtype=torch.float64))
        matrix = dense(ops.Colorize(grey), (1, 3, 4, 5))[0]
        torch.testing.assert_close(matrix, expected)
        scaled_eye = float(row.square().sum()) * torch.eye(20, dtype=torch.float64)
        torch.testing.assert_close(matrix @ matrix.T, scaled_eye)
        white = torch.ones(1, 3, 4, 5, dtype=torch.float64)
        torch.testing.assert_close(ops.Colorize(grey)(white), white[:, :1])


@pytest.mark.parametrize("side", [1, 2, 4, 32])
def test_hadamard_is_the_stated_matrix(side):
    rows = hadamard(torch.eye(side, dtype=torch.float64))
    torch.testing.assert_close(rows, hadamard_matrix(side))


@each([case for case in MIXING if case.family == "compressed_sensing"])
def test_compressed_sensing_is_the_stated_matrix(case):
    order, _, kept, signs = case.operator._on(torch.device("cpu"))
    pixels = len(order)
    side = 2 ** int(math.log2(pixels))
    eye = torch.eye(pixels, dtype=torch.float64)
    mixed, rest = hadamard_matrix(side), torch.eye(pixels - side, dtype=torch.float64)
    transform = torch.block_diag(mixed, rest) @ torch.diag(signs[0].double()) @ eye[order]
    if side < pixels:
        transform = torch.block_diag(rest, mixed) @ torch.diag(signs[1].double()) @ transform
    channels = torch.eye(case.shape[1], dtype=torch.float64)
    expected = torch.kron(channels, transform[kept])
    matrix = dense(case.operator, case.shape)[0]
    torch.testing.assert_close(matrix, expected)
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_compressed_sensing_spreads_its_randomness():
    for size in ((32, 32), (24, 32), (31, 33)):
        op = ops.CompressedSensing(size, 0.25, seed=3)
        pixels = size[0] * size[1]
        assert op.num_measured == round(0.25 * pixels)
        seen = op.adjoint(torch.eye(op.num_measured, dtype=torch.float64)[:, None])[:, 0]
        side = 2 ** int(math.log2(pixels))
        # A row sees the pixels of one window at least, each with a small weight.
        assert int((seen.abs() > 1e-9).flatten(1).sum(dim=1).min()) >= min(side, 0.6 * pixels)
        assert float(seen.abs().max()) < 0.3
        signs = (seen.sum((1, 2)) / math.sqrt(pixels)).abs()
        # Constant images are no special direction: not one coefficient holds them.
        assert float(signs.max()) < 5 / math.sqrt(pixels)


def test_compressed_sensing_follows_its_seed(device):
    x = normal(1, 1, 5, 7).to(device)
    first, again, other = (ops.CompressedSensing((5, 7), 0.5, seed)(x) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    on_cpu = ops.CompressedSensing((5, 7), 0.5, 3)(x.cpu())
    torch.testing.assert_close(first.cpu(), on_cpu, rtol=0, atol=1e-14)


@each([case for case in MIXING if case.family == "masked_fourier"])
def test_masked_fourier_is_the_stated_matrix(case):
    _, channels, height, width = case.shape
    rows, columns = torch.arange(height).double(), torch.arange(width).double()
    wave_h = torch.exp(-2j * math.pi * torch.outer(rows, rows) / height)
    wave_w = torch.exp(-2j * math.pi * torch.outer(columns, columns) / width)
    if case.operator.centred:  # row H // 2 is that of frequency 0
        wave_h, wave_w = (wave.roll(len(wave) // 2, 0) for wave in (wave_h, wave_w))
    waves = torch.kron(wave_h, wave_w) / math.sqrt(height * width)
    kept = torch.diag(case.operator.mask.flatten().double())
    parts = torch.stack((kept @ waves.real, kept @ waves.imag), dim=1).flatten(0, 1)
    expected = torch.kron(torch.eye(channels, dtype=torch.float64), parts)
    torch.testing.assert_close(dense(case.operator, case.shape)[0], expected)


def test_masked_fourier_halves_lone_frequencies():
    """A^T A = F^H diag((mask(k) + mask(-k)) / 2) F."""
    mask = torch.zeros(4, 6)
    mask[0, 0] = mask[1, 2] = mask[3, 5] = mask[1, 1] = 1  # (3, 5) is the negative of (1, 1)
    matrix = dense(ops.MaskedFourier(mask), (1, 1, 4, 6))[0]
    values = torch.linalg.eigvalsh(matrix.T @ matrix)
    # Frequency 0 once, the whole pair twice (cosine and sine), the lone one twice.
    expected = torch.tensor([0.0] * 19 + [0.5, 0.5, 1.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(5, 7), (6, 8)])
def test_centred_frequencies_are_the_others_shifted(size):
    """Also complex ones, and those of fastMRI, whose images have their origin in the middle."""
    mask, x = some(*size), normal(2, 3, *size)
    first = ops.MaskedFourier(mask)
    centred = ops.MaskedFourier(torch.fft.fftshift(mask), centred=True)
    y = first(x)
    shifted = torch.fft.fftshift(y, dim=(2, 3))
    torch.testing.assert_close(centred(x), shifted)
    torch.testing.assert_close(centred.adjoint(shifted), first.adjoint(y))
    assert torch.equal(centred.count_measured(shifted), first.count_measured(y))
    assert not torch.equal(centred.mask, mask)
    again = ops.MaskedFourier.lines(size, 2, 0.2, seed=3, centred=True).mask
    assert torch.equal(torch.fft.ifftshift(again), ops.MaskedFourier.lines(size, 2, 0.2, 3).mask)
    rows, columns = (torch.arange(side).double() - side // 2 for side in size)
    turns = rows[:, None] * (size[0] // 2) / size[0] + columns * (size[1] // 2) / size[1]
    moved = torch.fft.fft2(torch.fft.ifftshift(x, dim=(2, 3)), norm="ortho")
    theirs = torch.fft.fftshift(moved, dim=(2, 3)) * torch.exp(-2j * math.pi * turns)
    torch.testing.assert_close(torch.view_as_complex(shifted), theirs * centred.mask)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_complex_coefficients_serve_as_their_pairs_do(kind):
    prior = stationary_prior()[0]
    op = ops.MaskedFourier.lines(IMAGE[1:], 2, 0.25, centred=True)
    pairs = op.measure(prior.draw(2).to(kind), SIGMA_Y, generator=seeded(1))
    y = torch.view_as_complex(pairs)
    assert op.input_shape(y.shape) == op.input_shape(pairs.shape) == (2, *IMAGE)
    assert torch.equal(op.adjoint(y.conj().resolve_conj().conj()), op.adjoint(pairs))
    assert torch.equal(op.measured(y), pairs)
    assert torch.equal(op.count_measured(y), op.count_measured(pairs))
    for operator in (op, ops.Compose(op, ops.Denoise())):
        results = [solve(z, operator=operator, prior=prior, nfe=2) for z in (y, pairs)]
        assert torch.equal(results[0].x0, results[1].x0)
        assert torch.equal(results[0].residual, results[1].residual)
        assert results[0].x0.dtype == results[0].residual.dtype == kind
    with pytest.raises(TypeError, match="y must be a floating-point tensor"):
        solve(y, operator=ops.Denoise(), prior=prior)
    with pytest.raises(ValueError, match="y must be finite"):
        solve(y * math.inf, operator=op, prior=prior)


def test_lines_are_the_columns_they_say():
    for width in (64, 61):
        op = ops.MaskedFourier.lines((48, width), 4, 0.08, seed=1)
        columns = op.mask.all(dim=0)
        assert torch.equal(columns, op.mask.any(dim=0))
        assert int(columns.sum()) == round(width / 4)
        frequencies = torch.fft.fftfreq(width) * width
        assert columns[frequencies.abs() <= 2].all()
    again, other = (ops.MaskedFourier.lines((48, 64), seed=seed).mask for seed in (1, 2))
    assert torch.equal(again, ops.MaskedFourier.lines((48, 64), seed=1).mask)
    assert not torch.equal(again, other)
    assert ops.MaskedFourier.lines((4, 6), 1, 0.0).mask.all()
    only_centre = ops.MaskedFourier.lines((4, 16), 4, 0.25).mask[0]
    assert only_centre.nonzero().flatten().tolist() == [0, 1, 14, 15]
    often = torch.stack([ops.MaskedFourier.lines((1, 16), 2, 0.25, i).mask[0] for i in range(900)])
    outer = often.double().mean(dim=0)[2:14]
    # 4 of 12 other columns, each equally often: four standard errors of a proportion.
    assert ((outer - 1 / 3).abs() < 4 * math.sqrt(2 / 9 / 900)).all()


@each(COMPOSITIONS)
def test_compose_is_the_product(case):
    between = case.operator.outer.input_shape(case.y_shape)
    product = dense(case.operator.outer, between) @ dense(case.operator.inner, case.shape)
    torch.testing.assert_close(dense(case.operator, case.shape), product)


@each(MIXING)
def test_solve_in_float32_does_not_cancel(case):
    """At rho = 80, sigma_lik = 0.05 the exact solve keeps what A does not see."""
    x, a = normal(*case.shape), (80 / 0.05) ** 2
    exact = case.operator.solve_normal(x, a=a, b=1.0)
    single = case.operator.solve_normal(x.float(), a=a, b=1.0)
    # Rounding of float32, a few operations deep; where all is seen, that of 1 / a of the input.
    assert (single - exact).norm() <= 2e-5 * exact.norm()


# HDR.


def test_hdr_is_the_stated_map():
    x = torch.tensor([-3.0, -0.6, -0.5, -0.2, 0.0, 0.4, 0.5, 0.51, 2.0]).view(1, 1, 3, 3)
    expected = torch.tensor([-1.0, -1.0, -1.0, -0.4, 0.0, 0.8, 1.0, 1.0, 1.0]).view(1, 1, 3, 3)
    torch.testing.assert_close(ops.HDR()(x), expected)
    torch.testing.assert_close(ops.HDR(0.5)(x.clamp(-1, 1)), 0.5 * x.clamp(-1, 1))
    op = ops.HDR(1.7)
    assert op.input_shape((2, 3, 4, 5)) == (2, 3, 4, 5)
    assert op.family == "hdr"
    assert not isinstance(op, LinearOperator)
    assert op.repeated(4) is op
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        assert op(x.to(kind)).dtype == kind


def test_hdr_has_the_gradient_of_its_map():
    op, x = ops.HDR(1.7), normal(2, 2, 3, 4)
    assert float((x.abs() - 1 / 1.7).abs().min()) > 1e-3  # away from the two kinks
    x.requires_grad_()
    assert torch.autograd.gradcheck(op, (x,))
    (gradient,) = torch.autograd.grad(op(x).sum(), x)
    torch.testing.assert_close(gradient, torch.where(x.abs() < 1 / 1.7, 1.7, 0.0).double())


def test_hdr_moves_by_at_most_its_bound():
    op, x = ops.HDR(1.7), normal(1, 2, 5, 7)
    for seed in range(20):
        move = normal(1, 2, 5, 7, seed=seed)
        assert (op(x + move) - op(x)).norm() <= op.lipschitz * move.norm() * (1 + 1e-9)
    small = torch.full_like(x, 0.01)
    moved = float((op(small) - op(0 * small)).norm())
    assert moved == pytest.approx(op.lipschitz * float(small.norm()))


# Compositions.


def test_a_composition_is_linear_if_both_parts_are():
    blur, clip = ops.GaussianBlur(1.0, 3), ops.HDR()
    assert isinstance(ops.Compose(blur, ops.Denoise()), LinearOperator)
    x = normal(1, 1, 4, 5)
    for outer, inner in ((clip, blur), (blur, clip), (clip, ops.PhaseRetrieval(1))):
        both = ops.Compose(outer, inner)
        assert isinstance(both, ops.Compose)
        assert isinstance(both, Operator)
        assert not isinstance(both, LinearOperator)
        assert not hasattr(both, "adjoint")
        torch.testing.assert_close(both(x), outer(inner(x)))
        assert both.input_shape(both(x).shape) == x.shape
        assert both.repeated(3) is both


def test_a_composition_has_the_noise_level_of_its_outer_part():
    camera = Gains(1.0)
    assert ops.Compose(camera, ops.Denoise()).sigma_y is None
    camera.sigma_y = 0.01
    assert ops.Compose(camera, ops.Denoise()).sigma_y == 0.01
    assert ops.Compose(ops.Denoise(), camera).sigma_y is None


# Bad input.

SENSE, FOURIER = ops.CompressedSensing((6, 7), 0.5), ops.MaskedFourier(torch.ones(6, 7))
X = torch.zeros(2, 3, 6, 7)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ops.Colorize("lumen"), ValueError, "grey must be one of luma, mean.*luma"),
        (lambda: ops.HDR(0.0), ValueError, "scale must be positive"),
        (lambda: ops.HDR(math.nan), ValueError, "scale must be positive"),
        (lambda: ops.HDR("2x"), TypeError, "scale must be a number"),
        (lambda: ops.CompressedSensing((4,)), ValueError, "size must be"),
        (lambda: ops.CompressedSensing((4, 0)), ValueError, "size must be at least 1"),
        (lambda: ops.CompressedSensing((4, 4.0)), TypeError, "size must be an integer"),
        (lambda: ops.CompressedSensing((4, 4), 0.0), ValueError, r"ratio must be in \(0, 1\]"),
        (lambda: ops.CompressedSensing((4, 4), 1.1), ValueError, "ratio must be in"),
        (lambda: ops.CompressedSensing((4, 4), math.nan), ValueError, "ratio must be in"),
        (lambda: ops.CompressedSensing((4, 4), 0.5, -1), ValueError, "seed must be at least 0"),
        (lambda: ops.MaskedFourier([[1]]), TypeError, "mask must be a boolean or real tensor"),
        (lambda: ops.MaskedFourier(torch.ones(2, 2) * 1j), TypeError, "mask must be a boolean"),
        (lambda: ops.MaskedFourier(torch.ones(1, 2, 2)), ValueError, r"mask must have .*\(1, 2, 2"),
        (lambda: ops.MaskedFourier(torch.ones(0, 2)), ValueError, "mask must have shape"),
        (lambda: ops.MaskedFourier(torch.full((2, 2), math.nan)), ValueError, "mask must be fin"),
        (lambda: ops.MaskedFourier(torch.full((2, 2), 0.5)), ValueError, "mask must hold only"),
        (lambda: ops.MaskedFourier(torch.zeros(2, 2)), ValueError, "mask must measure at least"),
        (lambda: ops.MaskedFourier.lines((4, 8), 0.5), ValueError, "acceleration must be in"),
        (lambda: ops.MaskedFourier.lines((4, 8), 9), ValueError, r"acceleration .*\[1, 8\]"),
        (lambda: ops.MaskedFourier.lines((4, 8), 4, -0.1), ValueError, "centre_fraction must be"),
        (lambda: ops.MaskedFourier.lines((4, 8), 4, 0.5), ValueError, "centre_fraction must be"),
        (lambda: ops.MaskedFourier.lines((4, 8), 4, math.nan), ValueError, "centre_fraction must"),
        (lambda: ops.MaskedFourier.lines((4, 8), seed=-1), ValueError, "seed must be at least 0"),
        (lambda: ops.MaskedFourier.lines((0, 8)), ValueError, "size must be at least 1"),
        (lambda: ops.Compose(torch.abs, ops.Denoise()), TypeError, "outer must be callable"),
        (lambda: ops.Compose(ops.Denoise(), None), TypeError, "inner must be callable.*NoneType"),
        (lambda: ops.Compose(ops.Denoise()), TypeError, "inner"),
    ],
)
def test_bad_settings_name_the_argument(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.Colorize()(X[:, :1]), ValueError, "x must have 3 channels, got 1"),
        (lambda: ops.Colorize().adjoint(X), ValueError, "y must have 1 channels, got 3"),
        (lambda: ops.Colorize().input_shape(X.shape), ValueError, "y_shape must have 1 channels"),
        (lambda: ops.Colorize()(X[0]), ValueError, r"x must have shape \(B, C, H, W\)"),
        (lambda: ops.Colorize().solve_normal(X[:, :2], a=1.0, b=1.0), ValueError, "rhs must have"),
        (lambda: ops.Colorize().solve_normal(X, a=1.0, b=0.0), ValueError, "b must be positive"),
        (lambda: ops.HDR()(X.long()), TypeError, "x must be a floating-point"),
        (lambda: ops.HDR().measure(X, 0.0), ValueError, "sigma_y must be positive"),
        (lambda: SENSE(X.mT), ValueError, r"x must have the height and width of size, \(6, 7\)"),
        (lambda: SENSE.adjoint(X), ValueError, r"y must have shape \(B, C, 21\)"),
        (lambda: SENSE.adjoint(X.flatten(2)), ValueError, "y must have shape.*got .2, 3, 42."),
        (lambda: SENSE.adjoint(X.long()), TypeError, "y must be a floating-point"),
        (lambda: SENSE.input_shape((2, 3, 20)), ValueError, r"y_shape must be \(B, C, 21\)"),
        (lambda: SENSE.solve_normal(X.mT, a=1.0, b=1.0), ValueError, "rhs must have the height"),
        (lambda: FOURIER(X.mT), ValueError, "x must have the height and width of mask"),
        (lambda: FOURIER.adjoint(X), ValueError, r"y must have shape \(B, C, H, W, 2\)"),
        (lambda: FOURIER.adjoint(X.mT[..., None].expand(2, 3, 7, 6, 2)), ValueError, "y must have"),
        (lambda: FOURIER.adjoint(X.long()), TypeError, "y must be a floating-point"),
        (
            lambda: FOURIER.adjoint(X.mT * 1j),
            ValueError,
            "y must have the height and width of mask",
        ),
        (lambda: FOURIER.input_shape(X.shape[1:]), ValueError, r"y_shape must be \(B, C, H, W, 2"),
        (
            lambda: FOURIER.input_shape((*X.shape, 3)),
            ValueError,
            r"y_shape must be \(B, C, H, W, 2",
        ),
        (lambda: FOURIER.input_shape(X.mT.shape), ValueError, "y_shape must have the height and"),
        (lambda: FOURIER.input_shape((1, 1, 7, 6, 2)), ValueError, "y_shape must have the height"),
        (lambda: FOURIER.solve_normal(X.mT, a=1.0, b=1.0), ValueError, "rhs must have the height"),
        (lambda: ops.Compose(ops.Denoise(), SENSE)(X), ValueError, "inner must give measurements"),
        (
            lambda: ops.Compose(ops.Denoise(), SENSE).measure(X, 0.1),
            ValueError,
            "inner must give measurements",
        ),
        (lambda: ops.Compose(ops.HDR(), SENSE).repeated(0), ValueError, "times must be at least 1"),
        (lambda: ops.Compose(SENSE, ops.Colorize())(X.mT), ValueError, "height and width of size"),
    ],
)
def test_bad_calls_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()


# Solving.

SIGMA_Y = 0.2
IMAGE = (3, 4, 6)

INVERSE = {
    "luma": ops.Colorize(),
    "sense": ops.CompressedSensing((4, 6), 0.5),
    "lines": ops.MaskedFourier.lines((4, 6), 2, 1 / 6),
    "lone frequencies": ops.MaskedFourier(some(4, 6)),
    "reduce_blur": ops.Compose(ops.SuperResolution(2), ops.GaussianBlur(0.8, 3)),
    "mask_blur": ops.Compose(ops.Inpaint(some(4, 6)), ops.GaussianBlur(0.8, 3)),
    "grey_user": ops.Compose(ops.Colorize(), Gains(0.8)),
}


def stationary_prior():
    """A Gaussian of smooth images, and its mean and covariance as a vector and a matrix."""
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) for side in IMAGE[1:])
    spectrum = 0.05 / (0.1 + rows[:, None] ** 2 + columns**2)
    mean = 0.3 * normal(*IMAGE, seed=8)
    basis = torch.fft.fft2(torch.eye(24, dtype=torch.float64).view(24, 4, 6), norm="ortho")
    waves = basis.flatten(1).T
    covariance = (waves.conj().T @ torch.diag(spectrum.flatten()).to(waves) @ waves).real
    prior = GaussianPrior.stationary(mean, spectrum[None])
    return prior, mean.flatten(), torch.block_diag(covariance, covariance, covariance)


def posterior(matrix, mean, covariance, y):
    gain = covariance @ matrix.T
    seen = matrix @ gain + SIGMA_Y**2 * torch.eye(len(matrix), dtype=torch.float64)
    update = torch.linalg.solve(seen, gain.T).T
    return mean + update @ (y - matrix @ mean), covariance - update @ gain.T


def chain_law(matrix, mean, covariance, y, schedule):
    """Mean and covariance of x0 after split-Gibbs sweeps from x0 = 0."""
    eye = torch.eye(len(mean), dtype=torch.float64)
    m, c = torch.zeros_like(mean), torch.zeros_like(covariance)
    for rho in schedule:
        given = torch.linalg.inv(matrix.T @ matrix / SIGMA_Y**2 + eye / rho**2)
        m = given @ (matrix.T @ y / SIGMA_Y**2 + m / rho**2)
        c = given + given @ c @ given / rho**4
        gain = covariance @ torch.linalg.inv(covariance + rho**2 * eye)
        m, c = mean + gain @ (m - mean), rho**2 * gain + gain @ c @ gain.T
    return m, c


@pytest.mark.parametrize("name", INVERSE)
def test_solve_draws_from_the_posterior(name):
    """By conditioning, which is exact at any level; and by Gibbs sweeps, whose law is known."""
    operator, samples, sweeps = INVERSE[name], 500, karras(8, 1.0, 0.1, 7.0)
    prior, mean, covariance = stationary_prior()
    y = operator.measure(prior.draw(1, generator=seeded(1)), SIGMA_Y, generator=seeded(2))
    matrix = dense(operator, (1, *IMAGE))[0]
    exact = posterior(matrix, mean, covariance, y.flatten())
    gibbs = chain_law(matrix, mean, covariance, y.flatten(), sweeps)
    for method, levels, law in (("conditioning", (0.3,), exact), ("gibbs", sweeps, gibbs)):
        result = solve(
            y,
            operator=operator,
            prior=prior,
            nfe=len(levels),
            schedule=levels,
            sigma_y=SIGMA_Y,
            num_samples=samples,
            method=method,
            estimate="sample",
        )
        found = result.samples.flatten(1)
        # Four and a half standard errors, of 72 pixels; and for conjugate gradients' tolerance.
        error = (found.mean(dim=0) - law[0]).abs() / law[1].diagonal().sqrt()
        assert float(error.max()) < 4.5 / math.sqrt(samples) + 0.03
        ratio = found.var(dim=0) / law[1].diagonal()
        assert float((ratio - 1).abs().max()) < 4.5 * math.sqrt(2 / samples) + 0.03
        # The sweeps end near the posterior too, seen from where the prior alone would be.
        assert (found.mean(dim=0) - exact[0]).norm() < 0.3 * (mean - exact[0]).norm()
        assert 0.6 < float(result.residual) < 1.5


def test_solve_of_a_user_part_with_one_state_an_image():
    """Tiled chains meet the part one run at a time."""
    operator = ops.Compose(ops.SuperResolution(2), Gains(0.5, 2.0))
    prior, _, _ = stationary_prior()
    y = operator.measure(prior.draw(2, generator=seeded(1)), SIGMA_Y, generator=seeded(2))
    settings = {"operator": operator, "prior": prior, "nfe": 2, "num_samples": 3}
    for method in ("gibbs", "conditioning"):
        together = solve(y, method=method, **settings)
        apart = solve(y, method=method, batch_size=2, **settings)
        torch.testing.assert_close(together.samples, apart.samples, rtol=0, atol=1e-8)


def test_solve_of_clipped_images_draws_from_their_law():
    """White prior: every pixel is a problem of its own, integrated on a grid.

    At one rho the chain's x0 has the law prior(x0) * E[exp(-misfit(x0 + rho eps))] over eps.
    Levels are small from the start: from a wrong clipped region, where the gradient is 0, Langevin
    steps find no way back.
    """
    std, rho, sigma_y, samples, copies = 0.5, 0.2, 0.15, 30, 12
    values = torch.tensor([-1.1, -0.95, -0.5, 0.0, 0.3, 0.8, 1.0, 1.05], dtype=torch.float64)
    y = values.expand(1, 1, copies, 8)
    spectrum = torch.full((1, copies, 8), std**2, dtype=torch.float64)
    prior = GaussianPrior.stationary(torch.zeros(1, copies, 8, dtype=torch.float64), spectrum)
    operator = ops.HDR()
    levels = tuple(rho - 1e-6 * sweep for sweep in range(20))
    result = solve(
        y,
        operator=operator,
        prior=prior,
        nfe=20,
        sigma_y=sigma_y,
        num_samples=samples,
        method="gibbs",
        schedule=levels,
    )
    found = result.samples.view(samples * copies, 8)
    grid = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    likelihood = (-(((values - (2 * grid[:, None]).clamp(-1, 1)) / sigma_y) ** 2) / 2).exp()
    smooth = (-(((grid[:, None] - grid) / rho) ** 2) / 2).exp()
    weights = (smooth @ likelihood) * (-((grid / std) ** 2) / 2).exp()[:, None]
    weights = weights / weights.sum(dim=0)
    mean = grid @ weights
    variance = grid**2 @ weights - mean**2
    # Four and a half standard errors, and what twenty sweeps of a hundred steps leave.
    error = (found.mean(dim=0) - mean).abs() / variance.sqrt()
    ratio = found.var(dim=0) / variance
    assert float(error.max()) < 4.5 / math.sqrt(len(found)) + 0.05
    # Of the others, one chain in some hundreds stays in a wrong region and adds to their variance.
    clipped = values.abs() > 0.9
    assert float((ratio - 1)[clipped].abs().max()) < 4.5 * math.sqrt(2 / len(found)) + 0.1
