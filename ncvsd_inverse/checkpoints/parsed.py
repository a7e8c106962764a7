"""What a checkpoint holds, as parsed, and what its user may have to add."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import check_choice, check_count
from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.networks import Network, constrain_weights_
from ncvsd_inverse.networks.adm import AttentionOrder
from ncvsd_inverse.networks.edm2_layers import MPConv
from ncvsd_inverse.networks.library import LibraryDenoiser, build_converted

__all__ = ["Options", "ParsedCheckpoint", "Schedule", "list_names"]

BLENDS = ("additional_x_weight", "additional_skips_weight")
MOST_LISTED = 10

Schedule: TypeAlias = Literal["linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the tensors of some layouts do not tell of their network; None: not given.

    Attributes:
        schedule: how the noise of an ADM network grows, "linear" or "cosine".
        head_channels: channels of an attention head, of ADM and EDM2.
        num_heads: attention heads of each block of ADM, where their number is the same at all
            levels; not together with `head_channels`.
        attention_order: of ADM; "new" where it was trained with its new attention order, in which
            heads are parts of queries, keys and values, else "legacy".
        size: side of the images of ADM and diffusers, pixels.
    """

    schedule: Schedule | None = None
    head_channels: int | None = None
    num_heads: int | None = None
    attention_order: AttentionOrder | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("schedule", get_args(Schedule)),
            ("attention_order", get_args(AttentionOrder)),
        ):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), choices)
        for name in ("head_channels", "num_heads", "size"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if self.head_channels is not None and self.num_heads is not None:
            raise ValueError("head_channels and num_heads must not be given together")

    def check_known(self, layout: str, *names: str) -> None:
        """Check that nothing but `names` was given."""
        for field in fields(self):
            given = getattr(self, field.name)
            if given is not None and field.name not in names:
                raise ValueError(f"{field.name} must not be given for {layout}, got {given!r}")


@dataclass(frozen=True, kw_only=True)
class ParsedCheckpoint:
    """What a checkpoint holds: the configuration of a network, its tensors and its range.

    Attributes:
        layout: whose checkpoint it is, in words.
        config: what `build_converted` takes.
        tensors: by the names of that network.
        image_shape: (C, H, W).
        is_conditional: whether the network is a conditional one, of a distilled prior.
        gamma: how far such a network raises the noise level; None: the file does not say.
        sigma_min: smallest noise std, image units; None: the file does not say.
        sigma_max: largest noise std, image units; None likewise.
        schedule: how its noise grows, where nothing tells it.
        guessed: names of the options that could change what was read.
    """

    layout: str
    config: dict[str, object]
    tensors: Mapping[str, Tensor]
    image_shape: tuple[int, int, int]
    is_conditional: bool = False
    gamma: float | None = None
    schedule: Schedule | None = None
    guessed: tuple[str, ...] = ()
    sigma_min: float | None = None
    sigma_max: float | None = None

    @property
    def dtype(self) -> str:
        """The dtypes of the tensors, as text."""
        return ", ".join(
            sorted({str(t.dtype).removeprefix("torch.") for t in self.tensors.values()})
        )

    def converted(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors one by one, float32 and as our networks store them.

        Those of our layers are copies, others may be views of the file. EDM2 divides filters by
        their norm at each pass and the published conditional network clips its blends; ours are
        stored so.
        """
        network = build_converted(self.config, "meta")
        layers = dict(network.named_modules())
        for name in network.state_dict():
            owner, _, attribute = name.rpartition(".")
            stored = self.tensors[name].detach()
            if stored.numel() and not all(math.isfinite(end) for end in stored.aminmax()):
                raise CheckpointError(f"the tensor {name} must be finite")
            value = stored.float()
            layer = layers[owner]
            if isinstance(layer, MPConv):
                held, layer.weight = layer.weight, nn.Parameter(value.clone(), requires_grad=False)
                constrain_weights_(layer)
                value, layer.weight = layer.weight.data, held
            elif attribute in BLENDS:
                value = value.clamp(0, 1)
            yield name, value

    def build(self, device: torch.device, dtype: torch.dtype) -> Network | LibraryDenoiser:
        """Return the network with its weights, ready for passes; memory holds them once.

        Each tensor is stored as the passes use it before the next is read.
        """
        network = build_converted(self.config, "meta")
        layers = dict(network.named_modules())
        for name, value in self.converted():
            owner, _, attribute = name.rpartition(".")
            layer, kept = layers[owner], torch.float32
            if isinstance(layer, MPConv):
                value, kept = value.mul_(layer.scale), dtype
                layer.scale = 1.0
            hollow: Tensor = getattr(layer, attribute)
            # Where passes want another order in memory, the hollow tensor has it.
            stored = torch.empty_strided(hollow.shape, hollow.stride(), device=device, dtype=kept)
            stored.copy_(value)
            trained = isinstance(hollow, nn.Parameter)
            setattr(
                layer, attribute, nn.Parameter(stored, requires_grad=False) if trained else stored
            )
        return network.to_inference(dtype)


def list_names(names: list[str]) -> str:
    """Return names with commas between, the first few."""
    rest = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + rest
