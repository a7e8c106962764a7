"""Preconditioned networks: teacher, conditional denoiser, discriminator.

Sources: Karras et al., arXiv 2206.00364, table 1 (preconditioning); arXiv 2312.02696 (network);
Peng et al., arXiv 2506.09416 (conditional network and discriminator).
"""

from typing import Self

import torch
from torch import Tensor, nn

from ncvsd_inverse.networks.edm2_layers import (
    FourierFeatures,
    MPConv,
    fold_weights_,
    mp_silu,
    mp_sum,
    normalize_weights_,
)
from ncvsd_inverse.networks.unet import (
    Block,
    Embedding,
    UNetShape,
    decode,
    decoder_blocks,
    encode,
    encoder_blocks,
    skip_channels,
    with_ones,
)

__all__ = [
    "ConcatDenoiser",
    "ConcatDiscriminator",
    "ConcatUNet",
    "Conditional",
    "ControlledDenoiser",
    "ControlledDiscriminator",
    "Denoiser",
    "Network",
    "Preconditioned",
    "UNet",
    "conditioning",
    "constrain_weights_",
]

LOG_VARIANCE_CHANNELS = 128


def conditioning(sigma: Tensor) -> Tensor:
    """Return what the network is given of a noise level, log(sigma)/4, (B,)."""
    return sigma.float().log() / 4


def _column(values: Tensor) -> Tensor:
    return values.float().reshape(-1, 1, 1, 1)


class Network(nn.Module):
    """Base of all networks: shape, compute dtype and input scaling.

    Args:
        shape: widths and depths.
        sigma_data: std of the images, image units.
        any_size: True if the network takes images of any size that its levels divide.
    """

    def __init__(
        self, shape: UNetShape, *, sigma_data: float = 0.5, any_size: bool = False
    ) -> None:
        super().__init__()
        self.shape = shape
        self.sigma_data = sigma_data
        self.image_channels = shape.image_channels
        self.any_size = any_size
        self.resolution = None if any_size else shape.resolution
        self.size_multiple = shape.size_multiple
        self.num_classes = shape.num_classes
        self.compute_dtype = torch.float32

    def to_inference(self, dtype: torch.dtype) -> Self:
        """Store weights ready for passes in `dtype`, in place: faster, no longer trainable."""
        fold_weights_(self, dtype)
        self.compute_dtype = dtype
        return self.eval().requires_grad_(False)

    def scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return `x` (B, C, H, W) at unit variance, patches folded into channels."""
        scale = (_column(sigma) ** 2 + self.sigma_data**2).rsqrt()
        x = (x.float() * scale).to(self.compute_dtype)
        if self.shape.patch > 1:
            x = nn.functional.pixel_unshuffle(x, self.shape.patch)
        return x.contiguous(memory_format=torch.channels_last)

    @property
    def patch_channels(self) -> int:
        """Channels of an image after folding patches."""
        return self.image_channels * self.shape.patch**2


class Preconditioned(Network):
    """Base of denoisers: EDM's output preconditioning and the learned log variance."""

    def __init__(
        self, shape: UNetShape, *, sigma_data: float = 0.5, any_size: bool = False
    ) -> None:
        super().__init__(shape, sigma_data=sigma_data, any_size=any_size)
        self.logvar_fourier = FourierFeatures(LOG_VARIANCE_CHANNELS)
        self.logvar_linear = MPConv(LOG_VARIANCE_CHANNELS, 1, 0)

    def log_variance(self, sigma: Tensor) -> Tensor:
        """Return the learned log variance of the loss at levels (B,), shape (B, 1, 1, 1)."""
        out: Tensor = self.logvar_linear(self.logvar_fourier(conditioning(sigma)))
        return out.reshape(-1, 1, 1, 1)

    def unscaled(self, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        """Return c_skip x + c_out output, shape and dtype of `x` (B, C, H, W)."""
        if self.shape.patch > 1:
            output = nn.functional.pixel_shuffle(output, self.shape.patch)
        sigma = _column(sigma)
        total = sigma**2 + self.sigma_data**2
        skip, out = self.sigma_data**2 / total, sigma * self.sigma_data * total.rsqrt()
        return (skip * x.float() + out * output.float()).to(x.dtype)


class UNet(Embedding):
    """The unconditional EDM2 U-Net, without preconditioning."""

    def __init__(self, shape: UNetShape, in_channels: int, out_channels: int) -> None:
        super().__init__(shape)
        self.enc = encoder_blocks(shape, in_channels + 1)
        self.dec = decoder_blocks(shape)
        self.out_conv = MPConv(shape.channels[0], out_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros([], dtype=torch.float32))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map scaled input (B, Cin, H, W) and embedding (B, E) to (B, Cout, H, W)."""
        outputs = encode(self.enc, with_ones(x), embedding)
        x = decode(self.dec, outputs[-1], outputs, embedding)
        out: Tensor = self.out_conv(x) * self.out_gain.to(x.dtype)
        return out


class Denoiser(Preconditioned):
    """A teacher: the denoiser D(x, sigma) = E[x0 | x] over EDM2's U-Net.

    Args:
        shape: widths and depths.
        sigma_data: std of the images, image units.
        any_size: True if the network takes images of any size that its levels divide.
        dropout: probability that a value within a block is dropped in training, in [0, 1).
    """

    def __init__(
        self,
        shape: UNetShape,
        *,
        sigma_data: float = 0.5,
        any_size: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(shape, sigma_data=sigma_data, any_size=any_size)
        self.unet = UNet(shape, self.patch_channels, self.patch_channels)
        for block in self.unet.modules():
            if isinstance(block, Block):
                block.dropout = dropout

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoise `x` (B, C, H, W) of noise std `sigma` (B,); the shape and dtype of x."""
        embedding = self.unet.embed(conditioning(sigma), labels).to(self.compute_dtype)
        return self.unscaled(x, sigma, self.unet(self.scaled(x, sigma), embedding))


class _EncoderBranch(Embedding):
    """An encoder with an embedding of its own."""

    def __init__(self, shape: UNetShape, in_channels: int) -> None:
        super().__init__(shape)
        self.enc = encoder_blocks(shape, in_channels + 1)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> list[Tensor]:
        """Return the output of every layer for scaled input (B, C, H, W) and noise (B,)."""
        return encode(self.enc, with_ones(x), self.embed(noise, labels).to(x.dtype))


class _DecoderBranch(Embedding):
    """A decoder with an embedding of its own that blends in a second encoder's outputs."""

    def __init__(self, shape: UNetShape, out_channels: int) -> None:
        super().__init__(shape)
        self.dec = decoder_blocks(shape)
        self.out_conv = MPConv(shape.channels[0], out_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros([], dtype=torch.float32))
        self.additional_x_weight = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        self.additional_skips_weight = nn.Parameter(
            torch.zeros(len(skip_channels(shape)), dtype=torch.float32)
        )

    def forward(
        self, outputs: list[Tensor], control: list[Tensor], noise: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Decode the main encoder's outputs blended with the control encoder's."""
        embedding = self.embed(noise, labels).to(outputs[-1].dtype)
        x = mp_sum(outputs[-1], control[-1], self.additional_x_weight)
        blends = zip(outputs, control, self.additional_skips_weight, strict=True)
        skips = [mp_sum(main, extra, weight) for main, extra, weight in blends]
        x = decode(self.dec, x, skips, embedding)
        out: Tensor = self.out_conv(x) * self.out_gain.to(x.dtype)
        return out


def constrain_weights_(module: nn.Module) -> None:
    """Bring the weights of `module` back to where they belong after an optimiser step, in place.

    Filters to unit magnitude; blends of the control encoder into [0, 1]. The forward pass does
    not clip, as a clipped blend has no gradient and could not come back.
    """
    normalize_weights_(module)
    for branch in module.modules():
        if isinstance(branch, _DecoderBranch):
            branch.additional_x_weight.data.clamp_(0, 1)
            branch.additional_skips_weight.data.clamp_(0, 1)


class Conditional(Network):
    """Base of networks conditioned on a second noisy image, started from a teacher's weights."""

    @classmethod
    def from_teacher(cls, teacher: Denoiser) -> Self:
        """Return a network that starts from the weights of `teacher`.

        A denoiser then computes what the teacher does and ignores its condition; a discriminator
        has the teacher's encoder.
        """
        network = cls(teacher.shape, sigma_data=teacher.sigma_data, any_size=teacher.any_size)
        copy = _copy_widened if hasattr(network, "unet") else _copy_branches
        copy(network, teacher.state_dict())
        return network


class ControlledDenoiser(Preconditioned, Conditional):
    """The published conditional network: a second encoder reads the condition.

    Its bottleneck and skips are blended into the main path by learned weights that start at 0.
    """

    def __init__(
        self, shape: UNetShape, *, sigma_data: float = 0.5, any_size: bool = False
    ) -> None:
        super().__init__(shape, sigma_data=sigma_data, any_size=any_size)
        self.enc = _EncoderBranch(shape, self.patch_channels)
        self.ctrl = _EncoderBranch(shape, self.patch_channels)
        self.dec = _DecoderBranch(shape, self.patch_channels)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        condition: Tensor,
        condition_sigma: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Denoise `x` (B, C, H, W) at `sigma` (B,) given a noisy image at `condition_sigma`."""
        noise = conditioning(sigma)
        main = self.enc(self.scaled(x, sigma), noise, labels)
        control = self.ctrl(
            self.scaled(condition, condition_sigma), conditioning(condition_sigma), labels
        )
        return self.unscaled(x, sigma, self.dec(main, control, noise, labels))


class ConcatUNet(UNet):
    """A U-Net that reads the condition as extra channels and a second noise embedding."""

    def __init__(self, shape: UNetShape, in_channels: int, out_channels: int) -> None:
        super().__init__(shape, 2 * in_channels, out_channels)
        self.emb_condition = MPConv(shape.channels[0], shape.embedding_channels, 0)
        self.condition_weight = nn.Parameter(torch.zeros([], dtype=torch.float32))

    def embed_pair(self, noise: Tensor, condition_noise: Tensor, labels: Tensor | None) -> Tensor:
        """Embed both noise levels, each (B,), into (B, E), float32."""
        extra = mp_silu(self.emb_condition(self.emb_fourier(condition_noise)))
        return mp_sum(self.embed(noise, labels), extra, self.condition_weight)


class ConcatDenoiser(Preconditioned, Conditional):
    """A light conditional network: one U-Net, the condition concatenated to its input.

    About half the cost of ControlledDenoiser; the one that suits a CPU.

    Args:
        shape: widths and depths.
        sigma_data: std of the images, image units.
        any_size: True if the network takes images of any size that its levels divide.
    """

    def __init__(
        self, shape: UNetShape, *, sigma_data: float = 0.5, any_size: bool = False
    ) -> None:
        super().__init__(shape, sigma_data=sigma_data, any_size=any_size)
        channels = self.patch_channels
        self.unet = ConcatUNet(shape, channels, channels)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        condition: Tensor,
        condition_sigma: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Denoise `x` (B, C, H, W) at `sigma` (B,) given a noisy image at `condition_sigma`."""
        embedding = self.unet.embed_pair(
            conditioning(sigma), conditioning(condition_sigma), labels
        ).to(self.compute_dtype)
        pair = [self.scaled(x, sigma), self.scaled(condition, condition_sigma)]
        return self.unscaled(x, sigma, self.unet(torch.cat(pair, dim=1), embedding))


class ControlledDiscriminator(Conditional):
    """The published discriminator: two encoders, concatenated, pooled, one linear layer."""

    def __init__(
        self, shape: UNetShape, *, sigma_data: float = 0.5, any_size: bool = False
    ) -> None:
        super().__init__(shape, sigma_data=sigma_data, any_size=any_size)
        self.enc = _EncoderBranch(shape, self.patch_channels)
        self.ctrl = _EncoderBranch(shape, self.patch_channels)
        self.out_conv = MPConv(2 * shape.channels[-1], 1, 0)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        condition: Tensor,
        condition_sigma: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return the logits (B,) that `x` (B, C, H, W) at `sigma` (B,) stems from real images."""
        main = self.enc(self.scaled(x, sigma), conditioning(sigma), labels)[-1]
        control = self.ctrl(
            self.scaled(condition, condition_sigma), conditioning(condition_sigma), labels
        )[-1]
        pooled = torch.cat([control, main], dim=1).float().mean((2, 3))
        logits: Tensor = self.out_conv(pooled)
        return logits.squeeze(1)


class ConcatDiscriminator(Conditional):
    """The light discriminator: one encoder, the condition concatenated to its input."""

    def __init__(
        self, shape: UNetShape, *, sigma_data: float = 0.5, any_size: bool = False
    ) -> None:
        super().__init__(shape, sigma_data=sigma_data, any_size=any_size)
        self.unet = ConcatUNet(shape, self.patch_channels, self.patch_channels)
        del self.unet.dec, self.unet.out_conv, self.unet.out_gain
        self.out_conv = MPConv(shape.channels[-1], 1, 0)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        condition: Tensor,
        condition_sigma: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return the logits (B,) that `x` (B, C, H, W) at `sigma` (B,) stems from real images."""
        embedding = self.unet.embed_pair(
            conditioning(sigma), conditioning(condition_sigma), labels
        ).to(self.compute_dtype)
        pair = [self.scaled(x, sigma), self.scaled(condition, condition_sigma)]
        last = encode(self.unet.enc, with_ones(torch.cat(pair, dim=1)), embedding)[-1]
        logits: Tensor = self.out_conv(last.float().mean((2, 3)))
        return logits.squeeze(1)


def _copy_branches(network: Network, source: dict[str, Tensor]) -> None:
    """Start every branch of a two-encoder network from a teacher's U-Net."""
    state = network.state_dict()
    for name in state:
        branch, _, rest = name.partition(".")
        twin = f"unet.{rest}" if branch in ("enc", "ctrl", "dec") else name
        if twin in source and source[twin].shape == state[name].shape:
            state[name] = source[twin]
    network.load_state_dict(state)


def _copy_widened(network: Network, source: dict[str, Tensor]) -> None:
    """Start a concatenating network from a teacher's weights; the condition's are zero."""
    state = network.state_dict()
    for name in state.keys() & source.keys():
        if source[name].shape == state[name].shape:
            state[name] = source[name]
    first = next(name for name in state if name.startswith("unet.enc.") and "_conv." in name)
    wide, narrow = torch.zeros_like(state[first]), source[first]
    wide[:, : narrow.shape[1] - 1] = narrow[:, :-1]
    wide[:, -1] = narrow[:, -1]
    state[first] = wide * (wide.shape[1] / narrow.shape[1]) ** 0.5
    network.load_state_dict(state)
