"""What `solve` decides before it runs: which prior, which loop, which levels."""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, TypedDict, TypeGuard, get_args

import torch
from torch import nn

from ncvsd_inverse.checks import (
    check_count,
    check_falling,
    check_image_size,
    check_positive,
    check_share,
    describe_type,
)
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior, PriorHandle, load_prior
from ncvsd_inverse.priors.grey import GreyPrior
from ncvsd_inverse.priors.latent import LATENT_CHANNELS, LatentPrior
from ncvsd_inverse.priors.own_statistics import lacks_statistics, with_own_statistics
from ncvsd_inverse.priors.tiled import TiledNetwork, tiled
from ncvsd_inverse.protocols import Denoiser, NetworkTraits, Prior, PriorTraits, Temperable
from ncvsd_inverse.sampling.chains import Method, Plan
from ncvsd_inverse.sampling.counting import network_of
from ncvsd_inverse.sampling.problem import Problem
from ncvsd_inverse.sampling.result import Estimate
from ncvsd_inverse.sampling.settings import (
    POINTS,
    default_schedule,
    point_settings,
    published_schedule,
    published_sigma_lik,
)
from ncvsd_inverse.schedules import karras

__all__ = [
    "Asked",
    "Preset",
    "check_asked",
    "check_prior_fits",
    "choose_estimate",
    "choose_method",
    "choose_plan",
    "choose_point_plan",
    "count_sweeps",
    "describe_far_sweep",
    "draws_by_statistics",
    "find_prior",
    "fit_prior",
    "temper",
]

Preset: TypeAlias = Literal["ncvsd"]

LARGE = 1024 * 1024
"""Pixels above which an image is large: a network of any size sees it in tiles."""

DIRECT_TEMPERATURE = 0.35
"""Temperature of the draws whose mean denoises, of a prior that knows the mean."""

FAR = 10
"""How many times sigma_y a single sweep may be at without a warning."""


class Asked(TypedDict):
    """What a user may ask of a plan; see `solve`."""

    nfe: int
    schedule: tuple[float, ...] | None
    sigma_lik: float | None
    temperature: float | None


def check_asked(
    *,
    nfe: int,
    schedule: Sequence[float] | None,
    sigma_lik: float | None,
    temperature: float | None,
) -> Asked:
    """Return what was asked as plain numbers; errors as for `solve`."""
    return {
        "nfe": check_count("nfe", nfe),
        "schedule": None if schedule is None else check_falling("schedule", schedule),
        "sigma_lik": None if sigma_lik is None else check_positive("sigma_lik", sigma_lik),
        "temperature": None if temperature is None else check_share("temperature", temperature),
    }


def find_prior(prior: Prior | str, device: torch.device | None) -> Prior:
    """Return the prior that a name or a handle means, on a device; TypeError if there is none."""
    if isinstance(prior, str):
        return load_prior(prior, device)
    if isinstance(prior, PriorHandle):
        return prior.load(device)
    if isinstance(prior, type) or not hasattr(prior, "sample"):
        hint = "" if isinstance(prior, type) else _how_to_wrap(prior)
        raise TypeError(f"prior must have a sample method, got {describe_type(prior)}{hint}")
    return prior


def _how_to_wrap(model: object) -> str:
    """Return what makes a prior of a model that is none, in words; "" if nothing does."""
    library = type(model).__module__.partition(".")[0]
    if hasattr(model, "unet") and isinstance(model.unet, nn.Module):
        return ": DiffusionPrior.from_diffusers(pipeline.unet, pipeline.scheduler) makes one of it"
    if library == "diffusers":
        return ": DiffusionPrior.from_diffusers(unet, scheduler) makes one of it"
    if library == "deepinv":
        return ": DiffusionPrior.from_deepinv(denoiser) makes one of it"
    if callable(model):
        return (
            ": DiffusionPrior.from_function(f) makes one of E[x0 | x] = f(x, sigma), "
            "DiffusionPrior.from_eps(f, alphas_cumprod) of a prediction of noise"
        )
    return ""


def fit_prior(prior: Prior, image_shape: Sequence[int]) -> Prior:
    """Return the prior as one of grey images for those, and with tiles for large images.

    Args:
        prior: any prior; one of colours measures its statistics first if it lacks them.
        image_shape: (C, H, W) of the images that are restored.
    """
    if not isinstance(prior, NCVSDPrior | DiffusionPrior):
        return prior
    channels, *size = image_shape
    if (
        prior.image_shape is None
        and math.prod(size) > LARGE
        and not isinstance(prior.network, TiledNetwork)
    ):
        prior = tiled(prior)
    if channels == 1 and prior.image_channels == 3:
        if not lacks_statistics(prior):
            with_own_statistics(prior, (prior.image_channels, *size))
        return GreyPrior(prior)
    return prior


def check_prior_fits(prior: Prior, problem: Problem) -> None:
    """ValueError unless the prior draws images of the problem's shape, on the device of y."""
    shape, network = problem.shape, network_of(prior)
    size = PriorTraits.of(prior).image_shape
    of_latents = size is not None and (size[0], shape[1]) == (LATENT_CHANNELS, 3)
    if of_latents or isinstance(prior, LatentPrior):
        raise ValueError(
            "prior must be one of pixels, got one of latents; LatentPrior(prior).generate(...) "
            "draws pictures with it"
        )
    if size is not None and shape[1:] != tuple(size):
        raise ValueError(
            f"y must come from images of shape {tuple(size)} for this prior, got "
            f"{tuple(problem.y.shape)}, which comes from {shape[1:]}"
        )
    if network is None:
        return
    channels = 1 if isinstance(prior, GreyPrior) else NetworkTraits.of(network).image_channels
    check_image_size("y's images", shape[1:], channels=channels)
    device = next(network.parameters(), problem.y).device
    if device != problem.y.device:
        raise ValueError(f"y must be on the prior's device {device}, got {problem.y.device}")


def can_be_tempered(prior: Prior) -> bool:
    """Tell whether draws of a prior can be made to vary less."""
    several = isinstance(prior, DiffusionPrior) and prior.nfe_per_sample > 1
    return isinstance(prior, Temperable) and not several


def choose_estimate(
    estimate: Estimate | None, prior: Prior, method: Method, num_samples: int
) -> Estimate:
    """Return what the estimate is; ValueError for a point where chains cannot make one."""
    is_possible = method == "conditioning" and can_be_tempered(prior)
    if estimate == "point" and not is_possible:
        others = ", ".join(repr(other) for other in get_args(Estimate) if other != "point")
        why = f"method {method!r}" if method != "conditioning" else "a prior without tempered draws"
        raise ValueError(f"estimate must be one of {others} with {why}, got 'point'")
    if estimate is not None:
        return estimate
    if num_samples > 1:
        return "mean"
    return "point" if is_possible else "sample"


def temper(prior: Prior, temperature: float) -> Prior:
    """Return the prior whose draws vary by `temperature`, in (0, 1], times as much."""
    if temperature == 1:
        return prior
    if not isinstance(prior, Temperable):
        raise ValueError(f"temperature must be 1 for this prior, got {temperature}")
    return prior.tempered(temperature)


def choose_method(
    method: Method | None, prior: Prior, nfe: int, preset: str | None
) -> tuple[Method, Prior, str]:
    """Return the loop that runs, the prior it runs with and, if it is second best, why; else "".

    A prior that has no statistics and cannot make its own gets "gibbs"; a denoiser, whose draws
    of one call need them too, gets draws of several calls.
    """
    if method == "conditioning" and preset is not None:
        raise ValueError(f"method must be 'gibbs' with preset={preset!r}, got {method!r}")
    published = method == "gibbs" or preset is not None
    fault = "" if published and not draws_by_statistics(prior) else lacks_statistics(prior)
    if not fault:
        return "gibbs" if published else "conditioning", prior, ""
    lacks = (
        f"the prior has no statistics and cannot generate images to measure them from ({fault}): "
        "prior.with_statistics(measure_statistics(prior, images)), or `ncvsd statistics PRIOR "
        "--data IMAGES`, takes given ones"
    )
    if method == "conditioning":
        raise ValueError(f"method must be 'gibbs', got 'conditioning': {lacks}")
    if draws_by_statistics(prior):
        prior = prior.with_steps(_steps_without_statistics(nfe))
        lacks += f"; draws take {prior.nfe_per_sample} calls each meanwhile"
    return "gibbs", prior, f"the loop is 'gibbs', the weaker one, as {lacks}"


def draws_by_statistics(prior: Prior) -> TypeGuard[DiffusionPrior]:
    """Tell whether single draws need statistics."""
    return isinstance(prior, DiffusionPrior) and prior.nfe_per_sample == 1


def _steps_without_statistics(nfe: int) -> int:
    """Return how many calls of a denoiser make a draw that needs no covariance: about four."""
    for steps in (4, 5, 3, 2, nfe):
        if steps > 1 and nfe % steps == 0:
            return steps
    raise ValueError(f"nfe must be at least 2 for a denoiser without statistics, got {nfe}")


def choose_plan(
    problem: Problem,
    prior: Prior,
    method: Method,
    *,
    nfe: int,
    schedule: Sequence[float] | None,
    preset: Preset | None,
    sigma_lik: float | None,
    temperature: float | None,
) -> Plan:
    """Return how chains of draws run; arguments and errors as for `solve`."""
    temperature = 1.0 if temperature is None else temperature
    if temperature != 1 and method != "conditioning":
        raise ValueError(f"temperature must be 1 with method {method!r}, got {temperature}")
    traits = PriorTraits.of(prior)
    sweeps = count_sweeps(traits, nfe)
    family = problem.traits.family
    if preset is not None:
        if schedule is not None or sigma_lik is not None:
            raise ValueError(
                "preset must be None when schedule or sigma_lik is given: it sets both, "
                f"got {preset!r}"
            )
        levels, sigma_lik = published_schedule(sweeps), published_sigma_lik(family)
    elif schedule is None:
        levels = default_schedule(method, family, sweeps, traits.sigma_max)
    else:
        levels = tuple(schedule)
    _check_highest(levels, traits)
    level = problem.sigma_y if sigma_lik is None else sigma_lik
    # Draws of the last level would miss y by rho, many times its noise.
    ends_on_y = schedule is None and preset is None and level < levels[-1]
    return Plan(method, levels, level, temperature, ends_on_y=ends_on_y)


def choose_point_plan(
    problem: Problem,
    prior: Prior,
    *,
    nfe: int,
    schedule: Sequence[float] | None,
    sigma_lik: float | None,
    temperature: float | None,
) -> Plan:
    """Return how the chain of a point estimate runs; arguments and errors as for `solve`."""
    traits = PriorTraits.of(prior)
    sweeps = count_sweeps(traits, nfe)
    points = POINTS if traits.points is None else traits.points
    noise = problem.sigma_y / problem.traits.gain
    point = point_settings(problem.traits.family, sweeps, noise, points)
    gives_mean = isinstance(prior, Denoiser) and traits.nfe_per_sample == 1
    is_plain = schedule is None and sigma_lik is None and temperature is None
    if problem.traits.family == "denoise" and is_plain and problem.sigma_y <= traits.sigma_max:
        last = problem.sigma_y if gives_mean and sweeps == 1 else None
        levels = () if last else (problem.sigma_y,) * sweeps
        cooler = DIRECT_TEMPERATURE if traits.has_mean else 1.0
        return Plan("conditioning", levels, problem.sigma_y, cooler, last, direct=True)
    if schedule is not None:
        levels = tuple(schedule)
        levels, last = (levels[:-1], levels[-1]) if gives_mean else (levels, None)
    else:
        last = point.last if gives_mean and point.last else None
        sweeps -= last is not None
        first = min(point.first, traits.sigma_max)
        levels = karras(sweeps, first, min(point.smallest, first / 2)) if sweeps else ()
    plan = Plan(
        "conditioning",
        levels,
        point.noise * problem.sigma_y if sigma_lik is None else sigma_lik,
        point.temperature if temperature is None else temperature,
        last,
    )
    _check_highest(plan.calls, traits)
    return plan


def count_sweeps(traits: PriorTraits, nfe: int, schedule: Sequence[float] | None = None) -> int:
    """Return how many draws of the prior `nfe` calls are; ValueError if a schedule has others."""
    calls = check_count("prior.nfe_per_sample", traits.nfe_per_sample)
    sweeps, rest = divmod(nfe, calls)
    if rest:
        raise ValueError(
            f"nfe must be a multiple of the prior's nfe_per_sample = {calls}, got {nfe}"
        )
    if schedule is not None and len(schedule) != sweeps:
        raise ValueError(
            f"schedule must have nfe / nfe_per_sample = {sweeps} levels, got {len(schedule)}"
        )
    return sweeps


def _check_highest(levels: Sequence[float], traits: PriorTraits) -> None:
    if levels[0] > traits.sigma_max:
        raise ValueError(
            f"schedule must not exceed the prior's sigma_max = {traits.sigma_max}, got {levels[0]}"
        )


def describe_far_sweep(plan: Plan, nfe: int, sigma_y: float) -> str:
    """Return what to say of a single sweep at which draws hardly know y; "" of others."""
    levels = plan.calls
    is_exact = plan.method == "conditioning" and nfe == 1
    if len(levels) > 1 or levels[0] <= FAR * sigma_y or is_exact:
        return ""
    return (
        f"the schedule has one sweep only, at rho = {levels[0]:g}, far above sigma_y = "
        f"{sigma_y:g}: the result hardly follows y; take more calls (nfe) or fewer for each draw "
        "(--steps, with_steps)"
    )
