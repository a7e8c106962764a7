import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ncvsd_inverse.files import whole_files, write_between, write_whole
from ncvsd_inverse.images import (
    Picture,
    centre_crop,
    centre_crop_to_multiple,
    check_holds,
    read_image,
    read_images,
    read_picture,
    resize_cover,
    write_image,
    write_picture,
)
from ncvsd_inverse.machine import PeakMemory

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def as_tensor(pixels):
    """Return pixels (H, W, 3) in [0, 1] as a picture."""
    return torch.from_numpy(np.asarray(pixels, np.float32)).permute(2, 0, 1)[None] * 2 - 1


def save(path, picture, **options):
    picture.save(path, **options)
    return path


def test_rgb(tmp_path):
    x = read_image(save(tmp_path / "a.png", Image.fromarray(COLOURS)))
    assert x.dtype == torch.float32
    assert torch.allclose(x, as_tensor(COLOURS / 255))


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_becomes_rgb(tmp_path, mode):
    picture = Image.fromarray(COLOURS).convert("L").convert(mode)
    expected = np.asarray(picture.convert("L"))[..., None].repeat(3, 2) / 255
    assert torch.allclose(read_image(save(tmp_path / "a.png", picture)), as_tensor(expected))


def test_sixteen_bit_grey_keeps_its_precision(tmp_path):
    deep = np.arange(35, dtype=np.uint16).reshape(5, 7) + 30000
    for suffix in ("png", "tif"):
        x = read_image(save(tmp_path / f"a.{suffix}", Image.fromarray(deep)))
        expected = (deep / 65535)[..., None].repeat(3, 2)
        # Half a step of 16 bits; 8 bits would be off by 100 times as much.
        assert torch.allclose(x, as_tensor(expected), atol=1e-5)


def test_alpha_is_laid_over_white(tmp_path):
    alpha = np.linspace(0, 255, 35).astype(np.uint8).reshape(5, 7, 1)
    picture = Image.fromarray(np.concatenate([COLOURS, alpha], axis=2))
    share = alpha / 255
    expected = COLOURS / 255 * share + 1 - share
    assert torch.allclose(
        read_image(save(tmp_path / "a.png", picture)), as_tensor(expected), atol=1e-6
    )
    grey = Image.fromarray(np.concatenate([COLOURS[..., :1], alpha], axis=2))
    expected = (COLOURS[..., :1] / 255 * share + 1 - share).repeat(3, 2)
    x = read_image(save(tmp_path / "grey.png", grey))
    assert torch.allclose(x, as_tensor(expected), atol=1e-6)


def test_palette_with_and_without_transparency(tmp_path):
    picture = Image.fromarray(COLOURS).quantize(8)
    expected = np.asarray(picture.convert("RGB")) / 255
    assert torch.allclose(read_image(save(tmp_path / "a.png", picture)), as_tensor(expected))
    hidden = np.asarray(picture) == 2
    expected[hidden] = 1
    x = read_image(save(tmp_path / "b.png", picture, transparency=2))
    assert torch.allclose(x, as_tensor(expected))


def test_cmyk(tmp_path):
    picture = Image.new("CMYK", (7, 5), (0, 255, 255, 0))
    x = read_image(save(tmp_path / "a.tif", picture))
    assert torch.allclose(x, as_tensor(np.broadcast_to([1.0, 0.0, 0.0], (5, 7, 3))))


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, lambda p: p), (3, lambda p: p[::-1, ::-1]), (6, lambda p: np.rot90(p, -1))],
)
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(COLOURS), exif=exif)
    assert torch.allclose(read_image(path), as_tensor(turn(COLOURS).copy() / 255))


def test_sixteen_bit_grey_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800
    x = read_image(save(tmp_path / "a.png", Image.fromarray(deep), exif=exif))
    expected = np.rot90(deep, -1)[..., None].repeat(3, 2) / 65535
    assert torch.allclose(x, as_tensor(expected), atol=1e-5)


def test_animations_give_their_first_frame(tmp_path):
    first, second = Image.new("RGB", (7, 5), "red"), Image.new("RGB", (7, 5), "blue")
    path = save(tmp_path / "a.png", first, save_all=True, append_images=[second])
    assert torch.allclose(read_image(path), as_tensor(np.broadcast_to([1.0, 0.0, 0.0], (5, 7, 3))))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GIF89a...", "it is a GIF, whose colours are few"),
        (b"<?xml version='1.0'?><svg width='3'></svg>", "it is an SVG, a drawing without pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "it is none of BMP, JPEG"),
    ],
)
def test_other_kinds_are_refused_whatever_their_name(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("bits", "channels", "alpha"),
    [(bits, channels, alpha) for bits in (8, 16) for channels in (1, 3) for alpha in (False, True)],
)
def test_pictures_come_back_as_they_were(tmp_path, generator, bits, channels, alpha):
    levels = 2**bits - 1
    x = torch.randint(levels + 1, (1, channels, 5, 7), generator=generator) / levels * 2 - 1
    opacity = torch.randint(levels + 1, (1, 1, 5, 7), generator=generator) / levels
    picture = Picture(x, bits, opacity if alpha else None)
    write_picture(tmp_path / "a.png", picture)
    if (bits, channels, alpha) == (16, 1, True):  # grey with opacity is read as 8 bits
        assert torch.allclose(read_picture(tmp_path / "a.png").x, x, atol=0.01)
        return
    again = read_picture(tmp_path / "a.png")
    assert again.bits == bits
    assert torch.allclose(again.x, x, atol=1e-6)
    assert (again.alpha is not None) == alpha
    if alpha:
        assert torch.allclose(again.alpha, opacity, atol=1e-6)


def test_floats_come_back_as_tiff(tmp_path, generator):
    picture = Picture(torch.rand(1, 1, 5, 7, generator=generator) * 2 - 1, 32)
    write_picture(tmp_path / "a.tif", picture)
    assert torch.allclose(read_picture(tmp_path / "a.tif").x, picture.x, atol=1e-6)
    with pytest.raises(ValueError, match="a PNG cannot hold 32 bits of 1 channels"):
        write_picture(tmp_path / "a.png", picture)
    opacity = torch.ones(1, 1, 5, 7)
    write_picture(tmp_path / "a.jpg", Picture(picture.x, 8, opacity))  # which hides nothing
    opacity[..., 0] = 0.5
    with pytest.raises(ValueError, match="a JPEG cannot hold opacity"):
        write_picture(tmp_path / "b.jpg", Picture(picture.x, 8, opacity))
    with pytest.raises(ValueError, match="a JPEG cannot hold opacity"):
        check_holds(tmp_path / "b.jpg", Picture(picture.x, 8, opacity))


def test_colours_are_turned_to_srgb(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    red = Image.new("RGB", (3, 2), (200, 10, 10))
    red.save(tmp_path / "other.png", icc_profile=profile)
    # A profile of other channels is of no account.
    assert float(read_image(tmp_path / "other.png")[0, 0, 0, 0]) == pytest.approx(200 / 127.5 - 1)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red.save(tmp_path / "same.png", icc_profile=profile)
    expected = torch.tensor([200, 10, 10]) / 127.5 - 1
    assert torch.allclose(read_image(tmp_path / "same.png")[0, :, 0, 0], expected, atol=0.02)


def png_claiming(width, height):
    """Return a PNG file whose header claims a size that its data does not have."""

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def damaged_files(folder):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = save(folder / "whole.png", Image.fromarray(noise)).read_bytes()
    jpeg = save(folder / "whole.jpg", Image.fromarray(noise)).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    floats = folder / "floats.tif"
    Image.fromarray(np.full((5, 7), 3.5, np.float32)).save(floats)
    return {
        "truncated.png": whole[: len(whole) // 2],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header.png": whole[:20],
        "flipped.png": bytes(flipped),
        "empty.png": b"",
        "text.png": b"hello",
        "enormous.png": png_claiming(60000, 60000),
        "large.png": png_claiming(10000, 8000),
        "no_pixels.png": png_claiming(0, 8),
        "floats.tif": floats.read_bytes(),
    }


@pytest.mark.parametrize(
    "name",
    [
        "truncated.png",
        "truncated.jpg",
        "header.png",
        "flipped.png",
        "empty.png",
        "text.png",
        "enormous.png",
        "large.png",
        "no_pixels.png",
        "floats.tif",
        "missing.png",
        "folder",
    ],
)
def test_unreadable_files_are_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    content = damaged_files(tmp_path).get(name)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} must be a readable picture"):
        read_image(tmp_path / name)


def test_decoding_takes_few_copies(tmp_path):
    side = 2048
    path = save(tmp_path / "a.webp", Image.new("RGB", (side, side)), lossless=True)
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    before = memory.held()
    read_image(path)
    # Bytes a pixel: 12 of the result, 3 to 4 of each copy that WebP and Pillow make.
    assert memory.peak() - before < 40 * side**2


@pytest.mark.parametrize(
    ("place", "reason"), [(33, "it must tell its size within"), (-12, "it must have at most")]
)
def test_padding_is_not_read(tmp_path, place, reason):
    whole = save(tmp_path / "a.png", Image.new("RGB", (8, 8))).read_bytes()
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.png", "w") as file,
    ):
        file.write(whole[:place] + struct.pack(">I", 2**29) + b"juNk")
        for _ in range(72):
            file.write(bytes(2**20))
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    before = memory.held()
    with pytest.raises(ValueError, match=rf"a\.zip: a\.png must be a readable picture: {reason}"):
        list(read_images(tmp_path / "a.zip"))
    assert memory.peak() - before < 2**28


def test_large_files_are_refused_before_they_are_decoded(tmp_path):
    (tmp_path / "large.png").write_bytes(png_claiming(10000, 8000))
    with pytest.raises(ValueError, match="10000 x 8000 pixels"):
        read_image(tmp_path / "large.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read_again(tmp_path, channels, generator):
    x = torch.rand(1, channels, 5, 7, generator=generator) * 2.4 - 1.2
    path = tmp_path / "a.png"
    path.write_bytes(b"older")
    with path.open("rb") as reader:
        write_image(path, x.double())
        # The older file was replaced, not overwritten: who reads it sees no mixture.
        assert reader.read() == b"older"
    # Half of one of 255 steps over a range of 2.
    assert (read_image(path) - x.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_name_that_ends_in_jpg_gives_a_jpeg(tmp_path):
    x = torch.linspace(-1, 1, 16 * 16).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    for name, magic in (("a.jpg", b"\xff\xd8"), ("b.JPEG", b"\xff\xd8"), ("c.png", b"\x89P")):
        write_image(tmp_path / name, x)
        assert (tmp_path / name).read_bytes()[:2] == magic
        assert (read_image(tmp_path / name) - x).abs().max() < 0.05


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 3, 4, 4), torch.zeros(1, 2, 4, 4), torch.full((1, 3, 4, 4), torch.nan)]
)
def test_bad_pictures_are_not_written(tmp_path, x):
    with pytest.raises(ValueError, match="x must"):
        write_image(tmp_path / "a.png", x)
    assert list(tmp_path.iterdir()) == []


def test_centre_crop():
    x = torch.arange(70.0).view(1, 1, 7, 10)
    assert torch.equal(centre_crop_to_multiple(x, 4), x[..., 1:5, 1:9])
    assert torch.equal(centre_crop_to_multiple(x, 1), x)
    with pytest.raises(ValueError, match="x must be at least 8"):
        centre_crop_to_multiple(x, 8)


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (64, 64), (7, 100)])
def test_resize_covers_and_keeps_the_centre(size):
    x = torch.full((1, 3, 40, 60), -1.0)
    x[..., 15:25, 25:35] = 1
    y = resize_cover(x, size)
    assert tuple(y.shape[-2:]) == size
    assert float(y[0, 0, size[0] // 2, size[1] // 2]) > 0.9
    assert y.abs().max() <= 1


def test_pictures_are_read_by_order_of_name_as_they_are_asked_for(tmp_path):
    place = tmp_path
    (place / "faces").mkdir()
    with zipfile.ZipFile(place / "faces.zip", "w") as archive:
        for i in reversed(range(6)):
            path = place / "faces" / f"{i}.png"
            write_image(path, torch.full((1, 3, 5, 7), i / 6))
            archive.write(path, f"00000/{i}.png")
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


# Whole-or-nothing writes.


def half_written(*paths):
    with whole_files(*paths) as parts:
        parts[0].write_bytes(b"half")
        raise OSError("disk full")


def test_files_appear_whole_or_not_at_all(tmp_path):
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    with pytest.raises(OSError, match="disk full"):
        half_written(path, other)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"older")
    with pytest.raises(OSError, match="disk full"):
        half_written(path, other)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf8_with_its_own_line_ends(tmp_path):
    write_whole(tmp_path / "a.txt", "\u00e4\r\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa4\r\n"
    write_whole(str(tmp_path / "a.txt"), b"newer")
    assert (tmp_path / "a.txt").read_bytes() == b"newer"
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_threads_that_write_one_file_leave_each_other_alone(tmp_path):
    path = tmp_path / "a.txt"
    with ThreadPoolExecutor(1) as other:
        with whole_files(path) as (part,):
            part.write_text("first")
            other.submit(write_whole, path, "second").result()
            assert path.read_text() == "second"
        assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_text_between_marks_is_replaced_and_the_rest_stays(tmp_path):
    path, marks = tmp_path / "README.md", ("<!-- from -->", "<!-- to -->")
    path.write_text("before\n<!-- from -->\nold\n<!-- to -->\nafter\n")
    for text in ("new", "newer"):
        write_between(path, marks, text)
        assert path.read_text() == f"before\n<!-- from -->\n\n{text}\n\n<!-- to -->\nafter\n"


@pytest.mark.parametrize(
    "content", ["no marks", "<a> no end", "<b> wrong order <a>", "<a> twice <a> <b>", "<a> <b> <b>"]
)
def test_marks_that_are_not_there_once_each_are_refused(tmp_path, content):
    path = tmp_path / "README.md"
    path.write_text(content)
    with pytest.raises(ValueError, match="must hold the marks <a> and <b> once each"):
        write_between(path, ("<a>", "<b>"), "new")
    assert path.read_text() == content


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_image(tmp_path / "none" / "x.png", torch.zeros(1, 3, 8, 8))
    assert caught.value.filename == str(tmp_path / "none")
