"""What the toolkit adds to the bare network, and what this machine can do.

    python benchmarks/speed.py [--repeats 9] [--prior ncvsd_faces64]

Prints the time of one network call, the cost of the solver's loop over ten bare ones, the import
time over torch's, the throughput of convolutions by dtype, and the wall time of `ncvsd demo`. Every
line is the median of alternating runs.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch

from ncvsd_inverse import load_prior, make_task, solve
from ncvsd_inverse.networks import inference_dtype


def seconds(run: Callable[[], object]) -> float:
    """Return the wall time of one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def alternate(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each run, taken in turn after a warm-up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: statistics.median(values) for name, values in times.items()}


def loop(prior_name: str, repeats: int) -> None:
    """Print the loop's cost on two tasks, batch 8."""
    prior = load_prior(prior_name)
    x = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    level = torch.full((8,), 0.5)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(10):
            prior.network(x, level, x, level)

    runs: dict[str, Callable[[], object]] = {"ten forwards": bare}
    for name in ("inpaint_box", "deblur_gaussian"):
        task = make_task(name, 64)
        y = task.operator.measure(x, task.sigma_y, generator=torch.Generator().manual_seed(1))
        runs[name] = partial(solve, y, operator=task.operator, prior=prior, nfe=10)
    medians = alternate(runs, repeats)
    base = medians.pop("ten forwards")
    print(f"ten forwards, batch 8, 64x64, {prior_name}: {base * 1e3:.0f} ms")
    for name, median in medians.items():
        print(f"  solve(nfe=10), {name}: {median * 1e3:.0f} ms, {median / base - 1:+.1%}")


def one_forward(prior_name: str, repeats: int) -> None:
    """Print the time of one network call for one image."""
    prior = load_prior(prior_name)
    x = torch.zeros(1, 3, 64, 64)
    level = torch.ones(1)

    @torch.no_grad()
    def forward() -> None:
        prior.network(x, level, x, level)

    medians = alternate({"forward": forward}, max(repeats, 50))
    print(f"one forward, batch 1, 64x64, {prior_name}: {medians['forward'] * 1e3:.1f} ms")


def imports(repeats: int) -> None:
    """Print the import time over torch's, each in a fresh interpreter."""
    statements = ("import torch", "from ncvsd_inverse import solve")
    runs: dict[str, Callable[[], object]] = {
        code: partial(subprocess.run, [sys.executable, "-c", code], check=True)
        for code in statements
    }
    base, ours = alternate(runs, repeats).values()
    print(f"{statements[0]}: {base:.2f} s; {statements[1]}: {ours / base:.3f} times that")


def convolutions(repeats: int) -> None:
    """Print the throughput of a 3x3 convolution, 128 channels at 32x32, batch 16."""
    runs: dict[str, Callable[[], object]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(16, 128, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.randn(128, 128, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        runs[str(dtype)] = partial(torch.nn.functional.conv2d, x, w, padding=1)
    medians = alternate(runs, repeats)
    work = 2 * 16 * 128 * 128 * 9 * 32 * 32
    for name, median in medians.items():
        print(f"convolution, {name}: {work / median / 1e12:.2f} TFLOP/s")
    print(f"networks run in {inference_dtype('cpu')} on this CPU")


def demo() -> None:
    """Print the wall time of the demo."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ncvsd_inverse.cli", "demo", "-o", folder]
        taken = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
    print(f"ncvsd demo: {taken:.1f} s")


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--prior", default="ncvsd_faces64")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    convolutions(10 * args.repeats)
    imports(args.repeats)
    one_forward(args.prior, args.repeats)
    loop(args.prior, args.repeats)
    demo()


if __name__ == "__main__":
    main()
