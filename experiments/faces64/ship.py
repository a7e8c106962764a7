r"""Judge the trained networks of ncvsd_faces64 on held-out faces and write them as priors.

    ncvsd train faces64 --data DIR/faces64/train.zip -o runs/faces64/teacher
    ncvsd distill faces64 --teacher runs/faces64/teacher --data DIR/faces64/train.zip \
        -o runs/faces64/distill
    python experiments/faces64/ship.py --runs runs/faces64 --val DIR/faces64/val.zip --out DIR

Prints, for each noise level, the teacher's PSNR, the posterior ratio MSE(one draw) / MSE(teacher
mean), which is 2 for a posterior sampler and 1 for a mean, and its parts. Writes
ncvsd_faces64.{safetensors,json}, ncvsd_faces64_teacher.{safetensors,json} and a picture of both.
"""

import argparse
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ncvsd_inverse.distill import (
    DistillConfig,
    DistillRun,
    ImageData,
    load_teacher,
)
from ncvsd_inverse.distill.checkpoint import read_checkpoint
from ncvsd_inverse.distill.evaluate import evaluate
from ncvsd_inverse.distill.trainer import CHECKPOINT
from ncvsd_inverse.networks import ConcatDenoiser, Denoiser
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior, load_prior, save_prior

HERE = Path(__file__).parent
LEVELS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
DRAWS = 8
SHAPE = (3, 64, 64)
LICENCE = "research use only; see the LICENSE beside the weights"
DATA = (
    "22,762 aligned 64x64 faces of UTKFace (non-commercial research purposes only), "
    "resized from 200x200"
)
INTENDED_USE = "Research on restoring aligned, cropped 64x64 colour photographs of faces."


def main() -> None:
    """Judge and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/faces64"))
    parser.add_argument("--val", type=Path, required=True, help="zip or folder of held-out images")
    parser.add_argument("--out", type=Path, required=True, help="folder for the priors")
    parser.add_argument("--images", type=int, default=64, help="held-out images to judge on")
    parser.add_argument("--hours", type=float, nargs=2, default=(0.0, 0.0), help="teacher, student")
    parser.add_argument("--hardware", default="two CPU cores")
    args = parser.parse_args()

    held_out = ImageData.read(args.val)
    images = held_out.images(torch.arange(min(args.images, len(held_out))))
    teacher = load_teacher(args.runs / "teacher")
    judge = DiffusionPrior(teacher, image_shape=SHAPE)
    # Judging is short: compiling the networks would take longer than it saves.
    config = replace(DistillConfig.from_toml(HERE / "distill.toml"), compile=False)
    distilled = DistillRun(config, held_out, args.runs / "distill", teacher)
    distilled.load()

    _, header = read_checkpoint(args.runs / "teacher" / CHECKPOINT)
    seen = header["step"] * header["config"]["batch_size"]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    shared = {
        "image_shape": SHAPE,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "licence": LICENCE,
        "data": DATA,
        "intended_use": INTENDED_USE,
    }
    candidates = {}
    for std in distilled.config.ema_stds:
        network = distilled.averaged("generator", std)
        prior = NCVSDPrior(network, image_shape=SHAPE, gamma=distilled.config.gamma)
        figures = evaluate(prior, judge, images, levels=LEVELS, draws=DRAWS)
        candidates[std] = network, figures
        print(f"ema std {std}")
        print(json.dumps(figures.to_dict(), indent=1))
    # The better average is the one whose mean of draws is nearer to the images, over all levels.
    best = max(
        candidates,
        key=lambda std: sum(level.mean_psnr.value for level in candidates[std][1].levels),
    )
    network, figures = candidates[best]
    save_prior(
        args.out / "ncvsd_faces64_teacher",
        halved(teacher),
        {
            **shared,
            "name": "ncvsd_faces64_teacher",
            "kind": "diffusion",
            "gamma": None,
            "training": {
                "command": "ncvsd train faces64 --data faces64/train.zip",
                "commit": commit,
                "images_seen": seen,
                "hours": args.hours[0],
                "hardware": args.hardware,
            },
            "evaluation": {
                "data": f"first {len(images)} images of faces64 val",
                "psnr": {str(row.sigma): row.teacher_psnr.value for row in figures.levels},
            },
            "weaknesses": "A first, small teacher, stopped early: fine detail is soft.",
        },
    )
    save_prior(
        args.out / "ncvsd_faces64",
        halved(network),
        {
            **shared,
            "name": "ncvsd_faces64",
            "kind": "ncvsd",
            "gamma": distilled.config.gamma,
            "training": {
                "command": "ncvsd distill faces64 --data faces64/train.zip",
                "commit": commit,
                "images_seen": distilled.images_seen,
                "teacher_images_seen": seen,
                "ema_std": best,
                "hours": args.hours[1],
                "hardware": args.hardware,
            },
            "evaluation": {
                "data": f"first {len(images)} images of faces64 val, {DRAWS} draws each",
                **figures.to_dict(),
            },
            "weaknesses": (
                "A first, modest prior, trained for about an hour on two CPU cores: its draws vary "
                "less or more than the true posterior (see the posterior ratio), fine detail is "
                "soft, and faces turned aside, hands, hats and glasses come out badly."
            ),
        },
    )
    student = load_prior(args.out / "ncvsd_faces64", dtype=torch.float32)
    slow = load_prior(args.out / "ncvsd_faces64_teacher", dtype=torch.float32)
    if isinstance(student, NCVSDPrior) and isinstance(slow, DiffusionPrior):
        write_picture(args.out / "ncvsd_faces64.png", student, slow, images[:8])


def halved(network: nn.Module) -> Denoiser | ConcatDenoiser:
    """Return `network` with its parameters rounded to half precision, in place; buffers stay."""
    if not isinstance(network, Denoiser | ConcatDenoiser):
        raise TypeError(f"only the light networks ship, got {type(network).__name__}")
    for parameter in network.parameters():
        parameter.data = parameter.data.half()
    return network


def write_picture(path: Path, prior: NCVSDPrior, teacher: DiffusionPrior, images: Tensor) -> None:
    """Write rows of truth, noisy images, teacher means and draws, then generated faces."""
    from torchvision.utils import save_image

    rows = [images]
    for sigma in (0.5, 1.0, 2.0):
        u = images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        rows += [u.clamp(-1, 1), teacher.denoise(u, sigma)]
        rows += [prior.sample(u, sigma), prior.sample(u, sigma)]
    rows += [prior.generate(len(images), steps, seed=1) for steps in (1, 2, 4)]
    slow = DiffusionPrior(teacher.network, num_steps=35, image_shape=SHAPE)
    rows.append(slow.generate(len(images)))
    save_image(torch.cat(rows), path, nrow=len(images), normalize=True, value_range=(-1, 1))


if __name__ == "__main__":
    main()
