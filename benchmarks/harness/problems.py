"""The images and measurements that every method is given."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import ncvsd_inverse
from ncvsd_inverse import Task, make_task, read_image
from ncvsd_inverse.checks import check_image_size
from ncvsd_inverse.images import centre_crop, read_images, resize_cover
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.priors import NCVSDPrior
from ncvsd_inverse.protocols import NetworkTraits

__all__ = [
    "DATA_VARIABLE",
    "Images",
    "KnownProblem",
    "find_test_set",
    "find_validation_set",
    "load_images",
    "make_problem",
]

DATA_VARIABLE = "NCVSD_DATA"
"""Environment variable that names the folder of the priors' test sets."""

_ASSETS = Path(ncvsd_inverse.__file__).parent / "assets"


@dataclass(frozen=True, eq=False)
class Images:
    """True images.

    Attributes:
        name: where they come from, as a file name without its folders.
        x0: shape (N, C, H, W), in [-1, 1], on the CPU.
        hashes: SHA-256 of the pixels of each.
    """

    name: str
    x0: Tensor
    hashes: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.x0.shape[-2], self.x0.shape[-1]

    def sha256(self, num: int) -> str:
        """Return the hash of the first `num` images."""
        return hashlib.sha256("".join(self.hashes[:num]).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class KnownProblem:
    """A task on images whose truth is known.

    Attributes:
        task: the operator and its noise level.
        x0: true images, shape (N, C, H, W), in [-1, 1].
        y: their measurements, shape (N, ...).
    """

    task: Task
    x0: Tensor
    y: Tensor


def find_test_set(prior: str) -> Path | None:
    """Return the test set of a named prior, NAME/test.zip in the folder $NCVSD_DATA, if there."""
    return _find(prior, "test.zip")


def find_validation_set(prior: str) -> Path | None:
    """Return the validation set of a named prior, val.zip beside its test set, if there."""
    return _find(prior, "val.zip")


def _find(prior: str, name: str) -> Path | None:
    folder = os.environ.get(DATA_VARIABLE)
    path = Path(folder or "", prior.removeprefix("ncvsd_"), name)
    return path if folder and path.is_file() else None


def load_images(
    source: Path | None,
    num: int,
    *,
    prior: NCVSDPrior,
    size: int,
) -> Images:
    """Read the first images of a folder or archive in the shape that a prior takes.

    Args:
        source: folder or zip archive; None: the pictures that ship with the package, resized to
            fit: portraits, or photographs where any size works.
        num: most images to read, >= 1.
        prior: the prior that restores them.
        size: side of the centre crops for a prior that takes any size, pixels.

    Raises:
        ValueError: if there is no image, or one cannot be read or is of another size.
    """
    fixed = prior.image_shape
    if fixed is None:
        network = NetworkTraits.of(prior.network)
        check_image_size("--size", (3, size, size), multiple=network.size_multiple)
    channels, *sides = fixed or (3, size, size)
    wanted = "of" if fixed else "of at least"
    found = []
    if source is None:
        folder = _ASSETS / "photographs" if fixed is None else _ASSETS
        pictures: Iterable[Tensor] = map(read_image, sorted(folder.glob("*.png"))[:num])
    else:
        pictures = read_images(source, num)
    for number, picture in enumerate(pictures):
        x = picture
        if source is None:
            x = resize_cover(x, (sides[0], sides[1]))
        elif fixed is None and min(x.shape[-2:]) >= size:
            x = centre_crop(x, (sides[0], sides[1]))
        if x.shape[1:] != (channels, *sides):
            raise ValueError(
                f"--data must hold images {wanted} {sides[1]} x {sides[0]} pixels and {channels} "
                f"channels, got {x.shape[3]} x {x.shape[2]} and {x.shape[1]} in image number "
                f"{number}, counted from 0, of {source}"
            )
        found.append(x)
    return Images(
        name=source.name if source else "shipped pictures",
        x0=torch.cat(found),
        hashes=tuple(hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in found),
    )


def make_problem(name: str, images: Images, *, seed: int, device: torch.device) -> KnownProblem:
    """Return a named task on images with their measurements.

    The noise of image i follows from (seed, i), and is drawn on the CPU whatever the device.
    """
    task = make_task(name, images.size, seed=seed)
    generators = make_generators([(seed, i) for i in range(len(images.x0))])
    y = task.operator.measure(images.x0, task.sigma_y, generator=generators)
    return KnownProblem(task, images.x0.to(device), y.to(device))
