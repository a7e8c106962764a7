"""The pictures of one command, read, restored and written one after the other."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import typer

import ncvsd_inverse
from ncvsd_inverse import Result
from ncvsd_inverse.cli.folder import (
    FULL,
    Job,
    Place,
    as_it_came,
    batch_by_size,
    check_same_source,
    file_digest,
    is_finished,
    name_once,
    one_image,
    sha256,
    write_result,
)
from ncvsd_inverse.cli.models import Reader
from ncvsd_inverse.images import check_holds
from ncvsd_inverse.protocols import LinearOperator, Prior, UnknownKernel
from ncvsd_inverse.sampling.choices import LARGE

__all__ = ["Restoration"]

PIXELS_TOGETHER = {"cpu": 2**18, "cuda": 2**22}
"""Pixels of pictures that are restored together, by device: 64 pictures of 64x64 and 1024."""

BASE_BYTES, BYTES_A_PIXEL = 0.8e9, 310
"""What a CPU needs: 0.86 GB at the peak for SR x4 to 500x375, 1.74 GB to 2000x1500 in 10 calls."""


@dataclass
class Restoration:
    """Restores pictures by one prior and one set of options.

    Attributes:
        prior: the prior, on its device.
        where: the device.
        tile: side of the tiles in which large pictures go; None: whole.
        read_measured: reads a file and says what was done to it.
        place_of: name of a picture -> where its outputs go.
        noise: noise std of the measurements; "auto": to be estimated.
        is_simulated: whether `noise` made the measurements.
        settings: all that a result depends on but its file and the device.
        asked: further arguments of `ncvsd_inverse.solve`.
        seed: what randomness follows from, with the name of a picture.
        failures: a line for each picture that could not be restored.
    """

    prior: Prior
    where: torch.device
    tile: int | None
    read_measured: Reader
    place_of: Callable[[str], Place]
    noise: float | Literal["auto"]
    is_simulated: bool
    settings: Mapping[str, object]
    asked: Mapping[str, Any]
    seed: int
    failures: list[str] = field(default_factory=list)

    def restore(
        self, pictures: Sequence[tuple[str, Path]], advance: Callable[[int], None]
    ) -> tuple[int, list[str]]:
        """Restore pictures that are not finished yet; return how many, and the failures.

        Args:
            pictures: names and files.
            advance: called with 1 after each.

        Raises:
            OSError: if the disk is full.
        """
        most = PIXELS_TOGETHER.get(self.where.type, PIXELS_TOGETHER["cuda"])
        done = 0
        jobs_to_do = self._read(pictures, advance)
        for jobs in batch_by_size(jobs_to_do, most // max(self.asked["num_samples"], 1)):
            for job, result in self._solve(jobs, advance):
                try:
                    write_result(job, result)
                except (OSError, ValueError) as error:
                    if isinstance(error, OSError) and error.errno in FULL:
                        raise
                    self._fail(job.path, error, advance)
                    continue
                done += 1
                advance(1)
        return done, self.failures

    def _read(
        self, pictures: Sequence[tuple[str, Path]], advance: Callable[[int], None]
    ) -> Iterator[Job]:
        """Yield what is to be done."""
        for name, path in pictures:
            place = self.place_of(name)
            try:
                digest = file_digest(path)
                settings = {**self.settings, "input_sha256": digest}
                if is_finished(place, settings):
                    advance(1)
                    continue
                place.check_own()
                check_same_source(place, path, digest)
                job = self._prepare(name, path, settings)
            except (OSError, ValueError, MemoryError, RuntimeError) as error:
                self._fail(path, error, advance)
            else:
                yield job

    def _prepare(self, name: str, path: Path, settings: Mapping[str, object]) -> Job:
        """Read a file."""
        key = (self.seed, int(sha256(os.fsencode(name))[:16], 16))
        measured = self.read_measured(path, key)
        own = measured.operator.sigma_y
        noise = self.noise if own is None or self.is_simulated else own
        if noise == "auto" and not isinstance(measured.operator, LinearOperator | UnknownKernel):
            raise ValueError(f"--sigma-y must be a number for --task {self.settings['task']}")
        place = self.place_of(name)
        if place.file is not None:  # before it takes long
            shape = measured.operator.input_shape(tuple(measured.y.shape))
            check_holds(place.file, as_it_came(measured, torch.zeros(shape)))
        device = {"device": str(self.where)}
        return Job(place, path, key, measured, noise, {**settings, **device})

    def _solve(
        self, jobs: list[Job], advance: Callable[[int], None]
    ) -> Iterator[tuple[Job, Result]]:
        """Yield the results of pictures of one size, together, or one by one where that fails."""
        first = jobs[0]
        shape = first.measured.operator.input_shape(first.measured.y.shape)
        if self.where.type == "cpu" and shape[-2] * shape[-1] > LARGE:
            say_memory(first.path, shape, self.tile)
        try:
            result = ncvsd_inverse.solve(
                torch.cat([job.measured.y for job in jobs]).to(self.where),
                operator=first.measured.operator,
                prior=self.prior,
                sigma_y=first.sigma_y,
                seed=[job.key for job in jobs],
                **self.asked,
            )
        # Divergence, lack of memory, a size that does not fit: of one picture, for all is known.
        except (ValueError, MemoryError, RuntimeError) as error:
            if len(jobs) == 1:
                self._fail(first.path, error, advance)
                return
            result = None
        if result is None:  # past the error, which holds what was in memory
            for job in jobs:
                yield from self._solve([job], advance)
            return
        for place, job in enumerate(jobs):
            yield job, one_image(result, place)

    def _fail(self, path: Path, error: Exception, advance: Callable[[int], None]) -> None:
        self.failures.append(name_once(path, error))
        advance(1)


def say_memory(path: Path, shape: Sequence[int], tile: int | None) -> None:
    """Print how a `LARGE` picture will be restored, and about how much memory that takes."""
    height, width = shape[-2:]
    size = (BASE_BYTES + BYTES_A_PIXEL * height * width) / 1e9
    parts = "" if tile is None else f" in tiles of {tile}"
    typer.echo(f"{path}: {width}x{height} pixels{parts}, about {size:.1f} GB of memory")
