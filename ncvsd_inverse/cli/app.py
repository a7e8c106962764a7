"""`ncvsd app`: a page in the browser on which one restores a picture."""

import os
import re
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

import ncvsd_inverse
from ncvsd_inverse import DivergenceError
from ncvsd_inverse.checks import check_count
from ncvsd_inverse.cli.folder import (
    as_it_came,
    cut_rim,
    describe_result,
    read_sigma_y,
    std_picture,
    suffix_for,
)
from ncvsd_inverse.cli.inputs import in_tiles, load_named, sides_of
from ncvsd_inverse.cli.models import SCALES, Model
from ncvsd_inverse.cli.options import Device, PriorName
from ncvsd_inverse.images import (
    SUFFIXES,
    Picture,
    centre_crop,
    read_picture,
    resize_cover,
    write_image,
    write_picture,
)
from ncvsd_inverse.machine import extra
from ncvsd_inverse.priors.tiled import TILE
from ncvsd_inverse.protocols import Prior, PriorTraits

if TYPE_CHECKING:
    from gradio import Blocks

__all__ = ["Asked", "Shown", "app", "look", "make_page", "restore"]

OFFERED = {
    "noise": "denoise",
    "blur": "deblur",
    "too small": "sr",
    "missing parts": "inpaint",
}
"""What may be wrong with a picture, and the task of `ncvsd solve` that undoes it."""

MOST_DRAWS = 16
MOST_CALLS = 20

PAINTED_SIDE = 800
"""Longest side in pixels of the picture that one paints on."""

FAILURES = (OSError, ValueError, MemoryError, RuntimeError)
"""What goes wrong with a picture or a setting; other errors are our own."""

FORGET_AFTER = 3600
"""Seconds after which the page's copies of pictures are removed, and between looks for them."""

Pixels = np.ndarray
"""A picture of 8 bits, (H, W) or (H, W, 3)."""

STD = "Std of the draws"

PANEL: Mapping[str, Any] = {
    "format": "png",
    "interactive": False,
    "buttons": ["download", "fullscreen"],
    "height": 340,
    "min_width": 240,
}
"""How the page shows a picture."""

STYLE = """
#measurement img, #estimate img, #std img {width: 100%; height: 100%; object-fit: contain}
#draws .grid-wrap {padding-top: 2.2rem}
#draws .thumbnail-item {max-height: 138px}
"""
"""Small pictures are shown enlarged; draws lie below the panel's label."""

INTRODUCTION = """# Restore a picture

Drop a picture, say what is wrong with it, and press **Restore**. All is computed on {where}, with
the prior **{prior}**; no picture leaves it. What a measurement does not say is invented: the std of
the draws shows where."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What the page asks for.

    Attributes:
        picture: the file; None if there is none yet.
        task: of `ncvsd solve`, one of the values of `OFFERED`.
        kernel, blur_std, scale: of its task; those of others are ignored.
        painted: True where the picture is to be filled, of any size, (H, W); None: nowhere.
        noise: the noise std, or "auto".
        calls: network calls for each draw.
        draws: 1 for a point estimate; several for draws, their mean and their std.
        seed: the same gives the same result.
        largest: longest side of what is restored, pixels. A field that was emptied is None.
    """

    picture: Path | None
    task: str = "denoise"
    kernel: Path | None = None
    blur_std: float | None = None
    scale: int | None = None
    painted: np.ndarray | None = None
    noise: str = "auto"
    calls: int | None = 4
    draws: int | None = 4
    seed: int | None = 0
    largest: int | None = TILE


@dataclass(frozen=True, eq=False)
class Shown:
    """What the page shows.

    Attributes:
        line: what was done, in words.
        measurement, estimate: pictures.
        std: None for one draw; white is `white`.
        draws: posterior samples, none for a point estimate.
        file: the estimate with the depth and opacity of the picture.
    """

    line: str
    measurement: Pixels
    estimate: Pixels
    std: Pixels | None
    white: float
    draws: tuple[Pixels, ...]
    file: Path


def restore(
    asked: Asked,
    prior: Prior,
    where: torch.device,
    folder: Path,
    on_call: Callable[[int, int], None] = lambda call, calls: None,
) -> Shown:
    """Restore a picture as the page asks.

    Args:
        asked: the picture and the settings.
        prior: the prior, on its device.
        where: that device.
        folder: where the estimate's file is written, in a folder of its own.
        on_call: called after each network call with its number, from 1, and how many there are.

    Raises:
        ValueError: if a setting is out of range, or the picture cannot be read or does not fit.
    """
    if asked.picture is None:
        raise ValueError("there is no picture yet: drop one first")
    calls = _check_given("network calls", asked.calls, most=MOST_CALLS)
    draws = _check_given("draws", asked.draws, most=MOST_DRAWS)
    seed = _check_given("seed", asked.seed, least=0)
    noise = read_sigma_y(str(asked.noise).strip())
    model_of = {
        "deblur": {"kernel": asked.kernel, "blur_std": asked.blur_std},
        "sr": {"scale": asked.scale},
    }
    with tempfile.TemporaryDirectory(dir=folder) as work, warnings.catch_warnings(record=True) as w:
        warnings.simplefilter("always", UserWarning)
        path, mask, notes = _prepare(asked, prior, Path(work))
        model = Model(asked.task, mask=mask, **model_of.get(asked.task, {}))  # type: ignore[arg-type]
        measured = model.reader(prior)(path, (seed,))
        result = ncvsd_inverse.solve(
            measured.y.to(where),
            operator=measured.operator,
            prior=prior,
            nfe=calls,
            sigma_y=noise,
            num_samples=draws,
            seed=seed,
            callback=lambda progress: on_call(progress.call, progress.calls),
        )
        notes += [str(warning.message) for warning in w if warning.category is UserWarning]
    restored = as_it_came(measured, result.x0)
    if max(sides_of(result.x0)) > TILE:
        notes.append(f"the network saw it in tiles of {TILE} pixels")
    name = f"{asked.picture.stem}_restored{suffix_for(restored)}"
    file = Path(tempfile.mkdtemp(dir=folder)) / name
    write_picture(file, restored)
    std, white = (None, 0.0) if result.std is None else std_picture(result.std, measured.rim)
    given = "" if noise == "auto" else f"noise std {noise:g} as given, "
    several = result.samples[:, :1] if draws > 1 else ()
    return Shown(
        line="\n\n".join((f"{given}{describe_result(result)}.", *(f"Note: {n}." for n in notes))),
        measurement=_pixels(measured.y),
        estimate=_pixels(restored.x),
        std=None if std is None else _pixels(std),
        white=white,
        draws=tuple(_pixels(cut_rim(draw, measured.rim)) for draw in several),
        file=file,
    )


def _check_given(name: str, value: int | None, *, least: int = 1, most: int | None = None) -> int:
    """Return what a field holds; ValueError if it was emptied or is out of range."""
    if value is None:
        raise ValueError(f"{name} must be given")
    return check_count(name, value, least=least, most=most)


def look(path: Path) -> Pixels:
    """Return a picture as one paints on it; ValueError if it cannot be read."""
    x = read_picture(path).x
    height, width = sides_of(x)
    share = min(1.0, PAINTED_SIDE / max(height, width))
    sides = max(1, round(share * height)), max(1, round(share * width))
    return _pixels(x if share == 1 else resize_cover(x, sides))


def _prepare(asked: Asked, prior: Prior, work: Path) -> tuple[Path, Path | None, list[str]]:
    """Write picture and mask as they are restored: not larger than asked for, nor than fits.

    Returns:
        The picture's file, the mask's, and what was done, in words.
    """
    assert asked.picture is not None
    picture = read_picture(asked.picture)
    x, alpha = picture.x, picture.alpha
    known = None
    if asked.task == "inpaint":
        known = _known(asked.painted, alpha, sides_of(x))
        alpha = None  # what is hidden is there in the end
    sides, note = _sides_for(asked, prior, sides_of(x))
    if sides != sides_of(x):
        shape = centre_crop if asked.task in ("deblur", "sr") else resize_cover
        x = shape(x, sides)
        alpha = None if alpha is None else shape(alpha, sides).clamp(0, 1)
        # A pixel that holds a little of what was painted is not known.
        known = None if known is None else (shape(known, sides) > 0.99).float()
    bits = 16 if picture.bits == 32 and x.shape[1] == 3 else picture.bits
    path = work / ("picture.tif" if bits == 32 else "picture.png")
    write_picture(path, Picture(x, bits, alpha))
    if known is None:
        return path, None, note
    mask = work / "mask.png"
    write_image(mask, 2 * known - 1)
    return path, mask, note


def _known(painted: np.ndarray | None, alpha: Tensor | None, sides: tuple[int, int]) -> Tensor:
    """Return 1 where a picture is known and 0 where it is painted over or transparent."""
    known = torch.ones(1, 1, *sides) if alpha is None else (alpha > 0.5).float()
    if painted is not None and painted.any():
        missing = torch.from_numpy(painted.astype(np.float32))[None, None]
        known = known * (1 - torch.nn.functional.interpolate(missing, sides, mode="nearest"))
    if bool(known.all()):
        raise ValueError("nothing is painted: paint over what is missing")
    if not bool(known.any()):
        raise ValueError("everything is painted: leave something of the picture")
    return known


def _sides_for(
    asked: Asked, prior: Prior, sides: tuple[int, int]
) -> tuple[tuple[int, int], list[str]]:
    """Return the height and width that a picture is brought to, and a word on it."""
    of_blur = asked.task in ("deblur", "sr")
    fixed = PriorTraits.of(prior).image_shape
    limit = _check_given("longest side", asked.largest, least=64)
    if asked.task == "sr":
        limit = max(limit // (asked.scale or 1), 1)
    if fixed is not None:
        new = sides if of_blur else (fixed[1], fixed[2])
    elif of_blur:
        new = min(sides[0], limit), min(sides[1], limit)
    else:
        share = min(1.0, limit / max(sides))
        new = max(1, round(share * sides[0])), max(1, round(share * sides[1]))
    if new == sides:
        return sides, []
    was, now = (f"{width} x {height}" for height, width in (sides, new))
    if of_blur:
        return new, [
            f"only the middle of the picture, {now} of its {was} pixels, as one made smaller would "
            "be blurred otherwise; under Settings, a longer side takes more"
        ]
    why = (
        "the prior takes no other" if fixed else "a longer longest side, under Settings, keeps more"
    )
    return new, [f"the picture was brought from {was} to {now} pixels; {why}"]


def _pixels(x: Tensor) -> Pixels:
    """Return a picture (1, C, H, W) as a browser shows it."""
    values = ((x[0].detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round()
    pixels: np.ndarray = values.to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels if pixels.shape[2] == 3 else pixels[..., 0]


def _in_words(error: Exception, files: Mapping[str, str]) -> str:
    """Return an error as the page says it: no options of a command line, no folders."""
    text = " ".join(str(error).split()) or type(error).__name__
    for path, name in files.items():
        text = text.replace(path, name)
    if isinstance(error, DivergenceError):
        return (
            f"{text}. Is it the right blur? A higher noise level, under Settings, makes it easier"
        )
    text = re.sub(r"--task \w+", "this task", text.replace("--sigma-y", "noise level"))
    return re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda option: option[1].replace("-", " "), text)


def make_page(prior: Prior, name: str, where: torch.device, folder: Path) -> "Blocks":
    """Return the page.

    Args:
        prior: the prior, on its device.
        name: what it is called.
        where: that device.
        folder: where files to download are written.
    """
    with extra("app"):
        import gradio as gr

    stopped: set[str] = set()

    def show(path: str | None) -> tuple[object, ...]:
        """Show a picture that was dropped, ready to be painted on."""
        blank = None, gr.Image(None, label=STD), None, gr.DownloadButton(interactive=False)
        if path is None:
            return None, None, "", *blank
        try:
            pixels = look(Path(path))
        except FAILURES as error:
            return None, None, _refusal(error, path), *blank
        on_canvas = {"background": pixels, "layers": [], "composite": None}
        return pixels, on_canvas, "", *blank

    def press(
        path: str | None,
        wrong: str,
        kernel: str | None,
        blur_std: float | None,
        scale: int,
        canvas: dict[str, Any] | None,
        noise: str,
        calls: int | None,
        draws: int | None,
        seed: int | None,
        largest: int | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio asks for one
    ) -> tuple[object, ...]:
        """Restore the picture."""
        stopped.discard(request.session_hash)

        def tell(call: int, of: int) -> None:
            if request.session_hash in stopped:
                raise InterruptedError("it was stopped")
            progress((call, of), "network calls", unit="calls")

        try:
            progress(0, "reading")
            shown = restore(
                Asked(
                    picture=None if path is None else Path(path),
                    task=OFFERED[wrong],
                    kernel=None if kernel is None else Path(kernel),
                    blur_std=blur_std if kernel is None else None,
                    scale=scale,
                    painted=_painted(canvas),
                    noise=noise,
                    calls=calls,
                    draws=draws,
                    seed=seed,
                    largest=largest,
                ),
                prior,
                where,
                folder,
                tell,
            )
        except FAILURES as error:
            return gr.skip(), None, None, None, _refusal(error, path, kernel), None
        except Exception as error:
            traceback.print_exc()
            kind = type(error).__name__
            said = f"**Not restored**, by an error of this program's own, {kind}: {error}"
            return gr.skip(), None, None, None, said, None
        return (
            shown.measurement,
            shown.estimate,
            gr.Image(shown.std, label=f"{STD}, white {shown.white:.2g}"),
            list(shown.draws),
            shown.line[:1].upper() + shown.line[1:],
            gr.DownloadButton(value=shown.file, interactive=True),
        )

    def stop(request: gr.Request) -> None:
        """End what this browser tab asked for, at its next network call."""
        stopped.add(request.session_hash)

    def ask(wrong: str) -> tuple[object, ...]:
        """Show what a task needs to know."""
        return tuple(gr.Column(visible=OFFERED[wrong] == task) for task in groups)

    with gr.Blocks(
        title="ncvsd-inverse", analytics_enabled=False, delete_cache=(FORGET_AFTER, FORGET_AFTER)
    ) as page:
        gr.Markdown(INTRODUCTION.format(prior=name, where=_machine(where)))
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                picture = gr.File(
                    label="Picture", file_types=list(SUFFIXES), height=140, elem_id="picture"
                )
                wrong = gr.Radio(
                    list(OFFERED), value="noise", label="What is wrong", elem_id="task"
                )
                groups = {}
                with gr.Column(visible=False) as groups["deblur"]:
                    blur_std = gr.Number(
                        2, label="Std of the blur, pixels", info="out of focus, or seen through air"
                    )
                    kernel = gr.File(
                        label="Or its kernel, a picture or array", height=140, elem_id="kernel"
                    )
                with gr.Column(visible=False) as groups["sr"]:
                    scale = gr.Radio(list(SCALES), value=2, label="How many times larger")
                with gr.Column(visible=False) as groups["inpaint"]:
                    canvas = gr.ImageEditor(
                        label="Paint over what is missing",
                        sources=[],
                        transforms=[],
                        brush=gr.Brush(colors=["#e4007c"], color_mode="fixed"),
                        layers=gr.LayerOptions(allow_additional_layers=False, disabled=True),
                        buttons=[],
                        format="png",
                        elem_id="canvas",
                    )
                with gr.Row():
                    calls = gr.Slider(
                        1,
                        MOST_CALLS,
                        4,
                        step=1,
                        label="Network calls",
                        info="4 are quick, 10 a little better",
                        min_width=140,
                    )
                    draws = gr.Slider(
                        1,
                        MOST_DRAWS,
                        4,
                        step=1,
                        label="Draws",
                        info="1: the best single picture, no std",
                        min_width=140,
                    )
                with gr.Accordion("Settings", open=False), gr.Row():
                    noise = gr.Textbox(
                        "auto",
                        label="Noise level",
                        info="auto, or its std for values from -1 to 1",
                        min_width=140,
                    )
                    seed = gr.Number(
                        0,
                        precision=0,
                        label="Seed",
                        info="the same, the same result",
                        min_width=140,
                    )
                    largest = gr.Number(
                        TILE,
                        precision=0,
                        label="Longest side, pixels",
                        info=f"above {TILE} in tiles",
                        min_width=140,
                    )
                with gr.Row():
                    button = gr.Button("Restore", variant="primary", scale=4, elem_id="restore")
                    halt = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
                line = gr.Markdown(elem_id="line")
                download = gr.DownloadButton(
                    "Download the estimate", interactive=False, elem_id="download"
                )
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    measurement = gr.Image(label="Measurement", elem_id="measurement", **PANEL)
                    estimate = gr.Image(label="Estimate", elem_id="estimate", **PANEL)
                with gr.Row():
                    std = gr.Image(label=STD, elem_id="std", **PANEL)
                    drawn = gr.Gallery(
                        label="Draws",
                        columns=2,
                        height=PANEL["height"],
                        min_width=PANEL["min_width"],
                        format="png",
                        object_fit="contain",
                        interactive=False,
                        buttons=["fullscreen"],
                        elem_id="draws",
                    )
        results = [estimate, std, drawn, download]
        picture.change(
            show,
            picture,
            [measurement, canvas, line, *results],
            show_progress="hidden",
            api_visibility="private",
        )
        wrong.change(
            ask, wrong, list(groups.values()), show_progress="hidden", api_visibility="private"
        )
        button.click(
            press,
            [picture, wrong, kernel, blur_std, scale, canvas, noise, calls, draws, seed, largest],
            [measurement, estimate, std, drawn, line, download],
            show_progress_on=[estimate],
            concurrency_limit=1,
            api_visibility="private",
        )
        halt.click(stop, show_progress="hidden", api_visibility="private")
    return page


def _painted(canvas: Mapping[str, Any] | None) -> np.ndarray | None:
    """Return where an editor's layers (H, W, 4) are painted."""
    layers = [] if canvas is None else canvas["layers"]
    return np.any([layer[..., 3] > 127 for layer in layers], axis=0) if layers else None


def _refusal(error: Exception, *paths: str | None) -> str:
    files = {path: Path(path).name for path in paths if path is not None}
    return f"**Not restored**: {_in_words(error, files)}"


def _machine(where: torch.device) -> str:
    return f"the {'GPU' if where.type == 'cuda' else 'CPU'} of the machine that serves this page"


def app(
    prior: PriorName = "ncvsd_natural",
    host: Annotated[
        str, typer.Option("--host", help="Where it listens; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="The port.", min=1, max=65535)] = 7860,
    device: Device = None,
) -> None:
    """Restore pictures on a page in the browser.

    Drop a picture, say what is wrong with it (noise, a blur, too few pixels, missing parts, which
    one paints over), and see the estimate beside the draws and their std. It needs
    gradio, which this package's extra "app" installs.

    Only this machine can open the page unless --host says otherwise. Nothing is sent anywhere, and
    what was dropped or made lies in a temporary folder, which is removed at the end.
    """
    with tempfile.TemporaryDirectory(prefix="ncvsd-app-", ignore_cleanup_errors=True) as folder:
        # Gradio reads both when it is imported.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        with extra("app"):
            import gradio as gr
        loaded, where = load_named(prior, device)
        page = make_page(in_tiles(loaded, TILE), prior, where, Path(folder))
        fonts = ["ui-sans-serif", "system-ui", "sans-serif"]  # by name: others would be fetched
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                theme=gr.themes.Default(
                    font=fonts, font_mono=["ui-monospace", "monospace"], primary_hue="indigo"
                ),
                css=STYLE,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
            )
        except OSError as error:
            raise ValueError(f"--host and --port must be free to use, got {host}:{port}") from error
        typer.echo(f"open {url} in a browser; Ctrl-C ends it")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder goes
        page.block_thread()
