"""Training of a teacher by denoising."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.networks import Denoiser, Network, constrain_weights_
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.priors.registry import load_network
from ncvsd_inverse.training.checkpoint import read_checkpoint
from ncvsd_inverse.training.config import TeacherConfig, TrainConfig
from ncvsd_inverse.training.data import TrainingData
from ncvsd_inverse.training.losses import denoising_loss
from ncvsd_inverse.training.trainer import (
    CHECKPOINT,
    Microbatch,
    Trainer,
    log_variance,
    with_labels,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "TeacherTrainer",
    "check_same_networks",
    "load_teacher",
]

_DROPOUT_STREAM = 4


def load_teacher(source: str | Path) -> Denoiser:
    """Return a trained teacher, float32 on the CPU.

    Args:
        source: the folder of a teacher's run, whose shortest average is taken, or a name or path
            that `load_prior` accepts.

    Raises:
        ValueError: if it is neither, or no teacher.
        CheckpointError: if a file is damaged or does not fit.
    """
    folder = Path(source)
    if (folder / CHECKPOINT).is_file():
        state, header = read_checkpoint(folder / CHECKPOINT)
        settings = dict(header["config"])
        if settings.pop("run", None) != TeacherTrainer.saved_as:
            raise ValueError(f"teacher must be the folder of a teacher's run, got {source}")
        config = TeacherConfig.from_dict(settings)
        network: nn.Module = _new_teacher(config)
        prefix = f"average.teacher.{min(config.ema_stds)}."
        averages = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        try:
            network.load_state_dict(averages)
        except RuntimeError as error:
            raise CheckpointError(f"{folder / CHECKPOINT} does not fit: {error}") from error
        constrain_weights_(network)
    else:
        network = load_network(source)
    if not isinstance(network, Denoiser):
        raise ValueError(f"teacher must be a denoiser, got {type(network).__name__} in {source}")
    return network.eval()


def check_same_networks(name: str, network: Network, config: TrainConfig) -> None:
    """ValueError that lists what differs unless `network` is of the configured shape."""
    theirs = asdict(network.shape) | {
        "any_size": network.any_size,
        "sigma_data": network.sigma_data,
    }
    mine = asdict(config.network) | {"any_size": config.any_size, "sigma_data": config.sigma_data}
    differing = [f"{k} {theirs[k]}, not {mine[k]}" for k in theirs if mine[k] != theirs[k]]
    if differing:
        raise ValueError(f"{name} must have the configured networks, got {'; '.join(differing)}")


def _new_teacher(config: TeacherConfig) -> Denoiser:
    return Denoiser(
        config.network,
        sigma_data=config.sigma_data,
        any_size=config.any_size,
        dropout=config.dropout,
    )


class TeacherTrainer(Trainer[TeacherConfig]):
    """Training of a teacher: EDM's denoising loss with learned uncertainty weighting.

    Args:
        config: the settings.
        data: the training images.
        folder: where the run lives; an existing run there is resumed.
        network: the teacher to train; None: a `Denoiser` as configured.
        accelerator: the processes and device to run on; None: accelerate's defaults.
        shard: whether the network is spread over the processes (FSDP), see `Trainer`.

    Attributes:
        network: the teacher.

    Sources:
        Karras et al., arXiv 2206.00364 (loss) and 2312.02696 (uncertainty weighting).
    """

    saved_as: ClassVar[str] = "TeacherRun"

    def __init__(
        self,
        config: TeacherConfig,
        data: TrainingData,
        folder: str | Path,
        *,
        network: nn.Module | None = None,
        accelerator: "Accelerator | None" = None,
        shard: bool = False,
    ) -> None:
        super().__init__(config, data, folder, accelerator=accelerator, shard=shard)
        torch.manual_seed(config.seed)
        self.network = network or _new_teacher(config)
        if config.init is not None and not self.has_checkpoint:
            start = load_teacher(config.init)
            check_same_networks("init", start, config)
            self.network.load_state_dict(start.state_dict())
        self._network = self.add("teacher", self.network, average=True)

    def train_step(self, microbatches: list[Microbatch]) -> None:
        """Take one denoising step."""
        with self._seeded_dropout():
            self.descend("teacher", self._losses(microbatches))

    @contextmanager
    def _seeded_dropout(self) -> Iterator[None]:
        """Make what is dropped follow from seed, step and process, and leave no trace."""
        key = (self.config.seed, _DROPOUT_STREAM, self.step, self.accelerator.process_index)
        (source,) = make_generators([key])
        devices = [self.device] if self.device.type == "cuda" else []
        # Dropout draws from the random state that all share, and takes no generator.
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(source.initial_seed())
            yield

    def _losses(self, microbatches: list[Microbatch]) -> Iterator[Tensor]:
        for microbatch in microbatches:
            t = self.draw_t(microbatch)
            loss = denoising_loss(
                with_labels(self._network, microbatch.labels),
                log_variance(self.network, t),
                microbatch.images,
                t,
                microbatch.noise.normal(microbatch.images),
                sigma_data=self.config.sigma_data,
            )
            yield loss.flatten(1).mean(1)
