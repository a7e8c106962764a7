"""Image files of a folder, a zip or a Hugging Face dataset.

The files of a folder or a zip can be latents instead, as `ncvsd encode` writes them. No file runs
code, and no source names files elsewhere.
"""

import io
import itertools
import json
import reprlib
from abc import ABC, abstractmethod
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ncvsd_inverse.images import (
    MAX_PIXELS,
    SUFFIXES,
    decode_image,
    is_picture_name,
    measure_picture,
)
from ncvsd_inverse.machine import extra
from ncvsd_inverse.priors.latent import LATENT_CHANNELS
from ncvsd_inverse.sources import SourceFiles, open_source, read_file

__all__ = [
    "LABELS_FILE",
    "LATENT_SUFFIX",
    "DatasetImages",
    "Faults",
    "ImageFiles",
    "NamedImages",
    "open_images",
    "read_moments",
    "read_pixels",
    "read_size",
]

LABELS_FILE = "dataset.json"
LATENT_SUFFIX = ".npy"

_USABLE_PER_FAULT = 100
_NAMED = 5
_NPY_HEADER_BYTES = 4096
_MAX_LATENT = MAX_PIXELS // 64
"""Largest area of a latent: that of the largest picture, whose sides are shrunk by 8."""

_LABELS_BYTES = 2**20
_BYTES_PER_LABEL = 2**10
"""Most bytes of dataset.json: so many, and so many for each image."""

_MAX_CLASSES = 2**16


class ImageFiles(ABC):
    """Image files by number, in the order of their names; can be sent to another process.

    Attributes:
        source: the folder or archive.
        names: a name for each image.
    """

    source: Path
    names: list[str]

    @property
    def latents(self) -> bool:
        """Whether the files are latents; else they are pictures."""
        return _is_latent(self.names[0])

    @abstractmethod
    def open(self, index: int) -> BinaryIO:
        """Open image number `index` for reading; any error means that it cannot be read."""

    @abstractmethod
    def read_labels(self) -> tuple[list[int], int]:
        """Return the class number of each image and the number of classes.

        Raises:
            ValueError: if an image has no label, or one that is no class.
        """


class NamedImages(ImageFiles):
    """Every image file, or file of a latent, below a folder or in a zip of any layout (EDM's).

    Labels come from dataset.json or paths. A folder around all files, dataset.json too, does not
    count.

    Args:
        source: the folder or archive.

    Raises:
        ValueError: if a file is no whole zip archive, or a folder has links that lead out of it.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._files: SourceFiles = open_source(source, _is_wanted)
        self.names = self._files.names
        for name, reason in self._files.refused.items():
            raise ValueError(f"{source / name} cannot be read: {reason}")

    def open(self, index: int) -> BinaryIO:
        """Open a file of the folder or archive."""
        return self._files.open(self.names[index])

    def read_labels(self) -> tuple[list[int], int]:
        """Return what dataset.json says, else the numbers of the first folders, by their names."""
        most = _LABELS_BYTES + _BYTES_PER_LABEL * len(self.names)
        parts = [PurePosixPath(name).parts for name in self.names]
        folders = [path[:-1] for path in parts]
        first, last = min(folders), max(folders)
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
        around = [part for part, _ in pairs]  # what the first and the last share, all share
        for depth in range(len(around) + 1):
            labels_file = "/".join((*around[:depth], LABELS_FILE))
            if self._files.has(labels_file):
                content = read_file(self._files, labels_file, most)
                return self._label_by_file(content, ["/".join(path[depth:]) for path in parts])
        # What holds files alone may be the one class that there is.
        depth = max(0, min(len(around), min(map(len, parts)) - 2))
        return self._label_by_folder([path[depth:] for path in parts])

    def _label_by_file(self, content: bytes, names: list[str]) -> tuple[list[int], int]:
        """Return the labels that dataset.json gives to files by their names from its folder on."""
        try:
            described = dict(json.loads(content)["labels"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f'{LABELS_FILE} in {self.source} must hold {{"labels": [[name, label], ...]}}: '
                f"{error}"
            ) from error
        if missing := [name for name in names if name not in described]:
            raise ValueError(
                f"{LABELS_FILE} in {self.source} must label every image, "
                f"got none for {len(missing)}, {missing[0]} among them"
            )
        return _count_classes([described[name] for name in names], self)

    def _label_by_folder(self, paths: list[tuple[str, ...]]) -> tuple[list[int], int]:
        """Return the numbers of the first folders of paths."""
        for path in paths:
            if len(path) < 2:
                raise ValueError(
                    f"labels of {self.source} must come from {LABELS_FILE} or from sub-folders, "
                    f"got {path[-1]} in neither"
                )
        classes = sorted({path[0] for path in paths})
        numbers = {folder: number for number, folder in enumerate(classes)}
        return [numbers[path[0]] for path in paths], len(classes)


class DatasetImages(ImageFiles):
    """The rows of a Hugging Face dataset: columns `image` and, for labels, `label`.

    Args:
        source: a folder as `datasets.Dataset.save_to_disk` writes it, or one of parquet files,
            which that package first copies into its own cache.

    Raises:
        ImportError: if the package datasets is not installed.
        ValueError: if the dataset cannot be read, has several splits or no column `image`, or
            names files elsewhere.
    """

    def __init__(self, source: Path) -> None:
        with extra("data"):
            import datasets
        try:
            if _is_saved_dataset(source):
                dataset = datasets.load_from_disk(str(source))
            else:
                dataset = datasets.load_dataset("parquet", data_dir=str(source))
        # Its errors are of many kinds, those of pyarrow among them.
        except Exception as error:
            raise ValueError(f"the dataset in {source} cannot be read: {error}") from error
        if isinstance(dataset, dict):
            if len(dataset) != 1:
                raise ValueError(
                    f"{source} must hold one split, got {', '.join(sorted(dataset))}: "
                    "give a folder that holds one of them"
                )
            (dataset,) = dataset.values()
        if _is_saved_dataset(source):
            _check_within(source, [Path(file["filename"]) for file in dataset.cache_files])
        if "image" not in dataset.column_names:
            raise ValueError(
                f"{source} must have a column 'image', got {', '.join(dataset.column_names)}"
            )
        self.source = source
        self.names = [f"row {index}" for index in range(len(dataset))]
        self._rows: Any = dataset
        self._images: Any = dataset.select_columns(["image"])
        if isinstance(dataset.features["image"], datasets.Image):
            # Files as they are: they are decoded as those of a folder or a zip.
            self._images = self._images.cast_column("image", datasets.Image(decode=False))

    def open(self, index: int) -> BinaryIO:
        """Open what a row's `image` holds; ValueError if it only names a file elsewhere."""
        image = self._images[index]["image"]
        content = image["bytes"] if isinstance(image, dict) else image
        if not isinstance(content, bytes):
            named = image["path"] if isinstance(image, dict) else None
            raise ValueError(f"it must hold a file's bytes, got the name of one, {named!r}")
        return io.BytesIO(content)

    def read_labels(self) -> tuple[list[int], int]:
        """Return the column `label`."""
        if "label" not in self._rows.column_names:
            raise ValueError(
                f"{self.source} must have a column 'label', "
                f"got {', '.join(self._rows.column_names)}"
            )
        labels, largest = _count_classes(list(self._rows["label"]), self)
        return labels, getattr(self._rows.features["label"], "num_classes", None) or largest


def open_images(source: str | Path) -> ImageFiles:
    """Return the image files of a folder, a zip archive or a Hugging Face dataset folder.

    Raises:
        ImportError: if a Hugging Face dataset is given and the package datasets is missing.
        ValueError: if there is no such folder or archive, or it holds no images, or latents too.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"data must be an existing zip or folder, got {path}")
    files: ImageFiles
    if path.is_dir() and (_is_saved_dataset(path) or next(path.rglob("*.parquet"), None)):
        files = DatasetImages(path)
    else:
        files = NamedImages(path)
    if not files.names:
        raise ValueError(
            f"{path} must hold images ({', '.join(SUFFIXES)}) or latents ({LATENT_SUFFIX}), "
            "got neither"
        )
    if other := [name for name in files.names if _is_latent(name) != files.latents]:
        raise ValueError(
            f"{path} must hold images or latents ({LATENT_SUFFIX}), "
            f"got both: {files.names[0]} and {other[0]}"
        )
    return files


class Faults:
    """The images of a source that cannot be used, and why; ValueError when they are too many.

    Args:
        files: the image files.
        allowed: how many may be unusable; None: 1%.
    """

    def __init__(self, files: ImageFiles, *, allowed: int | None = None) -> None:
        self.files = files
        self.allowed = len(files.names) // _USABLE_PER_FAULT if allowed is None else allowed
        self.reasons: dict[int, str] = {}

    def add(self, reasons: dict[int, str]) -> None:
        """Note images by number; ValueError that names some if there are now too many."""
        self.reasons |= reasons
        if len(self.reasons) > self.allowed:
            some = sorted(self.reasons)[:_NAMED]
            named = "; ".join(f"{self.files.names[index]}: {self.reasons[index]}" for index in some)
            raise ValueError(
                f"at most {self.allowed} of the {len(self.files.names)} images in "
                f"{self.files.source} may be unusable, got {len(self.reasons)}: {named}"
                + ("; ..." if len(self.reasons) > len(some) else "")
            )

    def names(self) -> list[str]:
        """Return the names of the images that cannot be used."""
        return [self.files.names[index] for index in sorted(self.reasons)]


def read_size(files: ImageFiles, index: int) -> tuple[int, int]:
    """Return height and width of an image or a latent, as its header gives them.

    Raises:
        ValueError: if it has no readable header or is too large to read; the reason alone.
    """
    measure = _read_latent_header if files.latents else measure_picture
    try:
        with files.open(index) as file:
            height, width = measure(file)
    except Exception as error:
        raise ValueError(_reason(error)) from error
    return height, width


def _read_latent_header(file: BinaryIO) -> tuple[int, int]:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version} of the format, only (1, 0) is read")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    channels = 2 * LATENT_CHANNELS
    if dtype not in (np.float16, np.float32) or len(shape) != 3 or shape[0] != channels:
        raise ValueError(f"{dtype} {shape}, a latent is float16 or float32 ({channels}, H, W)")
    if min(shape) < 1 or shape[1] * shape[2] > _MAX_LATENT:
        raise ValueError(f"{shape[1]} x {shape[2]} entries, allowed are 1 to {_MAX_LATENT}")
    return shape[1], shape[2]


def read_pixels(files: ImageFiles, index: int, size: tuple[int, int]) -> Tensor:
    """Decode an image as RGB; see `images.read_image` for how colours are handled.

    Args:
        files: the image files.
        index: which of them.
        size: height and width that its header gave.

    Returns:
        uint8 pixels, shape (3, H, W).

    Raises:
        ValueError: if it cannot be decoded, or to another size; the reason alone.
    """
    try:
        with files.open(index) as file:
            x = decode_image(file, "it")[0]
    except Exception as error:
        raise ValueError(_reason(error)) from error
    if x.shape[1:] != size:
        raise ValueError(
            f"its header says {size[0]} x {size[1]} pixels, it has {x.shape[1]} x {x.shape[2]}"
        )
    return x.add_(1).mul_(127.5).round_().to(torch.uint8)


def read_moments(files: ImageFiles, index: int, size: tuple[int, int]) -> Tensor:
    """Read a latent's file.

    Args:
        files: the latents.
        index: which of them.
        size: height and width that its header gave.

    Returns:
        The means, then the stds of the latent's entries, float32, shape (8, H, W).

    Raises:
        ValueError: if it cannot be read, or means and stds are none; the reason alone.
    """
    try:
        with files.open(index) as file:
            # What a damaged file has beyond its values is not read into memory.
            content = io.BytesIO(file.read(_NPY_HEADER_BYTES + 8 * LATENT_CHANNELS * prod(size)))
        came = _read_latent_header(content)
        content.seek(0)
        values = np.lib.format.read_array(content, allow_pickle=False)
    except Exception as error:
        raise ValueError(_reason(error)) from error
    if came != size:
        raise ValueError(f"{size[0]} x {size[1]} pixels before, now {came[0]} x {came[1]}")
    moments = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    if not bool(moments.isfinite().all()) or float(moments[LATENT_CHANNELS:].min()) < 0:
        raise ValueError("means that are not finite, or stds that are not, or are below 0")
    return moments


def _reason(error: Exception) -> str:
    """Return why an image cannot be read, in a few words."""
    from PIL import UnidentifiedImageError

    cause = error.__cause__ or error
    no_picture = isinstance(cause, UnidentifiedImageError)
    return "no picture" if no_picture else str(cause) or type(cause).__name__


def _is_wanted(name: str) -> bool:
    return is_picture_name(name) or (_is_latent(name) and not name.startswith("."))


def _is_latent(name: str) -> bool:
    return name.lower().endswith(LATENT_SUFFIX)


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (
        (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    )


def _check_within(folder: Path, files: list[Path]) -> None:
    """ValueError unless the files of a dataset lie in its folder."""
    for file in files:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"the dataset in {folder} must hold its files, got {file} elsewhere")


def _count_classes(labels: list[Any], files: ImageFiles) -> tuple[list[int], int]:
    """Return the labels and the number of classes; ValueError unless all are class numbers."""
    for name, label in zip(files.names, labels, strict=True):
        known = isinstance(label, int) and not isinstance(label, bool)
        if not (known and 0 <= label < _MAX_CLASSES):
            raise ValueError(
                f"labels of {files.source} must be class numbers from 0 to {_MAX_CLASSES - 1}, "
                f"got {reprlib.repr(label)} for {name}"
            )
    return labels, max(labels) + 1
