"""The judge of a prior: against exact posteriors, wrong samplers, closed forms; and the command."""

import json
import math
import sys
import zipfile

import pytest
import torch

from ncvsd_inverse import cli, metrics
from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.evaluation import calibrate_noise_scale, evaluate, evaluate_generation
from ncvsd_inverse.images import centre_crop, read_image, read_images, write_image
from ncvsd_inverse.networks import ConcatDenoiser, Denoiser, UNetShape
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.priors import (
    DiffusionPrior,
    GaussianMixturePrior,
    GaussianPrior,
    NCVSDPrior,
    load_prior,
    save_prior,
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
        ({"teacher": object()}, TypeError, "teacher must have `denoise`, got object"),
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


class Generator:
    """Generates Gaussian images that are farther off the fewer calls are made."""

    image_shape = SHAPE

    def __init__(self):
        self.asked = []

    def generate(self, num, num_steps=4, seed=0, *, size=None, batch_size=16):
        self.asked.append((num, num_steps, seed, size, batch_size))
        source = torch.Generator().manual_seed(seed % 2**63)
        return torch.randn(num, *SHAPE, generator=source) * 0.5 + 1 / num_steps


def training(num=1000, block=300):
    source = torch.Generator().manual_seed(7)
    images = torch.randn(num, *SHAPE, generator=source) * 0.5
    return [images[i : i + block] for i in range(0, num, block)]


def flat_features(x):
    return x.flatten(1)


def test_generation_is_held_against_the_training_images():
    generator = Generator()
    teacher = GaussianPrior(torch.zeros(SHAPE), 0.25 * torch.eye(DIM))
    result = evaluate_generation(
        generator,
        teacher,
        iter(training()),
        features=flat_features,
        samples=1000,
        teacher_samples=600,
        teacher_steps=10,
        batch_size=50,
    )
    one, two, four, by_teacher, halves = result.figures
    # Mean shifts of 1, 1/2 and 1/4 in each of 6 numbers; chance adds about 0.01.
    assert one.distance == pytest.approx(6, rel=0.1)
    assert two.distance == pytest.approx(6 / 4, rel=0.1)
    assert four.distance == pytest.approx(6 / 16, rel=0.15)
    # The teacher's 10 steps are narrow: about 0.4 of 1.5 in trace is the most it can lack.
    assert 0 <= by_teacher.distance < 0.4
    assert 0 < halves.distance < 0.05
    assert [figure.images for figure in result.figures] == [1000, 1000, 1000, 600, 500]
    assert [figure.reference for figure in result.figures] == [1000] * 4 + [500]
    assert by_teacher.name == "teacher, 10 calls"
    assert json.loads(json.dumps(result.to_dict()))["figures"][0]["name"] == "1 call"
    # In blocks, each with its own seed, the same for every number of calls.
    blocks = [entry for entry in generator.asked if entry[1] == 1]
    assert [entry[0] for entry in blocks] == [256, 256, 256, 232]
    assert len({entry[2] for entry in blocks}) == 4
    assert [entry[2] for entry in generator.asked if entry[1] == 4] == [e[2] for e in blocks]
    assert {entry[3:] for entry in generator.asked} == {(SHAPE[1:], 50)}


def test_equal_images_are_at_distance_zero():
    class Copy(Generator):
        def generate(self, num, num_steps=4, seed=0, *, size=None, batch_size=16):
            return torch.cat(training())[:num]

    teacher = GaussianPrior(torch.zeros(SHAPE), 0.25 * torch.eye(DIM))
    batches = [torch.cat(training())[:256]]
    result = evaluate_generation(
        Copy(), teacher, batches, features=flat_features, samples=256, teacher_steps=2
    )
    assert result.figures[0].distance == pytest.approx(0, abs=1e-9)


def test_the_halves_are_random_and_disjoint():
    marks = torch.arange(1001.0).reshape(-1, 1, 1, 1).expand(-1, *SHAPE).split(250)
    seen = []

    def features(x):
        mark = x.flatten(1)[:, :1]
        seen.append(mark)
        return torch.cat([mark % 2, (mark % 250 < 125).float()], dim=1)

    teacher = GaussianPrior(torch.zeros(SHAPE), 0.25 * torch.eye(DIM))
    result = evaluate_generation(
        Generator(), teacher, marks, features=features, samples=2, teacher_steps=2
    )
    halves = result.figures[-1]
    assert (halves.images, halves.reference) == (501, 500)
    # Every second image, or the first of each batch, would be 1 apart; chance is about 0.002.
    assert halves.distance < 0.02
    assert torch.equal(torch.cat(seen[:5]).flatten(), torch.arange(1001.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"training": []}, ValueError, "training must hold at least 4 images, got 0"),
        ({"training": [torch.zeros(3, *SHAPE)]}, ValueError, "at least 4 images, got 3"),
        (
            {"training": [torch.zeros(4, *SHAPE), torch.zeros(4, 1, 2, 4)]},
            ValueError,
            "training must have shape",
        ),
        ({"samples": 1}, ValueError, "samples must be at least 2"),
        ({"teacher_samples": 1}, ValueError, "teacher_samples must be at least 2"),
        ({"teacher": object()}, TypeError, "teacher must have `denoise`"),
        ({"teacher": BrokenTeacher()}, DivergenceError, "generation with teacher, 2 calls"),
    ],
)
def test_bad_arguments_of_generation(change, error, message):
    options = {"training": training(8), "teacher": gaussian(torch.float32), **change}
    teacher, images = options.pop("teacher"), options.pop("training")
    with pytest.raises(error, match=message):
        evaluate_generation(
            Generator(),
            teacher,
            images,
            **{"features": flat_features, "samples": 2, "teacher_steps": 2, **options},
        )


CARD = {
    "image_shape": [3, 32, 32],
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "licence": "research use only",
    "data": "noise",
    "training": {},
    "evaluation": {},
    "weaknesses": "knows nothing",
    "intended_use": "tests",
}


def save_random(path, cls, kind, **changes):
    torch.manual_seed(0)
    any_size = changes.get("image_shape", 0) is None
    shape = UNetShape(32, channels=(8, 8), blocks=1, attention=(), head_channels=8)
    network = cls(shape, any_size=any_size)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 0:
                parameter.fill_(0.5 if "gain" in name else 0.3)
    gamma = 0.414 if kind == "ncvsd" else None
    save_prior(path, network, {**CARD, "name": path.name, "kind": kind, "gamma": gamma, **changes})


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny prior, its teacher, and pictures in a folder and in an archive."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "priors").mkdir()
    save_random(tmp_path / "priors" / "tiny", ConcatDenoiser, "ncvsd")
    save_random(tmp_path / "priors" / "tiny_teacher", Denoiser, "diffusion")
    (tmp_path / "faces").mkdir()
    source = torch.Generator().manual_seed(0)
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for i in reversed(range(6)):
            path = tmp_path / "faces" / f"{i}.png"
            write_image(path, torch.rand(1, 3, 40, 36, generator=source) * 2 - 1)
            archive.write(path, f"00000/{i}.png")
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command as a shell would; return exit status, standard output and error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ncvsd", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def small(place, *more):
    return ("priors/tiny", "--data", "faces", "--images", 4, "--draws", 2, "-o", "out", *more)


def test_the_command_writes_figures_table_and_plot(place, run):
    status, printed, err = run(*small(place, "--levels", "0.5,2", "--seed", 3))
    assert (status, err) == (0, "")
    assert "faces: 4 images of 32 x 32" in printed
    assert "without --train, generation is not judged" in printed
    assert sorted(path.name for path in (place / "out").iterdir()) == [
        f"evaluation.{kind}" for kind in ("json", "md", "png")
    ]
    record = json.loads((place / "out" / "evaluation.json").read_text())
    assert (record["prior"], record["teacher"]) == ("priors/tiny", "priors/tiny_teacher")
    assert (record["images"], record["draws"], record["seed"]) == (4, 2, 3)
    assert record["image_shape"] == [3, 32, 32]
    assert [level["sigma"] for level in record["levels"]] == [0.5, 2.0]
    assert record["fd_alex"] is None
    ratio = record["levels"][1]["prior"]["ratio"]["value"]
    text = (place / "out" / "evaluation.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 2 |"))
    assert f"| {ratio:.2f}±" in row
    assert row.count("|") == next(line for line in text.splitlines() if "sigma" in line).count("|")
    assert read_image(place / "out" / "evaluation.png").shape[-1] > 500
    # The same figures from the archive, in other batches.
    run(*small(place, "--levels", "0.5,2", "--seed", 3, "--batch-size", 3, "--data", "faces.zip"))
    again = json.loads((place / "out" / "evaluation.json").read_text())
    assert again["levels"][1]["prior"]["ratio"]["value"] == pytest.approx(ratio, rel=1e-2)


def test_the_command_judges_the_teachers_diffusion_too(place, run):
    status, printed, _ = run(*small(place, "--levels", "1", "--teacher-steps", 2))
    assert status == 0
    assert "2 calls" in printed
    record = json.loads((place / "out" / "evaluation.json").read_text())
    assert record["teacher_steps"] == 2
    assert record["levels"][0]["teacher"]["ratio"]["value"] > 0


def test_the_command_judges_generation(place, run, monkeypatch):
    monkeypatch.setattr(metrics, "alex_features", lambda x: x.mean((2, 3)))
    status, printed, err = run(
        *small(place, "--levels", "1", "--train", "faces.zip"),
        *("--samples", 3, "--teacher-samples", 2),
    )
    assert (status, err) == (0, "")
    assert "FD-alex" in printed
    assert "FID" not in printed
    record = json.loads((place / "out" / "evaluation.json").read_text())
    figures = record["fd_alex"]["figures"]
    assert [figure["images"] for figure in figures] == [3, 3, 3, 2, 3]
    assert [figure["reference"] for figure in figures] == [6, 6, 6, 6, 3]
    assert figures[3]["name"] == "teacher, 35 calls"
    text = (place / "out" / "evaluation.md").read_text()
    assert f"| 1 call | 3 | 6 | {figures[0]['distance']:.2f} |" in text


def test_a_prior_of_any_size_gets_the_centre(place, run):
    save_random(place / "priors" / "free", ConcatDenoiser, "ncvsd", image_shape=None)
    save_random(place / "priors" / "free_teacher", Denoiser, "diffusion", image_shape=None)
    arguments = ("priors/free.safetensors", *small(place, "--levels", "1")[1:])
    status, printed, _ = run(*arguments, "--size", 16)
    assert status == 0
    assert "4 images of 16 x 16" in printed
    status, _, err = run(*arguments, "--size", 64)
    assert status == 1
    assert "x must be at least 64 x 64 pixels, got (1, 3, 40, 36)" in err


def test_another_teacher_may_be_named(place, run):
    (place / "priors" / "tiny_teacher.json").rename(place / "priors" / "other.json")
    (place / "priors" / "tiny_teacher.safetensors").rename(place / "priors" / "other.safetensors")
    assert isinstance(load_prior(place / "priors" / "other"), DiffusionPrior)
    status, _, err = run(*small(place, "--levels", "1"))
    assert status == 1
    assert err.startswith("error: --teacher must be given, as there is no priors/tiny_teacher")
    status, _, _ = run(*small(place, "--levels", "1", "--teacher", "priors/other"))
    assert status == 0
    record = json.loads((place / "out" / "evaluation.json").read_text())
    assert record["teacher"] == "priors/other"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--levels", "0.1;1"), "--levels must be numbers with commas between, got '0.1;1'"),
        (("--levels", "0.1,0"), "levels must be positive"),
        (("--levels", "100"), "levels must be positive and at most"),
        (("--draws", 1), "draws must be at least 2"),
        (("--images", 1), "images must hold at least 2"),
        (("--images", 0), "limit must be at least 1"),
        (("--samples", 1), "--samples must be at least 2"),
        (("--data", "nowhere"), "nowhere must be a folder or a zip archive"),
        (("--data", "priors"), "priors must hold pictures"),
        (("--data", "damaged.zip"), "damaged.zip must be a folder or a zip archive"),
        (("--data", "mixed.zip"), "mixed.zip: b.png must be a readable picture"),
        (("--train", "nowhere"), "nowhere must be a folder or a zip archive"),
        (("--teacher", "priors/tiny"), "--teacher must be a teacher, got priors/tiny"),
        (("--device", "warp"), "--device must be usable here"),
        (("-o", "faces.zip"), "--out must be a writable folder"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(place, run, change, message):
    (place / "damaged.zip").write_bytes((place / "faces.zip").read_bytes()[:500])
    with zipfile.ZipFile(place / "mixed.zip", "w") as archive:
        archive.write(place / "faces" / "0.png", "a.png")
        archive.writestr("b.png", b"no picture")
    status, _, err = run(*small(place, *change))
    assert status == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (place / "out").exists() or not list((place / "out").iterdir())


def test_a_teacher_is_no_prior_to_judge(place, run):
    arguments = ("priors/tiny_teacher", *small(place, "--teacher", "priors/tiny_teacher")[1:])
    status, _, err = run(*arguments)
    assert (status, err) == (
        1,
        "error: PRIOR must be a distilled prior, got priors/tiny_teacher, a teacher\n",
    )


def test_pictures_are_read_by_order_of_name_as_they_are_asked_for(place):
    (place / "faces" / ".hidden.png").write_bytes(b"no picture")
    (place / "faces" / "notes.txt").write_text("no picture")
    (place / "faces" / "5.png").write_bytes(b"damaged")
    expected = [read_image(place / "faces" / f"{i}.png") for i in range(5)]
    reader = read_images(place / "faces")
    for picture in expected:
        assert torch.equal(next(reader), picture)
    with pytest.raises(ValueError, match=r"5\.png must be a readable picture"):
        next(reader)
    first = list(read_images(place / "faces.zip", limit=2))
    assert len(first) == 2
    assert torch.equal(torch.cat(first), torch.cat(expected[:2]))
    assert len(list(read_images(place / "faces.zip"))) == 6


def test_a_centre_crop_of_a_size():
    x = torch.arange(70.0).view(1, 1, 7, 10)
    assert torch.equal(centre_crop(x, (4, 3)), x[..., 1:5, 3:6])
    with pytest.raises(ValueError, match="x must be at least 8 x 3 pixels"):
        centre_crop(x, (8, 3))
