"""Which images make batch number n, and what happens to them; the same for all kinds of data."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_count
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.training.data.decoding import digest_files
from ncvsd_inverse.training.data.image_files import ImageFiles
from ncvsd_inverse.training.data.latents import draw_latents

__all__ = ["Batch", "DigestedData", "Draws", "Sampler", "ShuffledImages", "TrainingData"]

_ORDER_STREAM = 1
_LATENT_STREAM = 3


class Batch(NamedTuple):
    """Images to train on.

    Attributes:
        images: float32 (B, C, H, W): pictures in [-1, 1], or latents of std 0.5.
        labels: one-hot classes, float32 (B, K); None without labels.
    """

    images: Tensor
    labels: Tensor | None


class TrainingData(Protocol):
    """What a run trains on.

    Attributes:
        image_shape: shape (C, H, W) of the images of a batch.
        num_classes: number of classes; 0 without labels.
    """

    image_shape: tuple[int, int, int]
    num_classes: int

    def batches(
        self, start: int, size: int, *, seed: int, rows: slice | None = None
    ) -> Iterator[Batch]:
        """Yield batches number `start`, `start` + 1, ... of `size` images, without end.

        Args:
            start: number of the first batch, from 0.
            size: images in a batch, over all processes.
            seed: seed of the order of the images and of what happens to them, >= 0.
            rows: the rows of each batch that are wanted, this process's share; None: all.
        """
        ...


@runtime_checkable
class DigestedData(TrainingData, Protocol):
    """Data that can be told from others, so that a run goes on with those that it started with."""

    @property
    def digest(self) -> str:
        """A hash of all that batches follow from, but for their size and seed."""
        ...


class Draws(NamedTuple):
    """What is drawn for the wanted rows of a batch.

    Attributes:
        indices: which images.
        corners: where crops lie, (top, left) as shares of the room there is, in [0, 1).
        mirrored: which images are mirrored, (B,).
        places: where in the endless sequence each image stands.
    """

    indices: list[int]
    corners: list[tuple[float, float]]
    mirrored: Tensor
    places: list[int]


class Sampler:
    """One endless sequence of shuffles, cut into batches, with the crops and flips of each batch.

    Batch number n is the same for one seed and batch size, whether the run was resumed, and
    whichever process asks for whichever rows of it.

    Args:
        num: number of images.
        size: images in a batch.
        seed: seed of the sequence.
        rows: the rows of each batch that are wanted.
        flip: whether images are mirrored.
    """

    def __init__(self, num: int, size: int, *, seed: int, rows: slice, flip: bool) -> None:
        self.num = num
        self.size = size
        self.seed = seed
        self.rows = rows
        self.flip = flip
        self._shuffled = (-1, torch.empty(0))

    def draw(self, number: int) -> Draws:
        """Return what is drawn for batch `number`: for all of it, so that rows do not matter."""
        places = torch.arange(number * self.size, (number + 1) * self.size)
        epochs = places // self.num
        indices = torch.cat(
            [
                self._shuffle(epoch)[places[epochs == epoch] % self.num]
                for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
            ]
        )
        (source,) = make_generators([(self.seed, _ORDER_STREAM, number, 1)])
        mirrored = (torch.rand(self.size, generator=source, dtype=torch.float32) < 0.5) & self.flip
        corners = torch.rand(self.size, 2, generator=source, dtype=torch.float32)
        return Draws(
            indices[self.rows].tolist(),
            corners[self.rows].tolist(),
            mirrored[self.rows],
            places[self.rows].tolist(),
        )

    def draw_latents(self, moments: list[Tensor], places: list[int]) -> Tensor:
        """Draw latents from their means and stds, each (8, H, W), anew at each place."""
        keys = [(self.seed, _LATENT_STREAM, place) for place in places]
        return draw_latents(torch.stack(moments), make_generators(keys))

    def _shuffle(self, epoch: int) -> Tensor:
        if self._shuffled[0] != epoch:
            (source,) = make_generators([(self.seed, _ORDER_STREAM, epoch)])
            self._shuffled = (epoch, torch.randperm(self.num, generator=source))
        return self._shuffled[1]


class ShuffledImages(ABC):
    """Images of which a sampler makes batches, in memory or streamed.

    Args:
        num: number of images.
        image_shape: shape (C, H, W) of the images of a batch.
        flip: whether images are mirrored left to right with probability 1/2.
        labels: class numbers, int64 (N,); None without labels.
        num_classes: number of classes; 0 without labels.

    Attributes:
        files: where the images were read from; None: they were given.
    """

    def __init__(
        self,
        num: int,
        image_shape: tuple[int, int, int],
        *,
        flip: bool,
        labels: Tensor | None,
        num_classes: int,
    ) -> None:
        self.image_shape = image_shape
        self.flip = flip
        self.labels = labels
        self.num_classes = num_classes
        self.skipped: list[str] = []
        self.files: ImageFiles | None = None
        self._num = num

    def __len__(self) -> int:
        """Return the number of images; those that were skipped count, another stands for each."""
        return self._num

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the images in their order, their labels, and what is done to them.

        Images that were read count as the files that they came from, be it a folder or a zip; see
        `digest_files`.
        """
        digest = hashlib.sha256(f"{self.image_shape} {self.flip} {self._num}\n".encode())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        if self.files is None:
            for values in self._given():
                digest.update(f"{tuple(values.shape)}\n".encode())
                digest.update(values.numpy().tobytes())
        else:
            digest.update(digest_files(self.files))
        return digest.hexdigest()

    def _given(self) -> Iterable[Tensor]:
        """Return the values of each image, of images that were given."""
        return ()

    def batches(
        self, start: int, size: int, *, seed: int, rows: slice | None = None
    ) -> Iterator[Batch]:
        """Yield batches number `start`, `start` + 1, ... of `size` images, without end.

        Every pass over the images is a shuffle of its own, and batches are cut from one endless
        sequence of them.

        Args:
            start: number of the first batch, from 0.
            size: images in a batch, over all processes.
            seed: seed of order, crops and flips, >= 0.
            rows: the rows of each batch that are wanted, this process's share; None: all.

        Raises:
            ValueError: if an argument is out of range; while streaming, also when more than 1%
                of the images have turned out to be unusable.
        """
        check_count("start", start, least=0)
        check_count("size", size)
        check_count("seed", seed, least=0)
        wanted = slice(None) if rows is None else rows
        if not range(size)[wanted]:
            raise ValueError(f"rows must hold some of {size} images, got {rows}")
        order = Sampler(len(self), size, seed=seed, rows=wanted, flip=self.flip)
        return self._finish(self._load(order, start))

    @abstractmethod
    def _load(self, order: Sampler, start: int) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield batches from `start` on, and which images are in them.

        Pictures are uint8 (B, C, H, W) as yet, latents float32 as they are trained on.
        """

    def _finish(self, loaded: Iterator[tuple[Tensor, list[int]]]) -> Iterator[Batch]:
        for x, indices in loaded:
            yield Batch(to_floats(x) if x.dtype == torch.uint8 else x, self._one_hot(indices))

    def _one_hot(self, indices: list[int]) -> Tensor | None:
        if self.labels is None:
            return None
        return torch.nn.functional.one_hot(self.labels[indices], self.num_classes).float()


def cut_squares(
    images: Iterable[Tensor], corners: Iterable[tuple[float, float]], crop: int | None
) -> Tensor:
    """Stack images (C, H, W), or squares cut from them where `corners` say, (B, C, H, W)."""
    if crop is None:
        return torch.stack(list(images))
    squares = []
    for image, corner in zip(images, corners, strict=True):
        top, left = (
            int(share * (side - crop + 1))
            for share, side in zip(corner, image.shape[1:], strict=True)
        )
        squares.append(image[:, top : top + crop, left : left + crop])
    return torch.stack(squares)


def mirror_some(pixels: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the chosen images of (B, C, H, W) left to right."""
    if not bool(mirrored.any()):
        return pixels
    return torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)


def to_floats(pixels: Tensor) -> Tensor:
    return pixels.float().div_(127.5).sub_(1)
