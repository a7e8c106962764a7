import asyncio
import base64
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ncvsd_inverse import DivergenceError, load_prior
from ncvsd_inverse.cli import app as commands
from ncvsd_inverse.cli.app import Asked, Shown, look, make_page, restore
from ncvsd_inverse.images import read_picture
from ncvsd_inverse.numerics import draw_normal

ROOT = Path(__file__).parents[2]
CAT = ROOT / "ncvsd_inverse" / "assets" / "photographs" / "cat.png"
CPU = torch.device("cpu")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)

quiet = pytest.mark.filterwarnings("ignore:the schedule has one sweep only")


class Gaussian:
    """A prior of any size, or of one, whose draws are random."""

    nfe_per_sample = 1

    def __init__(self, image_shape=None):
        self.image_shape = image_shape

    def sample(self, u, sigma, *, generator=None):
        return u / (1 + sigma**2) + 0.1 * draw_normal(u, generator)


def picture_file(path, height=24, width=20, *, mode="RGB", bits=8):
    values = np.random.default_rng(0).random((height, width, len(mode)))
    if bits == 16:
        Image.fromarray(np.uint16(65535 * values[..., 0])).save(path)
    else:
        Image.fromarray(np.uint8(255 * values).squeeze(), mode).save(path)
    return path


@pytest.fixture
def ask(tmp_path):
    """Restore with a stand-in, quickly; other settings are those of the page."""

    def run(prior=None, **settings):
        settings = {"noise": "0.05", "calls": 2, "draws": 1} | settings
        if "picture" not in settings:
            settings["picture"] = picture_file(tmp_path / "photo.png")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return restore(Asked(**settings), prior or Gaussian(), CPU, tmp_path)

    return run


def test_a_noisy_picture_gives_estimate_draws_std_and_a_file(tmp_path):
    calls = []
    noisy = np.asarray(Image.open(CAT).convert("RGB").resize((48, 32)), float)
    noisy = noisy + np.random.default_rng(0).normal(0, 12, noisy.shape)
    path = tmp_path / "noisy.png"
    Image.fromarray(np.uint8(noisy.clip(0, 255))).save(path)
    asked = Asked(path, calls=2, draws=3)
    shown = restore(
        asked, load_prior("ncvsd_natural"), CPU, tmp_path, lambda *call: calls.append(call)
    )
    assert calls == [(1, 2), (2, 2)]
    assert (shown.measurement == np.asarray(Image.open(path))).all()
    assert len(shown.draws) == 3
    for pixels in (shown.estimate, *shown.draws):
        assert (pixels.shape, pixels.dtype) == ((32, 48, 3), np.uint8)
    assert (shown.std.shape, shown.std.max()) == ((32, 48), 255)
    assert 0 < shown.white < 1
    assert not (shown.draws[0] == shown.draws[1]).all()
    for words in ("residual", "noise std", "found", "mean of 3 samples", "2 network calls", " s."):
        assert words in shown.line
    assert shown.file.name == "noisy_restored.png"
    assert (np.asarray(Image.open(shown.file)) == shown.estimate).all()
    left = {entry.name for entry in tmp_path.iterdir()} - {"noisy.png", shown.file.parent.name}
    assert not left  # what was written on the way is gone


def test_one_draw_is_a_point_estimate_and_the_seed_decides(ask):
    shown, again, other = ask(), ask(), ask(seed=1)
    assert isinstance(shown, Shown)
    assert (shown.std, shown.draws) == (None, ())
    assert "noise std 0.05 as given" in shown.line
    assert (shown.estimate == again.estimate).all()
    assert not (shown.estimate == other.estimate).all()


def test_what_is_painted_is_filled_and_the_rest_nearly_kept(ask, tmp_path):
    path = picture_file(tmp_path / "photo.png")
    painted = np.zeros((48, 40), bool)  # of another size than the picture
    painted[16:32, 10:20] = True
    shown = ask(picture=path, task="inpaint", painted=painted, noise="0.002")
    hole = np.zeros((24, 20), bool)
    hole[8:16, 5:10] = True
    seen, truth = shown.measurement.astype(int), np.asarray(Image.open(path)).astype(int)
    assert (abs(seen[hole] - 128) <= 1).all()
    assert (seen[~hole] == truth[~hole]).all()
    assert abs(shown.estimate[~hole].astype(int) - truth[~hole]).max() < 4
    assert abs(shown.estimate[hole].astype(int) - truth[hole]).max() > 40


def test_transparent_places_are_missing_too(ask, tmp_path):
    pixels = np.asarray(Image.open(picture_file(tmp_path / "a.png", mode="RGBA"))).copy()
    pixels[..., 3] = 255
    pixels[4:8, 4:8, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shown = ask(picture=tmp_path / "a.png", task="inpaint", noise="0.002")
    assert (abs(shown.measurement[4:8, 4:8].astype(int) - 128) <= 1).all()
    assert read_picture(shown.file).alpha is None


def test_kernel_std_and_scale_reach_the_operator(ask, tmp_path):
    kernel = np.zeros((5, 5), np.uint8)
    kernel[2, 1:4] = 255
    Image.fromarray(kernel).save(tmp_path / "kernel.png")
    by_kernel = ask(task="deblur", kernel=tmp_path / "kernel.png")
    by_std = ask(task="deblur", blur_std=1.0)
    assert by_kernel.estimate.shape == by_std.estimate.shape == (24, 20, 3)
    assert not (by_kernel.estimate == by_std.estimate).all()
    assert ask(task="sr", scale=3).estimate.shape == (72, 60, 3)


def test_depth_and_grey_come_back(ask, tmp_path):
    shown = ask(picture=picture_file(tmp_path / "deep.png", bits=16, mode="L"))
    assert shown.estimate.shape == (24, 20)
    assert read_picture(shown.file).bits == 16


@pytest.mark.parametrize(
    ("settings", "size", "note"),
    [
        ({}, (64, 40), "brought from 160 x 100 to 64 x 40 pixels"),
        ({"task": "deblur", "blur_std": 1.0}, (64, 64), "the middle of the picture, 64 x 64 of"),
        ({"task": "sr", "scale": 2}, (64, 64), "the middle of the picture, 32 x 32 of its 160"),
        ({"largest": 600}, (160, 100), ""),
    ],
)
def test_a_large_picture_is_made_smaller_with_a_word(ask, tmp_path, settings, size, note):
    path = picture_file(tmp_path / "large.png", 100, 160)
    shown = ask(picture=path, calls=1, **{"largest": 64} | settings)
    assert shown.estimate.shape[1::-1] == size
    assert note in shown.line
    assert note or "Note: the picture" not in shown.line


def test_a_larger_one_goes_in_tiles_with_a_word(ask, tmp_path):
    path = picture_file(tmp_path / "long.png", 16, 600)
    assert "in tiles of 512" in ask(picture=path, calls=1, largest=600).line
    assert "tiles" not in ask(picture=path, calls=1).line


def test_a_prior_of_one_size_gets_it(ask, tmp_path):
    path = picture_file(tmp_path / "photo.png", 40, 60)
    prior = Gaussian((3, 32, 32))
    assert ask(prior, picture=path).estimate.shape == (32, 32, 3)
    painted = np.zeros((40, 60), bool)
    painted[10:20, 25:35] = True
    shown = ask(prior, picture=path, task="inpaint", painted=painted)
    assert shown.estimate.shape == (32, 32, 3)
    with pytest.raises(ValueError, match="must have 32 x 32 pixels"):
        ask(prior, picture=path, task="deblur", blur_std=1.0)


def test_what_one_paints_on_is_small_and_upright(tmp_path):
    turned = Image.open(picture_file(tmp_path / "a.png", 400, 1000))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.jpg", exif=exif)
    assert look(tmp_path / "a.jpg").shape == (800, 320, 3)


# The page itself.


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("page")

    async def make():  # without a loop gradio would make some and never close them
        return make_page(Gaussian(), "stand_in", CPU, folder)

    return asyncio.run(make())


@pytest.fixture
def page(blocks):
    """The functions of the page by name, one that presses its button, and a tab of a browser."""
    functions = {function.name: function.fn for function in blocks.fns.values()}
    tab = SimpleNamespace(session_hash="one")

    def press(path, wrong="noise", kernel=None, blur_std=2, scale=2, canvas=None, **settings):
        progress = settings.pop("progress", lambda *args, **named: None)
        chosen = {"noise": "0.05", "calls": 1, "draws": 2, "seed": 0, "largest": 512} | settings
        asked = (path, wrong, kernel, blur_std, scale, canvas, *chosen.values())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return functions["press"](*asked, tab, progress=progress)

    return functions, press, tab


@quiet
def test_pressing_the_button_returns_what_is_shown(page, tmp_path):
    _, press, _ = page
    layer = np.zeros((24, 20, 4), np.uint8)
    layer[5:9, 5:9, 3] = 255
    path = str(picture_file(tmp_path / "photo.png"))
    canvas = {"background": None, "layers": [layer], "composite": None}
    seen, estimate, std, draws, line, download = press(path, "missing parts", canvas=canvas)
    assert (abs(seen[5:9, 5:9].astype(int) - 128) <= 1).all()
    assert estimate.shape == seen.shape == (24, 20, 3)
    assert std.label.startswith("Std of the draws, white")
    assert len(draws) == 2
    assert line.startswith("Noise std 0.05 as given, residual")
    assert Path(download.value["path"]).name == "photo_restored.png"


@quiet
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path": None}, "there is no picture yet: drop one first"),
        ({"content": b"none"}, r"photo.png must be a readable picture: it is none of BMP"),
        ({"noise": "loud"}, r"noise level must be a number or auto, got 'loud'"),
        ({"noise": "-1"}, r"noise level must be positive"),
        ({"draws": 17}, r"draws must be at most 16, got 17"),
        ({"calls": 0}, r"network calls must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be at least 0, got -1"),
        ({"seed": None}, r"seed must be given"),
        ({"largest": 1}, r"longest side must be at least 64, got 1"),
        ({"wrong": "missing parts"}, r"nothing is painted: paint over what is missing"),
        ({"wrong": "blur", "blur_std": None}, r"this task must have kernel FILE, blur std S or"),
        ({"wrong": "blur", "blur_std": 1000}, r"blur std must be at most 100 pixels, got 1000"),
        ({"wrong": "blur", "kernel": "photo.png"}, r"its sides must be at least those of the"),
    ],
)
def test_what_is_wrong_is_said_in_words(page, tmp_path, settings, said, capsys):
    _, press, _ = page
    path = picture_file(tmp_path / "photo.png")
    if "content" in settings:
        path.write_bytes(settings.pop("content"))
    if "kernel" in settings:
        settings["kernel"] = str(picture_file(tmp_path / "kernel.png", 31, 31))
    _, estimate, std, draws, line, download = press(**{"path": str(path)} | settings)
    assert (estimate, std, draws, download) == (None, None, None, None)
    assert re.match(rf"\*\*Not restored\*\*: {said}", line), line
    assert "--" not in line
    assert str(tmp_path) not in line
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_of_our_own_is_named_and_its_traceback_stays_in_the_terminal(
    page, tmp_path, monkeypatch, capsys
):
    _, press, _ = page

    def fail(*args, **settings):
        raise KeyError("lost")

    monkeypatch.setattr("ncvsd_inverse.solve", fail)
    *_, line, _ = press(str(picture_file(tmp_path / "photo.png")))
    assert line == "**Not restored**, by an error of this program's own, KeyError: 'lost'"
    assert "Traceback" in capsys.readouterr().err


def test_what_diverges_comes_with_advice(page, tmp_path, monkeypatch):
    _, press, _ = page

    def fail(*args, **settings):
        raise DivergenceError("a linear solve fell short")

    monkeypatch.setattr("ncvsd_inverse.solve", fail)
    *_, line, _ = press(str(picture_file(tmp_path / "photo.png")))
    assert "a linear solve fell short. Is it the right blur?" in line


@quiet
def test_stop_ends_it_at_the_next_call(page, tmp_path):
    functions, press, tab = page
    told = []

    def progress(place, what, **unit):
        told.append(place)
        functions["stop"](tab)

    path = str(picture_file(tmp_path / "photo.png"))
    assert press(path, calls=4, progress=progress)[4] == "**Not restored**: it was stopped"
    assert told == [0]
    assert press(path, calls=4)[4].startswith("Noise std")


def test_a_dropped_picture_is_shown_and_ready_to_be_painted_on(page, tmp_path):
    show = page[0]["show"]
    path = picture_file(tmp_path / "photo.png")
    seen, canvas, line, *_ = show(str(path))
    assert (seen == np.asarray(Image.open(path))).all()
    assert (canvas["background"] == seen).all()
    assert (canvas["layers"], line) == ([], "")
    path.write_bytes(b"none")
    assert show(str(path))[:2] == (None, None)
    assert "photo.png must be a readable picture" in show(str(path))[2]
    assert show(None)[:3] == (None, None, "")


def test_without_the_extra_the_command_names_it(monkeypatch):
    for variable in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(variable, "as it was")  # and will be, as the command sets it
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(commands, ["app"])
    assert isinstance(done.exception, ImportError)
    assert "pip install 'ncvsd-inverse[app]'" in str(done.exception)


# In a browser.


class Chromium:
    """A page of headless Chromium, driven through pipes.

    Source: Chrome DevTools Protocol.
    """

    def __init__(self, folder):
        ours, theirs = os.pipe(), os.pipe()

        def connect():
            # It reads commands from 3 and answers on 4, which may be taken.
            read, write = os.dup(ours[0]), os.dup(theirs[1])
            os.dup2(read, 3)
            os.dup2(write, 4)

        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")
        options += ("--window-size=1400,1000", f"--user-data-dir={folder}", "about:blank")
        self.process = subprocess.Popen(
            [BROWSER, *options], preexec_fn=connect, close_fds=False, stderr=subprocess.DEVNULL
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.commands, self.answers = open(ours[1], "wb", 0), open(theirs[0], "rb")  # noqa: PTH123, SIM115
        self.numbers = itertools.count(1)
        self.asked_for = set()
        self.session = {}
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder.parent))
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)[
                "sessionId"
            ]
        }
        self.call("Network.enable")

    def close(self):
        self.process.terminate()
        self.process.wait()
        self.commands.close()
        self.answers.close()

    def call(self, method, **params):
        number = next(self.numbers)
        command = {"id": number, "method": method, "params": params, **self.session}
        self.commands.write(json.dumps(command).encode() + b"\0")
        while True:
            answer = json.loads(b"".join(iter(lambda: self.answers.read(1), b"\0")))
            if answer.get("method") == "Network.requestWillBeSent":
                self.asked_for.add(answer["params"]["request"]["url"])
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script):
        """Return the value of some JavaScript."""
        done = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, script, seconds=60):
        """Return the value of some JavaScript as soon as it is true."""
        return self.wait_until(lambda: self.run(script), seconds)

    def wait_until(self, found, seconds=60):
        """Return what a function returns as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := found()):
            assert time.monotonic() < end
            time.sleep(0.1)
        return value

    def drop(self, selector, path):
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def drag(self, start, end):
        for number in range(11):
            place = {
                axis: begun + (ended - begun) * number / 10
                for axis, begun, ended in zip("xy", start, end, strict=True)
            }
            kind = "mousePressed" if number == 0 else "mouseMoved"
            self.call(
                "Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1,
                **place,
            )  # fmt: skip
        self.call(
            "Input.dispatchMouseEvent", type="mouseReleased", button="left", clickCount=1, **place
        )

    def picture(self, selector):
        """Return the pixels of a picture of the page, as the server sent them."""
        text = self.run(f"""fetch(document.querySelector({selector!r}).src)
            .then(answer => answer.arrayBuffer())
            .then(sent => btoa(String.fromCharCode(...new Uint8Array(sent))))""")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.fixture
def served(tmp_path):
    """The command as one starts it: its address and its process."""
    pytest.importorskip("gradio")
    (tmp_path / "tmp").mkdir()
    for port in range(7861 + os.getpid() % 1000, 65000, 1009):
        server = subprocess.Popen(
            [sys.executable, "-m", "ncvsd_inverse.cli", "app", "--port", str(port)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = ""
        while (line := server.stdout.readline()) and "open http" not in line:
            said += line
        if line:
            break
        assert "must be free to use" in said, said
    yield line.split()[1], server
    server.kill()
    server.communicate()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_in_a_browser_one_drops_a_picture_paints_presses_and_sees(served, tmp_path):
    address, server = served
    assert address.startswith("http://127.0.0.1:")
    browser = Chromium(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=address)
        for part in ("#picture input[type=file]", "#restore", "#line"):
            browser.wait(f"document.querySelector({part!r}) !== null")
        line = "document.querySelector('#line').innerText.trim()"

        # Before there is a picture, it says so.
        browser.wait(f"document.querySelector('#restore').click(), {line}")
        assert browser.run(line) == "Not restored: there is no picture yet: drop one first"

        browser.drop("#picture input[type=file]", CAT)
        browser.wait("document.querySelector('#measurement img') !== null")
        assert browser.run(line) == ""
        browser.run("""document.querySelector("#task input[value='missing parts']").click()""")
        browser.wait("document.querySelector('#canvas canvas') !== null")
        time.sleep(1)  # it is drawn, fitted and then takes strokes
        x, y, width, height = browser.run(
            "(box => [box.x, box.y, box.width, box.height])"
            "(document.querySelector('#canvas canvas').getBoundingClientRect())"
        )
        middle = x + width / 2, y + height / 2
        browser.drag((middle[0] - 40, middle[1]), (middle[0] + 40, middle[1]))
        time.sleep(1)  # the editor sends a stroke after a while
        browser.run("document.querySelector('#restore').click()")
        said = browser.wait(line, 120)
        assert re.match(r"Residual .*mean of 4 samples.* 4 network calls a sample", said)

        browser.wait("document.querySelectorAll('#draws img').length >= 4")
        truth = np.asarray(Image.open(CAT).convert("RGB")).astype(int)
        seen, estimate, std = (
            browser.picture(f"#{name} img") for name in ("measurement", "estimate", "std")
        )
        hidden = (abs(seen.astype(int) - 128) <= 1).all(-1)
        assert hidden[64, 64]
        assert 50 < hidden.sum() < hidden.size / 4
        assert (seen[~hidden] == truth[~hidden]).all()
        assert estimate.shape == truth.shape
        assert abs(estimate.astype(int) - truth)[~hidden].mean() < 8
        assert std[hidden].mean() > 4 * std[~hidden].mean()
        file = tmp_path / "cat_restored.png"
        browser.run("document.querySelector('#download').click()")
        browser.wait_until(file.exists)
        assert (np.asarray(Image.open(file)) == estimate).all()
        others = {
            url for url in browser.asked_for if not url.startswith((address, "data:", "blob:"))
        }
        assert not others  # nothing is fetched from elsewhere
    finally:
        browser.close()
    assert list((tmp_path / "tmp").glob("ncvsd-app-*"))
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0
    assert not list((tmp_path / "tmp").iterdir())  # nothing is kept
