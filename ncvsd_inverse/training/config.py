"""Settings of a training run, checked when made."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args

import torch

from ncvsd_inverse.checks import (
    check_choice,
    check_count,
    check_names,
    check_non_negative,
    check_positive,
)
from ncvsd_inverse.networks import UNetShape, inference_dtype
from ncvsd_inverse.plain_data import read_toml

__all__ = [
    "DistillConfig",
    "Precision",
    "TeacherConfig",
    "TrainConfig",
]

Precision: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]


MAX_COUNT = (1 << 63) - 1
MAX_BATCH = 1_000_000
MAX_LEVELS = 1_000_000
MAX_EMAS = 16
MAX_LOG = 20
"""Largest log of a noise level, in size; sigma is e to it."""
MAX_SIGMA = 1e6


def _toml_line(name: str, value: object) -> str:
    """Return a setting as TOML, whose scalars and lists of them are written as JSON's."""
    return f"# {name}: not set" if value is None else f"{name} = {json.dumps(value)}"


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _check_numbers(name: str, values: object, length: int | None) -> None:
    if not isinstance(values, tuple) or (length is not None and len(values) != length):
        wanted = f"{length} numbers" if length else "a list of numbers"
        raise TypeError(f"{name} must be {wanted}, got {values!r}")
    for index, value in enumerate(values):
        check_non_negative(f"{name}[{index}]", value)


@dataclass(frozen=True)
class TrainConfig:
    """Settings that a teacher's training and a distillation share.

    Attributes:
        network: widths and depths of the networks.
        images: images to train on in all; the run ends there.
        batch_size: images in an optimiser step.
        learning_rate: Adam's largest learning rate (the score model's in a distillation).
        warmup_images: images over which the learning rate rises from 0.
        decay_steps: optimiser steps after which it falls as the inverse square root.
        betas: Adam's decay rates.
        t_mean: mean of log t, the noise levels that losses are taken at.
        t_std: std of log t.
        sigma_data: std of the images, image units.
        ema_stds: relative stds of the averaged weights that are kept, power-function EMA.
        any_size: whether the networks take images of any size that their levels divide; then
            they train on random crops of `network.resolution`.
        flip: whether images are mirrored left to right at random; false for latents.
        microbatch: most images of a process in one pass, for machines with little memory; the
            gradients of a batch add up over the passes. None: all at once.
        precision: dtype of the network passes, weights and optimiser stay float32; "auto" is
            bfloat16 where the machine multiplies it in hardware, else float32.
        loss_scale: factor on losses before the backward pass, taken out of the gradients again;
            for float16, > 0.
        compile: whether torch.compile fuses the networks.
        seed: seed of weights, batches and noise; >= 0.
        init: name or path of a prior of the same networks whose weights the run starts from, with
            fresh optimisers; None: a new teacher, or a student that starts as its teacher.

    Sources:
        Karras et al., arXiv 2312.02696 (learning rate, EMA); METHOD table of arXiv 2506.09416.
    """

    network: UNetShape
    images: int
    batch_size: int = 64
    learning_rate: float = 0.01
    warmup_images: int = 10_000
    decay_steps: float = 2000.0
    betas: tuple[float, float] = (0.9, 0.99)
    t_mean: float = -0.8
    t_std: float = 1.6
    sigma_data: float = 0.5
    ema_stds: tuple[float, ...] = (0.05, 0.10)
    any_size: bool = False
    flip: bool = True
    microbatch: int | None = None
    precision: Precision = "auto"
    loss_scale: float = 1.0
    compile: bool = False
    seed: int = 0
    init: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.init, str | None) or self.init == "":
            raise TypeError(f"init must be the name or path of a prior, got {self.init!r}")
        if not isinstance(self.network, UNetShape):
            raise TypeError(f"network must be a UNetShape, got {self.network!r}")
        check_count("images", self.images, most=MAX_COUNT)
        check_count("batch_size", self.batch_size, most=MAX_BATCH)
        if self.microbatch is not None:
            check_count("microbatch", self.microbatch, most=MAX_BATCH)
        for name in ("any_size", "flip", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name, length in (("betas", 2), ("ema_stds", None)):
            _check_numbers(name, getattr(self, name), length)
        if not all(beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if isinstance(self.t_mean, bool) or not isinstance(self.t_mean, int | float):
            raise TypeError(f"t_mean must be a number, got {self.t_mean!r}")
        if not abs(self.t_mean) <= MAX_LOG:
            raise ValueError(f"t_mean must lie within +-{MAX_LOG}, got {self.t_mean}")
        if check_positive("t_std", self.t_std) > MAX_LOG:
            raise ValueError(f"t_std must be at most {MAX_LOG}, got {self.t_std}")
        check_count("seed", self.seed, least=0, most=MAX_COUNT)
        for name in ("learning_rate", "decay_steps", "sigma_data", "loss_scale"):
            check_positive(name, getattr(self, name))
        check_non_negative("warmup_images", self.warmup_images)
        check_choice("precision", self.precision, get_args(Precision))
        if len(self.ema_stds) > MAX_EMAS:
            raise ValueError(f"ema_stds must be at most {MAX_EMAS}, got {len(self.ema_stds)}")
        if not self.ema_stds or not all(0 < std < 0.28 for std in self.ema_stds):
            raise ValueError(f"ema_stds must lie in (0, 0.28), got {self.ema_stds}")

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the network passes on this machine."""
        if self.precision == "auto":
            return inference_dtype("cuda" if torch.cuda.is_available() else "cpu")
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read a configuration file; ValueError that names an unknown or missing key."""
        try:
            return cls.from_dict(read_toml(Path(path)))
        except ValueError as error:
            raise ValueError(f"{path} must hold settings of a training: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain data, as `to_dict` gives it; ValueError if it does not fit."""
        known = [entry.name for entry in fields(cls)]
        check_names("configuration", values, known, ("network", "images"))
        plain = _with_tuples(values)
        network = plain.pop("network")
        if not isinstance(network, Mapping):
            raise ValueError(f"network must be a table of settings, got {network!r}")
        shape = [entry.name for entry in fields(UNetShape)]
        check_names("network", network, shape, ("resolution",))
        try:
            return cls(network=UNetShape(**_with_tuples(network)), **plain)
        except TypeError as error:
            raise ValueError(str(error)) from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, JSON-able."""
        return asdict(self)

    def to_toml(self) -> str:
        """Return a file that `from_toml` reads as these settings; those not set are left out."""
        settings = self.to_dict()
        network = settings.pop("network")
        lines = [_toml_line(name, value) for name, value in settings.items()]
        lines += ["", "[network]", *(_toml_line(name, value) for name, value in network.items())]
        return "\n".join(lines) + "\n"

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the settings that have a default, as read from JSON.

        They hold for a run that was started before a setting existed.
        """
        known = (entry for entry in fields(cls) if entry.default is not MISSING)
        values = {entry.name: entry.default for entry in known}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


@dataclass(frozen=True)
class TeacherConfig(TrainConfig):
    """Settings of a teacher's training by denoising (EDM).

    Attributes:
        dropout: probability that a value within a residual block is dropped in training, in
            [0, 1). What is dropped follows from the seed, the step and the process, so a resumed
            run takes the same steps; a run cut into other microbatches or over other processes
            drops other values and is the same in law only.
    """

    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not check_non_negative("dropout", self.dropout) < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Settings of a distillation.

    Attributes:
        kind: "concat" (light) or "controlled" (as published) networks.
        gamma: how far the generator raises the noise of its input, >= 0.
        generator_rate: learning rate of generator and discriminator, relative to the score model.
        adversarial_images: images after which the adversarial loss is switched on.
        energy_weight: weight of the energy score of the draws against the true images, >= 0;
            0, as published, leaves it out.
        energy_images: images during which the generator learns by the energy score alone, >= 0;
            score model and discriminator wait meanwhile. With `images` or more the whole run is
            of that kind; 0, as published, has no such start.
        energy_rate: learning rate of the generator during these, relative to the score model's.
        tempered_weight: weight of the squared error of tempered draws, >= 0: with its noise z
            scaled by T in [0, 1.25] the generator is to return the mean given u plus T times the
            draw's distance from it. 0: it does not learn to.
        num_levels: Karras levels from which sigma is drawn, between sigma_max and sigma_min.
        sigma_min: smallest level, image units.
        sigma_max: largest level, image units.
    """

    kind: Literal["concat", "controlled"] = "concat"
    gamma: float = 0.414
    generator_rate: float = 0.01
    adversarial_images: int = 0
    energy_weight: float = 0.0
    energy_images: int = 0
    energy_rate: float = 0.3
    tempered_weight: float = 0.0
    num_levels: int = 1000
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kind", self.kind, ("concat", "controlled"))
        check_non_negative("gamma", self.gamma)
        check_non_negative("energy_weight", self.energy_weight)
        check_non_negative("tempered_weight", self.tempered_weight)
        for name in ("energy_images", "adversarial_images"):
            check_count(name, getattr(self, name), least=0, most=MAX_COUNT)
        check_positive("generator_rate", self.generator_rate)
        check_positive("energy_rate", self.energy_rate)
        check_count("num_levels", self.num_levels, least=2, most=MAX_LEVELS)
        check_positive("sigma_min", self.sigma_min)
        if not self.sigma_min < check_positive("sigma_max", self.sigma_max) <= MAX_SIGMA:
            raise ValueError(
                f"sigma_max must be above sigma_min = {self.sigma_min} and at most "
                f"{MAX_SIGMA:g}, got {self.sigma_max}"
            )
