"""The U-Net of guided diffusion (ADM), of deepinv's blocks.

Source: Dhariwal & Nichol, arXiv 2105.05233.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

__all__ = [
    "ADMUNet",
    "AttentionOrder",
]

AttentionOrder: TypeAlias = Literal["legacy", "new"]


class ADMUNet(nn.Module):
    """ADM's U-Net; its parameters have the names of the published files.

    Args:
        resolution: nominal side of the images in pixels.
        in_channels: channels of the images.
        out_channels: channels of the output; twice as many with a learned variance.
        model_channels: channels of the embedding of times before its first layer.
        channels: channels of each level, finest first; each level halves the side.
        blocks: residual blocks at each encoder level (the decoder has one more).
        attention: sides (of the nominal resolution) at which blocks attend over all pixels; the
            block in the middle always does.
        heads: what attention splits its channels by: ("head_channels", channels of a head) or
            ("num_heads", heads).
        attention_order: whether queries, keys and values are parts of each head ("legacy") or
            heads are parts of each of these ("new").
        block_resampling: whether residual blocks change the side, else convolutions do.
        scale_shift: whether times scale features beside shifting them.
        num_classes: number of class labels, 0 for none.
    """

    def __init__(
        self,
        *,
        resolution: int,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channels: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        heads: tuple[Literal["head_channels", "num_heads"], int],
        attention_order: AttentionOrder,
        block_resampling: bool,
        scale_shift: bool,
        num_classes: int,
    ) -> None:
        from deepinv.models import diffunet

        super().__init__()
        width = 4 * model_channels
        self.model_channels = model_channels

        def block(entering: int, leaving: int, **resampling: bool) -> nn.Module:
            return diffunet.ResBlock(  # type: ignore[no-any-return]
                entering,
                width,
                dropout=0.0,
                out_channels=leaving,
                use_scale_shift_norm=scale_shift,
                **resampling,
            )

        def attend(inner: int) -> nn.Module:
            by, count = heads
            if by == "head_channels" and inner % count:
                raise ValueError(f"head_channels must divide {inner} channels, got {count}")
            return diffunet.AttentionBlock(  # type: ignore[no-any-return]
                inner,
                num_heads=inner // count if by == "head_channels" else count,
                use_new_attention_order=attention_order == "new",
            )

        def stage(*layers: nn.Module) -> nn.Module:
            return diffunet.TimestepEmbedSequential(*layers)  # type: ignore[no-any-return]

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.label_emb = nn.Embedding(num_classes, width) if num_classes else None
        inner, last = channels[0], len(channels) - 1
        self.input_blocks = nn.ModuleList([stage(nn.Conv2d(in_channels, inner, 3, padding=1))])
        skips = [inner]
        for level, outer in enumerate(channels):
            attends = resolution >> level in attention
            for _ in range(blocks):
                layers = [block(inner, outer)]
                if attends:
                    layers.append(attend(outer))
                self.input_blocks.append(stage(*layers))
                inner = outer
                skips.append(inner)
            if level < last:
                self.input_blocks.append(
                    stage(
                        block(inner, inner, down=True)
                        if block_resampling
                        else diffunet.Downsample(inner, True)
                    )
                )
                skips.append(inner)
        self.middle_block = stage(block(inner, inner), attend(inner), block(inner, inner))
        self.output_blocks = nn.ModuleList()
        for level, outer in reversed(list(enumerate(channels))):
            attends = resolution >> level in attention
            for index in range(blocks + 1):
                layers = [block(inner + skips.pop(), outer)]
                if attends:
                    layers.append(attend(outer))
                inner = outer
                if level and index == blocks:
                    layers.append(
                        block(inner, inner, up=True)
                        if block_resampling
                        else diffunet.Upsample(inner, True)
                    )
                self.output_blocks.append(stage(*layers))
        self.out = nn.Sequential(
            diffunet.normalization(inner), nn.SiLU(), nn.Conv2d(inner, out_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map images (B, C, H, W) at times (B,), with indices of classes (B,), to the output."""
        from deepinv.models.diffunet import timestep_embedding

        embedding = self.time_embed(timestep_embedding(time, self.model_channels))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(labels)
        skips = []
        for block in self.input_blocks:
            x = block(x, embedding)
            skips.append(x)
        x = self.middle_block(x, embedding)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        out: Tensor = self.out(x)
        return out
