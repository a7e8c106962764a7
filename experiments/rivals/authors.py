"""Run the code of a rival's authors with our teacher on our measurements, and ours beside it.

    python experiments/rivals/authors.py daps --code DAPS
    python experiments/rivals/authors.py --table

`--code` names a checkout of the authors' repository; nothing of it is kept here. The images, the
measurements and the teacher are those of `benchmarks/run.py`; the settings are the authors' own for
FFHQ. Ours is the row of the benchmark at as many calls, with the same settings. A run adds its
figures to authors.json, `--table` writes them into README.md. NCVSD_DATA and NCVSD_WEIGHTS name the
folders of images and of LPIPS weights.
"""

import argparse
import ast
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from baselines.interface import Models, Problem
from baselines.physics import SingularSystem, linear, pseudo_inverse, singular_system
from baselines.registry import METHODS
from harness.problems import KnownProblem, find_test_set, load_images, make_problem
from ncvsd_inverse import load_prior, metrics
from ncvsd_inverse.files import write_between, write_whole
from ncvsd_inverse.machine import count_passes
from ncvsd_inverse.operators import SuperResolution
from ncvsd_inverse.priors import DiffusionPrior, NCVSDPrior

PRIOR = "ncvsd_faces64"
IMAGES = 16
TASKS = ("sr4x", "deblur_gaussian")
ORIGINS = ("authors", "ours")
FOLDER = Path(__file__).parent
MARKS = ("<!-- written by authors.py -->", "<!-- end of authors.py -->")


class EpsModel(nn.Module):
    """The teacher as the network of a discrete variance-preserving diffusion.

    Takes x_t = sqrt(a) x0 + sqrt(1 - a) eps and one of 1000 times of the linear schedule, returns
    eps, shape (B, C, H, W), with `extra` channels of zeros for code that expects a variance.
    """

    def __init__(self, teacher: DiffusionPrior, extra: int = 0) -> None:
        super().__init__()
        self.teacher = teacher
        self.extra = extra
        self.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        self.kept = (1 - self.betas).cumprod(0)

    def forward(self, x: Tensor, t: Tensor, *others: object) -> Tensor:
        """Return eps at the one time of a batch."""
        kept = float(self.kept[int(t.flatten()[0])])
        sigma = math.sqrt((1 - kept) / kept)
        noisy = x / math.sqrt(kept)
        x0 = self.teacher.denoise(noisy, min(sigma, self.teacher.sigma_max))
        eps = (noisy - x0) / sigma
        return torch.cat((eps, torch.zeros_like(eps)[:, : self.extra]), 1)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Make moves to a GPU do nothing."""
    plain = Tensor.to

    def to(tensor: Tensor, *given: Any, **named: Any) -> Tensor:  # noqa: ANN401
        moved = bool(given) and str(given[0]).startswith("cuda")
        return tensor if moved else plain(tensor, *given, **named)

    with mock.patch.object(Tensor, "to", to), mock.patch.object(Tensor, "cuda", lambda x: x):
        yield


class Coordinates:
    """What code by singular values asks of an operator, on flat vectors, largest values first."""

    def __init__(self, system: SingularSystem) -> None:
        self.system = system
        values, self.order = system.values.flatten().sort(descending=True)
        self.shape = system.values.shape[1:]
        self.places = torch.argsort(self.order)
        values = values[: int((values > 1e-6).sum())]
        # As in the authors' blurs, values that are next to nothing are nothing.
        self.values = torch.where(values < 1e-3, 0.0, values)

    def flatten(self, coordinates: Tensor) -> Tensor:
        """Return coordinates of images as vectors in order."""
        return coordinates.flatten(1)[:, self.order]

    def unflatten(self, vectors: Tensor) -> Tensor:
        """Return vectors, zeros appended, as coordinates of images."""
        whole = vectors.new_zeros(len(vectors), len(self.order))
        whole[:, : vectors.shape[1]] = vectors.flatten(1)
        return whole[:, self.places].view(-1, *self.shape)


def decompose(base: Any, problem: Problem) -> Any:  # noqa: ANN401
    """Return an instance of the authors' base class `base` for the problem's operator."""
    parts = Coordinates(singular_system(problem.operator, problem.y))
    system = parts.system
    size, num = len(parts.order), len(parts.values)
    measured = problem.y.shape[1:]
    functions = {
        "V": lambda _, v: system.right(parts.unflatten(v)).flatten(1),
        "Vt": lambda _, v: parts.flatten(system.right_adjoint(v.view(-1, *parts.shape))),
        "U": lambda _, v: system.left(parts.unflatten(v)).flatten(1),
        "Ut": lambda _, v: parts.flatten(system.left_adjoint(v.view(-1, *measured)))[:, :num],
        "singulars": lambda _: parts.values.clone(),
        "add_zeros": lambda _, v: torch.cat((v, v.new_zeros(len(v), size - v.shape[1])), 1),
    }
    return type("Ours", (base,), functions)()


def axis_basis(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the singular values (side,) and V (side, side) of M, where A x = M x M^T."""
    side = problem.shape[-1]
    stripes = torch.eye(side, dtype=torch.float64)[:, None, :, None].expand(-1, 3, -1, side)
    matrix = problem.operator(stripes)[:, 0, :, 0].T
    _, values, right = torch.linalg.svd(matrix)
    padded = torch.zeros(side).double()
    padded[: len(values)] = values
    return padded.float(), right.T.float()


def run_daps(problem: Problem, teacher: DiffusionPrior) -> Tensor:
    """DAPS: 200 levels of 5 ODE steps and 100 Langevin steps."""
    module = _import("sampler", stubs=("forward_operator",))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.device = nn.Parameter(torch.zeros(1))

        def get_in_shape(self) -> tuple[int, ...]:
            return problem.shape[1:]

        def tweedie(self, x: Tensor, sigma: Tensor) -> Tensor:
            return teacher.denoise(x, min(float(sigma), teacher.sigma_max))

        def score(self, x: Tensor, sigma: Tensor) -> Tensor:
            return (self.tweedie(x, sigma) - x) / sigma**2

    def gradient(x: Tensor, y: Tensor, return_loss: bool) -> tuple[Tensor, Tensor]:
        error = problem.operator(x) - y
        return 2 * linear(problem.operator).adjoint(error), error.square().sum()

    langevin = {"num_steps": 100, "lr": 1e-4, "tau": 0.01, "lr_min_ratio": 0.01}
    edm = {"name": "edm", "timestep": "poly-7"}
    sampler = module.get_sampler(
        latent=False,
        annealing_scheduler_config={**edm, "num_steps": 200, "sigma_max": 80, "sigma_min": 0.1},
        diffusion_scheduler_config={**edm, "num_steps": 5, "sigma_min": 0.01},
        mcmc_sampler_config={**langevin, "mc_algo": "langevin", "prior_solver": "gaussian"},
    )
    model = Model()
    start = sampler.get_start(len(problem.y), model)
    restored: Tensor = sampler.sample(model, start, SimpleNamespace(gradient=gradient), problem.y)
    return restored


def run_pnpdm(problem: Problem, teacher: DiffusionPrior) -> Tensor:
    """PnP-DM with the reverse SDE on its VP grid: 100 sweeps."""
    module = _import("pnpdm.samplers.pnp_edm.pnp_edm")
    operator = linear(problem.operator)

    def proximal(x: Tensor, y: Tensor, sigma: float, rho: float) -> Tensor:
        noisy = x / rho**2 + torch.randn_like(x) / rho
        target = y / sigma**2 + torch.randn_like(y) / sigma
        rhs = operator.adjoint(target) + noisy
        solved: Tensor = operator.solve_normal(rhs, a=sigma**-2, b=rho**-2)
        return solved

    net = _EDMNetwork(teacher)
    vp = {"solver": "euler", "discretization": "vp", "schedule": "vp", "scaling": "vp"}
    config = SimpleNamespace(
        mode="vp_sde",
        num_iters=100,
        rho=10.0,
        rho_decay_rate=0.9,
        rho_min=0.3,
        num_samples_per_run=len(problem.y),
        common_kwargs={"num_steps": 100},
        vp_kwargs={**vp, "epsilon_s": 1e-3},
    )
    sampler = module.PnPEDMBatch(
        config,
        net,
        SimpleNamespace(proximal_generator=proximal),
        SimpleNamespace(sigma=problem.sigma_y),
        problem.y.device,
    )
    restored: Tensor = sampler(torch.zeros(problem.shape), problem.y)
    return restored


class _EDMNetwork(nn.Module):
    def __init__(self, teacher: DiffusionPrior) -> None:
        super().__init__()
        self.teacher = teacher
        self.sigma_min, self.sigma_max = teacher.sigma_min, teacher.sigma_max

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.teacher.denoise(x.float(), float(sigma))


def run_ddrm(problem: Problem, teacher: DiffusionPrior) -> Tensor:
    """DDRM: 20 steps, eta 0.85, eta_b 1."""
    module = _import("functions.denoising")
    base = _import("functions.svd_replacement").H_functions
    model = EpsModel(teacher)
    with on_cpu():
        states, _ = module.efficient_generalized_steps(
            torch.randn(problem.shape),
            range(0, 1000, 50),
            model,
            model.betas.float(),
            decompose(base, problem),
            problem.y.flatten(1),
            problem.sigma_y,
            etaB=1.0,
            etaA=0.85,
            etaC=0.85,
        )
    restored: Tensor = states[-1]
    return restored


def run_ddnm(problem: Problem, teacher: DiffusionPrior) -> Tensor:
    """DDNM+: 100 steps, eta 0.85."""
    module = _import("functions.svd_ddnm")
    operators = _import("functions.svd_operators", stubs=("cv2",))
    functions = decompose(operators.A_functions, problem)
    values, basis = axis_basis(problem)
    # Their weights are written out for an operator that is a matrix on both axes.
    weights = operators.Deblurring.__new__(operators.Deblurring)
    weights.img_dim, weights.channels, weights.V_small = len(values), 3, basis
    both, weights._perm = torch.outer(values, values).flatten().sort(descending=True)
    weights._singulars_orig = torch.where(both < 1e-3, 0.0, both)
    functions.Lambda, functions.Lambda_noise = weights.Lambda, weights.Lambda_noise
    model = EpsModel(teacher)
    travel = SimpleNamespace(T_sampling=100, travel_length=1, travel_repeat=1)
    config = SimpleNamespace(
        diffusion=SimpleNamespace(num_diffusion_timesteps=1000), time_travel=travel
    )
    with on_cpu():
        (restored,), _ = module.ddnm_plus_diffusion(
            torch.randn(problem.shape),
            model,
            model.betas.float(),
            0.85,
            functions,
            problem.y.flatten(1),
            problem.sigma_y,
            config=config,
        )
    found: Tensor = restored
    return found


def run_dps(problem: Problem, teacher: DiffusionPrior) -> Tensor:
    """DPS: 1000 steps, scale 0.3."""
    return _guide(problem, teacher, "ps", {"scale": 0.3}, sampler="ddpm", respacing="")


def run_mmps(problem: Problem, teacher: DiffusionPrior) -> Tensor:
    """MMPS: 100 steps, 5 iterations of GMRES."""
    settings = {"scale": 1.0, "maxiter": 5}
    return _guide(problem, teacher, "mmps", settings, sampler="ddim", eta=1.0, respacing=100)


def _guide(
    problem: Problem,
    teacher: DiffusionPrior,
    name: str,
    settings: Mapping[str, float],
    *,
    respacing: str | int,
    **sampler: object,
) -> Tensor:
    """Run a conditioning method of the code that DPS and MMPS share, image by image."""
    stubs = ("motionblur", "motionblur.motionblur", "bkse")
    sampling = _import("guided_diffusion.gaussian_diffusion", stubs=stubs)
    conditioning = _import("guided_diffusion.condition_methods")
    diffusion = sampling.create_sampler(
        **sampler,
        steps=1000,
        noise_schedule="linear",
        model_mean_type="epsilon",
        model_var_type="fixed_small",
        dynamic_threshold=False,
        clip_denoised=True,
        rescale_timesteps=False,
        timestep_respacing=respacing,
    )
    model = EpsModel(teacher)
    operator = SimpleNamespace(forward=lambda x, **_: problem.operator(x))
    noiser = SimpleNamespace(__name__="gaussian", sigma=problem.sigma_y)
    restored = []
    for y in problem.y[:, None]:
        method = conditioning.get_conditioning_method(name, operator, noiser, **settings)
        found = diffusion.p_sample_loop(
            model=model,
            x_start=torch.randn(1, *problem.shape[1:]).requires_grad_(),
            measurement=y,
            measurement_cond_fn=method.conditioning,
            record=False,
            save_root="",
        )
        restored.append(found.detach())
    return torch.cat(restored)


def run_diffpir(problem: Problem, teacher: DiffusionPrior) -> Tensor:
    """DiffPIR: 100 steps, lambda 1, zeta 0.1 for blurs and 0.25 for reductions.

    Their script is one function; its loop over the steps runs as it stands, with our data step.
    """
    source = Path(sys.path[0], "main_ddpir_deblur.py").read_text(encoding="utf-8")
    loops = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.For) and ast.unparse(node.iter) == "range(len(seq))"
    ]
    loop = compile(ast.Module([loops[0]], []), "main_ddpir_deblur.py", "exec")
    network, operator, steps = EpsModel(teacher), linear(problem.operator), 100
    kept = network.kept.float()
    ratios = ((1 - kept) / kept).sqrt()
    offset = operator(torch.ones(problem.shape))
    y = (problem.y + offset) / 2  # of images in [0, 1]

    def find_nearest(values: Tensor, value: float) -> int:
        return int((values - float(value)).abs().argmin())

    def model_fn(x: Tensor, noise_level: float, **_: object) -> Tensor:
        t = find_nearest(ratios, noise_level / 255)
        share = kept[t]
        x0 = (x - (1 - share).sqrt() * network(x, torch.tensor([t]))) / share.sqrt()
        clipped: Tensor = x0.clamp(-1, 1)
        return clipped

    def data_solution(x: Tensor, *given: Any) -> Tensor:  # noqa: ANN401
        tau = float(given[4])
        solved: Tensor = operator.solve_normal(operator.adjoint(y) + tau * x, a=1.0, b=tau)
        return solved

    sequence = [int(value) for value in torch.linspace(0, 1000**2, steps).double().sqrt()]
    sequence[-1] -= 1
    names: dict[str, Any] = {
        **dict.fromkeys(("FB", "FBC", "F2B", "FBFy", "sf", "model", "diffusion", "alphas_cumprod")),
        **{"np": np, "torch": torch, "seq": sequence, "progress_seq": [], "t_start": 999},
        **{"generate_mode": "DiffPIR", "model_output_type": "pred_xstart", "ddim_sample": False},
        **{"model_out_type": "pred_xstart", "iter_num_U": 1, "num_train_timesteps": 1000},
        **{"sub_1_analytic": True, "guidance_scale": 1.0, "eta": 0.0, "save_progressive": False},
        **ZETAS["sr4x" if isinstance(operator, SuperResolution) else "deblur_gaussian"],
        "noise_model_t": 0,
        "sigmas": ratios.flip(0),
        "reduced_alpha_cumprod": ratios,
        "rhos": (problem.sigma_y / 2) ** 2 / ratios**2,
        "betas": network.betas.float(),
        "sqrt_alphas_cumprod": kept.sqrt(),
        "sqrt_1m_alphas_cumprod": (1 - kept).sqrt(),
        "utils_model": SimpleNamespace(find_nearest=find_nearest, model_fn=model_fn),
        "sr": SimpleNamespace(data_solution=data_solution),
        "x": torch.randn(problem.shape),
    }
    exec(loop, names)
    restored: Tensor = 2 * names["x_0"] - 1
    return restored


def run_reddiff(problem: Problem, teacher: DiffusionPrior) -> Tensor:
    """RED-diff: 1000 steps, weight 0.25 over the signal-to-noise ratio."""
    stubs = ("omegaconf", "models", "models.classifier_guidance_model", "utils.degredations")
    module = _import("algos.reddiff", stubs=("utils", *stubs))
    network = EpsModel(teacher)
    kept = torch.cat((torch.ones(1).double(), network.kept)).float()
    solver = module.REDDIFF.__new__(module.REDDIFF)
    solver.diffusion = SimpleNamespace(alpha=lambda t: kept[t.cpu() + 1])

    def model(x: Tensor, _: Tensor, t: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            eps = network(x, t)
        share = solver.diffusion.alpha(t).view(-1, 1, 1, 1)
        return eps, (x - (1 - share).sqrt() * eps) / share.sqrt()

    solver.model = model
    solver.H = SimpleNamespace(
        H=lambda x: problem.operator(x.view(-1, *problem.shape[1:])).flatten(1),
        H_pinv=lambda y: pseudo_inverse(problem.operator, y.view(problem.y.shape)),
    )
    settings = {"deg": "", "sigma_y": problem.sigma_y}
    solver.cfg = SimpleNamespace(
        algo=SimpleNamespace(**settings), exp=SimpleNamespace(save_evolution=False)
    )
    solver.awd, solver.cond_awd, solver.eta = True, False, 1.0
    solver.grad_term_weight, solver.obs_weight, solver.lr = 0.25, 1.0, 0.1
    solver.denoise_term_weight, solver.sigma_x0 = "linear", 0.0001
    with on_cpu():
        _, mean = solver.sample(
            torch.zeros(problem.shape), None, list(range(1000)), y_0=problem.y.flatten(1)
        )
    restored: Tensor = mean.detach()
    return restored


@dataclass(frozen=True)
class Rival:
    """A rival: its authors' code and our row.

    Attributes:
        run: restores a problem's images by the authors' code.
        repository: owner and name on GitHub.
        ours: name of the benchmark's method.
        calls: network calls at which ours runs.
        settings: what of our settings differs from the defaults.
        by_task: the same for one task.
    """

    run: Callable[[Problem, DiffusionPrior], Tensor]
    repository: str
    ours: str
    calls: int
    settings: Mapping[str, float]
    by_task: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


ZETAS = {"sr4x": {"zeta": 0.25}, "deblur_gaussian": {"zeta": 0.1}}

RIVALS = {
    "daps": Rival(run_daps, "zhangbingliang2019/DAPS", "daps", 1000, {}),
    "pnpdm": Rival(run_pnpdm, "zihuiwu/PnP-DM-public", "pnpdm", 2022, {}),
    "ddrm": Rival(run_ddrm, "bahjat-kawar/ddrm", "ddrm", 20, {"eta": 0.85, "etab": 1.0}),
    "ddnm": Rival(run_ddnm, "wyhuai/DDNM", "ddnm", 100, {"eta": 0.85, "null": 1.0}),
    "diffpir": Rival(run_diffpir, "yuanzhi-zhu/DiffPIR", "diffpir", 100, {"lambda": 0.5}, ZETAS),
    "mmps": Rival(run_mmps, "francois-rozet/mmps-benchmark", "mmps", 100, {}),
    "reddiff": Rival(run_reddiff, "NVlabs/RED-diff", "reddiff", 1000, {}),
    "dps": Rival(run_dps, "DPS2022/diffusion-posterior-sampling", "dps", 1000, {"scale": 0.3}),
}


def _import(name: str, stubs: tuple[str, ...] = ()) -> Any:  # noqa: ANN401
    """Import a module of the checkout, with others of the names replaced by nothing."""
    for stub in stubs:
        sys.modules[stub] = mock.MagicMock()
    return importlib.import_module(name)


def judge(known: KnownProblem, restored: Tensor) -> dict[str, list[float]]:
    """Return the figures of each image."""
    x = restored.detach().to(known.x0).clamp(-1, 1)
    found = {
        "psnr": metrics.psnr(x, known.x0),
        "lpips-alex": metrics.lpips(x, known.x0, net="alex"),
        "lpips-vgg": metrics.lpips(x, known.x0, net="vgg"),
    }
    return {name: [round(float(value), 4) for value in values] for name, values in found.items()}


def run(name: str, code: Path, tasks: list[str], images: int, origins: list[str]) -> None:
    """Run a rival on tasks and add what it gives to the records."""
    rival = RIVALS[name]
    sys.path.insert(0, str(code.resolve()))
    student, teacher = load_prior(PRIOR), load_prior(f"{PRIOR}_teacher")
    if not (isinstance(student, NCVSDPrior) and isinstance(teacher, DiffusionPrior)):
        raise TypeError(f"{PRIOR} must be a distilled prior with a teacher")
    pictures = load_images(find_test_set(PRIOR), images, prior=student, size=64)
    commit = subprocess.run(
        ["git", "-C", str(code), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    for task in tasks:
        known = make_problem(task, pictures, seed=0, device=torch.device("cpu"))
        keys = tuple((0, image) for image in range(len(known.y)))
        problem = Problem(known.y, known.task.operator, known.task.sigma_y, keys)
        models = Models(teacher, student, min(teacher.sigma_max, student.sigma_max))
        method = METHODS[rival.ours]
        settings = {**method.settings, **rival.settings, **rival.by_task.get(task, {})}
        rows: dict[str, Callable[[], Tensor]] = {
            "authors": partial(rival.run, problem, teacher),
            "ours": partial(method.run, problem, models, rival.calls, settings),
        }
        for by in origins:
            torch.manual_seed(0)
            started = time.perf_counter()
            with count_passes([teacher.network]) as passes:
                restored = rows[by]()
            record = {
                "method": name,
                "task": task,
                "by": by,
                "repository": rival.repository,
                "commit": commit,
                "images": len(known.y),
                "calls": round(passes.forward / len(known.y)),
                "seconds": round(time.perf_counter() - started, 1),
                **judge(known, restored),
            }
            add(record)
            print({key: _mean(value) for key, value in record.items()}, flush=True)


def _mean(value: Any) -> Any:  # noqa: ANN401
    return round(sum(value) / len(value), 4) if isinstance(value, list) else value


def add(record: Mapping[str, Any]) -> None:
    """Put a record in the place of the one of the same method, task and origin."""
    path = FOLDER / "authors.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    same = ("method", "task", "by")
    kept = [each for each in kept if any(each[key] != record[key] for key in same)]
    kept = sorted([*kept, record], key=lambda each: tuple(each[key] for key in same))
    lines = ",\n".join(json.dumps(each) for each in kept)
    write_whole(path, f"[\n{lines}\n]\n")


def write_table() -> None:
    """Write the table of README.md from the records."""
    records = json.loads((FOLDER / "authors.json").read_text(encoding="utf-8"))
    lines = [
        "| method | task | images | calls | authors' code | ours |",
        "|---|---|---|---|---|---|",
    ]
    by = {(each["method"], each["task"], each["by"]): each for each in records}
    for name in RIVALS:
        for task in TASKS:
            cells = []
            for origin in ORIGINS:
                found = by.get((name, task, origin))
                names = ("psnr", "lpips-alex", "lpips-vgg")
                cells.append(
                    "{:.2f} {:.4f} {:.4f}".format(*(_mean(found[key]) for key in names))
                    if found
                    else ""
                )
            first = by.get((name, task, "authors"))
            if first:
                title = METHODS[RIVALS[name].ours].title
                counts = f"{first['images']} | {first['calls']}"
                lines.append(f"| {title} | {task} | {counts} | {cells[0]} | {cells[1]} |")
    write_between(FOLDER / "README.md", MARKS, "\n".join(lines))


def main() -> None:
    """Run a rival or write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", nargs="?", choices=RIVALS)
    parser.add_argument("--code", type=Path, help="checkout of the authors' repository")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--images", type=int, default=IMAGES, help="from the first (%(default)s)")
    parser.add_argument(
        "--by", nargs="+", choices=ORIGINS, default=list(ORIGINS), help="whose code"
    )
    parser.add_argument("--table", action="store_true", help="write the table into README.md")
    args = parser.parse_args()
    if args.method:
        if args.code is None or not args.code.is_dir():
            parser.error(f"--code must be a folder, got {args.code}")
        os.environ.setdefault("MPLBACKEND", "agg")
        run(args.method, args.code, args.task, args.images, args.by)
    if args.table:
        write_table()


if __name__ == "__main__":
    main()
