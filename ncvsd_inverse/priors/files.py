"""Files of tensors read and written one tensor at a time.

The format is that of safetensors: the length of a JSON header in eight bytes, the header, the bytes
of the tensors.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Dtypes of weights, by the names that safetensors gives them."""

_LENGTH = struct.Struct("<Q")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write floating-point tensors of any device as safetensors; return the file's SHA-256.

    One tensor at a time is brought to the CPU.

    Raises:
        ValueError: if a tensor is of another dtype.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    # As the library orders them, which keeps every tensor at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {}, 0
    for name, value in ordered:
        if value.dtype not in names:
            raise ValueError(f"the tensor {name} must be floating-point, got {value.dtype}")
        start, end = end, end + value.numel() * value.element_size()
        header[name] = {
            "dtype": names[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH.size)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (_LENGTH.pack(len(text)), text):
            file.write(part)
            digest.update(part)
        for _, value in ordered:
            content = _bytes_of(value.detach().cpu().contiguous())
            file.write(content)
            digest.update(content)
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
