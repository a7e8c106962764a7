"""Network architectures and their preconditioning."""

from dataclasses import asdict, fields

import torch

from ncvsd_inverse.checks import check_names, check_positive
from ncvsd_inverse.networks.denoisers import (
    ConcatDenoiser,
    ConcatDiscriminator,
    ControlledDenoiser,
    ControlledDiscriminator,
    Denoiser,
    Network,
    constrain_weights_,
)
from ncvsd_inverse.networks.edm2_layers import normalize_weights_, project_gradients_
from ncvsd_inverse.networks.unet import UNetShape

__all__ = [
    "ConcatDenoiser",
    "ConcatDiscriminator",
    "ControlledDenoiser",
    "ControlledDiscriminator",
    "Denoiser",
    "Network",
    "UNetShape",
    "build_network",
    "constrain_weights_",
    "inference_dtype",
    "network_config",
    "normalize_weights_",
    "project_gradients_",
]

KINDS: dict[str, type[Network]] = {
    "denoiser": Denoiser,
    "concat": ConcatDenoiser,
    "controlled": ControlledDenoiser,
    "concat_discriminator": ConcatDiscriminator,
    "controlled_discriminator": ControlledDiscriminator,
}


def network_config(network: Network) -> dict[str, object]:
    """Return what `build_network` needs to build an untrained twin of `network`, JSON-able."""
    kind = next(name for name, cls in KINDS.items() if type(network) is cls)
    return {
        "kind": kind,
        "sigma_data": network.sigma_data,
        "any_size": network.any_size,
        **asdict(network.shape),
    }


def build_network(config: dict[str, object]) -> Network:
    """Build an untrained network from the dictionary that `network_config` returns.

    Raises:
        ValueError: if the kind is unknown or a field is missing, unknown or out of range.
    """
    entries = dict(config)
    kind = entries.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    known = ["sigma_data", "any_size", *(entry.name for entry in fields(UNetShape))]
    check_names("network configuration", entries, known, known[:3])
    sigma_data, any_size = entries.pop("sigma_data"), entries.pop("any_size")
    if not isinstance(any_size, bool):
        raise ValueError(f"any_size must be true or false, got {any_size!r}")
    for name in ("channels", "attention"):
        if isinstance(entries.get(name), list):
            entries[name] = tuple(entries[name])  # type: ignore[arg-type]
    try:
        level = check_positive("sigma_data", sigma_data)  # type: ignore[arg-type]
        shape = UNetShape(**entries)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(str(error)) from None
    return KINDS[kind](shape, sigma_data=level, any_size=any_size)


def inference_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """Return the dtype in which networks run fastest without visible loss on `device`.

    bfloat16 on CUDA and on CPUs with AMX or AVX512-BF16 instructions, else float32.
    """
    kind = torch.device(device or "cpu").type
    if kind == "cuda":
        return torch.bfloat16
    if kind == "cpu" and cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def cpu_has_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 matrices in hardware."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)
