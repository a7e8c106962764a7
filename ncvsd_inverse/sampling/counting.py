"""A prior whose draws are checked and whose network calls are counted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ncvsd_inverse.checks import check_count
from ncvsd_inverse.machine import PassCounter, callers_autocast, count_passes
from ncvsd_inverse.protocols import (
    Denoiser,
    Generators,
    NetworkBacked,
    Prior,
    PriorTraits,
)

__all__ = ["CountedPrior", "network_of"]


def network_of(prior: Prior) -> nn.Module | None:
    """Return the module whose passes count; None for a prior that shows none."""
    network = prior.network if isinstance(prior, NetworkBacked) else None
    return network if isinstance(network, nn.Module) else None


class CountedPrior:
    """A prior that counts forward passes.

    Where the prior shows its `network`, the images that go through it count, those of this thread
    only; elsewhere every image that is drawn counts `nfe_per_sample`. The prior runs under the
    autocast in which the solver was called.

    Args:
        prior: the prior.

    Attributes:
        nfe_per_sample: calls of a draw.
        forwards: images that went through the network since `counting` began.

    Raises:
        ValueError: if `nfe_per_sample` is below 1.
    """

    def __init__(self, prior: Prior) -> None:
        self.prior = prior
        self.nfe_per_sample = check_count(
            "prior.nfe_per_sample", PriorTraits.of(prior).nfe_per_sample
        )
        self._network = network_of(prior)
        self._passes = PassCounter()
        self._drawn = 0

    @property
    def forwards(self) -> int:
        """Forward passes counted so far, in images."""
        return self._passes.forward if self._network is not None else self._drawn

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count as long as the context lasts."""
        with count_passes([] if self._network is None else [self._network]) as self._passes:
            yield

    def sample(
        self, u: Tensor, sigma: float | Tensor, /, *, generator: Generators = None
    ) -> Tensor:
        """Draw x0 ~ p(x0 | u), shape (B, C, H, W).

        Raises:
            ValueError: if the prior draws another shape or dtype, or calls its network other than
                `nfe_per_sample` times an image.
        """

        def draw() -> Tensor:
            return self.prior.sample(u, sigma, generator=generator)

        return self._counted(draw, u, self.nfe_per_sample)

    def denoise(self, u: Tensor, sigma: float | Tensor, /) -> Tensor:
        """Return E[x0 | u], shape (B, C, H, W), in one call; errors as for `sample`."""
        prior = self.prior
        assert isinstance(prior, Denoiser)
        return self._counted(lambda: prior.denoise(u, sigma), u, 1)

    def _counted(self, call: Callable[[], Tensor], u: Tensor, calls: int) -> Tensor:
        before = self.forwards
        with callers_autocast():
            is_mixed = torch.is_autocast_enabled(u.device.type)
            x0 = call()
        if is_mixed and isinstance(x0, Tensor) and x0.is_floating_point():
            x0 = x0.to(u.dtype)
        if not isinstance(x0, Tensor) or (x0.shape, x0.dtype) != (u.shape, u.dtype):
            came = f"{tuple(x0.shape)}, {x0.dtype}" if isinstance(x0, Tensor) else f"{type(x0)}"
            raise ValueError(f"prior must draw x0 as {tuple(u.shape)}, {u.dtype}, got {came}")
        self._drawn += calls * u.shape[0]
        if self.forwards - before != calls * u.shape[0]:
            name = "nfe_per_sample = " if calls == self.nfe_per_sample else ""
            raise ValueError(
                f"prior must call its network {name}{calls} times an image, got "
                f"{self.forwards - before} images through it for {u.shape[0]} draws"
            )
        return x0
