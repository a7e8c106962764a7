"""Training images, in memory or streamed.

They are pictures, or latents that stand for pictures (see `latents.py`). Batch number n is always
the same for one seed and batch size, whether the run was resumed, and whichever process asks for
whichever rows of it.
"""

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ncvsd_inverse.checks import check_count, check_non_negative
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.priors.latent import LATENT_CHANNELS
from ncvsd_inverse.training.data.image_files import (
    Faults,
    ImageFiles,
    open_images,
    read_moments,
    read_pixels,
    read_size,
)
from ncvsd_inverse.training.data.latents import draw_latents

_ORDER_STREAM = 1
_LATENT_STREAM = 3
_THREADS = 8

Value = TypeVar("Value")


class _Kind(NamedTuple):
    """How images of a kind are read.

    Attributes:
        read: reads one, by its number and size, as float32 or uint8 (V, H, W).
        values: V, the values of a pixel.
        dtype: their dtype.
        channels: channels of a batch.
        name: what they are called.
    """

    read: Callable[[ImageFiles, int, tuple[int, int]], Tensor]
    values: int
    dtype: torch.dtype
    channels: int
    name: str


_PICTURES = _Kind(read_pixels, 3, torch.uint8, 3, "pictures")
_LATENTS = _Kind(read_moments, 2 * LATENT_CHANNELS, torch.float32, LATENT_CHANNELS, "latents")


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


class _Draws(NamedTuple):
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


class _Order:
    """One endless sequence of images, cut into batches, with the crops and flips of each batch.

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

    def draw(self, number: int) -> _Draws:
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
        mirrored = (torch.rand(self.size, generator=source) < 0.5) & self.flip
        corners = torch.rand(self.size, 2, generator=source)
        return _Draws(
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


class _ShuffledImages(ABC):
    """What data in memory and streamed data share.

    Args:
        num: number of images.
        image_shape: shape (C, H, W) of the images of a batch.
        flip: whether images are mirrored left to right with probability 1/2.
        labels: class numbers, int64 (N,); None without labels.
        num_classes: number of classes; 0 without labels.
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
        self._num = num

    def __len__(self) -> int:
        """Return the number of images; those that were skipped count, another stands for each."""
        return self._num

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
        order = _Order(len(self), size, seed=seed, rows=wanted, flip=self.flip)
        return self._finish(self._load(order, start))

    @abstractmethod
    def _load(self, order: _Order, start: int) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield batches from `start` on, and which images are in them.

        Pictures are uint8 (B, C, H, W) as yet, latents float32 as they are trained on.
        """

    def _finish(self, loaded: Iterator[tuple[Tensor, list[int]]]) -> Iterator[Batch]:
        for x, indices in loaded:
            yield Batch(_to_floats(x) if x.dtype == torch.uint8 else x, self._one_hot(indices))

    def _one_hot(self, indices: list[int]) -> Tensor | None:
        if self.labels is None:
            return None
        return torch.nn.functional.one_hot(self.labels[indices], self.num_classes).float()


class ImageData(_ShuffledImages):
    """Images in memory.

    Args:
        pixels: uint8 images of one size, shape (N, C, H, W), or, with `crop`, a sequence of
            images (C, H, W) of any sizes.
        crop: side of the square that is cut from each image at random, pixels, at most the
            images' sides; None: whole images.
        flip: whether images are mirrored left to right with probability 1/2.
        labels: class numbers, int64 (N,); None without labels.
        num_classes: number of classes; None: one more than the largest label.

    Attributes:
        skipped: names of the images that could not be used; the next good one stands in for each.

    Raises:
        ValueError: if shapes, dtype or labels are not as stated.
    """

    def __init__(
        self,
        pixels: Tensor | Sequence[Tensor],
        *,
        crop: int | None = None,
        flip: bool = True,
        labels: Tensor | None = None,
        num_classes: int | None = None,
    ) -> None:
        _check_pixels(pixels, crop)
        channels, height, width = pixels[0].shape
        super().__init__(
            len(pixels),
            (channels, crop or height, crop or width),
            flip=flip,
            labels=labels,
            num_classes=_check_labels(labels, len(pixels), num_classes),
        )
        self.pixels = pixels
        self.crop = crop

    @staticmethod
    def read(source: str | Path) -> "ImageData":
        """Decode every image of a source (see `read_data`), in the order of their names.

        Raises:
            ValueError: also if a single image cannot be used: figures of held-out images must
                not depend on which of them could be read; and if the source holds latents.
        """
        files = open_images(source)
        if files.latents:
            raise ValueError(f"{files.source} must hold pictures, got latents")
        faults = Faults(files, allowed=0)
        sizes = _measure(files, None, faults)
        _check_one_size(files, sizes)
        return ImageData(_decode(files, sizes, faults, crop=None))

    def images(self, indices: Tensor) -> Tensor:
        """Return images by number, whole, as float32 in [-1, 1], shape (B, C, H, W).

        Raises:
            ValueError: if the images were given as a sequence.
        """
        if not isinstance(self.pixels, Tensor):
            raise ValueError("images must have one size to be returned whole")
        return _to_floats(self.pixels[indices])

    def _load(self, order: _Order, start: int) -> Iterator[tuple[Tensor, list[int]]]:
        for number in itertools.count(start):
            draws = order.draw(number)
            if self.crop is None and isinstance(self.pixels, Tensor):
                pixels = self.pixels[draws.indices]
            else:
                chosen = (self.pixels[index] for index in draws.indices)
                pixels = _cut(chosen, draws.corners, self.crop)
            yield _mirror(pixels, draws.mirrored), draws.indices


class LatentData(_ShuffledImages):
    """Latents in memory: each visit draws a latent anew from its means and stds.

    Args:
        moments: means, then stds of the latents' entries, float32 (N, 8, H, W), as a VAE gives
            them.
        labels: class numbers, int64 (N,); None without labels.
        num_classes: number of classes; None: one more than the largest label.

    Attributes:
        skipped: names of the latents that could not be used; the next good one stands in for each.

    Raises:
        ValueError: if shapes, dtype or labels are not as stated.
    """

    def __init__(
        self, moments: Tensor, *, labels: Tensor | None = None, num_classes: int | None = None
    ) -> None:
        channels = 2 * LATENT_CHANNELS
        if moments.dtype != torch.float32 or moments.ndim != 4 or moments.shape[1] != channels:
            raise ValueError(
                f"moments must be float32 of shape (N, {channels}, H, W), "
                f"got {moments.dtype} {tuple(moments.shape)}"
            )
        super().__init__(
            len(moments),
            (LATENT_CHANNELS, moments.shape[2], moments.shape[3]),
            flip=False,
            labels=labels,
            num_classes=_check_labels(labels, len(moments), num_classes),
        )
        self.moments = moments

    def _load(self, order: _Order, start: int) -> Iterator[tuple[Tensor, list[int]]]:
        for number in itertools.count(start):
            draws = order.draw(number)
            moments = [self.moments[index] for index in draws.indices]
            yield order.draw_latents(moments, draws.places), draws.indices


class StreamedData(_ShuffledImages):
    """Images or latents that worker processes decode when they are needed; `read_data` makes it.

    Attributes:
        skipped: names of the images that could not be used, as far as is known by now; the next
            good one stands in for each.
    """

    def __init__(
        self,
        files: ImageFiles,
        sizes: Tensor,
        faults: Faults,
        *,
        crop: int | None,
        flip: bool,
        labels: Tensor | None,
        num_classes: int,
        workers: int,
    ) -> None:
        height, width = (crop, crop) if crop else sizes.amax(0).tolist()
        super().__init__(
            len(sizes),
            (_kind(files).channels, height, width),
            flip=flip,
            labels=labels,
            num_classes=num_classes,
        )
        self.skipped = faults.names()
        self.crop = crop
        self.workers = workers
        self._files = files
        self._sizes = sizes
        self._faults = faults

    def _load(self, order: _Order, start: int) -> Iterator[tuple[Tensor, list[int]]]:
        loader = DataLoader(
            _Decoder(self._files, self._sizes, self.crop, self._faults.allowed, order),
            sampler=itertools.count(start),
            batch_size=None,
            num_workers=self.workers,
            # A fork would copy this process in the middle of what its other threads are doing.
            multiprocessing_context="spawn" if self.workers else None,
            # The loader draws a seed for its workers: not from the state that all share.
            generator=torch.Generator(),
        )
        # Only the loop holds the loader's iterator, so the workers end when it does.
        for x, indices, broken in loader:
            self._faults.add(broken)
            self.skipped = self._faults.names()
            yield x, indices


class _Decoded(NamedTuple):
    """Rows of a batch as `_load` yields them, which images, and what could not be decoded."""

    x: Tensor
    indices: list[int]
    broken: dict[int, str]


class _Decoder(Dataset[_Decoded]):
    """What a worker does: it makes a batch from its number."""

    def __init__(
        self, files: ImageFiles, sizes: Tensor, crop: int | None, allowed: int, order: _Order
    ) -> None:
        self.files = files
        self.sizes = sizes
        self.crop = crop
        self.allowed = allowed
        self.order = order

    def __getitem__(self, number: int) -> _Decoded:
        draws = self.order.draw(number)
        read = _kind(self.files).read
        images: list[Tensor] = []
        indices: list[int] = []
        broken: dict[int, str] = {}
        for start in draws.indices:
            for index in _in_turn(start, len(self.sizes)):
                height, width = self.sizes[index].tolist()
                if height == 0 or index in broken:
                    continue
                try:
                    images.append(read(self.files, index, (height, width)))
                except ValueError as error:
                    broken[index] = str(error)
                    if len(broken) > self.allowed:
                        return _Decoded(torch.empty(0), [], broken)  # who asked will refuse it
                else:
                    indices.append(index)
                    break
        if self.files.latents:
            x = self.order.draw_latents(images, draws.places)
        else:
            x = _mirror(_cut(images, draws.corners, self.crop), draws.mirrored)
        return _Decoded(x, indices, broken)


def read_data(
    source: str | Path,
    *,
    crop: int | None = None,
    flip: bool = True,
    resolution: int | None = None,
    channels: int | None = None,
    labels: bool = False,
    memory_gib: float = 4.0,
    workers: int = 2,
) -> ImageData | LatentData | StreamedData:
    """Read training images: into memory if they fit there, else streamed by worker processes.

    Both give the same batches. Images become RGB, whatever they were. An image that cannot be
    decoded, or is smaller than `crop`, is skipped: the next good one stands in for it, and its
    name is found in `skipped`.

    A folder or zip of latents (of .npy files, as `ncvsd encode` writes them) gives batches of
    latents, each drawn anew at each visit. They are taken whole and as they are: `crop` and `flip`
    must be off, as the mirrored latent is not the latent of the mirrored picture. To train on
    mirrored pictures too, encode these as well.

    Args:
        source: a folder of image files, sub-folders included; a zip of them (EDM's layout); or a
            Hugging Face dataset on disk, a folder that `save_to_disk` wrote or one of parquet
            files, whose images are in the column `image` (needs the package datasets).
        crop: side of the squares that are cut at random from images of any sizes, pixels; None:
            images are taken whole and must have one size.
        flip: whether images are mirrored left to right with probability 1/2.
        resolution: side that images must have (with `crop`: that squares must have); None: any.
        channels: what the network takes: 3 for pictures, 4 for latents; None: any.
        labels: whether classes are read: from dataset.json or the first sub-folder's name, or
            from the column `label`.
        memory_gib: memory for decoded images in each training process, GiB, >= 0.
        workers: processes that decode streamed images; 0 decodes in the training process. They
            are spawned, so a script must guard its start by `if __name__ == "__main__"`.

    Raises:
        ImportError: if a Hugging Face dataset is given and the package datasets is missing.
        ValueError: if there are no images, more than 1% of them cannot be used, sizes are not as
            they must be, a label is missing (the message names images), or an option does not fit
            what there is.
    """
    for name, side in (("crop", crop), ("resolution", resolution)):
        if side is not None:
            check_count(name, side)
    check_non_negative("memory_gib", memory_gib)
    check_count("workers", workers, least=0)
    files = open_images(source)
    _check_kind(files, crop, flip, channels)
    numbers, num_classes = files.read_labels() if labels else (None, 0)
    classes = None if numbers is None else torch.tensor(numbers)
    faults = Faults(files)
    sizes = _measure(files, crop, faults)
    if crop is None:
        _check_one_size(files, sizes)
    height, width = (crop, crop) if crop else sizes.amax(0).tolist()
    if resolution is not None and (height, width) != (resolution, resolution):
        raise ValueError(
            f"images in {files.source} must be {resolution} x {resolution} pixels "
            f"(the resolution), got {height} x {width}"
        )
    kind = _kind(files)
    if kind.values * kind.dtype.itemsize * int(sizes.prod(1).sum()) > memory_gib * 2**30:
        return StreamedData(
            files,
            sizes,
            faults,
            crop=crop,
            flip=flip,
            labels=classes,
            num_classes=num_classes,
            workers=workers,
        )
    images = _decode(files, sizes, faults, crop=crop)
    if classes is not None:
        classes = classes[_stand_ins(faults)]
    data: ImageData | LatentData
    if files.latents and isinstance(images, Tensor):
        data = LatentData(images, labels=classes, num_classes=num_classes)
    else:
        data = ImageData(images, crop=crop, flip=flip, labels=classes, num_classes=num_classes)
    data.skipped = faults.names()
    return data


def _kind(files: ImageFiles) -> _Kind:
    return _LATENTS if files.latents else _PICTURES


def _check_kind(files: ImageFiles, crop: int | None, flip: bool, channels: int | None) -> None:
    """ValueError unless the images of a source can be used as they are wanted."""
    kind = _kind(files)
    if channels not in (None, kind.channels):
        raise ValueError(
            f"channels (network.image_channels) must be {kind.channels} for {files.source}, "
            f"which holds {kind.name}, got {channels}"
            + (
                "; `ncvsd encode` turns pictures into latents"
                if channels == LATENT_CHANNELS
                else ""
            )
        )
    if files.latents and crop is not None:
        raise ValueError(
            f"crop must be None (any_size false) for the latents in {files.source}, got {crop}"
        )
    if files.latents and flip:
        raise ValueError(
            f"flip must be false for {files.source}: "
            "a mirrored latent is not the latent of the mirrored picture"
        )


def _measure(files: ImageFiles, crop: int | None, faults: Faults) -> Tensor:
    """Return height and width of every image from the headers, (N, 2); 0 if it cannot be used."""

    def measure(index: int) -> tuple[int, int] | str:
        try:
            size = read_size(files, index)
        except ValueError as error:
            return str(error)
        if crop is not None and min(size) < crop:
            return f"{size[0]} x {size[1]} pixels, smaller than crop {crop}"
        return size

    found = _in_threads(measure, len(files.names))
    faults.add({index: size for index, size in enumerate(found) if isinstance(size, str)})
    return torch.tensor([(0, 0) if isinstance(size, str) else size for size in found])


def _check_one_size(files: ImageFiles, sizes: Tensor) -> None:
    """ValueError that names two images unless all that can be used have one size."""
    usable = sizes[:, 0] > 0
    first = int(usable.nonzero()[0])
    others = (usable & (sizes != sizes[first]).any(1)).nonzero()
    if len(others):
        named = " and ".join(
            f"{sizes[index, 0]} x {sizes[index, 1]} ({files.names[index]})"
            for index in (first, int(others[0]))
        )
        raise ValueError(
            f"images in {files.source} must have one size, unless cropped: got {named}"
        )


def _decode(
    files: ImageFiles, sizes: Tensor, faults: Faults, *, crop: int | None
) -> Tensor | list[Tensor]:
    """Decode all images into one block of memory; others stand in for those that cannot be used.

    Returns:
        Whole images as one tensor (N, V, H, W), or with `crop` a list of (V, H, W).
    """
    kind = _kind(files)
    # Whole images become one tensor, in which those that cannot be used take their room too.
    room = (sizes if crop else sizes.amax(0).expand_as(sizes)).tolist()
    lengths = [kind.values * height * width for height, width in room]
    store = torch.empty(sum(lengths), dtype=kind.dtype)
    slots = torch.split(store, lengths)

    def decode(index: int) -> str | None:
        if index in faults.reasons:
            return None
        height, width = room[index]
        try:
            values = kind.read(files, index, (height, width))
        except ValueError as error:
            return str(error)
        slots[index].copy_(values.flatten())
        return None

    found = _in_threads(decode, len(room))
    faults.add({index: reason for index, reason in enumerate(found) if reason is not None})
    stand_ins = _stand_ins(faults)
    if crop is not None:
        return [slots[index].view(kind.values, *room[index]) for index in stand_ins.tolist()]
    images = store.view(-1, kind.values, *room[0])
    for bad in faults.reasons:
        images[bad] = images[stand_ins[bad]]
    return images


def _stand_ins(faults: Faults) -> Tensor:
    """Return, for every image, itself or the next one that can be used, (N,)."""
    num = len(faults.files.names)
    chosen = torch.arange(num)
    for bad in faults.reasons:
        chosen[bad] = next(i for i in _in_turn(bad, num) if i not in faults.reasons)
    return chosen


def _in_threads(function: Callable[[int], Value], num: int) -> list[Value]:
    """Return function(0), ..., function(num - 1), called in several threads."""
    # Filters of warnings belong to the process: threads that set them leave them in any state.
    with warnings.catch_warnings(), ThreadPool(_THREADS) as pool:
        return pool.map(function, range(num), chunksize=16)


def _in_turn(start: int, num: int) -> Iterator[int]:
    """Return start, start + 1, ... around to start - 1."""
    return itertools.chain(range(start, num), range(start))


def _cut(
    images: Iterable[Tensor], corners: Iterable[tuple[float, float]], crop: int | None
) -> Tensor:
    """Stack images (C, H, W), or squares cut from them where `corners` say, (B, C, H, W)."""
    from torchvision.transforms.v2 import functional

    if crop is None:
        return torch.stack(list(images))
    squares = []
    for image, corner in zip(images, corners, strict=True):
        top, left = (
            int(share * (side - crop + 1))
            for share, side in zip(corner, image.shape[1:], strict=True)
        )
        squares.append(functional.crop(image, top, left, crop, crop))
    return torch.stack(squares)


def _mirror(pixels: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror the chosen images of (B, C, H, W) left to right."""
    if not bool(mirrored.any()):
        return pixels
    from torchvision.transforms.v2 import functional

    return torch.where(mirrored.view(-1, 1, 1, 1), functional.horizontal_flip(pixels), pixels)


def _to_floats(pixels: Tensor) -> Tensor:
    return pixels.float().div_(127.5).sub_(1)


def _check_pixels(pixels: Tensor | Sequence[Tensor], crop: int | None) -> None:
    """ValueError unless `pixels` are uint8 images of one size, or of sizes that can be cropped."""
    if crop is not None:
        check_count("crop", crop)
    if isinstance(pixels, Tensor):
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or not pixels.numel():
            raise ValueError(
                "pixels must be uint8 of shape (N, C, H, W), "
                f"got {pixels.dtype} {tuple(pixels.shape)}"
            )
    elif not pixels or crop is None:
        raise ValueError(
            "pixels must be a tensor (N, C, H, W), or with crop a sequence of images, "
            f"got {len(pixels)} images and crop {crop}"
        )
    for image in pixels if isinstance(pixels, Sequence) else pixels[:1]:
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != len(pixels[0]):
            raise ValueError(
                f"pixels must be uint8 images (C, H, W), got {image.dtype} {tuple(image.shape)}"
            )
        if crop is not None and min(image.shape[1:]) < crop:
            raise ValueError(f"crop must fit all images, got {crop} for {tuple(image.shape)}")


def _check_labels(labels: Tensor | None, num: int, num_classes: int | None) -> int:
    """Return the number of classes; ValueError unless every image has one of them."""
    if labels is None:
        return 0
    if labels.dtype != torch.int64 or labels.shape != (num,):
        raise ValueError(
            f"labels must be int64 of shape ({num},), got {labels.dtype} {tuple(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    classes = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= classes:
        raise ValueError(f"labels must lie in 0 to {classes - 1}, got {low} to {high}")
    return classes
