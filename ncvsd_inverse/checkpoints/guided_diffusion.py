"""Networks of guided diffusion (ADM), and the schedules of their noise."""

import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from ncvsd_inverse.checkpoints.parsed import Options, ParsedCheckpoint, Schedule
from ncvsd_inverse.networks.library import ADM_LEVELS

__all__ = ["parse_adm", "with_noise", "with_schedule"]

ADM_SIDES = {4: 64, 5: 128, 6: 256, 7: 512}
"""Sides of the images of the published networks, pixels, by number of levels."""
ADM_HEAD_CHANNELS = 64
ADM_BETAS = (1e-4, 0.02)


def parse_adm(state: dict[str, Tensor], told: Options) -> ParsedCheckpoint:
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
    found = ParsedCheckpoint(
        layout="ADM",
        config={"kind": "adm", "arguments": arguments},
        tensors={f"network.{name}": value for name, value in state.items()},
        image_shape=(in_channels, side, side),
        guessed=("schedule", "head_channels", "num_heads", "attention_order", "size"),
    )
    return with_schedule(found, told.schedule or "linear")


def with_schedule(found: ParsedCheckpoint, schedule: Schedule) -> ParsedCheckpoint:
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
    return replace(with_noise(found, (1 - betas).cumprod(0)), schedule=schedule)


def with_noise(found: ParsedCheckpoint, alphas: Tensor) -> ParsedCheckpoint:
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
