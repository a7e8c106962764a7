"""Picture files as tensors and back.

A picture is a float32 tensor of shape (1, 3, H, W) in [-1, 1]; files are taken to be sRGB.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from ncvsd_inverse.checks import check_choice, check_count, check_finite, check_images
from ncvsd_inverse.files import write_whole
from ncvsd_inverse.sources import (
    UNREADABLE,
    FolderFiles,
    SourceFiles,
    open_plain,
    open_source,
    read_at_most,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "Picture",
    "centre_crop",
    "centre_crop_to_multiple",
    "check_holds",
    "decode_image",
    "encode_figure",
    "encode_image",
    "is_picture_name",
    "measure_picture",
    "plot_pictures",
    "read_image",
    "read_images",
    "read_picture",
    "resize_cover",
    "write_image",
    "write_picture",
]

MAX_PIXELS = 2**26
"""Largest picture that is read, 8192 x 8192 pixels: 0.8 GB as a tensor."""

MAX_BESIDE = 2**26
"""Most bytes of a file besides 8 for each pixel, and most that are read to find its size."""

FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
"""What is opened, whatever a file is called: Pillow would start other programs for some kinds."""

PNG_RGB, PNG_RGBA = 2, 6
"""Colour types of a PNG."""

START = 512
"""Bytes at the start of a file that tell what it is."""

ORIENTATION = 0x0112
QUARTER_TURNS = (5, 6, 7, 8)
"""The EXIF entry that says how a picture is turned, and its values that swap the sides."""

_KINDS = {
    ".bmp": "BMP",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".png": "PNG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
"""What is written, by what the name ends in."""

SUFFIXES = tuple(_KINDS)
"""What the names of pictures end in, where a folder or archive is searched for them."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as its file holds it.

    Attributes:
        x: its grey values or colours (sRGB), shape (1, 1 or 3, H, W), in [-1, 1].
        bits: of a value in the file: 8, 16, or 32 for floats.
        alpha: its opacity, shape (1, 1, H, W), in [0, 1]; None if it has none.
    """

    x: Tensor
    bits: int = 8
    alpha: Tensor | None = None


def read_picture(path: str | Path) -> Picture:
    """Read a PNG, JPEG, WebP, TIFF or BMP as it is: grey or colour, its depth and its opacity.

    Of grey with opacity, and of colours in TIFF, 16 bits become 8.

    Arguments and errors as for `read_image`.
    """
    try:
        file = open_plain(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a readable picture: {error}") from error
    with file:
        return _decode_picture(file, str(path))


def read_image(path: str | Path) -> Tensor:
    """Read a PNG, JPEG, WebP, TIFF or BMP as RGB.

    Grey and palette pictures become RGB, 16 bits keep their precision, transparency is laid over
    white, a colour profile is applied, and so is EXIF orientation.

    Args:
        path: the file.

    Returns:
        The picture, shape (1, 3, H, W), in [-1, 1].

    Raises:
        ValueError: if the file is missing, damaged, of another kind, larger than 2^26 pixels or
            than 64 MiB and 8 bytes a pixel, or its pixels have no stated range (32-bit integers,
            and floats outside [0, 1]).
    """
    return _as_colours(read_picture(path))


def read_images(source: str | Path, limit: int | None = None) -> Iterator[Tensor]:
    """Read the pictures of a folder, searched through, or of a zip archive, by order of name.

    What there is is looked up at once, the pictures are read one by one as they are asked for.

    Args:
        source: the folder or archive.
        limit: most pictures to read, >= 1; None: all.

    Returns:
        An iterator over pictures, each of shape (1, 3, H, W), in [-1, 1].

    Raises:
        ValueError: if there is no picture, the archive is damaged, or a link leads out of the
            folder or to another; later, at a picture that cannot be read as `read_image` does, with
            its name.
    """
    source = Path(source)
    if limit is not None:
        check_count("limit", limit)
    files = open_source(source, is_picture_name)
    for name, reason in files.refused.items():
        raise ValueError(f"{source / name} must be a readable picture: {reason}")
    if not files.names:
        raise ValueError(f"{source} must hold pictures ({', '.join(SUFFIXES)}), got none")
    return _read_each(files, files.names[:limit])


def is_picture_name(name: str) -> bool:
    """Tell whether a file's name is that of a picture that is looked for."""
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")


def _read_each(files: SourceFiles, names: list[str]) -> Iterator[Tensor]:
    for name in names:
        if isinstance(files, FolderFiles):
            title = str(files.source / name)
        else:
            title = f"{files.source}: {name}"
        try:
            file = files.open(name)
        except UNREADABLE as error:
            raise ValueError(f"{title} must be a readable picture: {error}") from error
        with file:
            yield decode_image(file, title)


def decode_image(file: BinaryIO, title: str) -> Tensor:
    """Read a picture from an open file as `read_image` does; errors call it `title`."""
    return _as_colours(_decode_picture(file, title))


def _as_colours(picture: Picture) -> Tensor:
    """Return a picture as RGB, laid over white; its values are overwritten."""
    x = picture.x if picture.x.shape[1] == 3 else picture.x.expand(-1, 3, -1, -1).contiguous()
    if picture.alpha is not None:
        x.add_(1).mul_(picture.alpha).add_((1 - picture.alpha).mul_(2)).sub_(1)
    return x


class _Start:
    """The start of a file, to find the size of a picture; ValueError if it takes too much of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell = file.seek, file.tell
        self._file = file
        self._left = MAX_BESIDE

    def read(self, number: int = -1) -> bytes:
        """Read so many bytes."""
        most = self._left + 1
        content = self._file.read(most if number < 0 else min(number, most))
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(f"it must tell its size within {MAX_BESIDE} bytes")
        return content


def measure_picture(file: BinaryIO) -> tuple[int, int]:
    """Return height and width of the upright picture in an open file, from its header.

    An orientation that a PNG has after its pixels is not found.

    Raises:
        ValueError: if there are no pixels or more than 2^26; Pillow's errors if it is no picture.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(cast("BinaryIO", _Start(file)), formats=FORMATS) as picture:
            width, height = picture.size
            if not 0 < width * height <= MAX_PIXELS:
                raise ValueError(f"it has {width} x {height} pixels, allowed are {MAX_PIXELS}")
            # Pillow would decode a whole PNG to find an orientation that is not in its header.
            if picture.format != "PNG" or "exif" in picture.info:
                turned = picture.getexif().get(ORIENTATION) in QUARTER_TURNS
                width, height = (height, width) if turned else (width, height)
    return height, width


def _decode_picture(file: BinaryIO, title: str) -> Picture:
    """Read a picture as `read_picture` does; errors call it `title`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    start = b""
    try:
        start = file.read(START)
        file.seek(0)
        height, width = measure_picture(file)
        file.seek(0)
        content = read_at_most(file, MAX_BESIDE + 8 * height * width)
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            if picture.format == "PNG" and _has_deep_colours(start):
                return _decode_deep(content, *picture.size)
            # Older Pillow opens 16-bit grey PNG files as 32-bit integers.
            deep = picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PNG")
            ImageOps.exif_transpose(picture, in_place=True)
            if deep or picture.mode == "F":
                return _from_grey(np.asarray(picture), 16 if deep else 32)
            return _from_bytes(picture)
    except UnidentifiedImageError as error:  # its text has the address of an object
        reason = _kind_of(start) or f"it is none of {', '.join(FORMATS)}, or its start is damaged"
        raise ValueError(f"{title} must be a readable picture: {reason}") from error
    # Pillow's decoders raise errors of many kinds on damaged files, SyntaxError among them.
    except Exception as error:
        reason = _kind_of(start) or str(error) or type(error).__name__
        raise ValueError(f"{title} must be a readable picture: {reason}") from error


def _kind_of(start: bytes) -> str:
    """Return what a file is that users take for a picture, and what to do; "" for others."""
    if start.startswith(b"GIF8"):
        return "it is a GIF, whose colours are few: save the picture that it was made of as PNG"
    if b"<svg" in start.lower():
        return "it is an SVG, a drawing without pixels: export it as PNG"
    return ""


def _has_deep_colours(start: bytes) -> bool:
    """Tell whether a PNG has colours of 16 bits, which Pillow reads as 8."""
    depth, kind = start[24:26]
    return depth == 16 and kind in (PNG_RGB, PNG_RGBA)


def _decode_deep(content: bytes, width: int, height: int) -> Picture:
    """Read a PNG of 16 bits with colours, and perhaps opacity."""
    from kornia_rs.io import decode_image_png_u16

    kind = "rgba" if content[25] == PNG_RGBA else "rgb"
    values = np.asarray(decode_image_png_u16(content, (height, width), kind))
    alpha = _to_floats(values[..., 3:], 65535) if kind == "rgba" else None
    return Picture(_to_floats(values[..., :3], 65535).mul_(2).sub_(1), 16, alpha)


def _to_floats(pixels: np.ndarray, largest: float) -> Tensor:
    """Return pixels (H, W, C) as float32 (1, C, H, W) in [0, 1], with no other copy of them."""
    values = np.empty((1, pixels.shape[2], *pixels.shape[:2]), np.float32)
    values[0] = pixels.transpose(2, 0, 1)
    return torch.from_numpy(values).div_(largest)


def _from_grey(values: np.ndarray, bits: int) -> Picture:
    """Return a grey picture of 16-bit integers or of floats in [0, 1], (H, W)."""
    if bits == 32 and not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"floats must lie in [0, 1], got {values.min():.3g} to {values.max():.3g}")
    return Picture(_to_floats(values[..., None], 65535 if bits == 16 else 1).mul_(2).sub_(1), bits)


def _from_bytes(picture: "Image.Image") -> Picture:
    """Return a picture of 8 bits, its colours turned to sRGB where it says what they are."""
    check_choice("pixel mode", picture.mode, _MODES)
    profile = picture.info.get("icc_profile")
    has_alpha = "A" in picture.getbands() or "transparency" in picture.info
    if has_alpha:
        picture = _in_mode(picture, "LA" if picture.mode in ("L", "LA", "1") else "RGBA")
    alpha = None
    if has_alpha:
        alpha = _to_floats(np.asarray(picture.getchannel("A"))[..., None], 255)
        picture = picture.convert("L" if picture.mode == "LA" else "RGB")
    if picture.mode in ("1", "L"):
        pixels = np.asarray(_in_mode(picture, "L"))[..., None]
    else:
        pixels = np.asarray(_to_srgb(picture, profile))
    return Picture(_to_floats(pixels, 255).mul_(2).sub_(1), 8, alpha)


def _to_srgb(picture: "Image.Image", profile: bytes | None) -> "Image.Image":
    """Return a picture of colours as sRGB; a profile that cannot be read is of no account."""
    from PIL import ImageCms

    if profile and picture.mode in ("RGB", "CMYK"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            turned = ImageCms.profileToProfile(picture, source, target, outputMode="RGB")
            return _in_mode(picture, "RGB") if turned is None else turned
        except (ImageCms.PyCMSError, OSError):
            pass
    return _in_mode(picture, "RGB")


def _in_mode(picture: "Image.Image", mode: str) -> "Image.Image":
    """Return a picture in a mode; Pillow would copy one that is in it."""
    return picture if picture.mode == mode else picture.convert(mode)


_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")


def write_image(path: str | Path, x: Tensor) -> None:
    """Write a picture of 8 bits, whole or not at all, of the kind that the name ends in.

    Args:
        path: the file; an older one is replaced.
        x: the picture, shape (1, 3, H, W) or (1, 1, H, W), clamped to [-1, 1].

    Raises:
        ValueError: if x has another shape or is not finite, or the name says no kind of picture.
        OSError: if the file cannot be written.
    """
    write_picture(path, Picture(x))


def write_picture(path: str | Path, picture: Picture) -> None:
    """Write a picture with its depth and opacity, whole or not at all.

    The name says the kind, as those of `SUFFIXES` do; without a suffix it is a PNG. JPEG and BMP
    have no opacity and 8 bits, as WebP has; floats (32 bits) are for TIFF; 16 bits for PNG, of grey
    for TIFF too.

    Raises:
        ValueError: if the name says no kind that is written, the picture has another shape or is
            not finite, or the kind cannot hold it.
        OSError: if the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix and suffix not in _KINDS:
        raise ValueError(f"path must end in one of {', '.join(SUFFIXES)}, got {path}")
    write_whole(path, _encode(picture, _KINDS.get(suffix, "PNG")))


def check_holds(path: Path, picture: Picture) -> None:
    """ValueError if a file of this suffix cannot hold the depth or the opacity of a picture.

    A JPEG or BMP takes pictures that are opaque everywhere.
    """
    _fit(picture, _KINDS.get(path.suffix.lower(), "PNG"))


def _fit(picture: Picture, kind: str) -> Picture:
    """Return what a kind of file holds of a picture: all but opacity that hides nothing."""
    if picture.alpha is not None and kind in ("JPEG", "BMP"):
        if bool((picture.alpha < 1).any()):
            raise ValueError(f"a {kind} cannot hold opacity: name a .png")
        picture = Picture(picture.x, picture.bits)
    channels = picture.x.shape[1] + (picture.alpha is not None)
    holds = picture.bits == 8 or (picture.bits == 16 and kind == "PNG")
    if not holds and (kind != "TIFF" or channels != 1):
        raise ValueError(
            f"a {kind} cannot hold {picture.bits} bits of {channels} channels: name a .png"
        )
    return picture


def encode_image(x: Tensor, kind: str = "PNG") -> bytes:
    """Return a picture as the bytes of a file of 8 bits; arguments and errors as `write_image`."""
    return _encode(Picture(x), kind)


def _encode(picture: Picture, kind: str) -> bytes:
    from PIL import Image

    picture = _fit(picture, kind)
    values = np.atleast_3d(_pixels("x", picture.x))
    if picture.alpha is not None:
        alpha = picture.alpha[0].clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        values = np.concatenate((values, alpha), axis=2)
    buffer = io.BytesIO()
    if picture.bits == 8:
        pixels = np.round(values * 255).astype(np.uint8)
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(
            buffer, format=kind, quality=90
        )
        return buffer.getvalue()
    deep = np.round(values * 65535).astype(np.uint16)
    if picture.bits == 16 and kind == "PNG":
        return _deep_png(deep)
    grey = deep[..., 0] if picture.bits == 16 else values[..., 0].astype(np.float32)
    Image.fromarray(grey).save(buffer, format=kind)
    return buffer.getvalue()


def _deep_png(pixels: np.ndarray) -> bytes:
    """Return 16-bit pixels (H, W, 1 to 4) as a PNG, which Pillow writes of grey alone.

    Source: W3C, Portable Network Graphics (PNG) Specification, third edition.
    """
    height, width, channels = pixels.shape
    colours = {1: 0, 2: 4, 3: PNG_RGB, 4: PNG_RGBA}[channels]
    rows = np.ascontiguousarray(pixels, ">u2").view(np.uint8).reshape(height, -1)
    unfiltered = np.concatenate((np.zeros((height, 1), np.uint8), rows), axis=1)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0)),
        (b"IDAT", zlib.compress(unfiltered.tobytes())),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


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
