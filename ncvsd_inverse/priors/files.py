"""Where priors lie on this machine and in which files, and files of tensors.

A prior is NAME.safetensors, its weights, beside NAME.json, its card. Tensors are read and written
one at a time. The format of safetensors is the length of a JSON header in eight bytes, the header,
the bytes of the tensors.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor

from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.files import cache_folder
from ncvsd_inverse.plain_data import read_json
from ncvsd_inverse.priors.card import PriorCard

__all__ = [
    "DTYPES",
    "HUB_PREFIX",
    "PACKAGE_WEIGHTS",
    "SUFFIXES",
    "WEIGHTS_SUFFIXES",
    "WEIGHTS_VARIABLE",
    "TensorFile",
    "accepted_file",
    "card_path",
    "converted_stem",
    "read_card",
    "record_path",
    "search_folders",
    "weights_path",
    "write_stream",
    "write_tensors",
]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Dtypes of weights, by the names that safetensors gives them."""

PACKAGE_WEIGHTS = Path(__file__).parent / "weights"
WEIGHTS_VARIABLE = "NCVSD_WEIGHTS"
HUB_PREFIX = "hf:"
"""With what a name begins that is one of the hub, whatever paths there are."""
WEIGHTS_SUFFIXES = (".pkl", ".pt", ".pth", ".safetensors")
"""What files of weights end in."""
SUFFIXES = (*WEIGHTS_SUFFIXES, ".json")
"""What paths of priors end in; a name that ends so is a path."""

_LENGTH = struct.Struct("<Q")


def search_folders() -> list[Path]:
    """Return where priors are looked for by name, first come first served."""
    own = os.environ.get(WEIGHTS_VARIABLE)
    return [PACKAGE_WEIGHTS, *([Path(own)] if own else []), cache_folder()]


def weights_path(stem: Path) -> Path:
    """Return the path of the weights of a prior whose path without suffix is `stem`."""
    return stem.with_name(stem.name + ".safetensors")


def card_path(stem: Path) -> Path:
    """Return the path of the card of a prior whose path without suffix is `stem`."""
    return stem.with_name(stem.name + ".json")


def converted_stem(sha256: str, name: str) -> Path:
    """Return where a published file of this SHA-256 is kept once converted, without suffix."""
    return cache_folder() / "converted" / sha256 / name


def record_path(name: str) -> Path:
    """Return where it is recorded which published file was accepted under a name."""
    return cache_folder() / f"{name}.sha256"


def accepted_file(name: str) -> tuple[str, str | None] | None:
    """Return SHA-256 and revision (if known) of the published file first used under a name."""
    try:
        digest, *revision = record_path(name).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return digest, next(iter(revision), None)


def read_card(stem: Path) -> PriorCard:
    """Read the card of a prior whose path without suffix is `stem`; CheckpointError if unfit."""
    path = card_path(stem)
    try:
        return PriorCard.from_dict(read_json(path))
    except FileNotFoundError:
        raise CheckpointError(
            f"a prior needs its weights and its card, but there is no {path}; "
            "`ncvsd convert` makes both of a foreign checkpoint"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} must be readable: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} must be the card of a prior: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write floating-point tensors of any device as safetensors; return the file's SHA-256.

    One tensor at a time is brought to the CPU.

    Raises:
        ValueError: if a tensor is of another dtype.
    """
    # As the library orders them, which keeps every tensor at a multiple of its element's size.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    layout = {name: (value.dtype, value.shape) for name, value in ordered.items()}
    return write_stream(path, layout, ordered.values())


def write_stream(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    values: Iterable[Tensor],
) -> str:
    """Write tensors as safetensors while they are made; return the file's SHA-256.

    Args:
        path: the file.
        layout: dtype and shape of each tensor by name, in the order of `values`.
        values: the tensors, one at a time in memory.

    Raises:
        ValueError: if a tensor is not floating-point.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {}, 0
    for name, (dtype, shape) in layout.items():
        if dtype not in names:
            raise ValueError(f"the tensor {name} must be floating-point, got {dtype}")
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH.size)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(content: bytes | memoryview) -> None:
            file.write(content)
            digest.update(content)

        write(_LENGTH.pack(len(text)))
        write(text)
        for value in values:
            write(_bytes_of(value.detach().cpu().contiguous()))
    return digest.hexdigest()


class TensorFile:
    """A safetensors file whose tensors are read when asked for, each into memory of its own.

    They are not mapped: mapped pages would count as memory of the process while the file is open.

    Args:
        path: the file.

    Attributes:
        shapes: shape of each tensor by name.

    Raises:
        OSError: if it cannot be read.
        SafetensorError: if it is of another format.
    """

    def __init__(self, path: Path) -> None:
        # The library checks the header: offsets that meet, lie within the file and fit the shapes.
        with safe_open(path, framework="pt"):
            pass
        self._file = path.open("rb")
        (length,) = _LENGTH.unpack(self._file.read(_LENGTH.size))
        entries = json.loads(self._file.read(length))
        entries.pop("__metadata__", None)
        self._start = _LENGTH.size + length
        self._entries = entries
        self.shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU.

        Raises:
            ValueError: if it is not floating-point.
            OSError: if the file became shorter.
        """
        entry = self._entries[name]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"the tensor {name} must be floating-point, got {entry['dtype']}")
        value = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="cpu")
        into = _bytes_of(value)
        self._file.seek(self._start + entry["data_offsets"][0])
        if self._file.readinto(into) != len(into):
            raise OSError(f"{self._file.name} ends within the tensor {name}")
        return value


def _bytes_of(value: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return value.view(-1).view(torch.uint8).numpy().data
