"""Training loops: a teacher by denoising, a generative denoiser by NCVSD distillation.

They must not know measurements or solvers. Everything random in step n follows from the seed and
n alone, so a run that is stopped and resumed takes the steps that it would have taken.
"""

import copy
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ncvsd_inverse.distill.config import DistillConfig, TeacherConfig, TrainConfig
from ncvsd_inverse.distill.data import TrainingData
from ncvsd_inverse.distill.ema import PowerEMA
from ncvsd_inverse.distill.losses import (
    ConditionalDenoiser,
    UnconditionalDenoiser,
    View,
    add_noise,
    adversarial_loss,
    denoising_loss,
    discriminator_losses,
    distillation_loss,
    generate,
    score_loss,
)
from ncvsd_inverse.errors import CheckpointError, DivergenceError
from ncvsd_inverse.networks import (
    ConcatDenoiser,
    ConcatDiscriminator,
    ControlledDenoiser,
    ControlledDiscriminator,
    Denoiser,
    Network,
    constrain_weights_,
    project_gradients_,
)
from ncvsd_inverse.numerics import draw_normal, make_generators
from ncvsd_inverse.schedules import karras

Config = TypeVar("Config", bound=TrainConfig)

CHECKPOINT = "state.safetensors"
_STEP_STREAM = 2


class Run(ABC, Generic[Config]):
    """One training run in one folder.

    The folder holds `config.json`, `log.jsonl` (a line of statistics every so often) and
    `state.safetensors` (everything needed to go on, written whole or not at all).

    Args:
        config: the settings.
        data: the training images.
        folder: where the run lives; an existing run there is resumed.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """

    def __init__(self, config: Config, data: TrainingData, folder: str | Path) -> None:
        self.config = config
        self.data = data
        self.folder = Path(folder)
        self.step = 0
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Adam] = {}
        self.averages: dict[str, PowerEMA] = {}
        self.sums: dict[str, list[float]] = {}

    def add(
        self, name: str, module: nn.Module, *, rate: float = 1.0, average: bool = False
    ) -> None:
        """Register a module to train under `name`; `rate` scales the learning rate."""
        if isinstance(module, Network):
            module.compute_dtype = self.config.compute_dtype
        constrain_weights_(module)
        self.modules[name] = module.train()
        optimizer = torch.optim.Adam(module.parameters(), betas=self.config.betas)
        optimizer.param_groups[0]["rate"] = rate
        self.optimizers[name] = optimizer
        if average:
            self.averages[name] = PowerEMA(module, self.config.ema_stds)
        if self.config.compile:
            module.compile()

    @abstractmethod
    def train_step(self, images: Tensor, source: torch.Generator) -> None:
        """Take one step on `images` (B, C, H, W), drawing all noise from `source`."""

    @property
    def images_seen(self) -> int:
        """Training images seen so far."""
        return self.step * self.config.batch_size

    def run(
        self,
        *,
        seconds: float = float("inf"),
        checkpoint_every: int = 200,
        log_every: int = 20,
        on_log: Callable[[dict[str, float]], None] | None = None,
    ) -> bool:
        """Train until the configured number of images, or for about `seconds`.

        Args:
            seconds: wall time after which to stop at a checkpoint.
            checkpoint_every: steps between checkpoints.
            log_every: steps between lines of the log.
            on_log: called with each line.

        Returns:
            True if the run has reached its number of images.

        Raises:
            DivergenceError: if a loss is not finite; the last checkpoint stays.
        """
        self._open_folder()
        started, ticked = time.monotonic(), time.monotonic()
        while self.images_seen < self.config.images and time.monotonic() - started < seconds:
            self.train_on_next_batch()
            if self.step % log_every == 0:
                now = time.monotonic()
                line = self._statistics(log_every * self.config.batch_size / (now - ticked))
                ticked = now
                with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
                if on_log:
                    on_log(line)
            if self.step % checkpoint_every == 0:
                self.save()
        self.save()
        return self.images_seen >= self.config.images

    def train_on_next_batch(self) -> None:
        """Take the next step of the run."""
        config = self.config
        (source,) = make_generators([(config.seed, _STEP_STREAM, self.step)])
        images = self.data.batch(self.step, config.batch_size, seed=config.seed, flip=config.flip)
        self.train_step(images, source)
        self.step += 1
        for name, average in self.averages.items():
            average.update(self.modules[name], self.step)

    def descend(self, name: str, loss: Tensor) -> None:
        """Take one optimiser step of module `name` on `loss`, a mean over pixels."""
        module, optimizer = self.modules[name], self.optimizers[name]
        value = float(loss.detach())
        if not torch.isfinite(loss.detach()):
            raise DivergenceError(f"loss of {name} is {value} at step {self.step}")
        self.sums.setdefault(name, []).append(value)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        project_gradients_(module)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * self.learning_rate()
        optimizer.step()
        constrain_weights_(module)

    def learning_rate(self) -> float:
        """Return the learning rate of the next step, before each module's own scale."""
        config = self.config
        rise = min((self.images_seen + config.batch_size) / max(config.warmup_images, 1), 1.0)
        return config.learning_rate * rise / math.sqrt(max(self.step / config.decay_steps, 1.0))

    def draw_t(self, source: torch.Generator) -> Tensor:
        """Draw the noise levels of a batch's losses, (B,)."""
        eps = torch.randn(self.config.batch_size, generator=source)
        return (self.config.t_mean + self.config.t_std * eps).exp()

    def averaged(self, name: str, std: float | None = None) -> nn.Module:
        """Return a copy of module `name` with averaged weights, ready for use.

        `std` is one of the configured relative stds; the smallest if None.
        """
        module = copy.deepcopy(self.averages[name].averages[std or min(self.config.ema_stds)])
        constrain_weights_(module)
        return module.eval()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            state |= {f"module.{name}.{k}": v for k, v in module.state_dict().items()}
        for name, average in self.averages.items():
            state |= {f"average.{name}.{k}": v for k, v in average.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, moments in optimizer.state_dict()["state"].items():
                state |= {f"optimizer.{name}.{index}.{k}": v for k, v in moments.items()}
        state = {key: value.detach().contiguous() for key, value in state.items()}
        header = {"step": str(self.step), "config": json.dumps(self.describe())}
        target = self.folder / CHECKPOINT
        temporary = target.with_suffix(".tmp")
        save_file(state, temporary, metadata=header)
        os.replace(temporary, target)  # noqa: PTH105 (Path.replace is the same call)

    def load(self) -> None:
        """Go on from the folder's checkpoint; CheckpointError if it does not fit."""
        path = self.folder / CHECKPOINT
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata()
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            step = int(header["step"])
            for name, module in self.modules.items():
                module.load_state_dict(_part(state, f"module.{name}."))
            for name, average in self.averages.items():
                average.load_state_dict(_part(state, f"average.{name}."))
            for name, optimizer in self.optimizers.items():
                moments: dict[int, dict[str, Tensor]] = {}
                for key, value in _part(state, f"optimizer.{name}.").items():
                    index, _, entry = key.partition(".")
                    moments.setdefault(int(index), {})[entry] = value
                full = optimizer.state_dict()
                optimizer.load_state_dict({"state": moments, "param_groups": full["param_groups"]})
        except Exception as error:
            raise CheckpointError(f"checkpoint {path} cannot be resumed: {error}") from error
        self.step = step

    def describe(self) -> dict[str, Any]:
        """Return the settings as saved with the run."""
        return {"kind": type(self).__name__, **self.config.to_dict()}

    def _open_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.json"
        mine = json.loads(json.dumps(self.describe()))
        if path.exists():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            # The length of a run may change; what it computes may not.
            changed = {k for k in mine | theirs if mine.get(k) != theirs.get(k)} - {"images"}
            if changed:
                raise ValueError(
                    f"folder {self.folder} holds a run with other settings: {sorted(changed)}"
                )
        path.write_text(json.dumps(mine, indent=1), encoding="utf-8")
        if self.step == 0 and (self.folder / CHECKPOINT).exists():
            self.load()

    def _statistics(self, speed: float) -> dict[str, float]:
        line: dict[str, float] = {"step": self.step, "images": self.images_seen}
        line |= {f"loss_{k}": sum(v) / len(v) for k, v in self.sums.items()}
        line |= {"learning_rate": self.learning_rate(), "images_per_second": round(speed, 2)}
        self.sums.clear()
        return line


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


class TeacherRun(Run[TeacherConfig]):
    """Training of a teacher: denoising with learned uncertainty weighting.

    Attributes:
        network: the teacher.
    """

    def __init__(
        self,
        config: TeacherConfig,
        data: TrainingData,
        folder: str | Path,
        *,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__(config, data, folder)
        torch.manual_seed(config.seed)
        self.network = network or Denoiser(config.network, sigma_data=config.sigma_data)
        self.add("teacher", self.network, average=True)

    def train_step(self, images: Tensor, source: torch.Generator) -> None:
        """Take one denoising step."""
        t = self.draw_t(source)
        eps = draw_normal(images, source)
        loss = denoising_loss(self.network, images, t, eps, sigma_data=self.config.sigma_data)
        self.descend("teacher", loss.mean())


class DistillRun(Run[DistillConfig]):
    """NCVSD distillation: score model, discriminator and generator, a step of each in turn.

    Args:
        config: the settings.
        data: the training images.
        folder: where the run lives; an existing run there is resumed.
        teacher: E[x0 | x] as `teacher(x, sigma)`; a `Denoiser` unless `networks` are given.
        networks: generator, score model and discriminator to start from, for teachers that are
            not a `Denoiser`; by default all start from the teacher's weights.

    The three steps share one batch of images, y and generated images: each step's loss is the
    same function of the same distribution, so each gradient has the mean that it would have on a
    batch of its own. They differ in t and eps.
    """

    def __init__(
        self,
        config: DistillConfig,
        data: TrainingData,
        folder: str | Path,
        teacher: UnconditionalDenoiser,
        *,
        networks: tuple[nn.Module, nn.Module, nn.Module] | None = None,
    ) -> None:
        super().__init__(config, data, folder)
        torch.manual_seed(config.seed)
        if networks is None:
            if not isinstance(teacher, Denoiser):
                raise TypeError("teacher must be a Denoiser unless networks are given")
            networks = _start_networks(config.kind, teacher)
        self.teacher = teacher
        if isinstance(teacher, Network):
            teacher.eval().requires_grad_(False).compute_dtype = config.compute_dtype
            if config.compile:
                teacher.compile()
        generator, score, self.discriminator = networks
        self.generator = cast("ConditionalDenoiser", generator)
        self.score = cast("ConditionalDenoiser", score)
        self.add("generator", generator, rate=config.generator_rate, average=True)
        self.add("score", score)
        self.add("discriminator", self.discriminator, rate=config.generator_rate)
        self._levels = torch.tensor(karras(config.num_levels, config.sigma_max, config.sigma_min))

    def train_step(self, images: Tensor, source: torch.Generator) -> None:
        """Take a step of the score model, of the discriminator and of the generator."""
        config = self.config
        picks = torch.randint(len(self._levels), (len(images),), generator=source)
        sigma = self._levels[picks]
        y = View(add_noise(images, sigma, draw_normal(images, source)), sigma)
        z = draw_normal(images, source)
        generated, sigma_hat = generate(self.generator, y, z, gamma=config.gamma)
        fake = generated.detach()
        adversarial = self.images_seen >= config.adversarial_images

        self.descend(
            "score",
            score_loss(
                self.score,
                fake,
                y,
                self.draw_t(source),
                draw_normal(images, source),
                sigma_data=config.sigma_data,
            ).mean(),
        )
        t = self.draw_t(source)
        eps = (draw_normal(images, source), draw_normal(images, source))
        if adversarial:
            real_loss, fake_loss = discriminator_losses(self.discriminator, images, fake, y, t, eps)
            self.descend("discriminator", (real_loss + fake_loss).mean() / 2)
        t, eps_x = self.draw_t(source), draw_normal(images, source)
        loss = distillation_loss(
            self.teacher,
            self.score,
            generated,
            self.generator.log_variance(sigma_hat),
            y,
            t,
            eps_x,
            sigma_data=config.sigma_data,
        ).mean()
        if adversarial:
            self.discriminator.requires_grad_(False)
            loss = loss + adversarial_loss(self.discriminator, generated, y, t, eps_x).mean()
            self.discriminator.requires_grad_(True)
        self.descend("generator", loss)


def _start_networks(kind: str, teacher: Denoiser) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return generator, score model and discriminator, all started from the teacher's weights."""
    if kind == "concat":
        return (
            ConcatDenoiser.from_teacher(teacher),
            ConcatDenoiser.from_teacher(teacher),
            ConcatDiscriminator.from_teacher(teacher),
        )
    return (
        ControlledDenoiser.from_teacher(teacher),
        ControlledDenoiser.from_teacher(teacher),
        ControlledDiscriminator.from_teacher(teacher),
    )
