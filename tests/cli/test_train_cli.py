"""`ncvsd train` and `ncvsd distill`: two commands from pictures to a prior."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ncvsd_inverse import load_prior
from ncvsd_inverse.cli import app
from ncvsd_inverse.training.presets import load_distill_config, load_teacher_config

NETWORK = """
precision = "float32"
warmup_images = 8
[network]
resolution = 8
channels = [16, 16]
blocks = 1
attention = []
"""


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    source = np.random.default_rng(0)
    for number in range(12):
        pixels = source.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's dependencies
def test_two_commands_make_a_prior(tmp_path, pictures):
    (tmp_path / "teacher.toml").write_text("images = 16\nbatch_size = 4\n" + NETWORK)
    (tmp_path / "distill.toml").write_text("images = 16\nbatch_size = 4\n" + NETWORK)
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    out = run("train", tmp_path / "teacher.toml", "--data", pictures, "-o", teacher)
    assert "finished after 16 images" in out
    assert "float32" in out
    words = ["--teacher", teacher, "--data", pictures, "-o", student]
    out = run("distill", tmp_path / "distill.toml", *words, "--seconds", "0")
    assert "stopped, the same command goes on" in out
    out = run("distill", tmp_path / "distill.toml", *words)
    assert "finished after 16 images" in out
    assert "resumed" not in out
    out = run("distill", tmp_path / "distill.toml", *words, "--images", 24)
    assert "resumed after 16 images" in out
    assert '{"step": 4, "images": 16, "resumed": true}' in (student / "log.jsonl").read_text()

    assert load_prior(teacher / "prior").statistics is not None
    prior = load_prior(student / "prior")
    assert prior.card.statistics is not None
    assert prior.generate(2, num_steps=2, seed=0).shape == (2, 3, 8, 8)
    assert list((student / "tensorboard").iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_is_refused_other_pictures_and_another_teacher(tmp_path, pictures):
    for name, stage in (("teacher", "train"), ("distill", "distill")):
        (tmp_path / f"{name}.toml").write_text("images = 4\nbatch_size = 4\n" + NETWORK)
        teacher = ["--teacher", tmp_path / "teacher"] if stage == "distill" else []
        words = [stage, tmp_path / f"{name}.toml", *teacher, "--data", pictures]
        run(*words, "-o", tmp_path / name)
    run("train", tmp_path / "teacher.toml", "--images", 8, "--data", pictures, "-o", teacher[1])
    result = CliRunner().invoke(app, [*map(str, words), "-o", str(tmp_path / name)])
    assert "other settings: teacher_sha256 was" in str(result.exception)
    Image.new("RGB", (8, 8)).save(pictures / "0.png")
    for place, expected in ((name, "data_sha256 was"), ("other", "")):
        result = CliRunner().invoke(app, [*map(str, words), "-o", str(tmp_path / place)])
        assert expected in str(result.exception or "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrong_pictures_and_settings_are_named(tmp_path, pictures):
    (tmp_path / "teacher.toml").write_text("images = 16\nbatch_size = 4\n" + NETWORK)
    (tmp_path / "typo.toml").write_text("images = 16\nlearnin_rate = 4\n" + NETWORK)
    (tmp_path / "type.toml").write_text('images = 16\nlearning_rate = "fast"\n' + NETWORK)
    words = ["--data", str(pictures), "-o", str(tmp_path / "run")]
    for name, error, message in [
        ("typo.toml", ValueError, "unknown keys: learnin_rate"),
        ("type.toml", (TypeError, ValueError), "learning_rate"),
    ]:
        result = CliRunner().invoke(app, ["train", str(tmp_path / name), *words])
        assert isinstance(result.exception, error)
        assert message in str(result.exception)
    Image.new("RGB", (9, 8)).save(pictures / "odd.png")
    result = CliRunner().invoke(app, ["train", str(tmp_path / "teacher.toml"), *words])
    assert isinstance(result.exception, ValueError)
    assert "odd.png" in str(result.exception)


@pytest.mark.parametrize(
    ("command", "load"), [("train", load_teacher_config), ("distill", load_distill_config)]
)
def test_the_settings_of_a_preset_are_shown_as_a_file(tmp_path, command, load):
    shown = run(command, "--show-config", "faces64")
    (tmp_path / "own.toml").write_text(shown)
    assert load(tmp_path / "own.toml") == load("faces64")
    result = CliRunner().invoke(app, [command, "--show-config", "face64"])
    assert "did you mean faces64" in str(result.exception)
