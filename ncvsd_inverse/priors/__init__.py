"""Samplers of clean images given noisy ones.

`ncvsd_ffhq`, `ncvsd_faces64`, `ncvsd_natural` and their teachers, `ncvsd_ffhq_teacher` and so on,
are handles: each loads its weights when it is first used.
"""

from typing import TYPE_CHECKING

from ncvsd_inverse.priors.analytic import GaussianMixturePrior, GaussianPrior
from ncvsd_inverse.priors.card import PriorCard
from ncvsd_inverse.priors.diffusion import DiffusionPrior
from ncvsd_inverse.priors.latent import LatentPrior
from ncvsd_inverse.priors.ncvsd import NCVSDPrior, RefinedPrior
from ncvsd_inverse.priors.published import PublishedPrior
from ncvsd_inverse.priors.registry import (
    PriorHandle,
    describe_prior,
    list_priors,
    load_card,
    load_prior,
)
from ncvsd_inverse.priors.stored import save_prior

if TYPE_CHECKING:
    from ncvsd_inverse.priors.hub_prior import HubPrior

__all__ = [
    "DiffusionPrior",
    "GaussianMixturePrior",
    "GaussianPrior",
    "HubPrior",
    "LatentPrior",
    "NCVSDPrior",
    "PriorCard",
    "PriorHandle",
    "PublishedPrior",
    "RefinedPrior",
    "describe_prior",
    "list_priors",
    "load_card",
    "load_prior",
    "ncvsd_faces64",
    "ncvsd_faces64_teacher",
    "ncvsd_ffhq",
    "ncvsd_ffhq_teacher",
    "ncvsd_natural",
    "ncvsd_natural_teacher",
    "save_prior",
]

ncvsd_ffhq = PriorHandle("ncvsd_ffhq")
ncvsd_ffhq_teacher = PriorHandle("ncvsd_ffhq_teacher")
ncvsd_faces64 = PriorHandle("ncvsd_faces64")
ncvsd_faces64_teacher = PriorHandle("ncvsd_faces64_teacher")
ncvsd_natural = PriorHandle("ncvsd_natural")
ncvsd_natural_teacher = PriorHandle("ncvsd_natural_teacher")


def __getattr__(name: str) -> object:
    if name == "HubPrior":
        # Loaded when first used: huggingface_hub is slow to import.
        from ncvsd_inverse.priors.hub_prior import HubPrior

        return HubPrior
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
