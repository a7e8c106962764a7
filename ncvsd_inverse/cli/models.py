"""Forward models of users' files: what was done to a picture, as the options say it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_choice, check_positive
from ncvsd_inverse.cli.folder import Measured, check_size, file_digest
from ncvsd_inverse.cli.inputs import fit_picture, sides_of
from ncvsd_inverse.cli.masks import ARRAYS, read_array, read_kernel, read_mask, warn_of_mask
from ncvsd_inverse.images import Picture, read_image, read_picture
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.operators import (
    BlindBlur,
    Blur,
    Colorize,
    Denoise,
    GaussianBlur,
    Inpaint,
    MaskedFourier,
    PhaseRetrieval,
    Poisson,
    SuperResolution,
)
from ncvsd_inverse.operators.base import BaseOperator
from ncvsd_inverse.operators.blind import KernelPrior
from ncvsd_inverse.protocols import Prior, PriorTraits
from ncvsd_inverse.tasks import Task, make_task

__all__ = ["ARRAYS", "TASKS", "WAYS_OUT", "Boundary", "Model", "Simulation"]

Boundary: TypeAlias = Literal["replicate", "reflect", "circular", "valid"]

WIDEST_BLUR = 100
"""Largest std of a Gaussian blur, pixels."""

KERNEL_SIZE = 31
"""Side of an unknown kernel, pixels."""

SCALES = (2, 3, 4, 8)

TASKS: Mapping[str, str] = {
    "denoise": "",
    "deblur": "--kernel FILE, --blur-std S or --blind",
    "sr": "--scale 2, 3, 4 or 8",
    "inpaint": "--mask FILE, or transparent places in IN",
    "colorize": "",
    "mri": "IN an array of k-space, 0 where it is not measured",
    "phase_retrieval": "--sigma-y S, better --restarts 4, IN an array of amplitudes",
    "poisson": "--peak N, IN an array of counts",
}
"""Tasks of real files, and what they need."""

WAYS_OUT: Mapping[str, str] = {
    "inpaint_box": "inpaint with --mask FILE",
    "inpaint_random": "inpaint with --mask FILE",
    "sr4x": "sr with --scale 4",
    "deblur_gaussian": "deblur with --blur-std S, in pixels",
    "deblur_motion": "deblur with --kernel FILE",
}
"""For a task of the benchmark, which is of pictures that are degraded first, that of real ones."""


Reader: TypeAlias = Callable[[Path, tuple[int, ...]], Measured]
"""Reads a file; random numbers follow from the integers. A ValueError for one that does not fit."""


@dataclass(frozen=True)
class Simulation:
    """Clean pictures that are degraded first.

    Attributes:
        task: the name of a task that `make_task` accepts.
        seed: of its operator.
        sigma_y: noise std; None: the task's.
        mask: of an inpainting task, in place of the named one.

    Raises:
        ValueError: if there is no such task or it takes no mask.
    """

    task: str
    seed: int
    sigma_y: float | None
    mask: Path | None

    def __post_init__(self) -> None:
        if self.mask is not None and not self._task.takes_mask:
            raise ValueError(f"--mask must come with an inpainting task, got {self.task}")

    @property
    def _task(self) -> Task:
        return make_task(self.task, 64, seed=self.seed)

    @property
    def level(self) -> float:
        """Noise std of the measurements."""
        return self._task.sigma_y if self.sigma_y is None else self.sigma_y

    def settings(self, prior: Prior) -> dict[str, object]:
        """Return what a record says of it."""
        return {"mask_sha256": None if self.mask is None else file_digest(self.mask)}

    def reader(self, prior: Prior) -> Reader:
        """Return what reads a clean picture, fitted to what the prior takes, and degrades it."""
        known = None if self.mask is None else read_mask(self.mask)
        level = self.level

        @lru_cache(maxsize=8)
        def make(sides: tuple[int, int]) -> Task:
            task = make_task(self.task, sides, seed=self.seed)
            if known is not None and tuple(known.shape) != sides:
                raise ValueError(
                    f"--mask must have the size of the image, {sides[1]} x {sides[0]} pixels, "
                    f"got {known.shape[1]} x {known.shape[0]}"
                )
            return Task(self.task, task.operator if known is None else Inpaint(known), level)

        def read(path: Path, key: tuple[int, ...]) -> Measured:
            truth = fit_picture(path, read_image(path), prior)
            task = make(sides_of(truth))
            y = task.operator.measure(truth, level, generator=make_generators([key]))
            return Measured(y, task.operator, truth=truth, seen=task.picture(y))

        return read


@dataclass(frozen=True)
class Model:
    """The options of the command line that say what was done to a picture.

    Attributes:
        task: one of `TASKS`.
        kernel, blur_std, boundary: of "deblur"; without a boundary the scene goes on beyond the
            edges ("valid"), or is "replicate" for unknown kernels and priors of one size.
        blind, kernel_size, kernel_prior: of "deblur" where nobody knows the kernel.
        scale: of "sr".
        mask: of "inpaint".
        peak: of "poisson".

    Raises:
        ValueError: if an option is missing, out of range, or of another task.
    """

    task: str
    kernel: Path | None = None
    blur_std: float | None = None
    boundary: Boundary | None = None
    scale: int | None = None
    mask: Path | None = None
    peak: float | None = None
    blind: bool = False
    kernel_size: int | None = None
    kernel_prior: KernelPrior | None = None

    def __post_init__(self) -> None:
        if self.task in WAYS_OUT:
            raise ValueError(
                f"--task {self.task} must come with --simulate, as IN is then degraded first; to "
                f"restore IN take --task {WAYS_OUT[self.task]}"
            )
        check_choice("--task", self.task, TASKS)
        blind = ("blind", "kernel_size", "kernel_prior")
        takes = {"deblur": ("kernel", "blur_std", "boundary", *blind), "sr": ("scale",)}
        takes |= {"inpaint": ("mask",), "poisson": ("peak",)}
        for task, names in takes.items():
            for name in names:
                if task != self.task and getattr(self, name) not in (None, False):
                    option = name.replace("_", "-")
                    raise ValueError(f"--{option} must come with --task {task}, got {self.task}")
        ways = (self.kernel is not None) + (self.blur_std is not None) + self.blind
        if self.task == "deblur" and ways != 1:
            came = "none" if ways == 0 else "several"
            raise ValueError(
                f"--task deblur must have --kernel FILE, --blur-std S or --blind, got {came}"
            )
        for name in ("kernel_size", "kernel_prior"):
            if getattr(self, name) is not None and not self.blind:
                raise ValueError(f"--{name.replace('_', '-')} must come with --blind")
        if self.kernel_size is not None and (self.kernel_size < 3 or self.kernel_size % 2 == 0):
            raise ValueError(f"--kernel-size must be odd and at least 3, got {self.kernel_size}")
        if self.task == "sr" and self.scale not in SCALES:
            raise ValueError(f"--scale must be 2, 3, 4 or 8 for --task sr, got {self.scale}")
        if self.blur_std is not None and check_positive("--blur-std", self.blur_std) > WIDEST_BLUR:
            raise ValueError(
                f"--blur-std must be at most {WIDEST_BLUR} pixels, got {self.blur_std:g}"
            )
        if self.peak is not None:
            check_positive("--peak", self.peak)
        if self.task == "poisson" and self.peak is None:
            raise ValueError("--peak must be given for --task poisson: the mean count of white")

    def settings(self, prior: Prior) -> dict[str, object]:
        """Return what a record says of it."""
        boundary = self._boundary(prior)
        return {
            "kernel_sha256": None if self.kernel is None else file_digest(self.kernel),
            "mask_sha256": None if self.mask is None else file_digest(self.mask),
            "blur_std": self.blur_std,
            "boundary": boundary if self.task == "deblur" else None,
            "blind": repr(self._blind_blur(boundary)) if self.blind else None,
            "scale": self.scale,
            "peak": self.peak,
        }

    def _boundary(self, prior: Prior) -> Boundary:
        """Return what is beyond the edges: more of the scene, if the prior takes any size.

        Unknown kernels are found as often with "replicate", and faster.
        """
        larger = PriorTraits.of(prior).image_shape is None and not self.blind
        return self.boundary or ("valid" if larger else "replicate")

    def reader(self, prior: Prior) -> Reader:
        """Return what reads a measurement; kernel and mask are read once."""
        operator = self._operator(self._boundary(prior))
        fixed = PriorTraits.of(prior).image_shape

        def read(path: Path, key: tuple[int, ...]) -> Measured:
            measured = self._read(path, operator)
            if fixed is not None:
                check_size(measured, fixed)
            return measured

        return read

    def _read(self, path: Path, operator: BaseOperator | BlindBlur | None) -> Measured:
        if path.suffix.lower() in ARRAYS:
            return self._of_array(read_array(path), operator)
        if self.task in ("mri", "phase_retrieval", "poisson"):
            raise ValueError(f"it must be an array (.npy or .pt) for {self.task}")
        picture = read_picture(path)
        return self._of_pixels(picture.x, operator, picture)

    def _blind_blur(self, boundary: Boundary) -> BlindBlur | None:
        """Return the blur whose kernel is to be found; None if it is known."""
        if not self.blind:
            return None
        size = KERNEL_SIZE if self.kernel_size is None else self.kernel_size
        return BlindBlur(size, boundary, self.kernel_prior or "smooth")

    def _operator(self, boundary: Boundary) -> BaseOperator | BlindBlur | None:
        """Return the forward model of all files; None if each has its own."""
        if self.task == "denoise":
            return Denoise()
        if self.task == "colorize":
            return Colorize()
        if self.scale is not None:
            return SuperResolution(self.scale)
        if self.mask is not None:
            return Inpaint(read_mask(self.mask))
        if self.kernel is not None:
            return Blur(read_kernel(self.kernel), boundary=boundary)
        if self.blind:
            return self._blind_blur(boundary)
        if self.blur_std is not None:
            size = 2 * round(3.5 * self.blur_std) + 1
            return GaussianBlur(self.blur_std, size, boundary)
        return None if self.peak is None else Poisson(self.peak)

    def _of_pixels(
        self, y: Tensor, operator: BaseOperator | BlindBlur | None, picture: Picture | None
    ) -> Measured:
        shows = None if picture is None or picture.alpha is None else picture.alpha[0, 0] > 0.5
        if operator is None and picture is not None and shows is not None and not shows.all():
            operator = Inpaint(shows)
            picture = Picture(picture.x, picture.bits)  # what was hidden is there now
        if operator is None:
            raise ValueError("--mask must be given for --task inpaint")
        if isinstance(operator, Colorize):
            grey = y if y.shape[1] == 1 else operator(y)
            return Measured(grey, operator, picture)
        if isinstance(operator, Inpaint):
            known = operator.mask[0, 0] > 0
            if known.shape != y.shape[2:]:
                raise ValueError(
                    "--mask must have the size of the picture, "
                    f"{y.shape[3]} x {y.shape[2]} pixels, got {known.shape[1]} x {known.shape[0]}"
                )
            warn_of_mask(known, y)
            return Measured(operator(y), operator, picture)
        if isinstance(operator, Blur | BlindBlur):
            height, width = (
                operator.kernel.shape[-2:]
                if isinstance(operator, Blur)
                else (operator.kernel_size, operator.kernel_size)
            )
            is_small = y.shape[2] < height or y.shape[3] < width
            if is_small and self.boundary != "valid":
                raise ValueError(
                    f"its sides must be at least those of the kernel, {width} x {height}, got "
                    f"{y.shape[3]} x {y.shape[2]}"
                )
            if operator.boundary == "valid":
                return Measured(y, operator, picture, (height // 2, width // 2))
        return Measured(y, operator, picture)

    def _of_array(self, y: Tensor, operator: BaseOperator | BlindBlur | None) -> Measured:
        """Return a measurement of numbers as they are."""
        if y.is_complex():
            y = torch.view_as_real(y)
        y = y.float()
        if self.task == "mri":
            y = y[None] if y.ndim == 3 else y
            if y.ndim != 4 or y.shape[-1] != 2:
                raise ValueError(
                    "it must hold complex numbers (H, W) or (C, H, W), or pairs of real and "
                    f"imaginary part, got shape {tuple(y.shape)}"
                )
            lines = (y != 0).any(-1).any(0)
            power = y.square().sum((0, -1))
            place = int(power.argmax())
            centred = place == lines.numel() // 2 + lines.shape[1] // 2 or bool(
                power[0, 0] < power[lines.shape[0] // 2, lines.shape[1] // 2]
            )
            return Measured(y[None], MaskedFourier(lines.float(), centred=centred), None)
        y = y[None, None] if y.ndim == 2 else y[None] if y.ndim == 3 else y
        if y.ndim != 4 or len(y) != 1 or y.shape[1] not in (1, 3):
            raise ValueError(
                "it must hold one image (H, W), (C, H, W) or (1, C, H, W) of 1 or 3 channels, got "
                f"shape {tuple(y.shape)}"
            )
        if self.task == "phase_retrieval":
            if y.shape[2] != y.shape[3] or y.shape[2] % 4:
                raise ValueError(
                    "it must be a square of amplitudes of an image padded to twice its side, a "
                    f"multiple of 4, got {y.shape[3]} x {y.shape[2]}"
                )
            return Measured(y, PhaseRetrieval(y.shape[2] // 4), None)
        if isinstance(operator, Poisson):
            return Measured(operator.stabilise(y), operator, None)
        return self._of_pixels(y, operator, None)
