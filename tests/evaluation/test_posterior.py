"""The judge of a prior: against exact posteriors, wrong samplers, closed forms; and the command."""

import json
import math
import subprocess
import sys

import pytest
import torch

from ncvsd_inverse import metrics
from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.evaluation import calibrate_noise_scale, evaluate, plots
from ncvsd_inverse.evaluation.plots import COLUMNS, GridRow, save_evaluation_plot, save_picture_grid
from ncvsd_inverse.evaluation.posterior import Figure, LevelFigures, PosteriorRatio
from ncvsd_inverse.images import read_image
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.priors import (
    GaussianMixturePrior,
    GaussianPrior,
    NCVSDPrior,
)

SHAPE = (1, 2, 3)
DIM = math.prod(SHAPE)
LEVELS = (0.2, 1.0, 5.0)


def gaussian(dtype=torch.float64):
    source = torch.Generator().manual_seed(0)
    factor = torch.randn(DIM, DIM, generator=source, dtype=torch.float64) * 0.3
    covariance = factor @ factor.T + 0.05 * torch.eye(DIM, dtype=torch.float64)
    return GaussianPrior(torch.full(SHAPE, 0.2, dtype=dtype), covariance.to(dtype))


def mixture():
    source = torch.Generator().manual_seed(1)
    means = torch.randn(3, *SHAPE, generator=source, dtype=torch.float64)
    covariances = 0.03 * torch.eye(DIM, dtype=torch.float64).expand(3, DIM, DIM)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return GaussianMixturePrior(weights, means, covariances)


def images_of(prior, num=400):
    return prior.draw(num, generator=torch.Generator().manual_seed(2))


class Changed:
    """A sampler that moves and scales the exact draws about the posterior mean."""

    nfe_per_sample = 1

    def __init__(self, exact, scale=1.0, shift=0.0):
        self.exact, self.scale, self.shift = exact, scale, shift

    def sample(self, u, sigma, *, generator=None):
        mean = self.exact.denoise(u, sigma)
        draw = self.exact.sample(u, sigma, generator=generator)
        return mean + self.scale * (draw - mean) + self.shift


def assert_near(figure, expected, most_errors=4):
    # Four standard errors: 1 in 16,000 by chance for each of a fixed seed's figures.
    assert abs(figure.value - expected) <= most_errors * figure.error
    assert figure.error < 0.15 * max(1, abs(expected))


@pytest.mark.parametrize("make", [gaussian, mixture])
def test_exact_posterior_draws_have_ratio_two(make):
    prior = make()
    result = evaluate(prior, prior, images_of(prior, 2000), levels=LEVELS, draws=8)
    assert [level.sigma for level in result.levels] == list(LEVELS)
    for level in result.levels:
        assert_near(level.prior.ratio, 2)
        assert_near(level.prior.variance, 1)
        assert_near(level.prior.bias, 0)
        assert_near(level.prior.cross, 0)
        # The mean of 8 draws lacks what an eighth of the posterior variance costs.
        assert_near(level.psnr_gap, 10 * math.log10(1 + 1 / 8))


def test_a_mean_is_no_draw():
    exact = gaussian()
    result = evaluate(Changed(exact, 0.0), exact, images_of(exact, 20), levels=LEVELS, draws=3)
    for level in result.levels:
        figures = level.prior
        parts = (figures.ratio, figures.variance, figures.bias, figures.cross, level.psnr_gap)
        assert [part.value for part in parts] == pytest.approx([1, 0, 0, 0, 0], abs=1e-12)
        assert level.mean_psnr.value == pytest.approx(level.teacher_psnr.value)


class Narrow(torch.nn.Module):
    """A generator whose draws keep two thirds of the std of the exact posterior of N(0, I)."""

    image_channels, size_multiple, num_classes, resolution = 1, 1, 0, None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, sigma, condition, condition_sigma, labels=None):
        raised, level = sigma.view(-1, 1, 1, 1), condition_sigma.view(-1, 1, 1, 1)
        z = (x - condition) / (raised**2 - level**2).sqrt()
        return condition / (1 + level**2) + z / 1.5 * level / (1 + level**2).sqrt()


class White:
    """The exact denoiser of N(0, I)."""

    def denoise(self, x, sigma):
        return x / (1 + sigma**2)


def test_calibration_gives_back_the_spread():
    images = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    prior = NCVSDPrior(Narrow(), image_shape=(1, 8, 8))
    spread = calibrate_noise_scale(prior, White(), images, levels=(1.0, 0.2), batch_size=64)
    assert [sigma for sigma, _ in spread] == [0.2, 1.0]
    # 12,800 pixels and 8 draws: the variance is known to about 1.5%.
    assert [factor for _, factor in spread] == pytest.approx([1.5, 1.5], rel=0.03)
    again = calibrate_noise_scale(
        prior.with_noise_scale(spread), White(), images, levels=(0.2, 1.0)
    )
    assert [factor for _, factor in again] == pytest.approx([factor for _, factor in spread])


def test_a_narrow_sampler_shows_in_the_variance():
    exact = gaussian()
    result = evaluate(Changed(exact, 0.5), exact, images_of(exact), levels=LEVELS, draws=4)
    for level in result.levels:
        assert_near(level.prior.variance, 0.25)
        assert_near(level.prior.bias, 0)
        assert_near(level.prior.ratio, 1.25)


def test_a_biased_sampler_shows_in_the_bias():
    exact = gaussian()
    shifted = Changed(exact, shift=0.3)
    result = evaluate(shifted, exact, images_of(exact), levels=LEVELS, draws=4)
    for level in result.levels:
        teacher_mse = 4 / 10 ** (level.teacher_psnr.value / 10)
        assert_near(level.prior.bias, 0.09 / teacher_mse)
        assert_near(level.prior.variance, 1)
        assert_near(level.prior.ratio, 2 + 0.09 / teacher_mse)


def test_the_parts_add_up_to_the_ratio_by_the_stated_identity():
    exact = gaussian()
    wrong = Changed(exact, 0.7, 0.1)
    for level in evaluate(wrong, exact, images_of(exact, 30), levels=LEVELS, draws=3).levels:
        parts = level.prior
        total = 1 + parts.variance.value + parts.bias.value + parts.cross.value
        assert parts.ratio.value == pytest.approx(total, rel=1e-9)


def test_figures_by_hand():
    """Every figure from its definition, with loops, for draws and means that are all wrong."""

    class Teacher:
        def denoise(self, x, sigma):
            return 0.4 * x

    class Recorder(Changed):
        seen = ()

        def sample(self, u, sigma, *, generator=None):
            draw = 0.5 * u + draw_normal(u, generator)
            self.seen = (*self.seen, (u, draw))
            return draw

    images, recorder = images_of(gaussian(), 7), Recorder(None)
    (level,) = evaluate(recorder, Teacher(), images, levels=[0.7], draws=3, batch_size=7).levels
    u, draws = recorder.seen[0][0], torch.stack([draw for _, draw in recorder.seen])
    assert (u - images).std() == pytest.approx(0.7, rel=0.3)
    teacher = (0.4 * u - images).square().mean((1, 2, 3))
    single = torch.stack([(draw - images).square().mean((1, 2, 3)) for draw in draws]).mean(0)
    average = draws.sum(0) / 3
    variance = sum((draw - average).square() for draw in draws).mean((1, 2, 3)) / 2
    bias = (average - 0.4 * u).square().mean((1, 2, 3)) - variance / 3
    of_mean = (average - images).square().mean((1, 2, 3))
    ratio = single.mean() / teacher.mean()
    assert level.prior.ratio.value == pytest.approx(float(ratio))
    spread = (single - ratio * teacher).square().sum() / 6
    assert level.prior.ratio.error == pytest.approx(float((spread / 7).sqrt() / teacher.mean()))
    assert level.prior.variance.value == pytest.approx(float(variance.mean() / teacher.mean()))
    assert level.prior.bias.value == pytest.approx(float(bias.mean() / teacher.mean()))
    assert level.teacher_psnr.value == pytest.approx(10 * math.log10(4 / teacher.mean()))
    assert level.mean_psnr.value == pytest.approx(10 * math.log10(4 / of_mean.mean()))
    gap = level.teacher_psnr.value - level.mean_psnr.value
    assert level.psnr_gap.value == pytest.approx(gap)
    error = 10 / math.log(10) * float(teacher.std() / teacher.mean()) / math.sqrt(7)
    assert level.teacher_psnr.error == pytest.approx(error)
    assert level.crps.value == pytest.approx(float(metrics.crps(draws, images).mean()))
    assert level.crps.error == pytest.approx(float(metrics.crps(draws, images).std()) / 7**0.5)


def test_crps_of_a_gaussian_posterior_is_its_closed_form():
    std, sigma = 0.5, 1.0
    prior = GaussianPrior(torch.zeros(SHAPE).double(), std**2 * torch.eye(DIM).double())
    (level,) = evaluate(prior, prior, images_of(prior), levels=[sigma], draws=5).levels
    # Of draws from the truth's own law N(m, s^2) the expected score is s / sqrt(pi).
    spread = math.sqrt(std**2 * sigma**2 / (std**2 + sigma**2))
    assert_near(level.crps, spread / math.sqrt(math.pi))
    assert level.crps.error < 0.02


def test_standard_errors_are_those_of_repetition():
    exact = gaussian()
    runs = [
        evaluate(exact, exact, images_of(exact, 600)[i * 30 : i * 30 + 30], levels=[1.0], seed=i)
        for i in range(20)
    ]
    for pick in (
        lambda level: level.prior.ratio,
        lambda level: level.teacher_psnr,
        lambda level: level.crps,
    ):
        figures = [pick(run.levels[0]) for run in runs]
        spread = float(torch.tensor([figure.value for figure in figures]).std())
        claimed = sum(figure.error for figure in figures) / len(figures)
        # A std of 20 values is known to 16%, of which this is three.
        assert spread == pytest.approx(claimed, rel=0.5)


def test_no_figure_depends_on_the_batch_or_the_other_levels():
    exact = gaussian()
    arguments = (exact, exact, images_of(exact, 10))
    options = {"draws": 3, "teacher_steps": 3, "teacher_draws": 2, "seed": 4}
    whole = evaluate(*arguments, levels=LEVELS, **options)
    parts = evaluate(*arguments, levels=LEVELS[1:], batch_size=3, **options)
    for one, other in zip(whole.levels[1:], parts.levels, strict=True):
        flat = [flatten(level) for level in (one, other)]
        assert flat[0] == pytest.approx(flat[1], rel=1e-9)
    other = evaluate(*arguments, levels=LEVELS, **{**options, "seed": 5})
    assert other.levels[0].crps != whole.levels[0].crps


def flatten(entry):
    if not hasattr(entry, "__dataclass_fields__"):
        return [entry]
    return [x for name in entry.__dataclass_fields__ for x in flatten(getattr(entry, name))]


def test_a_teachers_own_diffusion_is_judged_beside():
    exact = gaussian()
    arguments = (exact, exact, images_of(exact, 200))
    ratios = {}
    for steps in (3, 40):
        result = evaluate(*arguments, levels=[1.0], draws=2, teacher_steps=steps)
        assert (result.teacher_steps, result.teacher_draws) == (steps, 4)
        ratios[steps] = result.levels[0].teacher
    # Few steps are too narrow: each takes the mean for a draw.
    assert ratios[3].variance.value < 0.7 < 0.8 < ratios[40].variance.value < 1.05
    assert_near(ratios[40].bias, 0)
    assert evaluate(*arguments, levels=[1.0], draws=2).levels[0].teacher is None


def test_an_evaluation_is_json():
    exact = gaussian()
    result = evaluate(exact, exact, images_of(exact, 4), levels=[1.0], draws=2, seed=3)
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (record["images"], record["draws"], record["seed"]) == (4, 2, 3)
    assert record["teacher_steps"] is None
    assert record["levels"][0]["prior"]["ratio"]["value"] == result.levels[0].prior.ratio.value


class Broken(Changed):
    def sample(self, u, sigma, *, generator=None):
        return u * math.nan


class BrokenTeacher:
    def denoise(self, x, sigma):
        return x / 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"levels": ()}, ValueError, "levels must hold at least one level, got none"),
        ({"levels": (1.0, 0.0)}, ValueError, "levels must be positive"),
        ({"draws": 1}, ValueError, "draws must be at least 2, got 1"),
        ({"teacher_steps": 1}, ValueError, "num_steps must be at least 2"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"images": torch.zeros(1, *SHAPE)}, ValueError, "images must hold at least 2, got 1"),
        ({"images": torch.zeros(SHAPE)}, ValueError, "images must have shape"),
        ({"images": torch.full((2, *SHAPE), math.nan)}, ValueError, "images must be finite"),
        ({"images": torch.zeros(2, 1, 4, 4)}, ValueError, "must hold images of shape|must have"),
        ({"teacher": object()}, TypeError, "teacher must be a denoiser .* got object"),
        ({"prior": Broken(None)}, DivergenceError, "a draw left the finite numbers at sigma = 1"),
        ({"teacher": BrokenTeacher()}, DivergenceError, "the teacher's mean left the finite"),
    ],
)
def test_bad_arguments(change, error, message):
    exact = gaussian()
    arguments = {"prior": exact, "teacher": exact, "images": images_of(exact, 3), **change}
    positional = [arguments.pop(name) for name in ("prior", "teacher", "images")]
    with pytest.raises(error, match=message):
        evaluate(*positional, **{"levels": [1.0], "draws": 2, **arguments})


def test_a_teacher_without_error_is_no_measure():
    class Constant(Changed):
        def denoise(self, x, sigma):
            return torch.zeros_like(x)

    constant = Constant(gaussian(), 0.0)
    with pytest.raises(ValueError, match="teacher must err to be a measure, got MSE 0"):
        evaluate(constant, constant, torch.zeros(2, *SHAPE).double(), levels=[1.0], draws=2)


# Pictures and plots.


def row(generator, std=True, channels=3):
    truth = torch.rand(1, channels, 16, 24, generator=generator) * 2 - 1
    return GridRow(
        title="sr4x",
        truth=truth,
        measurement=truth[..., ::4, ::4],
        estimate=truth,
        std=truth.abs() if std else None,
        psnr=23.4,
    )


def test_grid_has_a_row_a_result(tmp_path, generator):
    one = [row(generator)]
    save_picture_grid(tmp_path / "one.png", one)
    save_picture_grid(
        tmp_path / "three.png", [*one, row(generator, False), row(generator, True, 1)]
    )
    small, large = read_image(tmp_path / "one.png"), read_image(tmp_path / "three.png")
    assert large.shape[-2] > 2.5 * small.shape[-2]
    assert large.shape[-1] == small.shape[-1]


def test_std_is_shown_against_the_largest_of_the_grid(tmp_path, generator):
    calm, wild = row(generator), row(generator)
    calm.std.fill_(0.1)
    wild.std.fill_(0.4)
    save_picture_grid(tmp_path / "a.png", [calm, wild])
    x = read_image(tmp_path / "a.png")
    height, width = x.shape[-2:]
    column = round(width * (len(COLUMNS) - 0.5) / len(COLUMNS))
    first, second = (float(x[0, 0, round(height * at), column]) for at in (0.3, 0.75))
    assert second == 1
    assert first == pytest.approx(-0.5, abs=0.01)


def test_bad_rows_write_nothing(tmp_path, generator):
    with pytest.raises(ValueError, match="rows must hold at least one"):
        save_picture_grid(tmp_path / "a.png", [])
    good = row(generator)
    bad = GridRow("x", torch.zeros(2, 3, 8, 8), good.measurement, good.estimate, None, 0.0)
    with pytest.raises(ValueError, match="picture must have shape"):
        save_picture_grid(tmp_path / "a.png", [good, bad])
    assert list(tmp_path.iterdir()) == []


def test_no_window_system_is_touched(tmp_path):
    code = (
        "import sys, torch\n"
        "from ncvsd_inverse.evaluation.plots import GridRow, save_picture_grid\n"
        "x = torch.zeros(1, 3, 8, 8)\n"
        f"save_picture_grid({str(tmp_path / 'a.png')!r}, [GridRow('a', x, x, x, None, 1.0)])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def level(sigma, ratio, teacher=None):
    def parts(value):
        values = (value, 0.9, 0.1, value - 2)
        return PosteriorRatio(*(Figure(each, 0.05) for each in values))

    return LevelFigures(
        sigma=sigma,
        teacher_psnr=Figure(30 - sigma, 0.2),
        prior=parts(ratio),
        mean_psnr=Figure(29 - sigma, 0.2),
        psnr_gap=Figure(1.0, 0.1),
        crps=Figure(0.1 * sigma, 0.01),
        teacher=None if teacher is None else parts(teacher),
    )


def test_figures_are_plotted_over_sigma_beside_what_is_right():
    levels = [level(0.1, 1.8, 1.5), level(1.0, 2.1, 1.6)]
    ratio, parts, psnr, _ = plots._plot_levels(levels).axes
    drawn = [list(line.get_ydata()) for line in ratio.get_lines()]
    assert [1.8, 2.1] in drawn
    assert [1.5, 1.6] in drawn
    assert [2, 2] in drawn
    assert [0.9, 0.9] in [list(line.get_ydata()) for line in parts.get_lines()]
    references = [float(line.get_ydata()[0]) for line in parts.get_lines() if dotted(line)]
    assert sorted(references) == [0, 1]
    assert [29.9, 29.0] in [list(line.get_ydata()) for line in psnr.get_lines()]
    assert ratio.get_xscale() == "log"
    assert [text.get_text() for text in ratio.get_legend().get_texts()] == [
        "prior",
        "teacher's diffusion",
    ]


def dotted(line):
    return line.get_linestyle() == ":"


def test_evaluation_plot_is_a_picture(tmp_path):
    save_evaluation_plot(tmp_path / "a.png", [level(2.0, 1.9), level(0.5, 2.0)])
    assert read_image(tmp_path / "a.png").shape[-1] > 500
    with pytest.raises(ValueError, match="levels must hold at least one level, got none"):
        save_evaluation_plot(tmp_path / "b.png", [])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
