"""Network architectures and their preconditioning."""

from dataclasses import asdict

import torch

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
    fields = dict(config)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    try:
        sigma_data, any_size = float(str(fields.pop("sigma_data"))), bool(fields.pop("any_size"))
        for name in ("channels", "attention"):
            fields[name] = tuple(int(value) for value in fields[name])  # type: ignore[attr-defined]
        shape = UNetShape(**fields)  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        raise ValueError(f"network configuration has a missing or unknown field: {error}") from None
    return KINDS[kind](shape, sigma_data=sigma_data, any_size=any_size)


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
