"""Image files of a folder, a zip or a Hugging Face dataset; it must not know what is made of them.

Nothing is ever unpacked to disk, so names inside an archive are only names.
"""

import io
import json
import warnings
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from ncvsd_inverse.images import MAX_PIXELS, SUFFIXES, read_image

_LABELS_FILE = "dataset.json"
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
                f'{_LABELS_FILE} in {self.source} must hold {{"labels": [[name, label], ...]}}: '
                f"{error}"
            ) from error
        if missing := [name for name in self.names if name not in described]:
            raise ValueError(
                f"{_LABELS_FILE} in {self.source} must label every image, "
                f"got none for {len(missing)}, {missing[0]} among them"
            )
        return _count_classes([described[name] for name in self.names], self)

    def _label_by_folder(self) -> tuple[list[int], int]:
        folders = []
        for name in self.names:
            if len(parts := PurePosixPath(name).parts) < 2:
                raise ValueError(
                    f"labels of {self.source} must come from {_LABELS_FILE} or from sub-folders, "
                    f"got {name} in neither"
                )
            folders.append(parts[0])
        classes = sorted(set(folders))
        numbers = {folder: number for number, folder in enumerate(classes)}
        return [numbers[folder] for folder in folders], len(classes)


class FolderImages(_NamedFiles):
    """Every image file below a folder."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.names = sorted(
            path.relative_to(source).as_posix() for path in source.rglob("*") if _is_image(path)
        )

    def open(self, index: int) -> BinaryIO:
        """Open a file of the folder."""
        return (self.source / self.names[index]).open("rb")

    def _read_labels_file(self) -> bytes | None:
        path = self.source / _LABELS_FILE
        return path.read_bytes() if path.exists() else None


class ZipImages(_NamedFiles):
    """Every image file in a zip archive, whose layout is free (EDM's serves).

    Raises:
        ValueError: if the file is no whole zip archive.
    """

    def __init__(self, source: Path) -> None:
        try:
            self._archive = zipfile.ZipFile(source)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{source} must be a whole zip archive: {error}") from error
        self.source = source
        self.names = sorted({name for name in self._archive.namelist() if _is_image(Path(name))})

    def __reduce__(self) -> tuple[type["ZipImages"], tuple[Path]]:
        return ZipImages, (self.source,)  # an open file does not travel; it is opened again

    def open(self, index: int) -> BinaryIO:
        """Open a member of the archive."""
        return cast("BinaryIO", self._archive.open(self.names[index]))

    def _read_labels_file(self) -> bytes | None:
        if _LABELS_FILE not in self._archive.namelist():
            return None
        try:
            return self._archive.read(_LABELS_FILE)
        # zipfile says that a file is damaged, encrypted or compressed in an unknown way.
        except (zipfile.BadZipFile, RuntimeError) as error:
            raise ValueError(f"{_LABELS_FILE} in {self.source} cannot be read: {error}") from error


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
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"{source} is a Hugging Face dataset; to read it: pip install datasets"
            ) from error
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
        ValueError: if there is no such folder or archive, or it holds no images.
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
        raise ValueError(f"{path} must hold images ({', '.join(SUFFIXES)}), got none")
    return files


def read_size(files: ImageFiles, index: int) -> tuple[int, int]:
    """Return height and width of an image, as its header gives them.

    Raises:
        ValueError: if it has no readable header or is too large to read; the reason alone.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with files.open(index) as file, Image.open(file) as picture:
                width, height = picture.size
                # Pillow would decode a whole PNG to find an orientation that is not in its header.
                if picture.format != "PNG" or "exif" in picture.info:
                    turned = picture.getexif().get(_ORIENTATION) in _QUARTER_TURNS
                    width, height = (height, width) if turned else (width, height)
    except Exception as error:
        raise ValueError(_reason(error)) from error
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels, allowed are 1 to {MAX_PIXELS}")
    return height, width


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


def _reason(error: Exception) -> str:
    """Return why an image cannot be read, in a few words."""
    from PIL import UnidentifiedImageError

    cause = error.__cause__ or error
    return "no picture" if isinstance(cause, UnidentifiedImageError) else str(cause)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


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
