"""Image files of a folder, a zip or a Hugging Face dataset.

The files of a folder or a zip can be latents instead, as `ncvsd encode` writes them. Nothing is
ever unpacked to disk, so names inside an archive are only names, and no file runs code.
"""

import io
import json
import warnings
import zipfile
from abc import ABC, abstractmethod
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from ncvsd_inverse.images import MAX_PIXELS, SUFFIXES, read_image
from ncvsd_inverse.machine import extra
from ncvsd_inverse.priors.latent import LATENT_CHANNELS

__all__ = [
    "LABELS_FILE",
    "LATENT_SUFFIX",
    "DatasetImages",
    "Faults",
    "FolderImages",
    "ImageFiles",
    "ZipImages",
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
_ORIENTATION = 0x0112
_QUARTER_TURNS = {5, 6, 7, 8}


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


class _NamedFiles(ImageFiles):
    """Files that have paths, as a folder and a zip do: labels come from dataset.json or paths."""

    @abstractmethod
    def _read_labels_file(self) -> bytes | None:
        """Return the content of dataset.json, None if there is none."""

    def read_labels(self) -> tuple[list[int], int]:
        """Return what dataset.json says, else the numbers of the first folders, by their names."""
        content = self._read_labels_file()
        if content is None:
            return self._label_by_folder()
        try:
            described = dict(json.loads(content)["labels"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{LABELS_FILE} in {self.source} must hold {{"labels": [[name, label], ...]}}: '
                f"{error}"
            ) from error
        if missing := [name for name in self.names if name not in described]:
            raise ValueError(
                f"{LABELS_FILE} in {self.source} must label every image, "
                f"got none for {len(missing)}, {missing[0]} among them"
            )
        return _count_classes([described[name] for name in self.names], self)

    def _label_by_folder(self) -> tuple[list[int], int]:
        folders = []
        for name in self.names:
            if len(parts := PurePosixPath(name).parts) < 2:
                raise ValueError(
                    f"labels of {self.source} must come from {LABELS_FILE} or from sub-folders, "
                    f"got {name} in neither"
                )
            folders.append(parts[0])
        classes = sorted(set(folders))
        numbers = {folder: number for number, folder in enumerate(classes)}
        return [numbers[folder] for folder in folders], len(classes)


class FolderImages(_NamedFiles):
    """Every image file, or file of a latent, below a folder."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.names = sorted(
            path.relative_to(source).as_posix() for path in source.rglob("*") if _is_wanted(path)
        )

    def open(self, index: int) -> BinaryIO:
        """Open a file of the folder."""
        return (self.source / self.names[index]).open("rb")

    def _read_labels_file(self) -> bytes | None:
        path = self.source / LABELS_FILE
        return path.read_bytes() if path.exists() else None


class ZipImages(_NamedFiles):
    """Every image file, or file of a latent, in a zip archive of any layout (EDM's serves).

    Raises:
        ValueError: if the file is no whole zip archive.
    """

    def __init__(self, source: Path) -> None:
        try:
            self._archive = zipfile.ZipFile(source)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{source} must be a whole zip archive: {error}") from error
        self.source = source
        self.names = sorted({name for name in self._archive.namelist() if _is_wanted(Path(name))})

    def __reduce__(self) -> tuple[type["ZipImages"], tuple[Path]]:
        return ZipImages, (self.source,)  # an open file does not travel; it is opened again

    def open(self, index: int) -> BinaryIO:
        """Open a member of the archive."""
        return cast("BinaryIO", self._archive.open(self.names[index]))

    def _read_labels_file(self) -> bytes | None:
        if LABELS_FILE not in self._archive.namelist():
            return None
        try:
            return self._archive.read(LABELS_FILE)
        # zipfile says that a file is damaged, encrypted or compressed in an unknown way.
        except (zipfile.BadZipFile, RuntimeError) as error:
            raise ValueError(f"{LABELS_FILE} in {self.source} cannot be read: {error}") from error


class DatasetImages(ImageFiles):
    """The rows of a Hugging Face dataset: columns `image` and, for labels, `label`.

    Args:
        source: a folder as `datasets.Dataset.save_to_disk` writes it, or one of parquet files,
            which that package first copies into its own cache.

    Raises:
        ImportError: if the package datasets is not installed.
        ValueError: if the dataset cannot be read, has several splits or no column `image`.
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
        """Open what a row's `image` holds or names."""
        image = self._images[index]["image"]
        content = image["bytes"] if isinstance(image, dict) else image
        return Path(image["path"]).open("rb") if content is None else io.BytesIO(content)

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
    if not path.is_dir():
        files = ZipImages(path)
    elif _is_saved_dataset(path) or next(path.rglob("*.parquet"), None):
        files = DatasetImages(path)
    else:
        files = FolderImages(path)
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
    measure = _read_latent_header if files.latents else _read_picture_header
    try:
        with files.open(index) as file:
            height, width = measure(file)
    except Exception as error:
        raise ValueError(_reason(error)) from error
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels, allowed are 1 to {MAX_PIXELS}")
    return height, width


def _read_picture_header(file: BinaryIO) -> tuple[int, int]:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as picture:
            width, height = picture.size
            # Pillow would decode a whole PNG to find an orientation that is not in its header.
            if picture.format != "PNG" or "exif" in picture.info:
                turned = picture.getexif().get(_ORIENTATION) in _QUARTER_TURNS
                width, height = (height, width) if turned else (width, height)
    return height, width


def _read_latent_header(file: BinaryIO) -> tuple[int, int]:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version} of the format, only (1, 0) is read")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    channels = 2 * LATENT_CHANNELS
    if dtype not in (np.float16, np.float32) or len(shape) != 3 or shape[0] != channels:
        raise ValueError(f"{dtype} {shape}, a latent is float16 or float32 ({channels}, H, W)")
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
            content = io.BytesIO(file.read())
        # Pillow, which opens it, takes an open file as well as a path.
        x = read_image(cast("Path", content))[0]
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
    return "no picture" if isinstance(cause, UnidentifiedImageError) else str(cause)


def _is_wanted(path: Path) -> bool:
    return path.suffix.lower() in (*SUFFIXES, LATENT_SUFFIX) and not path.name.startswith(".")


def _is_latent(name: str) -> bool:
    return name.lower().endswith(LATENT_SUFFIX)


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (
        (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    )


def _count_classes(labels: list[Any], files: ImageFiles) -> tuple[list[int], int]:
    """Return the labels and the number of classes; ValueError unless all are class numbers."""
    for name, label in zip(files.names, labels, strict=True):
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise ValueError(
                f"labels of {files.source} must be class numbers from 0, got {label!r} for {name}"
            )
    return labels, max(labels) + 1
