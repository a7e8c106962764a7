"""Turns the checkpoints of others into priors, without running anything that a file holds.

Networks of EDM2's kind become ours, others those of `networks.library`.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import torch

from ncvsd_inverse.checkpoints.guided_diffusion import with_schedule
from ncvsd_inverse.checkpoints.parsed import Options, ParsedCheckpoint, Schedule
from ncvsd_inverse.checkpoints.parsing import parse_checkpoint
from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.files import file_sha256, whole_files
from ncvsd_inverse.machine import exact_arithmetic
from ncvsd_inverse.networks import Network, inference_dtype
from ncvsd_inverse.networks.adm import AttentionOrder
from ncvsd_inverse.networks.library import ADMDenoiser, LibraryDenoiser, build_converted
from ncvsd_inverse.priors.base import SIGMA_MAX, SIGMA_MIN
from ncvsd_inverse.priors.card import PriorCard
from ncvsd_inverse.priors.diffusion import DiffusionPrior
from ncvsd_inverse.priors.files import card_path, weights_path, write_stream
from ncvsd_inverse.priors.ncvsd import GAMMA, NCVSDPrior
from ncvsd_inverse.priors.selfcheck import LEVELS, DenoisingError, denoising_errors, photograph

__all__ = ["UNSAID", "convert", "load_foreign"]

UNSAID = "not said by the file; ask those who published it"


@exact_arithmetic()
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
    told = Options(
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
    found = parse_checkpoint(source, told)
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
    low, high = _range(found)
    card = PriorCard(
        name=stem.name,
        kind="ncvsd" if found.is_conditional else "diffusion",
        network=found.config,
        image_shape=found.image_shape,
        gamma=_gamma(found) if found.is_conditional else None,
        sigma_min=low,
        sigma_max=high,
        sha256="0" * 64,
        licence=licence,
        data=data,
        training=origin,
        evaluation={},
        weaknesses="not measured",
        intended_use="as its authors say",
    )
    layout = {
        name: (torch.float32, value.shape)
        for name, value in build_converted(found.config, "meta").state_dict().items()
    }
    with whole_files(weights_path(stem), card_path(stem)) as (weights, text):
        values = (value for _, value in found.converted())
        card = replace(card, sha256=write_stream(weights, layout, values))
        text.write_text(card.to_json(), encoding="utf-8")
    return card


@exact_arithmetic()
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
    found = parse_checkpoint(Path(src), Options())
    where = torch.get_default_device() if device is None else torch.device(device)
    network = found.build(where, dtype or inference_dtype(where))
    return _prior(network, found, found.image_shape)


def _prior(
    network: Network | LibraryDenoiser,
    found: ParsedCheckpoint,
    image_shape: tuple[int, int, int] | None,
) -> NCVSDPrior | DiffusionPrior:
    low, high = _range(found)
    if not found.is_conditional:
        return DiffusionPrior(network, image_shape=image_shape, sigma_min=low, sigma_max=high)
    return NCVSDPrior(
        network, image_shape=image_shape, gamma=_gamma(found), sigma_min=low, sigma_max=high
    )


def _range(found: ParsedCheckpoint) -> tuple[float, float]:
    """Return the noise stds that a checkpoint names, else those of EDM's training."""
    low, high = found.sigma_min, found.sigma_max
    return SIGMA_MIN if low is None else low, SIGMA_MAX if high is None else high


def _gamma(found: ParsedCheckpoint) -> float:
    """Return how far a conditional network raises the noise, the published value if not named."""
    return GAMMA if found.gamma is None else found.gamma


def _tried(found: ParsedCheckpoint, told: Options, source: Path) -> tuple[ParsedCheckpoint, object]:
    """Denoise a photograph; return what was found, its schedule chosen, and the errors.

    Raises:
        CheckpointError: if the error does not fall, or a schedule was given and the other is
            better.
    """
    channels, side, _ = found.image_shape
    if channels not in (1, 3):
        return found, f"not possible: images of {channels} channels are no pictures"
    network = found.build(torch.device("cpu"), inference_dtype("cpu"))
    x0 = photograph(channels, side, network.size_multiple)

    def errors_at(candidate: ParsedCheckpoint, levels: Sequence[float]) -> list[DenoisingError]:
        if isinstance(network, ADMDenoiser):
            network.log_sigmas.copy_(candidate.tensors["log_sigmas"])
        return denoising_errors(_prior(network, candidate, None), x0, levels)

    fault = ""
    if found.schedule:
        # Halfway a wrong schedule shows best: on a teacher of ours it trebled the error.
        tried = {name: with_schedule(found, name) for name in get_args(Schedule)}
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
