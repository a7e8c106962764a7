import json
import shutil
import sys
import warnings
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from typer.testing import CliRunner

import ncvsd_inverse
from ncvsd_inverse import __version__, cli
from ncvsd_inverse.images import read_image, write_image
from ncvsd_inverse.priors import DiffusionPrior, GaussianPrior
from ncvsd_inverse.tasks import list_tasks, make_task

pytestmark = [
    pytest.mark.filterwarnings("ignore:the residual is"),
    pytest.mark.filterwarnings("ignore:the loop is 'gibbs'"),
    pytest.mark.filterwarnings("ignore:the schedule has one sweep only"),
]
"""Stand-ins that hold no statistics, and few calls, show most of what is tested here."""


class SmoothPrior(GaussianPrior):
    """A stationary Gaussian of smooth pictures, of one shape."""

    @classmethod
    def of_shape(cls, shape):
        rows, columns = (torch.fft.fftfreq(side)[:] for side in shape[1:])
        spectrum = 0.02 / (0.01 + rows[:, None] ** 2 + columns**2)
        return cls.stationary(torch.zeros(shape), spectrum.expand(shape))


class AnySize:
    """A user's prior that takes pictures of any size."""

    nfe_per_sample = 1
    image_shape = None

    def sample(self, u, sigma, *, generator=None):
        return u / (1 + sigma**2)


@pytest.fixture(autouse=True)
def prior(monkeypatch):
    """Stand in for the trained priors; a test may set `kind` to another one."""

    class Choice:
        kind = SmoothPrior.of_shape((3, 64, 64))

    def load(name, device=None, dtype=None):
        if name != "stand_in":
            raise ValueError(f"prior must be one of stand_in, got {name!r}")
        return Choice.kind

    monkeypatch.setattr("ncvsd_inverse.cli.inputs.load_prior", load)
    return Choice


@pytest.fixture
def photo(tmp_path):
    """A smooth picture of 80 x 72 pixels."""
    rows, columns = torch.linspace(-1, 1, 72)[:, None], torch.linspace(-1, 1, 80)
    write_image(tmp_path / "photo.png", (rows * columns).expand(1, 3, 72, 80))
    return tmp_path / "photo.png"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_help_and_version(run):
    assert run("--version")[:2] == (0, f"{__version__}\n")
    status, out, _ = run("--help")
    assert status == 0
    assert all(command in out for command in ("demo", "solve", "priors"))
    help_of_solve = CliRunner().invoke(cli.app, ["solve", "--help"], env={"COLUMNS": "200"})
    assert help_of_solve.exit_code == 0
    assert all(task in help_of_solve.output for task in list_tasks(all=True))


def test_demo_restores_every_shipped_picture(run, tmp_path):
    out = tmp_path / "new" / "demo"
    status, printed, err = run("demo", "-o", out, "--prior", "stand_in", "--nfe", 2, "--samples", 2)
    assert (status, err) == (0, "")
    pictures = [path.stem for path in cli.demo.ASSETS.glob("*.png")]
    assert len(pictures) >= 2
    expected = [f"{picture}_{task}.png" for picture in pictures for task in cli.demo.TASKS]
    assert names(out) == sorted([*expected, "demo.png"])
    assert read_image(out / expected[0]).shape == (1, 3, 64, 64)
    assert read_image(out / "demo.png").shape[2] > 1000
    assert "stand_in computes on cpu" in printed
    assert "2 network calls for the estimate and for each of 2 samples" in printed
    assert printed.count("sr4x") == len(pictures)


def test_demo_shows_photographs_to_a_prior_of_any_size(run, tmp_path, prior):
    prior.kind = AnySize()
    arguments = ("demo", "-o", tmp_path, "--prior", "stand_in", "--nfe", 1, "--samples", 1)
    assert run(*arguments)[0] == 0
    assert read_image(tmp_path / "cat_sr4x.png").shape == (1, 3, 128, 128)


def test_one_sample_has_no_std(run, tmp_path):
    arguments = ("demo", "-o", tmp_path, "--prior", "stand_in", "--nfe", 1, "--samples", 1)
    assert run(*arguments)[0] == 0


@pytest.mark.parametrize("task", ["inpaint_box", "sr4x", "phase_retrieval"])
def test_simulate_degrades_and_restores(run, tmp_path, photo, task):
    out = tmp_path / "out"
    status, printed, err = run(
        *("solve", photo, "--task", task, "--prior", "stand_in", "--simulate", "-o", out),
        *("--nfe", 3, "--samples", 2, "--seed", 5, "--sigma-y", 0.1),
    )
    assert (status, err) == (0, "")
    assert "80 x 72 pixels fitted to 64 x 64" in printed
    kinds = ("measurement.png", "restored.png", "std.png")
    assert names(out) == ["photo.json", *(f"photo_{kind}" for kind in kinds)]
    record = json.loads((out / "photo.json").read_text())
    assert (record["nfe"], record["seed"], record["sigma_y"]) == (3, 5, 0.1)
    assert (record["task"], record["simulated"], record["samples"]) == (task, True, 2)
    assert record["residual"] > 0
    assert len(record["schedule"]) == 3
    assert "psnr" in record
    again = tmp_path / "again"
    run(
        *("solve", photo, "--task", task, "--prior", "stand_in", "--simulate", "-o", again),
        *("--nfe", 3, "--samples", 2, "--seed", 5, "--sigma-y", 0.1),
    )
    restored = "photo_restored.png"
    assert (out / restored).read_bytes() == (again / restored).read_bytes()


def test_a_measured_picture_is_restored(run, tmp_path):
    operator = make_task("sr4x", 64).operator
    truth = SmoothPrior.of_shape((3, 64, 64)).sample(
        torch.zeros(1, 3, 64, 64), 1e3, generator=torch.Generator().manual_seed(0)
    )
    truth = truth / truth.abs().max()
    write_image(tmp_path / "small.png", operator(truth))
    status, printed, err = run(
        *("solve", tmp_path / "small.png", "--task", "sr", "--scale", 4, "--prior", "stand_in"),
        *("--sigma-y", 0.01, "--nfe", 20, "-o", tmp_path / "out"),
    )
    assert (status, err) == (0, "")
    assert names(tmp_path / "out") == ["small.json", "small_restored.png"]
    restored = read_image(tmp_path / "out" / "small_restored.png")
    assert (operator(restored) - operator(truth)).abs().max() < 0.1
    assert "residual" in printed


@pytest.mark.parametrize("task", list_tasks(all=True)[len(list_tasks()) :])
def test_the_other_tasks_are_simulated(run, tmp_path, photo, task):
    status, _, err = run(
        *("solve", photo, "--task", task, "--prior", "stand_in", "--simulate"),
        *("--nfe", 2, "-o", tmp_path / "out"),
    )
    assert (status, err) == (0, "")
    shown = [] if task == "compressed_sensing" else ["photo_measurement.png"]
    assert names(tmp_path / "out") == ["photo.json", *shown, "photo_restored.png"]


def test_a_grey_picture_is_coloured(run, tmp_path, prior):
    prior.kind = AnySize()
    grey = torch.linspace(-0.5, 0.5, 16).expand(1, 1, 24, 16)
    write_image(tmp_path / "grey.png", grey)
    arguments = ("--task", "colorize", "--prior", "stand_in", "--sigma-y", 0.01)
    assert run("solve", tmp_path / "grey.png", *arguments, "-o", tmp_path / "out")[0] == 0
    restored = read_image(tmp_path / "out" / "grey_restored.png")
    # Colours of this prior that leave [-1, 1] are clipped, here and there.
    assert (make_task("colorize", 64).operator(restored) - grey).abs().mean() < 0.05


def test_a_mask_says_what_is_known(run, tmp_path, prior):
    prior.kind = AnySize()
    known = torch.full((1, 3, 20, 12), -1.0)
    known[..., 6:] = 1
    write_image(tmp_path / "mask.png", known)
    write_image(tmp_path / "torn.png", torch.where(known > 0, 0.5, 1.0))
    status, _, err = run(
        *("solve", tmp_path / "torn.png", "--task", "inpaint", "--prior", "stand_in"),
        *("--mask", tmp_path / "mask.png", "-o", tmp_path / "out", "--sigma-y", 0.01),
    )
    assert (status, err) == (0, "")
    restored = read_image(tmp_path / "out" / "torn_restored.png")
    assert (restored[..., 6:] - 0.5).abs().max() < 0.1
    # What the mask hides must not be seen: the painted 1.0 would pull this prior's 0 up.
    assert restored[..., :6].mean() < 0.3
    assert json.loads((tmp_path / "out" / "torn.json").read_text())["residual"] < 3


@pytest.fixture
def only_published(tmp_path, monkeypatch):
    """Know no priors but the published ones, and let no socket be opened."""

    def refuse(*_, **__):
        raise AssertionError("a network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("ncvsd_inverse.priors.files.PACKAGE_WEIGHTS", tmp_path / "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NCVSD_WEIGHTS", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    return tmp_path / "own"


def test_priors_are_listed_whatever_is_broken(run, only_published):
    weights = Path(ncvsd_inverse.__file__).parent / "priors" / "weights"
    shutil.copy(weights / "ncvsd_faces64.json", only_published / "here.json")
    (only_published / "broken.json").write_text('{"name": ')
    (only_published / "ncvsd_ffhq_teacher.json").write_bytes(
        (weights / "ncvsd_faces64.json").read_bytes()
    )
    status, out, err = run("priors")
    assert (status, err) == (0, "")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert list(lines) == ["broken", "here", "ncvsd_ffhq", "ncvsd_ffhq_teacher"]
    assert lines["here"].startswith("3x64x64, Research on restoring")
    assert lines["broken"].startswith("cannot be loaded, ")
    assert lines["ncvsd_ffhq"].startswith("3x256x256, not on this machine; `ncvsd priors ncvsd_ff")
    assert "must be a prior of kind 'diffusion'" in lines["ncvsd_ffhq_teacher"]
    assert json.loads(run("priors", "here")[1])["name"] == "ncvsd_faces64"
    for name, said in (("broken", "it must be JSON"), ("else", "prior must be one of broken")):
        status, out, err = run("priors", name)
        assert (status, out) == (1, "")
        assert said in err


def test_texts_of_cards_are_shown_without_control_characters(run, only_published):
    weights = Path(ncvsd_inverse.__file__).parent / "priors" / "weights"
    card = json.loads((weights / "ncvsd_faces64.json").read_text())
    hostile = "a\x1b[2J\x9b\u202eb"
    for name, changes in (
        ("texts", {"intended_use": hostile, "weaknesses": hostile}),
        ("kind", {"kind": hostile}),
        ("key", {hostile: 1}),
        (hostile, {}),
        ("huge", {"gamma": 10**400, "kind": "x" * 100_000}),
        ("name", {"name": hostile}),
    ):
        (only_published / f"{name}.json").write_text(json.dumps({**card, **changes}))
    (only_published / "folder.json").mkdir()
    status, out, err = run("priors")
    assert (status, err) == (0, "")
    assert out.replace("\n", "").isprintable()
    lines = out.splitlines()
    assert len(lines) == 8  # two of them published
    assert sum("cannot be loaded" in line for line in lines) == 4
    assert all(len(line) < 5000 for line in lines)
    for name in ("texts", "kind", "key", "name", hostile):
        _, out, err = run("priors", name)
        assert (out + err).replace("\n", "").isprintable()


def test_a_published_prior_is_described_without_a_network(run, only_published):
    status, out, _ = run("priors", "ncvsd_ffhq")
    assert status == 0
    for part in (
        "kind: ncvsd",
        "images: 3 x 256 x 256",
        "repository: xypeng9903/ncvsd",
        "file: ncvsd-ffhq256-xs.pkl, about 292 MB",
        "non-commercial",
        "where: not on this machine; it is downloaded",
        str(only_published),
    ):
        assert part in out
    (only_published / "ncvsd-ffhq256-xs.pkl").write_bytes(b"")
    assert "ncvsd-ffhq256-xs.pkl, converted when first used" in run("priors", "ncvsd_ffhq")[1]
    assert "kind: diffusion" in run("priors", "ncvsd_ffhq_teacher")[1]
    status, out, err = run("priors", "someone/faces")
    assert (status, out) == (1, "")
    assert err.startswith("error: there is no someone/faces")


NEITHER = ("--no-check", "--no-statistics")


class Denoises(torch.nn.Module):
    """The posterior mean of smooth pictures."""

    image_channels = 3

    def forward(self, x, sigma):
        return SmoothPrior.of_shape(x.shape[1:]).denoise(x, sigma)


class Store:
    """Where statistics go in these tests."""

    def __init__(self):
        self.kept = []

    def write(self, statistics):
        self.kept.append(statistics)
        return Path("card.json")


def diffusion():
    prior = DiffusionPrior(Denoises(), image_shape=(3, 16, 16))
    prior.statistics_store = Store()
    return prior


def test_statistics_are_measured_and_kept(run, tmp_path, prior):
    prior.kind = diffusion()
    status, out, err = run("statistics", "stand_in", "--images", 4)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "kept in card.json"
    assert "given a noisy image at sigma 0.2: 0." in out
    (of_own,) = prior.kind.statistics_store.kept
    for number in range(3):
        x = 0.3 * torch.randn(1, 3, 20, 18, generator=torch.Generator().manual_seed(number))
        write_image(tmp_path / f"{number}.png", x)
    assert run("statistics", "stand_in", "--data", tmp_path, "--images", 2)[0] == 0
    assert prior.kind.statistics_store.kept[-1] != of_own


def test_what_cannot_be_measured_is_said(run, prior):
    prior.kind = diffusion()
    prior.kind.sigma_max = 0.5
    status, _, err = run("statistics", "stand_in")
    assert status == 1
    assert err.startswith("error: data must be given to measure statistics: its sigma_max is 0.5")
    prior.kind.statistics_store = None
    status, _, err = run("statistics", "stand_in")
    assert (status, err.count("\n")) == (1, 1)
    assert "PRIOR must be a copy of stand_in" in err


def test_settings_of_the_loop_reach_it_and_the_line_says_what_was_done(run, tmp_path, prior):
    prior.kind = SmoothPrior.of_shape((3, 16, 16))
    picture = tmp_path / "picture.png"
    write_image(picture, torch.zeros(1, 3, 16, 16))
    words = [picture, "--simulate", "--task", "inpaint_box", "--prior", "stand_in", "--nfe", 2]
    words += ["-o", tmp_path / "out"]

    def record():
        return json.loads((tmp_path / "out" / "picture.json").read_text())

    status, out, _ = run("solve", *words)
    assert "dB, point estimate, conditioning loop, 2 network calls, " in out
    assert (status, record()["estimate"], record()["asked"]["estimate"]) == (0, "point", None)
    chosen = ["--schedule", "1,0.1", "--sigma-lik", 0.04, "--temperature", 0.8]
    status, out, _ = run("solve", *words, *chosen, "--estimate", "sample")
    assert "is of another estimate, temperature, sigma_lik, schedule: restored again" in out
    assert "dB, sample, conditioning loop, 2 network calls, " in out
    assert (record()["schedule"], record()["sigma_lik"]) == ([1.0, 0.1], 0.04)
    status, out, _ = run("solve", *words, "--samples", 3)
    assert "dB, mean of 3 samples, conditioning loop, 2 network calls a sample, " in out
    status, _, err = run("solve", *words, "--schedule", "1;0.1")
    assert (status, err[:50]) == (1, "error: --schedule must be numbers separated by com")


def test_a_diffusion_prior_takes_steps_and_the_loop_is_named(run, tmp_path, prior):
    prior.kind = diffusion()
    picture = tmp_path / "picture.png"
    write_image(picture, torch.zeros(1, 3, 16, 16))
    words = [picture, "--simulate", "--task", "inpaint_box", "--prior", "stand_in"]
    status, out, _ = run("solve", *words, "--nfe", 4, "-o", tmp_path / "one")
    assert status == 0
    assert "conditioning loop, 4 network calls" in out
    assert len(json.loads((tmp_path / "one" / "picture.json").read_text())["schedule"]) == 4
    assert prior.kind.statistics_store.kept == [prior.kind.statistics]
    status, out, _ = run("solve", *words, "--nfe", 4, "--steps", 2, "-o", tmp_path / "two")
    assert len(json.loads((tmp_path / "two" / "picture.json").read_text())["schedule"]) == 2
    prior.kind = SmoothPrior.of_shape((3, 16, 16))
    status, _, err = run("solve", *words, "--steps", 2, "-o", tmp_path / "three")
    assert (status, err) == (1, "error: --steps must come with a diffusion prior, got stand_in\n")


def test_a_weaker_loop_is_warned_of_in_a_line(run, tmp_path, prior):
    prior.kind = AnySize()
    picture = tmp_path / "picture.png"
    write_image(picture, torch.zeros(1, 3, 16, 16))
    words = [picture, "--simulate", "--task", "inpaint_box", "--prior", "stand_in"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        status, out, err = run("solve", *words, "--nfe", 4, "-o", tmp_path / "out")
    assert status == 0
    assert "gibbs loop" in out
    assert err.startswith("warning: the loop is 'gibbs', the weaker one")
    assert err.count("\n") == 1


def test_a_checkpoint_is_converted(run, tmp_path, monkeypatch):
    from ncvsd_inverse.priors import convert

    came = {}

    class Card:
        kind = "diffusion"
        image_shape = (3, 64, 64)
        name = "theirs"
        training = MappingProxyType({"self_check": "not wanted"})

    def stand_in(src, dst, **options):
        came.update(src=src, dst=dst, **options)
        return Card()

    monkeypatch.setattr(convert, "convert", stand_in)
    target = tmp_path / "theirs.safetensors"
    status, out, err = run("convert", "net.pkl", target, "--licence", "CC0", "--no-statistics")
    assert (status, err) == (0, "")
    untold = ("schedule", "head_channels", "num_heads", "attention_order", "size")
    expected = {
        "src": Path("net.pkl"),
        "dst": target,
        "licence": "CC0",
        "data": convert.UNSAID,
        "check": True,
        **dict.fromkeys(untold),
    }
    assert came == expected
    assert out == (
        f"net.pkl: a diffusion prior of 3x64x64; load_prior({str(tmp_path / 'theirs')!r})\n"
        "self-check: not wanted\n"
    )
    Card.training = {
        "schedule": "cosine, as given",
        "self_check": [{"sigma": 0.5, "noisy": 0.25, "denoised": 0.0123}],
    }
    told = {"schedule": "cosine", "num_heads": 4, "attention_order": "new", "size": 64}
    flat = [text for key, value in told.items() for text in (f"--{key.replace('_', '-')}", value)]
    status, out, err = run("convert", "net.pkl", target, *NEITHER, *flat)
    assert (status, err) == (0, "")
    assert came == {**expected, **told, "check": False, "licence": convert.UNSAID}
    assert out.splitlines()[1:] == [
        "noise schedule: cosine, as given",
        "self-check: mean squared error of a photograph 0.25 to 0.0123 at noise std 0.5",
    ]
    loaded = diffusion()
    monkeypatch.setattr("ncvsd_inverse.cli.convert.load_prior", lambda stem: loaded)
    assert "statistics: measured" in run("convert", "net.pkl", target, "--no-check")[1]
    assert loaded.statistics_store.kept == [loaded.statistics]
    loaded.statistics, loaded.sigma_max = None, 0.5
    assert "statistics: none, its sigma_max" in run("convert", "net.pkl", target, "--no-check")[1]


def test_a_file_that_is_no_checkpoint_is_one_line(run, tmp_path):
    (tmp_path / "net.pkl").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    status, _, err = run("convert", tmp_path / "net.pkl", tmp_path / "theirs")
    assert status == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert names(tmp_path) == ["net.pkl"]


def solve_arguments(photo, **change):
    """Return the arguments of a run that works, with options changed or dropped (None)."""
    options = {"task": "sr4x", "prior": "stand_in", "simulate": "", "nfe": 2, **change}
    flat = []
    for name, value in options.items():
        if value is not None:
            flat += [f"--{name.replace('_', '-')}", *([] if value == "" else [value])]
    return ["solve", photo, *flat]


REAL = {"simulate": None, "sigma_y": 0.05}
"""Of a run on a measurement."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "sr5x"}, "task must be one of"),
        ({"prior": "nowhere"}, "prior must be one of stand_in, got 'nowhere'"),
        ({"nfe": 0}, "nfe must be at least 1"),
        ({"sigma_y": 0}, "--sigma-y must be positive"),
        ({"sigma_y": "much"}, "--sigma-y must be a number or auto, got 'much'"),
        ({"device": "warp_drive"}, "--device must be usable here, got 'warp_drive'"),
        ({"samples": 0}, "--samples must be at least 1"),
        ({"simulate": None}, "--task sr4x must come with --simulate"),
        ({"simulate": None}, "take --task sr with --scale 4"),
        ({**REAL, "task": "deblur_motion"}, "take --task deblur with --kernel FILE"),
        (
            {**REAL, "task": "deblur"},
            "--task deblur must have --kernel FILE, --blur-std S or --blind, got n",
        ),
        ({**REAL, "task": "sr"}, "--scale must be 2, 3, 4 or 8 for --task sr, got None"),
        ({**REAL, "task": "sr", "scale": 4}, "it must have 16 x 16 pixels, as this prior"),
        ({**REAL, "task": "inpaint"}, "--mask must be given for --task inpaint"),
        ({**REAL, "task": "phase_retrieval"}, "it must be an array (.npy or .pt)"),
        ({**REAL, "task": "poisson"}, "--peak must be given for --task poisson"),
        ({**REAL, "task": "mri"}, "it must be an array (.npy or .pt) for mri"),
        ({**REAL, "task": "compressed_sensing"}, "--task must be one of denoise, deblur, sr"),
        ({**REAL, "task": "denoise", "scale": 2}, "--scale must come with --task sr, got denoise"),
        ({**REAL, "task": "deblur", "blur_std": -1}, "--blur-std must be positive"),
        ({"task": "poisson", "sigma_y": 0.1}, "sigma_y must be 1 for photon counts"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"mask": "photo.png"}, "--mask must come with an inpainting task, got sr4x"),
        (
            {"mask": "photo.png", "task": "inpaint_box"},
            "--mask must have two levels, got 242 in photo.png",
        ),
        ({"mask": "nothing.png", "task": "inpaint_box"}, "nothing.png must be a readable picture"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(
    run, tmp_path, photo, monkeypatch, change, message
):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*solve_arguments(photo, out="out", **change))
    assert status == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not [name for name in names(tmp_path) if name not in ("photo.png", "out")]
    assert not (tmp_path / "out").exists() or names(tmp_path / "out") == []


def test_outputs_of_two_pictures_may_not_collide(run, tmp_path, photo):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "photo.png"
    twin.write_bytes(photo.read_bytes())
    arguments = solve_arguments(photo, out=tmp_path / "out")
    status, _, err = run(*arguments[:2], twin, *arguments[2:])
    assert status == 1
    assert "IN must have names that differ" in err


@pytest.mark.parametrize("command", ["demo", "solve"])
def test_an_output_folder_that_cannot_be_made_is_named_before_computing(
    run, tmp_path, photo, prior, command
):
    class Untouched(AnySize):
        def sample(self, u, sigma, *, generator=None):
            raise AssertionError("computed before the output folder was checked")

    prior.kind = Untouched()
    (tmp_path / "file").write_text("in the way")
    arguments = ["demo", "--prior", "stand_in"] if command == "demo" else solve_arguments(photo)
    status, _, err = run(*arguments, "-o", tmp_path / "file" / "out")
    assert status == 1
    assert err.startswith("error: --out must be a writable folder")
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def broken():
        raise KeyError("a bug")

    monkeypatch.setattr(cli.priors, "list_priors", broken)
    monkeypatch.setattr(sys, "argv", ["ncvsd", "priors"])
    with pytest.raises(KeyError, match="a bug"):
        cli.main()
