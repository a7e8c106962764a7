"""Training data: the order of batches, sources, labels, and files that cannot be used."""

import io
import itertools
import json
import multiprocessing
import sys
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ncvsd_inverse.images import read_image, read_images
from ncvsd_inverse.training.data import ImageData, StreamedData, decoding, read_data
from ncvsd_inverse.training.data.sampler import Sampler


def noise(seed, height=8, width=8):
    """Return pixels (H, W, 3), others for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def as_png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def cut_short(content):
    """Return a PNG file whose header is whole and whose pixels are not."""
    return content[:60]


def write_folder(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def plain_files(num, side=8):
    return {f"{number:03}.png": as_png(noise(number, side, side)) for number in range(num)}


def mixed_files(num=200):
    """Return files of several sizes, all at least 6 pixels a side."""
    return {
        f"{number:03}.png": as_png(noise(number, 6 + number % 3, 6 + number % 4))
        for number in range(num)
    }


def small_images(num=20, **options):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageData(pixels, **options)


def first(data, num, *, start=0, size=8, seed=3, rows=None):
    """Return the images of the first batches from `start` on, one after another."""
    batches = data.batches(start, size, seed=seed, rows=rows)
    return torch.cat([batch.images for batch in itertools.islice(batches, num)])


def places(batches, data):
    """Return which images of `data` (labelled by their numbers) are in batches."""
    return [int(index) for batch in batches for index in batch.labels.argmax(1)]


def test_batches_pass_over_all_images_and_flip_half():
    data = small_images(flip=False)
    plain = first(data, 5)
    everything = data.images(torch.arange(20)).flatten(1)
    for epoch in (plain[:20], plain[20:]):
        found = (epoch.flatten(1)[:, None] == everything[None]).all(2)
        assert found.sum(0).tolist() == [1] * 20
    assert not torch.equal(plain[:20], plain[20:])
    flipped = first(small_images(flip=True), 5)
    same = (flipped == plain).flatten(1).all(1)
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 8 <= int(mirrored.sum()) <= 32  # of 40, four standard deviations
    assert not torch.equal(plain, first(data, 5, seed=4))


def test_batches_are_scaled_and_labelled():
    labels = torch.tensor([2, 0, 1])
    data = small_images(3, flip=False, labels=labels, num_classes=4)
    assert data.image_shape == (3, 8, 8)
    assert data.num_classes == 4
    batch = next(data.batches(0, 3, seed=0))
    assert batch.images.dtype == batch.labels.dtype == torch.float32
    assert batch.labels.shape == (3, 4)
    assert batch.labels.sum(1).tolist() == [1, 1, 1]
    for image, row in zip(batch.images, batch.labels, strict=True):
        pixels = data.pixels[int((labels == row.argmax()).nonzero())]
        assert torch.equal(((image + 1) * 127.5).round().to(torch.uint8), pixels)
    assert float(data.images(torch.arange(3)).min()) >= -1
    unlabelled = small_images()
    assert unlabelled.num_classes == 0
    assert next(unlabelled.batches(0, 2, seed=0)).labels is None


@pytest.mark.parametrize("memory_gib", [1.0, 0.0])
def test_a_batch_depends_on_its_number_alone(tmp_path, memory_gib):
    write_folder(tmp_path, mixed_files(20))
    data = read_data(tmp_path, crop=5, memory_gib=memory_gib, workers=0)
    whole = first(data, 6)  # 48 images: two epochs and a part
    assert torch.equal(first(data, 3, start=3), whole[24:])
    thirds = [first(data, 6, rows=slice(part, None, 3)).unflatten(0, (6, -1)) for part in range(3)]
    for part, third in enumerate(thirds):
        assert torch.equal(third, whole.unflatten(0, (6, 8))[:, part::3])
    assert torch.equal(first(data, 6, rows=slice(0, 4))[:4], whole[:4])
    assert not torch.equal(first(data, 6, seed=4), whole)


def test_crops_lie_anywhere_and_nowhere_else():
    # A pixel holds its own row and column.
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    image = torch.stack([rows, columns, rows]).to(torch.uint8)
    data = ImageData([image, image[:, :, :3]], crop=3)
    assert data.image_shape == (3, 3, 3)
    seen = []
    for crop in (first(data, 50) + 1) * 127.5:
        grid = crop.round().int()
        left, right = int(grid[1, 0, 0]), int(grid[1, 0, 2])
        top = int(grid[0, 0, 0])
        corner = min(left, right)
        assert grid[0, :, 0].tolist() == [top, top + 1, top + 2]
        assert sorted(grid[1, 0].tolist()) == [corner, corner + 1, corner + 2]
        seen.append((top, corner, left < right))
    # 2 x 3 places of the wide image and 2 of the narrow one, either way round.
    assert set(seen) == set(itertools.product((0, 1), (0, 1, 2), (True, False)))


def test_memory_and_streams_give_the_same_batches_past_unusable_files(tmp_path):
    files = mixed_files(300)
    files["020.png"] = cut_short(files["020.png"])  # found when it is decoded
    files["021.png"] = b"no picture"  # found by its header
    files["299.png"] = as_png(noise(0, 4, 9))  # smaller than the crop
    write_folder(tmp_path, files)
    names = json.dumps({"labels": [[name, number] for number, name in enumerate(sorted(files))]})
    (tmp_path / "dataset.json").write_text(names)
    memory = read_data(tmp_path, crop=5, labels=True)
    streamed = read_data(tmp_path, crop=5, labels=True, memory_gib=0, workers=0)
    assert isinstance(memory, ImageData)
    assert isinstance(streamed, StreamedData)
    assert memory.image_shape == streamed.image_shape == (3, 5, 5)
    assert memory.num_classes == streamed.num_classes == len(memory) == len(streamed) == 300
    assert memory.skipped == ["020.png", "021.png", "299.png"]
    assert streamed.skipped == ["021.png", "299.png"]
    epoch = [list(itertools.islice(data.batches(0, 20, seed=1), 15)) for data in (memory, streamed)]
    assert streamed.skipped == memory.skipped
    for left, right in zip(*epoch, strict=True):
        assert torch.equal(left.images, right.images)
        assert torch.equal(left.labels, right.labels)
    # The next good image stands in for each: 22 for 20 and 21, and 0 for the last.
    expected = [*sorted({*range(300)} - {20, 21, 299}), 0, 22, 22]
    assert sorted(places(epoch[0], memory)) == sorted(expected)


def test_whole_images_stand_in_too(tmp_path):
    files = plain_files(200)
    files["000.png"] = cut_short(files["000.png"])
    files["199.png"] = b""
    data = read_data(write_zip(tmp_path / "all.zip", files))
    assert data.skipped == ["000.png", "199.png"]
    assert torch.equal(data.pixels[0], data.pixels[1])
    assert torch.equal(data.pixels[199], data.pixels[1])
    assert torch.equal(data.pixels[1].permute(1, 2, 0), torch.from_numpy(noise(1)))
    streamed = read_data(tmp_path / "all.zip", memory_gib=0, workers=0)
    assert torch.equal(first(streamed, 25), first(data, 25))


@pytest.mark.slow  # it starts three processes, each of which imports torch
# Some of torch's workers abort in threads of its own as they exit, which its iterator then reports
# from where nobody can catch it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_streaming_leaves_no_worker_behind_and_says_what_is_broken(tmp_path):
    files = plain_files(100)
    files["dataset.json"] = json.dumps({"labels": [[f"{n:03}.png", n] for n in range(100)]})
    memory = read_data(write_zip(tmp_path / "good.zip", files), flip=False, labels=True)
    batches = list(itertools.islice(memory.batches(0, 4, seed=3), 6))
    for index in places(batches[5:], memory)[:2]:
        files[f"{index:03}.png"] = cut_short(files[f"{index:03}.png"])
    archive = write_zip(tmp_path / "bad.zip", files)

    state = torch.get_rng_state()
    options = {"flip": False, "labels": True, "memory_gib": 0}
    streamed = read_data(archive, workers=2, **options)
    running = streamed.batches(0, 4, seed=3)
    for expected in batches[:5]:
        got = next(running)
        assert torch.equal(got.images, expected.images)
        assert torch.equal(got.labels, expected.labels)
    assert len(multiprocessing.active_children()) == 2
    with pytest.raises(ValueError, match=r"at most 1 of the 100 .*bad\.zip.*got 2: \d+\.png"):
        next(running)
    assert multiprocessing.active_children() == []

    running = read_data(archive, workers=1, **options).batches(0, 4, seed=3)
    next(running)
    running.close()
    assert multiprocessing.active_children() == []
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_is_used_when_images_fit_there(tmp_path):
    write_folder(tmp_path, plain_files(4))
    size = 4 * 3 * 8 * 8 / 2**30
    assert isinstance(read_data(tmp_path, memory_gib=size), ImageData)
    assert isinstance(read_data(tmp_path, memory_gib=size * 0.99), StreamedData)


def test_folders_and_zips_are_read_in_the_order_of_names(tmp_path):
    files = {f"{n % 2}/b/{n}.png": as_png(noise(n)) for n in range(4)}
    # A name that would leave the folder is a name: nothing is ever written.
    zipped = files | {"../../2.png": as_png(noise(4)), "/3.PNG": as_png(noise(5))}
    others = {"readme.txt": b"text", "0/._0.png": b"a Mac's notes"}
    write_folder(tmp_path / "folder", files | others)
    write_zip(tmp_path / "all.zip", files | others)
    before = sorted(tmp_path.rglob("*"))
    expected = torch.stack([torch.from_numpy(noise(n)).permute(2, 0, 1) for n in (0, 2, 1, 3)])
    assert torch.equal(ImageData.read(tmp_path / "folder").pixels, expected)
    assert torch.equal(ImageData.read(tmp_path / "all.zip").pixels, expected)
    traversing = ImageData.read(write_zip(tmp_path / "all.zip", zipped | others))
    assert torch.equal(traversing.pixels[2:], expected)
    assert sorted(tmp_path.rglob("*")) == before


def test_colours_and_orientation_are_those_of_read_image(tmp_path):
    deep = (np.arange(48, dtype=np.uint16) * 1300).reshape(6, 8)
    pixels = noise(0, 6, 8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).convert("L").save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([pixels, pixels[..., 0]])).save(tmp_path / "alpha.png")
    Image.fromarray(pixels).quantize(8).save(tmp_path / "palette.png")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for suffix in ("png", "jpg", "webp"):
        path = tmp_path / f"turned.{suffix}"
        Image.fromarray(noise(1, 8, 6)).save(path, exif=turned)
    data = ImageData.read(tmp_path)
    assert data.image_shape == (3, 6, 8)
    for got, path in zip(data.pixels, sorted(tmp_path.iterdir()), strict=True):
        expected = (read_image(path)[0] + 1) * 127.5
        assert float((got - expected).abs().max()) <= 0.5001, path  # rounded to the nearest level


@pytest.mark.parametrize("memory_gib", [1.0, 0.0])
def test_images_that_are_not_of_the_size_in_their_header_are_unusable(tmp_path, memory_gib):
    # The orientation stands after the pixels, where reading the header does not find it.
    turned = Image.Exif()
    turned[0x0112] = 6
    chunk = b"eXIf" + turned.tobytes().removeprefix(b"Exif\0\0")
    size, checksum = len(chunk) - 4, zlib.crc32(chunk)
    chunk = size.to_bytes(4) + chunk + checksum.to_bytes(4)
    whole = as_png(noise(0, 6, 8))
    files = {f"{n:03}.png": whole for n in range(100)} | {
        "050.png": whole[:-12] + chunk + whole[-12:]
    }
    source = write_zip(tmp_path / "all.zip", files)
    data = read_data(source, memory_gib=memory_gib, workers=0)
    next(data.batches(0, 100, seed=0))
    assert data.skipped == ["050.png"]
    with pytest.raises(ValueError, match=r"its header says 6 x 8 pixels, it has 8 x 6"):
        ImageData.read(source)


def test_labels_come_from_the_file_or_the_folders(tmp_path):
    files = {f"{name}/deep/{n}.png": as_png(noise(n)) for n, name in enumerate("bab")}
    folder = write_folder(tmp_path / "folder", files)
    archive = write_zip(tmp_path / "all.zip", files)
    for source in (folder, archive):
        data = read_data(source, labels=True)
        assert data.num_classes == 2
        assert data.labels.tolist() == [0, 1, 1]
        assert read_data(source).num_classes == 0
    described = json.dumps({"labels": [[name, n + 3] for n, name in enumerate(files)]})
    write_folder(folder, {"dataset.json": described.encode()})
    write_zip(archive, files | {"dataset.json": described})
    for source in (folder, archive):
        data = read_data(source, labels=True)
        assert data.num_classes == 6
        assert data.labels.tolist() == [4, 3, 5]
        assert read_data(source).labels is None


def test_a_folder_around_all_is_seen_through(tmp_path):
    files = {f"{name}/{n}.png": as_png(noise(n)) for n, name in enumerate("bab")}
    described = json.dumps({"labels": [[name, n + 3] for n, name in enumerate(files)]}).encode()
    for content, expected in ((files, [0, 1, 1]), (files | {"dataset.json": described}, [4, 3, 5])):
        for depth, around in enumerate(("", "wrap/", "wrap/again/")):
            wrapped = {around + name: data for name, data in content.items()}
            wrapped["__MACOSX/wrap/._0.png"] = b"of a Mac"
            place = f"{depth}_{len(content)}"
            for source in (
                write_folder(tmp_path / place, wrapped),
                write_zip(tmp_path / f"{place}.zip", wrapped),
            ):
                assert read_data(source, labels=True).labels.tolist() == expected
    for name in ("a/0.png", "wrap/a/0.png"):  # one class is one, not a folder around files
        source = write_zip(tmp_path / "one.zip", {name: as_png(noise(0))})
        assert read_data(source, labels=True).num_classes == 1


def test_too_many_classes_are_refused_before_a_picture_is_read(tmp_path):
    source = write_zip(tmp_path / "all.zip", {f"{n}/0.png": b"broken" for n in "abc"})
    with pytest.raises(ValueError, match=r"all\.zip must have at most 2 classes.*got 3"):
        read_data(source, labels=True, most_classes=2)
    with pytest.raises(ValueError, match="may be unusable"):
        read_data(source, labels=True, most_classes=3)


def test_data_are_known_by_what_they_hold(tmp_path):
    files = {f"{n % 2}/{n}.png": as_png(noise(n)) for n in range(4)}
    folder = write_folder(tmp_path / "folder", files)
    digest = read_data(folder).digest
    moved = write_folder(tmp_path / "moved", {f"wrap/{k}": v for k, v in files.items()})
    archive = write_zip(tmp_path / "all.zip", files)
    for same in (folder, moved, archive):
        for memory_gib in (0.0, 4.0):
            assert read_data(same, memory_gib=memory_gib).digest == digest
    others = {
        read_data(folder, labels=True).digest,
        read_data(folder, flip=False).digest,
        read_data(folder, crop=4).digest,
        digest,
    }
    for changed in (
        {"0/0.png": as_png(noise(9))},
        {"1/3.png": as_png(noise(9))},
        {"1/4.png": as_png(noise(9))},
    ):
        others.add(read_data(write_zip(archive, files | changed)).digest)
    assert len(others) == 7


def test_of_many_files_the_beginnings_are_digested(tmp_path, monkeypatch):
    content = as_png(noise(0, 200, 200))
    first, second = (
        read_data(write_zip(tmp_path / name, {"0.png": content + name.encode()})).digest
        for name in ("a.zip", "b.zip")
    )
    assert first != second
    monkeypatch.setattr(decoding, "_DIGESTED_BYTES", 0)
    assert len({read_data(tmp_path / name).digest for name in ("a.zip", "b.zip")}) == 1


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("{", "must hold"),
        ('{"labels": null}', "must hold"),
        ("[]", "must hold"),
        ("[" * 100_000, "must hold"),
        (" " * 2**21, "must have at most"),
        ('{"labels": [["0.png", 0], ["1.png", 65536]]}', "class numbers from 0 to 65535"),
        ('{"labels": [["0.png", 0]]}', r"label every image, got none for 1, 1\.png"),
        (
            '{"labels": [["0.png", 0], ["1.png", -1]]}',
            r"class numbers from 0 to 65535, got -1 for 1\.png",
        ),
        ('{"labels": [["0.png", "cat"], ["1.png", 1]]}', r"got 'cat' for 0\.png"),
    ],
)
def test_wrong_label_files_are_refused(tmp_path, described, message):
    source = write_zip(tmp_path / "all.zip", plain_files(2) | {"dataset.json": described})
    files = {"0.png": as_png(noise(0)), "1.png": as_png(noise(1)), "dataset.json": described}
    source = write_zip(tmp_path / "all.zip", files)
    with pytest.raises(ValueError, match=message):
        read_data(source, labels=True)
    assert len(read_data(source)) == 2


def test_images_without_labels_are_named(tmp_path):
    write_folder(tmp_path, {"a/0.png": as_png(noise(0)), "b.png": as_png(noise(1))})
    with pytest.raises(ValueError, match=r"sub-folders, got b\.png"):
        read_data(tmp_path, labels=True)


def test_wrong_sizes_are_named(tmp_path):
    files = plain_files(3) | {"odd.png": as_png(noise(0, 8, 9))}
    folder = write_folder(tmp_path / "mixed", files)
    for read in (read_data, ImageData.read):
        with pytest.raises(ValueError, match=r"one size.*8 x 8 \(000\.png\) and 8 x 9 \(odd\.png"):
            read(folder)
    archive = write_zip(tmp_path / "plain.zip", plain_files(3))
    assert read_data(archive, resolution=8).image_shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"16 x 16 pixels \(the resolution\), got 8 x 8"):
        read_data(archive, resolution=16)
    with pytest.raises(ValueError, match=r"8 x 8 pixels \(the resolution\), got 4 x 4"):
        read_data(archive, resolution=8, crop=4)
    with pytest.raises(ValueError, match=r"000\.png: 8 x 8 pixels, smaller than crop 9"):
        read_data(archive, crop=9)


def test_sources_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"existing zip or folder, got .*nowhere"):
        read_data(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must hold images"):
        read_data(tmp_path)
    with pytest.raises(ValueError, match="must hold images"):
        read_data(write_zip(tmp_path / "empty.zip", {"readme.txt": b""}))
    whole = write_zip(tmp_path / "whole.zip", plain_files(3)).read_bytes()
    for content in (b"", b"no archive", whole[:-30], whole[: len(whole) // 2]):
        (tmp_path / "bad.zip").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.zip must be a folder or a zip archive that"):
            read_data(tmp_path / "bad.zip")


def with_flipped_byte(content):
    """Return a zip whose first member no longer has the contents that its checksum says."""
    damaged = bytearray(content)
    damaged[content.index(b"IDAT") + 10] ^= 0xFF
    return bytes(damaged)


def encrypted(content):
    """Return a zip whose first member is marked as encrypted."""
    marked = bytearray(content)
    marked[6] |= 1
    marked[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(marked)


@pytest.mark.parametrize(
    ("damage", "reason"), [(with_flipped_byte, "CRC"), (encrypted, "encrypted")]
)
def test_members_that_cannot_be_read_count_as_unusable(tmp_path, damage, reason):
    for num in (100, 3):
        content = write_zip(tmp_path / f"{num}.zip", plain_files(num)).read_bytes()
        (tmp_path / f"{num}.zip").write_bytes(damage(content))
    assert read_data(tmp_path / "100.zip").skipped == ["000.png"]
    with pytest.raises(ValueError, match=rf"at most 0 of the 3 .*got 1: 000\.png: .*{reason}"):
        read_data(tmp_path / "3.zip")


def test_too_many_unusable_files_are_counted_and_named(tmp_path):
    files = plain_files(200)
    for number in range(100, 110):
        files[f"{number}.png"] = b"no picture" if number % 2 else cut_short(files[f"{number}.png"])
    source = write_zip(tmp_path / "all.zip", files)
    # The five that are found by their headers are enough.
    with pytest.raises(ValueError, match=r"at most 2 of the 200 .*got 5: 101\.png: no picture; "):
        read_data(source)
    for number in range(100, 110):
        files[f"{number}.png"] = cut_short(files["000.png"])
    write_zip(source, files)
    with pytest.raises(ValueError, match=r"at most 2 .*got 10: 100\.png: .*; 104\.png: .*; \.\.\."):
        read_data(source)
    with pytest.raises(ValueError, match=r"at most 2 .*got 3: "):
        list(read_data(source, memory_gib=0, workers=0).batches(0, 200, seed=0))


def test_held_out_images_must_all_be_read(tmp_path):
    files = plain_files(200)
    files["050.png"] = cut_short(files["050.png"])
    source = write_zip(tmp_path / "all.zip", files)
    assert len(read_data(source).skipped) == 1
    with pytest.raises(ValueError, match=r"at most 0 of the 200 .*050\.png"):
        ImageData.read(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": 0}, "crop must be at least 1"),
        ({"resolution": 0}, "resolution must be at least 1"),
        ({"memory_gib": -1.0}, "memory_gib must be non-negative"),
        ({"workers": -1}, "workers must be at least 0"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, change, message):
    write_folder(tmp_path, plain_files(2))
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"start": -1}, "start must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"rows": slice(8, 16)}, "rows must hold some of 8"),
    ],
)
def test_wrong_batches_are_refused_at_once(arguments, message):
    values = {"start": 0, "size": 8, "seed": 0} | arguments
    with pytest.raises(ValueError, match=message):
        small_images().batches(values.pop("start"), values.pop("size"), **values)


PIXELS = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (PIXELS.float(), {}, "pixels must be uint8"),
        (PIXELS[0], {}, "pixels must be uint8 of shape"),
        (PIXELS[:0], {}, "pixels must be uint8 of shape"),
        (list(PIXELS), {}, "pixels must be a tensor"),
        ([], {"crop": 4}, "pixels must be a tensor"),
        ([PIXELS[0], PIXELS[1, :1]], {"crop": 4}, "pixels must be uint8 images"),
        ([PIXELS[0], PIXELS[1, :, :3]], {"crop": 4}, "crop must fit all images"),
        (PIXELS, {"crop": 9}, "crop must fit all images"),
        (PIXELS, {"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be int64"),
        (PIXELS, {"labels": torch.zeros(2)}, r"labels must be int64"),
        (PIXELS, {"labels": torch.tensor([0, 3]), "num_classes": 3}, "must lie in 0 to 2"),
        (PIXELS, {"labels": torch.tensor([0, -1])}, "must lie in 0 to 0"),
    ],
)
def test_wrong_pixels_and_labels_are_refused(pixels, options, message):
    with pytest.raises(ValueError, match=message):
        ImageData(pixels, **options)


def test_images_of_several_sizes_are_not_returned_whole():
    with pytest.raises(ValueError, match="one size"):
        ImageData(list(PIXELS), crop=4).images(torch.arange(2))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(ImportError, match=r"datasets: pip install 'ncvsd-inverse\[data\]'"):
        read_data(tmp_path)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Six labelled images as a Hugging Face dataset."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcd"))}
    columns = {
        "image": [Image.fromarray(noise(number)) for number in range(6)],
        "label": [0, 1, 0, 1, 2, 0],
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize("kind", ["saved", "saved split", "parquet"])
def test_datasets_on_disk_are_read(tmp_path, rows, kind):
    folder = tmp_path / "data"
    if kind == "saved":
        rows.save_to_disk(str(folder))
    elif kind == "saved split":
        type_of_splits = pytest.importorskip("datasets").DatasetDict
        type_of_splits({"train": rows}).save_to_disk(str(folder))
    else:
        (folder / "data").mkdir(parents=True)
        rows.to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))
    data = read_data(folder, labels=True)
    assert data.labels.tolist() == [0, 1, 0, 1, 2, 0]
    assert data.num_classes == 4
    expected = torch.stack([torch.from_numpy(noise(n)).permute(2, 0, 1) for n in range(6)])
    assert torch.equal(data.pixels, expected)
    streamed = read_data(folder, memory_gib=0, workers=0)
    assert torch.equal(first(streamed, 3), first(data, 3))


def test_datasets_that_do_not_fit_are_refused(tmp_path, rows):
    splits = pytest.importorskip("datasets").DatasetDict({"train": rows, "test": rows})
    splits.save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match="must hold one split, got test, train"):
        read_data(tmp_path / "splits")
    rows.remove_columns("image").save_to_disk(str(tmp_path / "no_image"))
    with pytest.raises(ValueError, match="must have a column 'image', got label"):
        read_data(tmp_path / "no_image")
    rows.remove_columns("label").save_to_disk(str(tmp_path / "no_label"))
    with pytest.raises(ValueError, match="must have a column 'label', got image"):
        read_data(tmp_path / "no_label", labels=True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"broken cannot be read"):
        read_data(tmp_path / "broken")


def test_datasets_name_no_files_elsewhere(tmp_path, rows):
    datasets = pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "secret.png").write_bytes(as_png(noise(0)))
    (tmp_path / "named").mkdir()
    column = [{"bytes": None, "path": str(tmp_path / "secret.png")}]
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": column}, features=features).data.table
    parquet.write_table(table, tmp_path / "named" / "rows.parquet")
    with pytest.raises(ValueError, match=r"hold a file's bytes, got the name of one, '.*secret"):
        read_data(tmp_path / "named")
    rows.save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.rename(tmp_path / arrow.name)
    state = tmp_path / "saved" / "state.json"
    state.write_text(state.read_text().replace(arrow.name, f"../{arrow.name}"))
    with pytest.raises(ValueError, match=r"saved must hold its files, got .* elsewhere"):
        read_data(tmp_path / "saved")


@pytest.mark.parametrize("target", ["../beside/0.png", "../beside"])
def test_folders_are_left_by_no_link(tmp_path, target):
    write_folder(tmp_path, {"in/0.png": as_png(noise(0)), "beside/0.png": as_png(noise(1))})
    (tmp_path / "in" / "1.png").symlink_to(target)
    for read in (read_data, read_images):
        with pytest.raises(ValueError, match=r"1\.png .*it is a link"):
            read(tmp_path / "in")


def test_other_programs_are_never_started(tmp_path):
    write_folder(
        tmp_path, {"0.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"}
    )
    with pytest.raises(ValueError, match=r"got 1: 0\.png: no picture"):
        read_data(tmp_path)


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_LARGE", 63)
    busy, most = [], []

    def read(files, index, size):
        busy.append(index)
        most.append(len(busy))
        time.sleep(0.01)
        busy.remove(index)
        return torch.zeros(3, *size, dtype=torch.uint8)

    monkeypatch.setattr(decoding, "_PICTURES", decoding._PICTURES._replace(read=read))
    read_data(write_folder(tmp_path, plain_files(40)))
    assert max(most) == 1


def test_batches_do_not_depend_on_the_callers_arithmetic(arithmetic):
    sampler = Sampler(10, 6, seed=0, rows=slice(None), flip=True)
    expected = sampler.draw(3)
    with arithmetic():
        found = sampler.draw(3)
    assert found.indices == expected.indices
    assert found.corners == expected.corners
    assert torch.equal(found.mirrored, expected.mirrored)
