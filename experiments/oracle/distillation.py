r"""Distil teachers whose posterior is known, and hold the student's draws against exact ones.

    python experiments/oracle/distillation.py

Two mixtures of Gaussians give the teacher E[x0 | x] and exact draws of x0 given u = x0 + sigma eps:
one of points in the plane, one of 8x8 images. Each is distilled by `DistillationTrainer` twice, as
published (gamma 0.414) and without the extra noise (gamma 0). Prints a table, and writes it with a
picture beside this file (distillation.md, distillation.png, distillation.json).
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ncvsd_inverse.files import write_whole
from ncvsd_inverse.networks import UNetShape
from ncvsd_inverse.networks.edm2_layers import FourierFeatures
from ncvsd_inverse.priors import GaussianMixturePrior
from ncvsd_inverse.training import DistillationTrainer, DistillConfig
from ncvsd_inverse.training.data import Batch
from ncvsd_inverse.training.losses import Observation, add_noise, generate

HERE = Path(__file__).parent
GAMMA = 0.414
PAIRS, VIEWS, DRAWS = 20_000, 32, 1000
TITLE = """# Distilling teachers whose posterior is known

Printed by `python experiments/oracle/distillation.py`.
"""
LEGEND = f"""
- Teachers: points, three Gaussians in the plane (stds 0.3 to 0.45, about two apart); 8x8 images,
  three smooth patterns (3.5 to 4 apart) with smooth variation of std 0.2 and grain of std 0.1.
- torn: share of noisy images u that no component explains with a probability of 0.9, so that
  their posterior has several modes.
- ratio: MSE(one draw) / MSE(exact mean) on {PAIRS} pairs of x0 and u; 2 for the posterior. Its
  parts, over MSE(exact mean): variance of the draws (1) and squared bias of their mean (0).
- distance: sliced 2-Wasserstein distance between {DRAWS} draws of the student and {DRAWS} exact
  draws given the same u; root mean square over 64 directions and {VIEWS} values of u, in units of
  the posterior's std (root mean variance of a coordinate). The floor is the same between two
  independent sets of exact draws. Both use the same first set.
- excess: sqrt(distance^2 - floor^2), what the student adds; unlike the floor it does not depend on
  the number of draws.
- stray: share of draws outside the ellipsoids that hold 99% of each component of the prior, and
  the same of exact draws.
- ± is one standard error. A row holds if the ratio is in 1.95 to 2.05 and the distance at most
  twice the floor.

How they were distilled, float32 on one CPU thread:

"""
NOTES = """
What was learnt on the way, on the points after 4000 steps of 512 draws, one seed each and 16 values
of u; the figures are distance / floor at sigma 0.6, 1 and 3:

- Generator at half the score model's learning rate, sigma in [0.05, 10], the adversarial part on:
  3.6, 2.1, 1.7, ratios 1.91. At 0.15 of it, sigma in [0.3, 5], the adversarial part off: 2.9, 1.8,
  1.4, ratios 1.95 to 2.05. What follows changes one thing from there unless it says otherwise.
- Mean of log t 0.2 (std 0.8) instead of -0.5 (std 1), nearer to the distance of the components than
  to their stds: 2.5, 1.9, 1.3.
- Networks twice as wide (and mean of log t -0.3): 3.1, 2.1, 1.5.
- A score model that is the exact teacher at the merged view plus a learned correction: 3.5, 2.2,
  1.8. The same and a generator that starts as the teacher's mean, in the first setting: 5.6, 4.3,
  3.1. An exact teacher turns sharply between components, and a correction has to undo that.
- The 8x8 images were first judged at sigma 1, with a finer grain: ratio 2.23 and 3.0 floors after
  2500 steps of 256. The levels here were chosen after that, as those that arrive in minutes.
- The lowest level is the last to arrive. There the components are far apart in posterior stds, and
  a generator that is a continuous map of its noise has to cross the gaps somewhere: some draws
  stray between the components (the column). It still improves with training, ever more slowly.
"""
UNUSED = UNetShape(resolution=8, channels=(16,), attention=())


class VectorNetwork(nn.Module):
    """A conditional denoiser of vectors in EDM's preconditioning, a perceptron.

    It takes images of `dim` numbers, or stacks of such images along the channels, and treats the
    images of a stack alike.

    Args:
        dim: numbers in an image.
        width: hidden units.
        sigma_data: std of the images, image units.
    """

    def __init__(self, dim: int, *, width: int, sigma_data: float) -> None:
        super().__init__()
        self.dim = dim
        self.sigma_data = sigma_data
        self.fourier = FourierFeatures(32)
        inputs = 3 * dim + 2 * 32 + 2
        self.hidden = nn.ModuleList([nn.Linear(n, width) for n in (inputs, width, width)])
        self.out = nn.Linear(inputs + width, dim)
        self.uncertainty = nn.Linear(32, 1)
        for layer in (self.out, self.uncertainty):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def log_variance(self, sigma: Tensor) -> Tensor:
        """Return the learned log variance at levels (B,), shape (B, 1, 1, 1)."""
        out: Tensor = self.uncertainty(self.fourier(sigma.log() / 4))
        return out.reshape(-1, 1, 1, 1)

    def forward(
        self, x: Tensor, sigma: Tensor, condition: Tensor, condition_sigma: Tensor
    ) -> Tensor:
        """Denoise `x` (B, C, H, W) of noise std `sigma` (B,) given a second view of x0."""
        a, b = x.reshape(-1, self.dim), condition.reshape(-1, self.dim)
        levels = torch.stack([sigma, condition_sigma], 1)
        levels = levels.repeat_interleave(len(a) // len(levels), 0)
        s = self.sigma_data
        scale = (levels**2 + s**2).rsqrt()
        # The generator's own noise is the difference of its two views.
        apart = (a - b) / levels.square().sum(1, keepdim=True).sqrt()
        noise = levels.log() / 4
        inputs = [a * scale[:, :1], b * scale[:, 1:], apart, noise]
        inputs += [self.fourier(column) for column in noise.unbind(1)]
        h = features = torch.cat(inputs, 1)
        for layer in self.hidden:
            h = nn.functional.silu(layer(h))
        out = self.out(torch.cat([features, h], 1))
        skip, gain = (s * scale[:, :1]) ** 2, levels[:, :1] * s * scale[:, :1]
        x0: Tensor = skip * a + gain * out
        return x0.reshape(x.shape)


class Draws:
    """Training data drawn from a prior; an image of a batch is a stack of `stack` draws.

    A stack shares its noise levels, and the random numbers of a training step cost as much for a
    stack of points as for one.
    """

    num_classes = 0

    def __init__(self, prior: GaussianMixturePrior, stack: int) -> None:
        channels, height, width = prior.image_shape
        self.prior = prior
        self.stack = stack
        self.image_shape = (stack * channels, height, width)

    def batches(
        self, start: int, size: int, *, seed: int, rows: slice | None = None
    ) -> Iterator[Batch]:
        """Yield batches number `start`, `start` + 1, ... of `size` stacks, without end."""
        for number in itertools.count(start):
            source = torch.Generator().manual_seed(seed * 1_000_003 + number)
            images = self.prior.draw(size * self.stack, generator=source)
            yield Batch(images.reshape(size, *self.image_shape)[rows or slice(None)], None)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return E[x0 | x] of stacks (B, stack * C, H, W) at levels (B,): the teacher."""
        images = x.reshape(-1, *self.prior.image_shape)
        return self.prior.denoise(images, sigma.repeat_interleave(self.stack)).reshape(x.shape)


@dataclass(frozen=True)
class Case:
    """A known prior and how it is distilled.

    Attributes:
        name: for the table.
        mixture: weights, means and covariances of the teacher's law.
        prior: the teacher's law.
        levels: noise stds to judge at, image units.
        stack: draws in an image of a training batch.
        width: hidden units of the networks.
        config: settings of the distillation, with gamma as published.
    """

    name: str
    mixture: tuple[Tensor, Tensor, Tensor]
    prior: GaussianMixturePrior
    levels: tuple[float, ...]
    stack: int
    width: int
    config: DistillConfig


@dataclass(frozen=True)
class Row:
    """What was measured at one noise level; `_error` is a standard error.

    Attributes:
        sigma: noise std, image units.
        torn: share of noisy images that no component explains with a probability of 0.9.
        ratio: MSE(one draw) / MSE(exact mean); 2 for the posterior.
        variance: variance of the draws over MSE(exact mean); 1 for the posterior.
        bias: squared distance of their mean from the exact mean, likewise; 0 for the posterior.
        distance: sliced 2-Wasserstein distance of student's draws to exact ones, posterior stds.
        floor: the same between two sets of exact draws.
        stray: share of draws that no component of the prior would give but once in 100.
        exact_stray: the same of exact draws.
    """

    sigma: float
    torn: float
    ratio: float
    ratio_error: float
    variance: float
    bias: float
    distance: float
    distance_error: float
    floor: float
    floor_error: float
    stray: float
    exact_stray: float

    @property
    def holds(self) -> bool:
        """Whether the student draws from the posterior, as far as these figures tell."""
        return 1.95 <= self.ratio <= 2.05 and self.distance <= 2 * self.floor

    @property
    def excess(self) -> float:
        """The distance without the floor's share, for independent errors, posterior stds."""
        return math.sqrt(max(self.distance**2 - self.floor**2, 0.0))


def points() -> Case:
    """Return three Gaussians in the plane, about two apart, of stds 0.3 to 0.45."""
    means = torch.tensor([[-1.2, -0.6], [0.9, -0.9], [0.2, 1.2]]).reshape(3, 2, 1, 1)
    variances = torch.tensor([[0.10, 0.20], [0.20, 0.10], [0.15, 0.15]])
    mixture = (torch.tensor([0.3, 0.3, 0.4]), means, torch.diag_embed(variances))
    prior = GaussianMixturePrior(*mixture)
    config = DistillConfig(
        network=UNUSED,
        images=32 * 14_000,
        batch_size=32,
        adversarial_images=32 * 14_000,
        learning_rate=3e-3,
        decay_steps=1000.0,
        generator_rate=0.15,
        sigma_data=1.0,
        sigma_min=0.5,
        sigma_max=4.0,
        t_mean=0.1,
        t_std=0.9,
        ema_stds=(0.1,),
        precision="float32",
        gamma=GAMMA,
    )
    return Case("points", mixture, prior, (0.6, 1.0, 2.0, 3.0), stack=16, width=128, config=config)


def images() -> Case:
    """Return three smooth patterns of 8x8 pixels with smooth Gaussian variation around each."""
    place = (torch.arange(8) + 0.5) / 8
    slope = torch.cos(math.pi * place)
    bump = torch.cos(2 * math.pi * place)
    flat = torch.ones(8)
    patterns = [torch.outer(slope, flat), torch.outer(flat, slope), torch.outer(bump, bump)]
    means = torch.stack([0.5 * p for p in patterns]).reshape(3, 1, 8, 8)
    grid = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    smooth = 0.2**2 * torch.exp(-torch.cdist(grid, grid).square() / (2 * 2.0**2))
    covariance = smooth + 0.1**2 * torch.eye(64)
    mixture = (torch.tensor([0.3, 0.3, 0.4]), means, covariance.expand(3, 64, 64))
    prior = GaussianMixturePrior(*mixture)
    config = DistillConfig(
        network=UNUSED,
        images=256 * 8000,
        batch_size=256,
        adversarial_images=256 * 8000,
        learning_rate=2e-3,
        decay_steps=1000.0,
        generator_rate=0.15,
        sigma_data=0.4,
        sigma_min=1.2,
        sigma_max=5.0,
        t_mean=0.2,
        t_std=1.0,
        ema_stds=(0.1,),
        precision="float32",
        gamma=GAMMA,
    )
    return Case("8x8 images", mixture, prior, (1.5, 2.5, 4.0), stack=1, width=256, config=config)


def distil(case: Case) -> nn.Module:
    """Distil a case; return the averaged generator."""
    torch.manual_seed(case.config.seed)
    dim = math.prod(case.prior.image_shape)
    generator, score = (
        VectorNetwork(dim, width=case.width, sigma_data=case.config.sigma_data) for _ in range(2)
    )
    # The teacher is exact, so real images have nothing to correct: the adversarial part is off
    # throughout and the discriminator never called.
    discriminator = nn.Linear(1, 1)
    data = Draws(case.prior, case.stack)
    with tempfile.TemporaryDirectory() as folder:
        run = DistillationTrainer(
            case.config,
            data,
            folder,
            data.denoise,
            networks=(generator, score, discriminator),
        )
        never = case.config.images
        run.run(checkpoint_every=never, snapshot_every=never, log_every=never)
        return run.averaged("generator")


@torch.no_grad()
def draw(network: nn.Module, y: Observation, gamma: float, source: torch.Generator) -> Tensor:
    """Draw x0 given y, one network call; gamma may be 0, which `NCVSDPrior` refuses."""
    z = torch.randn(y.image.shape, generator=source)
    return generate(network, y, z, gamma=gamma)[0]


def slice_directions(dim: int, num: int = 64) -> Tensor:
    """Return unit vectors (dim, num): evenly spread in the plane, else random but fixed."""
    if dim == 2:
        angle = torch.arange(num) * math.pi / num
        return torch.stack([angle.cos(), angle.sin()])
    axes = torch.randn(dim, num, generator=torch.Generator().manual_seed(0))
    return nn.functional.normalize(axes, dim=0)


def squared_distance(a: Tensor, b: Tensor) -> float:
    """Return the squared sliced 2-Wasserstein distance of samples (N, C, H, W), in stds of b.

    The mean over directions of the squared 2-Wasserstein distance of the projections, over the
    mean variance of a coordinate of b.
    """
    a, b = a.flatten(1), b.flatten(1)
    axes = slice_directions(a.shape[1])
    gaps = (a @ axes).sort(0).values - (b @ axes).sort(0).values
    return float(gaps.square().mean() / b.var(0).mean())


def torn_share(case: Case, y: Observation) -> float:
    """Return the share of noisy images that no component explains with a probability of 0.9."""
    weights, means, covariances = case.mixture
    noisy = covariances + y.sigma[0] ** 2 * torch.eye(covariances.shape[-1])
    law = torch.distributions.MultivariateNormal(means.flatten(1), noisy)
    log_joint: Tensor = weights.log() + law.log_prob(y.image.flatten(1)[:, None])  # type: ignore[no-untyped-call]
    return float((log_joint.softmax(1).amax(1) < 0.9).float().mean())


def stray_share(case: Case, x0: Tensor) -> float:
    """Return the share of images x0 (N, C, H, W) that no component of the prior would give.

    They lie outside the ellipsoid of each component that holds 99% of its draws.
    """
    _, means, covariances = case.mixture
    apart = x0.flatten(1) - means.flatten(1)[:, None]
    inverses = torch.linalg.inv(covariances)
    squares = torch.einsum("kni,kij,knj->kn", apart, inverses, apart).amin(0)
    dim = torch.tensor(float(apart.shape[-1]))
    # The upper tail of chi-squared with `dim` degrees of freedom.
    return float((torch.special.gammaincc(dim / 2, squares / 2) < 0.01).float().mean())


def root_mean(squares: list[float]) -> tuple[float, float]:
    """Return the root of the mean of `squares` and its standard error."""
    root = math.sqrt(statistics.fmean(squares))
    return root, statistics.stdev(squares) / math.sqrt(len(squares)) / (2 * root)


def judge(
    case: Case, network: nn.Module, sigma: float, *, pairs: int, views: int, draws: int
) -> Row:
    """Measure a student at one noise level.

    Args:
        case: what it was distilled from.
        network: the averaged generator.
        sigma: noise std, image units.
        pairs: pairs of x0 and u that the ratio is measured on.
        views: noisy images u that the distance is averaged over, in the square.
        draws: draws of each set given one u.
    """
    prior, gamma, source = case.prior, case.config.gamma, torch.Generator().manual_seed(1)

    def noisy(num: int) -> tuple[Tensor, Observation]:
        x0 = prior.draw(num, generator=source)
        level = torch.full((num,), sigma)
        return x0, Observation(add_noise(x0, level, torch.randn(x0.shape, generator=source)), level)

    x0, y = noisy(pairs)
    mean = prior.denoise(y.image, sigma)
    first, second = (draw(network, y, gamma, source) for _ in range(2))
    errors = (first - x0).square().flatten(1).mean(1)
    least = (mean - x0).square().flatten(1).mean(1)
    ratio = float(errors.mean() / least.mean())
    ratio_error = float((errors - ratio * least).std() / least.mean()) / math.sqrt(pairs)

    torn, noisy_images = torn_share(case, y), y.image

    _, y = noisy(views)
    distances, floors = [], []
    for image in y.image:
        u = image.expand(draws, *image.shape)
        exact = [prior.sample(u, sigma, generator=source) for _ in range(2)]
        drawn = draw(network, Observation(u, torch.full((draws,), sigma)), gamma, source)
        distances.append(squared_distance(drawn, exact[0]))
        floors.append(squared_distance(exact[1], exact[0]))
    return Row(
        sigma,
        torn,
        ratio,
        ratio_error,
        float((first - second).square().mean() / 2 / least.mean()),
        float(((first - mean) * (second - mean)).mean() / least.mean()),
        *root_mean(distances),
        *root_mean(floors),
        stray_share(case, first),
        stray_share(case, prior.sample(noisy_images, sigma, generator=source)),
    )


@dataclass(frozen=True)
class Result:
    """A case as it was distilled, and what came of it."""

    case: Case
    network: nn.Module
    seconds: float
    rows: list[Row]


def run_case(case: Case) -> Result:
    """Distil a case and judge the student at its levels."""
    started = time.monotonic()
    network = distil(case)
    seconds = time.monotonic() - started
    rows = [
        judge(case, network, sigma, pairs=PAIRS, views=VIEWS, draws=DRAWS) for sigma in case.levels
    ]
    return Result(case, network, seconds, rows)


def table(results: list[Result]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| teacher | gamma | sigma | torn | ratio | variance | bias | distance | floor "
        "| distance / floor | excess | stray (exact) | holds |",
        "|" + " --- |" * 13,
    ]
    lines += [
        f"| {result.case.name} | {result.case.config.gamma:g} | {row.sigma:g} | {row.torn:.0%} "
        f"| {row.ratio:.3f}±{row.ratio_error:.3f} | {row.variance:.3f} | {row.bias:.3f} "
        f"| {row.distance:.3f}±{row.distance_error:.3f} | {row.floor:.3f}±{row.floor_error:.3f} "
        f"| {row.distance / row.floor:.2f} | {row.excess:.3f} "
        f"| {row.stray:.1%} ({row.exact_stray:.1%}) | {'yes' if row.holds else 'no'} |"
        for result in results
        for row in result.rows
    ]
    return "\n".join(lines)


def report(results: list[Result]) -> str:
    """Return the page of results."""
    settings = []
    for result in results:
        case, config = result.case, result.case.config
        steps = config.images // config.batch_size
        settings.append(
            f"- {case.name}, gamma {config.gamma:g}: {steps} steps of "
            f"{config.batch_size * case.stack} draws, {result.seconds:.0f} s; learning rate "
            f"{config.learning_rate:g} (generator {config.generator_rate:g} of it), inverse "
            f"square root after {config.decay_steps:g} steps; sigma in [{config.sigma_min:g}, "
            f"{config.sigma_max:g}]; log t of mean {config.t_mean:g} and std {config.t_std:g}; "
            f"perceptrons of three layers of {case.width}; EMA of std {config.ema_stds[0]:g}; "
            f"seed {config.seed}."
        )
    return "\n".join([TITLE, table(results), LEGEND, *settings, NOTES])


def most_torn(case: Case, sigma: float) -> Tensor:
    """Return the one of 200 noisy images (1, C, H, W) whose exact draws vary most."""
    source = torch.Generator().manual_seed(2)
    x0 = case.prior.draw(200, generator=source)
    u = x0 + sigma * torch.randn(x0.shape, generator=source)
    draws = torch.stack([case.prior.sample(u, sigma, generator=source) for _ in range(32)])
    return u[draws.var(0).flatten(1).sum(1).argmax()][None]


def write_picture(path: Path, plane: list[Result], pictures: list[Result]) -> None:
    """Draw what students make of torn noisy images beside exact draws.

    Args:
        path: PNG file to write.
        plane: students of the points, gamma as published and 0.
        pictures: students of the images, likewise.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 16), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(2, 1))[:, 0]
    case = plane[0].case
    titles = ["exact posterior", *(f"student, gamma {r.case.config.gamma:g}" for r in plane)]
    axes = upper.subplots(len(case.levels), 3, sharex=True, sharey=True)
    for sigma, line in zip(case.levels, axes, strict=True):
        u = most_torn(case, sigma).expand(DRAWS, *case.prior.image_shape)
        for title, axis, drawn in zip(titles, line, draws_beside(plane, u, sigma), strict=True):
            axis.scatter(*drawn.flatten(1).T, s=6, alpha=0.4, linewidths=0)
            axis.plot(*u[0].flatten(), "+", color="black")
            axis.set(title=f"{title}, sigma {sigma:g}", aspect="equal")
            axis.set(xlim=(-3, 3), ylim=(-3, 3))
    case, columns = pictures[0].case, 16
    sigma = case.levels[1]
    u = most_torn(case, sigma).expand(columns, *case.prior.image_shape)
    parts = lower.subfigures(3, 1)
    for title, part, drawn in zip(titles, parts, draws_beside(pictures, u, sigma), strict=True):
        part.suptitle(f"8x8 images, {title}, sigma {sigma:g}: the noisy image, then draws")
        for axis, image in zip(part.subplots(1, columns), [u[0], *drawn[1:]], strict=True):
            axis.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
            axis.set_axis_off()
    figure.savefig(path, dpi=80)


def draws_beside(results: list[Result], u: Tensor, sigma: float) -> Iterator[Tensor]:
    """Yield exact draws given noisy images u, then those of each student."""
    source = torch.Generator().manual_seed(3)
    yield results[0].case.prior.sample(u, sigma, generator=source)
    for result in results:
        y = Observation(u, torch.full((len(u),), sigma))
        yield draw(result.network, y, result.case.config.gamma, source)


def write_json(path: Path, results: list[Result]) -> None:
    """Write settings, commit and figures."""
    records = [
        {
            "teacher": result.case.name,
            "stack": result.case.stack,
            "width": result.case.width,
            "config": result.case.config.to_dict(),
            "seconds": round(result.seconds, 1),
            "rows": [asdict(row) for row in result.rows],
        }
        for result in results
    ]
    measured = {"pairs": PAIRS, "views": VIEWS, "draws": DRAWS}
    page = {
        "commit": commit_of_this_file(),
        "torch": torch.__version__,
        **measured,
        "results": records,
    }
    write_whole(path, json.dumps(page, indent=1) + "\n")


def commit_of_this_file() -> str:
    """Return the commit of this file's repository, "unknown" where there is none."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Distil, judge and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the results")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of each distillation; what reaches the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for case in (points(), images()):
        for gamma in (GAMMA, 0.0):
            config = replace(case.config, gamma=gamma)
            if args.steps is not None:
                num = args.steps * config.batch_size
                config = replace(config, images=num, adversarial_images=num)
            result = run_case(replace(case, config=config))
            results.append(result)
            print(table([result]), f"{result.seconds:.0f} s", sep="\n", flush=True)
    write_whole(args.out / "distillation.md", report(results))
    write_json(args.out / "distillation.json", results)
    write_picture(args.out / "distillation.png", results[:2], results[2:])


if __name__ == "__main__":
    main()
