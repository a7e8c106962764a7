"""Training data from a folder, a zip or a Hugging Face dataset."""

from pathlib import Path

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_count, check_non_negative
from ncvsd_inverse.priors.latent import LATENT_CHANNELS
from ncvsd_inverse.training.data.decoding import (
    check_one_size,
    decode_all,
    find_substitutes,
    kind_of,
    measure_sizes,
)
from ncvsd_inverse.training.data.image_files import Faults, ImageFiles, open_images
from ncvsd_inverse.training.data.in_memory import ImageData, LatentData
from ncvsd_inverse.training.data.streamed import StreamedData

__all__ = ["read_data"]


def read_data(
    source: str | Path,
    *,
    crop: int | None = None,
    flip: bool = True,
    resolution: int | None = None,
    channels: int | None = None,
    labels: bool = False,
    most_classes: int | None = None,
    memory_gib: float = 4.0,
    workers: int = 2,
) -> ImageData | LatentData | StreamedData:
    """Read training images: into memory if they fit there, else streamed by worker processes.

    Both give the same batches. Images become RGB, whatever they were. An image that cannot be
    decoded, or is smaller than `crop`, is skipped: the next good one stands in for it, and its
    name is found in `skipped`.

    A folder or zip of latents (of .npy files, as `ncvsd encode` writes them) gives batches of
    latents, each drawn anew at each pass. They are taken whole and as they are: `crop` and `flip`
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
            from the column `label`. A folder around all of them does not count.
        most_classes: how many classes there may be; None: any number.
        memory_gib: memory for decoded images in each training process, GiB, >= 0.
        workers: processes that decode streamed images; 0 decodes in the training process. They
            are spawned, so a script must guard its start by `if __name__ == "__main__"`.

    Raises:
        ImportError: if a Hugging Face dataset is given and the package datasets is missing.
        ValueError: if there are no images, more than 1% of them cannot be used, sizes are not as
            they must be, a label is missing (the message names images), there are too many
            classes, or an option does not fit what there is.
    """
    for name, side in (("crop", crop), ("resolution", resolution)):
        if side is not None:
            check_count(name, side)
    check_non_negative("memory_gib", memory_gib)
    check_count("workers", workers, least=0)
    if most_classes is not None:
        check_count("most_classes", most_classes)
    files = open_images(source)
    _check_kind(files, crop, flip, channels)
    numbers, num_classes = files.read_labels() if labels else (None, 0)
    if most_classes is not None and num_classes > most_classes:
        raise ValueError(
            f"{files.source} must have at most {most_classes} classes (network.num_classes), "
            f"got {num_classes}"
        )
    classes = None if numbers is None else torch.tensor(numbers)
    faults = Faults(files)
    sizes = measure_sizes(files, crop, faults)
    if crop is None:
        check_one_size(files, sizes)
    height, width = (crop, crop) if crop else sizes.amax(0).tolist()
    if resolution is not None and (height, width) != (resolution, resolution):
        raise ValueError(
            f"images in {files.source} must be {resolution} x {resolution} pixels "
            f"(the resolution), got {height} x {width}"
        )
    kind = kind_of(files)
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
    images = decode_all(files, sizes, faults, crop=crop)
    if classes is not None:
        classes = classes[find_substitutes(faults)]
    data: ImageData | LatentData
    if files.latents and isinstance(images, Tensor):
        data = LatentData(images, labels=classes, num_classes=num_classes)
    else:
        data = ImageData(images, crop=crop, flip=flip, labels=classes, num_classes=num_classes)
    data.files, data.skipped = files, faults.names()
    return data


def _check_kind(files: ImageFiles, crop: int | None, flip: bool, channels: int | None) -> None:
    """ValueError unless the images of a source can be used as they are wanted."""
    kind = kind_of(files)
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
