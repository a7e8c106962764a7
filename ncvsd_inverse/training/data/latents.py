"""Latents that stand for pictures: how they are made and drawn.

A variational autoencoder (VAE) turns a picture into a mean and a std for each entry of its latent;
these are stored, and training draws the latent anew at each pass.

Source: Karras et al., arXiv 2312.02696, whose VAE, pixel range and constants these are.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ncvsd_inverse.checks import check_count, check_finite
from ncvsd_inverse.files import clear_parts, whole_files
from ncvsd_inverse.images import resize_cover
from ncvsd_inverse.machine import track
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.priors.latent import SD_VAE, latent_constants, load_vae
from ncvsd_inverse.training.data.image_files import (
    LABELS_FILE,
    LATENT_SUFFIX,
    Faults,
    ImageFiles,
    open_images,
    read_pixels,
    read_size,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = [
    "Encoded",
    "draw_latents",
    "encode_images",
]

_FOLDER_LENGTH = 1000


class Encoded(NamedTuple):
    """What `encode_images` wrote.

    Attributes:
        images: number of latents.
        num_classes: number of classes; 0 without labels.
        skipped: names of the pictures that could not be used.
    """

    images: int
    num_classes: int
    skipped: list[str]


def draw_latents(moments: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw latents from their means and stds, at about mean 0 and std 0.5 a channel.

    Args:
        moments: means, then stds of the entries, shape (B, 8, H, W).
        generators: one for each latent.

    Returns:
        float32 (B, 4, H, W).
    """
    means, stds = moments.float().chunk(2, dim=1)
    raw_means, scales = latent_constants(moments.device)
    return (means + stds * draw_normal(means, generators) - raw_means) * scales


def encode_images(
    source: str | Path,
    target: str | Path,
    *,
    vae: str | Path = SD_VAE,
    size: int = 512,
    batch_size: int = 8,
    labels: bool = True,
    half: bool = False,
    workers: int = 2,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Encoded:
    """Encode pictures to a zip of latents that `read_data` takes, whole or not at all.

    Pictures are resized to cover a square and cropped around the centre. Each becomes a .npy file
    (8, H, W) of the means and stds of its latent; classes are listed in dataset.json. A picture
    that cannot be read is skipped.

    Args:
        source: pictures, as `read_data` takes them.
        target: the zip to write, a file that does not exist yet.
        vae: a name on Hugging Face, or a folder that diffusers has saved. Latents are brought to
            std 0.5 in training by constants of `SD_VAE`: take it, or one that shares its latents.
        size: side of the square, pixels, a multiple of what the VAE shrinks by (8).
        batch_size: pictures that pass through the VAE at a time.
        labels: whether classes are read, which the source must then have.
        half: whether float16 is stored, in half the room, not float32.
        workers: processes that decode pictures; 0 decodes in this one. They are spawned, so a
            script must guard its start by `if __name__ == "__main__"`.
        device: where the VAE computes.
        progress: show a bar on standard error.

    Raises:
        ImportError: if a package is missing: diffusers, or datasets to read a dataset.
        ValueError: if an argument is out of range, the source does not hold pictures, more than 1%
            of them cannot be read (the message names some), or labels are missing.
        OSError: if the zip cannot be written.
    """
    target = Path(target)
    for name, count in (("size", size), ("batch_size", batch_size)):
        check_count(name, count)
    check_count("workers", workers, least=0)
    if target.suffix.lower() != ".zip" or target.exists():
        raise ValueError(f"target must be a zip that does not exist yet, got {target}")
    files = open_images(source)
    if files.latents:
        raise ValueError(f"source must hold pictures, got latents in {source}")
    numbers, num_classes = _read_labels(files) if labels else (None, 0)
    model = load_vae(vae, device=device)
    shrinks = 2 ** (len(model.config.block_out_channels) - 1)
    if size % shrinks:
        raise ValueError(f"size must be a multiple of {shrinks} for this VAE, got {size}")
    faults = Faults(files)
    loader = DataLoader(
        _Squares(files, size),
        batch_size=batch_size,
        collate_fn=list,
        num_workers=workers,
        # As in data.py: no fork of a process with threads, no draw from the shared random state.
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator(),
    )
    dtype = torch.float16 if half else torch.float32

    described = []
    clear_parts(target.parent, (target.name,))
    with whole_files(target) as (part,), zipfile.ZipFile(part, "w") as archive:
        for items in track(loader, "batches encoded", shown=progress):
            faults.add({index: x for index, x in items if isinstance(x, str)})
            squares = {index: x for index, x in items if isinstance(x, Tensor)}
            for index, moments in _encode(model, squares, dtype).items():
                name = f"{index // _FOLDER_LENGTH:05}/{index:08}{LATENT_SUFFIX}"
                content = io.BytesIO()
                np.save(content, moments, allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(name), content.getvalue())
                if numbers is not None:
                    described.append([name, numbers[index]])
        # Without labels the folders' names must not be taken for classes.
        table = json.dumps({"labels": described or None})
        archive.writestr(zipfile.ZipInfo(LABELS_FILE), table)
    skipped = faults.names()
    return Encoded(len(files.names) - len(skipped), num_classes, skipped)


class _Squares(Dataset[tuple[int, Tensor | str]]):
    """What a worker does: it makes a square uint8 (3, size, size) of a picture, or says why not."""

    def __init__(self, files: ImageFiles, size: int) -> None:
        self.files = files
        self.size = size

    def __len__(self) -> int:
        return len(self.files.names)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            pixels = read_pixels(self.files, index, read_size(self.files, index))
        except ValueError as error:
            return index, str(error)
        square = resize_cover(pixels[None] / 127.5 - 1, (self.size, self.size))
        return index, square[0].add(1).mul(127.5).round().to(torch.uint8)


@torch.no_grad()
def _encode(
    vae: "AutoencoderKL", squares: dict[int, Tensor], dtype: torch.dtype
) -> dict[int, np.ndarray]:
    """Return means, then stds, (8, H, W), of the latent of each picture, uint8 (3, side, side)."""
    if not squares:
        return {}
    pixels = torch.stack(list(squares.values())).to(vae.device)
    # The constants hold for pixels in [0, 1], not [-1, 1].
    law = vae.encode(pixels / 255).latent_dist
    moments = torch.cat([law.mean, law.std], dim=1).to(dtype)
    check_finite("latents", moments)
    return dict(zip(squares, moments.cpu().numpy(), strict=True))


def _read_labels(files: ImageFiles) -> tuple[list[int], int]:
    try:
        return files.read_labels()
    except ValueError as error:
        raise ValueError(f"{error}; labels=False (--no-labels) does without labels") from error
