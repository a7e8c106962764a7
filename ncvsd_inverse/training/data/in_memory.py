"""Training images and latents in memory."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_count
from ncvsd_inverse.priors.latent import LATENT_CHANNELS
from ncvsd_inverse.training.data.decoding import check_one_size, decode_all, measure_sizes
from ncvsd_inverse.training.data.image_files import Faults, open_images
from ncvsd_inverse.training.data.sampler import (
    Sampler,
    ShuffledImages,
    cut_squares,
    mirror_some,
    to_floats,
)

__all__ = ["ImageData", "LatentData"]


class ImageData(ShuffledImages):
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
        sizes = measure_sizes(files, None, faults)
        check_one_size(files, sizes)
        return ImageData(decode_all(files, sizes, faults, crop=None))

    def images(self, indices: Tensor) -> Tensor:
        """Return images by number, whole, as float32 in [-1, 1], shape (B, C, H, W).

        Raises:
            ValueError: if the images were given as a sequence.
        """
        if not isinstance(self.pixels, Tensor):
            raise ValueError("images must have one size to be returned whole")
        return to_floats(self.pixels[indices])

    def _given(self) -> Iterable[Tensor]:
        return self.pixels

    def _load(self, order: Sampler, start: int) -> Iterator[tuple[Tensor, list[int]]]:
        for number in itertools.count(start):
            draws = order.draw(number)
            if self.crop is None and isinstance(self.pixels, Tensor):
                pixels = self.pixels[draws.indices]
            else:
                chosen = (self.pixels[index] for index in draws.indices)
                pixels = cut_squares(chosen, draws.corners, self.crop)
            yield mirror_some(pixels, draws.mirrored), draws.indices


class LatentData(ShuffledImages):
    """Latents in memory: each pass draws a latent anew from its mean and std.

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

    def _given(self) -> Iterable[Tensor]:
        return self.moments

    def _load(self, order: Sampler, start: int) -> Iterator[tuple[Tensor, list[int]]]:
        for number in itertools.count(start):
            draws = order.draw(number)
            moments = [self.moments[index] for index in draws.indices]
            yield order.draw_latents(moments, draws.places), draws.indices


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
