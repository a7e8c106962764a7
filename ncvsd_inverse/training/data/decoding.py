"""Image files measured and decoded; the next good one replaces one that cannot be used."""

import hashlib
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing.pool import ThreadPool
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ncvsd_inverse.priors.latent import LATENT_CHANNELS
from ncvsd_inverse.training.data.image_files import (
    Faults,
    ImageFiles,
    read_moments,
    read_pixels,
    read_size,
)

__all__ = [
    "Kind",
    "check_one_size",
    "decode_all",
    "digest_files",
    "find_substitutes",
    "in_turn",
    "kind_of",
    "measure_sizes",
]

_THREADS = 8
_DIGESTED_BYTES = 2**34
_LEAST_DIGESTED = 2**16
_CHUNK = 2**20

_LARGE = 2**22
"""Pixels from which images are decoded one at a time, as each then takes much memory."""

Value = TypeVar("Value")


class Kind(NamedTuple):
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


_PICTURES = Kind(read_pixels, 3, torch.uint8, 3, "pictures")
_LATENTS = Kind(read_moments, 2 * LATENT_CHANNELS, torch.float32, LATENT_CHANNELS, "latents")


def kind_of(files: ImageFiles) -> Kind:
    """Return how the images of a source are read."""
    return _LATENTS if files.latents else _PICTURES


def measure_sizes(files: ImageFiles, crop: int | None, faults: Faults) -> Tensor:
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


def check_one_size(files: ImageFiles, sizes: Tensor) -> None:
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


def decode_all(
    files: ImageFiles, sizes: Tensor, faults: Faults, *, crop: int | None
) -> Tensor | list[Tensor]:
    """Decode all images into one block of memory; the next good one replaces a bad one.

    Returns:
        Whole images as one tensor (N, V, H, W), or with `crop` a list of (V, H, W).
    """
    kind = kind_of(files)
    # Whole images become one tensor, in which those that cannot be used take their room too.
    room = (sizes if crop else sizes.amax(0).expand_as(sizes)).tolist()
    lengths = [kind.values * height * width for height, width in room]
    store = torch.empty(sum(lengths), dtype=kind.dtype)
    slots = torch.split(store, lengths)
    one_large = threading.Lock()

    def decode(index: int) -> str | None:
        if index in faults.reasons:
            return None
        height, width = room[index]
        try:
            with one_large if height * width > _LARGE else nullcontext():
                values = kind.read(files, index, (height, width))
        except ValueError as error:
            return str(error)
        slots[index].copy_(values.flatten())
        return None

    found = _in_threads(decode, len(room))
    faults.add({index: reason for index, reason in enumerate(found) if reason is not None})
    substitutes = find_substitutes(faults)
    if crop is not None:
        return [slots[index].view(kind.values, *room[index]) for index in substitutes.tolist()]
    images = store.view(-1, kind.values, *room[0])
    for bad in faults.reasons:
        images[bad] = images[substitutes[bad]]
    return images


def digest_files(files: ImageFiles) -> bytes:
    """Return a hash of what the files of a source hold, in their order, but not of their names.

    Of each counts an equal share of 16 GiB and at least 64 KiB, which is all of most: the whole of
    a set that has to be streamed would take longer to read than it should take to start a run.
    """
    share = max(_LEAST_DIGESTED, _DIGESTED_BYTES // len(files.names))

    def digest(index: int) -> bytes:
        one, left = hashlib.sha256(), share
        try:
            with files.open(index) as file:
                while left and (chunk := file.read(min(left, _CHUNK))):
                    one.update(chunk)
                    left -= len(chunk)
        except Exception:  # another image stands in for one that cannot be read
            one.update(b"unreadable")
        return one.digest()

    return hashlib.sha256(b"".join(_in_threads(digest, len(files.names)))).digest()


def find_substitutes(faults: Faults) -> Tensor:
    """Return, for every image, itself or the next one that can be used, (N,)."""
    num = len(faults.files.names)
    chosen = torch.arange(num)
    for bad in faults.reasons:
        chosen[bad] = next(i for i in in_turn(bad, num) if i not in faults.reasons)
    return chosen


def _in_threads(function: Callable[[int], Value], num: int) -> list[Value]:
    """Return function(0), ..., function(num - 1), called in several threads."""
    # Filters of warnings belong to the process: threads that set them leave them in any state.
    with warnings.catch_warnings(), ThreadPool(_THREADS) as pool:
        return pool.map(function, range(num), chunksize=16)


def in_turn(start: int, num: int) -> Iterator[int]:
    """Return start, start + 1, ... around to start - 1."""
    return itertools.chain(range(start, num), range(start))
