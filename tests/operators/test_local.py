"""The conventions of masks, reductions, blurs, phase retrieval, counts; what is refused."""

import math

import pytest
import torch
from scipy import stats

from experiments.operators.motion_kernels import kernel_statistics
from ncvsd_inverse import operators as ops
from ncvsd_inverse import solve
from ncvsd_inverse.operators.blur import _shaken_path
from ncvsd_inverse.priors import GaussianPrior
from ncvsd_inverse.protocols import LinearOperator, Operator
from tests.operators.cases import BOUNDARIES, normal, positive, seeded, some

AUTHORS_KERNELS = {
    (61, 0.2): {
        "effective pixels, 1 / sum k^2": (65.16, 36.4),
        "std along the main axis": (9.421, 5.30),
        "std across it": (0.7498, 0.313),
        "offset of the mean from the centre": (1.682, 1.59),
        "frequencies kept": (0.3042, 0.168),
    },
    (61, 0.5): {
        "effective pixels, 1 / sum k^2": (77.67, 36.0),
        "std along the main axis": (10.65, 5.05),
        "std across it": (1.292, 0.937),
        "offset of the mean from the centre": (1.555, 1.33),
        "frequencies kept": (0.3151, 0.126),
    },
    (61, 1.0): {
        "effective pixels, 1 / sum k^2": (90.63, 40.0),
        "std along the main axis": (10.38, 5.78),
        "std across it": (1.758, 1.03),
        "offset of the mean from the centre": (0.6055, 0.529),
        "frequencies kept": (0.3225, 0.105),
    },
    (15, 0.5): {
        "effective pixels, 1 / sum k^2": (15.97, 6.80),
        "std along the main axis": (2.775, 1.20),
        "std across it": (0.6501, 0.162),
        "offset of the mean from the centre": (0.3790, 0.312),
        "frequencies kept": (0.8084, 0.118),
    },
}
"""Mean and std of 1000 kernels of github.com/LeviBorodenko/motionblur by size and intensity.

Measured by experiments/operators/motion_kernels.py, with Pillow 10.4.
"""

KERNEL_3 = {
    "pixels above 1% of the largest": 176.0,
    "effective pixels, 1 / sum k^2": 126.686379,
    "std along the main axis": 17.1078756,
    "std across it": 1.97159888,
    "offset of the mean from the centre": 1.0422073,
    "the same, rows only": -0.840176715,
    "largest weight": 0.0133835759,
    "frequencies kept": 0.240274792,
}
"""Statistics of the kernel of 61 pixels, intensity 0.5, seed 3."""


def test_spacings_of_imresize():
    """The reduction of one axis against the convention, written out for each output pixel."""

    def cubic(t):
        t = abs(t)
        if t <= 1:
            return 1.5 * t**3 - 2.5 * t**2 + 1
        return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t <= 2 else 0.0

    for side, factor in [(16, 4), (8, 2), (9, 3), (10, 5), (4, 4), (3, 1)]:
        expected = torch.zeros(side // factor, side, dtype=torch.float64)
        mirror = [*range(side), *reversed(range(side))]
        for row in range(side // factor):
            centre = (row + 0.5) * factor - 0.5
            for tap in range(-4 * side - 20, 4 * side + 20):
                expected[row, mirror[tap % (2 * side)]] += cubic((centre - tap) / factor)
            expected[row] /= expected[row].sum()
        columns = torch.eye(side, dtype=torch.float64).view(side, 1, 1, side)
        columns = columns.expand(side, 1, side, side)
        reduced = ops.SuperResolution(factor)(columns)
        for line in reduced.unbind(dim=2):
            torch.testing.assert_close(line[:, 0].T, expected, rtol=0, atol=1e-13)


def test_values_of_imresize():
    # First pixel of a 16 to 4 reduction as MATLAB weights it, from the published convention.
    row = torch.tensor([0.27930, 0.26367, 0.22900, 0.16357, 0.08643])
    columns = torch.eye(16).view(16, 1, 1, 16).expand(16, 1, 16, 16)
    reduced = ops.SuperResolution(4)(columns)[:5, 0, 2, 0]
    assert torch.allclose(reduced, row, atol=1e-4)


def test_bicubic_keeps_constants_and_box_averages():
    constant = torch.full((1, 2, 8, 12), 0.3, dtype=torch.float64)
    torch.testing.assert_close(ops.SuperResolution(4)(constant), constant[..., :2, :3])
    x = normal(1, 2, 8, 12)
    expected = torch.nn.functional.avg_pool2d(x, 4)
    torch.testing.assert_close(ops.SuperResolution(4, filter="box")(x), expected)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("size", [(3, 5), (4, 2), (1, 1), (5, 7), (6, 9)])
def test_blur_is_the_written_convolution(boundary, size):
    """Each output pixel as the sum of the docstring, with numpy-like index rules."""
    kernel, x = positive(*size), normal(1, 1, 6, 9)

    def outside(index, length):
        if boundary == "circular":
            return index % length
        if boundary == "replicate":
            return min(max(index, 0), length - 1)
        index = abs(index)
        return index if index < length else 2 * (length - 1) - index

    rows, columns = range(6), range(9)
    if boundary == "valid":
        rows = range(size[0] - 1 - size[0] // 2, 6 - size[0] // 2)
        columns = range(size[1] - 1 - size[1] // 2, 9 - size[1] // 2)
    expected = torch.tensor(
        [
            [
                sum(
                    float(kernel[p, q])
                    * float(
                        x[0, 0, outside(i - p + size[0] // 2, 6), outside(j - q + size[1] // 2, 9)]
                    )
                    for p in range(size[0])
                    for q in range(size[1])
                )
                for j in columns
            ]
            for i in rows
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(ops.Blur(kernel, boundary=boundary)(x)[0, 0], expected)


@pytest.mark.parametrize("boundary", ["reflect", "replicate", "valid"])
def test_conjugate_gradient_reaches_its_tolerance(boundary):
    """With the kernel and conditioning of a real deblurring, in both dtypes."""
    op = ops.GaussianBlur(1.5, 15, boundary=boundary)
    for dtype, a in [(torch.float32, 400.0), (torch.float64, 400.0), (torch.float64, 1e4)]:
        rhs = normal(2, 1, 48, 40, dtype=dtype)
        solution = op.solve_normal(rhs, a=a, b=1.0)
        residual = a * op.adjoint(op(solution)) + solution - rhs
        # The recursive residual meets the tolerance; rounding adds to the true one.
        share = op.tolerances[dtype] + torch.finfo(dtype).eps * a
        limit = share * rhs.flatten(1).norm(dim=1)
        assert (residual.flatten(1).norm(dim=1) <= limit).all()


def test_solve_in_float32_does_not_cancel():
    """At rho = 80, sigma_lik = 0.05 the exact solve keeps what A does not see."""
    a = (80 / 0.05) ** 2
    for op in (ops.SuperResolution(4), ops.GaussianBlur(1.5, 7), ops.Inpaint.random((32, 24))):
        x = normal(1, 1, 32, 24)
        exact = op.solve_normal(x, a=a, b=1.0)
        single = op.solve_normal(x.float(), a=a, b=1.0)
        # Rounding of float32, a few operations deep.
        assert (single - exact).norm() <= 2e-5 * exact.norm()


def test_gaussian_kernel():
    kernel = ops.GaussianBlur(1.3, 7).kernel[0, 0]
    offsets = torch.arange(7, dtype=torch.float64) - 3
    expected = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.3**2))
    torch.testing.assert_close(kernel, expected / expected.sum())
    even = ops.GaussianBlur(1.3, 6).kernel[0, 0]
    assert divmod(int(even.argmax()), 6) == (3, 3)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 61])
@pytest.mark.parametrize("intensity", [0.0, 0.5, 1.0])
def test_motion_kernel(size, intensity):
    for seed in range(20):
        kernel = ops.MotionBlur(size, intensity, seed=seed).kernel[0, 0]
        assert kernel.shape == (size, size)
        assert (kernel >= 0).all()
        assert abs(float(kernel.sum()) - 1) < 1e-12


def test_motion_kernel_follows_its_seed():
    first, again, other = (ops.MotionBlur(15, 0.5, seed=seed).kernel for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # What the generator of torch and whole numbers give on every machine.
    kernel = ops.MotionBlur(61, 0.5, seed=3).kernel[0, 0]
    assert kernel_statistics(kernel) == pytest.approx(KERNEL_3, rel=1e-6)


def test_motion_kernel_is_straight_at_intensity_zero():
    for seed in range(20):
        kernel = ops.MotionBlur(61, 0.0, seed=seed).kernel[0, 0]
        # A straight line keeps the width of the pen and its blur, whatever its length.
        assert kernel_statistics(kernel)["std across it"] < 0.65
        corners = _shaken_path(0.0, torch.Generator().manual_seed(seed))
        assert torch.linalg.matrix_rank(corners, atol=1e-12) == 1


def test_motion_kernels_are_centred():
    """Signed distances of the mean from the centre, which even sizes have at size // 2, too."""
    for size in (60, 61):
        places = torch.arange(size, dtype=torch.float64) - size // 2
        means = torch.stack(
            [
                ops.MotionBlur(size, 1.0, seed=seed).kernel[0, 0].sum(dim=0) @ places
                for seed in range(200)
            ]
        )
        # Four standard errors; half a pixel would be eleven.
        assert means.mean().abs() < 4 * means.std() / math.sqrt(200)


def test_law_of_motion_paths():
    """Steps and directions against their stated laws, where these are known in closed form."""

    def steps(intensity, seed):
        corners = _shaken_path(intensity, torch.Generator().manual_seed(seed))
        return corners.diff(dim=0)

    # At intensity 1 next to no path is shorter than a step.
    shares = torch.cat([steps(1.0, seed).norm(dim=1) for seed in range(100)]) / 0.1
    shares = shares[torch.randperm(len(shares), generator=seeded(0))[:2000]]
    assert stats.kstest(shares.numpy(), stats.beta(1, 30).cdf).pvalue > 0.01
    directions = torch.stack([steps(0.0, seed)[0] for seed in range(1000)])
    angles = torch.atan2(directions[:, 0], directions[:, 1])
    assert stats.kstest(angles.numpy() / math.pi, stats.uniform().cdf).pvalue > 0.01
    lengths = torch.tensor([float(steps(0.5, seed).norm(dim=1).sum()) for seed in range(1000)])
    # E L = 0.75 (1/2 + 0.25 / 2); the first step and what passes the end have nearly the same mean.
    error = 4 * float(lengths.std()) / math.sqrt(1000)
    assert float(lengths.mean()) == pytest.approx(0.46875, abs=error)


@pytest.mark.parametrize(("size", "intensity"), [(61, 0.2), (61, 0.5), (61, 1.0), (15, 0.5)])
def test_law_of_motion_kernels(size, intensity):
    """Mean and spread of the kernels against those that the authors' generator was measured at."""
    draws = 400
    measured = [
        kernel_statistics(ops.MotionBlur(size, intensity, seed=seed).kernel[0, 0])
        for seed in range(draws)
    ]
    for name, (mean, std) in AUTHORS_KERNELS[size, intensity].items():
        values = torch.tensor([row[name] for row in measured], dtype=torch.float64)
        # Four standard errors of the difference; those of the authors are of 1000 draws.
        assert abs(values.mean() - mean) < 4 * std * math.sqrt(1 / draws + 1 / 1000), name
        # The spreads of laws with such tails differ by up to 15% between sets of 400 draws.
        assert float(values.std() / std) == pytest.approx(1, abs=0.25), name


def test_phase_retrieval():
    op = ops.PhaseRetrieval(pad=3)
    x = normal(2, 3, 5, 7)
    y = op(x)
    assert y.shape == (2, 3, 11, 13)
    assert op.input_shape(y.shape) == x.shape
    assert op.family == "phase_retrieval"
    assert not isinstance(op, LinearOperator)
    rows, columns = torch.arange(5.0).double(), torch.arange(7.0).double()
    frequencies_h, frequencies_w = torch.arange(11.0).double(), torch.arange(13.0).double()
    wave_h = torch.exp(-2j * math.pi * torch.outer(frequencies_h, rows + 3) / 11)
    wave_w = torch.exp(-2j * math.pi * torch.outer(columns + 3, frequencies_w) / 13)
    expected = (wave_h @ ((x + 1) / 2).to(wave_h.dtype) @ wave_w).abs() / math.sqrt(11 * 13)
    torch.testing.assert_close(y, expected)
    assert op(x.half()).dtype == torch.float16
    assert op.count_measured(y).tolist() == [3 * 11 * 13] * 2
    assert op.repeated(4) is op


@pytest.mark.parametrize("size", [(5, 7), (6, 8)])
def test_centred_amplitudes_are_the_others_shifted(size):
    first, centred = ops.PhaseRetrieval(2), ops.PhaseRetrieval(2, centred=True)
    x, v = normal(2, 1, *size), normal(2, 1, *size, seed=1)
    y = first(x)

    def shifted(z):
        return torch.fft.fftshift(z, dim=(-2, -1))

    torch.testing.assert_close(centred(x), shifted(y))
    amplitude, push, pull = first.linearise(x)
    seen, pushed, pulled = centred.linearise(x)
    torch.testing.assert_close(seen, shifted(amplitude))
    torch.testing.assert_close(pushed(v), shifted(push(v)))
    torch.testing.assert_close(pulled(shifted(y)), pull(y))
    settings = {"sigma_y": 0.1, "iterations": 5}
    found = first.search(y, v, lambda u, sigma: u / (1 + sigma**2), **settings)
    again = centred.search(shifted(y), v, lambda u, sigma: u / (1 + sigma**2), **settings)
    torch.testing.assert_close(again, found)
    prior = GaussianPrior.stationary(torch.zeros(1, *size), torch.ones(1, *size))
    results = [
        solve(z, operator=operator, prior=prior, nfe=2, sigma_y=0.1, method="gibbs")
        for z, operator in ((y, first), (shifted(y), centred))
    ]
    torch.testing.assert_close(results[0].residual, results[1].residual)
    torch.testing.assert_close(results[0].x0, results[1].x0)


def test_phase_retrieval_contracts_by_half():
    op, x = ops.PhaseRetrieval(2), normal(1, 2, 5, 7)
    for seed in range(20):
        move = 0.1 * normal(1, 2, 5, 7, seed=seed)
        assert (op(x + move) - op(x)).norm() <= op.lipschitz * move.norm() * (1 + 1e-9)
    darker = op(x + 0.1) - op(x)
    assert darker.norm() <= op.lipschitz * 0.1 * math.sqrt(x.numel())


def test_masks_hide_what_they_say():
    ones = torch.ones(2, 3, 64, 64)
    box = ops.Inpaint.box((64, 64), 32)(ones)
    assert (box[..., 16:48, 16:48] == 0).all()
    assert int(box.sum()) == 6 * (64 * 64 - 32 * 32)
    kept = ops.Inpaint.random((64, 64), keep=0.3, seed=0)(ones)
    assert torch.equal(kept[:, 0], kept[:, 2])
    # Four standard errors of a proportion over 4096 pixels.
    assert abs(float(kept.mean()) - 0.3) < 4 * math.sqrt(0.21 / 4096)
    again, other = (ops.Inpaint.random((64, 64), keep=0.3, seed=seed)(ones) for seed in (0, 1))
    assert torch.equal(kept, again)
    assert not torch.equal(kept, other)


NAN = torch.tensor([[1.0, math.nan]])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ops.Inpaint([[1, 0]]), TypeError, "mask must be"),
        (lambda: ops.Inpaint(torch.ones(2, 2, dtype=torch.complex64)), TypeError, "mask must be"),
        (lambda: ops.Inpaint(torch.ones(4)), ValueError, r"mask must have shape.*got \(4,\)"),
        (lambda: ops.Inpaint(NAN), ValueError, "mask must be finite"),
        (lambda: ops.Inpaint(NAN * math.inf), ValueError, "mask must be finite"),
        (lambda: ops.Inpaint(torch.full((2, 2), 0.5)), ValueError, "mask must hold only 0 and 1"),
        (lambda: ops.Inpaint(torch.zeros(4, 4)), ValueError, "mask must measure.*zeros"),
        (lambda: ops.Inpaint(torch.eye(2)[:, None, None, :1]), ValueError, "mask must measure"),
        (lambda: ops.Inpaint.box((4, 4), 5), ValueError, "side must be at most"),
        (lambda: ops.Inpaint.box((4, 4), 4), ValueError, "mask must measure"),
        (lambda: ops.Inpaint.box((4, 4), 0), ValueError, "side must be at least 1"),
        (lambda: ops.Inpaint.random((4, 4), keep=0.0), ValueError, "keep must be in"),
        (lambda: ops.Inpaint.random((4, 0)), ValueError, "size must be at least 1"),
        (lambda: ops.Inpaint.random((4,)), ValueError, "size must be"),
        (lambda: ops.SuperResolution(0), ValueError, "factor must be at least 1"),
        (lambda: ops.SuperResolution(2.0), TypeError, "factor must be an integer"),
        (lambda: ops.SuperResolution(2, filter="bicubik"), ValueError, "filter.*bicubic"),
        (lambda: ops.Blur([[1.0]]), TypeError, "kernel must be a torch tensor"),
        (lambda: ops.Blur(torch.ones(2, 2, dtype=torch.int64)), TypeError, "kernel must be a fl"),
        (lambda: ops.Blur(torch.ones(3)), ValueError, r"kernel must have shape.*got \(3,\)"),
        (lambda: ops.Blur(NAN), ValueError, "kernel must be finite"),
        (lambda: ops.Blur(torch.zeros(3, 3)), ValueError, "kernel must have a weight"),
        (lambda: ops.Blur(torch.ones(3, 3), boundary="zero"), ValueError, "boundary must be one"),
        (lambda: ops.GaussianBlur(0.0, 5), ValueError, "std must be positive"),
        (lambda: ops.GaussianBlur(1.0, 0), ValueError, "kernel_size must be at least 1"),
        (lambda: ops.MotionBlur(5, 1.5), ValueError, r"intensity must be in \[0, 1\]"),
        (lambda: ops.MotionBlur(5, -0.1), ValueError, "intensity must be in"),
        (lambda: ops.MotionBlur(5, 0.5, seed=-1), ValueError, "seed must be at least 0"),
        (lambda: ops.PhaseRetrieval(-1), ValueError, "pad must be at least 0"),
    ],
)
def test_bad_settings_name_the_argument(make, error, match):
    with pytest.raises(error, match=match):
        make()


x_bad = torch.zeros(2, 3, 6, 7)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.Inpaint(some(5, 7))(x_bad), ValueError, "x must have the height and width"),
        (lambda: ops.Inpaint(some(3, 1, 6, 7))(x_bad), ValueError, "x must have the batch and"),
        (lambda: ops.Inpaint(some(5, 7)).adjoint(x_bad), ValueError, "y must have the height"),
        (lambda: ops.SuperResolution(4)(x_bad), ValueError, "x must .*factor = 4"),
        (
            lambda: ops.SuperResolution(4).solve_normal(x_bad, a=1.0, b=1.0),
            ValueError,
            "rhs must .*factor = 4",
        ),
        (lambda: ops.GaussianBlur(1.0, 9)(x_bad), ValueError, "kernel must be at most as large"),
        (
            lambda: ops.GaussianBlur(1.0, 9, boundary="valid")(x_bad),
            ValueError,
            "kernel must be at most as large",
        ),
        (
            lambda: ops.GaussianBlur(1.0, 9, boundary="reflect")(x_bad),
            ValueError,
            "kernel must be at most as large",
        ),
        (lambda: ops.Blur(positive(3, 1, 3, 3))(x_bad), ValueError, "x must have the batch and"),
        (lambda: ops.Denoise()(x_bad[0]), ValueError, r"x must have shape \(B, C, H, W\)"),
        (lambda: ops.PhaseRetrieval(2)(x_bad.long()), TypeError, "x must be a floating-point"),
        (lambda: ops.PhaseRetrieval(3).input_shape((1, 1, 6, 9)), ValueError, "y_shape must exc"),
        (lambda: ops.Denoise().input_shape((1, 6, 9)), ValueError, "y_shape must be"),
        (lambda: ops.Denoise().measure(x_bad, 0.0), ValueError, "sigma_y must be positive"),
        (lambda: ops.Denoise().measure(x_bad, math.nan), ValueError, "sigma_y must be positive"),
        (lambda: ops.Denoise().solve_normal(x_bad, a=1.0, b=0.0), ValueError, "b must be posit"),
        (lambda: ops.Denoise().solve_normal(x_bad, a=-1.0, b=1.0), ValueError, "a must be non-n"),
        (lambda: ops.Denoise().repeated(0), ValueError, "times must be at least 1"),
    ],
)
def test_bad_calls_name_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call()


def line(*values):
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


def probabilities(rates, most):
    """P(k | rate), shape (most, len(rates)); a rate below 0 counts nothing."""
    counts = torch.arange(most)[:, None].numpy()
    return torch.from_numpy(stats.poisson.pmf(counts, rates.clamp(min=0).numpy()))


def test_the_mean_and_the_std_of_y_are_the_stated_ones():
    rates = torch.cat([torch.linspace(0, 12, 481), torch.linspace(12.5, 300, 300)]).double()
    operator, pmf = ops.Poisson(8.0), probabilities(rates, 600)
    y = operator.stabilise(torch.arange(600.0, dtype=torch.float64).view(1, 1, 1, -1)).flatten()
    mean, std = y @ pmf, (y**2 @ pmf - (y @ pmf) ** 2).clamp(min=0).sqrt()
    found = operator(line(*(2 * rates / 8 - 1))).flatten()
    error = (found - mean).abs()
    assert 0.0010 < float(error.max()) < 0.0011
    for rate, value in ((1, 0.85), (2, 0.96)):
        assert float(std[rates == rate][0]) == pytest.approx(value, abs=0.005)
    assert float((std[rates >= 3] - 1).abs().max()) < 0.01


def test_a_continues_along_its_tangent_below_black():
    operator = ops.Poisson(30.0)
    x = line(-1.5, -1.02, -0.98, -0.2, 0.7, 1.3).requires_grad_()
    assert torch.autograd.gradcheck(operator, (x,))
    below, black, above = (operator(line(-1 + step)) for step in (-1e-4, 0.0, 1e-4))
    torch.testing.assert_close(above - black, black - below, rtol=1e-3, atol=0)
    far, near = operator(line(-3.0)), operator(line(-2.0))
    torch.testing.assert_close(near - far, black - near)


def test_measure_draws_counts():
    operator, repeats = ops.Poisson(20.0), 20_000
    x = line(-1.2, -1.0, -0.9, 0.0, 1.0)
    y = operator.measure(x.expand(1, 1, repeats, 5), generator=seeded())[0, 0]
    counts = (y.square() / 4 - 3 / 8).round()
    torch.testing.assert_close(operator.stabilise(counts[None, None])[0, 0], y)
    rates = torch.tensor([0.0, 0.0, 1.0, 10.0, 20.0], dtype=torch.float64)
    # Four standard errors of the mean and, but for the small fourth cumulant, of the variance.
    assert ((counts.mean(0) - rates).abs() <= 4 * (rates / repeats).sqrt()).all()
    spread = ((2 * rates**2 + rates) / repeats).sqrt()
    assert ((counts.var(0) - rates).abs() <= 4 * spread).all()


def test_measure_takes_one_generator_an_image():
    operator, x = ops.Poisson(20.0), torch.zeros(2, 3, 4, 5)
    first = operator.measure(x, generator=[seeded(0), seeded(1)])
    again = operator.measure(x, generator=[seeded(7), seeded(1)])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], again[0])
    alike = [operator.measure(x, 1.0, generator=seeded(3)) for _ in range(2)]
    assert torch.equal(*alike)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_device_are_kept(kind, device):
    operator = ops.Poisson(20.0)
    x = torch.linspace(-1, 1, 12, device=device).view(1, 1, 3, 4).to(kind)
    y, measured = operator(x), operator.measure(x)
    for each in (y, measured):
        assert (each.dtype, each.device.type, each.shape) == (kind, device.type, x.shape)
    exact = operator(x.double())
    assert (y.double() - exact).norm() <= torch.finfo(kind).eps * exact.norm()


def test_roles():
    operator = ops.Poisson(20.0)
    assert isinstance(operator, Operator)
    assert not isinstance(operator, LinearOperator)
    assert (operator.family, operator.sigma_y, operator.peak) == ("poisson", 1.0, 20.0)
    assert operator.input_shape((2, 3, 4, 5)) == (2, 3, 4, 5)
    assert operator.repeated(3) is operator


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: ops.Poisson(0.0), ValueError, "peak must be positive"),
        (lambda x: ops.Poisson(20.0)(x[0]), ValueError, r"x must have shape \(B, C, H, W\)"),
        (lambda x: ops.Poisson(20.0).measure(x, 0.05), ValueError, "sigma_y must be 1 .*got 0.05"),
        (
            lambda x: ops.Poisson(20.0).measure(x, generator=[seeded()]),
            ValueError,
            "generator must be one or one for each of 2 images, got 1",
        ),
        (lambda x: ops.Poisson(20.0).stabilise(x - 1), ValueError, "counts must be at least 0"),
        (lambda x: ops.Poisson(20.0).stabilise(x.long()), TypeError, "counts must be a floating"),
    ],
)
def test_bad_input_names_the_argument(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.zeros(2, 1, 2, 2))


@pytest.mark.parametrize(
    ("peak", "error", "factor"), [(5, 0.059, 1.02), (20, 0.029, 1.00), (100, 0.006, 1.00)]
)
def test_the_gaussian_likelihood_costs_what_is_stated(peak, error, factor):
    """Posteriors of one pixel on a grid, by the Poisson likelihood and by that of y."""
    operator = ops.Poisson(peak)
    grid = torch.linspace(-1, 1, 4001, dtype=torch.float64)[1:]
    prior = (-((grid / 0.5) ** 2) / 2).exp()
    prior = prior / prior.sum()
    exact = probabilities(peak * (grid + 1) / 2, int(peak + 10 * math.sqrt(peak) + 20)) * prior
    counts = torch.arange(len(exact), dtype=torch.float64)
    y = operator.stabilise(line(*counts)).flatten()
    gaussian = (-((y[:, None] - operator(line(*grid)).flatten()) ** 2) / 2).exp() * prior
    weights = exact.sum(dim=1)
    (mean, std), (found, spread) = (
        ((p @ grid) / p.sum(1), ((p @ grid**2) / p.sum(1) - ((p @ grid) / p.sum(1)) ** 2).sqrt())
        for p in (exact, gaussian)
    )
    wrong = (weights @ ((found - mean) / std) ** 2).sqrt()
    assert float(wrong) == pytest.approx(error, abs=0.001)
    assert float(weights @ (spread / std)) == pytest.approx(factor, abs=0.005)


@pytest.mark.parametrize("peak", [5, 20, 100])
def test_solve_of_blurred_counts_draws_from_their_law(peak):
    """Rows of two pixels, each a problem of its own, integrated on a grid with exact likelihoods.

    At one rho the chain's x0 has the law prior(x0) * E[P(counts | x0 + rho eps)] over eps.
    """
    rho, rows, samples = 0.2, 60, 16
    pairs = torch.tensor([[0.2, 0.4], [0.8, 0.5], [0.6, 0.6]], dtype=torch.float64) * peak
    operator = ops.Compose(ops.Poisson(peak), ops.Blur(torch.tensor([[0.3, 0.7]])))
    y = operator.outer.stabilise(pairs.view(3, 1, 1, 2).repeat(1, 1, rows, 1))
    covariance = torch.tensor([[0.16, 0.08], [0.08, 0.16]], dtype=torch.float64)
    blocks = torch.block_diag(*[covariance] * rows)
    prior = GaussianPrior(torch.zeros(1, rows, 2, dtype=torch.float64), blocks)
    levels = tuple(rho - 1e-6 * sweep for sweep in range(20))
    settings = {"nfe": 20, "schedule": levels, "num_samples": samples, "method": "gibbs"}
    result = solve(y, operator=operator, prior=prior, **settings)
    assert result.sigma_lik == 1.0
    grid = torch.linspace(-2, 2, 121, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    blurred = operator.inner(points.view(1, 1, -1, 2))[0, 0]
    smooth = (-(((grid[:, None] - grid) / rho) ** 2) / 2).exp()
    most = 3 * peak + 60
    both = [probabilities(peak * (blurred[:, i] + 1) / 2, most) for i in range(2)]
    density = (-(points @ torch.linalg.inv(covariance) * points).sum(dim=1) / 2).exp()
    for image, (first, second) in enumerate(pairs.round().long().tolist()):
        likelihood = (both[0][first] * both[1][second]).view(121, 121)
        weights = (smooth @ likelihood @ smooth).flatten() * density
        weights = weights / weights.sum()
        mean = weights @ points
        variance = weights @ points**2 - mean**2
        found = result.samples[:, image, 0].flatten(0, 1)
        # Four and a half standard errors, and what the Gaussian likelihood costs.
        error = (found.mean(dim=0) - mean).abs() / variance.sqrt()
        assert float(error.max()) < 4.5 / math.sqrt(len(found)) + 0.05
        ratio = found.var(dim=0) / variance
        assert float((ratio - 1).abs().max()) < 4.5 * math.sqrt(2 / len(found)) + 0.05


def test_counts_behind_another_operator():
    operator = ops.Compose(ops.Poisson(50.0), ops.SuperResolution(2, "box"))
    x = torch.rand(2, 3, 40, 40, generator=seeded(1), dtype=torch.float64) * 1.8 - 0.9
    y = operator.measure(x, operator.sigma_y, generator=seeded(2))
    assert operator.sigma_y == 1.0
    assert operator.input_shape(y.shape) == x.shape
    misfit = y - operator(x)
    # Four standard errors of the mean and of the variance of standard normals.
    assert abs(float(misfit.mean())) < 4 / math.sqrt(misfit.numel()) + 0.002
    assert abs(float(misfit.square().mean()) - 1) < 4 * math.sqrt(2 / misfit.numel()) + 0.005
