"""Training images that worker processes decode when they are needed."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ncvsd_inverse.training.data.decoding import in_turn, kind_of
from ncvsd_inverse.training.data.image_files import Faults, ImageFiles
from ncvsd_inverse.training.data.sampler import Sampler, ShuffledImages, cut_squares, mirror_some

__all__ = ["StreamedData"]


class StreamedData(ShuffledImages):
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
            (kind_of(files).channels, height, width),
            flip=flip,
            labels=labels,
            num_classes=num_classes,
        )
        self.skipped = faults.names()
        self.crop = crop
        self.workers = workers
        self.files: ImageFiles = files
        self._sizes = sizes
        self._faults = faults

    def _load(self, order: Sampler, start: int) -> Iterator[tuple[Tensor, list[int]]]:
        loader = DataLoader(
            _Decoder(self.files, self._sizes, self.crop, self._faults.allowed, order),
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
        self, files: ImageFiles, sizes: Tensor, crop: int | None, allowed: int, order: Sampler
    ) -> None:
        self.files = files
        self.sizes = sizes
        self.crop = crop
        self.allowed = allowed
        self.order = order

    def __getitem__(self, number: int) -> _Decoded:
        draws = self.order.draw(number)
        read = kind_of(self.files).read
        images: list[Tensor] = []
        indices: list[int] = []
        broken: dict[int, str] = {}
        for start in draws.indices:
            for index in in_turn(start, len(self.sizes)):
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
            x = mirror_some(cut_squares(images, draws.corners, self.crop), draws.mirrored)
        return _Decoded(x, indices, broken)
