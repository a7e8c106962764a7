"""Training images in memory; it must not know what is trained on them."""

import io
import zipfile
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ncvsd_inverse.numerics import make_generators

SUFFIXES = {".png", ".webp", ".jpg", ".jpeg", ".bmp"}
_ORDER_STREAM = 1


class TrainingData(Protocol):
    """What a run trains on."""

    def batch(self, number: int, size: int, *, seed: int, flip: bool) -> Tensor:
        """Return training batch `number` (from 0), float32 (size, C, H, W), always the same."""
        ...


class ImageData:
    """Images of one size, decoded once.

    Args:
        pixels: uint8 images, shape (N, C, H, W).
    """

    def __init__(self, pixels: Tensor) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or not len(pixels):
            raise ValueError(
                "pixels must be uint8 of shape (N, C, H, W), "
                f"got {pixels.dtype} {tuple(pixels.shape)}"
            )
        self.pixels = pixels
        self._order = (-1, torch.empty(0))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.pixels)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Decode every image of a zip archive or a folder as RGB, in the order of their names.

        Raises:
            ValueError: if there are no images, one cannot be decoded, or sizes differ; the
                message names the image.
        """
        from PIL import Image, UnidentifiedImageError

        source = Path(path)
        if not source.exists():
            raise ValueError(f"data must be an existing zip or folder, got {source}")
        decoded: list[Tensor] = []
        try:
            for name, content in _files(source):
                with Image.open(io.BytesIO(content)) as picture:
                    array = np.array(picture.convert("RGB"))
                tensor = torch.from_numpy(array).permute(2, 0, 1)
                if decoded and tensor.shape != decoded[0].shape:
                    raise ValueError(
                        f"images in {source} must have one size, got "
                        f"{tuple(decoded[0].shape)} and {tuple(tensor.shape)} ({name})"
                    )
                decoded.append(tensor)
        except (UnidentifiedImageError, zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"data in {source} cannot be read: {error}") from error
        if not decoded:
            raise ValueError(f"data must hold images ({', '.join(sorted(SUFFIXES))}): {source}")
        return cls(torch.stack(decoded))

    def images(self, indices: Tensor) -> Tensor:
        """Return images as float32 in [-1, 1], shape (B, C, H, W)."""
        return self.pixels[indices].float() / 127.5 - 1

    def batch(self, number: int, size: int, *, seed: int, flip: bool) -> Tensor:
        """Return training batch `number` (from 0), the same one whenever asked.

        Every pass over the images is a shuffle of its own, so that batches are cut from one
        endless sequence; with `flip`, each image is mirrored with probability 1/2.

        Returns:
            float32 images in [-1, 1], shape (size, C, H, W).
        """
        places = torch.arange(number * size, (number + 1) * size)
        epochs = places // len(self)
        indices = torch.cat(
            [
                self._shuffle(epoch, seed)[places[epochs == epoch] % len(self)]
                for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
            ]
        )
        images = self.images(indices)
        if flip:
            (source,) = make_generators([(seed, _ORDER_STREAM, number, 1)])
            mirrored = torch.rand(size, generator=source) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        return images

    def _shuffle(self, epoch: int, seed: int) -> Tensor:
        if self._order[0] != epoch:
            (source,) = make_generators([(seed, _ORDER_STREAM, epoch)])
            self._order = (epoch, torch.randperm(len(self), generator=source))
        return self._order[1]


def _files(source: Path) -> list[tuple[str, bytes]]:
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
        return [(path.name, path.read_bytes()) for path in paths]
    with zipfile.ZipFile(source) as archive:
        names = sorted(n for n in archive.namelist() if Path(n).suffix.lower() in SUFFIXES)
        return [(name, archive.read(name)) for name in names]
