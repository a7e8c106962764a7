"""The machine: device, arithmetic, network passes, memory, caches, time, progress, warnings."""

import copy
import math
import os
import sys
import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType
from typing import Generic, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = [
    "Cache",
    "PassCounter",
    "PeakMemory",
    "Signal",
    "callers_autocast",
    "check_device",
    "count_passes",
    "exact_arithmetic",
    "extra",
    "find_device",
    "out_of_inference",
    "progress_bar",
    "time_now",
    "track",
    "warn",
]

Item = TypeVar("Item")
Value = TypeVar("Value")

LINE_SECONDS = 5.0
"""Least time between two lines of progress."""

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")
_INSIDE = ("ncvsd_inverse", "torch", "contextlib")
"""This package, and what decorates its functions."""

_PLAIN = (type, ModuleType, FunctionType, BuiltinFunctionType)
"""What holds no tensors of an object, though it has attributes."""


@runtime_checkable
class _Weighty(Protocol):
    """What knows how large it is, as tensors do."""

    @property
    def nbytes(self) -> int: ...


class Cache(Generic[Item]):
    """The things that were computed and used last, by key.

    Threads may share one: an entry is computed once and seen whole. Copies and pickles are empty.

    Args:
        size: most entries, >= 1; the one that was not used longest gives way.
        most_bytes: what the entries that have `nbytes` may take together; one that is larger is
            not kept.
    """

    def __init__(self, size: int = 16, most_bytes: float = math.inf) -> None:
        self.size = size
        self.most_bytes = most_bytes
        self._entries: OrderedDict[Hashable, Item] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes that the entries take."""
        return sum(entry.nbytes for entry in self._entries.values() if isinstance(entry, _Weighty))

    def get(self, key: Hashable, compute: Callable[[], Item]) -> Item:
        """Return the entry of a key; what `compute` returns, if there is none."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
            with torch.inference_mode(False):  # else no later gradient could pass through it
                entry = compute()
            self._entries[key] = entry
            while len(self._entries) > self.size or self.nbytes > self.most_bytes:
                self._entries.popitem(last=False)
            return entry

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    def __reduce__(self) -> tuple[type[Self], tuple[int, float]]:
        return type(self), (self.size, self.most_bytes)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import within what an extra of this package installs.

    Raises:
        ImportError: if it is not installed; it names the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this needs the package {error.name}: pip install 'ncvsd-inverse[{name}]'"
        ) from error


def warn(message: str) -> None:
    """Warn at the line that called this package, however deep in it the warning is given."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def find_device(name: str | None = None) -> torch.device:
    """Return the device that was asked for, else this process's own: its CUDA GPU or the CPU.

    Raises:
        ValueError: if the device cannot be used here.
    """
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    found = check_device("--device", name or own)
    if found.type == "meta":
        raise ValueError("--device must hold values, got 'meta'")
    return found


def check_device(name: str, device: torch.device | str) -> torch.device:
    """Return a device, with its number; ValueError, that calls it `name`, if it is not usable.

    Apple's GPUs are not: linear solves and statistics need float64.
    """
    if str(device).partition(":")[0] == "mps":
        raise ValueError(
            f"{name} must be on the CPU or a CUDA GPU, got mps: Apple's GPUs have no float64, "
            "which linear solves and statistics need"
        )
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name} must be usable here, got {device!r}: {reason}") from None


class _Outside(threading.local):
    """What a thread had in force when it entered `exact_arithmetic`.

    Attributes:
        autocast: dtype of each kind of device that autocast was on for; None: it is not within.
    """

    autocast: dict[str, torch.dtype] | None = None


_outside = _Outside()


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Compute in the dtypes that tensors have: autocast is off, and inference mode left.

    Gradients are recorded only if they were. As torch's own modes do, it holds for one thread. What
    is within is no inference tensor unless it comes from outside (see `out_of_inference`); networks
    that are a user's run under `callers_autocast`.
    """
    before = _outside.autocast
    autocast = {
        kind: torch.get_autocast_dtype(kind)
        for kind in _AUTOCAST_DEVICES
        if torch.is_autocast_enabled(kind)
    }
    with ExitStack() as modes:
        for kind in autocast:
            modes.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())  # which leaving inference mode would undo
        _outside.autocast = autocast if autocast or before is None else before
        try:
            yield
        finally:
            _outside.autocast = before


@contextmanager
def callers_autocast() -> Iterator[None]:
    """Compute under the autocast that was on where this thread entered `exact_arithmetic`."""
    outside = _outside.autocast
    with ExitStack() as modes:
        for kind, dtype in (outside or {}).items():
            modes.enter_context(torch.autocast(kind, dtype=dtype))
        _outside.autocast = None
        try:
            yield
        finally:
            _outside.autocast = outside


def out_of_inference(value: Value) -> Value:
    """Return, outside inference mode, a copy of what was made in it; anything else as it is.

    Autograd takes no inference tensors.

    Args:
        value: a tensor, or an object that holds some, which is copied deeply if one was made so.
    """
    return copy.deepcopy(value) if _holds_inference(value, set()) else value


def _holds_inference(value: object, seen: set[int]) -> bool:
    if isinstance(value, Tensor):
        return value.is_inference()
    if id(value) in seen or isinstance(value, _PLAIN):
        return False
    seen.add(id(value))
    if isinstance(value, dict):
        return any(_holds_inference(part, seen) for part in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_inference(part, seen) for part in value)
    return any(_holds_inference(part, seen) for part in getattr(value, "__dict__", {}).values())


class PassCounter:
    """Images that went through networks in the thread that counts, and gradients that came back.

    Attributes:
        forward: images that went through a network.
        backward: images whose gradients went back through a network.
    """

    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0
        self._thread = threading.get_ident()
        self._lock = threading.Lock()

    def _count(self, args: tuple[object, ...], output: object) -> bool:
        """Count a pass; tell whether it was one of this thread."""
        if threading.get_ident() != self._thread:
            return False
        if args and isinstance(args[0], Tensor):
            self.forward += args[0].shape[0]
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        return True

    def _count_backward(self, gradient: Tensor) -> None:
        # Autograd has threads of its own, one for each GPU.
        with self._lock:
            self.backward += gradient.shape[0]


_registering = threading.Lock()


@contextmanager
def count_passes(
    networks: Iterable[nn.Module], on_pass: Callable[[PassCounter], None] | None = None
) -> Iterator[PassCounter]:
    """Count, by a hook, the images that go through networks as long as the context lasts.

    Only passes of the thread that entered the context count, so that threads can share a network.
    A network that spreads a pass over threads, as `nn.DataParallel` does, is called in the first:
    name the whole, not its replicas. Gradients count wherever autograd computes them.

    Args:
        networks: the modules; one that is named twice counts once.
        on_pass: called after each pass.
    """
    counter = PassCounter()

    def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        if counter._count(args, output) and on_pass is not None:
            on_pass(counter)

    modules = set(networks)
    # torch numbers hooks without a lock: two of one number would replace each other.
    with _registering:
        handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield counter
    finally:
        with _registering:
            for handle in handles:
                handle.remove()


def time_now(device: torch.device) -> float:
    """Return the time in seconds at which all work that a device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Signal:
    """Whether something has come true on a device, without making a GPU wait to be asked.

    Args:
        device: where the answers are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._waiting: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._device = device
        self._answer = False

    def seen(self, answer: Tensor) -> bool:
        """Return `answer`, a boolean scalar; on a GPU the last one that has arrived here."""
        if self._device.type != "cuda":
            return bool(answer)
        arriving = torch.empty((), dtype=torch.bool, pin_memory=True)
        arriving.copy_(answer, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._waiting.append((event, arriving))
        while self._waiting and self._waiting[0][0].query():  # type: ignore[no-untyped-call]
            self._answer = bool(self._waiting.popleft()[1])
        return self._answer


class PeakMemory:
    """Bytes that this process holds: on a GPU those of torch's allocator, else resident ones.

    Args:
        device: where it computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Forget the peak so far, where the system allows it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # no such file, or not allowed: the peak is then the most so far

    def held(self) -> int:
        """Return the bytes held now; where the system does not say, the most so far."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _process_status("VmRSS") or _most_so_far()

    def peak(self) -> int:
        """Return the most bytes held since `reset`; where the system does not say, ever."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _process_status("VmHWM") or _most_so_far()


def _process_status(entry: str) -> int | None:
    """Return an entry of Linux's status of this process, in bytes; None on other systems."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    line = next(line for line in path.read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024


def _most_so_far() -> int:
    import resource  # Unix alone has it

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _progress_lines(unit: str, total: int | None, done: int) -> Callable[[int], None]:
    """Return what counts and now and then prints a line; nothing for what takes no time."""
    begun = last = time.monotonic()
    before = done

    def advance(more: int) -> None:
        nonlocal last, done
        done += more
        now = time.monotonic()
        if now - last < LINE_SECONDS:
            return
        last = now
        of_all = left = ""
        if total is not None:
            seconds = (now - begun) * (total - done) / max(done - before, 1)
            of_all, left = f" of {total}", f", about {seconds:.0f} s left"
        sys.stderr.write(f"{done}{of_all} {unit}{left}\n")
        sys.stderr.flush()

    return advance


@contextmanager
def progress_bar(
    unit: str, total: int | None, *, done: int = 0, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show on standard error how far something is, as long as the context lasts.

    On a terminal that is a bar; elsewhere a line every few seconds, with the time that is left.

    Args:
        unit: what is counted, in the plural.
        total: how many there are; None: not known.
        done: how many are done already.
        shown: whether anything is shown.

    Yields:
        A function to call with how many more are done.
    """
    if not shown:
        yield lambda more: None
        return
    if not sys.stderr.isatty():
        yield _progress_lines(unit, total, done)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Speed(ProgressColumn):
        """How many are done in a second."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.3g}/s" if task.speed else "")

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        "{task.description}",
        Speed(),
        TimeRemainingColumn(),
    )
    # Lines that go to a file or pipe must not be drawn above the bar.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=redirect) as bar:
        task = bar.add_task(unit, total=total, completed=done)
        yield lambda more: bar.advance(task, more)


def track(
    items: Iterable[Item], unit: str, *, total: int | None = None, shown: bool = True
) -> Iterator[Item]:
    """Yield items while a bar shows how many are done; arguments as for `progress_bar`.

    Args:
        items: what is gone through.
        unit: what is counted, in the plural.
        total: how many there are; None: the length of `items`, if it has one.
        shown: whether there is a bar at all.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress_bar(unit, total, shown=shown) as advance:
        for item in items:
            yield item
            advance(1)
