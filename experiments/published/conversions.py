"""Convert, load and run every published configuration, with random weights.

    python experiments/published/conversions.py --shapes FOLDER

FOLDER holds one NAME.json a published file: the names of its tensors and their shapes. For each a
file of random weights is written in the form in which its authors publish it, and other processes
convert and load it. Printed is a Markdown table: whether names and shapes are those of the network
that was built, seconds, and the largest resident memory of the process, whole and over what it had
before; of loading also what it takes beyond the size of the file, over the size of the weights as
loaded. The self-check refuses random weights: they are converted again without it, and seconds and
memory are those of both.
"""

import argparse
import io
import json
import math
import pickle
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.machine import PeakMemory
from ncvsd_inverse.priors import NCVSDPrior
from ncvsd_inverse.priors.convert import convert, load_foreign

BUFFERS = ("freqs", "phases", "resample_filter")
MIB = 2**20
COLUMNS = (
    "file",
    "parameters",
    "MB",
    "tensors",
    "self-check",
    "convert s",
    "peak MiB (over before)",
    "load s",
    "peak MiB (over before)",
    "beyond the file, of the weights",
    "forward s",
)


@cache
def stand_in(module: str, name: str, *bases: type) -> Any:  # noqa: ANN401 a class of any kind
    """Return a class that pickles by the name of another package's."""
    for depth in range(1, len(module.split(".")) + 1):
        path = ".".join(module.split(".")[:depth])
        sys.modules.setdefault(path, types.ModuleType(path))
    made = type(name, bases, {"__module__": module})
    setattr(sys.modules[module], name, made)
    return made


def tree(shapes: dict[str, list[int]], root: str, module: str, dtype: torch.dtype) -> nn.Module:
    """Return modules that hold random tensors of these names and shapes."""
    block = stand_in(module, "Block", nn.Module)

    def grown(entries: dict[str, list[int]], kind: type[nn.Module]) -> nn.Module:
        node, inner = kind(), dict[str, dict[str, list[int]]]()
        for name, shape in entries.items():
            first, _, rest = name.partition(".")
            if rest:
                inner.setdefault(first, {})[rest] = shape
            elif first in BUFFERS:
                node.register_buffer(first, torch.rand(shape))
            else:
                value = drawn(shape, dtype)
                node.register_parameter(first, nn.Parameter(value, requires_grad=False))
        for name, parts in inner.items():
            node.add_module(name, grown(parts, block))
        if "attn_proj" in inner:
            node.num_heads = inner["attn_proj"]["weight"][0] // 64  # type: ignore[assignment]
        return node

    whole = grown(shapes, stand_in(module, root, nn.Module))
    whole.sigma_data = 0.5  # type: ignore[assignment]
    return whole


def drawn(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Return small random numbers, quickly: those of a large tensor repeat."""
    few = torch.randn(1 << 20).mul_(0.05).to(dtype)
    count = math.prod(shape)
    # A view would be saved with all that it is a view of.
    return few.repeat(-(-count // len(few)))[:count].reshape(shape).clone()


def easy(**entries: object) -> object:
    """Return the dict that NVIDIA's training pickles."""
    return stand_in("dnnlib.util", "EasyDict", dict)(entries)


class PersistentPickler(pickle.Pickler):
    """Pickles as NVIDIA's `persistence` does: each object with its source and its attributes."""

    def reducer_override(self, thing: object) -> Any:  # noqa: ANN401 as its base class has it
        """Return how to pickle `thing`."""
        kind = type(thing)
        if not kind.__module__.startswith("training."):
            return NotImplemented
        meta = easy(
            type="class",
            version=6,
            module_src="raise SystemExit('the source in a checkpoint ran')",
            class_name=kind.__name__,
            state=vars(thing),
        )
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def by_name(content: object) -> bytes:
    """Pickle as the conditional network of FFHQ is published: classes by their names."""
    return pickle.dumps(content, protocol=4)


def persistent(content: object) -> bytes:
    """Pickle as EDM and EDM2 are published: classes with their source."""

    def _reconstruct_persistent_obj() -> None: ...

    stand_in("torch_utils.persistence", "Unused")
    module = sys.modules["torch_utils.persistence"]
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    file = io.BytesIO()
    PersistentPickler(file, 4).dump(content)
    return file.getvalue()


def write(name: str, shapes: dict[str, list[int]], folder: Path) -> Path:
    """Write a file of random weights as it is published; return its path."""
    torch.manual_seed(0)
    pickled: Callable[[object], bytes] = by_name if "ffhq256" in name else persistent
    path = folder / f"{name}.pkl"
    if name.startswith("ffhq_10m"):
        path = path.with_suffix(".pt")
        torch.save({key: drawn(shape, torch.float32) for key, shape in shapes.items()}, path)
        return path
    if name.startswith("edm-"):
        network = tree(shapes, "EDMPrecond", "training.networks", torch.float32)
        path.write_bytes(pickled({"ema": network, "augment_pipe": None, "dataset_kwargs": easy()}))
        return path
    root = "GenerativeDenoiser" if name.startswith("ncvsd") else "Precond"
    network = tree(shapes, root, "training.networks_edm2", torch.float16)
    encoder = stand_in("training.encoders", "Encoder", object)()
    if "img512" in name:
        encoder.scale = np.ones(4, np.float32)
        encoder.raw_mean, encoder.init_kwargs = [5.81, 3.25, 0.12, -2.15], easy()
    loss = stand_in("training.loss", "Loss", object)()
    loss.P_mean = -0.4
    content = easy(ema=network, encoder=encoder, dataset_kwargs=easy(resolution=256), loss_fn=loss)
    path.write_bytes(pickled(content))
    return path


def peak() -> float:
    """Return the largest resident memory that this process had, MiB."""
    return PeakMemory(torch.device("cpu")).peak() / MIB


def import_library(path: Path) -> None:
    """Import what builds networks of other kinds than ours, which is no cost of a conversion."""
    if path.name.startswith(("edm-", "ffhq_10m")):
        from deepinv.models import DiffUNet

        with torch.device("meta"):
            DiffUNet(pretrained=None)


def measure_conversion(path: Path, stem: Path) -> dict[str, object]:
    """Convert a file; where the self-check refuses it, again without."""
    import_library(path)
    before, start = peak(), time.monotonic()
    outcome = ""
    try:
        tried = convert(path, stem).training["self_check"]
        outcome = "not possible" if isinstance(tried, str) else "passed"
    except CheckpointError as error:
        if "does not denoise" not in str(error):
            raise
    if not outcome:
        outcome = "refused"
        convert(path, stem, check=False)
    seconds = time.monotonic() - start
    return {"check": outcome, "convert": seconds, "peak": peak(), "over": peak() - before}


def measure_loading(path: Path) -> dict[str, object]:
    """Load a file and run its network once."""
    import_library(path)
    before, start = peak(), time.monotonic()
    prior = load_foreign(path)
    loaded, over, whole = time.monotonic() - start, peak() - before, peak()
    held = sum(value.nbytes for value in prior.network.state_dict().values()) / MIB
    if prior.num_classes:
        prior = prior.conditioned_on(0)
    assert prior.image_shape is not None
    u, start = torch.randn(1, *prior.image_shape), time.monotonic()
    with torch.no_grad():
        out = prior.sample(u, 0.5) if isinstance(prior, NCVSDPrior) else prior.denoise(u, 0.5)
    if not out.isfinite().all():
        raise SystemExit(f"{path}: the output must be finite")
    forward = time.monotonic() - start
    return {"load": loaded, "peak": whole, "over": over, "held": held, "forward": forward}


def matches(stem: Path, shapes: dict[str, list[int]]) -> str:
    """Tell whether the converted file has exactly these tensors, the network's prefix aside."""
    with stem.with_suffix(".safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("log_sigmas", None)
    came = {name.removeprefix("network."): entry["shape"] for name, entry in header.items()}
    expected = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    return "same" if came == expected else "different"


def row(facts: Path, folder: Path) -> list[str]:
    """Measure one published configuration; return the cells of its row."""
    shapes = json.loads(facts.read_text())
    name, stem = facts.stem, folder / "converted"

    def run(step: str) -> dict[str, Any]:
        command = [sys.executable, __file__, "--shapes", str(facts.parent), "--only", facts.stem]
        done = subprocess.run(
            [*command, "--step", step, "--folder", str(folder)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    written = run("write")
    converted, loaded = run("convert"), run("load")
    total = sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith(BUFFERS))
    tensors = f"{len(shapes)}, {matches(stem, shapes)}"
    for path in folder.iterdir():
        path.unlink()
    return [
        name,
        f"{total / 1e6:.1f} M",
        f"{written['bytes'] / 1e6:.0f}",
        tensors,
        converted["check"],
        f"{converted['convert']:.1f}",
        f"{converted['peak']:.0f} ({converted['over']:.0f})",
        f"{loaded['load']:.1f}",
        f"{loaded['peak']:.0f} ({loaded['over']:.0f})",
        f"{(loaded['over'] - written['bytes'] / MIB) / loaded['held']:.2f}",
        f"{loaded['forward']:.1f}",
    ]


def main() -> None:
    """Print the table; each step of each file has a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=Path, required=True, help="folder of NAME.json")
    parser.add_argument("--only", help="the one file to take")
    parser.add_argument("--step", choices=("write", "convert", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    facts = sorted(args.shapes.glob(f"{args.only or '*'}.json"))
    if not facts:
        parser.error(f"--shapes must hold NAME.json, and --only name one, got {args.shapes}")
    if args.step == "write":
        path = write(facts[0].stem, json.loads(facts[0].read_text()), args.folder)
        print(json.dumps({"bytes": path.stat().st_size}))
        return
    if args.step:
        path = next(args.folder.glob(f"{facts[0].stem}.p*"))
        stem = args.folder / "converted"
        convert_it = args.step == "convert"
        print(json.dumps(measure_conversion(path, stem) if convert_it else measure_loading(path)))
        return
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    with tempfile.TemporaryDirectory() as folder:
        for file in facts:
            print(f"| {' | '.join(row(file, Path(folder)))} |", flush=True)


if __name__ == "__main__":
    main()
