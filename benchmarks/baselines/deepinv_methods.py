"""DPS, DDRM, DiffPIR and PiGDM by deepinv's own samplers.

All follow the linear variance-preserving schedule of Ho et al., arXiv 2006.11239 (beta from 0.1 to
20 over unit time, noise std 150 to 0.01), spread evenly over the calls asked for. Each image draws
from its own generator, see `baselines.physics.OwnDraws`.
"""

import math

import torch
from torch import Tensor, nn

from baselines.interface import Ladder, Method, Models, Problem, Settings
from baselines.physics import (
    OwnDraws,
    TeacherDenoiser,
    UnitDenoiser,
    finish,
    linear,
    make_decomposed_physics,
    make_physics,
    unit_measurement,
)
from ncvsd_inverse.checks import check_count

__all__ = ["METHODS", "run_ddrm", "run_diffpir", "run_dps", "run_pigdm"]

_FIRST_STEP = 1e-3
"""Time of the least noise that a schedule of 1000 training steps knows."""


def run_dps(problem: Problem, models: Models, calls: int, settings: Settings) -> Tensor:
    """Diffusion posterior sampling: what deepinv.sampling.DPS puts together.

    The guidance is -weight * gradient of ||y - A D(x)||, with `weight` given for one measurement
    and multiplied by the square root of their number, as the norm grows. deepinv multiplies it by
    the step beta_t as any score, the paper does not: the paper's step length is beta_t * weight,
    and deepinv's default weight of 1 returns draws of the prior. The state stays in [-1, 1], where
    deepinv's clipping of D to [-1, 1] is right; in its default units it is not.

    Source:
        Chung et al., arXiv 2209.14687.
    """
    from deepinv.sampling import DPSDataFidelity

    weight = settings["weight"] * math.sqrt(problem.y[0].numel())
    physics = make_physics(problem.operator, problem.y.device)
    fidelity = DPSDataFidelity(weight=weight, clip=(-1, 1))
    return _reverse_diffusion(problem, models, calls, physics, fidelity)


def run_pigdm(problem: Problem, models: Models, calls: int, settings: Settings) -> Tensor:
    """Pseudo-inverse guidance: deepinv's PiGDMDataFidelity in its ancestral sampler.

    The state stays in [-1, 1]: deepinv's r^2 = sigma^2 / (1 + sigma^2) takes images of unit
    variance, as the paper does, and in its default units of [0, 1] that is four times as much.
    The solve is exact, through the operator's singular system. `weight` is a factor on the
    guidance, 1 in the paper.

    Source:
        Song et al., ICLR 2023, with their eta = 1.
    """
    from deepinv.sampling import PiGDMDataFidelity

    physics = make_decomposed_physics(problem.operator, problem.y, problem.sigma_y)
    fidelity = PiGDMDataFidelity(weight=settings["weight"], clip=(-1, 1))
    return _reverse_diffusion(problem, models, calls, physics, fidelity)


@torch.no_grad()
def run_ddrm(problem: Problem, models: Models, calls: int, settings: Settings) -> Tensor:
    """Denoising diffusion restoration in the operator's singular system: deepinv.sampling.DDRM.

    deepinv divides its noise by sqrt 2, which is drawn sqrt 2 times as large here. It takes
    singular values below sigma_y for 0.

    Source:
        Kawar et al., arXiv 2201.11793; `eta` and `etab` as there.
    """
    from deepinv.sampling import DDRM
    from deepinv.sampling import VariancePreservingDiffusion as Schedule

    sampler = DDRM(
        TeacherDenoiser(models.teacher, models.sigma_max),
        sigmas=Schedule().sigma_t(_times(calls)).tolist(),
        eta=settings["eta"],
        etab=settings["etab"],
    )
    physics = make_decomposed_physics(problem.operator, problem.y, problem.sigma_y)
    with OwnDraws(problem.generators(), scale=math.sqrt(2)):
        x0 = sampler(problem.y, physics)
    return finish(problem, x0)


@torch.no_grad()
def run_diffpir(problem: Problem, models: Models, calls: int, settings: Settings) -> Tensor:
    """Plug-and-play restoration by diffusion: deepinv.sampling.DiffPIR.

    It works on images in [0, 1]. Its `lambda` is twice that of the paper, 2 being the weight of
    Bayes' rule: it takes levels in units of [-1, 1] with sigma_y in units of [0, 1] (a factor 4)
    and halves the step (a factor 1/2). Its last call is made but not used: it returns the state
    before, with noise of std 0.01.

    Source:
        Zhu et al., arXiv 2305.08995; `lambda` and `zeta` as there.
    """
    from deepinv.optim.data_fidelity import L2
    from deepinv.sampling import DiffPIR

    check_count("calls", calls, least=2)
    operator, device = linear(problem.operator), problem.y.device
    sampler = DiffPIR(
        UnitDenoiser(TeacherDenoiser(models.teacher, models.sigma_max)),
        L2(),
        sigma=problem.sigma_y / 2,
        max_iter=calls,
        zeta=settings["zeta"],
        lambda_=settings["lambda"],
        device=device,
    )
    physics = make_physics(operator, device)
    with OwnDraws(problem.generators()):
        x0 = sampler(unit_measurement(operator, problem.y), physics)
    return finish(problem, 2 * x0 - 1)


def _times(calls: int) -> Tensor:
    """Return one time for each call, from 1 to that of the least noise, float64."""
    return torch.linspace(1, _FIRST_STEP, check_count("calls", calls), dtype=torch.float64)


def _reverse_diffusion(
    problem: Problem, models: Models, calls: int, physics: nn.Module, fidelity: nn.Module
) -> Tensor:
    """Run the ancestral sampler of the guided diffusion in units of [-1, 1]."""
    from deepinv.sampling import DDPMSolver, PosteriorDiffusion, VariancePreservingDiffusion

    device = problem.y.device
    end = torch.zeros(1, dtype=torch.float64)
    times = torch.cat([_times(calls), end]).to(device)
    schedule = VariancePreservingDiffusion(alpha=1.0, device=device)
    sampler = PosteriorDiffusion(
        data_fidelity=fidelity,
        denoiser=TeacherDenoiser(models.teacher, models.sigma_max),
        sde=schedule,
        solver=DDPMSolver(timesteps=times),
        minus_one_one=False,
        device=device,
    )
    with OwnDraws(problem.generators()):
        eps = torch.empty(problem.shape, dtype=torch.float64, device=device).normal_()
        start = schedule.scale_t(times[0]) * schedule.sigma_t(times[0]) * eps
        x0 = sampler(problem.y, physics, x_init=start)
    return finish(problem, x0)


METHODS: tuple[Method, ...] = (
    Method(
        name="dps",
        title="DPS",
        run=run_dps,
        network="teacher",
        samples=True,
        linear_only=False,
        calls=(100, 1000),
        reference="chung2023dps",
        settings={"weight": 10.0},
        search={"weight": Ladder()},
    ),
    Method(
        name="ddrm",
        title="DDRM",
        run=run_ddrm,
        network="teacher",
        samples=True,
        linear_only=True,
        calls=(20, 100),
        reference="kawar2022ddrm",
        settings={"eta": 0.85, "etab": 1.0},
        search={
            "eta": Ladder(values=(0.0, 0.3, 0.5, 0.7, 0.85, 1.0)),
            "etab": Ladder(values=(0.0, 0.3, 0.5, 0.7, 0.85, 1.0)),
        },
    ),
    Method(
        name="diffpir",
        title="DiffPIR",
        run=run_diffpir,
        network="teacher",
        samples=True,
        linear_only=True,
        calls=(20, 100),
        reference="zhu2023diffpir",
        settings={"lambda": 7.0, "zeta": 0.3},
        search={
            "lambda": Ladder(),
            "zeta": Ladder(values=(0.0, 0.1, 0.3, 0.5, 0.7, 1.0)),
        },
        least_calls=2,
    ),
    Method(
        name="pigdm",
        title="PiGDM",
        run=run_pigdm,
        network="teacher",
        samples=True,
        linear_only=True,
        calls=(20, 100),
        reference="song2023pigdm",
        settings={"weight": 1.0},
        search={"weight": Ladder()},
    ),
)
