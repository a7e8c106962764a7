"""What the trainer saves against a plain loop over the same networks, losses and batch size.

    python benchmarks/training.py [--preset faces64] [--batch 32] [--repeats 5] [--out figures.json]

Prints images a second and peak memory of a distillation's three steps (score model, discriminator,
generator) and of its whole iteration: of `DistillationTrainer` in float32 and in bfloat16, compiled
and not, and of a plain loop, which is written below: a fresh batch for each step, float32, not
compiled, every weight normalised within autograd at every forward pass, as EDM2's equations say.
(The published code also overwrites the stored weights in each training pass; that is left out,
which favours the plain loop.) Neither has the energy score that some presets add. Times are medians
of iterations taken in turn in one process. Memory is the peak over what the process held before its
networks were made, each way in a fresh process: resident memory on a CPU, allocated memory on a
GPU.

The trainer's steps share, in each iteration, one batch of images, the noisy images u and the images
that the generator draws from y: two of three generator passes and two of three batches are saved.
The noise levels t and the noise of each loss are drawn anew. Each loss is a function of (image, y,
generated image), whose law is the same in all three steps, and the generator goes first, so that no
network has seen the batch before its own gradient is taken: each gradient has the law that it would
have on a batch of its own. (Score model and discriminator see the generator of one step before.)
Two more savings change nothing: weights are normalised once a
step and gradients projected, which gives the gradients of normalising at each pass; real and fake
images go through the discriminator together.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from ncvsd_inverse.machine import PeakMemory, time_now
from ncvsd_inverse.networks import (
    ConcatDenoiser,
    ConcatDiscriminator,
    ControlledDenoiser,
    ControlledDiscriminator,
    Denoiser,
    inference_dtype,
)
from ncvsd_inverse.networks.edm2_layers import MPConv
from ncvsd_inverse.schedules import karras
from ncvsd_inverse.training import DistillationTrainer, DistillConfig, ImageData
from ncvsd_inverse.training.data import Batch
from ncvsd_inverse.training.losses import (
    Observation,
    add_noise,
    adversarial_loss,
    distillation_loss,
    generate,
    score_loss,
)
from ncvsd_inverse.training.presets import list_presets, load_distill_config

Network = TypeVar("Network", bound=nn.Module)

STEPS = ("score", "discriminator", "generator")
ITERATION = "iteration"
PLAIN = "plain"
OURS: dict[str, tuple[Literal["float32", "bfloat16"], bool]] = {
    "float32": ("float32", False),
    "float32 compiled": ("float32", True),
    "bfloat16": ("bfloat16", False),
    "bfloat16 compiled": ("bfloat16", True),
}
"""Precision of our ways to train, and whether the networks are compiled."""

GOALS = (
    "goals over the plain loop: on a CPU with AMX 4 times in bfloat16 and 1.3 times in float32, "
    "on a GPU 2 times in bfloat16 compiled"
)
SHARED = (
    "shared between the trainer's three steps: one batch, y and the images generated from it; t "
    "and noise are drawn anew, and with the networks given each gradient keeps its law"
)


class Meter:
    """Seconds and peak memory of the parts of an iteration; parts do not nest."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}
        self.peaks: dict[str, int] = {}
        self.memory = PeakMemory(device)
        self._floor = self.memory.held()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure one part."""
        self._note(ITERATION)
        self.memory.reset()
        started = time_now(self.device)
        yield
        self.seconds.setdefault(name, []).append(time_now(self.device) - started)
        self._note(name)
        self._note(ITERATION)

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Measure a whole iteration, whose parts are measured within."""
        self.memory.reset()
        started = time_now(self.device)
        yield
        self.seconds.setdefault(ITERATION, []).append(time_now(self.device) - started)
        self._note(ITERATION)

    def clear(self) -> None:
        """Forget what was measured while warming up."""
        self.seconds.clear()
        self.peaks.clear()

    def _note(self, name: str) -> None:
        peak = self.memory.peak() - self._floor
        self.peaks[name] = max(peak, self.peaks.get(name, 0))


class MeteredTrainer(DistillationTrainer):
    """The trainer, whose steps are measured."""

    meter: Meter

    def descend(self, name: str, losses: Iterator[Tensor], *, rate: float | None = None) -> None:
        """Take one optimiser step of module `name`."""
        with self.meter.part(name):
            super().descend(name, losses, rate=rate)


class UnitFilters(nn.Module):
    """EDM2's normalised weight: w / (eps + |w| / sqrt(n)), every filter of n numbers by itself."""

    def forward(self, weight: Tensor) -> Tensor:
        """Normalise `weight`, (filters, ...)."""
        dims = tuple(range(1, weight.ndim))
        norm = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
        out: Tensor = weight / (1e-4 + norm / weight[0].numel() ** 0.5)
        return out


def normalised(network: Network) -> Network:
    """Let every layer of `network` normalise its weight whenever it is used."""
    for layer in [m for m in network.modules() if isinstance(m, MPConv)]:
        register_parametrization(layer, "weight", UnitFilters())
    return network


class PlainLoop:
    """The three steps as one writes them from the paper, nothing shared."""

    def __init__(
        self,
        config: DistillConfig,
        batches: Iterator[Batch],
        teacher: Denoiser,
        meter: Meter,
    ) -> None:
        self.config, self.batches, self.meter = config, batches, meter
        denoiser, discriminator = (
            (ConcatDenoiser, ConcatDiscriminator)
            if config.kind == "concat"
            else (ControlledDenoiser, ControlledDiscriminator)
        )
        device = meter.device
        self.generator = normalised(denoiser.from_teacher(teacher)).to(device)
        self.score = normalised(denoiser.from_teacher(teacher)).to(device)
        self.discriminator = normalised(discriminator.from_teacher(teacher)).to(device)
        self.teacher = normalised(teacher.requires_grad_(False)).to(device)
        self.averages = [copy.deepcopy(self.generator) for _ in config.ema_stds]
        self.optimizers = {
            name: torch.optim.Adam(getattr(self, name).parameters(), betas=config.betas)
            for name in STEPS
        }
        levels = karras(config.num_levels, config.sigma_max, config.sigma_min)
        self.levels = torch.tensor(levels, device=device)

    def iterate(self) -> None:
        """Take one step of each network."""
        for name, loss in (
            ("score", self.score_loss),
            ("discriminator", self.discriminator_loss),
            ("generator", self.generator_loss),
        ):
            with self.meter.part(name):
                self.discriminator.requires_grad_(name == "discriminator")
                optimizer = self.optimizers[name]
                optimizer.zero_grad()
                torch.autograd.backward(loss())
                optimizer.param_groups[0]["lr"] = 1e-4
                optimizer.step()
        with torch.no_grad():
            for average in self.averages:
                pairs = zip(average.parameters(), self.generator.parameters(), strict=True)
                for mean, value in pairs:
                    mean.lerp_(value, 0.01)

    def draw(self) -> tuple[Tensor, Observation, Tensor]:
        """Return a fresh batch of images, their noisy versions, and noise levels t, (B,)."""
        images = next(self.batches).images.to(self.meter.device)
        picks = torch.randint(len(self.levels), (len(images),), device=images.device)
        sigma = self.levels[picks]
        t = (self.config.t_mean + self.config.t_std * torch.randn_like(sigma)).exp()
        return images, Observation(add_noise(images, sigma, torch.randn_like(images)), sigma), t

    def generate(self, y: Observation) -> tuple[Tensor, Tensor]:
        """Return images generated from `y` and the levels (B,) the network was called with."""
        z = torch.randn_like(y.image)
        return generate(self.generator, y, z, gamma=self.config.gamma)

    def score_loss(self) -> Tensor:
        """Return the score model's loss on a fresh batch."""
        images, y, t = self.draw()
        with torch.no_grad():
            generated, _ = self.generate(y)
        log_variance, eps = self.score.log_variance(t), torch.randn_like(images)
        loss = score_loss(
            self.score, log_variance, generated, y, t, eps, sigma_data=self.config.sigma_data
        )
        return loss.mean()

    def discriminator_loss(self) -> Tensor:
        """Return the discriminator's loss on a fresh batch: one pass for real, one for fake."""
        images, y, t = self.draw()
        with torch.no_grad():
            generated, _ = self.generate(y)
        real, fake = (add_noise(x, t, torch.randn_like(x)) for x in (images, generated))
        real_loss = nn.functional.softplus(-self.discriminator(real, t, *y))
        fake_loss = nn.functional.softplus(self.discriminator(fake, t, *y))
        return (real_loss + fake_loss).mean() / 2

    def generator_loss(self) -> Tensor:
        """Return the generator's loss on a fresh batch."""
        images, y, t = self.draw()
        generated, sigma_hat = self.generate(y)
        log_variance, eps = self.generator.log_variance(sigma_hat), torch.randn_like(images)
        loss = distillation_loss(
            self.teacher,
            self.score,
            generated,
            log_variance,
            y,
            t,
            eps,
            sigma_data=self.config.sigma_data,
        )
        return loss.mean() + adversarial_loss(self.discriminator, generated, y, t, eps).mean()


@dataclass(frozen=True)
class Way:
    """One way to train, ready to take iterations."""

    iterate: Callable[[], None]
    meter: Meter


def make_way(name: str, config: DistillConfig, device: torch.device, folder: Path) -> Way:
    """Return the way `name` of training from random networks on random images."""
    meter = Meter(device)
    shape = config.network
    torch.manual_seed(0)
    teacher = Denoiser(shape, sigma_data=config.sigma_data, any_size=config.any_size)
    size = (256, shape.image_channels, shape.resolution, shape.resolution)
    data = ImageData(torch.randint(0, 256, size, dtype=torch.uint8))
    batches = data.batches(0, config.batch_size, seed=0)
    if name == PLAIN:
        return Way(PlainLoop(config, batches, teacher, meter).iterate, meter)
    precision, compiled = OURS[name]
    config = replace(config, precision=precision, compile=compiled)
    run = MeteredTrainer(config, data, folder / name, teacher)
    run.meter = meter
    return Way(lambda: run.advance(next(batches)), meter)


def processor() -> str:
    """Return the name of the CPU, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def iterate(way: Way) -> None:
    """Take one measured iteration."""
    with way.meter.iteration():
        way.iterate()


def measure_times(
    names: list[str], config: DistillConfig, device: torch.device, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of every part, by way, over iterations taken in turn."""
    with tempfile.TemporaryDirectory() as folder:
        ways = {name: make_way(name, config, device, Path(folder)) for name in names}
        for way in ways.values():
            for _ in range(2):  # the second because what is compiled may be compiled again
                iterate(way)
            way.meter.clear()
        for _ in range(repeats):
            for way in ways.values():
                iterate(way)
    return {name: way.meter.seconds for name, way in ways.items()}


def measure_peaks(name: str, config: DistillConfig, device: torch.device) -> dict[str, int]:
    """Return the peak bytes of every part of one way's iterations, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        way = make_way(name, config, device, Path(folder))
        for repeat in range(3):
            if repeat == 1:  # what compiling holds is no part of training
                way.meter.clear()
            iterate(way)
    return way.meter.peaks


def peaks_in_fresh_process(name: str) -> dict[str, int]:
    """Return `measure_peaks` of this command's own settings, measured by a process of its own."""
    # Freed blocks go back to the system at once, or the peak of one part would hide in the next.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, *sys.argv[1:], "--peaks-of", name]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    peaks: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def show(
    times: dict[str, dict[str, list[float]]], peaks: dict[str, dict[str, int]], batch: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Print the table and return its figures by way and part."""
    medians = {
        name: {part: statistics.median(values) for part, values in seconds.items()}
        for name, seconds in times.items()
    }
    print(f"{'':18} {'part':14} {'images/s':>9} {'over plain':>11} {'peak MiB':>9} {'of plain':>9}")
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name, parts in medians.items():
        figures[name] = {}
        for part in (*STEPS, ITERATION):
            row = {
                "images_per_second": batch / parts[part],
                "over_plain": medians[PLAIN][part] / parts[part],
                "peak_mib": peaks[name][part] / 2**20,
                "peak_of_plain": peaks[name][part] / peaks[PLAIN][part],
            }
            figures[name][part] = row
            print(
                f"{name:18} {part:14} {row['images_per_second']:9.2f} {row['over_plain']:10.2f}x "
                f"{row['peak_mib']:9.0f} {row['peak_of_plain']:8.2f}x"
            )
        rest = 1 - sum(parts[step] for step in STEPS) / parts[ITERATION]
        print(f"{name:18} {'between steps':14} {rest:9.1%} of the iteration")
    return figures


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="faces64", choices=list_presets("distill"))
    parser.add_argument("--batch", type=int, help="images in a step; the preset's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's default")
    parser.add_argument("--ways", nargs="+", choices=list(OURS), help="all that suit the machine")
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    parser.add_argument("--peaks-of", choices=[PLAIN, *OURS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = load_distill_config(args.preset)
    if config.network.image_channels != 3 or config.network.num_classes:
        parser.error(f"--preset must be one of colour images without classes, got {args.preset}")
    config = replace(
        config,
        images=10**9,
        batch_size=args.batch or config.batch_size,
        microbatch=None,
        adversarial_images=0,
        energy_images=0,
        energy_weight=0.0,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.peaks_of:
        print(json.dumps(measure_peaks(args.peaks_of, config, device)))
        return

    fast = inference_dtype(device) is torch.bfloat16
    names = [PLAIN, *(args.ways or (OURS if fast else ["float32"]))]
    amx = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "amx": amx,
        "bfloat16": fast,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{args.preset}, batch {config.batch_size}, medians of {args.repeats} in turn")
    times = measure_times(names, config, device, args.repeats)
    peaks = {name: peaks_in_fresh_process(name) for name in names}
    figures = show(times, peaks, config.batch_size)
    print(
        f"{SHARED}\nthe trainer draws them between its steps, each plain step for itself\n{GOALS}"
    )
    if args.out:
        settings = {"preset": args.preset, "batch": config.batch_size, "repeats": args.repeats}
        record = {"machine": machine, **settings, "figures": figures, "seconds": times}
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
