"""Tensors and arguments of modules that stand as inert objects."""

from collections.abc import Iterator

from torch import Tensor

from ncvsd_inverse.checkpoints.pickles import Inert, kind_name
from ncvsd_inverse.errors import CheckpointError

__all__ = ["arguments_of", "state_dict_of"]


def state_dict_of(network: Inert) -> dict[str, Tensor]:
    """Return the tensors of an inert `torch.nn.Module` as its own `state_dict()` would.

    Returns:
        Parameters and persistent buffers by dotted name.

    Raises:
        CheckpointError: if what stands at their places is not what a module has there.
    """
    return dict(_named_tensors(network, ""))


def arguments_of(network: Inert) -> dict[str, object]:
    """Return the keyword arguments that built a persistent object; none where none are recorded.

    Raises:
        CheckpointError: if they are recorded but are no keyword arguments.
    """
    arguments = network.state.get("_init_kwargs", {})
    if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
        raise CheckpointError(f"the arguments of {network.name} must have names")
    return arguments


def _named_tensors(network: Inert, prefix: str) -> Iterator[tuple[str, Tensor]]:
    kept_out = network.state.get("_non_persistent_buffers_set", set())
    for attribute in ("_parameters", "_buffers"):
        for name, value in _members(network, attribute):
            if attribute == "_buffers" and isinstance(kept_out, set) and name in kept_out:
                continue
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{prefix + name!r} must be a tensor, got {kind_name(value)}")
            yield prefix + name, value
    for name, value in _members(network, "_modules"):
        if not isinstance(value, Inert):
            raise CheckpointError(f"{prefix + name!r} must be a module, got {kind_name(value)}")
        yield from _named_tensors(value, f"{prefix}{name}.")


def _members(network: Inert, attribute: str) -> Iterator[tuple[str, object]]:
    members = network.state.get(attribute, {})
    if not isinstance(members, dict):
        raise CheckpointError(
            f"{attribute} of {network.name} must be a dict, got {kind_name(members)}"
        )
    for name, value in members.items():
        if not isinstance(name, str) or "." in name:
            raise CheckpointError(f"{attribute} of {network.name} must have names without dots")
        if value is not None:
            yield name, value
