"""DDRM and DiffPIR by deepinv's own samplers.

All follow the linear variance-preserving schedule of Ho et al., arXiv 2006.11239 (beta from 0.1 to
20 over unit time, noise std 150 to 0.01), spread evenly over the calls asked for. Each image draws
from its own generator, see `baselines.physics.OwnDraws`.
"""

import math

import torch
from torch import Tensor

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

__all__ = ["METHODS", "run_ddrm", "run_diffpir"]

_FIRST_STEP = 1e-3
"""Time of the least noise that a schedule of 1000 training steps knows."""


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
    and halves the step (a factor 1/2). The authors' code has 1 where this has 0.5. The last call is
    made but not used, as there: what is returned is the state before, with noise of std 0.01.

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


METHODS: tuple[Method, ...] = (
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
)
