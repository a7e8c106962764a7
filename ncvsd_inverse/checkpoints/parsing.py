"""Which network a checkpoint holds, by the names and shapes of its tensors.

What they do not tell stands in the file as plain numbers, is given, or is the value that the
authors publish.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ncvsd_inverse.checkpoints.diffusers import parse_diffusers
from ncvsd_inverse.checkpoints.guided_diffusion import parse_adm
from ncvsd_inverse.checkpoints.nvidia import parse_edm, parse_edm2
from ncvsd_inverse.checkpoints.parsed import Options, ParsedCheckpoint, list_names
from ncvsd_inverse.checkpoints.pickles import Inert
from ncvsd_inverse.checkpoints.state_dicts import state_dict_of
from ncvsd_inverse.checkpoints.torch_files import read_checkpoint_file, read_safetensors
from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.networks.library import build_converted, check_depth

__all__ = ["parse_checkpoint", "recognise"]

CONTAINERS = ("ema", "model_ema", "state_dict", "model", "net")
"""Entries under which files keep their network, the one to prefer first."""
LAYOUTS = {
    "EDM2": r"(unet\.(emb_|enc\.|dec\.|out_|condition_)|logvar_).*",
    "NCVSD": r"((enc|ctrl|dec)\.(emb_|enc\.|dec\.|out_|additional_)|logvar_).*",
    "EDM": r"(map_(noise|label|augment|layer0|layer1)\.|(enc|dec)\.\d+x\d+_).*",
    "ADM": r"((input|output)_blocks|middle_block|time_embed|label_emb|out)\..*",
    "diffusers": r"((down|up)_blocks|mid_block|(time|class)_embedding|conv_(norm_)?(in|out))\..*",
}
"""Names of tensors by whose network has them."""


def parse_checkpoint(path: Path, told: Options) -> ParsedCheckpoint:
    """Read any known checkpoint and check that its tensors are those of its network."""
    try:
        found = parse_diffusers(path, told) if path.is_dir() else _read_file(path, told)
        if told.size not in (None, found.image_shape[1]):
            raise ValueError(f"size is {found.image_shape[1]} by its tensors, got {told.size}")
        check_depth(found.config, len(found.tensors))
        network = build_converted(found.config, "meta")
        _check_tensors(network.state_dict(), found.tensors)
    except CheckpointError:
        raise
    except Exception as error:
        # Odd tensors can break the reading of their shapes anywhere.
        text = str(error) if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(f"{path} cannot be converted: {text}") from error
    return found


def _check_tensors(expected: Mapping[str, Tensor], came: Mapping[str, Tensor]) -> None:
    faults = {
        "missing": [name for name in expected if name not in came],
        "unexpected": [name for name in came if name not in expected],
        "of another shape": [
            f"{name} {tuple(came[name].shape)} for {tuple(expected[name].shape)}"
            for name in expected
            if name in came and came[name].shape != expected[name].shape
        ],
        "not of floating point": [
            name for name, value in came.items() if not value.dtype.is_floating_point
        ],
    }
    if any(faults.values()):
        listed = (f"{fault}: {list_names(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"its tensors are not those of its network; {'; '.join(listed)}")


def _read_file(path: Path, told: Options) -> ParsedCheckpoint:
    if path.suffix == ".safetensors" and path.is_file():
        return recognise(read_safetensors(path), None, told)
    value = read_checkpoint_file(path)
    if isinstance(value, dict):
        inner = (value[name] for name in CONTAINERS if isinstance(value.get(name), Inert | dict))
        value = next(inner, value)
    if isinstance(value, Inert):
        return recognise(state_dict_of(value), value, told)
    if not isinstance(value, dict) or not value:
        raise ValueError(f"it must hold a network or a state dict, got a {type(value).__name__}")
    odd = [str(name) for name, entry in value.items() if not isinstance(entry, Tensor)]
    if odd:
        raise ValueError(f"a state dict must hold tensors only, got others: {list_names(odd)}")
    return recognise({str(name): entry for name, entry in value.items()}, None, told)


def recognise(state: dict[str, Tensor], module: Inert | None, told: Options) -> ParsedCheckpoint:
    """Return the network that has these tensors.

    Args:
        state: the tensors by name.
        module: what held them, if anything did.
        told: what the user says.

    Raises:
        ValueError: if it is no known network.
    """
    for prefix in ("module.", "model."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    if "input_blocks.0.0.weight" in state:
        return parse_adm(state, told)
    if "map_layer0.weight" in state:
        return parse_edm(state, module, told)
    if "unet.emb_noise.weight" in state or "ctrl.emb_noise.weight" in state:
        return parse_edm2(state, module, told)
    raise ValueError(_unknown(state))


def _unknown(state: Mapping[str, Tensor]) -> str:
    """Tell what a state dict of no known network is nearest to, and what does not fit there."""
    odd = {
        layout: [name for name in state if not re.fullmatch(pattern, name)]
        for layout, pattern in LAYOUTS.items()
    }
    nearest = min(odd, key=lambda layout: len(odd[layout]))
    if len(odd[nearest]) == len(state):
        return (
            f"its tensors are of no known network: {list_names(odd[nearest])}; not one has a name "
            f"of the known layouts, {', '.join(LAYOUTS)}"
        )
    if nearest == "diffusers":
        hint = "which are read as folders, with config.json and scheduler_config.json"
    elif odd[nearest]:
        hint = f"where these do not fit: {list_names(odd[nearest])}"
    else:
        hint = "whose first layers it lacks"
    return f"its tensors are of no known network; the nearest known layout is {nearest}, {hint}"
