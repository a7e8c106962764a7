"""The network of a prior on disk, beside its card: written, read, checked."""

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ncvsd_inverse.checks import check_image_size
from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.files import file_sha256, whole_files
from ncvsd_inverse.networks import ConcatDenoiser, ControlledDenoiser, Denoiser, network_config
from ncvsd_inverse.networks.edm2_layers import MPConv
from ncvsd_inverse.networks.library import LibraryDenoiser, build_converted, check_depth
from ncvsd_inverse.priors.card import PriorCard
from ncvsd_inverse.priors.files import TensorFile, card_path, weights_path, write_tensors

__all__ = ["TrainedNetwork", "check_files", "read_network", "save_prior"]

TrainedNetwork: TypeAlias = ConcatDenoiser | ControlledDenoiser | Denoiser
NETWORKS: dict[str, tuple[type[TrainedNetwork | LibraryDenoiser], ...]] = {
    "ncvsd": (ConcatDenoiser, ControlledDenoiser),
    "diffusion": (Denoiser, LibraryDenoiser),
}
"""The networks that each kind of prior can have."""


def save_prior(
    path_without_suffix: str | Path, network: TrainedNetwork, card: Mapping[str, object]
) -> PriorCard:
    """Write the weights of a prior to NAME.safetensors and its card to NAME.json.

    Nothing is written unless both are valid, and each file appears whole, weights first: after a
    crash between the two, loading reports that they do not belong together.

    Args:
        path_without_suffix: FOLDER/NAME; the folder must exist.
        network: as trained, not changed by `to_inference`.
        card: the fields of `PriorCard`; `network` and `sha256` are filled in.

    Returns:
        The card as written.

    Raises:
        ValueError: if the card is not valid, or the network is not as trained or not finite.
        TypeError: if `network` is of no kind that a prior can have.
    """
    if not isinstance(network, TrainedNetwork):
        raise TypeError(f"network must be one of {TrainedNetwork}, got {type(network).__name__}")
    filled = {**card, "network": network_config(network), "sha256": "0" * 64}
    full = PriorCard.from_json(PriorCard.from_dict(filled).to_json())
    _build(full)
    if any(layer.is_folded for layer in network.modules() if isinstance(layer, MPConv)):
        raise ValueError("network must be as trained, not changed by to_inference")
    state = network.state_dict()
    _check_weights({"not finite": {name for name in state if not _is_finite(state[name])}})
    stem = Path(path_without_suffix)
    with whole_files(weights_path(stem), card_path(stem)) as (weights, text):
        full = replace(full, sha256=write_tensors(weights, state))
        text.write_bytes(full.to_json().encode())
    return full


def read_network(
    stem: Path, card: PriorCard, device: torch.device, dtype: torch.dtype | None = None
) -> TrainedNetwork | LibraryDenoiser:
    """Build the network of a card and fill it with the weights beside it, all checked.

    It is first built without memory, so that a card cannot ask for more than its weights hold, and
    filled one tensor at a time: with a `dtype`, layers are at once stored ready for passes in it.
    """
    with _weights(stem, card) as (network, file):
        bad = set()
        stored = network.state_dict().keys()
        for prefix, module in network.named_modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, empty in own:
                full = f"{prefix}.{name}".removeprefix(".")
                if full not in stored:
                    continue
                value = file.read(full)
                if not _is_finite(value):
                    bad.add(full)
                # The layout of the memory is the network's, channels last for some.
                value = torch.empty_like(empty, device=device).copy_(value)
                is_parameter = isinstance(empty, nn.Parameter)
                setattr(module, name, nn.Parameter(value) if is_parameter else value)
            if dtype is not None and isinstance(module, MPConv):
                module.fold_(dtype)
        _check_weights({"not finite": bad})
    return network


def check_files(stem: Path, card: PriorCard) -> None:
    """CheckpointError unless the weights at `stem` are those of the card."""
    with _weights(stem, card) as (_, file):
        _check_weights(
            {"not finite": {name for name in file.shapes if not _is_finite(file.read(name))}}
        )


@contextmanager
def _weights(
    stem: Path, card: PriorCard
) -> Iterator[tuple[TrainedNetwork | LibraryDenoiser, TensorFile]]:
    """Open the weights of a card; yield its network, without memory, and the file that fits it.

    Within the context, too, what is wrong with the file becomes a CheckpointError that names it.
    """
    path = weights_path(stem)
    try:
        digest = file_sha256(path)
        if digest != card.sha256:
            raise CheckpointError(
                f"{path} must have the SHA-256 of its card, {card.sha256}, got {digest}: "
                "it is damaged or belongs to another card"
            )
        with TensorFile(path) as file:
            # A network of many blocks takes long to build, even without memory.
            check_depth(card.network, len(file.shapes))
            network = _build(card)
            expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
            came, both = file.shapes, expected.keys() & file.shapes.keys()
            _check_weights(
                {
                    "missing": expected.keys() - came.keys(),
                    "unexpected": came.keys() - expected.keys(),
                    "of another shape": {name for name in both if expected[name] != came[name]},
                }
            )
            yield network, file
    except FileNotFoundError:
        raise CheckpointError(
            f"a prior needs its weights and its card, but there is no {path}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} must be readable: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} must be a safetensors file: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} must hold the network of its card: {error}") from error


def _build(card: PriorCard) -> TrainedNetwork | LibraryDenoiser:
    """Build the network that `card` describes, without memory; ValueError if the card is wrong."""
    network = build_converted(card.network, "meta")
    if not isinstance(network, NETWORKS[card.kind]):
        raise ValueError(f"kind {card.kind!r} cannot have a {type(network).__name__}")
    side = network.resolution
    if side is not None and card.image_shape != (network.image_channels, side, side):
        raise ValueError(
            f"image_shape must be {(network.image_channels, side, side)}, got {card.image_shape}"
        )
    if card.statistics is not None and len(card.statistics.mean) != network.image_channels:
        raise ValueError(
            f"statistics must be of {network.image_channels} channels, "
            f"got {len(card.statistics.mean)}"
        )
    if card.image_shape is not None:
        check_image_size(
            "image_shape",
            card.image_shape,
            channels=network.image_channels,
            multiple=network.size_multiple,
        )
    return network


def _is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _check_weights(faults: Mapping[str, Set[str]]) -> None:
    """ValueError that names the tensors at fault unless there are none."""
    told = [f"{fault}: {_listed(names)}" for fault, names in faults.items() if names]
    if told:
        raise ValueError("weights " + "; ".join(told))


def _listed(names: Set[str], most: int = 8) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + rest
