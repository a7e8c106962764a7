"""The blocks of EDM2's magnitude-preserving U-Net.

Source: Karras et al., arXiv 2312.02696, figure 21 (configuration G) and table 6.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import check_count
from ncvsd_inverse.networks.edm2_layers import (
    FourierFeatures,
    MPConv,
    mp_cat,
    mp_silu,
    mp_sum,
    pixel_norm,
)

__all__ = [
    "Block",
    "Embedding",
    "UNetShape",
    "decode",
    "decoder_blocks",
    "encode",
    "encoder_blocks",
    "skip_channels",
    "with_ones",
]

RESIDUAL_WEIGHT = 0.3
LABEL_WEIGHT = 0.5
CLIP = 256.0

MAX_LEVELS = 16
MAX_BLOCKS = 100
MAX_CHANNELS = 1 << 14
MAX_SIDE = 1 << 16
MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class UNetShape:
    """Widths and depths of a U-Net.

    Attributes:
        resolution: nominal side of the images in pixels; fixes the names of the blocks.
        image_channels: channels of the images.
        channels: channels of each level, finest first; each level halves the side.
        blocks: residual blocks at each encoder level (the decoder has one more).
        attention: sides (of the nominal resolution) at which blocks attend over all pixels; kept
            finest first and without sides that no level has.
        head_channels: channels of an attention head.
        patch: side of the pixel blocks folded into channels before the first level.
        num_classes: number of class labels, 0 for none.
        bottleneck_attention: whether the decoder's first block attends, as it does in all networks
            of EDM2; None: where `attention` was given any side.

    Raises:
        TypeError: if a field is of another type.
        ValueError: if a number is out of range, or levels and sides or heads and channels do not
            divide.
    """

    resolution: int
    image_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 384, 512)
    blocks: int = 3
    attention: tuple[int, ...] = (16, 8)
    head_channels: int = 64
    patch: int = 1
    num_classes: int = 0
    bottleneck_attention: bool | None = None

    def __post_init__(self) -> None:
        for name in ("channels", "attention"):
            if not isinstance(getattr(self, name), tuple):
                raise TypeError(f"{name} must be a list of integers, got {getattr(self, name)!r}")
        if not 1 <= len(self.channels) <= MAX_LEVELS:
            raise ValueError(
                f"channels must be of 1 to {MAX_LEVELS} levels, got {len(self.channels)}"
            )
        for index, count in enumerate(self.channels):
            check_count(f"channels[{index}]", count, most=MAX_CHANNELS)
        if len(self.attention) > MAX_LEVELS:
            raise ValueError(
                f"attention must be at most {MAX_LEVELS} sides, got {len(self.attention)}"
            )
        for index, side in enumerate(self.attention):
            check_count(f"attention[{index}]", side)
        for name, most in (
            ("resolution", MAX_SIDE),
            ("image_channels", MAX_CHANNELS),
            ("blocks", MAX_BLOCKS),
            ("head_channels", MAX_CHANNELS),
            ("patch", MAX_SIDE),
        ):
            check_count(name, getattr(self, name), most=most)
        check_count("num_classes", self.num_classes, least=0, most=MAX_CLASSES)
        if self.resolution % self.size_multiple:
            raise ValueError(
                f"resolution must be a multiple of {self.size_multiple}, got {self.resolution}"
            )
        if not isinstance(self.bottleneck_attention, bool | None):
            raise TypeError(
                f"bottleneck_attention must be true or false, got {self.bottleneck_attention!r}"
            )
        # Shapes that build the same network must compare equal.
        if self.bottleneck_attention is None:
            object.__setattr__(self, "bottleneck_attention", bool(self.attention))
        sides = [self.side >> level for level in range(len(self.channels))]
        met = tuple(side for side in sides if side in self.attention)
        object.__setattr__(self, "attention", met)
        attending = [
            count for side, count in zip(sides, self.channels, strict=True) if side in met
        ] + [self.channels[-1]] * bool(self.bottleneck_attention)
        for count in attending:
            heads = count // self.head_channels
            if heads and count % heads:
                raise ValueError(
                    f"head_channels must make heads that divide {count} channels, "
                    f"got {self.head_channels}"
                )

    @property
    def size_multiple(self) -> int:
        """What both sides of an image must be a multiple of."""
        return self.patch << (len(self.channels) - 1)

    @property
    def embedding_channels(self) -> int:
        """Channels of the noise-level embedding."""
        return max(self.channels)

    @property
    def side(self) -> int:
        """Nominal side of the finest level."""
        return self.resolution // self.patch


class Block(nn.Module):
    """One residual block, optionally resampling first and attending last.

    Args:
        in_channels: channels of the input (decoder: with the skip concatenated).
        out_channels: channels of the output.
        embedding_channels: channels of the noise-level embedding.
        decodes: True for a decoder block (no pixel norm, skip convolution after the residual).
        resample: "keep", "down" (2x2 mean) or "up" (nearest).
        head_channels: channels of an attention head; 0 for no attention.

    Attributes:
        dropout: probability that a value is dropped between the convolutions, in [0, 1); 0 unless
            set, and without effect outside training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        *,
        decodes: bool,
        resample: str = "keep",
        head_channels: int = 0,
    ) -> None:
        super().__init__()
        self.decodes = decodes
        self.resample = resample
        self.heads = out_channels // head_channels if head_channels else 0
        self.dropout = 0.0
        self.emb_gain = nn.Parameter(torch.zeros([], dtype=torch.float32))
        self.conv_res0 = MPConv(out_channels if not decodes else in_channels, out_channels, 3)
        self.emb_linear = MPConv(embedding_channels, out_channels, 0)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = (
            MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        )
        if self.heads:
            self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, Cin, H, W) and the embedding (B, E) to (B, Cout, H', W')."""
        if self.resample == "down":
            x = nn.functional.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        if not self.decodes:
            x = pixel_norm(self.conv_skip(x) if self.conv_skip else x)
        gain = self.emb_linear(embedding) * self.emb_gain.to(embedding.dtype) + 1
        y = self.conv_res0(mp_silu(x))
        y = mp_silu(y * gain[:, :, None, None].to(y.dtype))
        if self.training and self.dropout:
            y = nn.functional.dropout(y, self.dropout)
        y = self.conv_res1(y)
        if self.decodes and self.conv_skip:
            x = self.conv_skip(x)
        x = mp_sum(x, y, RESIDUAL_WEIGHT)
        if self.heads:
            x = mp_sum(x, self.attn_proj(self._attend(x)), RESIDUAL_WEIGHT)
        return x.clamp(-CLIP, CLIP)

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.attn_qkv(x).reshape(batch, self.heads, channels // self.heads, 3, height * width)
        query, key, value = (part.transpose(2, 3) for part in pixel_norm(qkv, 2).unbind(3))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(2, 3).reshape(batch, channels, height, width)


class Embedding(nn.Module):
    """Base of modules that embed a noise level and, with classes, a label."""

    def __init__(self, shape: UNetShape) -> None:
        super().__init__()
        width = shape.embedding_channels
        self.emb_fourier = FourierFeatures(shape.channels[0])
        self.emb_noise = MPConv(shape.channels[0], width, 0)
        self.emb_label = MPConv(shape.num_classes, width, 0) if shape.num_classes else None

    def embed(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Map the conditioning log(sigma)/4, (B,), and one-hot labels (B, K) to (B, E), float32.

        Without labels a network with classes sees zeros, its unconditional input.
        """
        embedding: Tensor = self.emb_noise(self.emb_fourier(noise))
        if self.emb_label is not None:
            num_classes = self.emb_label.weight.shape[1]
            if labels is None:
                labels = noise.new_zeros(noise.shape[0], num_classes)
            label = self.emb_label(labels.float() * math.sqrt(num_classes))
            embedding = mp_sum(embedding, label, LABEL_WEIGHT)
        return mp_silu(embedding)


def encoder_blocks(shape: UNetShape, in_channels: int) -> nn.ModuleDict:
    """Return the encoder's layers by name, in order; `in_channels` enter the first convolution."""
    width = shape.embedding_channels
    blocks = nn.ModuleDict()
    previous = in_channels
    for level, channels in enumerate(shape.channels):
        side = shape.side >> level
        head = shape.head_channels if side in shape.attention else 0
        if level == 0:
            blocks[f"{side}x{side}_conv"] = MPConv(previous, channels, 3)
            previous = channels
        else:
            blocks[f"{side}x{side}_down"] = Block(
                previous, previous, width, decodes=False, resample="down"
            )
        for index in range(shape.blocks):
            blocks[f"{side}x{side}_block{index}"] = Block(
                previous, channels, width, decodes=False, head_channels=head
            )
            previous = channels
    return blocks


def skip_channels(shape: UNetShape) -> list[int]:
    """Return the channels of each skip connection, in the order the encoder makes them."""
    skips = []
    for level, channels in enumerate(shape.channels):
        skips.append(channels if level == 0 else shape.channels[level - 1])
        skips += [channels] * shape.blocks
    return skips


def decoder_blocks(shape: UNetShape) -> nn.ModuleDict:
    """Return the decoder's layers by name, in order."""
    width = shape.embedding_channels
    blocks = nn.ModuleDict()
    skips = skip_channels(shape)
    previous = shape.channels[-1]
    for level, channels in reversed(list(enumerate(shape.channels))):
        side = shape.side >> level
        head = shape.head_channels if side in shape.attention else 0
        if level == len(shape.channels) - 1:
            blocks[f"{side}x{side}_in0"] = Block(
                previous,
                previous,
                width,
                decodes=True,
                head_channels=shape.head_channels if shape.bottleneck_attention else 0,
            )
            blocks[f"{side}x{side}_in1"] = Block(previous, previous, width, decodes=True)
        else:
            blocks[f"{side}x{side}_up"] = Block(
                previous, previous, width, decodes=True, resample="up"
            )
        for index in range(shape.blocks + 1):
            blocks[f"{side}x{side}_block{index}"] = Block(
                previous + skips.pop(), channels, width, decodes=True, head_channels=head
            )
            previous = channels
    return blocks


def encode(blocks: nn.ModuleDict, x: Tensor, embedding: Tensor) -> list[Tensor]:
    """Return the output of every encoder layer, finest first; the last is the bottleneck."""
    outputs = []
    for name, block in blocks.items():
        x = block(x) if name.endswith("conv") else block(x, embedding)
        outputs.append(x)
    return outputs


def decode(blocks: nn.ModuleDict, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
    """Run the decoder on the bottleneck `x`, consuming `skips` from the last."""
    remaining = list(skips)
    for name, block in blocks.items():
        if "block" in name:
            x = mp_cat(x, remaining.pop())
        x = block(x, embedding)
    return x


def with_ones(x: Tensor) -> Tensor:
    """Append a channel of ones, which stands for biases: (B, C + 1, H, W)."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
