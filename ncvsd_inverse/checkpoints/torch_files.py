"""Files of `torch.save`, in its zip and its older format, plain pickles, and safetensors.

Source: the layout of the zip is that which torch 2 writes.
"""

import mmap
from collections.abc import Collection
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ncvsd_inverse.checkpoints.pickles import (
    MAX_OBJECTS,
    Inert,
    InertName,
    Machine,
    Source,
    Storage,
    StorageKind,
    checked_storage,
    kind_name,
    read_stream,
    storage_bytes,
)
from ncvsd_inverse.checkpoints.zip_files import ZIP_LOCAL, zip_entries
from ncvsd_inverse.errors import CheckpointError

__all__ = ["MAX_DEPTH", "read_checkpoint_file", "read_safetensors"]

MAX_BYTES = 1 << 34
MAX_DEPTH = 100


def read_checkpoint_file(path: str | Path, *, max_bytes: int = MAX_BYTES) -> object:
    """Read a pickle or a file of `torch.save`, in its zip or its older format, running nothing.

    Tensors of a zip are views of the file, mapped privately: writing to one leaves the file as it
    is, but the file must not shrink while they live. Others are copies of it, made once.

    Args:
        path: the file.
        max_bytes: the largest file to read, bytes.

    Returns:
        Numbers, str, bytes (from 64 KiB on as a read-only memoryview), list, tuple, set,
        dict (also for its subclasses, without their attributes), CPU tensors without gradient
        (also for parameters), and `Inert` and `InertName` for what else weights come with: modules,
        numpy arrays, dtypes; nested at most 100 deep, never within itself.

    Raises:
        CheckpointError: if the file is missing, too large, damaged, of another format, or asks for
            anything else, which the message names.
    """
    path = Path(path)
    try:
        value = _read_file(path, max_bytes)
        _check_value(value)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error.__cause__
    except Exception as error:
        # Damage that no check foresaw must not surface as an error of numpy or torch.
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name; ValueError if it is of another format."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        # Formats have dtypes that torch, or what reads them for it, has not.
        raise ValueError(f"{path.name} must be safetensors of known dtypes: {error}") from error
    return tensors


def _read_file(path: Path, max_bytes: int) -> object:
    if not path.is_file():
        raise CheckpointError("there is no such file")
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if not 0 < size <= max_bytes:
                raise CheckpointError(f"it must have 1 to {max_bytes} bytes, got {size}")
            # Private to this process: what is written to a tensor never reaches the file.
            mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"it must be readable: {error}") from None
    source = Source(mapping)
    if bytes(source.data[:4]) == ZIP_LOCAL:
        return _read_zip(source)
    return read_stream(source.data, source)


def _read_zip(source: Source) -> object:
    """Read the zip of a `torch.save`: PREFIX/data.pkl, and the storages PREFIX/data/KEY."""
    entries = zip_entries(source.data)
    roots = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError("a zip must hold one PREFIX/data.pkl, as torch.save writes it")
    prefix = roots[0].removesuffix("data.pkl")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and bytes(order[:8]) != b"little":
        raise CheckpointError("it must be written on a little-endian machine")
    storages: dict[str, Storage] = {}

    def load(reference: object) -> object:
        match reference:
            case ("storage", StorageKind() as kind, str(key), str(), int(numel)):
                if key not in storages:
                    content = entries.get(f"{prefix}data/{key}")
                    size = storage_bytes(kind, numel, source)
                    if content is None or len(content) != size:
                        raise CheckpointError(f"it must hold the {size} bytes of its storage")
                    storages[key] = Storage(_mapped(content, kind.dtype, source))
                return checked_storage(storages[key], kind, numel)
        raise CheckpointError("it refers to what is no storage")

    root = entries[roots[0]]
    value, position = Machine(root, 0, source, load).run()
    if position != len(root):
        raise CheckpointError(f"{len(root) - position} bytes follow the end of its pickle")
    return value


def _mapped(content: memoryview, dtype: torch.dtype, source: Source) -> Tensor:
    """Return bytes of the file as a flat tensor: a view, or a copy where they are not aligned."""
    if not content:
        return torch.empty(0, dtype=dtype)
    flat = torch.frombuffer(content, dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:
        flat = torch.empty(len(content), dtype=torch.uint8)
        source.copy(content, flat)
    return flat.view(dtype)


LEAVES = (type(None), bool, int, float, str, bytes, memoryview, Tensor, InertName)


def _check_value(value: object) -> None:
    """Check that whoever walks `value`, however plainly, comes to an end soon and not deep down.

    Raises:
        CheckpointError: if it holds what no value has, or itself, or is too deep or too large when
            objects that it holds several times count each time.
    """
    measured: dict[int, tuple[int, int]] = {}
    entered: set[int] = set()
    waiting = [value]
    while waiting:
        node = waiting[-1]
        if id(node) in measured:
            waiting.pop()
            continue
        children = _children(node)
        inner = [child for child in children if not isinstance(child, LEAVES)]
        if id(node) not in entered:
            entered.add(id(node))
            if any(id(child) in entered and id(child) not in measured for child in inner):
                raise CheckpointError("an object holds itself")
            waiting += inner
            continue
        sizes = [measured[id(child)] for child in inner]
        depth = 1 + max((deep for deep, _ in sizes), default=0)
        count = 1 + len(children) + sum(many for _, many in sizes)
        if depth > MAX_DEPTH or count > MAX_OBJECTS:
            raise CheckpointError(
                f"its value must be at most {MAX_DEPTH} deep and have at most {MAX_OBJECTS} objects"
            )
        measured[id(node)] = depth, count
        waiting.pop()


def _children(node: object) -> Collection[object]:
    if isinstance(node, list | tuple | set):
        return node
    if isinstance(node, dict):
        return node.values()
    if isinstance(node, Inert):
        return node.args, node.state
    if isinstance(node, LEAVES):
        return ()
    raise CheckpointError(f"it holds {kind_name(node)} where a value must be")
