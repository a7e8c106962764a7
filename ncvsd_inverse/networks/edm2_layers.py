"""Magnitude-preserving layers: operations that keep unit variance for unit-variance input.

Source: Karras et al., arXiv 2312.02696 (EDM2), section 2 and appendix B.
"""

import math

import torch
from torch import Tensor, nn

from ncvsd_inverse.numerics import local_part

__all__ = [
    "FourierFeatures",
    "MPConv",
    "fold_weights_",
    "mp_cat",
    "mp_silu",
    "mp_sum",
    "normalize_weights_",
    "pixel_norm",
    "project_gradients_",
]

EPS = 1e-4
SILU_RMS = 0.596
"""Root mean square of silu(x) for standard normal x."""


def pixel_norm(x: Tensor, dim: int = 1) -> Tensor:
    """Divide `x` by its root mean square along `dim`; same shape."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return x * (1 / (EPS + norm / math.sqrt(x.shape[dim]))).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """Return silu(x) scaled to unit variance for standard normal x."""
    return nn.functional.silu(x) / SILU_RMS


def mp_sum(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """Blend two independent unit-variance tensors of one shape to unit variance.

    Args:
        a: first tensor.
        b: second tensor, the same shape.
        weight: share of `b`, in [0, 1]; a float or a tensor of one entry.
    """
    if isinstance(weight, Tensor):
        scale = ((1 - weight) ** 2 + weight**2).rsqrt()
        return a * ((1 - weight) * scale).to(a.dtype) + b * (weight * scale).to(a.dtype)
    scale_float = 1 / math.hypot(1 - weight, weight)
    return a * ((1 - weight) * scale_float) + b * (weight * scale_float)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """Concatenate along channels so that both contribute equally: (B, Ca + Cb, H, W)."""
    num_a, num_b = a.shape[1], b.shape[1]
    scale = math.sqrt((num_a + num_b) / 2)
    return torch.cat([a * (scale / math.sqrt(num_a)), b * (scale / math.sqrt(num_b))], dim=1)


def _is_hollow() -> bool:
    """Tell whether what is now made has a shape but no values.

    To draw such values would make torch import its compiler: seconds, and 150 MiB.
    """
    return torch.get_default_device().type == "meta"


class FourierFeatures(nn.Module):
    """Random cosine features of a scalar: (B,) to (B, num_channels), unit variance."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        for name, draw in (("freqs", torch.randn), ("phases", torch.rand)):
            values = torch.empty(num_channels, dtype=torch.float32)
            if not _is_hollow():
                values = 2 * math.pi * draw(num_channels, dtype=torch.float32)
            self.register_buffer(name, values)

    def forward(self, x: Tensor) -> Tensor:
        """Return sqrt(2) cos(freqs * x + phases), in float32."""
        return math.sqrt(2) * torch.cos(torch.outer(x.float(), self.freqs) + self.phases)


class MPConv(nn.Module):
    """Convolution (odd kernel, zero padding) or, with kernel 0, a linear layer, without bias.

    The layer's matrix is `weight / sqrt(fan_in)`. Every filter of `weight` is meant to have unit
    root mean square: `normalize_weights_` brings it there after loading foreign weights and after
    each optimiser step, so a forward pass need not.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        shape = (
            (out_channels, in_channels, kernel, kernel) if kernel else (out_channels, in_channels)
        )
        layout = torch.channels_last if kernel else torch.contiguous_format
        weight = torch.empty(shape, memory_format=layout, dtype=torch.float32)
        if not _is_hollow():
            weight.copy_(torch.randn(shape, dtype=torch.float32))
        self.weight = nn.Parameter(weight)
        self.scale = 1 / math.sqrt(weight[0].numel())

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, Cin, H, W) to (B, Cout, H, W), or (B, Cin) to (B, Cout), in the dtype of x."""
        weight: Tensor = self.weight
        if self.scale != 1:
            weight = weight * self.scale
        weight = weight.to(x.dtype)
        if weight.ndim == 2:
            return nn.functional.linear(x, weight)
        return nn.functional.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @property
    def is_folded(self) -> bool:
        """Whether `fold_` has taken the scale into the weight."""
        return self.scale != 1 / math.sqrt(self.weight[0].numel())

    @torch.no_grad()
    def fold_(self, dtype: torch.dtype) -> None:
        """Take the scale into the weight and store it as `dtype`, in place."""
        if self.scale == 1 and self.weight.dtype == dtype:
            return
        self.weight = nn.Parameter((self.weight * self.scale).to(dtype), requires_grad=False)
        self.scale = 1.0


def _mp_convs(module: nn.Module) -> list[MPConv]:
    return [layer for layer in module.modules() if isinstance(layer, MPConv)]


@torch.no_grad()
def normalize_weights_(module: nn.Module) -> None:
    """Bring every filter of every MPConv in `module` to unit root mean square, in place."""
    for layer in _mp_convs(module):
        weight = local_part(layer.weight.data)
        filters = tuple(range(1, weight.ndim))  # kept in place: flattened they would be copied
        norm: Tensor = torch.linalg.vector_norm(weight, dim=filters, keepdim=True)
        weight /= EPS + norm / math.sqrt(math.prod(weight.shape[1:]))


@torch.no_grad()
def project_gradients_(module: nn.Module) -> None:
    """Remove from every MPConv's gradient the part along its filters, in place.

    This is the gradient that normalising the weight inside the forward pass would give, at the
    cost of once a step instead of once a pass.
    """
    for layer in _mp_convs(module):
        if layer.weight.grad is None:
            continue
        weight, grad = local_part(layer.weight), local_part(layer.weight.grad)
        filters = tuple(range(1, weight.ndim))
        along = (weight * grad).sum(filters, keepdim=True)
        grad.addcmul_(weight, along / weight.square().sum(filters, keepdim=True), value=-1)


def fold_weights_(module: nn.Module, dtype: torch.dtype) -> None:
    """Fold every MPConv's scale into its weight and store the weight as `dtype`, in place.

    The module then computes the same function faster and can no longer be trained.
    """
    for layer in _mp_convs(module):
        layer.fold_(dtype)
