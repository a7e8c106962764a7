"""Networks of EDM, EDM2 and NCVSD: layers are named by the side of their images.

Sources: Karras et al., arXiv 2206.00364 and 2312.02696; Peng et al., arXiv 2506.09416.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict

from torch import Tensor

from ncvsd_inverse.checkpoints.parsed import Options, ParsedCheckpoint
from ncvsd_inverse.checkpoints.pickles import Inert
from ncvsd_inverse.checkpoints.state_dicts import state_dict_of
from ncvsd_inverse.networks import UNetShape

__all__ = ["parse_edm", "parse_edm2"]

EDM2_HEAD_CHANNELS = 64
EDM2_CONSTANTS = {
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256.0,
}
"""Numbers that files of EDM2's kind record, and that our network has built in."""
EDM_LEAST_CHANNELS = 128
"""With fewer channels EDM normalises in smaller groups than deepinv's network does."""
SIGMA_DATA = 0.5
"""Std of the images, where the file does not say."""


def parse_edm2(state: dict[str, Tensor], module: Inert | None, told: Options) -> ParsedCheckpoint:
    """Describe a network of EDM2's kind: a teacher, a published conditional one, or our light one.

    Sources: Karras et al., arXiv 2312.02696; Peng et al., arXiv 2506.09416.
    """
    modules = [] if module is None else list(_modules_of(module))
    for inert in modules:
        for name, known in EDM2_CONSTANTS.items():
            if inert.state.get(name, known) != known:
                raise ValueError(f"{name} must be {known}, got {inert.state[name]!r}")
    told.check_known("EDM2", "head_channels", "size")
    kind = "denoiser" if "unet.emb_noise.weight" in state else "controlled"
    branch, decoder = ("unet.", "unet.dec.") if kind == "denoiser" else ("enc.", "dec.dec.")
    if "unet.emb_condition.weight" in state:
        kind = "concat"
    encoder = Encoder(state, (f"{branch}enc.", decoder), "conv_res0", "attn_qkv")
    inputs = encoder.inputs - 1
    image_channels = inputs // 2 if kind == "concat" else inputs
    labels = state.get(f"{branch}emb_label.weight")
    recorded = _head_channels(modules)
    if None not in (told.head_channels, recorded) and told.head_channels != recorded:
        raise ValueError(f"head_channels is {recorded} by the file, got {told.head_channels}")
    head_channels = recorded or told.head_channels or EDM2_HEAD_CHANNELS
    attending = [
        c for s, c in zip(encoder.sides, encoder.channels, strict=True) if s in encoder.attention
    ]
    for channels in attending + [encoder.channels[-1]] * encoder.bottleneck_attention:
        heads = channels // head_channels
        if not heads or channels % heads:
            raise ValueError(
                f"head_channels must make heads that divide {channels} channels, "
                f"got {head_channels}"
            )
    shape = UNetShape(
        resolution=encoder.sides[0],
        image_channels=image_channels,
        channels=encoder.channels,
        blocks=encoder.blocks,
        attention=encoder.attention,
        bottleneck_attention=encoder.bottleneck_attention,
        head_channels=head_channels,
        num_classes=0 if labels is None else labels.shape[-1],
    )
    attends = bool(encoder.attention) or encoder.bottleneck_attention
    sigma_data = _recorded_number(modules, "sigma_data") or SIGMA_DATA
    return ParsedCheckpoint(
        layout="EDM2" if kind == "denoiser" else "NCVSD",
        config={"kind": kind, "sigma_data": sigma_data, "any_size": False, **asdict(shape)},
        tensors=state,
        image_shape=(image_channels, encoder.sides[0], encoder.sides[0]),
        is_conditional=kind != "denoiser",
        gamma=None if kind == "denoiser" else _recorded_number(modules, "gamma"),
        guessed=("head_channels",) if attends and recorded is None else (),
    )


def parse_edm(state: dict[str, Tensor], module: Inert | None, told: Options) -> ParsedCheckpoint:
    """Describe EDM's DDPM++ or NCSN++. Source: Karras et al., arXiv 2206.00364, table 1."""
    told.check_known("EDM", "size")
    if module is not None and module.name != "EDMPrecond":
        raise ValueError(f"its preconditioning must be EDM's, got {module.name}")
    if "out_conv.weight" in state:
        raise ValueError("its network is EDM's variant of ADM, which no library here carries")
    encoder = Encoder(state, ("enc.", "dec."), "conv0", "qkv")
    first = state[f"enc.{encoder.sides[0]}x{encoder.sides[0]}_conv.weight"].shape[0]
    if min(first, *encoder.channels) < EDM_LEAST_CHANNELS:
        raise ValueError(
            f"each level must have at least {EDM_LEAST_CHANNELS} channels, got {encoder.channels}"
        )
    if any(channels % first for channels in encoder.channels):
        raise ValueError(f"channels must be multiples of {first}, got {encoder.channels}")
    widths = {name: state.get(f"map_{name}.weight") for name in ("label", "augment")}
    arguments: dict[str, object] = {
        "model_type": "ncsn" if "map_noise.freqs" in state else "ddpm",
        "img_resolution": encoder.sides[0],
        "in_channels": encoder.inputs,
        "out_channels": encoder.inputs,
        **{f"{name}_dim": 0 if w is None else w.shape[-1] for name, w in widths.items()},
        "model_channels": first,
        "channel_mult": [channels // first for channels in encoder.channels],
        "channel_mult_emb": state["map_layer0.weight"].shape[0] // first,
        "num_blocks": encoder.blocks,
        "attn_resolutions": list(encoder.attention),
    }
    sigma_data = _recorded_number([module] if module else [], "sigma_data") or SIGMA_DATA
    return ParsedCheckpoint(
        layout="EDM",
        config={"kind": "edm", "arguments": arguments, "sigma_data": sigma_data},
        tensors={f"network.{name}": value for name, value in state.items()},
        image_shape=(encoder.inputs, encoder.sides[0], encoder.sides[0]),
    )


class Encoder:
    """The encoder of one of NVIDIA's U-Nets by names and shapes, and where blocks attend.

    Layers are called SIDExSIDE_conv, _down and _blockN, those of the decoder also _in0.

    Attributes:
        sides: sides of its levels, pixels, the finest first.
        inputs: channels that enter.
        channels: channels of each level.
        blocks: blocks of each level.
        attention: sides at which blocks attend.
        bottleneck_attention: whether the decoder's first block attends.
    """

    def __init__(
        self, state: Mapping[str, Tensor], prefixes: tuple[str, str], conv: str, attends: str
    ) -> None:
        encoder, decoder = (_layers(state, prefix) for prefix in prefixes)
        self.sides = sorted({side for side, _, _ in encoder}, reverse=True)

        def width(layer: str, axis: int) -> int:
            return state[f"{prefixes[0]}{layer}.weight"].shape[axis]

        try:
            first = self.sides[0]
            self.inputs = width(f"{first}x{first}_conv", 1)
            self.channels = tuple(width(f"{s}x{s}_block0.{conv}", 0) for s in self.sides)
        except (IndexError, KeyError) as error:
            raise ValueError(f"its encoder lacks a layer: {error}") from None
        blocks = {layer for side, layer, _ in encoder if side == first}
        self.blocks = sum(layer.startswith("block") for layer in blocks)
        attending = [layer for layer in encoder + decoder if layer[2] == f"{attends}.weight"]
        sides = {side for side, layer, _ in attending if layer.startswith("block")}
        self.attention = tuple(sorted(sides, reverse=True))
        self.bottleneck_attention = any(layer == "in0" for _, layer, _ in attending)


def _layers(state: Mapping[str, Tensor], prefix: str) -> list[tuple[int, str, str]]:
    """Return the side, the layer and the rest of each name that begins with `prefix`."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,5})x\1_(\w+)\.([\w.]+)", re.ASCII)
    found = (match.groups() for match in map(pattern.fullmatch, state) if match)
    return [(int(side), layer, rest) for side, layer, rest in found]


def _modules_of(module: Inert) -> Iterator[Inert]:
    yield module
    inner = module.state.get("_modules")
    for child in inner.values() if isinstance(inner, dict) else ():
        if isinstance(child, Inert):
            yield from _modules_of(child)


def _recorded_number(modules: Iterable[Inert], name: str) -> float | None:
    """Return the number that a module keeps as an attribute, of the first that does."""
    came = next((module.state[name] for module in modules if name in module.state), None)
    if came is None:
        return None
    if type(came) not in (int, float):
        raise ValueError(f"{name} must be a number, got {came!r}")
    return float(came)  # type: ignore[arg-type]


def _head_channels(modules: Iterable[Inert]) -> int | None:
    """Return the channels of an attention head, of the first module that attends and tells."""
    for module in modules:
        heads, inner = module.state.get("num_heads"), module.state.get("_modules")
        if type(heads) is int and heads > 0 and isinstance(inner, dict) and "attn_proj" in inner:
            width = state_dict_of(inner["attn_proj"])["weight"].shape[0]
            if width % heads:
                raise ValueError(f"{heads} attention heads must divide {width} channels")
            return width // heads
    return None
