"""
Training and distilling a small prior
=====================================

A teacher learns to denoise. A student is then distilled from it: it draws a clean image in one
call. Both runs take seconds here, on images that are easy to learn; the shipped priors took minutes
on a large GPU.
"""

import tempfile
from pathlib import Path

import torch

from ncvsd_inverse.evaluation import evaluate
from ncvsd_inverse.images import plot_pictures
from ncvsd_inverse.networks import UNetShape
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior
from ncvsd_inverse.training import (
    DistillationTrainer,
    DistillConfig,
    ImageData,
    TeacherConfig,
    TeacherTrainer,
)

# %%
# Training images are bytes. ``read_data`` reads folders and zips of pictures; here they are drawn:
# a bright disc of any place and size.


def discs(number: int, seed: int) -> torch.Tensor:
    """Return images of a disc, shape (number, 1, 16, 16), in [-1, 1]."""
    draws = torch.rand(number, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
    row, column, radius = 3 + 9 * draws[:, 0], 3 + 9 * draws[:, 1], 2 + 3 * draws[:, 2]
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    distance = ((rows - row) ** 2 + (columns - column) ** 2).sqrt()
    return (1.6 * (radius - distance + 0.5).clamp(0, 1) - 0.8)[:, None]


data = ImageData(((discs(4000, seed=0) + 1) * 127.5).round().to(torch.uint8))

# %%
# The teacher
# -----------
# A run lives in a folder. The same call in the same folder goes on where it stopped.

torch.set_num_threads(1)  # networks this small are faster so
folder = Path(tempfile.mkdtemp())
shape = UNetShape(
    resolution=16, image_channels=1, channels=(32, 32), blocks=1, attention=(), patch=2
)
settings = TeacherConfig(
    network=shape,
    images=18_000,
    batch_size=32,
    learning_rate=0.01,
    warmup_images=1000,
    decay_steps=200,
)
teacher = TeacherTrainer(settings, data, folder / "teacher")
teacher.run()
mean = DiffusionPrior(teacher.averaged("teacher"), image_shape=(1, 16, 16))

# %%
# The student
# -----------
# Generator, score model and discriminator are trained in turn. The energy score, which is not in
# the paper, starts the student well; in a run as short as this one it does nearly all the work.

distill = DistillConfig(
    network=shape,
    images=9_000,
    batch_size=32,
    learning_rate=0.01,
    warmup_images=500,
    decay_steps=200,
    generator_rate=0.1,
    energy_weight=4.0,
    energy_images=7_500,
    tempered_weight=3.0,
    adversarial_images=9_000,
)
student = DistillationTrainer(distill, data, folder / "student", mean.network)
student.run()
prior = NCVSDPrior(student.averaged("generator"), image_shape=(1, 16, 16), tempers=True)

# %%
# What came of it
# ---------------
# ``evaluate`` holds the student against its teacher. A perfect student has ratio 2: its draws vary
# as much as the teacher errs. One that returns the mean has ratio 1.

held_out = discs(64, seed=1)
for level in evaluate(prior, mean, held_out, levels=(0.2, 0.5, 1.0, 2.0), draws=16).levels:
    print(
        f"sigma {level.sigma}: teacher {level.teacher_psnr.value:.1f} dB, "
        f"ratio {level.prior.ratio.value:.2f} +- {level.prior.ratio.error:.2f}"
    )

# %%
# Held-out images under much noise. The teacher's mean is a blur where the disc may be; draws of the
# student differ in where they put it.

some = held_out[:4]
u = some + 1.5 * torch.randn(some.shape, generator=torch.Generator().manual_seed(0))
columns = [some, u / 2, mean.denoise(u, 1.5), *(prior.sample(u, 1.5) for _ in range(3))]
plot_pictures(
    [[column[i : i + 1].detach() for column in columns] for i in range(len(some))],
    ["truth", "noisy", "teacher's mean", "a draw", "another", "a third"],
)
