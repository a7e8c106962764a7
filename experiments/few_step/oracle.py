r"""Hold what `solve` draws in few network calls against posteriors known in closed form.

    python experiments/few_step/oracle.py

The prior is a Gaussian of 16x16 images or one of two mixtures of 16 Gaussians of 8x8 images; each
is measured by four linear tasks. Prints how far the draws are from the posterior, beside the same
for as many exact draws (the floor), and whether credible intervals and ranks are calibrated. Writes
oracle.md and oracle.json beside this file.
"""

import argparse
import json
import math
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import scipy.stats
import torch
from torch import Tensor, nn

from ncvsd_inverse import solve
from ncvsd_inverse.files import write_whole
from ncvsd_inverse.operators import GaussianBlur, Inpaint, SuperResolution
from ncvsd_inverse.priors import GaussianMixturePrior, GaussianPrior
from ncvsd_inverse.priors.statistics import measure_statistics
from ncvsd_inverse.protocols import SIGMA_Y, Generators, LinearOperator, Statistics
from ncvsd_inverse.sampling.settings import published_schedule
from ncvsd_inverse.schedules import karras

HERE = Path(__file__).parent
DIRECTIONS = 200
DRAWS = 39
ORDERS = {50: 10, 80: 4, 95: 1}
"""Per cent of truths between the k-th smallest and the k-th largest of 39 draws, and k."""

BINS = 8
FUNCTIONS = ("pixel", "mean", "projection", "likelihood")


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of K Gaussians of D numbers, in float64.

    Attributes:
        log_weights: log-probabilities of the components, shape (K,).
        means: shape (K, D).
        covariances: shape (K, D, D).
        roots: R with R R^T the covariance, shape (K, D, D).
    """

    log_weights: Tensor
    means: Tensor
    covariances: Tensor
    roots: Tensor

    @classmethod
    def of(cls, weights: Tensor, means: Tensor, covariances: Tensor) -> "Mixture":
        """Build a mixture from weights (K,), means (K, D) and covariances (K, D, D)."""
        values, vectors = torch.linalg.eigh(covariances.double())
        roots = vectors * values.clamp(min=0).sqrt()[:, None]
        return cls(weights.double().log(), means.double(), covariances.double(), roots)

    def draw(self, num: int, source: torch.Generator) -> Tensor:
        """Return `num` draws, shape (num, D)."""
        chosen = torch.multinomial(self.log_weights.exp(), num, replacement=True, generator=source)
        eps = torch.randn(num, self.means.shape[1], generator=source, dtype=torch.float64)
        out = self.means[chosen]
        for k, root in enumerate(self.roots):
            own = chosen == k
            out[own] += eps[own] @ root.T
        return out

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the mean (D,) and the covariance (D, D)."""
        weights = self.log_weights.exp()
        mean = weights @ self.means
        apart = self.means - mean
        within = torch.einsum("k,kij->ij", weights, self.covariances)
        return mean, within + torch.einsum("k,ki,kj->ij", weights, apart, apart)


class Posterior:
    """The law of x given y = A x + s e, in closed form: again a mixture.

    Args:
        prior: the law of x.
        matrix: A, shape (M, D).
        sigma_y: s, > 0.
    """

    def __init__(self, prior: Mixture, matrix: Tensor, sigma_y: float) -> None:
        eye = torch.eye(len(matrix), dtype=torch.float64)
        crossed = prior.covariances @ matrix.T
        self.prior, self.matrix = prior, matrix
        self.evidence = torch.linalg.cholesky(matrix @ crossed + sigma_y**2 * eye)
        self.gains = torch.cholesky_solve(crossed.mT, self.evidence).mT
        left = prior.covariances - self.gains @ crossed.mT
        self.template = Mixture.of(prior.log_weights.exp(), prior.means, (left + left.mT) / 2)

    def given(self, y: Tensor) -> Mixture:
        """Return the law of x given one y (M,)."""
        misfit = y - self.prior.means @ self.matrix.T
        white = torch.linalg.solve_triangular(self.evidence, misfit[..., None], upper=False)
        log_det = self.evidence.diagonal(dim1=1, dim2=2).log().sum(1)
        joint = self.prior.log_weights - 0.5 * white.square().sum((1, 2)) - log_det
        means = self.prior.means + (self.gains @ misfit[..., None])[..., 0]
        same = self.template
        return Mixture(joint.log_softmax(0), means, same.covariances, same.roots)


class WithStatistics:
    """A prior of any level together with statistics that were measured on its draws."""

    nfe_per_sample = 1
    sigma_max = math.inf

    def __init__(self, prior: GaussianMixturePrior, measured: Statistics) -> None:
        self.prior = prior
        self.image_shape = prior.image_shape
        self.statistics = measured

    def sample(self, u: Tensor, sigma: float | Tensor, *, generator: Generators = None) -> Tensor:
        """Return a draw of x0 given u, both (B, C, H, W)."""
        return self.prior.sample(u, sigma, generator=generator)


@dataclass(frozen=True, eq=False)
class Oracle:
    """A prior for `solve` and the same law for closed forms.

    Attributes:
        name: for the tables.
        side: height and width of its grey images.
        law: the law of the flattened images.
        prior: the law as a prior with statistics.
        factor: of super-resolution.
        is_gaussian: whether posteriors are told by mean and covariance.
    """

    name: str
    side: int
    law: Mixture
    prior: GaussianPrior | WithStatistics
    factor: int
    is_gaussian: bool


@dataclass(frozen=True)
class Plan:
    """What is run with one oracle: network calls by loop, largest number last.

    Attributes:
        calls: loop -> numbers of network calls.
        goals: calls of "conditioning" -> most distance, in floors.
    """

    calls: dict[str, tuple[int, ...]]
    goals: dict[int, float]


PLANS = {
    "Gaussian": Plan(
        {"conditioning": (1, 2, 4, 10), "gibbs": (4, 10), "gibbs, published levels": (4, 10)},
        {4: 2.0, 10: 1.5},
    ),
    "mixture, far": Plan(
        {
            "conditioning": (1, 2, 4, 10, 20, 50),
            "conditioning from 0.4": (10,),
            "gibbs": (10, 20, 50),
        },
        {10: 3.0},
    ),
    "mixture, near": Plan(
        {"conditioning": (4, 10), "conditioning from 0.4": (10,), "gibbs": (10,)}, {10: 3.0}
    ),
}
LONG = 10
"""Chains of more calls are run for the first measurement only."""


def power_law(side: int, exponent: float, std: float) -> Tensor:
    """Return a spectrum (side, side) like 1 / f^exponent for pixels of the given std."""
    f = torch.fft.fftfreq(side, dtype=torch.float64)
    spectrum = (0.05**2 + f[:, None] ** 2 + f**2) ** (-exponent / 2)
    scaled: Tensor = spectrum / spectrum.mean() * std**2
    return scaled


def stationary(spectrum: Tensor) -> Tensor:
    """Return the covariance (D, D) of periodic images with a spectrum (side, side)."""
    side = len(spectrum)
    row = torch.fft.ifft2(spectrum).real
    place = torch.arange(side)
    shift = (place[:, None] - place) % side
    covariance: Tensor = row[shift[:, None, :, None], shift[None, :, None, :]]
    return covariance.reshape(side**2, side**2)


def gaussian(side: int = 16) -> Oracle:
    """Return a stationary Gaussian, power 1 / f^2, pixels of std 0.5."""
    spectrum = power_law(side, 2.0, 0.5)
    prior = GaussianPrior.stationary(torch.zeros(1, side, side), spectrum[None].float())
    law = Mixture.of(torch.ones(1), torch.zeros(1, side**2), stationary(spectrum)[None])
    return Oracle("Gaussian", side, law, prior, factor=4, is_gaussian=True)


def mixture(side: int = 8, *, far: bool = True, draws: int = 4096) -> Oracle:
    """Return 16 stationary Gaussians around smooth mean images, equally likely.

    Args:
        side: of the images.
        far: whether they differ much: powers 1 / f to 1 / f^4, pixels of std 0.1 to 0.4, means of
            std 0.4; else 1 / f^1.5 to 1 / f^3, 0.2 to 0.35, means of std 0.2.
        draws: of the prior, on which its statistics are measured.
    """
    exponents, stds, apart = (
        ((1.0, 2.0, 3.0, 4.0), (0.1, 0.16, 0.25, 0.4), 0.4)
        if far
        else ((1.5, 2.0, 2.5, 3.0), (0.2, 0.25, 0.3, 0.35), 0.2)
    )
    source = torch.Generator().manual_seed(0)
    kinds = [(e, s) for e in exponents for s in stds]
    covariances = torch.stack([stationary(power_law(side, e, s)) for e, s in kinds])
    weights = torch.full((len(kinds),), 1 / len(kinds))
    smooth = Mixture.of(
        torch.ones(1), torch.zeros(1, side**2), stationary(power_law(side, 3.0, apart))[None]
    )
    means = smooth.draw(len(kinds), source)
    law = Mixture.of(weights, means, covariances)
    images = means.float().reshape(-1, 1, side, side)
    prior = GaussianMixturePrior(weights, images, covariances.float())
    clean = law.draw(draws, source).float().reshape(-1, 1, side, side)
    measured = measure_statistics(prior, clean, batch_size=512)
    own = WithStatistics(prior, measured)
    name = "mixture, far" if far else "mixture, near"
    return Oracle(name, side, law, own, factor=2, is_gaussian=False)


def tasks(oracle: Oracle) -> dict[str, LinearOperator]:
    """Return the forward models of an oracle by name."""
    size = (oracle.side, oracle.side)
    return {
        "box inpainting": Inpaint.box(size, oracle.side // 2),
        "random inpainting": Inpaint.random(size, keep=0.3, seed=0),
        f"SR x{oracle.factor}": SuperResolution(oracle.factor, filter="bicubic"),
        "blur": GaussianBlur(1.5, 7),
    }


@dataclass(frozen=True, eq=False)
class Problem:
    """A task with measurements and the exact posterior.

    Attributes:
        oracle: the prior.
        operator: the forward model.
        seen: which numbers of y are measured, shape (numbers of y,).
        x0: true images, shape (B, 1, side, side).
        y: measurements, shape (B, ...).
        posterior: of any y.
    """

    oracle: Oracle
    operator: LinearOperator
    seen: Tensor
    x0: Tensor
    y: Tensor
    posterior: Posterior

    def exact(self, number: int) -> Mixture:
        """Return the posterior of measurement `number`."""
        return self.posterior.given(self.y[number].flatten()[self.seen].double())


def pose(oracle: Oracle, operator: LinearOperator, num: int, *, seed: int) -> Problem:
    """Draw `num` truths from the prior and measure each."""
    source = torch.Generator().manual_seed(seed)
    shape = (1, oracle.side, oracle.side)
    x0 = oracle.law.draw(num, source).float().reshape(-1, *shape)
    unit = torch.eye(oracle.side**2, dtype=torch.float64).reshape(-1, *shape)
    columns = operator(unit).flatten(1).T
    seen = columns.abs().sum(1) > 0
    clean = operator(x0)
    eps = torch.randn(clean.shape, generator=source) * seen.reshape(clean.shape[1:])
    posterior = Posterior(oracle.law, columns[seen], SIGMA_Y)
    return Problem(oracle, operator, seen, x0, clean + SIGMA_Y * eps, posterior)


def gaussian_distance(draws: Tensor, law: Mixture) -> float:
    """Return the 2-Wasserstein distance of Gaussian fits of draws (N, D) and a law.

    In units of the law's total std.
    """
    mean, covariance = law.moments()
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    own = torch.cov(draws.T)
    crossed = torch.linalg.eigvalsh(root @ own @ root).clamp(min=0).sqrt().sum()
    square = (draws.mean(0) - mean).square().sum() + own.trace() + covariance.trace() - 2 * crossed
    return math.sqrt(max(float(square / covariance.trace()), 0.0))


def sliced_distance(draws: Tensor, exact: Tensor, law: Mixture) -> float:
    """Return the sliced 2-Wasserstein distance of two sets of draws (N, D).

    In units of the root mean square of the law's stds.
    """
    source = torch.Generator().manual_seed(0)
    axes = torch.randn(draws.shape[1], DIRECTIONS, generator=source, dtype=torch.float64)
    axes = nn.functional.normalize(axes, dim=0)
    gaps = (draws @ axes).sort(0).values - (exact @ axes).sort(0).values
    return float((gaps.square().mean() / law.moments()[1].diagonal().mean()).sqrt())


def distance(oracle: Oracle, draws: Tensor, exact: Tensor, law: Mixture) -> float:
    """Return the distance of draws from a posterior by which the oracle judges."""
    if oracle.is_gaussian:
        return gaussian_distance(draws, law)
    return sliced_distance(draws, exact, law)


def root_mean(values: Sequence[float]) -> float:
    """Return the root of the mean square."""
    return math.sqrt(statistics.fmean(value**2 for value in values))


@dataclass(frozen=True)
class Distance:
    """How far draws are from the posterior.

    Attributes:
        oracle: name of the prior.
        task: name of the task.
        components: effective number of components of the posterior, exp of their entropy.
        loop: which loop, with which levels.
        nfe: network calls a draw.
        measurements: how many the distance is a root mean square over.
        distance: to the posterior, in its stds.
        floor: the same of as many exact draws.
        goal: most distance that was asked for, in floors; None if none was.
    """

    oracle: str
    task: str
    components: float
    loop: str
    nfe: int
    measurements: int
    distance: float
    floor: float
    goal: float | None

    @property
    def ratio(self) -> float:
        """The distance in floors."""
        return self.distance / self.floor


def run_chains(
    problem: Problem,
    y: Tensor,
    loop: str,
    nfe: int,
    num_samples: int,
) -> Tensor:
    """Return draws of a loop, shape (num_samples, B, D), in float64."""
    levels = {
        "gibbs, published levels": published_schedule(nfe),
        "conditioning from 0.4": karras(nfe, 0.4, 0.05),
    }
    result = solve(
        y,
        operator=problem.operator,
        prior=problem.oracle.prior,
        nfe=nfe,
        sigma_y=SIGMA_Y,
        num_samples=num_samples,
        estimate="sample",
        method="gibbs" if loop.startswith("gibbs") else "conditioning",
        schedule=levels.get(loop),
    )
    if result.nfe != nfe:
        raise RuntimeError(f"nfe must be {nfe}, counted {result.nfe}")
    return result.samples.flatten(2).double()


def measure_distances(
    problem: Problem, task: str, plan: Plan, *, chains: int, long: int = LONG
) -> list[Distance]:
    """Return a row for every loop and number of calls of a plan."""
    oracle, source = problem.oracle, torch.Generator().manual_seed(2)
    laws = [problem.exact(number) for number in range(len(problem.y))]
    exact = [[law.draw(chains, source) for law in laws] for _ in range(2)]
    floors = [
        distance(oracle, second, first, law)
        for first, second, law in zip(*exact, laws, strict=True)
    ]
    entropies = [-float((law.log_weights.exp() * law.log_weights).nansum()) for law in laws]
    rows = []
    for loop, calls in plan.calls.items():
        for nfe in calls:
            used = 1 if nfe > long else len(laws)
            draws = run_chains(problem, problem.y[:used], loop, nfe, chains)
            distances = [distance(oracle, draws[:, i], exact[0][i], laws[i]) for i in range(used)]
            rows.append(
                Distance(
                    oracle.name,
                    task,
                    math.exp(statistics.fmean(entropies[:used])),
                    loop,
                    nfe,
                    used,
                    root_mean(distances),
                    root_mean(floors[:used]),
                    plan.goals.get(nfe) if loop == "conditioning" else None,
                )
            )
    return rows


@dataclass(frozen=True)
class Calibration:
    """Whether truths look like draws given their measurements; `_error` is a standard error.

    Attributes:
        oracle: name of the prior.
        task: name of the task.
        loop: "conditioning" or "exact".
        nfe: network calls a draw.
        truths: how many.
        coverage: per cent of the interval -> per cent of pixels within theirs.
        coverage_error: likewise.
        hidden: as `coverage`, of the pixels that no measurement sees; empty if there are none.
        p_values: function of the image -> p-value that its ranks are uniform.
    """

    oracle: str
    task: str
    loop: str
    nfe: int
    truths: int
    coverage: dict[int, float]
    coverage_error: dict[int, float]
    hidden: dict[int, float]
    p_values: dict[str, float]

    @property
    def worst(self) -> float:
        """Largest distance of a coverage from what it should be, in points."""
        return max(abs(found - wanted) for wanted, found in self.coverage.items())


def rank(truth: Tensor, draws: Tensor) -> Tensor:
    """Return how many draws (S, ...) are below the truth (...)."""
    return (draws < truth).sum(0)


def functions(problem: Problem, x: Tensor) -> Tensor:
    """Return the scalars whose ranks are tested, shape (..., B, 4), of images (..., B, D)."""
    side, dim = problem.oracle.side, x.shape[-1]
    axis = torch.randn(dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sent = x @ problem.posterior.matrix.T
    misfit = problem.y.flatten(1)[:, problem.seen].double() - sent
    centre = x[..., side // 2 * side + side // 2]
    return torch.stack([centre, x.mean(-1), x @ axis, -misfit.square().sum(-1)], -1)


def uniform_p_value(ranks: Tensor) -> float:
    """Return the p-value of a chi-squared test that ranks (B,) in 0 to 39 are uniform."""
    counts = torch.histc(ranks.double(), BINS, 0, DRAWS + 1)
    return float(scipy.stats.chisquare(counts.numpy()).pvalue)


def calibrate(problem: Problem, task: str, loop: str, nfe: int) -> Calibration:
    """Judge 39 draws given each measurement of a problem."""
    truth = problem.x0.flatten(1).double()
    if loop == "exact":
        source = torch.Generator().manual_seed(3)
        laws = [problem.exact(number) for number in range(len(truth))]
        draws = torch.stack([law.draw(DRAWS, source) for law in laws], 1)
    else:
        draws = run_chains(problem, problem.y, loop, nfe, DRAWS)
    ranks = rank(truth, draws)
    unseen = problem.posterior.matrix.abs().sum(0) == 0
    within = {
        wanted: 100 * ((ranks >= k) & (ranks <= DRAWS - k)).double() for wanted, k in ORDERS.items()
    }
    error = {
        wanted: float(share.mean(1).std()) / math.sqrt(len(truth))
        for wanted, share in within.items()
    }
    scalars = rank(functions(problem, truth), functions(problem, draws))
    return Calibration(
        problem.oracle.name,
        task,
        loop,
        nfe,
        len(truth),
        {wanted: float(share.mean()) for wanted, share in within.items()},
        error,
        {w: float(share[:, unseen].mean()) for w, share in within.items() if unseen.any()},
        dict(zip(FUNCTIONS, map(uniform_p_value, scalars.T), strict=True)),
    )


def distance_lines(rows: Sequence[Distance]) -> list[str]:
    """Return rows of a Markdown table, without its head."""
    return [
        f"| {row.oracle} | {row.task} | {row.components:.1f} | {row.loop} | {row.nfe} "
        f"| {row.measurements} | {row.distance:.3f} | {row.floor:.3f} | {row.ratio:.2f} "
        f"| {'' if row.goal is None else f'{row.goal:g}: ' + verdict(row.ratio <= row.goal)} |"
        for row in rows
    ]


def calibration_lines(rows: Sequence[Calibration]) -> list[str]:
    """Return rows of a Markdown table, without its head."""

    def shares(row: Calibration) -> str:
        return " / ".join(
            f"{row.coverage[w]:.1f}±{row.coverage_error[w]:.1f}" for w in row.coverage
        )

    return [
        f"| {row.oracle} | {row.task} | {row.loop} | {row.nfe or ''} | {row.truths} "
        f"| {shares(row)} | {' / '.join(f'{v:.1f}' for v in row.hidden.values())} "
        f"| {' / '.join(f'{p:.2g}' for p in row.p_values.values())} "
        f"| {verdict(row.worst <= 2)} |"
        for row in rows
    ]


def verdict(holds: bool) -> str:
    """Return "yes" or "no"."""
    return "yes" if holds else "no"


def head(columns: str) -> list[str]:
    """Return the head of a Markdown table with the given columns, separated by commas."""
    names = columns.split(",")
    return ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]


DISTANCE_HEAD = head(
    "prior,task,components,loop,calls,measurements,distance,floor,distance / floor,goal"
)
CALIBRATION_HEAD = head(
    "prior,task,loop,calls,truths,coverage 50 / 80 / 95,hidden pixels,"
    "p: pixel / mean / projection / likelihood,within 2"
)


def report(page: str, distances: Sequence[Distance], rows: Sequence[Calibration]) -> str:
    """Return the page of results."""
    return "\n".join(
        [
            "# Draws in few network calls, beside exact posteriors\n",
            f"Printed by `{page}`.\n",
            *DISTANCE_HEAD,
            *distance_lines(distances),
            "",
            *CALIBRATION_HEAD,
            *calibration_lines(rows),
            LEGEND,
        ]
    )


LEGEND = f"""
- Priors: Gaussian, 16x16, power 1 / f^2, std 0.5; mixtures, 8x8, 16 Gaussians. Far: powers 1 / f
  to 1 / f^4, stds 0.1 to 0.4, mean images of std 0.4. Near: 1 / f^1.5 to 1 / f^3, 0.2 to 0.35, 0.2.
  Noise of measurements {SIGMA_Y}. Statistics of the Gaussian are exact; those of the mixtures are
  measured on 4096 draws.
- conditioning, gibbs: default levels. From 0.4: Karras levels 0.4 to 0.05, exponent 7.
- components: effective number of components in the posterior, exp of their mean entropy.
- distance: 2-Wasserstein, root mean square over measurements, in stds of the posterior. Gaussian:
  between Gaussian fits of the chains and the posterior. Mixture: sliced, {DIRECTIONS} directions,
  between the chains and as many exact draws.
- floor: the same of as many exact draws in place of the chains.
- coverage: share of pixels of the truth inside central intervals of {DRAWS} draws each, bounded by
  order statistics, so that exact draws cover 50, 80 and 95% exactly; ± is one standard error over
  truths. hidden pixels: those that no measurement sees. exact: the same with exact draws.
- p: chi-squared test that the truth's rank among its draws is uniform, {BINS} bins: the middle
  pixel, the mean, a random projection and the log-likelihood of the image. Tasks of a prior share
  their truths, and both loops a task's measurements: rows are not independent, and the exact rows
  show what chance does.

With a Gaussian prior the loop is exact for any number of calls, up to the tolerance of its solves.
With a mixture it is not: the move takes draws for Gaussian with one covariance a level.
"""


def commit_of_this_file() -> str:
    """Return the commit of this file's repository, "unknown" where there is none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chains", type=int, default=4000, help="a measurement (%(default)s)")
    parser.add_argument("--measurements", type=int, default=3, help="a task (%(default)s)")
    parser.add_argument("--truths", type=int, default=200, help="for calibration (%(default)s)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = commit_of_this_file()
    started = time.process_time()
    distances: list[Distance] = []
    rows: list[Calibration] = []
    for oracle in (gaussian(), mixture(), mixture(far=False)):
        for task, operator in tasks(oracle).items():
            problem = pose(oracle, operator, args.measurements, seed=0)
            found = measure_distances(problem, task, PLANS[oracle.name], chains=args.chains)
            distances += found
            print("\n".join(distance_lines(found)), flush=True)
            problem = pose(oracle, operator, args.truths, seed=1)
            own = [
                calibrate(problem, task, "conditioning", 10),
                calibrate(problem, task, "exact", 0),
            ]
            rows += own
            print("\n".join(calibration_lines(own)), flush=True)
            print(f"{time.process_time() - started:.0f} s", flush=True)
    record = {
        "commit": commit,
        "torch": torch.__version__,
        "chains": args.chains,
        "truths": args.truths,
        "cpu_seconds": round(time.process_time() - started),
        "distances": [asdict(row) for row in distances],
        "calibration": [asdict(row) for row in rows],
    }
    page = f"python experiments/few_step/oracle.py --chains {args.chains}"
    write_whole(args.out / "oracle.md", report(page, distances, rows))
    write_whole(args.out / "oracle.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
