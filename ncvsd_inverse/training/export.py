"""What a run leaves: its network as a prior, with statistics."""

from pathlib import Path

from ncvsd_inverse.networks import ConcatDenoiser, ControlledDenoiser, Denoiser
from ncvsd_inverse.priors import load_prior, save_prior
from ncvsd_inverse.priors.base import SIGMA_MAX, SIGMA_MIN
from ncvsd_inverse.priors.latent import LATENT_CHANNELS
from ncvsd_inverse.priors.own_statistics import num_images, own_statistics
from ncvsd_inverse.training.config import DistillConfig
from ncvsd_inverse.training.distillation import DistillationTrainer
from ncvsd_inverse.training.teacher import TeacherTrainer

__all__ = ["keep_run_statistics", "save_run_prior"]


def save_run_prior(run: TeacherTrainer | DistillationTrainer, data: str) -> Path:
    """Write the averaged network of a run as a prior in its folder; return its path's stem.

    Args:
        run: a run, finished or not.
        data: name of the training images, for the card.
    """
    config = run.config
    distilled = isinstance(run, DistillationTrainer)
    network = run.averaged("generator" if distilled else "teacher").cpu()
    if not isinstance(network, ConcatDenoiser | ControlledDenoiser | Denoiser):
        raise TypeError(f"only the built-in networks can be saved, got {type(network).__name__}")
    side = config.network.resolution
    stem = run.folder / "prior"
    save_prior(
        stem,
        network,
        {
            "name": run.folder.name,
            "kind": "ncvsd" if distilled else "diffusion",
            "image_shape": None if config.any_size else (config.network.image_channels, side, side),
            "gamma": run.config.gamma if isinstance(run, DistillationTrainer) else None,
            "tempers": isinstance(config, DistillConfig) and config.tempered_weight > 0,
            "sigma_min": config.sigma_min if isinstance(config, DistillConfig) else SIGMA_MIN,
            "sigma_max": config.sigma_max if isinstance(config, DistillConfig) else SIGMA_MAX,
            "licence": "that of the training images; not stated",
            "data": data,
            "training": {"config": run.describe(), "images_seen": run.images_seen},
            "evaluation": {},
            "weaknesses": "not judged; see `ncvsd evaluate`",
            "intended_use": "not stated",
        },
    )
    return stem


def keep_run_statistics(run: TeacherTrainer | DistillationTrainer, stem: Path) -> None:
    """Measure the statistics of a run's prior on training images and put them into its card.

    Latents, which no measurement is of, are left alone.

    Args:
        run: the run.
        stem: path of its prior, as `save_run_prior` returned it.
    """
    config = run.config
    if config.network.image_channels == LATENT_CHANNELS:
        return
    num = num_images((config.network.resolution, config.network.resolution))
    images = next(run.data.batches(0, num, seed=config.seed)).images.to(run.device)
    prior = load_prior(stem, run.device)
    assert prior.statistics_store is not None
    prior.statistics_store.write(own_statistics(prior, data=images))
