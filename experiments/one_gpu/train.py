r"""Train a teacher or a student for given seconds on one GPU that holds all images in its memory.

    python experiments/one_gpu/train.py teacher --init ncvsd_faces64_teacher --seconds 85 \
        --data DIR/faces64/train.zip --val DIR/faces64/val.zip --out faces_teacher.safetensors
    python experiments/one_gpu/train.py student --init ncvsd_faces64 --seconds 185 \
        --data DIR/faces64/train.zip --val DIR/faces64/val.zip --out faces_student.safetensors

`ncvsd train` and `ncvsd distill` read pictures as they go and draw a generator's noise for each
image, so that runs can be stopped, resumed and spread over machines. On one fast GPU that costs
more than the network. Here the images lie in the GPU's memory, noise comes from one stream, the
learning rate falls along a cosine of the time that has passed, and only the averaged weights are
written, in half precision; `experiments/ship.py` makes priors of them. Photographs are seen at
three scales.

A student learns by the energy score of two draws and by the squared error of a tempered one (see
`DistillConfig`), all three in one pass. --turns FILE lets several runs that share a GPU prepare at
once and train one after another.
"""

import argparse
import fcntl
import io
import json
import math
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.networks import (
    ConcatDenoiser,
    Network,
    constrain_weights_,
    network_config,
    project_gradients_,
)
from ncvsd_inverse.numerics import expand_level
from ncvsd_inverse.priors.ncvsd import GAMMA
from ncvsd_inverse.priors.registry import load_network
from ncvsd_inverse.training.checkpoint import write_checkpoint
from ncvsd_inverse.training.distillation import temperatures
from ncvsd_inverse.training.ema import PowerEMA
from ncvsd_inverse.training.losses import (
    Observation,
    add_noise,
    denoising_loss,
    energy_loss,
    generate,
    tempered_loss,
)
from ncvsd_inverse.training.trainer import log_variance

SIDE = 64
SCALES = ((1.0, 0.5), (0.7, 0.25), (0.5, 0.25))
"""Scales at which photographs are seen, and how often."""

VALIDATION_LEVELS = (0.1, 0.2, 0.5, 1.0)


def read_pictures(paths: list[Path], scales: bool) -> list[list[np.ndarray]]:
    """Return for each picture of some zips its versions (H, W, 3), uint8, one or one a scale."""

    def read(content: bytes) -> list[np.ndarray]:
        picture = Image.open(io.BytesIO(content)).convert("RGB")
        sizes = [
            (round(picture.width * scale), round(picture.height * scale))
            for scale, _ in (SCALES if scales else SCALES[:1])
        ]
        return [
            np.asarray(picture.resize(size, Image.Resampling.LANCZOS) if i else picture)
            for i, size in enumerate(sizes)
            if min(size) >= SIDE
        ]

    contents = []
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith((".webp", ".png", ".jpg"))]
            contents += [archive.read(name) for name in sorted(names)]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(read, contents))


class Crops:
    """Random crops, mirrored at random, of pictures that lie in a device's memory."""

    def __init__(self, pictures: list[list[np.ndarray]], device: torch.device) -> None:
        flat = [version for versions in pictures for version in versions]
        starts = np.cumsum([0] + [v.shape[0] * v.shape[1] for v in flat])
        pixels = np.concatenate([v.reshape(-1, 3) for v in flat])
        self.pixels = torch.from_numpy(pixels).to(device)
        self.starts = torch.tensor(starts[:-1], device=device)
        self.heights = torch.tensor([v.shape[0] for v in flat], device=device)
        self.widths = torch.tensor([v.shape[1] for v in flat], device=device)
        weights = []
        for versions in pictures:
            shares = torch.tensor([share for _, share in SCALES[: len(versions)]])
            weights.append(shares / shares.sum())
        self.weights = torch.cat(weights).to(device)
        self.total = self.weights.cumsum(0)

    def draw(self, count: int) -> Tensor:
        """Return images (count, 3, SIDE, SIDE) in [-1, 1], float32."""
        device = self.pixels.device
        place, down, right = torch.rand(3, count, device=device)
        which = torch.searchsorted(self.total, place * self.total[-1]).clamp(
            max=len(self.total) - 1
        )
        top = (down * (self.heights[which] - SIDE + 1)).long()
        left = (right * (self.widths[which] - SIDE + 1)).long()
        steps = torch.arange(SIDE, device=device)
        mirrored = (torch.rand(count, device=device) < 0.5)[:, None]
        columns = torch.where(mirrored, steps.flip(0), steps) + left[:, None]
        rows = steps + top[:, None]
        index = self.starts[which][:, None, None] + (
            rows[:, :, None] * self.widths[which][:, None, None] + columns[:, None, :]
        )
        images: Tensor = self.pixels[index].permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        return images.contiguous()


def teacher_levels(count: int, device: torch.device) -> Tensor:
    """Draw the levels of a teacher's losses: where restoration works, and a tenth everywhere."""
    near = (1.3 * torch.randn(count, device=device) - 1.5).exp()
    anywhere = 0.002 * (80 / 0.002) ** torch.rand(count, device=device)
    return torch.where(torch.rand(count, device=device) < 0.9, near, anywhere).clamp(0.002, 80)


def student_levels(count: int, low: float, high: float, device: torch.device) -> Tensor:
    """Draw the levels of a student's losses, log-uniform, mostly below 10."""
    ends = torch.where(torch.rand(count, device=device) < 0.9, min(high, 10.0), high)
    return low * (ends / low) ** torch.rand(count, device=device)


class Run:
    """A network, what it learns from, and how far it is."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options = options
        self.device = device
        network = load_network(options.init)
        if isinstance(network, ConcatDenoiser) != (options.kind == "student"):
            raise SystemExit(f"init must be a {options.kind}, got {options.init}")
        network.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.network: Network = network.to(device).train().requires_grad_(True)
        constrain_weights_(network)
        self.average = PowerEMA(network, (options.ema,))
        self.optimizer = torch.optim.Adam(
            network.parameters(), lr=options.rate, betas=(0.9, 0.99), fused=device.type == "cuda"
        )
        pictures = read_pictures(options.data, network.any_size)
        self.crops = Crops(pictures, device)
        held_out = Crops(read_pictures(options.val, False), device)
        torch.manual_seed(1)
        self.held_out = held_out.draw(options.held_out)
        self.energy = energy_loss
        self.step = 0
        if options.compile:
            network.compile()
            self.energy = torch.compile(energy_loss)

    def loss(self) -> Tensor:
        """Return the loss of a batch."""
        images = self.crops.draw(self.options.batch)
        if self.options.kind == "teacher":
            t = teacher_levels(len(images), self.device)
            head = log_variance(self.network, t)
            losses = denoising_loss(self.network, head, images, t, torch.randn_like(images))
            return losses.mean()
        low, high = self.options.levels
        sigma = student_levels(len(images), low, high, self.device)
        u = add_noise(images, sigma, torch.randn_like(images))
        first, second = torch.randn(2, *images.shape, device=self.device)
        temperature = temperatures(*torch.rand(2, len(images), device=self.device))
        z = torch.cat((first, second, expand_level(temperature, first) * first))
        seen = Observation(u.repeat(3, 1, 1, 1), sigma.repeat(3))
        drawn, _ = generate(self.network, seen, z, gamma=GAMMA)
        first, second, tempered = drawn.chunk(3)
        energy = self.energy((first, second), images, sigma).mean()
        mean = tempered_loss(tempered, first, images, temperature, sigma).mean()
        weight: float = self.options.tempered_weight
        return energy + weight * mean

    def advance(self, done: float) -> Tensor:
        """Take a step with the learning rate of the share `done` of the time; return the loss."""
        rise = min((self.step + 1) / 100, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate * rise * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-6
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.backward()
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=0, neginf=0, out=parameter.grad)
        project_gradients_(self.network)
        self.optimizer.step()
        constrain_weights_(self.network)
        self.step += 1
        self.average.update(self.network, self.step)
        return loss

    def backward(self) -> Tensor:
        """Leave the gradients of a batch's loss in the network; return the loss."""
        loss = self.loss()
        torch.autograd.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def judge(self) -> dict[str, list[float]]:
        """Return figures of the averaged weights on held-out images, one a level."""
        network = self.average.averages[self.options.ema].eval()
        figures: dict[str, list[float]] = {}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            for level in VALIDATION_LEVELS:
                self._judge_at(level, network, figures)
        return figures

    def _judge_at(self, level: float, network: nn.Module, figures: dict[str, list[float]]) -> None:
        torch.manual_seed(2)
        images = self.held_out
        sigma = torch.full((len(images),), level, device=self.device)
        u = Observation(add_noise(images, sigma, torch.randn_like(images)), sigma)
        if self.options.kind == "teacher":
            figures.setdefault("psnr", []).append(quality(network(*u), images))
            return

        def draw(z: Tensor) -> Tensor:
            return generate(network, u, z, gamma=GAMMA)[0]

        draws = [draw(torch.randn_like(images)) for _ in range(4)]
        mean = torch.stack(draws).mean(0)
        still = draw(torch.zeros_like(images))
        spread = torch.stack([(d - mean).square().mean() for d in draws]).mean() * 4 / 3
        away = torch.stack([(d - images).square().mean() for d in draws]).mean()
        figures.setdefault("psnr", []).append(quality(still, images))
        figures.setdefault("mean4", []).append(quality(mean, images))
        figures.setdefault("variance", []).append(
            round(float(spread / (still - images).square().mean()), 3)
        )
        figures.setdefault("ratio", []).append(
            round(float(away / (still - images).square().mean()), 3)
        )

    def write(self) -> None:
        """Write the averaged weights in half precision."""
        network = self.average.averages[self.options.ema]
        state = network.state_dict()
        state |= {name: value.half() for name, value in network.named_parameters()}
        about = {
            "network": network_config(self.network),
            "images_seen": self.step * self.options.batch,
            "hardware": torch.cuda.get_device_name() if self.device.type == "cuda" else "a CPU",
            "config": {key: plain(value) for key, value in vars(self.options).items()},
        }
        write_checkpoint(self.options.out, state, about)


def plain(value: object) -> object:
    """Return an option as JSON can hold it: of paths the names."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.name if isinstance(value, Path) else value


def quality(images: Tensor, truth: Tensor) -> float:
    """Return the mean PSNR in dB."""
    return round(float(psnr(images.clamp(-1, 1), truth).mean()), 3)


@contextmanager
def turn(path: Path | None) -> Iterator[None]:
    """Hold the lock of a file, if one is given."""
    if path is None:
        yield
        return
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Train, and print figures on held-out images on the way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("teacher", "student"))
    parser.add_argument(
        "--init", required=True, help="prior whose network and weights it starts as"
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="zips of pictures")
    parser.add_argument("--val", type=Path, nargs="+", required=True, help="zips to judge on")
    parser.add_argument("--held-out", type=int, default=256, help="crops that are judged")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--seconds", type=float, default=100, help="of training (%(default)s)")
    parser.add_argument("--batch", type=int, default=512, help="images in a step (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.007, help="first learning rate")
    parser.add_argument("--ema", type=float, default=0.05, help="relative std of the average")
    parser.add_argument("--levels", type=float, nargs=2, default=(0.01, 20.0), help="a student's")
    parser.add_argument(
        "--tempered-weight", type=float, default=3.0, help="a student's (%(default)s)"
    )
    parser.add_argument("--turns", type=Path, help="file whose lock a run holds while it trains")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    started = time.monotonic()
    run = Run(options, device)
    name = options.out.stem

    def say(text: str) -> None:
        print(f"{name} [{time.monotonic() - started:.0f} s] {text}", flush=True)

    say(f"{len(run.crops.starts)} pictures, {run.crops.pixels.numel() / 2**20:.0f} MiB")
    say(f"start {json.dumps(run.judge())}")
    run.backward()  # which compiles
    if device.type == "cuda":
        torch.cuda.synchronize()
    say("ready")
    with turn(options.turns):
        began = told = time.monotonic()
        while (passed := time.monotonic() - began) < options.seconds:
            loss = run.advance(passed / options.seconds)
            if run.step % 10 == 0:
                value = float(loss)  # waits for the device, so that time is that of finished steps
                if time.monotonic() - told > options.seconds / 6:
                    told = time.monotonic()
                    seen = run.step * options.batch
                    rate = seen / (told - began)
                    say(f"{seen} images, {rate:.0f}/s, loss {value:.4f} {json.dumps(run.judge())}")
        run.write()
    say(f"end {run.step * options.batch} images {json.dumps(run.judge())}")


if __name__ == "__main__":
    main()
