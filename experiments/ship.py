r"""Write the networks of finished runs as the package's priors, with their cards.

    python experiments/ship.py natural --teacher-run runs/natural/teacher \
        --run runs/natural/distill --val DIR/natural/val.zip --out ncvsd_inverse/priors/weights
    ncvsd statistics ncvsd_inverse/priors/weights/ncvsd_natural --data DIR/natural/val.zip
    ncvsd evaluate ncvsd_natural --data DIR/natural/test.zip --size 96 -o runs/judged
    python experiments/ship.py natural --judged runs/judged/evaluation.json \
        --out ncvsd_inverse/priors/weights

The first command writes ncvsd_NAME and ncvsd_NAME_teacher in half precision. A run is the folder of
`ncvsd train` or `ncvsd distill`, or a file of `experiments/one_gpu/train.py`; without
--teacher-run the teacher that ships stays as it is. Of the averaged
weights that a folder keeps it takes those with the least CRPS on validation images, summed over
noise levels in units of the teacher's error. Then it calibrates the spread of the draws on the same
images and draws `draws.jpg`. The second command, which the teacher needs too, puts statistics
into a card, the last one what `ncvsd evaluate` measured. What a card says beside figures is in
experiments/NAME/card.toml.
"""

import argparse
import json
import subprocess
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ncvsd_inverse.evaluation import Evaluation, calibrate_noise_scale, evaluate
from ncvsd_inverse.files import write_whole
from ncvsd_inverse.images import centre_crop, read_images, write_image
from ncvsd_inverse.networks import ConcatDenoiser, Denoiser, build_network, inference_dtype
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior, load_prior, save_prior
from ncvsd_inverse.priors.base import SIGMA_MAX, SIGMA_MIN
from ncvsd_inverse.priors.card import PriorCard
from ncvsd_inverse.priors.files import card_path, read_card
from ncvsd_inverse.priors.ncvsd import GAMMA
from ncvsd_inverse.priors.registry import load_card, load_network
from ncvsd_inverse.training import DistillationTrainer, DistillConfig, ImageData, load_teacher
from ncvsd_inverse.training.checkpoint import read_checkpoint
from ncvsd_inverse.training.trainer import CHECKPOINT, INPUTS, LOG

HERE = Path(__file__).parent
Plain: TypeAlias = "dict[str, Plain] | list[Plain] | str | float | int | bool | None"
"""What JSON holds."""

LEVELS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
DRAWS = 8
PICTURES = 8
GENERATION_CALLS = 35


def main() -> None:
    """Write priors, or put what was measured into their cards."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="the experiment, as `faces64`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the priors")
    parser.add_argument("--run", type=Path, help="the distillation")
    parser.add_argument("--teacher-run", type=Path, help="the teacher's run, if it is new")
    parser.add_argument("--val", type=Path, help="zip or folder of validation images")
    parser.add_argument("--images", type=int, default=64, help="validation images to choose by")
    parser.add_argument("--judged", type=Path, help="evaluation.json of `ncvsd evaluate`")
    args = parser.parse_args()
    if args.judged:
        put_into_cards(args.out, args.name, json.loads(args.judged.read_text(encoding="utf-8")))
        return
    if not (args.run and args.val):
        parser.error("--run and --val are needed unless --judged is given")
    about = tomllib.loads((HERE / args.name / "card.toml").read_text(encoding="utf-8"))
    ship(args.name, about, args.run, args.teacher_run, args.val, args.images, args.out)


@dataclass(frozen=True)
class Source:
    """What a run left: networks by the std of their average, and how they were trained."""

    networks: dict[float, Denoiser | ConcatDenoiser]
    training: dict[str, object]
    gamma: float = GAMMA
    sigma_min: float = SIGMA_MIN
    sigma_max: float = SIGMA_MAX
    tempers: bool = False


def ship(
    name: str,
    about: dict[str, Any],
    run: Path,
    teacher_run: Path | None,
    val: Path,
    num_images: int,
    out: Path,
) -> None:
    """Choose the averaged weights, write both priors and a picture of their draws."""
    out.mkdir(parents=True, exist_ok=True)
    old = open_teacher(teacher_run, name, about)
    new = open_student(run, name, about)
    (teacher,) = old.networks.values()
    assert isinstance(teacher, Denoiser)
    for network in (teacher, *new.networks.values()):  # judged in the form that users run
        network.compute_dtype = inference_dtype(torch.device("cpu"))
    side = teacher.shape.resolution
    shape = None if teacher.any_size else (teacher.image_channels, side, side)
    crop = about.get("crop", side)
    images = torch.cat([centre_crop(x, (crop, crop)) for x in read_images(val, num_images)])
    judge = DiffusionPrior(teacher, image_shape=shape)
    priors, scores = {}, {}
    for std, network in new.networks.items():
        prior = NCVSDPrior(network, image_shape=shape, gamma=new.gamma, tempers=new.tempers)
        priors[std] = prior
        figures = evaluate(prior, judge, images, levels=LEVELS, draws=DRAWS)
        scores[std] = relative_crps(figures)
        print(f"average of std {std}: CRPS over the teacher's error {scores[std]:.4f}")
        for level in figures.levels:
            parts = (level.prior.ratio, level.prior.variance, level.prior.bias, level.psnr_gap)
            print(f"  {level.sigma:g}", *(f"{part.value:.2f}" for part in parts))
    best = min(scores, key=lambda std: scores[std])
    levels = about["spread_levels"]
    noise_scale = calibrate_noise_scale(priors[best], judge, images, levels=levels, draws=DRAWS)
    # Above the levels that the images suffice for the factor goes back to 1.
    noise_scale = (*noise_scale, (2.5 * max(levels), 1.0))
    print("factors on the noise:", *(f"{sigma:g}: {factor:.3f}" for sigma, factor in noise_scale))
    shared: dict[str, object] = {
        "image_shape": shape,
        "licence": about["licence"],
        "data": about["data"],
        "intended_use": about["intended_use"],
        "evaluation": {},
    }
    shipped = f"ncvsd_{name}"
    place = card_path(out / shipped)
    points = read_card(out / shipped).points if place.exists() else None
    if teacher_run is not None:
        save_prior(
            out / f"{shipped}_teacher",
            halved(teacher),
            {
                **shared,
                "name": f"{shipped}_teacher",
                "kind": "diffusion",
                "gamma": None,
                "sigma_min": old.sigma_min,
                "sigma_max": old.sigma_max,
                "training": old.training,
                "weaknesses": about["teacher_weaknesses"],
            },
        )
    save_prior(
        out / shipped,
        halved(new.networks[best]),
        {
            **shared,
            "name": shipped,
            "kind": "ncvsd",
            "gamma": new.gamma,
            "sigma_min": new.sigma_min,
            "sigma_max": new.sigma_max,
            "noise_scale": [[sigma, round(factor, 3)] for sigma, factor in noise_scale],
            "tempers": new.tempers,
            "training": {**new.training, "ema_std": best, "teacher": old.training},
            "weaknesses": about["weaknesses"],
        },
    )
    if points is not None:  # until experiments/few_step/point.py has been run
        write_whole(place, replace(read_card(out / shipped), points=points).to_json())
    student = load_prior(out / shipped, dtype=torch.float32)
    assert isinstance(student, NCVSDPrior)
    write_picture(HERE / name / "draws.jpg", student, judge, images[:PICTURES, :, :side, :side])


def open_teacher(run: Path | None, name: str, about: dict[str, Any]) -> Source:
    """Return what a teacher's run left, or the teacher that ships where there is none.

    Of several averages it is the one with the shortest memory.
    """
    if run is None:
        shipped = f"ncvsd_{name}_teacher"
        return Source({0.0: light(load_network(shipped))}, dict(load_card(shipped).training))
    if run.is_file():
        return open_weights(run)
    return Source({0.0: load_teacher(run)}, describe_training(run, f"ncvsd train {name}", about))


def open_student(run: Path, name: str, about: dict[str, Any]) -> Source:
    """Return what a distillation left."""
    if run.is_file():
        return open_weights(run)
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    settings = {name: settings[name] for name in settings if name not in ("run", INPUTS)}
    config = DistillConfig.from_dict(DistillConfig.defaults() | settings)
    # Judging is short: compiling the networks would take longer than it saves.
    config = replace(config, compile=False)
    nothing = ImageData(torch.zeros(1, config.network.image_channels, 8, 8, dtype=torch.uint8))
    teacher = Denoiser(config.network, sigma_data=config.sigma_data, any_size=config.any_size)
    trainer = DistillationTrainer(config, nothing, run, teacher)
    trainer.load()
    networks = {std: trainer.averaged("generator", std) for std in config.ema_stds}
    return Source(
        {std: light(network) for std, network in networks.items()},
        describe_training(run, f"ncvsd distill {name}", about),
        config.gamma,
        config.sigma_min,
        config.sigma_max,
        config.tempered_weight > 0,
    )


def open_weights(path: Path) -> Source:
    """Return what `experiments/one_gpu/train.py` wrote."""
    state, about = read_checkpoint(path)
    network = build_network(about["network"])
    network.load_state_dict({key: value.float() for key, value in state.items()})
    settings = about["config"]
    training = {
        "command": f"python experiments/one_gpu/train.py {settings['kind']}",
        "commit": commit_of_this_file(),
        "images_seen": about["images_seen"],
        "hours": round(settings["seconds"] / 3600, 2),
        "hardware": about["hardware"],
        "config": settings,
    }
    student = settings["kind"] == "student"
    tempers = student and settings["tempered_weight"] > 0
    return Source({settings["ema"]: light(network.eval())}, training, tempers=tempers)


def relative_crps(figures: Evaluation) -> float:
    """Return the mean over levels of the CRPS over the teacher's root mean square error."""
    errors = [2 * 10 ** (-level.teacher_psnr.value / 20) for level in figures.levels]
    return sum(
        level.crps.value / error for level, error in zip(figures.levels, errors, strict=True)
    ) / len(errors)


def describe_training(folder: Path, command: str, about: dict[str, Any]) -> dict[str, object]:
    """Return what a run's folder tells of its training, up to its checkpoint."""
    _, header = read_checkpoint(folder / CHECKPOINT)
    settings = header["config"]
    seen = header["step"] * settings["batch_size"]
    log = folder / LOG  # a run of a few steps has none yet
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    lines = [line for line in lines if "images_per_second" in line]  # not of where it resumed
    steps = [0, *(line["images"] for line in lines)]
    seconds = sum(
        (after - before) / line["images_per_second"]
        for before, after, line in zip(steps, steps[1:], lines, strict=False)
        if before < after <= seen
    )
    return {
        "command": command,
        "commit": commit_of_this_file(),
        "images_seen": seen,
        "hours": round(seconds / 3600, 2),
        "hardware": about["hardware"],
        "config": settings,
    }


def commit_of_this_file() -> str:
    """Return the commit of this file's repository, "unknown" where there is none."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def light(network: nn.Module) -> Denoiser | ConcatDenoiser:
    """Return `network` if it is of a kind that ships."""
    if not isinstance(network, Denoiser | ConcatDenoiser):
        raise TypeError(f"only the light networks ship, got {type(network).__name__}")
    return network


def halved(network: Denoiser | ConcatDenoiser) -> Denoiser | ConcatDenoiser:
    """Return `network` with its parameters rounded to half precision, in place; buffers stay."""
    for parameter in network.parameters():
        parameter.data = parameter.data.half()
    return network


def write_picture(path: Path, prior: NCVSDPrior, teacher: DiffusionPrior, images: Tensor) -> None:
    """Write rows of truth, noisy images, teacher means and draws, then generated images."""
    from torchvision.utils import make_grid

    size = (images.shape[2], images.shape[3])
    rows = [images]
    for sigma in (0.2, 0.5, 1.0, 2.0):
        u = images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        rows += [u, teacher.denoise(u, sigma)]
        rows += [prior.sample(u, sigma), prior.sample(u, sigma)]
    rows += [prior.generate(len(images), steps, seed=1, size=size) for steps in (1, 2, 4)]
    rows.append(teacher.generate(len(images), size=size))
    pictures = torch.cat(rows).clamp(-1, 1)
    write_image(path, make_grid(pictures, nrow=len(images), padding=2, pad_value=1.0)[None])


def put_into_cards(folder: Path, name: str, judged: dict[str, Plain]) -> None:
    """Store an evaluation in the cards of a prior and its teacher."""
    figures = {key: rounded(value) for key, value in judged.items()}
    for stem in (f"ncvsd_{name}", f"ncvsd_{name}_teacher"):
        path = folder / f"{stem}.json"
        card = PriorCard.from_json(path.read_text(encoding="utf-8"))
        write_whole(path, replace(card, evaluation=figures).to_json())


def rounded(value: Plain) -> Plain:
    """Return plain data with its numbers to four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return value


if __name__ == "__main__":
    main()
