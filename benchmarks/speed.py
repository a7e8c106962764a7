"""What the solver adds to the bare network, how exact it stays, and what this machine can do.

    python benchmarks/speed.py [--device cuda]

Prints one table: the cost of `solve` over the network's own ten calls, with matrices that are kept
and new ones; the conditioning step on large images; peak memory; the std of draws over its closed
form for every family of linear operators and small noise; and the time of one call, of
convolutions, imports and `ncvsd demo`. Ratios are medians over runs that alternate, each over the
bare run beside it. With --write FILE the table replaces the one between the marks in a file.
"""

import argparse
import math
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec
from unittest import mock

import torch
from torch import Tensor

from ncvsd_inverse import Prior, load_prior, solve
from ncvsd_inverse import operators as ops
from ncvsd_inverse.files import write_between
from ncvsd_inverse.machine import PeakMemory, find_device, time_now
from ncvsd_inverse.networks import inference_dtype
from ncvsd_inverse.operators.base import BaseOperator
from ncvsd_inverse.priors import GaussianPrior
from ncvsd_inverse.sampling import dense_solves
from ncvsd_inverse.sampling.matheron import Matheron

CALLS = 10
MARKS = ("<!-- written by benchmarks/speed.py -->", "<!-- end of speed.py -->")
Row = tuple[str, str]
P = ParamSpec("P")


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    """Return a seeded generator on a device."""
    return torch.Generator(device).manual_seed(seed)


def random_images(device: torch.device, batch: int, side: int) -> Tensor:
    """Return smooth random images in [-1, 1]."""
    x = torch.randn(batch, 3, side, side, generator=generator(torch.device("cpu")))
    return ops.GaussianBlur(2.0, 13)(x).mul(2).clamp(-1, 1).to(device)


def task_operators(batch: int, side: int) -> dict[str, BaseOperator]:
    """Return the operators that are timed, by what the table calls them."""
    kernel = 2 * math.floor(0.12 * side) + 1
    std = 1 + side / 128
    masks = torch.rand(batch, 1, side, side, generator=generator(torch.device("cpu"))) < 0.3
    return {
        "circular blur": ops.GaussianBlur(std, kernel),
        "SR x4": ops.SuperResolution(4),
        "reflect blur": ops.GaussianBlur(std, kernel, boundary="reflect"),
        "reflect motion blur": ops.MotionBlur(kernel, 0.5, boundary="reflect"),
        "box": ops.Inpaint.box((side, side), side // 2),
        "70% missing": ops.Inpaint.random((side, side), 0.3),
        "a new mask for each image": ops.Inpaint(masks),
        "phase retrieval": ops.PhaseRetrieval(side // 2),
    }


def forget() -> None:
    """Drop the matrices that solves kept."""
    dense_solves.KEPT_MASKS.clear()
    dense_solves.KEPT_TENSORS.clear()


def bare_calls(prior: Prior, x: Tensor) -> Callable[[], None]:
    """Return a function that calls the prior's network ten times."""
    level = torch.full((len(x),), 0.5, device=x.device)

    @torch.no_grad()
    def run() -> None:
        for _ in range(CALLS):
            prior.network(x, level, x, level)  # type: ignore[attr-defined]

    return run


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the time of a function."""
    started = time_now(device)
    run()
    return time_now(device) - started


def loop_rows(device: torch.device, repeats: int) -> Iterator[Row]:
    """Yield the cost of `solve` over ten bare calls, batch 8, 64x64."""
    prior = load_prior("ncvsd_faces64", device)
    x = random_images(device, 8, 64)

    bare = bare_calls(prior, x)
    bare()
    for name, operator in task_operators(8, 64).items():
        y = operator.measure(x, 0.05, generator=generator(device, 1))
        run = partial(solve, y, operator=operator, prior=prior, nfe=CALLS)
        run()
        first, later = [], []
        for _ in range(repeats):
            base = seconds(bare, device)
            forget()
            first.append(seconds(run, device) / base)
            base = seconds(bare, device)
            later.append(seconds(run, device) / base)
        again, new = (statistics.median(ratios) for ratios in (later, first))
        yield f"solve(nfe=10) over ten bare forwards, {name}", f"{again:.2f} ({new:.2f})"


@contextmanager
def timed_draws(device: torch.device) -> Iterator[list[float]]:
    """Yield a list that grows by the seconds of every conditioning step."""
    kept: list[float] = []

    def timed(draw: Callable[P, Tensor]) -> Callable[P, Tensor]:
        def run(*given: P.args, **named: P.kwargs) -> Tensor:
            started = time_now(device)
            out = draw(*given, **named)
            kept.append(time_now(device) - started)
            return out

        return run

    with mock.patch.object(Matheron, "draw", timed(Matheron.draw)):
        yield kept


def large_rows(device: torch.device, repeats: int) -> Iterator[Row]:
    """Yield the time of the conditioning step at 256x256 RGB, one image."""
    prior = load_prior("ncvsd_natural", device)
    x = random_images(device, 1, 256)
    names = {"box": "128-pixel hole", "70% missing": "70% missing", "SR x4": "SR x4"}
    names |= {"reflect blur": "reflect blur"}
    for name, operator in task_operators(1, 256).items():
        if name not in names:
            continue
        y = operator.measure(x, 0.05, generator=generator(device, 1))
        chains = []
        for _ in range(max(3, repeats // 2)):
            with timed_draws(device) as kept:
                solve(y, operator=operator, prior=prior, nfe=CALLS, estimate="sample")
            chains.append(kept)
        calls = [statistics.median(level) for level in zip(*chains, strict=True)]
        most, start = max(calls[1:]) * 1e3, calls[0] * 1e3
        yield (
            f"conditioning, 256x256, one image, {names[name]}: a call at the most (the start)",
            f"{most:.0f} ms ({start:.0f} ms)",
        )


FAMILIES: dict[str, tuple[BaseOperator, tuple[int, int, int]]] = {
    "denoise": (ops.Denoise(), (1, 12, 14)),
    "box": (ops.Inpaint.box((12, 14), 6), (1, 12, 14)),
    "70% missing": (ops.Inpaint.random((12, 14), 0.3), (1, 12, 14)),
    "mask of channels": (
        ops.Inpaint(torch.rand(3, 8, 7, generator=generator(torch.device("cpu"))) < 0.5),
        (3, 8, 7),
    ),
    "SR bicubic": (ops.SuperResolution(2), (1, 12, 14)),
    "SR box": (ops.SuperResolution(2, "box"), (1, 12, 14)),
    "circular blur": (ops.GaussianBlur(1.0, 5), (1, 12, 14)),
    "reflect blur": (ops.GaussianBlur(1.0, 5, boundary="reflect"), (1, 12, 14)),
    "replicate motion blur": (ops.MotionBlur(5, 0.5, 1, boundary="replicate"), (1, 12, 14)),
    "valid blur": (ops.GaussianBlur(1.0, 5, boundary="valid"), (1, 12, 14)),
    "Fourier lines": (ops.MaskedFourier.lines((12, 14), 3), (1, 12, 14)),
    "grey": (ops.Colorize(), (3, 8, 7)),
    "compressed sensing": (ops.CompressedSensing((12, 14), 0.4), (1, 12, 14)),
    "SR of a blur": (
        ops.Compose(ops.SuperResolution(2), ops.GaussianBlur(1.0, 5)),
        (1, 12, 14),
    ),
}


def closed_form_std(operator: BaseOperator, prior: GaussianPrior, sigma_y: float) -> float:
    """Return the root mean variance of the posterior of a Gaussian prior."""
    size = math.prod(prior.image_shape)
    units = torch.eye(size, dtype=torch.float64).view(size, *prior.image_shape)
    root = prior.statistics.covariance(math.inf, units).colour(units).flatten(1)
    seen = operator(units).flatten(1).T @ root
    _, singular, basis = torch.linalg.svd(seen)
    values = singular.square()
    share = torch.ones(size, dtype=torch.float64)
    share[: len(values)] = sigma_y**2 / (sigma_y**2 + values)
    left = root @ basis.T * share.sqrt()
    return float((left.square().sum() / size).sqrt())


def exactness_rows(device: torch.device, draws: int = 400) -> Iterator[Row]:
    """Yield the std of draws over its closed form for a Gaussian prior and small noise."""
    for name, (operator, shape) in FAMILIES.items():
        _, height, width = shape
        rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
        columns = torch.fft.fftfreq(width, dtype=torch.float64)
        power = 0.25 / (1 + 100 * (rows**2 + columns**2)) ** 1.5
        prior = GaussianPrior.stationary(torch.zeros(shape).double(), power.expand(shape))
        x = prior.draw(1, generator=torch.Generator().manual_seed(0)).float().to(device)
        ratios = []
        for exponent in range(1, 7):
            sigma_y = 10.0**-exponent
            y = operator.measure(x, sigma_y, generator=generator(device, 1))
            settings: Any = {"operator": operator, "prior": prior, "nfe": 2, "sigma_y": sigma_y}
            drawn = solve(y, num_samples=draws, estimate="sample", **settings).samples
            std = float(drawn.double().var(0).mean().sqrt())
            ratios.append(std / closed_form_std(operator, prior, sigma_y))
        yield (
            f"std of draws over the closed form, sigma_y 1e-1 to 1e-6, {name}",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
        )


MEMORY = ("bare", "box", "70% missing", "SR x4", "reflect blur")


def peak_of(name: str, device: torch.device) -> None:
    """Print the peak memory, MiB, of this process after ten bare calls or two solves."""
    prior = load_prior("ncvsd_faces64", device)
    x = random_images(device, 8, 64)
    if name == "bare":
        bare_calls(prior, x)()
    else:
        operator = task_operators(8, 64)[name]
        y = operator.measure(x, 0.05, generator=generator(device, 1))
        for _ in range(2):
            solve(y, operator=operator, prior=prior, nfe=CALLS, estimate="sample")
    print(PeakMemory(device).peak() / 2**20)


def memory_rows(device: torch.device) -> Iterator[Row]:
    """Yield the peak memory of solves over that of bare calls, each in a fresh process."""
    peaks = {}
    for name in MEMORY:
        command = [sys.executable, __file__, "--peak-of", name, "--device", str(device)]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[name] = float(run.stdout.splitlines()[-1])
    bare = peaks.pop("bare")
    yield "peak memory of ten bare forwards, batch 8, 64x64", f"{bare:.0f} MiB"
    for name, peak in peaks.items():
        yield f"peak memory of solve over that, kept matrices counted, {name}", f"{peak / bare:.2f}"


def median_seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the median time of a function after a warm-up."""
    run()
    return statistics.median(seconds(run, device) for _ in range(repeats))


def machine_rows(device: torch.device, repeats: int) -> Iterator[Row]:
    """Yield the time of a network call, of convolutions, of the import and of the demo."""
    for name, side in (("ncvsd_faces64", 64), ("ncvsd_natural", 256)):
        for dtype in (torch.float32, inference_dtype(device.type)):
            prior = load_prior(name, device, dtype)
            x = random_images(device, 1, side)
            taken = median_seconds(bare_calls(prior, x), repeats, device) / CALLS
            label = f"one forward, one image, {side}x{side}, {name}, {str(dtype)[6:]}"
            yield label, f"{taken * 1e3:.1f} ms"
    for dtype in (torch.float32, torch.bfloat16):
        given = [torch.randn(16, 128, 32, 32), torch.randn(128, 128, 3, 3)]
        x, weight = (part.to(device, dtype).to(memory_format=torch.channels_last) for part in given)
        run = partial(torch.nn.functional.conv2d, x, weight, padding=1)
        taken = median_seconds(run, 10 * repeats, device)
        work = 2 * 16 * 128 * 128 * 9 * 32 * 32
        yield f"3x3 convolution, {str(dtype)[6:]}", f"{work / taken / 1e12:.2f} TFLOP/s"
    codes = ("import torch", "from ncvsd_inverse import solve")
    cpu = torch.device("cpu")
    base, ours = (
        median_seconds(partial(subprocess.run, [sys.executable, "-c", code]), repeats, cpu)
        for code in codes
    )
    yield f"`{codes[1]}` over `{codes[0]}`", f"{ours / base:.2f}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ncvsd_inverse.cli", "demo", "-o", folder]
        taken = seconds(partial(subprocess.run, command, check=True, capture_output=True), cpu)
        yield "`ncvsd demo`", f"{taken:.0f} s"


def compiled_rows(device: torch.device, repeats: int) -> Iterator[Row]:
    """Yield what compiling the network gains, batch 8, 64x64."""
    prior = load_prior("ncvsd_faces64", device)
    x = random_images(device, 8, 64)
    modes = ("default", "reduce-overhead") if device.type == "cuda" else ("default",)
    base = median_seconds(bare_calls(prior, x), repeats, device)
    for mode in modes:
        taken = median_seconds(bare_calls(prior.compiled(mode), x), repeats, device)
        yield f"a forward of `prior.compiled({mode!r})` over a plain one", f"{taken / base:.2f}"


def describe(device: torch.device) -> str:
    """Return what the figures were measured on."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
        name = next((line.split(": ", 1)[1] for line in lines if "model name" in line), "")
        flags = next((line for line in lines if line.startswith("flags")), "")
        units = [unit for unit in ("amx_bf16", "avx512_bf16") if unit in flags]
        where = f"{name or platform.machine()} ({', '.join(units) or 'no bfloat16 units'}), "
        where += f"{torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__.split('+')[0]}, {inference_dtype(device.type)}"


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9, help="runs of each (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ...; cuda where there is one")
    parser.add_argument("--compiled", action="store_true", help="measure compiled networks too")
    parser.add_argument("--write", type=Path, help="file with marks that takes the table")
    parser.add_argument("--peak-of", choices=MEMORY, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = find_device(args.device)
    if args.peak_of:
        peak_of(args.peak_of, device)
        return
    parts = [
        loop_rows(device, args.repeats),
        large_rows(device, args.repeats),
        exactness_rows(device),
        memory_rows(device),
        machine_rows(device, args.repeats),
    ]
    if args.compiled:
        parts.append(compiled_rows(device, args.repeats))
    lines = [describe(device), "", "| what | figure |", "|---|---|"]
    print("\n".join(lines))
    for part in parts:
        for what, figure in part:
            lines.append(f"| {what} | {figure} |")
            print(lines[-1], flush=True)
    if args.write:
        write_between(args.write, MARKS, "\n".join(lines))


if __name__ == "__main__":
    main()
