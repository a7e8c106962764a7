"""Statistics that a prior measures for itself, once, and keeps."""

import copy
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from ncvsd_inverse.checks import check_count, check_stays_finite
from ncvsd_inverse.machine import (
    PassCounter,
    callers_autocast,
    count_passes,
    exact_arithmetic,
    progress_bar,
)
from ncvsd_inverse.priors.base import NetworkPrior
from ncvsd_inverse.priors.ncvsd import RefinedPrior
from ncvsd_inverse.priors.statistics import LEVELS, ImageStatistics, measure_statistics
from ncvsd_inverse.protocols import Generator, HasStatistics, Prior, PriorTraits, Statistics

__all__ = ["SIDE", "lacks_statistics", "num_images", "own_statistics", "with_own_statistics"]

SIDE = 64
"""Side in pixels at which a prior of any size is measured unless told otherwise."""

MOST_IMAGES, LEAST_IMAGES = 32, 4
PIXELS = MOST_IMAGES * 64 * 64
"""Pixels of all images that are measured unless told otherwise."""

PIXELS_AT_ONCE = 2**18
"""Pixels of the images that go through a network together."""

SIGMA_OF_PURE_NOISE = 10.0
"""Least `sigma_max` of a prior that can generate images: twenty stds of the data."""

SLOW = 2.0
"""Seconds of measuring after which it is announced."""

_measuring = threading.RLock()


def num_images(size: Sequence[int]) -> int:
    """Return how many images of (H, W) pixels are measured unless told otherwise: 4 to 32."""
    return min(MOST_IMAGES, max(LEAST_IMAGES, PIXELS // math.prod(size)))


@exact_arithmetic()
def own_statistics(
    prior: Prior,
    *,
    data: Tensor | None = None,
    images: int | None = None,
    image_shape: Sequence[int] | None = None,
    progress: bool = True,
) -> ImageStatistics:
    """Measure the statistics of a prior from images that it generates, or from given ones.

    Args:
        prior: the prior.
        data: clean images (B, C, H, W) in [-1, 1] to measure with; None: generated ones.
        images: how many, >= 2; None: as many as `num_images` says.
        image_shape: (C, H, W) of the images that a prior of any size generates; None: 64x64.
        progress: whether what takes longer than two seconds is announced, and shown where
            standard error is a terminal.

    Raises:
        ValueError: if an argument is out of range, or there is no `data` and the prior cannot
            generate; it says why.
        DivergenceError: if the prior returns NaN or infinity.
    """
    if images is not None:
        images = check_count("images", images, least=2)
    if data is not None:
        data = data[: images or num_images(data.shape[2:])]
        with _announced(prior, len(data), generates=False, shown=progress):
            return _measured(prior, data)
    source = _generator(prior, image_shape)
    assert source.image_shape is not None
    size = source.image_shape[1:]
    num = images or num_images(size)
    with _announced(prior, num, generates=True, shown=progress):
        options = {"batch_size": _batch_size(size)} if isinstance(source, NetworkPrior) else {}
        with callers_autocast():
            generated = source.generate(num, **options)
        check_stays_finite("generated images", generated, "the prior's network")
        return _measured(prior, generated)


def lacks_statistics(prior: Prior) -> str:
    """Return why a prior neither has statistics nor can generate images to measure them from.

    "" if it has them or can; no network is called to find out.
    """
    own = _own(prior)
    return "" if _known(own) else _cannot_generate(own)


def with_own_statistics(prior: Prior, image_shape: Sequence[int]) -> Statistics:
    """Return the statistics of a prior; one that has none measures, sets and keeps them first.

    Args:
        prior: the prior.
        image_shape: (C, H, W) of the images that are restored, for a prior that fixes none.

    Raises:
        ValueError: if it has none and cannot generate the images; it says why.
    """
    own = _own(prior)
    if known := _known(own):
        return known
    with _measuring:
        if known := _known(own):
            return known
        fixed = own.image_shape if isinstance(own, NetworkPrior) else None
        channels = own.image_channels if isinstance(own, NetworkPrior) else None
        shape = None if fixed is not None or channels is not None else image_shape
        measured = own_statistics(own, image_shape=shape)
        own.statistics = measured  # type: ignore[attr-defined]
        if isinstance(own, NetworkPrior) and own.statistics_store is not None:
            try:
                own.statistics_store.write(measured)
            except OSError as error:
                sys.stderr.write(f"statistics cannot be kept for the next time: {error}\n")
        return measured


def _own(prior: Prior) -> Prior:
    """Return what is measured: the prior itself, or that of which a draw takes several calls."""
    return prior.prior if isinstance(prior, RefinedPrior) else prior


def _known(own: Prior) -> Statistics | None:
    """Return the statistics that a prior has."""
    return own.statistics if isinstance(own, HasStatistics) else None


def _cannot_generate(prior: Prior) -> str:
    """Return why a prior cannot generate images, "" if it can."""
    if not isinstance(prior, Generator):
        return f"a {type(prior).__name__} has no method generate"
    if isinstance(prior, NetworkPrior) and prior.sigma_max < SIGMA_OF_PURE_NOISE:
        return f"its sigma_max is {prior.sigma_max:g}, too little noise to start from noise alone"
    return ""


def _generator(prior: Prior, image_shape: Sequence[int] | None) -> Generator:
    """Return the prior as one that generates images of one shape."""
    if fault := _cannot_generate(prior):
        raise ValueError(f"data must be given to measure statistics: {fault}")
    assert isinstance(prior, Generator)
    if not isinstance(prior, NetworkPrior):
        return prior
    if prior.image_shape is not None:
        return prior
    if image_shape is None:
        if prior.image_channels is None:
            raise ValueError("image_shape must be given: the prior fixes neither size nor channels")
        side = -(-SIDE // prior.size_multiple) * prior.size_multiple
        image_shape = (prior.image_channels, side, side)
    twin = copy.copy(prior)
    channels, height, width = image_shape
    twin.image_shape = (channels, height, width)
    return twin


def _measured(prior: Prior, images: Tensor) -> ImageStatistics:
    highest = PriorTraits.of(prior).sigma_max
    levels = [level for level in LEVELS if level <= highest]
    return measure_statistics(
        prior, images, levels=levels, batch_size=_batch_size(images.shape[2:])
    )


def _batch_size(size: Sequence[int]) -> int:
    return max(1, PIXELS_AT_ONCE // math.prod(size))


@contextmanager
def _announced(prior: Prior, num: int, *, generates: bool, shown: bool) -> Iterator[None]:
    """Say on standard error what is measured and how long it takes, if it takes long."""
    if not (shown and isinstance(prior, NetworkPrior)):
        yield
        return
    from rich.console import Console

    calls = (prior.generation_calls if generates else 0) + len(LEVELS)
    total, begun = calls * num, time.monotonic()
    console = Console(stderr=True)
    with ExitStack() as bars:
        advance: Callable[[int], None] | None = None
        shown_so_far = 0

        def tell(passes: PassCounter) -> None:
            nonlocal advance, shown_so_far
            took = time.monotonic() - begun
            if advance is None and took > SLOW:
                source = "images that it generates" if generates else "given images"
                console.print(
                    f"measuring the prior's statistics, once, from {num} {source}: "
                    f"about {took * total / passes.forward:.0f} s",
                    soft_wrap=True,
                )
                bar = progress_bar("network calls", total, shown=console.is_terminal)
                advance = bars.enter_context(bar)
            if advance is not None:
                advance(passes.forward - shown_so_far)
                shown_so_far = passes.forward

        with count_passes([prior.network], on_pass=tell):
            yield
