"""Priors whose network sees a large image tile by tile."""

import copy

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import check_count
from ncvsd_inverse.priors.diffusion import DiffusionPrior
from ncvsd_inverse.priors.ncvsd import NCVSDPrior
from ncvsd_inverse.priors.registry import PriorHandle
from ncvsd_inverse.protocols import NetworkTraits

__all__ = ["TILE", "TiledNetwork", "tiled"]

TILE = 512
"""Side of a tile, pixels; `experiments/large/tiles.py` measures what smaller ones cost."""


def tiled(
    prior: NCVSDPrior | DiffusionPrior | PriorHandle, tile: int = TILE, overlap: int | None = None
) -> NCVSDPrior | DiffusionPrior:
    """Return a prior that draws large images with the memory of a tile.

    Only passes through the network are cut into tiles; noise is drawn for the whole image. Tiles
    that overlap see the same noise, so they differ only by what lies beyond their edges. Any
    operator can be used. A pass over all tiles counts as one network call.

    Args:
        prior: an `NCVSDPrior` or `DiffusionPrior` that takes any size; its network is shared. For
            a prior of several steps call `tiled(prior).refined(levels)`.
        tile: side of a tile, pixels, a multiple of what the network's sides must be. Images that
            are no larger are seen whole.
        overlap: pixels that neighbours share at least, such a multiple too, at most tile / 2;
            None: tile / 4.

    Raises:
        TypeError: if `prior` is of another kind.
        ValueError: if it takes one size only, or a length is out of range.
    """
    if isinstance(prior, PriorHandle):
        prior = prior.load()
    if not isinstance(prior, NCVSDPrior | DiffusionPrior):
        raise TypeError(
            f"prior must be an NCVSDPrior or a DiffusionPrior, got {type(prior).__name__}"
        )
    if prior.image_shape is not None:
        raise ValueError(f"prior must take images of any size, got one of {prior.image_shape}")
    twin = copy.copy(prior)
    tile = check_count("tile", tile)
    twin.network = TiledNetwork(prior.network, tile, tile // 4 if overlap is None else overlap)
    return twin


class TiledNetwork(nn.Module):
    """A network that is called on overlapping tiles, which are averaged where they overlap.

    A tile begins a whole number of the network's coarsest pixels after the one before. Its weight
    is 0 in the outer quarter of an overlap, where the edge is felt, and rises linearly over the
    middle half; at the border of the image it is 1.

    Args:
        network: (x, ...) -> x0, the shape of x (B, C, H, W); of its other arguments those with
            the height and width of x are cut alike.
        tile: side of a tile, pixels.
        overlap: pixels that neighbours share at least.

    Raises:
        ValueError: if a length is no multiple of the network's, or overlap is not in [1, tile / 2].
    """

    def __init__(self, network: nn.Module, tile: int, overlap: int) -> None:
        super().__init__()
        traits = NetworkTraits.of(network)
        self.image_channels = traits.image_channels
        self.size_multiple = traits.size_multiple
        self.num_classes = traits.num_classes
        self.compute_dtype = traits.compute_dtype
        for name, length in (("tile", tile), ("overlap", overlap)):
            if check_count(name, length) % self.size_multiple:
                raise ValueError(f"{name} must be a multiple of {self.size_multiple}, got {length}")
        if overlap > tile // 2:
            raise ValueError(f"overlap must be at most tile / 2 = {tile // 2}, got {overlap}")
        self.network = network
        self.tile, self.overlap = int(tile), int(overlap)

    def forward(self, x: Tensor, *arguments: Tensor | None) -> Tensor:
        """Return x0, shape (B, C, H, W)."""
        size = x.shape[2:]
        rows, columns = (self._places(side) for side in size)
        if len(rows) == len(columns) == 1:
            whole: Tensor = self.network(x, *arguments)
            return whole
        total = torch.zeros_like(x)
        for row, row_weight in rows:
            for column, column_weight in columns:
                here = (..., row, column)
                cut = (
                    argument[here]
                    if argument is not None and argument.shape[2:] == size
                    else argument
                    for argument in arguments
                )
                weight = torch.outer(row_weight, column_weight).to(x)
                total[here] += weight * self.network(x[here], *cut)
        return total

    def _places(self, side: int) -> list[tuple[slice, Tensor]]:
        """Return where the tiles along a side lie, and their weights, which add to 1."""
        tile, overlap = min(self.tile, side), self.overlap
        starts = [*range(0, side - tile, self.tile - overlap), side - tile]
        weights = torch.zeros(len(starts), side, dtype=torch.float64)
        from_edge = torch.arange(tile, dtype=torch.float64) + 0.5
        rising = (2 * from_edge / overlap - 0.5).clamp(0, 1)
        for row, start in zip(weights, starts, strict=True):
            before = rising if start > 0 else torch.ones_like(rising)
            after = rising.flip(0) if start < side - tile else torch.ones_like(rising)
            row[start : start + tile] = torch.minimum(before, after)
        weights /= weights.sum(0)
        spans = [slice(start, start + tile) for start in starts]
        return [(span, row[span]) for span, row in zip(spans, weights, strict=True)]
