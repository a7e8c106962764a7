"""What priors that wrap a network share: input checks, devices, classes, noise to start from."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import (
    Size,
    check_count,
    check_image_size,
    check_images,
    check_level,
    check_size,
    check_triple,
)
from ncvsd_inverse.machine import callers_autocast
from ncvsd_inverse.numerics import draw_normal, expand_level, make_generators
from ncvsd_inverse.priors.cache import StatisticsStore
from ncvsd_inverse.priors.card import PriorCard
from ncvsd_inverse.protocols import NetworkTraits, Statistics

__all__ = ["SIGMA_MAX", "SIGMA_MIN", "NetworkPrior", "as_module", "check_output"]

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
"""Noise stds between which networks are trained, image units."""

ROUNDING = 1.01
"""How far above `sigma_max`, as a factor, a level still counts as `sigma_max`."""


class _FunctionModule(nn.Module):
    """A plain function as a module, so that its calls can be counted like a network's."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Tensor:
        """Call the function."""
        return self.function(*arguments)


def as_module(network: nn.Module | Callable[..., Tensor]) -> nn.Module:
    """Return `network` as an nn.Module: itself, or a function wrapped."""
    return network if isinstance(network, nn.Module) else _FunctionModule(network)


def check_output(out: object) -> Tensor:
    """Return what a denoiser returned; TypeError unless it is a tensor."""
    if not isinstance(out, Tensor):
        raise TypeError(
            f"the denoiser must return a tensor, got {type(out).__name__}; for a network of "
            "diffusers there is DiffusionPrior.from_diffusers(unet, scheduler)"
        )
    return out


class NetworkPrior(ABC):
    """Base of the priors whose draws come from passes through a network.

    A network may say what it takes (`protocols.NetworkInfo`); one that says nothing takes anything.

    Args:
        network: the module whose passes count.
        image_shape: the one shape (C, H, W) it takes, or None when any size works.
        sigma_min: smallest trained noise std, > 0, image units.
        sigma_max: largest trained noise std, image units.
        card: what is known of the prior, if it was trained.
        statistics: mean and covariances of its images, which sampling by conditioning needs; see
            `ncvsd_inverse.priors.statistics.measure_statistics`.

    Attributes:
        image_channels: channels of the images; None if the network does not say.
        size_multiple: what both sides of what the network sees are a multiple of; images of other
            sides are mirrored at their edges, and the result is cropped.
        num_classes: number of class labels, 0 for none.
        label: the class of its images; None for any.
        points: settings of point estimates that were found for it; None: the general ones.
        statistics_store: where statistics that are measured later are kept; None: in memory only.
    """

    generation_calls: ClassVar[int]
    """Network calls for each generated image unless told otherwise."""

    def __init__(
        self,
        network: nn.Module,
        *,
        image_shape: Sequence[int] | None,
        sigma_min: float,
        sigma_max: float,
        card: PriorCard | None,
        statistics: Statistics | None,
    ) -> None:
        check_level("sigma_min", sigma_min)
        check_level("sigma_max", sigma_max)
        if sigma_min >= sigma_max:
            raise ValueError(f"sigma_min must be below sigma_max = {sigma_max}, got {sigma_min}")
        self.network = network
        self.image_shape = None if image_shape is None else check_triple("image_shape", image_shape)
        self.sigma_min = float(sigma_min)
        self.sigma_max = float(sigma_max)
        self.card = card
        self.statistics = statistics
        self.statistics_store: StatisticsStore | None = None
        self.label: int | None = None
        self.points = None if card is None else card.points
        traits = NetworkTraits.of(network)
        self.image_channels = traits.image_channels
        self.size_multiple = traits.size_multiple
        self.num_classes = traits.num_classes
        if self.image_shape is not None:
            check_image_size(
                "image_shape",
                self.image_shape,
                channels=self.image_channels,
                multiple=self.size_multiple,
            )

    def __repr__(self) -> str:
        name = (
            type(self).__name__ if self.card is None else f"{type(self).__name__} {self.card.name}"
        )
        images = "any size" if self.image_shape is None else " x ".join(map(str, self.image_shape))
        weights = sum(weight.numel() for weight in self.network.parameters())
        known = "statistics" if self.statistics is not None else "no statistics yet"
        return (
            f"<{name}: images of {images}, noise {self.sigma_min:g} to {self.sigma_max:g}, "
            f"{weights / 1e6:.3g} M weights on {self.device or 'no device'}, {known}>"
        )

    @property
    def device(self) -> torch.device | None:
        """Where the network's weights are; None for a network without weights."""
        weight = next(self.network.parameters(), None)
        return None if weight is None else weight.device

    def to(self, device: torch.device | str) -> Self:
        """Move the network to `device`, in place, and return the prior."""
        self.network.to(device)
        return self

    def compiled(self, mode: str = "default") -> Self:
        """Return this prior with its network compiled by torch; it shares the weights.

        The first call of each shape of images takes as long as a hundred.

        Args:
            mode: see `torch.compile`; "reduce-overhead" records CUDA graphs.
        """
        twin = copy.copy(self)
        compiled: nn.Module = torch.compile(self.network, mode=mode)  # type: ignore[assignment]
        twin.network = compiled
        return twin

    def with_statistics(self, statistics: Statistics | None) -> Self:
        """Return this prior with other `statistics`; it shares the network."""
        twin = copy.copy(self)
        twin.statistics = statistics
        # What is measured for a copy must not replace what the prior's card holds.
        twin.statistics_store = None
        return twin

    @abstractmethod
    def generate(self, num: int, *, batch_size: int = 16) -> Tensor:
        """Draw `num` images from pure noise, `batch_size` at a time, (num, C, H, W), float32."""

    def conditioned_on(self, label: int) -> Self:
        """Return a prior of the images of one class; it shares the network.

        Args:
            label: index of the class, 0 to the number of classes - 1.

        Raises:
            ValueError: if the network has no such class.
        """
        label = check_count("label", label, least=0)
        if label >= self.num_classes:
            raise ValueError(
                f"label must be below the prior's number of classes, {self.num_classes}, "
                f"got {label}"
            )
        bound = copy.copy(self)
        bound.label = label
        # What is measured of one class is not that of the prior.
        bound.statistics_store = None
        return bound

    def _prepare(self, name: str, u: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """Check images and levels; return both in at least float32, levels as (B,)."""
        check_images(name, u)
        check_image_size(
            name, u.shape[1:], channels=self.image_channels, image_shape=self.image_shape
        )
        check_level("sigma", sigma, largest=ROUNDING * self.sigma_max)
        device = self.device
        if device is not None and u.device != device:
            raise ValueError(
                f"{name} must be on the prior's device, {device}, got {u.device}; "
                f"move the prior with prior.to({str(u.device)!r})"
            )
        x = u.to(torch.promote_types(u.dtype, torch.float32))
        return x, expand_level(sigma, x).flatten()

    def _call(self, x: Tensor, *arguments: Tensor | None, **options: bool) -> object:
        """Call the network, under the caller's autocast unless it has a dtype of its own.

        Images, all of the height and width of `x`, are mirrored at the right and the bottom until
        the network can take them, and what it returns is cropped.
        """
        size = x.shape[2:]
        lacking = [-side % self.size_multiple for side in size]
        fitted = [
            _extend(argument, lacking)
            if argument is not None and any(lacking) and argument.shape[2:] == size
            else argument
            for argument in (x, *arguments)
        ]
        if NetworkTraits.of(self.network).compute_dtype is not None:
            out = self.network(*fitted, **options)
        else:
            with callers_autocast():
                out = self.network(*fitted, **options)
        return check_output(out)[..., : size[0], : size[1]] if any(lacking) else out

    def _labels(self, x: Tensor) -> Tensor | None:
        """Return the class of each image of `x`, one-hot, shape (B, num_classes)."""
        if self.label is None:
            return None
        labels = x.new_zeros(x.shape[0], self.num_classes)
        labels[:, self.label] = 1
        return labels

    def _start_noise(
        self, num: int, seed: int, size: Size | None, batch_size: int
    ) -> Iterator[tuple[Tensor, list[torch.Generator]]]:
        """Yield batches of standard normal images and each image's own generator."""
        num, seed = check_count("num", num), check_count("seed", seed, least=0)
        batch_size = check_count("batch_size", batch_size)
        shape = self._generated_shape(size)
        device = self.device or torch.device("cpu")
        for first in range(0, num, batch_size):
            keys = [(seed, i) for i in range(first, min(first + batch_size, num))]
            generators = make_generators(keys, device)
            like = torch.empty(len(keys), *shape, device=device, dtype=torch.float32)
            yield draw_normal(like, generators), generators

    def _generated_shape(self, size: Size | None) -> tuple[int, int, int]:
        sides = None if size is None else check_size("size", size)
        if self.image_shape is not None:
            if sides is not None and sides != self.image_shape[1:]:
                raise ValueError(f"size must be {self.image_shape[1:]}, got {sides}")
            return self.image_shape
        if sides is None or self.image_channels is None:
            lacking = "size" if sides is None else "image_shape"
            raise ValueError(f"{lacking} must be given to generate images: this prior fixes none")
        return self.image_channels, *sides


def _extend(x: Tensor, lacking: Sequence[int]) -> Tensor:
    """Return images (B, C, H, W) with mirrored rows below and columns to the right of them."""
    for dim, more in zip((2, 3), lacking, strict=True):
        while more > 0:  # an image of few pixels is mirrored again and again
            part = min(more, max(1, x.shape[dim] - 1))
            mirrored = x.flip(dim).narrow(dim, min(1, x.shape[dim] - 1), part)
            x, more = torch.cat((x, mirrored), dim), more - part
    return x
