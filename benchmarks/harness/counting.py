"""Network passes, time and memory of a call, taken from outside.

Passes are counted in images: a batch of B counts B.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from baselines.interface import Models


@dataclass(frozen=True)
class Cost:
    """What calls took. The sum of two is that of both calls.

    Attributes:
        images: images restored.
        forward: images that went through a network.
        backward: gradients of images that went back through a network.
        seconds: wall time.
        peak: most bytes held at any time.
    """

    images: int = 0
    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    peak: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """Return the cost of both."""
        return Cost(
            self.images + other.images,
            self.forward + other.forward,
            self.backward + other.backward,
            self.seconds + other.seconds,
            max(self.peak, other.peak),
        )


class _Counter:
    """Counts images as they go through networks; a hook."""

    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        self.forward += len(output)
        if output.requires_grad:
            output.register_hook(self._count_backward)  # type: ignore[no-untyped-call]

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


def measure_call(
    call: Callable[[], Tensor], models: Models, device: torch.device
) -> tuple[Tensor, Cost]:
    """Return the images (B, C, H, W) that a call restores, and what it took.

    Peak memory is that of the process (on a GPU: of torch's allocator) during the call, where the
    system lets it be measured anew; else the most so far.
    """
    with _counting(models) as counter:
        _forget_peak(device)
        started = _now(device)
        restored = call()
        seconds = _now(device) - started
    peak = _peak(device)
    return restored, Cost(len(restored), counter.forward, counter.backward, seconds, peak)


@contextmanager
def _counting(models: Models) -> Iterator[_Counter]:
    counter = _Counter()
    networks = {models.teacher.network, getattr(models.student, "network", None)}
    with ExitStack() as hooks:
        for network in networks:
            if isinstance(network, nn.Module):
                hooks.callback(network.register_forward_hook(counter).remove)
        yield counter


def _now(device: torch.device) -> float:
    """Return the time at which all work asked for is done, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # No such file, or not allowed: the peak is then the most so far.
        return


def _peak(device: torch.device) -> int:
    """Return the most bytes held since `_forget_peak`; without /proc, ever."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
