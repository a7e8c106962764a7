"""What is shown of a run while it goes on: a progress bar, TensorBoard, picture grids."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ncvsd_inverse.images import write_image
from ncvsd_inverse.machine import extra, progress_bar
from ncvsd_inverse.numerics import draw_normal, make_generators
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior
from ncvsd_inverse.priors.latent import LATENT_CHANNELS, decode_latents, load_vae
from ncvsd_inverse.training.distillation import DistillationTrainer
from ncvsd_inverse.training.teacher import TeacherTrainer

with extra("train"):  # at once, in every process: one that failed later would leave others waiting
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["COLUMNS", "LATENT_SIDE", "PICTURES", "SIGMAS", "ProgressReport", "picture_grid"]

PICTURES = "pictures"
SIGMAS = (0.2, 0.5, 1.0, 2.0)
COLUMNS = 8
LATENT_SIDE = 128
"""Longest side of a picture that a latent stands for, as it is shown, pixels."""


class ProgressReport:
    """Callbacks of a run that show how it goes.

    Latents are shown as the pictures that they stand for if diffusers and its VAE are on this
    machine; else there are no pictures, which is said once.

    Args:
        run: the run; its folder gets `tensorboard/` and `pictures/`.
        images: a few training images to add noise to, shape (N, C, H, W), as trained on.
    """

    def __init__(self, run: TeacherTrainer | DistillationTrainer, images: Tensor) -> None:
        self.run = run
        self.images = images[:COLUMNS]
        self._decode: Callable[[Tensor], Tensor] | None = _keep
        if images.shape[1] == LATENT_CHANNELS:
            self._decode = _latent_decoder(run.device)
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.images_seen)
        self._advance: Callable[[dict[str, float]], None] = lambda line: None

    def on_log(self, line: dict[str, float]) -> None:
        """Take one line of the log."""
        for name, value in line.items():
            if name not in ("step", "images"):
                self._writer.add_scalar(name, value, int(line["images"]))
        self._advance(line)

    def on_checkpoint(self) -> None:
        """Draw the picture grid of the current averages."""
        if self._decode is None:
            return
        grid = picture_grid(self.run, self.images, decode=self._decode)
        folder = self.run.folder / PICTURES
        folder.mkdir(exist_ok=True)
        _write_picture(folder / f"{self.run.images_seen:09d}.png", grid)
        self._writer.add_image("pictures", (grid + 1) / 2, self.run.images_seen)
        self._writer.flush()

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show a progress bar on standard error for as long as the context lasts."""
        seen = self.run.images_seen
        with progress_bar("images", self.run.config.images, done=seen) as advance:

            def move(line: dict[str, float]) -> None:
                nonlocal seen
                advance(int(line["images"]) - seen)
                seen = int(line["images"])

            self._advance = move
            try:
                yield
            finally:
                self._writer.close()


def _keep(x: Tensor) -> Tensor:
    return x


def _latent_decoder(device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Return what makes small pictures of latents, None (and say why) where there is no VAE."""
    from rich.console import Console

    try:
        vae = load_vae(device=device, download=False)
    except (ImportError, ValueError) as error:
        Console(stderr=True).print(f"no pictures of latents: {error}", soft_wrap=True)
        return None

    def decode(latents: Tensor) -> Tensor:
        pictures = decode_latents(vae, latents)
        return torch.nn.functional.avg_pool2d(pictures, -(-max(pictures.shape[2:]) // LATENT_SIDE))

    return decode


@torch.no_grad()
def picture_grid(
    run: TeacherTrainer | DistillationTrainer,
    images: Tensor,
    *,
    decode: Callable[[Tensor], Tensor] = _keep,
) -> Tensor:
    """Return the pictures of a run, shape (C, height, width), in [-1, 1].

    Rows: the images; for each of `SIGMAS` the noisy images and what the network makes of them
    (two draws of a student, the mean of a teacher); images generated from fixed noise (by a
    student in 1, 2 and 4 steps, by a teacher in 35).

    Args:
        run: the run, whose averaged network is shown.
        images: training images, shape (N, C, H, W), as trained on.
        decode: makes pictures in [-1, 1] of images (M, C, H, W).
    """
    from torchvision.utils import make_grid

    images = images.to(run.device)
    shape = tuple(images.shape[1:])
    sources = make_generators([(0, i) for i in range(len(images))], run.device)
    like = torch.empty(len(images), *shape, device=run.device, dtype=torch.float32)
    eps = draw_normal(like, sources)
    size = (shape[1], shape[2])
    rows = [images]
    if isinstance(run, DistillationTrainer):
        student = NCVSDPrior(
            copy.deepcopy(run.averaged("generator")),
            image_shape=None if run.config.any_size else shape,
            gamma=run.config.gamma,
        )
        for sigma in SIGMAS:
            u = images + sigma * eps
            rows += [u, student.sample(u, sigma, generator=sources)]
            rows += [student.sample(u, sigma, generator=sources)]
        rows += [student.generate(len(images), n, seed=0, size=size) for n in (1, 2, 4)]
    else:
        teacher = DiffusionPrior(
            run.averaged("teacher"), image_shape=None if run.config.any_size else shape
        )
        for sigma in SIGMAS:
            u = images + sigma * eps
            rows += [u, teacher.denoise(u, sigma)]
        rows.append(teacher.generate(len(images), seed=0, size=size))
    pictures = decode(torch.cat(rows)).clamp(-1, 1)
    grid: Tensor = make_grid(pictures, nrow=len(images), padding=2, pad_value=1.0)
    return grid.cpu()


def _write_picture(path: Path, picture: Tensor) -> None:
    """Write a picture (C, height, width) in [-1, 1] whole or not at all."""
    write_image(path, picture[None])
