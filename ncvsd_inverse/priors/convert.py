"""Turns the checkpoints of others into priors, without running anything that a file holds.

What a network is, is read from the names and shapes of its tensors; what they do not tell stands
in the file as plain numbers, or is the value that the authors publish. Networks of EDM2's kind
become ours; for others a library has the architecture, and a denoiser of this module makes
x0 = D(x, sigma) of it. It must not know how priors are found by name.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import safetensors.torch
import torch
from torch import Tensor, nn

from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.networks import (
    Network,
    UNetShape,
    build_network,
    constrain_weights_,
    inference_dtype,
)
from ncvsd_inverse.networks.magnitude import MPConv
from ncvsd_inverse.priors.base import SIGMA_MAX, SIGMA_MIN
from ncvsd_inverse.priors.card import PriorCard
from ncvsd_inverse.priors.diffusion import DiffusionPrior
from ncvsd_inverse.priors.ncvsd import GAMMA, NCVSDPrior
from ncvsd_inverse.unpickle import Inert, read_checkpoint_file, state_dict_of

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
ADM_RESOLUTION = 256
ADM_LEVELS = 1000
ADM_BETAS = (1e-4, 0.02)
CONTAINERS = ("ema", "state_dict", "model", "net")
"""Entries under which files keep their network, the one to prefer first."""
UNSAID = "not said by the file; ask those who published it"
MOST_LISTED = 1000
MAX_JSON = 1 << 20

Prediction = Literal["epsilon", "sample", "v_prediction"]


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    licence: str = UNSAID,
    data: str = UNSAID,
) -> PriorCard:
    """Write a foreign checkpoint as a prior of ours: NAME.safetensors and its card, NAME.json.

    Tensors are copied one at a time, as float32, so that memory holds the file once at most. Both
    files appear whole, the weights first.

    Args:
        src: the checkpoint; see `load_foreign`.
        dst: FOLDER/NAME, with or without ".safetensors"; the folder must exist.
        licence: terms of use of the weights.
        data: what the network was trained on.

    Returns:
        The card as written.

    Raises:
        CheckpointError: if `src` cannot be read or is of no known kind.
        ValueError: if the folder of `dst` does not exist, or a text is empty.
    """
    source, stem = Path(src), Path(dst)
    if stem.suffix in (".safetensors", ".json"):
        stem = stem.with_suffix("")
    if not stem.parent.is_dir():
        raise ValueError(f"dst must lie in an existing folder, got {dst}")
    found = _read(source)
    origin = {"converted_from": source.name, "layout": found.layout, "dtype": found.dtype}
    if source.is_file():
        with source.open("rb") as file:
            origin["source_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
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
        ADM (guided diffusion): plain state dicts of the 256x256 networks without classes that
            deepinv's DiffUNet has, `ffhq_10m.pt` for one.
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
    found = _read(Path(src))
    network = build_converted(found.config, device="cpu")
    state = network.state_dict()
    for name, value in found.converted():
        state[name].copy_(value)
    where = torch.get_default_device() if device is None else torch.device(device)
    network.to(where).to_inference(dtype or inference_dtype(where))
    if found.gamma is None:
        return DiffusionPrior(
            network,
            image_shape=found.image_shape,
            sigma_min=found.sigma_min,
            sigma_max=found.sigma_max,
        )
    return NCVSDPrior(
        network,
        image_shape=found.image_shape,
        gamma=found.gamma,
        sigma_min=found.sigma_min,
        sigma_max=found.sigma_max,
    )


class LibraryDenoiser(nn.Module):
    """Base of denoisers x0 = D(x, sigma) whose network a library builds; they compute in float32.

    Lower precision would show: a network that predicts noise has its errors multiplied by sigma.

    Attributes:
        network: the library's network.
        image_channels: channels of the images.
        resolution: side of the images, pixels.
        size_multiple: what both sides must be a multiple of.
        num_classes: number of class labels, 0 for none.
    """

    image_channels: int
    resolution: int
    size_multiple: int
    num_classes = 0

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def to_inference(self, dtype: torch.dtype) -> Self:
        """Make the network ready for passes, in place; it stays in float32 whatever `dtype` is."""
        return self.eval().requires_grad_(False)


class EDMDenoiser(LibraryDenoiser):
    """EDM's DDPM++ or NCSN++ by deepinv's `NCSNpp`; `arguments` are those of its constructor.

    Source: Karras et al., arXiv 2206.00364.
    """

    def __init__(self, arguments: Mapping[str, Any], *, sigma_data: float) -> None:
        from deepinv.models import NCSNpp

        super().__init__(NCSNpp(**arguments, pretrained=None, pixel_std=sigma_data))
        self.image_channels = arguments["in_channels"]
        self.resolution = arguments["img_resolution"]
        self.size_multiple = 1 << (len(arguments["channel_mult"]) - 1)
        self.num_classes = arguments["label_dim"]

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoise `x` (B, C, H, W) of noise std `sigma` (B,); without labels all are 0."""
        if labels is None and self.num_classes:
            labels = x.new_zeros(x.shape[0], self.num_classes)
        x0: Tensor = self.network(x.float(), sigma.float(), class_labels=labels)
        return x0.to(x.dtype)


class VPDenoiser(LibraryDenoiser):
    """Base of networks that were trained on c (x0 + sigma eps), c = 1/sqrt(1 + sigma^2), at times.

    The time of a sigma between two of its levels is interpolated linearly in log sigma; beyond
    the levels it is that of the first or last. Predictions are not clipped to [-1, 1].

    Args:
        network: the library's network.
        prediction: what it returns: "epsilon" eps, "sample" x0, "v_prediction"
            c eps - sqrt(1 - c^2) x0. Channels beyond those of the image, a learned variance, are
            dropped.
        num_levels: number of times.

    Attributes:
        log_sigmas: increasing, shape (num_levels,); stored with the weights.
    """

    log_sigmas: Tensor

    def __init__(self, network: nn.Module, *, prediction: Prediction, num_levels: int) -> None:
        super().__init__(network)
        self.prediction = prediction
        self.register_buffer("log_sigmas", torch.zeros(num_levels))

    def predict(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        """Call the network on scaled images (B, C, H, W) at times (B,)."""
        raise NotImplementedError

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoise `x` (B, C, H, W) of noise std `sigma` (B,); labels (B, K) are one-hot."""
        noisy, level = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        scale = (1 + level**2).rsqrt()
        out = self.predict(scale * noisy, self.time(sigma), labels)[:, : x.shape[1]]
        if self.prediction == "sample":
            return out.to(x.dtype)
        if self.prediction == "v_prediction":
            return (scale**2 * noisy - level * scale * out).to(x.dtype)
        return (noisy - level * out).to(x.dtype)

    def time(self, sigma: Tensor) -> Tensor:
        """Return the times of stds (B,), in [0, num_levels - 1]."""
        levels = self.log_sigmas
        wanted = sigma.float().log().clamp(levels[0], levels[-1])
        above = torch.searchsorted(levels, wanted).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        return above - 1 + (wanted - low) / (high - low)


class ADMDenoiser(VPDenoiser):
    """A network of guided diffusion by deepinv's `DiffUNet`; the arguments of its constructor.

    Source: Dhariwal & Nichol, arXiv 2105.05233; betas linear as there.
    """

    def __init__(self, *, in_channels: int, out_channels: int, large_model: bool) -> None:
        from deepinv.models import DiffUNet

        network = DiffUNet(in_channels, out_channels, large_model, pretrained=None)
        # Tables of the library's own wrapper, which is not used here.
        del network.sqrt_1m_alphas_cumprod, network.sqrt_alphas_cumprod
        super().__init__(network, prediction="epsilon", num_levels=ADM_LEVELS)
        self.image_channels = in_channels
        self.resolution = ADM_RESOLUTION
        self.size_multiple = 1 << (len(network.channel_mult) - 1)

    def predict(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        """Call the network; labels are not taken."""
        out: Tensor = self.network.forward_diffusion(x, time)  # type: ignore[operator]
        return out


class DiffusersDenoiser(VPDenoiser):
    """A network of diffusers; `arguments` are those of `UNet2DModel`."""

    def __init__(
        self, arguments: Mapping[str, Any], *, prediction: Prediction, num_levels: int
    ) -> None:
        from diffusers import UNet2DModel

        network = UNet2DModel(**arguments)
        super().__init__(network, prediction=prediction, num_levels=num_levels)
        self.image_channels = arguments["in_channels"]
        self.resolution = arguments["sample_size"]
        self.size_multiple = 1 << (len(network.down_blocks) - 1)
        self.num_classes = arguments.get("num_class_embeds") or 0

    def predict(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        """Call the network; one trained with classes needs labels."""
        if self.num_classes and labels is None:
            raise ValueError("this prior needs a class: use prior.conditioned_on(label)")
        classes = None if labels is None else labels.argmax(1)
        out: Tensor = self.network(x, time, class_labels=classes, return_dict=False)[0]
        return out


LIBRARY: dict[str, Callable[..., LibraryDenoiser]] = {
    "edm": EDMDenoiser,
    "adm": ADMDenoiser,
    "diffusers": DiffusersDenoiser,
}
"""Kinds of networks, as cards name them, beside those of `networks.build_network`."""


def build_converted(config: Mapping[str, Any], device: str) -> Network | LibraryDenoiser:
    """Build the network of a card without drawing its weights; "meta" takes no memory for them.

    Raises:
        ValueError: if the configuration is wrong.
    """
    entries = dict(config)
    kind = entries.pop("kind", None)
    try:
        with torch.device("meta"):
            if isinstance(kind, str) and kind in LIBRARY:
                network: Network | LibraryDenoiser = LIBRARY[kind](**entries)
            else:
                network = build_network(dict(config))
    except Exception as error:
        # A wrong configuration can break the construction anywhere.
        raise ValueError(f"its configuration cannot be built: {error}") from error
    return network if device == "meta" else network.to_empty(device=device)


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
    """

    layout: str
    config: dict[str, object]
    tensors: Mapping[str, Tensor]
    image_shape: tuple[int, int, int]
    gamma: float | None = None
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

        EDM2 divides filters by their norm at each pass and the published conditional network clips
        its blends; ours are stored so.
        """
        network = build_converted(self.config, "meta")
        layers = dict(network.named_modules())
        for name in network.state_dict():
            owner, _, attribute = name.rpartition(".")
            value = self.tensors[name].detach().float()
            if not bool(value.isfinite().all()):
                raise CheckpointError(f"the tensor {name} must be finite")
            layer = layers[owner]
            if isinstance(layer, MPConv):
                held, layer.weight = layer.weight, nn.Parameter(value.clone(), requires_grad=False)
                constrain_weights_(layer)
                value, layer.weight = layer.weight.data, held
            elif attribute in BLENDS:
                value = value.clamp(0, 1)
            yield name, value


def _read(path: Path) -> Found:
    """Read any known checkpoint and check that its tensors are those of its network."""
    try:
        found = _read_folder(path) if path.is_dir() else _read_file(path)
        network = build_converted(found.config, "meta")
        _check_tensors(network.state_dict(), found.tensors)
    except CheckpointError:
        raise
    except Exception as error:
        # Odd tensors can break the reading of their shapes anywhere.
        told = str(error) if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(f"{path} cannot be converted: {told}") from error
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
        listed = (f"{fault}: {_listed(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"its tensors are not those of its network; {'; '.join(listed)}")


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + rest


def _read_file(path: Path) -> Found:
    if path.suffix == ".safetensors" and path.is_file():
        return _recognised(safetensors.torch.load_file(path), None)
    value = read_checkpoint_file(path)
    if isinstance(value, dict):
        inner = (value[name] for name in CONTAINERS if isinstance(value.get(name), Inert | dict))
        value = next(inner, value)
    if isinstance(value, Inert):
        return _recognised(state_dict_of(value), value)
    if not isinstance(value, dict) or not value:
        raise ValueError(f"it must hold a network or a state dict, got a {type(value).__name__}")
    odd = [str(name) for name, entry in value.items() if not isinstance(entry, Tensor)]
    if odd:
        raise ValueError(f"a state dict must hold tensors only, got others: {_listed(odd)}")
    return _recognised({str(name): entry for name, entry in value.items()}, None)


def _recognised(state: dict[str, Tensor], module: Inert | None) -> Found:
    """Tell whose network has these tensors; `module` is what held them, if anything did."""
    for prefix in ("module.", "model."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    if "input_blocks.0.0.weight" in state:
        return _adm(state)
    if "map_layer0.weight" in state:
        return _edm(state, module)
    if "unet.emb_noise.weight" in state or "ctrl.emb_noise.weight" in state:
        return _edm2(state, module)
    raise ValueError(f"its tensors are of no known network: {_listed(list(state))}")


def _edm2(state: dict[str, Tensor], module: Inert | None) -> Found:
    """Describe a network of EDM2's kind: a teacher, a published conditional one, or our light one.

    Sources: Karras et al., arXiv 2312.02696; Peng et al., arXiv 2506.09416.
    """
    modules = [] if module is None else list(_modules(module))
    for inert in modules:
        for name, known in EDM2_CONSTANTS.items():
            if inert.state.get(name, known) != known:
                raise ValueError(f"{name} must be {known}, got {inert.state[name]!r}")
    kind = "denoiser" if "unet.emb_noise.weight" in state else "controlled"
    branch = "unet." if kind == "denoiser" else "enc."
    if "unet.emb_condition.weight" in state:
        kind = "concat"
    encoder = _Encoder(state, f"{branch}enc.", "conv_res0", "attn_qkv")
    inputs = encoder.inputs - 1
    image_channels = inputs // 2 if kind == "concat" else inputs
    labels = state.get(f"{branch}emb_label.weight")
    shape = UNetShape(
        resolution=encoder.sides[0],
        image_channels=image_channels,
        channels=encoder.channels,
        blocks=encoder.blocks,
        attention=encoder.attention,
        head_channels=_head_channels(modules, EDM2_HEAD_CHANNELS),
        num_classes=0 if labels is None else labels.shape[-1],
    )
    sigma_data = _recorded(modules, "sigma_data", 0.5)
    return Found(
        layout="EDM2" if kind == "denoiser" else "NCVSD",
        config={"kind": kind, "sigma_data": sigma_data, "any_size": False, **asdict(shape)},
        tensors=state,
        image_shape=(image_channels, encoder.sides[0], encoder.sides[0]),
        gamma=None if kind == "denoiser" else _recorded(modules, "gamma", GAMMA),
    )


def _edm(state: dict[str, Tensor], module: Inert | None) -> Found:
    """Describe EDM's DDPM++ or NCSN++. Source: Karras et al., arXiv 2206.00364, table 1."""
    if module is not None and module.name != "EDMPrecond":
        raise ValueError(f"its preconditioning must be EDM's, got {module.name}")
    if "out_conv.weight" in state:
        raise ValueError("its network is EDM's variant of ADM, which no library here carries")
    encoder = _Encoder(state, "enc.", "conv0", "qkv")
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


def _adm(state: dict[str, Tensor]) -> Found:
    """Describe a network of guided diffusion; what deepinv's does not carry shows by its names."""
    width, in_channels = state["input_blocks.0.0.weight"].shape[:2]
    out = state.get("out.2.weight")
    config: dict[str, object] = {
        "kind": "adm",
        "in_channels": in_channels,
        "out_channels": 2 * in_channels if out is None else out.shape[0],
        "large_model": width == 256,
    }
    betas = torch.linspace(*ADM_BETAS, ADM_LEVELS, dtype=torch.float64)
    side = ADM_RESOLUTION
    return _vp("ADM", config, state, (1 - betas).cumprod(0), (in_channels, side, side))


def _read_folder(path: Path) -> Found:
    """Read a `UNet2DModel` of diffusers and the schedule of its noise."""
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
    side, channels = arguments.get("sample_size"), arguments.setdefault("in_channels", 3)
    if type(side) is not int or type(channels) is not int:
        raise ValueError(f"its images must be squares of known size, got {side!r}, {channels!r}")
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
    return _vp("diffusers", config, renamed, alphas, (channels, side, side))


def _vp(
    layout: str,
    config: dict[str, object],
    state: dict[str, Tensor],
    alphas: Tensor,
    image_shape: tuple[int, int, int],
) -> Found:
    """Describe a network of scaled noise; `alphas` (T,) are the squared scales at its times."""
    if not bool(((alphas > 0) & (alphas < 1)).all()) or not bool((alphas.diff() < 0).all()):
        raise ValueError("its noise must grow from time to time and never drown the image")
    log_sigmas = ((1 - alphas) / alphas).log() / 2
    return Found(
        layout=layout,
        config=config,
        tensors={
            "log_sigmas": log_sigmas.float(),
            **{f"network.{name}": value for name, value in state.items()},
        },
        image_shape=image_shape,
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
    """What the names and shapes of an encoder of NVIDIA's U-Nets tell of it.

    Layers are called SIDExSIDE_conv, _down and _blockN.

    Attributes:
        sides: sides of its levels, pixels, the finest first.
        inputs: channels that enter.
        channels: channels of each level.
        blocks: blocks of each level.
        attention: sides at which blocks attend.
    """

    def __init__(self, state: Mapping[str, Tensor], prefix: str, conv: str, attends: str) -> None:
        pattern = re.compile(re.escape(prefix) + r"(\d{1,5})x\1_(\w+)\.([\w.]+)", re.ASCII)
        found = [match.groups() for match in map(pattern.fullmatch, state) if match]
        self.sides = sorted({int(side) for side, _, _ in found}, reverse=True)
        layers = {
            f"{side}_{layer}.{rest}": f"{side}x{side}_{layer}.{rest}" for side, layer, rest in found
        }
        try:
            first = self.sides[0]
            self.inputs: int = state[prefix + layers[f"{first}_conv.weight"]].shape[1]
            self.channels: tuple[int, ...] = tuple(
                state[prefix + layers[f"{side}_block0.{conv}.weight"]].shape[0]
                for side in self.sides
            )
        except (IndexError, KeyError) as error:
            raise ValueError(f"its encoder lacks a layer: {error}") from None
        blocks = {layer for side, layer, _ in found if int(side) == first}
        self.blocks = sum(layer.startswith("block") for layer in blocks)
        attending = {int(side) for side, _, rest in found if rest == f"{attends}.weight"}
        self.attention = tuple(sorted(attending, reverse=True))


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


def _head_channels(modules: Iterable[Inert], default: int) -> int:
    """Return the channels of an attention head, of the first module that attends."""
    for module in modules:
        heads, inner = module.state.get("num_heads"), module.state.get("_modules")
        if type(heads) is int and heads > 0 and isinstance(inner, dict) and "attn_proj" in inner:
            width = state_dict_of(inner["attn_proj"])["weight"].shape[0]
            if width % heads:
                raise ValueError(f"{heads} attention heads must divide {width} channels")
            return width // heads
    return default


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
