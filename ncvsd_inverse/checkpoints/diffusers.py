"""Folders of a `UNet2DModel` of diffusers and the schedule of its noise."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ncvsd_inverse.checkpoints.guided_diffusion import with_noise
from ncvsd_inverse.checkpoints.parsed import Options, ParsedCheckpoint
from ncvsd_inverse.checkpoints.torch_files import read_checkpoint_file, read_safetensors
from ncvsd_inverse.machine import extra
from ncvsd_inverse.networks.library import Prediction
from ncvsd_inverse.plain_data import read_json

__all__ = ["parse_diffusers"]


def parse_diffusers(path: Path, told: Options) -> ParsedCheckpoint:
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
        state = read_safetensors(weights)
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
    found = ParsedCheckpoint(
        layout="diffusers",
        config=config,
        tensors={f"network.{name}": value for name, value in renamed.items()},
        image_shape=(channels, side, side),
    )
    return with_noise(found, alphas)


def _alphas(schedule: dict[str, object]) -> Tensor:
    """Return the squared scales of the image at each time of a scheduler of diffusers, (T,)."""
    with extra("latents"):
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
        entries = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} must be there and be JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path.name} must be a JSON object, got a {type(entries).__name__}")
    return entries
