r"""Search the settings of point estimates on validation images, and put them into a prior's card.

    python experiments/few_step/point.py --prior ncvsd_faces64 --data DIR/faces64/val.zip \
        --out experiments/few_step/points.json
    python experiments/few_step/point.py --prior ncvsd_faces64 --write \
        --out experiments/few_step/points.json
    python experiments/few_step/point.py --prior ncvsd_natural --write --tie 1.035 \
        --families inpainting superres motion_blur other --out experiments/few_step/points.json
    python experiments/few_step/point.py --prior ncvsd_natural --write --tie 1 --families blur \
        --out experiments/few_step/points.json

The score of a trial is the geometric mean of lpips-alex, lpips-vgg and the root mean square error,
each a mean over images, and over the tasks of a family; for a prior of images of any size these are
the benchmark's and what people bring: stronger blurs, smaller scales, less noise. A search begins
with the settings that the prior has, or with the general ones. A stopped search goes on with the
same command. `--images` are taken from the first; `--judge` prints what the prior's present
settings reach on the images after them, and the PSNR of the mean of eight draws.
"""

import argparse
import copy
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from baselines.interface import Ladder
from ncvsd_inverse import load_prior, make_task, solve
from ncvsd_inverse.files import write_whole
from ncvsd_inverse.images import centre_crop, read_images
from ncvsd_inverse.metrics import lpips, psnr
from ncvsd_inverse.numerics import make_generators
from ncvsd_inverse.operators import Blur, GaussianBlur, MotionBlur, SuperResolution
from ncvsd_inverse.operators.base import BaseOperator
from ncvsd_inverse.priors.files import PACKAGE_WEIGHTS, card_path, read_card
from ncvsd_inverse.protocols import (
    SIGMA_Y,
    Point,
    Points,
    Prior,
    PriorTraits,
)
from ncvsd_inverse.sampling.settings import POINTS, point_settings

FAMILIES: Mapping[str | None, tuple[str, ...]] = {
    "inpainting": ("inpaint_box", "inpaint_random"),
    "superres": ("sr4x",),
    "blur": ("deblur_gaussian",),
    "motion_blur": ("deblur_motion",),
    None: ("compressed_sensing", "mri", "hdr"),
}
BROUGHT: Mapping[str | None, tuple[tuple[BaseOperator, float], ...]] = {
    "superres": ((SuperResolution(2), 0.01),),
    "blur": (
        (GaussianBlur(3.0, 25), 0.01),
        (Blur(MotionBlur(15, 0.5, seed=3).kernel[0, 0]), 0.02),
    ),
}
"""What people bring of a family, with the noise std."""

CALLS = (1, 2, 4, 10, 20, 50)
LADDERS = {
    "noise": Ladder(math.sqrt(2), least=0.25, most=2.0),
    "temperature": Ladder(1.5, least=0.05, most=1.0),
    "last": Ladder(values=(0.0, 0.015, 0.03, 0.05, 0.1, 0.2, 0.4)),
    "first": Ladder(2.0, least=0.1, most=12.0),
    "smallest": Ladder(2.0, least=0.0125, most=0.8),
}
"""The steps of a search, by setting, in the order in which they are tried."""

LIVELY = {"temperature": 0.5, "noise": 0.5, "last": 0.05}
"""What the second trial changes: less noise in the likelihood pays only together with a higher
temperature or a last call, so that moves of one setting alone do not find it."""

DRAWS = 8
"""Draws whose mean `--judge` sets beside the point estimate."""

WORTHWHILE = 0.997
"""Score over the best so far with which a search goes on the same way."""


def main() -> None:
    """Make the trials that are missing and print the best, or judge or write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", default="ncvsd_faces64", help="its name (%(default)s)")
    parser.add_argument("--data", type=Path, help="zip or folder of validation images")
    parser.add_argument("--images", type=int, default=64, help="how many (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of crops (%(default)s)")
    known = [family or "other" for family in FAMILIES]
    parser.add_argument("--families", nargs="+", choices=known, default=known)
    parser.add_argument("--calls", nargs="+", type=int, default=CALLS)
    parser.add_argument("--trials", type=int, default=14, help="of each search (%(default)s)")
    parser.add_argument("--sigma-y", type=float, default=SIGMA_Y, help="noise std (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the trials")
    parser.add_argument("--judge", action="store_true", help="judge the prior on others")
    parser.add_argument("--write", action="store_true", help="put what was found into the card")
    parser.add_argument(
        "--tie",
        type=float,
        default=1.002,
        help="score over the best with which settings tie; the calmest is written (%(default)s)",
    )
    args = parser.parse_args()
    found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    trials = found.setdefault(args.prior, {})
    if args.write:
        chosen = {
            family: {calls: row for calls, row in rows.items() if int(calls) in args.calls}
            for family, rows in trials.items()
            if family in args.families
        }
        write_card(args.prior, chosen, args.tie)
        return
    prior, size = load_prior(args.prior), (args.size, args.size)
    pictures = read_images(args.data, 2 * args.images if args.judge else args.images)
    images = torch.cat([centre_crop(x, size) for x in pictures])
    if args.judge:
        judge(prior, images[args.images :], args.families, args.calls, args.sigma_y)
        return
    for family in FAMILIES:
        if (family or "other") not in args.families:
            continue
        problems = pose_all(prior, family, images, args.sigma_y)
        for calls in sorted(args.calls):
            start = point_settings(family, calls, SIGMA_Y, prior.points or POINTS)
            row = trials.setdefault(family or "other", {}).setdefault(str(calls), [])
            for settings in search(calls, start, row, args.trials, args.tie):
                score = score_of(prior, problems, images, Point(**settings), calls)
                row.append({**settings, "score": score})
                write_whole(args.out, json.dumps(found, indent=1) + "\n")
            least = min(trial["score"] for trial in row)
            print(family or "other", calls, f"{least:.4f}", best_of(row), flush=True)


Problem = tuple[BaseOperator, Tensor, float]
"""Operator, measurements and their noise std."""


def pose(operator: BaseOperator, sigma_y: float, images: Tensor) -> Problem:
    """Return an operator with measurements of the images, image i's noise that of seed i."""
    sources = make_generators([(1, i) for i in range(len(images))])
    return operator, operator.measure(images, sigma_y, generator=sources), sigma_y


def pose_all(prior: Prior, family: str | None, images: Tensor, sigma_y: float) -> list[Problem]:
    """Return the tasks of a family, and for a prior of any size what people bring, posed."""
    sides = (images.shape[2], images.shape[3])
    operators = [(make_task(name, sides).operator, sigma_y) for name in FAMILIES[family]]
    if PriorTraits.of(prior).image_shape is None:
        operators += BROUGHT.get(family, ())
    return [pose(*operator, images) for operator in operators]


def search(
    calls: int, start: Point, row: list[dict[str, float]], trials: int, tie: float
) -> Iterator[dict[str, float]]:
    """Yield the settings of the trials that `row` lacks, each after the score of the one before.

    It begins with the better of `start` and of what is LIVELY in its place. One setting after the
    other is moved a step at a time, up and then down, as long as that pays; after all of them it
    begins anew, with half the steps if nothing did. The last trials are the best at lower
    temperatures, until the score no longer ties.
    """
    tried: dict[Point, float] = {}
    most = float(trials)

    def score(point: Point) -> Iterator[dict[str, float]]:
        """Yield the settings if they are new and `row` does not hold their score yet."""
        if point in tried or len(tried) >= most:
            return
        if point not in scores(row):
            yield point._asdict()
        tried[point] = scores(row)[point]

    starts = [start, start._replace(**LIVELY)]
    for point in starts:
        yield from score(point)
    best = min(starts, key=lambda point: tried.get(point, math.inf))
    step = 1.0
    while step >= 0.25 and len(tried) < trials:
        before = tried[best]
        for name, ladder in LADDERS.items():
            for way in (step, -step):
                while len(tried) < trials:
                    moved = best._replace(**{name: ladder.value(getattr(best, name), way, calls)})
                    yield from score(moved)
                    if moved == best or tried.get(moved, math.inf) > tried[best] * WORTHWHILE:
                        break
                    best = moved
        if tried[best] == before:
            step /= 2
    most = math.inf
    ladder, least = LADDERS["temperature"], tried[best]
    while tried[best] <= tie * least:
        calmer = best._replace(temperature=ladder.value(best.temperature, -1, calls))
        if calmer == best:
            break
        yield from score(calmer)
        best = calmer


def scores(row: list[dict[str, float]]) -> dict[Point, float]:
    """Return the scores of trials by settings."""
    return {Point(**{name: trial[name] for name in Point._fields}): trial["score"] for trial in row}


def restore(prior: Prior, problem: Problem, point: Point | None, calls: int) -> Tensor:
    """Return estimates with settings of their own, or with the prior's."""
    operator, y, sigma_y = problem
    if point is not None:
        prior = with_points(prior, {None: {calls: point}})
    return solve(y, operator=operator, prior=prior, nfe=calls, sigma_y=sigma_y).x0.clamp(-1, 1)


def mean_of_draws(prior: Prior, problem: Problem, calls: int) -> Tensor:
    """Return means of DRAWS posterior draws of so many calls each."""
    operator, y, sigma_y = problem
    result = solve(y, operator=operator, prior=prior, nfe=calls, sigma_y=sigma_y, num_samples=DRAWS)
    return result.mean.clamp(-1, 1)


def with_points(prior: Any, points: Points) -> Any:  # noqa: ANN401
    """Return a prior with other settings of point estimates."""
    twin = copy.copy(prior)
    twin.points = points
    return twin


def score_of(
    prior: Prior, problems: list[Problem], images: Tensor, point: Point | None, calls: int
) -> float:
    """Return the score of settings, lower is better; infinity where they do not go together."""
    scores = []
    for problem in problems:
        try:
            x0 = restore(prior, problem, point, calls)
        except ValueError:
            return math.inf
        scores += [math.log(value) for value in figures(x0, images)]
    return math.exp(sum(scores) / len(scores))


def figures(x0: Tensor, images: Tensor) -> tuple[float, float, float]:
    """Return lpips-alex, lpips-vgg and root mean square error, means over images."""
    alex, vgg = (float(lpips(x0, images, net=net).mean()) for net in ("alex", "vgg"))
    return alex, vgg, 2 * 10 ** (-float(psnr(x0, images).mean()) / 20)


def best_of(row: list[dict[str, float]]) -> Point:
    """Return the settings of the best trial."""
    known = scores(row)
    return min(known, key=known.__getitem__)


def calmest_of(row: list[dict[str, float]], tie: float) -> Point:
    """Return the best of the trials of the lowest temperature that ties with the best of all.

    The score is flat in the temperature, PSNR is not.
    """
    least = min(trial["score"] for trial in row)
    ties = [trial for trial in row if trial["score"] <= tie * least]
    coolest = min(trial["temperature"] for trial in ties)
    return best_of([trial for trial in ties if trial["temperature"] == coolest])


def write_card(
    name: str, trials: Mapping[str, Mapping[str, list[dict[str, float]]]], tie: float
) -> None:
    """Put settings into the card of a prior of the package: of those that tie the calmest.

    Families and numbers of calls without trials keep what the card has, or the general settings.
    """
    stem = PACKAGE_WEIGHTS / name
    card = read_card(stem)
    points = {family: dict(rows) for family, rows in (card.points or POINTS).items()}
    for family_name, rows in trials.items():
        family = None if family_name == "other" else family_name
        found = {int(calls): calmest_of(row, tie) for calls, row in rows.items()}
        points[family] = dict(sorted((points.get(family, {}) | found).items()))
    write_whole(card_path(stem), replace(card, points=points).to_json())


def judge(
    prior: Prior, images: Tensor, families: list[str], calls: list[int], sigma_y: float
) -> None:
    """Print PSNR, lpips-alex and lpips-vgg of point estimates with the prior's settings.

    The PSNR of the mean of DRAWS draws of so many calls each comes last.
    """
    for family in FAMILIES:
        if (family or "other") not in families:
            continue
        for problem in pose_all(prior, family, images, sigma_y):
            for number in calls:
                alex, vgg, error = figures(restore(prior, problem, None, number), images)
                quality = -20 * math.log10(error / 2)
                mean = float(psnr(mean_of_draws(prior, problem, number), images).mean())
                shown = f"{quality:.2f} {alex:.4f} {vgg:.4f} {mean:.2f}"
                print(f"{problem[0]}, noise {problem[2]:g}, {number} calls: {shown}", flush=True)


if __name__ == "__main__":
    main()
