"""Networks sharded over processes (FSDP).

Weights are split by rows, that is by filters: normalising, projecting, averaging and Adam work on
each filter alone. Gains, biases and blend weights stay whole on every process: they are small, and
FSDP takes no scalars.
"""

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ncvsd_inverse.networks.unet import Block

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "average_whole_gradients_",
    "gather",
    "make_hollow",
    "make_mesh",
    "optimizer_groups",
    "shard_",
    "share_first_",
    "split_like",
]


def make_mesh(device: torch.device, processes: int) -> "DeviceMesh":
    """Return the line of all processes; ImportError if this torch cannot split weights over it."""
    if torch.__version__ < "2.7":  # as torch compares versions, number by number
        raise ImportError(f"--fsdp needs torch 2.7 or later, got {torch.__version__}")
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (processes,))


def _stays_whole(parameter: nn.Parameter) -> bool:
    """Tell whether a parameter is kept whole by every process."""
    return parameter.ndim < 2


@torch.no_grad()
def share_first_(module: nn.Module) -> None:
    """Give every process the values of the first one's module, in place."""
    for tensor in (*module.parameters(), *module.buffers()):
        values = tensor.contiguous()
        torch.distributed.broadcast(values, src=0)
        tensor.copy_(values)


def shard_(module: nn.Module, mesh: "DeviceMesh", *, compiles: bool = False) -> None:
    """Split the weights of `module` over the processes of `mesh`, in place.

    A pass gathers the weights of one residual block at a time; `forward` and `log_variance` do.

    Args:
        module: the same on all processes.
        mesh: the processes.
        compiles: whether torch.compile fuses the residual blocks; gathering cannot be fused.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # It warns of views, which must not be written to; no loss writes to what a network returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if compiles:
        # All blocks are compiled from one function, each counted as a recompilation of it.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
    whole = set()
    for parameter in module.parameters():
        if _stays_whole(parameter):
            whole.add(parameter)
        else:
            parameter.data = parameter.data.contiguous()  # FSDP knows no channels_last
    for part in (*(m for m in module.modules() if isinstance(m, Block)), module):
        if compiles and part is not module:
            part.compile()
        # Gathered weights are given back after each pass: a module may be frozen before the next.
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    if hasattr(module, "log_variance"):
        register_fsdp_forward_method(module, "log_variance")


def make_hollow(module: nn.Module) -> nn.Module:
    """Return a copy of `module` whose parameters have shapes but no values."""
    hollow = {
        id(parameter): nn.Parameter(parameter.to("meta"), requires_grad=False)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, hollow)


def optimizer_groups(module: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """Return the split and the whole parameters: an optimiser cannot mix them in one operation."""
    split = [p for p in module.parameters() if not _stays_whole(p)]
    whole = [p for p in module.parameters() if _stays_whole(p)]
    return [{"params": group} for group in (split, whole) if group]


def average_whole_gradients_(module: nn.Module, accelerator: "Accelerator") -> None:
    """Average the gradients of whole parameters over processes, in place; FSDP does the others."""
    gradients = [p.grad for p in module.parameters() if _stays_whole(p) and p.grad is not None]
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        means = accelerator.reduce(flat, "mean")
        start = 0
        for gradient in gradients:
            end = start + gradient.numel()
            gradient.copy_(means[start:end].reshape(gradient.shape))
            start = end


def gather(state: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return named tensors with the split ones put together; all processes must call it.

    Args:
        state: named tensors, whole or split.
        keep: whether this process wants them, on the CPU; else it gets none.
    """
    from torch.distributed.tensor import DTensor

    gathered = {}
    for name, value in state.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            gathered[name] = full.detach().cpu()
    return gathered


def split_like(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this process's part of named tensors, split where those of `like` are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    parts = dict(state)
    for name, value in state.items():
        target = like.get(name)
        if isinstance(target, DTensor) and value.shape == target.shape:
            # Every process has read the file, so nothing has to be sent.
            parts[name] = distribute_tensor(
                value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
            )
    return parts
