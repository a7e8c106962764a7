r"""Ways to spend ten calls of a point estimate otherwise, beside the way that `solve` takes.

    python experiments/few_step/further.py --prior ncvsd_faces64 --data DIR/faces64/val.zip \
        --train DIR/faces64/train.zip
    python experiments/few_step/further.py --prior ncvsd_natural --data DIR/natural/val.zip \
        --train DIR/natural/train.zip --size 128 --images 24

- kept C: a share C of the noise before a call is the noise that the call before predicted.
- averaged K: the last sweeps condition the mean of K draws, and there are fewer sweeps.
- mixed: images of all sweeps in a weighted sum, with weights by least squares on `--fit` images.
- map: the covariance of a level is scaled from pixel to pixel by the variance that a small network,
  trained by its likelihood on `--train`, sees in the noisy image and the mean.

PSNR, lpips-alex and lpips-vgg are means over `--images` images from place `--skip` on, which the
settings of the prior were not chosen on; the settings are the prior's own.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ncvsd_inverse import load_prior, make_task
from ncvsd_inverse.images import centre_crop, read_images
from ncvsd_inverse.metrics import lpips, psnr
from ncvsd_inverse.numerics import draw_normal, make_generators
from ncvsd_inverse.priors import NCVSDPrior
from ncvsd_inverse.protocols import SIGMA_Y, Covariance, LinearOperator
from ncvsd_inverse.sampling.chains import Plan
from ncvsd_inverse.sampling.choices import choose_point_plan, temper
from ncvsd_inverse.sampling.matheron import Matheron
from ncvsd_inverse.sampling.problem import Problem
from ncvsd_inverse.schedules import karras

TASKS = ("inpaint_box", "inpaint_random", "sr4x", "deblur_gaussian", "deblur_motion")
CALLS = 10


@dataclass(frozen=True)
class Way:
    """How a chain differs from that of `solve`.

    Attributes:
        kept: share of the predicted noise in the noise before a call, in [0, 1].
        draws: draws of which each of the last sweeps conditions the mean.
        sweeps: how many sweeps do so.
        spread: (u, mean, rho) -> factors on the std of images, (B, 1, H, W).
    """

    kept: float = 0.0
    draws: int = 1
    sweeps: int = 0
    spread: Callable[[Tensor, Tensor, float], Tensor] | None = None


def run(problem: Problem, prior: NCVSDPrior, plan: Plan, way: Way) -> list[Tensor]:
    """Return the images after each call of a chain of `CALLS` calls."""
    generators, images = problem.generators(), []
    assert isinstance(problem.operator, LinearOperator)
    assert prior.statistics is not None
    conditioner = Matheron(problem.operator, problem.y, plan.sigma_lik)
    tempered = temper(prior, plan.temperature)
    like = problem.y.new_zeros(problem.shape)
    covariance = prior.statistics.covariance(math.inf, like)
    x = conditioner.start(prior.statistics.mean_image(like), covariance, like, generator=generators)
    levels = plan.levels
    if way.sweeps:
        number = len(levels) - way.sweeps * (way.draws - 1)
        levels = karras(number, levels[0], levels[-1], 7.0)
    noise = None
    for place, rho in enumerate(levels):
        fresh = draw_normal(x, generators)
        if noise is None:
            noise = fresh
        u = x + rho * (way.kept * noise + math.sqrt(1 - way.kept**2) * fresh)
        count = way.draws if place >= len(levels) - way.sweeps else 1
        drawn = [tempered.sample(u, rho, generator=generators) for _ in range(count)]
        x0 = torch.stack(drawn).mean(0)
        noise = (u - x0) / rho
        covariance = prior.statistics.covariance(rho, x0)
        if way.spread is None:
            x = conditioner.draw(x0, covariance, generator=generators, temperature=plan.temperature)
        else:
            eps = plan.temperature * plan.sigma_lik * draw_normal(problem.y, generators)
            root = way.spread(u, x0, rho)
            x = x0 + move(problem, plan.sigma_lik, eps, x0, covariance, root)
        images.append(x)
    if plan.last is not None:
        images.append(prior.denoise(x, plan.last))
    return images


def move(
    problem: Problem,
    sigma_lik: float,
    eps: Tensor,
    x: Tensor,
    covariance: Covariance,
    root: Tensor,
    iterations: int = 60,
) -> Tensor:
    """Return S A^T (A S A^T + s^2 I)^-1 (y + s e - A x), S = R C R, by conjugate gradients."""
    operator = problem.operator
    assert isinstance(operator, LinearOperator)
    measured = problem.traits.measured or (lambda y: y)

    def scaled(v: Tensor) -> Tensor:
        coordinates = covariance.coordinates(root * operator.adjoint(v))
        return root * covariance.images(covariance.variances * coordinates)

    def apply(v: Tensor) -> Tensor:
        return measured(operator(scaled(v))) + sigma_lik**2 * v

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))

    right = measured(problem.y + eps - operator(x))
    v, rest = torch.zeros_like(right), right
    direction, square = rest, inner(rest, rest)
    for _ in range(iterations):
        applied = apply(direction)
        step = square / inner(direction, applied).clamp(min=1e-30)
        v, rest = v + step * direction, rest - step * applied
        fresh = inner(rest, rest)
        direction, square = rest + fresh / square.clamp(min=1e-30) * direction, fresh
    return scaled(v)


class Spread(nn.Module):
    """The log of a variance map from a noisy image, its mean and the level."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(10, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 5, padding=2),
            nn.SiLU(),
            nn.Conv2d(channels, 1, 5, padding=2),
        )

    def forward(self, u: Tensor, mean: Tensor, rho: Tensor) -> Tensor:
        """Return the logs, shape (B, 1, H, W)."""
        level = rho.log().view(-1, 1, 1, 1).expand_as(u[:, :1])
        noise = (u - mean) / rho.view(-1, 1, 1, 1)
        logs: Tensor = self.layers(
            torch.cat((mean, noise, mean.diff(dim=2, prepend=mean[:, :, :1]), level), 1)
        )
        return logs


def learn_spread(
    prior: NCVSDPrior, images: Tensor, steps: int, batch: int = 16
) -> Callable[[Tensor, Tensor, float], Tensor]:
    """Train a variance map by its likelihood and return factors on stds, of mean square 1."""
    torch.manual_seed(0)
    network = Spread()
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    for step in range(steps):
        x0 = images[torch.randint(len(images), (batch,))]
        rho = torch.exp(torch.empty(batch).uniform_(math.log(0.03), math.log(3)))
        u = x0 + rho.view(-1, 1, 1, 1) * torch.randn_like(x0)
        mean = prior.denoise(u, rho)
        logs = network(u, mean, rho)
        loss = (logs + (x0 - mean).square().mean(1, keepdim=True) / logs.exp()).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)

    @torch.no_grad()
    def spread(u: Tensor, mean: Tensor, rho: float) -> Tensor:
        variance: Tensor = network(u, mean, torch.full((len(u),), rho)).exp()
        return (variance / variance.mean((1, 2, 3), keepdim=True)).sqrt()

    return spread


def pose(name: str, images: Tensor, first: int) -> Problem:
    """Return a task with measurements of the images, image i's noise that of seed i."""
    task = make_task(name, (images.shape[2], images.shape[3]))
    sources = make_generators([(1, first + i) for i in range(len(images))])
    y = task.operator.measure(images, SIGMA_Y, generator=sources)
    seeds = [(first + i,) for i in range(len(images))]
    return Problem.checked(y, task.operator, sigma_y=SIGMA_Y, seed=seeds)


def figures(x0: Tensor, images: Tensor) -> str:
    """Return PSNR, lpips-alex and lpips-vgg."""
    x0 = x0.clamp(-1, 1)
    alex, vgg = (float(lpips(x0, images, net=net).mean()) for net in ("alex", "vgg"))
    return f"{float(psnr(x0, images).mean()):.2f} {alex:.4f} {vgg:.4f}"


def fit(chain: Sequence[Tensor], images: Tensor) -> Tensor:
    """Return weights of the images of a chain, of sum 1, by least squares."""
    last = chain[-1]
    columns = torch.stack([(x - last).flatten() for x in chain[:-1]], 1).double()
    weights = torch.linalg.lstsq(columns, (images - last).flatten().double()[:, None]).solution[
        :, 0
    ]
    return torch.cat((weights, 1 - weights.sum(0, keepdim=True))).float()


def compare(
    name: str,
    prior: NCVSDPrior,
    images: Tensor,
    first: int,
    others: Tensor,
    spread: Callable[[Tensor, Tensor, float], Tensor] | None,
) -> Iterator[tuple[str, str]]:
    """Yield each way and its figures on a task; weights are fitted on `others`."""
    problem = pose(name, images, first)
    plan = choose_point_plan(
        problem, prior, nfe=CALLS, schedule=None, sigma_lik=None, temperature=None
    )
    usual = run(problem, prior, plan, Way())
    yield "as solve does", figures(usual[-1], images)
    for kept in (0.5, 0.85, 1.0):
        yield f"kept {kept:g}", figures(run(problem, prior, plan, Way(kept=kept))[-1], images)
    for draws, sweeps in ((2, 2), (3, 1), (4, 1)):
        way = Way(draws=draws, sweeps=sweeps)
        title = f"averaged {draws}, last {sweeps}"
        yield title, figures(run(problem, prior, plan, way)[-1], images)
    weights = fit(run(pose(name, others, 1000), prior, plan, Way()), others)
    mixed = sum((w * x for w, x in zip(weights, usual, strict=True)), torch.zeros(()))
    yield "mixed", figures(mixed, images)
    if spread is not None:
        yield "map", figures(run(problem, prior, plan, Way(spread=spread))[-1], images)


def main() -> None:
    """Print a table, a row a way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", default="ncvsd_faces64", help="its name (%(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="validation images")
    parser.add_argument("--train", type=Path, help="images that the map is trained on")
    parser.add_argument("--images", type=int, default=32, help="how many (%(default)s)")
    parser.add_argument("--skip", type=int, default=0, help="from which place (%(default)s)")
    parser.add_argument("--fit", type=int, default=50, help="images after them (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of crops (%(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="of the map (%(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    args = parser.parse_args()
    prior, size = load_prior(args.prior), (args.size, args.size)
    assert isinstance(prior, NCVSDPrior)
    pictures = read_images(args.data, args.skip + args.images + args.fit)
    images = torch.cat([centre_crop(x, size) for x in pictures])[args.skip :]
    images, others = images[: args.images], images[args.images :]
    spread = None
    if args.train is not None:
        known = read_images(args.train, 1500)
        spread = learn_spread(
            prior, torch.cat([centre_crop(x, (64, 64)) for x in known]), args.steps
        )
    for name in args.tasks:
        for title, row in compare(name, prior, images, args.skip, others, spread):
            print(f"| {name} | {title} | {row} |", flush=True)


if __name__ == "__main__":
    main()
