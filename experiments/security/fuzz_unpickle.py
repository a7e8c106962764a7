r"""Read damaged and hostile checkpoint files, and count what comes of it.

    python experiments/security/fuzz_unpickle.py --inputs 100000

Valid files of every format, and hostile ones, are mutated (flipped bits, splices, cuts, extreme
numbers, opcodes that call) and read by `ncvsd_inverse.checkpoints` while an audit hook
watches what Python does. Allowed is a value or a CheckpointError. Everything else is a failure:
another error, a command, an import, a file opened otherwise than to be read, a second of computing,
or more memory than a limit of the system allows. Exits with 1 if there is one.
"""

import argparse
import io
import os
import pickle
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
import types
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ncvsd_inverse.checkpoints.pickles import Inert
from ncvsd_inverse.checkpoints.state_dicts import arguments_of, state_dict_of
from ncvsd_inverse.checkpoints.torch_files import read_checkpoint_file
from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.machine import PeakMemory

MEMORY_LIMIT = 1 << 30
"""Bytes of address space that reading may take beyond what the process has."""
SLOW_SECONDS = 1.0
READING = {"open", "mmap.__new__", "mmap.madvise"}
"""What reading a file does, as audit events; everything else is counted."""
HARMLESS = {"builtins.id"}


class EasyDict(dict[str, object]):
    """A dict of another package, by the name that this package gives it."""


def _reconstruct_persistent_obj(meta: EasyDict) -> None:
    raise AssertionError("a stand-in in a pickle was called")


@contextmanager
def foreign_modules() -> Iterator[None]:
    """Let the names of NVIDIA's modules exist, so that pickles can refer to them."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    modules = {
        "torch_utils": types.ModuleType("torch_utils"),
        "torch_utils.persistence": persistence,
        "dnnlib": types.ModuleType("dnnlib"),
        "dnnlib.util": util,
    }
    things: list[tuple[types.ModuleType, Any]] = [
        (persistence, _reconstruct_persistent_obj),
        (util, EasyDict),
    ]
    for module, thing in things:
        thing.__module__ = module.__name__
        setattr(module, thing.__name__, thing)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def persistent_pickle(value: object, *, source: str, protocol: int = 4) -> bytes:
    """Pickle `value` with its modules reduced as NVIDIA's `persistence` does.

    Args:
        value: what to pickle; modules of `torch.nn` itself are pickled as Python does.
        source: the source code that each persistent object carries.
        protocol: of the pickle.
    """

    class Pickler(pickle.Pickler):
        def reducer_override(self, thing: object) -> Any:  # noqa: ANN401 as its base class has it
            kind = type(thing)
            if not isinstance(thing, nn.Module) or kind.__module__.startswith("torch."):
                return NotImplemented
            meta = EasyDict(
                type="class",
                version=6,
                module_src=source,
                class_name=kind.__name__,
                state=thing.__dict__,
            )
            return _reconstruct_persistent_obj, (meta,)

    file = io.BytesIO()
    with foreign_modules():
        Pickler(file, protocol).dump(value)
    return file.getvalue()


class Filter(nn.Module):
    """A module with all that a state dict can have."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._init_args, self._init_kwargs = (channels,), {"gain": 2.0}
        self.weight = nn.Parameter(torch.randn(channels, 2))
        self.register_buffer("scale", torch.arange(3.0))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_parameter("bias", None)
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.SiLU())


def saved(value: object, *, zipped: bool = True) -> bytes:
    """Return what `torch.save` writes."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def rezipped(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Return a zip of `torch.save` with its pickle changed and the rest as it is."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("/data.pkl") else data)
    return out.getvalue()


def text(value: str) -> bytes:
    """Return the opcode that pushes a text."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(module: str, name: str, argument: bytes, *, code: bytes = b"R") -> bytes:
    """Return the opcodes that call a name with one argument."""
    return f"c{module}\n{name}\n".encode() + argument + b"\x85" + code


def hostile_opcodes(marker: str) -> dict[str, bytes]:
    """Return opcodes that would create the file `marker`, or do worse, if anything ran them."""
    create = f"open({marker!r}, 'w').close()"
    shell = text(f"touch {marker}")
    popen = b"csubprocess\nPopen\n(" + text("touch") + text(marker) + b"l\x85R"
    return {
        "os.system": call("os", "system", shell),
        "posix.system": call("posix", "system", shell),
        "nt.system": call("nt", "system", shell),
        "builtins.eval": call("builtins", "eval", text(create)),
        "builtins.exec": call("builtins", "exec", text(create)),
        "__builtin__.eval": call("__builtin__", "eval", text(create)),
        "builtins.getattr": b"cbuiltins\ngetattr\ncos\nsystem\n" + text("x") + b"\x86R",
        "builtins.__import__": call("builtins", "__import__", text("antigravity")),
        "subprocess.Popen": popen,
        "subprocess.check_output": call("subprocess", "check_output", shell),
        "importlib.import_module": call("importlib", "import_module", text("os")),
        "pickle.loads": call("pickle", "loads", b"C\x01."),
        "torch.load": call("torch", "load", text(marker)),
        "torch.hub.load": call("torch.hub", "load", text(marker)),
        "torch.storage.os.system": text("torch.storage") + text("os.system") + b"\x93" + shell,
        "torch.nn.functional.torch.load": text("torch.nn.functional")
        + text("torch.load")
        + b"\x93",
        "numpy.load": call("numpy", "load", text(marker)),
        "numpy.testing._private.utils.runstring": call(
            "numpy.testing._private.utils", "runstring", text(create)
        ),
        "codecs.decode": call("codecs", "decode", text("x")),
        "_codecs.decode": call("_codecs", "decode", text("x")),
        "functools.partial": call("functools", "partial", b"N"),
        "operator.attrgetter": call("operator", "attrgetter", text("system")),
        "webbrowser.open": call("webbrowser", "open", text("about:blank")),
        "builtins.open": b"cbuiltins\nopen\n" + text(marker) + text("w") + b"\x86R",
        "pathlib.Path": call("pathlib", "Path", text(marker), code=b"\x81"),
        "builtins.object": b"cbuiltins\nobject\n)\x81",
        "copyreg._reconstructor": call("copyreg", "_reconstructor", b"N"),
    }


def corpus() -> list[bytes]:
    """Return small valid files of every format, and a few hostile ones."""
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    value = {
        "tensors": [base, base.t()[1:4:2], base[2], torch.zeros(0, 3), torch.tensor(1)],
        "types": {str(kind): torch.ones(2).to(kind) for kind in (torch.half, torch.bfloat16)},
        "facts": {"size": torch.Size([2]), "dtype": torch.half, "device": torch.device("cuda:1")},
        "array": [np.arange(4.0).reshape(2, 2).T, np.float32(2), b"bytes", {1, 2}, (1 << 70, None)],
    }
    network = Filter(3)
    optimizer = torch.optim.Adam(network.parameters())
    plain = {"value": value, "net": network.inner, "state": network.state_dict()}
    code = "raise SystemExit"
    files = [
        saved(value),
        saved({**network.state_dict(), "optimizer": optimizer.state_dict()}),
        saved(network.inner),
        saved(plain["state"], zipped=False),
        saved({"net": nn.Linear(2, 1)}, zipped=False),
        *(pickle.dumps(value, protocol) for protocol in (3, 4, 5)),
        *(
            persistent_pickle({"ema": network, "dataset_kwargs": {}}, source=code, protocol=p)
            for p in (3, 4, 5)
        ),
    ]
    hostile = [b"\x80\x04" + opcodes + b"." for opcodes in hostile_opcodes("hostile").values()]
    return files * 5 + hostile


SNIPPETS = list(hostile_opcodes("hostile").values())
REPEATED = [
    *(opcode.code.encode("latin-1") for opcode in pickletools.opcodes if opcode.arg is None),
    b"]\x85",
    b"\x94h\x00\x86",
    b"2\x86",
]
EXTREMES = [
    *(value.to_bytes(4, "little") for value in (0, 1, 1 << 31, (1 << 32) - 1, (1 << 31) - 1)),
    *(value.to_bytes(8, "little") for value in (1 << 40, (1 << 63) - 1, (1 << 64) - 1)),
]


@cache
def starts(content: bytes) -> list[int]:
    """Return where the opcodes of the pickles at the start of `content` begin."""
    found, file = [0], io.BytesIO(content)
    with suppress(Exception):
        while file.tell() < len(content):
            begun = file.tell()
            found += [position or 0 for _, _, position in pickletools.genops(file)]
            found += [begun]
    return found


def mutated(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Return `content` changed at one to eight places, many of them where an opcode begins."""
    data = bytearray(content)
    opcodes = starts(content)
    for _ in range(draw.choice((1, 1, 1, 1, 2, 2, 4, 8))):
        size = len(data)
        if size == 0:
            break
        if draw.random() < 0.6:
            index = draw.randrange(len(opcodes))
            at = min(opcodes[index], size - 1)
            until = opcodes[min(index + draw.choice((1, 1, 2, 5)), len(opcodes) - 1)]
        else:
            at = draw.randrange(size)
            until = at + draw.choice((1, 2, 4, 16, 64))
        match draw.randrange(9):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at] = draw.randrange(256)
            case 2:
                del data[at:until]
            case 3:
                data[at:at] = data[at:until] * draw.choice((1, 1, 2, 50))
            case 4:
                other = draw.choice(others)
                begins = starts(other)
                index = draw.randrange(len(begins))
                last = min(index + draw.choice((1, 3, 10, 40)), len(begins) - 1)
                data[at:at] = other[begins[index] : begins[last]]
            case 5:
                if draw.random() < 0.3:
                    del data[at:]
            case 6:
                extreme = draw.choice(EXTREMES)
                data[at + 1 : at + 1 + len(extreme)] = extreme
            case 7:
                data[at:at] = draw.choice(SNIPPETS)
            case _:
                # One opcode, as often as it takes to nest or to grow.
                data[at:at] = draw.choice(REPEATED) * draw.choice((1, 1, 3, 300))
    return bytes(data)


class Canary:
    """Counts what Python does while it is armed, other than to read the file."""

    def __init__(self) -> None:
        self.armed = False
        self.seen: Counter[str] = Counter()
        # A hook stays for the life of the process.
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[object, ...]) -> None:
        if not self.armed or event in HARMLESS:
            return
        to_read = event != "open" or args[1] in ("r", "rb")
        if event not in READING or not to_read:
            self.seen[event] += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count within this block."""
        self.armed = True
        try:
            yield
        finally:
            self.armed = False


def touch(value: object) -> None:
    """Use a value as a converter would, every element of it."""
    repr(value)
    if isinstance(value, Tensor):
        value.clone()
    elif isinstance(value, dict):
        for item in value.values():
            touch(item)
    elif isinstance(value, list | tuple):
        for item in value:
            touch(item)
    elif isinstance(value, Inert):
        touch(value.state)
        try:
            state_dict_of(value)
            arguments_of(value)
        except CheckpointError:
            pass


def fuzz(inputs: int, seed: int, folder: Path, canary: Canary) -> Counter[str]:
    """Read `inputs` mutated files and count what came of them, by name."""
    draw = random.Random(seed)
    files = corpus()
    path = folder / "input"
    counts: Counter[str] = Counter()
    for content in files:
        # Whatever is imported at its first use is imported here.
        path.write_bytes(content)
        with suppress(CheckpointError):
            touch(read_checkpoint_file(path))
    for number in range(inputs):
        content = draw.choice(files)
        if zipfile.is_zipfile(io.BytesIO(content)) and draw.random() < 0.7:
            content = rezipped(content, lambda data: mutated(data, files, draw))
        else:
            content = mutated(content, files, draw)
        path.write_bytes(content)
        begun = time.process_time()
        try:
            with canary.watching():
                touch(read_checkpoint_file(path))
            counts["read"] += 1
        except CheckpointError as error:
            counts["refused"] += 1
            if error.__cause__ is not None:
                counts["refused without a check of its own"] += 1
                print(f"input {number} of seed {seed}: {error}", file=sys.stderr)
        except Exception as error:
            counts["another error"] += 1
            print(f"input {number} of seed {seed}: {error!r}", file=sys.stderr)
        counts["slow"] += time.process_time() - begun > SLOW_SECONDS
        path.unlink()
    counts["events"] = sum(canary.seen.values())
    counts["stray files"] = len(list(folder.iterdir()))
    return counts


def failures(counts: Counter[str]) -> int:
    """Return how many inputs did what none may do."""
    return sum(counts[name] for name in ("another error", "slow", "events", "stray files"))


def main() -> None:
    """Fuzz under a limit of memory, and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    canary = Canary()
    with tempfile.TemporaryDirectory() as name:
        # The hostile files name relative paths.
        os.chdir(name)
        fuzz(100, args.seed + 1, Path(name), canary)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, used + MEMORY_LIMIT))
        memory = PeakMemory(torch.device("cpu"))
        before = memory.peak()
        begun = time.perf_counter()
        counts = fuzz(args.inputs, args.seed, Path(name), canary)
        os.chdir("/")
    grown = (memory.peak() - before) / 2**20
    names = ["read", "refused", "refused without a check of its own", "another error", "slow"]
    for name in [*names, "events", "stray files"]:
        print(f"{name}: {counts[name]}")
    for event, count in sorted(canary.seen.items()):
        print(f"  event {event}: {count}")
    print(f"memory grew by {grown:.0f} MiB at most")
    print(f"{args.inputs} inputs of seed {args.seed} in {time.perf_counter() - begun:.0f} s")
    sys.exit(bool(failures(counts)))


if __name__ == "__main__":
    main()
