"""The engine of a training run: batches, optimisers, averages, checkpoints, processes, statistics.

Everything random in step n follows from the seed, n and the place of the image in the batch, so a
run that is stopped and resumed, or spread over more processes, takes the same steps.
"""

import copy
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from ncvsd_inverse.errors import CheckpointError, DivergenceError
from ncvsd_inverse.files import write_whole
from ncvsd_inverse.machine import extra
from ncvsd_inverse.networks import Network, UNetShape, constrain_weights_, project_gradients_
from ncvsd_inverse.numerics import draw_normal, local_part, make_generators
from ncvsd_inverse.training.checkpoint import read_checkpoint, write_checkpoint
from ncvsd_inverse.training.config import TrainConfig
from ncvsd_inverse.training.data import Batch, DigestedData, TrainingData
from ncvsd_inverse.training.ema import PowerEMA, combination_weights
from ncvsd_inverse.training.sharding import (
    average_whole_gradients_,
    gather,
    make_hollow,
    make_mesh,
    optimizer_groups,
    shard_,
    share_first_,
    split_like,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "CHECKPOINT",
    "INPUTS",
    "LOG",
    "Config",
    "Microbatch",
    "Noise",
    "Trainer",
    "log_variance",
    "with_labels",
]

Config = TypeVar("Config", bound=TrainConfig)

CHECKPOINT = "state.safetensors"
LOG = "log.jsonl"
SNAPSHOTS = "snapshots"
SETTINGS = "config.json"
MOST_SKIPS = 20
"""Steps in a row without a finite loss after which a run stops."""

INPUTS = "inputs"
"""Key, in a run's settings, of the digests of what it was given."""

_NOISE_STREAM = 2


class Noise:
    """The random numbers of a microbatch, a generator an image."""

    def __init__(self, seed: int, places: range, device: torch.device) -> None:
        self.generators = make_generators([(seed, _NOISE_STREAM, p) for p in places], device)

    def normal(self, like: Tensor) -> Tensor:
        """Draw standard normals of the shape of `like`, (B, ...)."""
        return draw_normal(like, self.generators)

    def uniform(self, like: Tensor) -> Tensor:
        """Draw numbers in [0, 1) of the shape of `like`, (B,)."""
        out = torch.empty_like(like)
        for item, source in zip(out, self.generators, strict=True):
            item.uniform_(generator=source)
        return out


class Microbatch:
    """One pass's share of a batch: images (b, C, H, W), labels (b, K) or None, and noise."""

    def __init__(self, batch: Batch, noise: Noise) -> None:
        self.images = batch.images
        self.labels = batch.labels
        self.noise = noise


def with_labels(network: Callable[..., Tensor], labels: Tensor | None) -> Callable[..., Tensor]:
    """Return `network` with the labels (B, K) filled in; itself without labels."""
    return network if labels is None else partial(network, labels=labels)


def log_variance(module: nn.Module, sigma: Tensor) -> Tensor:
    """Return the learned log variance of a denoiser at levels (B,), shape (B, 1, 1, 1)."""
    head: Callable[[Tensor], Tensor] = module.log_variance  # type: ignore[assignment]
    return head(sigma)


class Trainer(ABC, Generic[Config]):
    """One training run in one folder, on one process or many.

    The folder holds `config.json` (settings, and digests of what the run was given), `log.jsonl`
    (a line of statistics every so often, and one wherever the run was resumed),
    `state.safetensors` (everything needed to go on) and `snapshots/` (averages of the weights,
    from which averages of other lengths are made afterwards).

    Args:
        config: the settings.
        data: the training images; of fewer classes than the network takes, or as many.
        folder: where the run lives; an existing run there is resumed.
        accelerator: the processes and device to run on; None: one made with its defaults, which
            follow `accelerate launch` or `torchrun`.
        shard: whether weights, gradients, averages and optimiser states are spread over the
            processes (FSDP) instead of repeated in each (DDP); `accelerate launch --use_fsdp`
            asks for it too. Files are the same either way.

    Raises:
        ValueError: if the batch cannot be shared among the processes, or the data have more
            classes than the network.
    """

    saved_as: ClassVar[str]
    """Name of the kind of run in its files."""

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        folder: str | Path,
        *,
        accelerator: "Accelerator | None" = None,
        shard: bool = False,
    ) -> None:
        with extra("train"):
            from accelerate import Accelerator
            from accelerate.utils import parse_flag_from_env

        self.config = config
        self.data = data
        self.folder = Path(folder)
        # Precision is the networks' own affair: accelerate is to leave dtypes alone.
        self.accelerator = accelerator or Accelerator(
            mixed_precision="no", cpu=not torch.cuda.is_available()
        )
        self.device: torch.device = self.accelerator.device
        self.step = 0
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Adam] = {}
        self.averages: dict[str, PowerEMA] = {}
        self.skipped: dict[str, int] = {}
        self._rates: dict[str, float] = {}
        self._skips_in_row: dict[str, int] = {}
        self._sums: dict[str, list[float]] = {}
        self._hollow: dict[str, nn.Module] = {}
        self._is_open = False
        classes = config.network.num_classes
        if classes and data.num_classes > classes:
            raise ValueError(
                f"data must have at most {classes} classes (network.num_classes), "
                f"got {data.num_classes}"
            )
        processes = self.accelerator.num_processes
        if config.batch_size % processes:
            raise ValueError(
                f"batch_size must be a multiple of the number of processes, {processes}, "
                f"got {config.batch_size}"
            )
        # The flag is how accelerate's launcher and configuration ask, on any device.
        shard = (shard or parse_flag_from_env("ACCELERATE_USE_FSDP")) and processes > 1
        self._mesh = make_mesh(self.device, processes) if shard else None

    def add(
        self, name: str, module: nn.Module, *, rate: float = 1.0, average: bool = False
    ) -> Callable[..., Tensor]:
        """Register a module to train; return it ready for passes whose gradients are wanted.

        Args:
            name: its name in logs and checkpoints.
            module: as initialised; moved to the run's device.
            rate: scale of its learning rate.
            average: whether its averages are kept.
        """
        if isinstance(module, Network):
            module.compute_dtype = self.config.compute_dtype
        module.to(self.device).train()
        constrain_weights_(module)
        self.modules[name] = module
        self._rates[name] = rate
        self.skipped[name] = self._skips_in_row[name] = 0
        if self._mesh is not None:
            share_first_(module)
        if average:
            self.averages[name] = PowerEMA(module, self.config.ema_stds)
        ready: Callable[..., Tensor] = module
        if self._mesh is None:
            if self.config.compile:
                module.compile()
            ready = self.accelerator.prepare_model(module)
        else:
            self._hollow[name] = make_hollow(module)
            for twin in self.averages[name].averages.values() if average else ():
                shard_(twin, self._mesh)
            shard_(module, self._mesh, compiles=self.config.compile)
        groups = module.parameters() if self._mesh is None else optimizer_groups(module)
        self.optimizers[name] = torch.optim.Adam(groups, betas=self.config.betas)
        return ready

    def add_frozen(self, network: Network) -> None:
        """Make a network that is not trained ready for passes, in place."""
        network.to(self.device).eval().requires_grad_(False)
        network.compute_dtype = self.config.compute_dtype
        if self._mesh is not None:
            shard_(network, self._mesh, compiles=self.config.compile)
        elif self.config.compile:
            network.compile()

    @abstractmethod
    def train_step(self, microbatches: list[Microbatch]) -> None:
        """Take one step of every module on this process's share of a batch."""

    @property
    def has_checkpoint(self) -> bool:
        """Whether the folder holds a run to go on with."""
        return (self.folder / CHECKPOINT).is_file()

    @property
    def images_seen(self) -> int:
        """Training images seen so far."""
        return self.step * self.config.batch_size

    def run(
        self,
        *,
        seconds: float = math.inf,
        checkpoint_every: int = 200,
        snapshot_every: int = 1000,
        log_every: int = 20,
        on_log: Callable[[dict[str, float]], None] | None = None,
        on_checkpoint: Callable[[], None] | None = None,
    ) -> bool:
        """Train until the configured number of images, or for about `seconds`.

        Args:
            seconds: wall time after which to stop at a checkpoint.
            checkpoint_every: steps between checkpoints.
            snapshot_every: steps between stored averages.
            log_every: steps between lines of the log.
            on_log: called on the main process with each line.
            on_checkpoint: called on the main process after each checkpoint, and for that from
                which the run goes on: it may have been stopped in between.

        Returns:
            True if the run has reached its number of images.

        Raises:
            ValueError: as `opened` does.
            DivergenceError: after `MOST_SKIPS` steps in a row without a finite loss; the last
                checkpoint stays.
        """
        with self.opened():
            return self._run(
                seconds, checkpoint_every, snapshot_every, log_every, on_log, on_checkpoint
            )

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder against other processes, and go on from its checkpoint if it has one.

        `run` does so by itself. What is done with the folder before or after it, such as writing
        a prior, can be done within the same context.

        Raises:
            ValueError: if another process holds the folder, or it holds a run on other data, of
                another teacher or with other settings; the message says what differs.
            CheckpointError: if its checkpoint is damaged.
        """
        if self._is_open:
            yield
            return
        with self._alone():
            self._open_folder()
            self._is_open = True
            try:
                yield
            finally:
                self._is_open = False

    def _run(
        self,
        seconds: float,
        checkpoint_every: int,
        snapshot_every: int,
        log_every: int,
        on_log: Callable[[dict[str, float]], None] | None,
        on_checkpoint: Callable[[], None] | None,
    ) -> bool:
        def tell() -> None:
            if on_checkpoint and self.accelerator.is_main_process:
                on_checkpoint()

        if 0 < self.images_seen < self.config.images:
            tell()
        started = ticked = time.monotonic()
        last = self.step
        batches = self._batches()
        while self.images_seen < self.config.images:
            if self._agree(time.monotonic() - started >= seconds):
                break
            self.advance(next(batches))
            if self.step % log_every == 0:
                now = time.monotonic()
                seen = (self.step - last) * self.config.batch_size
                self._log(seen / (now - ticked), on_log)
                ticked, last = now, self.step
            if self.step % snapshot_every == 0:
                self._snapshot()
            if self.step % checkpoint_every == 0 and self.images_seen < self.config.images:
                self.save()
                tell()
        self.save()
        tell()
        return self.images_seen >= self.config.images

    def advance(self, batch: Batch) -> None:
        """Take one iteration: a step of every module, then of the averages.

        Args:
            batch: this process's rows of a batch.
        """
        self.train_step(self._microbatches(batch))
        self.step += 1
        for name, average in self.averages.items():
            average.update(self.modules[name], self.step)

    def descend(self, name: str, losses: Iterator[Tensor], *, rate: float | None = None) -> None:
        """Take one optimiser step of module `name`.

        Args:
            name: the module.
            losses: for each microbatch its losses, one an image, shape (b,); each is computed
                when asked for, so that one graph is alive at a time.
            rate: scale of the learning rate, if not the module's own.
        """
        module, optimizer, config = self.modules[name], self.optimizers[name], self.config
        processes = self.accelerator.num_processes
        # Processes average their gradients: so scaled, the sum is that of one process.
        scale = config.loss_scale * processes / config.batch_size
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for loss in losses:
            total += loss.detach().double().sum()
            torch.autograd.backward(loss.sum() * scale)
        if self._mesh is not None:
            average_whole_gradients_(module, self.accelerator)
        gradients = [local_part(p.grad) for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # All processes must see the same figures, or some would skip a step that others take.
        figures = self.accelerator.reduce(torch.stack([total, norm.double()]), "sum").tolist()
        value = figures[0] / config.batch_size
        if not all(math.isfinite(figure) for figure in figures):
            self._skip(name, value)
            return
        self._skips_in_row[name] = 0
        self._sums.setdefault(name, []).append(value)
        if config.loss_scale != 1:
            torch._foreach_div_(gradients, config.loss_scale)
        project_gradients_(module)
        for group in optimizer.param_groups:
            group["lr"] = (rate or self._rates[name]) * self.learning_rate()
        optimizer.step()
        constrain_weights_(module)

    def learning_rate(self) -> float:
        """Return the learning rate of the next step, before each module's own scale."""
        config = self.config
        rise = min((self.images_seen + config.batch_size) / max(config.warmup_images, 1), 1.0)
        return config.learning_rate * rise / math.sqrt(max(self.step / config.decay_steps, 1.0))

    def draw_t(self, microbatch: Microbatch) -> Tensor:
        """Draw the noise levels of a microbatch's losses, (b,)."""
        eps = microbatch.noise.normal(microbatch.images[:, 0, 0, 0])
        return (self.config.t_mean + self.config.t_std * eps).exp()

    def averaged(self, name: str, std: float | None = None) -> nn.Module:
        """Return a copy of module `name` with averaged weights, ready for use.

        Where weights are spread over processes, no process has them all: the average is then that
        of the last checkpoint.

        Args:
            name: the module.
            std: relative std of the average, in (0, 0.2887): a configured one, or any other,
                which is put together from the snapshots; the smallest configured if None.

        Raises:
            CheckpointError: if `std` is not configured and the run has no snapshots, or if weights
                are spread and it has no checkpoint.
        """
        configured = self.averages[name].averages
        std = min(configured) if std is None else std
        if self._mesh is not None:
            module = copy.deepcopy(self._hollow[name])
            stored = self._stored if std in configured else self._combined
            module.load_state_dict(stored(name, std), assign=True)
            module.to(self.device)
        elif std in configured:
            module = copy.deepcopy(configured[std])
        else:
            module = copy.deepcopy(configured[min(configured)])
            module.load_state_dict(self._combined(name, std))
        constrain_weights_(module)
        return module.eval()

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = _prefixed("module", {k: m.state_dict() for k, m in self.modules.items()})
        state |= _prefixed("average", {k: a.state_dict() for k, a in self.averages.items()})
        for name, module in self.modules.items():
            moments = self.optimizers[name].state
            numbered = {i: moments.get(p, {}) for i, p in enumerate(module.parameters())}
            state |= _prefixed(f"optimizer.{name}", numbered)
        state = self._whole(state)
        if self.accelerator.is_main_process:
            header = {"step": self.step, "skipped": self.skipped, "config": self.describe()}
            header["losses"] = self._sums  # of the steps since the last line of the log
            write_checkpoint(self.folder / CHECKPOINT, state, header)
        self.accelerator.wait_for_everyone()

    def load(self) -> None:
        """Go on from the folder's checkpoint; CheckpointError if it does not fit."""
        path = self.folder / CHECKPOINT
        state, header = read_checkpoint(path)
        try:
            for name, module in self.modules.items():
                stored = _part(state, f"module.{name}.")
                module.load_state_dict(split_like(stored, module.state_dict()))
                _load_moments(self.optimizers[name], module, _part(state, f"optimizer.{name}."))
            for name, average in self.averages.items():
                stored = _part(state, f"average.{name}.")
                average.load_state_dict(split_like(stored, average.state_dict()))
            self.step = int(header["step"])
            self.skipped = {name: int(header["skipped"][name]) for name in self.modules}
            self._sums = {k: list(map(float, v)) for k, v in header.get("losses", {}).items()}
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint {path} does not fit the run: {error}") from error

    def describe(self) -> dict[str, Any]:
        """Return the settings as saved with the run."""
        return {"run": self.saved_as, **self.config.to_dict()}

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of what the run is given, by name, as far as it is known."""
        return {"data_sha256": self.data.digest} if isinstance(self.data, DigestedData) else {}

    def _batches(self) -> Iterator[Batch]:
        """Return this process's rows of every batch from the current step on."""
        share = self.config.batch_size // self.accelerator.num_processes
        first = self.accelerator.process_index * share
        return self.data.batches(
            self.step,
            self.config.batch_size,
            seed=self.config.seed,
            rows=slice(first, first + share),
        )

    def _microbatches(self, batch: Batch) -> list[Microbatch]:
        """Cut this process's share of a batch into microbatches."""
        config, share = self.config, len(batch.images)
        first = self.step * config.batch_size + self.accelerator.process_index * share
        most = config.microbatch or share
        microbatches = []
        for start in range(0, share, most):
            rows = slice(start, min(start + most, share))
            places = range(first + rows.start, first + rows.stop)
            labels = None
            if batch.labels is not None:
                # Data of fewer classes than the network takes use the first ones.
                room = max(config.network.num_classes - batch.labels.shape[1], 0)
                labels = torch.nn.functional.pad(batch.labels[rows], (0, room)).to(self.device)
            part = Batch(batch.images[rows].to(self.device), labels)
            microbatches.append(Microbatch(part, Noise(config.seed, places, self.device)))
        return microbatches

    def _agree(self, stops: bool) -> bool:
        """Tell whether any process wants to stop, so that all stop at the same step."""
        if self.accelerator.num_processes == 1:
            return stops
        votes = self.accelerator.reduce(torch.tensor(float(stops), device=self.device), "sum")
        return float(votes) > 0

    def _skip(self, name: str, value: float) -> None:
        self.skipped[name] += 1
        self._skips_in_row[name] += 1
        if self._skips_in_row[name] >= MOST_SKIPS:
            raise DivergenceError(
                f"loss or gradient of the {name} was not finite for {MOST_SKIPS} steps in a row, "
                f"the last loss {value} at step {self.step}; the last checkpoint in {self.folder} "
                "is kept"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out; the system lets go of the lock of a process that ends."""
        if not self.accelerator.is_main_process:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"folder must be one that no other process trains in, got {self.folder}"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _open_folder(self) -> None:
        if self.accelerator.is_main_process:
            self._check_settings()
        self.accelerator.wait_for_everyone()
        resumes = self.step == 0 and self.has_checkpoint
        if resumes:
            self.load()
        if self.accelerator.is_main_process:
            for torn in self.folder.rglob(".*.part"):  # of a run that was killed as it wrote
                torn.unlink()
            self._forget_lines_after_checkpoint()
            if resumes and 0 < self.images_seen < self.config.images:
                self._write_line({"step": self.step, "images": self.images_seen, "resumed": True})

    def _check_settings(self) -> None:
        """Write settings and digests; ValueError if the folder is of a run with others."""
        path = self.folder / SETTINGS
        mine = json.loads(json.dumps({**self.describe(), INPUTS: self.digests()}))
        if path.exists():
            theirs = self.config.defaults() | _read_settings(path)
            theirs["network"] = _network_as_built(theirs.get("network"))
            # Of runs from before there were digests, and of data that have none, nothing is known.
            mine[INPUTS] = theirs.setdefault(INPUTS, {}) | mine[INPUTS]
            theirs[INPUTS] = mine[INPUTS] | theirs[INPUTS]
            if changed := _differences(theirs, mine):
                raise ValueError(
                    f"folder {self.folder} holds a run with other settings: {'; '.join(changed)}"
                    + (
                        f"; to go on all the same, remove {INPUTS!r} from {path}"
                        if theirs[INPUTS] != mine[INPUTS]
                        else ""
                    )
                )
        write_whole(path, json.dumps(mine, indent=1) + "\n")

    def _forget_lines_after_checkpoint(self) -> None:
        """Drop log lines of steps that will be taken again."""
        path = self.folder / LOG
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= self.step:
                    kept.append(line + "\n")
            except ValueError:  # the line that was being written when the run was killed
                continue
        write_whole(path, "".join(kept))

    def _log(self, speed: float, on_log: Callable[[dict[str, float]], None] | None) -> None:
        line: dict[str, float] = {"step": self.step, "images": self.images_seen}
        line |= {f"loss_{name}": sum(v) / len(v) for name, v in self._sums.items()}
        line |= {f"skipped_{name}": count for name, count in self.skipped.items() if count}
        line |= {"learning_rate": self.learning_rate(), "images_per_second": round(speed, 2)}
        self._sums.clear()
        if self.accelerator.is_main_process:
            self._write_line(line)
            if on_log:
                on_log(line)

    def _write_line(self, line: Mapping[str, object]) -> None:
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def _snapshot(self) -> None:
        averages = {name: average.state_dict() for name, average in self.averages.items()}
        state = self._whole(_prefixed("average", averages))
        if self.accelerator.is_main_process and averages:
            (self.folder / SNAPSHOTS).mkdir(exist_ok=True)
            write_checkpoint(
                self.folder / SNAPSHOTS / f"{self.step:08d}.safetensors",
                {k: v.half() for k, v in state.items()},
                {"step": self.step},
            )

    def _whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return named tensors as one process alone would hold them, on the main process."""
        if self._mesh is None:
            return state
        return gather(state, keep=self.accelerator.is_main_process)

    def _stored(self, name: str, std: float) -> dict[str, Tensor]:
        """Return the state of module `name` averaged with a configured std, from the checkpoint."""
        state, _ = read_checkpoint(self.folder / CHECKPOINT)
        return _part(state, f"average.{name}.{std}.")

    def _combined(self, name: str, std: float) -> dict[str, Tensor]:
        """Return the state of module `name` averaged with another std, from the snapshots."""
        paths = sorted((self.folder / SNAPSHOTS).glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{self.folder / SNAPSHOTS} must hold snapshots for std {std}")
        stored = [
            (step, known, _part(state, f"average.{name}.{known}."))
            for state, step in ((s, int(h["step"])) for s, h in map(read_checkpoint, paths))
            for known in self.config.ema_stds
        ]
        weights = combination_weights(
            [step for step, _, _ in stored],
            [known for _, known, _ in stored],
            max(step for step, _, _ in stored),
            std,
        )
        combined = dict(self.modules[name].state_dict())
        for key, _ in self.modules[name].named_parameters():
            parts = torch.stack([state[key].float() for _, _, state in stored])
            combined[key] = torch.tensordot(parts.new_tensor(weights), parts, dims=1)
        return combined


def _read_settings(path: Path) -> dict[str, Any]:
    """Return the settings that a run wrote; ValueError if the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be the settings of a run: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get(INPUTS, {}), dict):
        raise ValueError(f"{path} must be the settings of a run, got other JSON")
    return found


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """Return what differs between the settings of a run before and now, each in a few words."""
    if theirs.get("run") != mine["run"]:
        return [f"run was {theirs.get('run')} and is {mine['run']}"]
    # How long and in what pieces a run computes may change; what it computes may not.
    before, now = (
        {k: v for k, v in _flat(settings).items() if k not in ("images", "microbatch", "compile")}
        for settings in (theirs, mine)
    )
    return [
        f"{name.removeprefix(INPUTS + '.')} was {before.get(name)} and is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings with those within others named OUTER.INNER."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _network_as_built(entries: object) -> object:
    """Return the shape of a network as a run saves it today, from what an older one saved."""
    if not isinstance(entries, dict):
        return entries
    lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entries.items()}
    try:
        return json.loads(json.dumps(asdict(UNetShape(**lists))))
    except (TypeError, ValueError):
        return entries


def _load_moments(
    optimizer: torch.optim.Optimizer, module: nn.Module, state: Mapping[str, Tensor]
) -> None:
    """Restore the state of each parameter of `module`, named by its number."""
    optimizer.state.clear()
    for index, parameter in enumerate(module.parameters()):
        moments = _part(state, f"{index}.")
        like = {entry: parameter.detach() for entry in moments if entry != "step"}
        parts = split_like(moments, like)
        for entry in like:
            parts[entry] = torch.empty_like(like[entry]).copy_(parts[entry])
        if parts:
            optimizer.state[parameter] = parts


def _prefixed(prefix: str, groups: Mapping[Any, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}.{key}": value
        for name, group in groups.items()
        for key, value in group.items()
    }


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
