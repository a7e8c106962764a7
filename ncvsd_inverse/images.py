"""Picture files as tensors and back.

A picture is a float32 tensor of shape (1, 3, H, W) in [-1, 1]; files are taken to be sRGB.
"""

import io
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ncvsd_inverse.checks import check_choice, check_count, check_finite, check_images
from ncvsd_inverse.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "centre_crop",
    "centre_crop_to_multiple",
    "encode_figure",
    "encode_image",
    "plot_pictures",
    "read_image",
    "read_images",
    "resize_cover",
    "write_image",
]

MAX_PIXELS = 2**26
"""Largest picture that is read, 8192 x 8192 pixels: 0.8 GB as a tensor."""

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""What the names of pictures end in, where a folder or archive is searched for them."""


def read_image(path: str | Path) -> Tensor:
    """Read a picture file of any kind that Pillow knows.

    Grey and palette pictures become RGB, 16-bit grey keeps its precision, transparency is laid
    over white, EXIF orientation is applied, and of an animation the first frame is taken.

    Args:
        path: the file.

    Returns:
        The picture, shape (1, 3, H, W), in [-1, 1].

    Raises:
        ValueError: if the file is missing, damaged, no picture, larger than 2^26 pixels, or of a
            kind whose pixels have no stated range (32-bit integers and floats).
    """
    return _decode(path, str(path))


def read_images(source: str | Path, limit: int | None = None) -> Iterator[Tensor]:
    """Read the pictures of a folder, searched through, or of a zip archive, by order of name.

    What there is is looked up at once, the pictures are read one by one as they are asked for.

    Args:
        source: the folder or archive.
        limit: most pictures to read, >= 1; None: all.

    Returns:
        An iterator over pictures, each of shape (1, 3, H, W), in [-1, 1].

    Raises:
        ValueError: if there is no picture, or the archive is damaged; later, at a picture that
            cannot be read as `read_image` does, with its name.
    """
    source = Path(source)
    if limit is not None:
        check_count("limit", limit)
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if _is_picture(path))
        found: list[str] = [str(path) for path in files]
    else:
        try:
            with zipfile.ZipFile(source) as archive:
                found = sorted(name for name in archive.namelist() if _is_picture(Path(name)))
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{source} must be a folder or a zip archive: {error}") from error
    if not found:
        raise ValueError(f"{source} must hold pictures ({', '.join(SUFFIXES)}), got none")
    return _read_each(source, found[:limit])


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _read_each(source: Path, names: list[str]) -> Iterator[Tensor]:
    if source.is_dir():
        yield from map(read_image, names)
        return
    with zipfile.ZipFile(source) as archive:
        for name in names:
            title = f"{source}: {name}"
            try:
                content = archive.read(name)
            except (OSError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"{title} must be a readable picture: {error}") from error
            yield _decode(io.BytesIO(content), title)


def _decode(file: str | Path | BinaryIO, title: str) -> Tensor:
    """Read a picture as `read_image` does; errors call it `title`."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                width, height = picture.size
                if not 0 < width * height <= MAX_PIXELS:
                    raise ValueError(f"it has {width} x {height} pixels, allowed are {MAX_PIXELS}")
                # Older Pillow opens 16-bit grey PNG files as 32-bit integers.
                deep = picture.mode.startswith("I;16") or (picture.mode, picture.format) == (
                    "I",
                    "PNG",
                )
                upright = ImageOps.exif_transpose(picture)
                pixels = _deep_grey_to_rgb(upright) if deep else _to_rgb(upright)
    # Pillow's decoders raise errors of many kinds on damaged files, SyntaxError among them.
    except Exception as error:
        raise ValueError(f"{title} must be a readable picture: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous() * 2 - 1


def _deep_grey_to_rgb(picture: "Image.Image") -> np.ndarray:
    """Return the pixels of a 16-bit grey picture, shape (H, W, 3), float32 in [0, 1]."""
    grey = np.asarray(picture).astype(np.float32) / 65535
    return np.repeat(grey[..., None], 3, axis=2)


def _to_rgb(picture: "Image.Image") -> np.ndarray:
    """Return the pixels of a picture, shape (H, W, 3), float32 in [0, 1]."""
    check_choice("pixel mode", picture.mode, _MODES)
    if "A" in picture.getbands() or "transparency" in picture.info:
        rgba = np.asarray(picture.convert("RGBA")).astype(np.float32) / 255
        alpha = rgba[..., 3:]
        return rgba[..., :3] * alpha + (1 - alpha)
    return np.asarray(picture.convert("RGB")).astype(np.float32) / 255


_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")


def write_image(path: str | Path, x: Tensor) -> None:
    """Write a picture of 8 bits, whole or not at all: a PNG, or a JPEG if the name ends in .jpg.

    Args:
        path: the file; an older one is replaced.
        x: the picture, shape (1, 3, H, W) or (1, 1, H, W), clamped to [-1, 1].

    Raises:
        ValueError: if x has another shape or is not finite.
        OSError: if the file cannot be written.
    """
    kind = "JPEG" if Path(path).suffix.lower() in (".jpg", ".jpeg") else "PNG"
    write_whole(path, encode_image(x, kind))


def encode_image(x: Tensor, kind: str = "PNG") -> bytes:
    """Return a picture as the bytes of a file of 8 bits; arguments and errors as `write_image`."""
    from PIL import Image

    pixels = np.round(_pixels("x", x) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, quality=90)
    return buffer.getvalue()


def _pixels(name: str, x: Tensor) -> np.ndarray:
    """Return a picture as (H, W, 3) or (H, W) in [0, 1]."""
    check_finite(name, check_images(name, x))
    if x.shape[0] != 1 or x.shape[1] not in (1, 3):
        raise ValueError(f"{name} must have shape (1, 1 or 3, H, W), got {tuple(x.shape)}")
    pixels: np.ndarray = ((x[0].clamp(-1, 1) + 1) / 2).permute(1, 2, 0).cpu().numpy()
    return pixels if pixels.shape[2] == 3 else pixels[..., 0]


def plot_pictures(
    rows: Sequence[Sequence[Tensor | None]], titles: Sequence[str], labels: Sequence[str] = ()
) -> "Figure":
    """Return a figure of pictures in rows.

    Args:
        rows: pictures (1, 1 or 3, H, W) in [-1, 1]; None leaves a place empty.
        titles: of the columns.
        labels: of the rows; empty for none.

    Raises:
        ValueError: if there is no row or a picture has another shape.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    figure = Figure(figsize=(1.7 * len(titles) + 0.5, 1.85 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for place, pictures in zip(axes, rows, strict=True):
        for axis, picture in zip(place, pictures, strict=True):
            axis.set(xticks=[], yticks=[])
            if picture is not None:
                axis.imshow(_pixels("picture", picture), cmap="gray", vmin=0, vmax=1)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize="medium")
    for place, label in zip(axes, labels, strict=False):
        place[0].set_ylabel(label)
    return figure


def encode_figure(figure: "Figure") -> bytes:
    """Return a figure as the bytes of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def centre_crop_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Crop images (B, C, H, W) around the centre until both sides divide by `multiple`.

    Raises:
        ValueError: if a side is shorter than `multiple`.
    """
    check_images("x", x)
    check_count("multiple", multiple)
    height, width = (side - side % multiple for side in x.shape[-2:])
    if min(height, width) == 0:
        raise ValueError(f"x must be at least {multiple} pixels a side, got {tuple(x.shape)}")
    return _centre_crop(x, height, width)


def centre_crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop images (B, C, H, W) around the centre to `size` (height, width).

    Raises:
        ValueError: if a side is shorter.
    """
    check_images("x", x)
    if x.shape[-2] < size[0] or x.shape[-1] < size[1]:
        raise ValueError(f"x must be at least {size[0]} x {size[1]} pixels, got {tuple(x.shape)}")
    return _centre_crop(x, *size)


def resize_cover(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images (B, C, H, W) to cover `size` (height, width), then crop around the centre.

    Bicubic with antialiasing, the aspect ratio kept, clamped to [-1, 1].
    """
    check_images("x", x)
    for side in size:
        check_count("size", side)
    scale = max(size[0] / x.shape[-2], size[1] / x.shape[-1])
    covering = [max(new, round(old * scale)) for new, old in zip(size, x.shape[-2:], strict=True)]
    resized = torch.nn.functional.interpolate(x, covering, mode="bicubic", antialias=True)
    return _centre_crop(resized.clamp(-1, 1), *size)


def _centre_crop(x: Tensor, height: int, width: int) -> Tensor:
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]
