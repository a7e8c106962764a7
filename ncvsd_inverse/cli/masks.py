"""Masks and kernels of users, from files of many kinds."""

from pathlib import Path

import numpy as np
import torch
import typer
from torch import Tensor

from ncvsd_inverse.checkpoints.pickles import kind_name
from ncvsd_inverse.checkpoints.torch_files import read_checkpoint_file
from ncvsd_inverse.cli.folder import MAX_BYTES
from ncvsd_inverse.images import read_picture
from ncvsd_inverse.sources import open_plain

__all__ = ["ARRAYS", "read_array", "read_kernel", "read_mask", "warn_of_mask"]

ARRAYS = (".npy", ".pt")
"""What the names of arrays end in."""

BETWEEN = 0.02
"""Share of pixels between its two levels that a mask may have, as JPEG makes them."""

MUCH = 0.9
"""Share of hidden pixels that is worth a word."""

ALIKE = 0.02
"""Std of known pixels, image units, that looks like what a hole is filled with."""


def read_array(path: Path) -> Tensor:
    """Return the numbers of a .npy or .pt file; nothing in it is run.

    Raises:
        ValueError: if the file is missing, damaged, over 1 GiB, or holds other than one array.
    """
    try:
        with open_plain(path, MAX_BYTES) as file:
            if path.suffix.lower() == ".npy":
                array = np.lib.format.read_array(file, allow_pickle=False)
                if array.dtype == np.uint16:
                    array = array.astype(np.int32)
                return torch.from_numpy(np.ascontiguousarray(array))
        tensor = read_checkpoint_file(path, max_bytes=MAX_BYTES)
    # What numpy raises on damaged files, and torch on dtypes that it lacks, is of many kinds.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} must be a readable array: {reason}") from error
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path} must hold one tensor, got {kind_name(tensor)}")
    return tensor.clone()  # it is a view of the file, which may change


def read_mask(path: Path) -> Tensor:
    """Return which pixels a mask calls known, boolean, shape (H, W).

    Known is the brighter of two levels, whatever they are; of a picture with transparent places
    all that is opaque. An array (.npy, .pt) is True, or not 0, where it is known.

    Raises:
        ValueError: if the file cannot be read or does not have two levels.
    """
    if path.suffix.lower() in ARRAYS:
        array = read_array(path).squeeze()
        if array.ndim != 2 or array.is_complex():
            raise ValueError(f"--mask must have shape (H, W), got {tuple(array.shape)} in {path}")
        return _two_levels(path, array.double())
    picture = read_picture(path)
    if picture.alpha is not None and float(picture.alpha.min()) < 0.5:
        return _two_levels(path, picture.alpha[0, 0])
    return _two_levels(path, picture.x[0].amax(0))


def _two_levels(path: Path, values: Tensor) -> Tensor:
    """Return where values are at the higher of two levels."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        raise ValueError(
            f"--mask must have two levels, one for what is known and one for what is not, got one "
            f"alone in {path}"
        )
    share = (values - low) / (high - low)
    between = float(((share > 0.25) & (share < 0.75)).double().mean())
    if between > BETWEEN:
        levels = torch.unique(values).numel()
        raise ValueError(
            f"--mask must have two levels, got {levels} in {path}, {between:.0%} of its pixels "
            "half-way: known pixels are white, others black"
        )
    return share > 0.5


def warn_of_mask(known: Tensor, y: Tensor) -> None:
    """Say what looks wrong about a mask (H, W) beside the picture (1, C, H, W) that it is for."""
    hidden = float((~known).double().mean())
    if hidden > MUCH:
        typer.echo(f"warning: --mask hides {hidden:.0%} of the pixels", err=True)
    seen, unseen = y[..., known], y[..., ~known]
    if float(seen.std(-1).max()) < ALIKE < float(unseen.std(-1).max()):
        typer.echo(
            "warning: the pixels that --mask calls known (white) are all alike and the others are "
            "not: is it inverted?",
            err=True,
        )


def read_kernel(path: Path) -> Tensor:
    """Return a blur kernel of sum 1, its centre of mass in the middle, (kh, kw), sides odd.

    A picture's brightness, or an array, is normalised; what was done is said.

    Raises:
        ValueError: if the file cannot be read, or has negative values or nothing above 0.
    """
    if path.suffix.lower() in ARRAYS:
        kernel = read_array(path).squeeze().double()
    else:
        kernel = ((read_picture(path).x[0].mean(0) + 1) / 2).double()
    if kernel.ndim != 2 or not bool(torch.isfinite(kernel).all()) or float(kernel.min()) < 0:
        raise ValueError(
            f"--kernel must be a picture or an array (kh, kw) of finite numbers >= 0, got {path}"
        )
    total = float(kernel.sum())
    if total == 0:
        raise ValueError(f"--kernel must have a value above 0, got none in {path}")
    kernel = kernel / total
    centre = [
        float((kernel.sum(1 - dim) * torch.arange(kernel.shape[dim])).sum()) for dim in (0, 1)
    ]
    centred = _centred(kernel, [round(place) for place in centre])
    typer.echo(
        f"kernel {path}: {kernel.shape[1]} x {kernel.shape[0]} pixels of sum {total:.4g}, divided "
        f"by it; centre of mass at {centre[1]:.1f}, {centre[0]:.1f}, moved to the middle"
    )
    return centred.float()


def _centred(kernel: Tensor, centre: list[int]) -> Tensor:
    """Return a kernel cut to where it is above 0, with zeros so that `centre` is in the middle."""
    rows, columns = (kernel.sum(1 - dim).nonzero().flatten() for dim in (0, 1))
    reach = [
        max(place - int(line.min()), int(line.max()) - place, 0)
        for place, line in zip(centre, (rows, columns), strict=True)
    ]
    middle = kernel.new_zeros(2 * reach[0] + 1, 2 * reach[1] + 1)
    top, left = int(rows.min()), int(columns.min())
    part = kernel[top : int(rows.max()) + 1, left : int(columns.max()) + 1]
    row, column = top - centre[0] + reach[0], left - centre[1] + reach[1]
    middle[row : row + part.shape[0], column : column + part.shape[1]] = part
    return middle
