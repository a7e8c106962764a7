"""Measure how much memory converting a checkpoint takes, over the size of its file.

    python experiments/security/convert_memory.py --megabytes 600 --layout nvidia

A random conditional network of EDM2's kind, float16, is written in one of the layouts that files
have; another process converts it and reports its largest resident memory beyond what importing
takes. Exits with 1 if that is 1.5 times the file or more.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fuzz_unpickle import persistent_pickle
from ncvsd_inverse.machine import PeakMemory
from ncvsd_inverse.networks import ControlledDenoiser, UNetShape
from ncvsd_inverse.priors.convert import convert

LIMIT = 1.5
FILLED = 0.5
LAYOUTS = ("nvidia", "zip", "legacy", "safetensors")


def network_of(megabytes: float) -> ControlledDenoiser:
    """Return the narrowest published network whose float16 weights take `megabytes` at least."""
    for width in range(64, 1024, 64):
        shape = UNetShape(64, channels=(width, 2 * width, 3 * width, 4 * width))
        with torch.device("meta"):
            network = ControlledDenoiser(shape)
        if 2 * sum(value.numel() for value in network.state_dict().values()) >= 1e6 * megabytes:
            return network
    raise ValueError(f"megabytes must be less, got {megabytes}")


def write(path: Path, layout: str, megabytes: float) -> None:
    """Write the checkpoint; every weight is the same, which no reader can know."""
    network = network_of(megabytes).half().to_empty(device="cpu").requires_grad_(False)
    for value in network.state_dict().values():
        value.fill_(FILLED)
    if layout == "nvidia":
        for module in network.modules():
            # Published networks hold no such object.
            module.__dict__.pop("shape", None)
        path.write_bytes(persistent_pickle({"ema": network}, source="raise SystemExit"))
    elif layout == "safetensors":
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    else:
        zipped = layout == "zip"
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=zipped)


def measure(path: Path) -> float:
    """Convert `path`, print what it took and return the peak over the size of the file."""
    network_of(0)  # the first network without memory makes torch import more of itself
    memory = PeakMemory(torch.device("cpu"))
    before = memory.peak()
    convert(path, path.with_name("converted"), check=False)
    grown = memory.peak() - before
    size = path.stat().st_size
    print(f"file {size / 1e6:.0f} MB, peak {grown / 1e6:.0f} MB beyond imports")
    print(f"peak / file: {grown / size:.2f}")
    return grown / size


def main() -> None:
    """Write a file in one process, convert it in another, and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=600, help="of the file (%(default)s)")
    parser.add_argument("--layout", choices=LAYOUTS, default="nvidia", help="(%(default)s)")
    parser.add_argument("--only", choices=("write", "convert"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only == "write":
        write(args.file, args.layout, args.megabytes)
        return
    if args.only == "convert":
        sys.exit(measure(args.file) >= LIMIT)
    # A process starts with the largest memory of its parent, so this one must stay small.
    with tempfile.TemporaryDirectory() as folder:
        name = "file.safetensors" if args.layout == "safetensors" else "file.pkl"
        command = [sys.executable, __file__, *sys.argv[1:], "--file", f"{folder}/{name}"]
        subprocess.run([*command, "--only", "write"], check=True)
        print(f"layout {args.layout}", flush=True)
        sys.exit(subprocess.run([*command, "--only", "convert"], check=False).returncode)


if __name__ == "__main__":
    main()
