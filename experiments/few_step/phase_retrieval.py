r"""How often phase retrieval with restarts ends at the true image, for few network calls.

    python experiments/few_step/phase_retrieval.py --data DIR/faces64/test.zip --images 100

Each image is measured once (task `phase_retrieval`, sigma_y 0.05) and restored by `solve` with
four restarts of 20 calls, of which the one with the least ||y - A x|| is kept; all 80 calls are
counted. A restoration is a success above 25 dB. An image and its half turn have the same
amplitudes, so the script also says how many of the kept images are turned or shifted, and the rate
of success if those counted as found. `--from-truth` begins all chains at the true images, which no
search can better: what then still fails is the chain, not its start. `--method gibbs` is the
published loop.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ncvsd_inverse import load_prior, solve
from ncvsd_inverse.images import read_images
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.operators import PhaseRetrieval
from ncvsd_inverse.schedules import karras
from ncvsd_inverse.tasks import make_task

SUCCESS = 25.0
"""PSNR above which an image counts as found, dB."""

AT_ONCE = 4
"""Images that are restored together."""


class Told(PhaseRetrieval):
    """Phase retrieval whose first search is told the true images (B, C, H, W)."""

    def __init__(self, pad: int, truth: Tensor) -> None:
        super().__init__(pad)
        self.truth = truth
        self.told = False

    def search(
        self,
        y: Tensor,
        x: Tensor,
        shrink: Callable[[Tensor, float], Tensor],
        *,
        sigma_y: float,
        iterations: int = 60,
    ) -> Tensor:
        """Return the true images, and from then on what a search finds."""
        if self.told:
            return super().search(y, x, shrink, sigma_y=sigma_y, iterations=iterations)
        self.told = True
        return self.truth.repeat(len(x) // len(self.truth), 1, 1, 1)

    def symmetries(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return x alone."""
        return (x,)


def main() -> None:
    """Restore and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="zip or folder of 64x64 faces")
    parser.add_argument("--images", type=int, default=16, help="how many (%(default)s)")
    parser.add_argument("--nfe", type=int, default=20, help="calls of each chain (%(default)s)")
    parser.add_argument("--restarts", type=int, default=4, help="chains an image (%(default)s)")
    parser.add_argument("--method", help="loop; the default of solve")
    parser.add_argument("--temperature", type=float, default=1.0, help="(%(default)s)")
    parser.add_argument("--noise", type=float, default=1.0, help="sigma_lik / sigma_y")
    parser.add_argument("--levels", type=float, nargs=2, help="first and last of the schedule")
    parser.add_argument("--from-truth", action="store_true", help="begin at the true images")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    args = parser.parse_args()
    prior = load_prior("ncvsd_faces64")
    truth = torch.cat(list(read_images(args.data, args.images)))
    started, calls, restored, residuals = time.process_time(), 0, [], []
    for first in range(0, len(truth), AT_ONCE):
        x0 = truth[first : first + AT_ONCE]
        task = make_task("phase_retrieval", (truth.shape[2], truth.shape[3]))
        operator = task.operator
        assert isinstance(operator, PhaseRetrieval)
        seeds = [(args.seed, first + i) for i in range(len(x0))]
        y = operator.measure(x0, task.sigma_y, generator=_sources(seeds))
        if args.from_truth:
            operator = Told(operator.pad, x0)
        result = solve(
            y,
            operator=operator,
            prior=prior,
            nfe=args.nfe,
            schedule=karras(args.nfe, *args.levels) if args.levels else None,
            restarts=args.restarts,
            sigma_y=task.sigma_y,
            sigma_lik=args.noise * task.sigma_y,
            temperature=args.temperature,
            estimate="sample",
            method=args.method,
            seed=seeds,
        )
        restored.append(result.x0)
        residuals.append(result.residual)
        calls += result.nfe * len(x0)
    seconds = (time.process_time() - started) / calls
    report(truth, torch.cat(restored), torch.cat(residuals))
    print(
        f"{calls / len(truth):g} network calls an image, {1000 * seconds:.0f} ms of one core each"
    )


def _sources(seeds: list[tuple[int, int]]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + image) for seed, image in seeds]


def report(truth: Tensor, kept: Tensor, residual: Tensor) -> None:
    """Print the images that were not found, and the shares."""
    values = psnr(kept.clamp(-1, 1), truth)
    turned, shifted, best = [], [], []
    for x, x0, value, misfit in zip(kept, truth, values, residual, strict=True):
        is_turned, moved = mode(x, x0)
        turned.append(is_turned)
        shifted.append(moved != (0, 0))
        other = x.flip(-2, -1) if is_turned else x
        other = other.roll(moved, (-2, -1))
        best.append(float(psnr(other[None].clamp(-1, 1), x0[None])))
        if value <= SUCCESS:
            told = f"turned {is_turned}, moved by {moved}, then {best[-1]:.2f} dB"
            print(f"image {len(best) - 1}: {value:.2f} dB, residual {misfit:.3f}; {told}")
    share = float((values > SUCCESS).float().mean())
    print(f"above {SUCCESS:g} dB: {share:.1%} of {len(truth)}, mean {float(values.mean()):.2f} dB")
    found = sum(value > SUCCESS for value in best) / len(best)
    print(f"above it when turned and shifted to the truth: {found:.1%}")
    print(f"turned: {sum(turned)}; shifted: {sum(shifted)}")


def mode(x: Tensor, truth: Tensor) -> tuple[bool, tuple[int, int]]:
    """Return whether a turned image (C, H, W) is nearer to the truth, and the shift to it."""
    # Normalised by their overlap, means left out, so that a shift does not pay for its margin.
    height, width = truth.shape[-2:]
    size = (2 * height, 2 * width)
    centred = truth - truth.mean((-2, -1), keepdim=True)
    scores = []
    for candidate in (x, x.flip(-2, -1)):
        other = candidate - candidate.mean((-2, -1), keepdim=True)
        product = torch.fft.rfft2(centred, s=size) * torch.fft.rfft2(other, s=size).conj()
        scores.append(torch.fft.irfft2(product, s=size).sum(0))
    turned = bool(scores[1].max() > scores[0].max())
    down, right = divmod(int(scores[int(turned)].argmax()), size[1])
    moved = (down - size[0] * (down > height), right - size[1] * (right > width))
    return turned, moved


if __name__ == "__main__":
    main()
