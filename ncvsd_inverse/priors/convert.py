"""Turns the checkpoints of others into priors, without running anything that a file holds.

What a network is, is read from the names and shapes of its tensors; what they do not tell stands
in the file as plain numbers, is given, or is the value that the authors publish. Networks of EDM2's
kind become ours, others those of `networks.library`.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import safetensors.torch
import torch
from torch import Tensor, nn

from ncvsd_inverse.checkpoints.pickles import Inert
from ncvsd_inverse.checkpoints.state_dicts import state_dict_of
from ncvsd_inverse.checkpoints.torch_files import read_checkpoint_file
from ncvsd_inverse.checks import check_choice, check_count
from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.files import file_sha256
from ncvsd_inverse.networks import (
    Network,
    UNetShape,
    constrain_weights_,
    inference_dtype,
)
from ncvsd_inverse.networks.adm import AttentionOrder
from ncvsd_inverse.networks.edm2_layers import MPConv
from ncvsd_inverse.networks.library import ADM_LEVELS, ADMDenoiser, Prediction
from ncvsd_inverse.networks.library import LibraryDenoiser as LibraryDenoiser
from ncvsd_inverse.networks.library import build_converted as build_converted
from ncvsd_inverse.priors.base import SIGMA_MAX, SIGMA_MIN
from ncvsd_inverse.priors.card import PriorCard
from ncvsd_inverse.priors.diffusion import DiffusionPrior
from ncvsd_inverse.priors.ncvsd import GAMMA, NCVSDPrior
from ncvsd_inverse.priors.selfcheck import LEVELS, DenoisingError, denoising_errors, photograph

EDM2_HEAD_CHANNELS = 64
EDM2_CONSTANTS = {
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256.0,
}
"""Numbers that files of EDM2's kind record, and that our network has built in."""
BLENDS = ("additional_x_weight", "additional_skips_weight")
EDM_LEAST_CHANNELS = 128
"""With fewer channels EDM normalises in smaller groups than deepinv's network does."""
ADM_SIDES = {4: 64, 5: 128, 6: 256, 7: 512}
"""Sides of the images of the published networks, pixels, by number of levels."""
ADM_HEAD_CHANNELS = 64
ADM_BETAS = (1e-4, 0.02)
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
UNSAID = "not said by the file; ask those who published it"
MOST_LISTED = 10
MAX_JSON = 1 << 20

Schedule = Literal["linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Unsaid:
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


NOTHING = Unsaid()


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    licence: str = UNSAID,
    data: str = UNSAID,
    schedule: Schedule | None = None,
    head_channels: int | None = None,
    num_heads: int | None = None,
    attention_order: AttentionOrder | None = None,
    size: int | None = None,
    check: bool = True,
) -> PriorCard:
    """Write a foreign checkpoint as a prior of ours: NAME.safetensors and its card, NAME.json.

    Tensors are copied one at a time, as float32, so that memory holds the file once at most. Both
    files appear whole, the weights first.

    Before, the denoiser is tried: it must lower the error of a shipped photograph at several noise
    levels, at the lowest by more than scaling the noisy photograph would. What a wrong guess of the
    schedule does shows clearly, of the heads hardly. Networks of other than 1 or 3 channels, those
    of latents among them, cannot be tried so.

    Args:
        src: the checkpoint; see `load_foreign`.
        dst: FOLDER/NAME, with or without ".safetensors"; the folder must exist.
        licence: terms of use of the weights.
        data: what the network was trained on.
        schedule: how the noise of an ADM network grows; None: the one with which it denoises
            better, "linear" where it is not tried.
        head_channels: channels of an attention head, of ADM and EDM2; None: what the file records,
            else 64.
        num_heads: attention heads of each block of ADM, instead of `head_channels`.
        attention_order: of ADM, whether heads are split before queries, keys and values ("legacy",
            if None) or after ("new").
        size: side of the images, pixels, where the file does not tell it: of ADM (None: 64, 128,
            256, 512 for 4, 5, 6, 7 levels) and of diffusers.
        check: whether the denoiser is tried; False for weights that were never trained.

    Returns:
        The card as written; its `training` says what was tried and taken.

    Raises:
        CheckpointError: if `src` cannot be read, is of no known kind, or does not denoise; nothing
            is written then.
        ValueError: if the folder of `dst` does not exist, or an argument is out of range.
    """
    told = Unsaid(
        schedule=schedule,
        head_channels=head_channels,
        num_heads=num_heads,
        attention_order=attention_order,
        size=size,
    )
    source, stem = Path(src), Path(dst)
    if stem.suffix in (".safetensors", ".json"):
        stem = stem.with_suffix("")
    if not stem.parent.is_dir():
        raise ValueError(f"dst must lie in an existing folder, got {dst}")
    found = _read(source, told)
    origin: dict[str, object] = {
        "converted_from": source.name,
        "layout": found.layout,
        "dtype": found.dtype,
        "self_check": "not wanted",
    }
    if check:
        found, origin["self_check"] = _tried(found, told, source)
    if found.schedule:
        how = "as given" if schedule else "by the self-check" if check else "taken unchecked"
        origin["schedule"] = f"{found.schedule}, {how}"
    if source.is_file():
        origin["source_sha256"] = file_sha256(source)
    card = PriorCard(
        name=stem.name,
        kind="diffusion" if found.gamma is None else "ncvsd",
        network=found.config,
        image_shape=found.image_shape,
        gamma=found.gamma,
        sigma_min=found.sigma_min,
        sigma_max=found.sigma_max,
        sha256="0" * 64,
        licence=licence,
        data=data,
        training=origin,
        evaluation={},
        weaknesses="not measured",
        intended_use="as its authors say",
    )
    weights, text = (stem.with_name(f"{stem.name}.{end}") for end in ("safetensors", "json"))
    new = [path.with_name(f".{path.name}.new") for path in (weights, text)]
    try:
        digest = _write_weights(new[0], found)
        card = replace(card, sha256=digest)
        new[1].write_text(card.to_json(), encoding="utf-8")
        new[0].replace(weights)
        new[1].replace(text)
    finally:
        for path in new:
            path.unlink(missing_ok=True)
    return card


def load_foreign(
    src: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> NCVSDPrior | DiffusionPrior:
    """Load a foreign checkpoint as a prior, without writing it.

    Known are, by their content:
        NCVSD and EDM2: pickles whose "ema" is the network.
        EDM: such pickles of its DDPM++ and NCSN++ networks, also as plain state dicts, which
            are then taken to be preconditioned as EDM does.
        ADM (guided diffusion): plain state dicts, `ffhq_10m.pt` for one, with or without classes
            and learned variance; their noise is taken to grow linearly, and for what else tensors
            do not tell the published values are taken. `convert` has options for it, and tries.
        diffusers: a folder of a `UNet2DModel` with its scheduler, a pipeline's or the model's.
        ours: safetensors of a network as trained (one with a card is loaded by `load_prior`).

    Args:
        src: file or folder.
        device: where the network runs; None: torch's default device.
        dtype: precision of our networks, as for `load_prior`; those of libraries compute in
            float32.

    Returns:
        An `NCVSDPrior` for conditional networks, else a `DiffusionPrior`.

    Raises:
        CheckpointError: if `src` cannot be read or is of no known kind; every tensor that is
            missing, unexpected or of another shape is named.
    """
    found = _read(Path(src), NOTHING)
    where = torch.get_default_device() if device is None else torch.device(device)
    network = _filled(found, where, dtype or inference_dtype(where))
    return _prior(network, found, found.image_shape)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a checkpoint holds: the configuration of a network, its tensors and its range.

    Attributes:
        layout: whose checkpoint it is, in words.
        config: what `build_converted` takes.
        tensors: by the names of that network.
        image_shape: (C, H, W).
        gamma: how far a conditional network raises the noise level; None for others.
        sigma_min: smallest noise std, image units.
        sigma_max: largest noise std, image units.
        schedule: how its noise grows, where nothing tells it.
        guessed: names of the options that could change what was read.
    """

    layout: str
    config: dict[str, object]
    tensors: Mapping[str, Tensor]
    image_shape: tuple[int, int, int]
    gamma: float | None = None
    schedule: Schedule | None = None
    guessed: tuple[str, ...] = ()
    sigma_min: float = SIGMA_MIN
    sigma_max: float = SIGMA_MAX

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


def _filled(found: Found, device: torch.device, dtype: torch.dtype) -> Network | LibraryDenoiser:
    """Return the network with its weights, ready for passes; memory holds them once.

    Each tensor is stored as the passes use it before the next is read.
    """
    network = build_converted(found.config, "meta")
    layers = dict(network.named_modules())
    for name, value in found.converted():
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
        setattr(layer, attribute, nn.Parameter(stored, requires_grad=False) if trained else stored)
    return network.to_inference(dtype)


def _prior(
    network: Network | LibraryDenoiser, found: Found, image_shape: tuple[int, int, int] | None
) -> NCVSDPrior | DiffusionPrior:
    if found.gamma is None:
        return DiffusionPrior(
            network,
            image_shape=image_shape,
            sigma_min=found.sigma_min,
            sigma_max=found.sigma_max,
        )
    return NCVSDPrior(
        network,
        image_shape=image_shape,
        gamma=found.gamma,
        sigma_min=found.sigma_min,
        sigma_max=found.sigma_max,
    )


def _read(path: Path, told: Unsaid) -> Found:
    """Read any known checkpoint and check that its tensors are those of its network."""
    try:
        found = _read_folder(path, told) if path.is_dir() else _read_file(path, told)
        if told.size not in (None, found.image_shape[1]):
            raise ValueError(f"size is {found.image_shape[1]} by its tensors, got {told.size}")
        network = build_converted(found.config, "meta")
        _check_tensors(network.state_dict(), found.tensors)
    except CheckpointError:
        raise
    except Exception as error:
        # Odd tensors can break the reading of their shapes anywhere.
        text = str(error) if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(f"{path} cannot be converted: {text}") from error
    return found


def _tried(found: Found, told: Unsaid, source: Path) -> tuple[Found, object]:
    """Denoise a photograph; return what was found, its schedule chosen, and the errors.

    Raises:
        CheckpointError: if the error does not fall, or a schedule was given and the other is
            better.
    """
    channels, side, _ = found.image_shape
    if channels not in (1, 3):
        return found, f"not possible: images of {channels} channels are no pictures"
    network = _filled(found, torch.device("cpu"), inference_dtype("cpu"))
    x0 = photograph(channels, side, network.size_multiple)

    def errors_at(candidate: Found, levels: Sequence[float]) -> list[DenoisingError]:
        if isinstance(network, ADMDenoiser):
            network.log_sigmas.copy_(candidate.tensors["log_sigmas"])
        return denoising_errors(_prior(network, candidate, None), x0, levels)

    fault = ""
    if found.schedule:
        # Halfway a wrong schedule shows best: on a teacher of ours it trebled the error.
        tried = {name: _scheduled(found, name) for name in get_args(Schedule)}
        errors = {name: errors_at(one, LEVELS[1:2]) for name, one in tried.items()}
        best: Schedule = min(tried, key=lambda name: errors[name][0].ratio)
        found = tried[told.schedule or best]
        if found.schedule != best:
            fault = (
                f"denoises a photograph better with schedule {best!r} ({errors[best][0]}) than "
                f"with the {found.schedule!r} that was given"
            )
    result = errors_at(found, LEVELS)
    # Preconditioning alone scales the photograph: a network must add something to it.
    if not all(error.ratio < 1 for error in result) or result[0].denoised >= result[0].scaled:
        cause = ", ".join(found.guessed) or "its weights, damaged or never trained"
        fault = f"does not denoise a photograph as it was read; wrong may be {cause}"
    if fault:
        raise CheckpointError(
            f"{source} {fault}; its mean squared errors: {', '.join(map(str, result))}; "
            "check=False (--no-check) converts it all the same"
        )
    return found, [asdict(error) for error in result]


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
        listed = (f"{fault}: {_listed(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"its tensors are not those of its network; {'; '.join(listed)}")


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + rest


def _read_file(path: Path, told: Unsaid) -> Found:
    if path.suffix == ".safetensors" and path.is_file():
        return _recognised(safetensors.torch.load_file(path), None, told)
    value = read_checkpoint_file(path)
    if isinstance(value, dict):
        inner = (value[name] for name in CONTAINERS if isinstance(value.get(name), Inert | dict))
        value = next(inner, value)
    if isinstance(value, Inert):
        return _recognised(state_dict_of(value), value, told)
    if not isinstance(value, dict) or not value:
        raise ValueError(f"it must hold a network or a state dict, got a {type(value).__name__}")
    odd = [str(name) for name, entry in value.items() if not isinstance(entry, Tensor)]
    if odd:
        raise ValueError(f"a state dict must hold tensors only, got others: {_listed(odd)}")
    return _recognised({str(name): entry for name, entry in value.items()}, None, told)


def _recognised(state: dict[str, Tensor], module: Inert | None, told: Unsaid) -> Found:
    """Tell whose network has these tensors; `module` is what held them, if anything did."""
    for prefix in ("module.", "model."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    if "input_blocks.0.0.weight" in state:
        return _adm(state, told)
    if "map_layer0.weight" in state:
        return _edm(state, module, told)
    if "unet.emb_noise.weight" in state or "ctrl.emb_noise.weight" in state:
        return _edm2(state, module, told)
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
            f"its tensors are of no known network: {_listed(odd[nearest])}; not one has a name of "
            f"the known layouts, {', '.join(LAYOUTS)}"
        )
    if nearest == "diffusers":
        hint = "which are read as folders, with config.json and scheduler_config.json"
    elif odd[nearest]:
        hint = f"where these do not fit: {_listed(odd[nearest])}"
    else:
        hint = "whose first layers it lacks"
    return f"its tensors are of no known network; the nearest known layout is {nearest}, {hint}"


def _edm2(state: dict[str, Tensor], module: Inert | None, told: Unsaid) -> Found:
    """Describe a network of EDM2's kind: a teacher, a published conditional one, or our light one.

    Sources: Karras et al., arXiv 2312.02696; Peng et al., arXiv 2506.09416.
    """
    modules = [] if module is None else list(_modules(module))
    for inert in modules:
        for name, known in EDM2_CONSTANTS.items():
            if inert.state.get(name, known) != known:
                raise ValueError(f"{name} must be {known}, got {inert.state[name]!r}")
    told.check_known("EDM2", "head_channels", "size")
    kind = "denoiser" if "unet.emb_noise.weight" in state else "controlled"
    branch, decoder = ("unet.", "unet.dec.") if kind == "denoiser" else ("enc.", "dec.dec.")
    if "unet.emb_condition.weight" in state:
        kind = "concat"
    encoder = _Encoder(state, (f"{branch}enc.", decoder), "conv_res0", "attn_qkv")
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
    sigma_data = _recorded(modules, "sigma_data", 0.5)
    return Found(
        layout="EDM2" if kind == "denoiser" else "NCVSD",
        config={"kind": kind, "sigma_data": sigma_data, "any_size": False, **asdict(shape)},
        tensors=state,
        image_shape=(image_channels, encoder.sides[0], encoder.sides[0]),
        gamma=None if kind == "denoiser" else _recorded(modules, "gamma", GAMMA),
        guessed=("head_channels",) if attends and recorded is None else (),
    )


def _edm(state: dict[str, Tensor], module: Inert | None, told: Unsaid) -> Found:
    """Describe EDM's DDPM++ or NCSN++. Source: Karras et al., arXiv 2206.00364, table 1."""
    told.check_known("EDM", "size")
    if module is not None and module.name != "EDMPrecond":
        raise ValueError(f"its preconditioning must be EDM's, got {module.name}")
    if "out_conv.weight" in state:
        raise ValueError("its network is EDM's variant of ADM, which no library here carries")
    encoder = _Encoder(state, ("enc.", "dec."), "conv0", "qkv")
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
    sigma_data = _recorded([module] if module else [], "sigma_data", 0.5)
    return Found(
        layout="EDM",
        config={"kind": "edm", "arguments": arguments, "sigma_data": sigma_data},
        tensors={f"network.{name}": value for name, value in state.items()},
        image_shape=(encoder.inputs, encoder.sides[0], encoder.sides[0]),
    )


def _adm(state: dict[str, Tensor], told: Unsaid) -> Found:
    """Describe a network of guided diffusion.

    Residual blocks that change the side have the names of others; how many levels there are shows
    in the decoder, where they come second in their stage.

    Source: Dhariwal & Nichol, arXiv 2105.05233; the sides by levels are those of its networks.
    """
    last = max(
        (int(n.split(".")[1]) for n in state if re.match(r"output_blocks\.\d+\.", n)), default=-1
    )
    raising = re.compile(r"output_blocks\.(\d+)\.[12]\.(?:in_layers\.0|conv)\.weight", re.ASCII)
    levels = 1 + len({match[1] for match in map(raising.fullmatch, state) if match})
    blocks, rest = (last + 1) // levels - 1, (last + 1) % levels
    if rest or blocks < 1:
        raise ValueError(f"{levels} levels must share its output blocks, got {last + 1}")
    first = [f"input_blocks.{1 + level * (blocks + 1)}." for level in range(levels)]
    try:
        channels = [state[f"{stage}0.in_layers.2.weight"].shape[0] for stage in first]
        embedding = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
        in_channels = state["input_blocks.0.0.weight"].shape[1]
        out_channels = state["out.2.weight"].shape[0]
        model_channels = state["time_embed.0.weight"].shape[1]
    except KeyError as error:
        raise ValueError(f"its network lacks a layer: {error}") from None
    # The published networks of 6 channels each way double the side of a small image beside noise.
    if out_channels not in (in_channels, 2 * in_channels) or in_channels == out_channels == 6:
        raise ValueError(
            "its network must return its image's channels, once or with a variance twice, got "
            f"{out_channels} for {in_channels}"
        )
    side = told.size or ADM_SIDES.get(levels)
    if side is None or side % (1 << (levels - 1)):
        raise ValueError(
            f"size must be given, a multiple of {1 << (levels - 1)}, for a network of {levels} "
            f"levels, got {side}"
        )
    by, count = ("head_channels", told.head_channels or ADM_HEAD_CHANNELS)
    if told.num_heads:
        by, count = "num_heads", told.num_heads
    labels = state.get("label_emb.weight")
    arguments: dict[str, object] = {
        "resolution": side,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "model_channels": model_channels,
        "channels": channels,
        "blocks": blocks,
        "attention": [
            side >> level for level, stage in enumerate(first) if f"{stage}1.qkv.weight" in state
        ],
        "heads": [by, count],
        "attention_order": told.attention_order or "legacy",
        "block_resampling": f"input_blocks.{blocks + 1}.0.op.weight" not in state,
        "scale_shift": embedding == 2 * channels[0],
        "num_classes": 0 if labels is None else labels.shape[0],
    }
    found = Found(
        layout="ADM",
        config={"kind": "adm", "arguments": arguments},
        tensors={f"network.{name}": value for name, value in state.items()},
        image_shape=(in_channels, side, side),
        guessed=("schedule", "head_channels", "num_heads", "attention_order", "size"),
    )
    return _scheduled(found, told.schedule or "linear")


def _scheduled(found: Found, schedule: Schedule) -> Found:
    """Return `found` with noise that grows by a schedule of ADM's.

    Sources: Ho et al., arXiv 2006.11239, section 4; Nichol & Dhariwal, arXiv 2102.09672, equation
    17, with its betas of at most 0.999.
    """
    if schedule == "linear":
        betas = torch.linspace(*ADM_BETAS, ADM_LEVELS, dtype=torch.float64)
    else:
        times = torch.linspace(0, 1, ADM_LEVELS + 1, dtype=torch.float64)
        kept = ((times + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    return replace(_noised(found, (1 - betas).cumprod(0)), schedule=schedule)


def _read_folder(path: Path, told: Unsaid) -> Found:
    """Read a `UNet2DModel` of diffusers and the schedule of its noise."""
    told.check_known("diffusers", "size")
    model = path / "unet" if (path / "unet").is_dir() else path
    entries = _read_json(model / "config.json")
    if entries.get("_class_name") != "UNet2DModel":
        raise ValueError(f"its network must be a UNet2DModel, got {entries.get('_class_name')!r}")
    arguments = {name: entry for name, entry in entries.items() if not name.startswith("_")}
    if arguments.get("time_embedding_type", "positional") != "positional":
        raise ValueError("its times must be embedded by position, as networks of VP noise do")
    if arguments.get("class_embed_type") is not None:
        raise ValueError("its classes must be embedded by index")
    _check_most(arguments, "layers_per_block", 100)
    if arguments.get("sample_size") is None:
        arguments["sample_size"] = told.size
    side, channels = arguments["sample_size"], arguments.setdefault("in_channels", 3)
    if type(side) is not int or type(channels) is not int:
        raise ValueError(
            f"its images must be squares of known size, got {side!r}, {channels!r}; where its "
            "configuration has no sample_size, give size"
        )
    weights = model / "diffusion_pytorch_model.safetensors"
    if weights.is_file():
        state = safetensors.torch.load_file(weights)
    else:
        value = read_checkpoint_file(weights.with_suffix(".bin"))
        if not isinstance(value, dict) or not all(isinstance(v, Tensor) for v in value.values()):
            raise ValueError("its weights must be a state dict")
        state = value
    scheduler = [path / "scheduler", path, path.parent / "scheduler"]
    files = [folder / "scheduler_config.json" for folder in scheduler]
    schedule = _read_json(next((file for file in files if file.is_file()), files[0]))
    alphas = _alphas(schedule)
    config: dict[str, object] = {
        "kind": "diffusers",
        "arguments": arguments,
        "prediction": _prediction(schedule.get("prediction_type", "epsilon")),
        "num_levels": len(alphas),
    }
    renamed = {_attention_name(name): value for name, value in state.items()}
    found = Found(
        layout="diffusers",
        config=config,
        tensors={f"network.{name}": value for name, value in renamed.items()},
        image_shape=(channels, side, side),
    )
    return _noised(found, alphas)


def _noised(found: Found, alphas: Tensor) -> Found:
    """Return a network of scaled noise with `alphas` (T,), the squared scales at its times."""
    if not bool(((alphas > 0) & (alphas < 1)).all()) or not bool((alphas.diff() < 0).all()):
        raise ValueError("its noise must grow from time to time and never drown the image")
    log_sigmas = ((1 - alphas) / alphas).log() / 2
    return replace(
        found,
        tensors={**found.tensors, "log_sigmas": log_sigmas.float()},
        sigma_min=math.exp(log_sigmas[0]),
        sigma_max=math.exp(log_sigmas[-1]),
    )


def _alphas(schedule: dict[str, object]) -> Tensor:
    """Return the squared scales of the image at each time of a scheduler of diffusers, (T,)."""
    from diffusers import DDPMScheduler

    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    _check_most(schedule, "num_train_timesteps", 100_000)
    if "beta_schedule" not in schedule and "trained_betas" not in schedule:
        raise ValueError("its scheduler must have betas")
    try:
        scheduler = DDPMScheduler(**{name: schedule[name] for name in names if name in schedule})
    except Exception as error:
        raise ValueError(f"its scheduler cannot be built: {error}") from error
    if schedule.get("rescale_betas_zero_snr"):
        raise ValueError("its schedule must not end at pure noise (rescale_betas_zero_snr)")
    alphas: Tensor = (1 - scheduler.betas.double()).cumprod(0)
    return alphas


def _check_most(entries: Mapping[str, object], name: str, most: int) -> None:
    """Check that a count, where it is given, does not make building take for ever."""
    count = entries.get(name, 1)
    if type(count) is not int or not 0 < count <= most:
        raise ValueError(f"{name} must be an integer from 1 to {most}, got {count!r}")


def _prediction(name: object) -> Prediction:
    match name:
        case "epsilon" | "sample" | "v_prediction":
            return name
    raise ValueError(f"prediction_type must be epsilon, sample or v_prediction, got {name!r}")


def _attention_name(name: str) -> str:
    """Return the present name of what early versions of diffusers called otherwise."""
    head, _, last = name.rpartition(".")
    stem, _, part = head.rpartition(".")
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.get(part)
    return f"{stem}.{new}.{last}" if new else name


def _read_json(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"it must have at most {MAX_JSON} bytes")
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} must be there and be JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path.name} must be a JSON object, got a {type(entries).__name__}")
    return entries


class _Encoder:
    """What the names and shapes of NVIDIA's U-Nets tell of the encoder, and where blocks attend.

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


def _modules(module: Inert) -> Iterator[Inert]:
    yield module
    inner = module.state.get("_modules")
    for child in inner.values() if isinstance(inner, dict) else ():
        if isinstance(child, Inert):
            yield from _modules(child)


def _recorded(modules: Iterable[Inert], name: str, default: float) -> float:
    """Return the number that a module keeps as an attribute, the first that does."""
    came = next((module.state[name] for module in modules if name in module.state), default)
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


def _write_weights(path: Path, found: Found) -> str:
    """Write the tensors as safetensors, one at a time; return the SHA-256 of the file.

    The format: the length of a JSON header in eight bytes, the header, the bytes of the tensors.
    """
    header, end = {}, 0
    for name, value in build_converted(found.config, "meta").state_dict().items():
        start, end = end, end + 4 * value.numel()
        shape = list(value.shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        write(struct.pack("<Q", len(text)))
        write(text)
        for _, value in found.converted():
            write(memoryview(value.contiguous().view(-1).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
