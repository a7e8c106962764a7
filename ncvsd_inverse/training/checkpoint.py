"""Checkpoint files: named tensors and a JSON header, written whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.files import whole_files

__all__ = [
    "read_checkpoint",
    "write_checkpoint",
]


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and header to a safetensors file whole or not at all.

    Raises:
        CheckpointError: if the disk is full or cannot be written; what was there stays.
    """
    try:
        state = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        with whole_files(path) as (part,):
            save_file(state, part, metadata={"header": json.dumps(header)})
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {path} could not be written, the one before it stays: {error}"
        ) from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the header of a checkpoint.

    Raises:
        CheckpointError: if the file is missing, damaged or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["header"])
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
