"""NCVSD distillation of a teacher into a generative denoiser.

Source: Peng et al., arXiv 2506.09416.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ncvsd_inverse.networks import (
    ConcatDenoiser,
    ConcatDiscriminator,
    ControlledDenoiser,
    ControlledDiscriminator,
    Denoiser,
    Network,
)
from ncvsd_inverse.numerics import expand_level
from ncvsd_inverse.priors.registry import load_network
from ncvsd_inverse.schedules import karras
from ncvsd_inverse.training.config import DistillConfig
from ncvsd_inverse.training.data import TrainingData
from ncvsd_inverse.training.losses import (
    Observation,
    add_noise,
    adversarial_loss,
    discriminator_losses,
    distillation_loss,
    energy_loss,
    generate,
    score_loss,
    tempered_loss,
)
from ncvsd_inverse.training.teacher import check_same_networks
from ncvsd_inverse.training.trainer import Microbatch, Trainer, log_variance, with_labels

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "DistillationTrainer",
    "Draw",
    "temperatures",
]

MOST_TEMPERED = 1.25
"""Largest factor on z that is learned: above 1, for priors whose `noise_scale` widens draws."""


class Draw(NamedTuple):
    """What the generator drew for a microbatch."""

    u: Observation
    z: Tensor
    generated: Tensor
    sigma_hat: Tensor


class DistillationTrainer(Trainer[DistillConfig]):
    """NCVSD distillation: generator, score model and discriminator, a step of each in turn.

    The three steps share one batch of images, noisy images u and generated images; t and eps are
    drawn anew in each. Each step's loss is a function of (image, u, generated image) whose law
    is the same in all three, and the generator goes first: no network has then seen the batch
    before its own gradient is taken, so each gradient has the law that it would have on a batch
    of its own. Score model and discriminator see draws of the generator as it was before its
    step; with separate batches they would see those after.

    Args:
        config: the settings.
        data: the training images.
        folder: where the run lives; an existing run there is resumed.
        teacher: E[x0 | x] as `teacher(x, sigma)`; a `Denoiser` unless `networks` are given.
        networks: generator, score model and discriminator to start from, for teachers that are
            not a `Denoiser`; by default all start from the teacher's weights.
        accelerator: the processes and device to run on; None: accelerate's defaults.
        shard: whether the networks are spread over the processes (FSDP), see `Trainer`.

    Attributes:
        generator: the network that is distilled.

    Raises:
        TypeError: if `teacher` is no `Denoiser` and no networks are given.
        ValueError: if its shape is not the configured one; the fields that differ are named.
    """

    saved_as: ClassVar[str] = "DistillRun"

    def __init__(
        self,
        config: DistillConfig,
        data: TrainingData,
        folder: str | Path,
        teacher: Callable[..., Tensor],
        *,
        networks: tuple[nn.Module, nn.Module, nn.Module] | None = None,
        accelerator: "Accelerator | None" = None,
        shard: bool = False,
    ) -> None:
        super().__init__(config, data, folder, accelerator=accelerator, shard=shard)
        torch.manual_seed(config.seed)
        if networks is None:
            if not isinstance(teacher, Denoiser):
                raise TypeError("teacher must be a Denoiser unless networks are given")
            check_same_networks("teacher", teacher, config)
            networks = _start_networks(config, teacher)
            if config.init is not None and not self.has_checkpoint:
                _start_generator(networks[0], config)
        self._teacher_digest: str | None = None
        if isinstance(teacher, nn.Module) and self.accelerator.is_main_process:
            self._teacher_digest = _digest(teacher)  # before its weights are spread
        if isinstance(teacher, Network):
            self.add_frozen(teacher)
        self.teacher = teacher
        self.generator, self.score, self.discriminator = networks
        rate = config.generator_rate
        self._generator = self.add("generator", self.generator, rate=rate, average=True)
        self._score = self.add("score", self.score)
        self._discriminator = self.add("discriminator", self.discriminator, rate=rate)
        levels = karras(config.num_levels, config.sigma_max, config.sigma_min)
        self._levels = torch.tensor(levels, device=self.device, dtype=torch.float32)

    def digests(self) -> dict[str, str]:
        """Return the digests of the data and of the teacher's weights, if it is a module."""
        teacher = {} if self._teacher_digest is None else {"teacher_sha256": self._teacher_digest}
        return super().digests() | teacher

    def train_step(self, microbatches: list[Microbatch]) -> None:
        """Take a step of the generator, of the score model and of the discriminator."""
        if self.images_seen < self.config.energy_images:
            rate = self.config.energy_rate
            self.descend("generator", self._energy_losses(microbatches), rate=rate)
            return
        adversarial = self.images_seen >= self.config.adversarial_images
        # One microbatch keeps its graph for the generator's step; more are generated again.
        once = len(microbatches) == 1
        with torch.set_grad_enabled(once):
            draws = [self._draw(microbatch) for microbatch in microbatches]
        pairs = list(zip(microbatches, draws, strict=True))
        self.descend("generator", self._generator_losses(pairs, adversarial, once))
        self.descend("score", self._score_losses(pairs))
        if adversarial:
            self.descend("discriminator", self._discriminator_losses(pairs))

    def _draw(self, microbatch: Microbatch) -> Draw:
        """Draw a noise level and noise for each image and generate from its noisy observation."""
        images = microbatch.images
        places = microbatch.noise.uniform(images[:, 0, 0, 0]) * len(self._levels)
        sigma = self._levels[places.long().clamp(max=len(self._levels) - 1)]
        u = Observation(add_noise(images, sigma, microbatch.noise.normal(images)), sigma)
        return self._generate(microbatch, u, microbatch.noise.normal(images))

    def _generate(self, microbatch: Microbatch, u: Observation, z: Tensor) -> Draw:
        network = with_labels(self._generator, microbatch.labels)
        return Draw(u, z, *generate(network, u, z, gamma=self.config.gamma))

    def _score_losses(self, pairs: list[tuple[Microbatch, Draw]]) -> Iterator[Tensor]:
        for microbatch, draw in pairs:
            t = self.draw_t(microbatch)
            loss = score_loss(
                with_labels(self._score, microbatch.labels),
                log_variance(self.score, t),
                draw.generated.detach(),
                draw.u,
                t,
                microbatch.noise.normal(microbatch.images),
                sigma_data=self.config.sigma_data,
            )
            yield loss.flatten(1).mean(1)

    def _discriminator_losses(self, pairs: list[tuple[Microbatch, Draw]]) -> Iterator[Tensor]:
        for microbatch, draw in pairs:
            # Real and fake images go through together, so the labels are needed twice.
            labels = None if microbatch.labels is None else microbatch.labels.repeat(2, 1)
            real, fake = discriminator_losses(
                with_labels(self._discriminator, labels),
                microbatch.images,
                draw.generated.detach(),
                draw.u,
                self.draw_t(microbatch),
                (
                    microbatch.noise.normal(microbatch.images),
                    microbatch.noise.normal(microbatch.images),
                ),
            )
            yield (real + fake) / 2

    def _generator_losses(
        self, pairs: list[tuple[Microbatch, Draw]], adversarial: bool, once: bool
    ) -> Iterator[Tensor]:
        for microbatch, first in pairs:
            draw = first if once else self._generate(microbatch, first.u, first.z)
            t, eps = self.draw_t(microbatch), microbatch.noise.normal(microbatch.images)
            loss = distillation_loss(
                with_labels(self.teacher, microbatch.labels),
                with_labels(self.score, microbatch.labels),
                draw.generated,
                log_variance(self.generator, draw.sigma_hat),
                draw.u,
                t,
                eps,
                sigma_data=self.config.sigma_data,
            )
            loss = loss.flatten(1).mean(1)
            if adversarial:
                self.discriminator.requires_grad_(False)
                judge = with_labels(self.discriminator, microbatch.labels)
                loss = loss + adversarial_loss(judge, draw.generated, draw.u, t, eps)
                self.discriminator.requires_grad_(True)
            if self.config.energy_weight:
                loss = loss + self.config.energy_weight * self._energy(microbatch, draw)
            yield loss + self._tempered_loss(microbatch, draw)

    def _energy_losses(self, microbatches: list[Microbatch]) -> Iterator[Tensor]:
        for microbatch in microbatches:
            draw = self._draw(microbatch)
            yield self._energy(microbatch, draw) + self._tempered_loss(microbatch, draw)

    def _energy(self, microbatch: Microbatch, draw: Draw) -> Tensor:
        """Return the energy score of `draw` and another one against the true images, (b,)."""
        other = self._generate(microbatch, draw.u, microbatch.noise.normal(microbatch.images))
        return energy_loss(
            (draw.generated, other.generated),
            microbatch.images,
            draw.u.sigma,
            sigma_data=self.config.sigma_data,
        )

    def _tempered_loss(self, microbatch: Microbatch, draw: Draw) -> Tensor:
        """Return the weighted loss of `draw` tempered, (b,): half of them by 0; 0 if unweighted."""
        sigma = draw.u.sigma
        if not self.config.tempered_weight:
            return torch.zeros_like(sigma)
        half, place = microbatch.noise.uniform(sigma), microbatch.noise.uniform(sigma)
        temperature = temperatures(half, place)
        z = expand_level(temperature, draw.z) * draw.z
        loss = tempered_loss(
            self._generate(microbatch, draw.u, z).generated,
            draw.generated,
            microbatch.images,
            temperature,
            sigma,
            sigma_data=self.config.sigma_data,
        )
        return self.config.tempered_weight * loss


def _digest(module: nn.Module) -> str:
    """Return the SHA-256 of the names and values of a module's tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def temperatures(half: Tensor, place: Tensor) -> Tensor:
    """Turn uniform numbers (b,) into factors on z: 0 for half of them, else up to the most."""
    return torch.where(half < 0.5, 0.0, MOST_TEMPERED * place)


def _start_networks(
    config: DistillConfig, teacher: Denoiser
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return generator, score model and discriminator, all started from the teacher's weights."""
    if config.kind == "concat":
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


def _start_generator(generator: nn.Module, config: DistillConfig) -> None:
    """Fill the generator, in place, with the weights of the prior that the run starts from."""
    assert config.init is not None
    start = load_network(config.init)
    if type(start) is not type(generator):
        raise ValueError(
            f"init must be a distilled prior of kind {config.kind!r}, got {config.init}, "
            f"a {type(start).__name__}"
        )
    check_same_networks("init", start, config)
    generator.load_state_dict(start.state_dict())
