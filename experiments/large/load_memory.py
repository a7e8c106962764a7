"""Measure how much memory saving and loading a prior takes, over its weights.

    python experiments/large/load_memory.py --millions 550

Priors with random weights are written to a temporary folder, ours and one whose network a library
builds; other processes load them and report the largest resident memory beyond what they held
before. Exits with 1 if loading takes more than 1.3 times the weights in the dtype loaded. Linux.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ncvsd_inverse.machine import PeakMemory
from ncvsd_inverse.networks import ConcatDenoiser, UNetShape
from ncvsd_inverse.networks.library import build_converted
from ncvsd_inverse.priors import PriorCard, load_prior, save_prior
from ncvsd_inverse.priors.files import write_tensors
from ncvsd_inverse.priors.registry import load_network

LIMIT = 1.3
ADM = {
    "kind": "adm",
    "arguments": {
        "resolution": 256,
        "in_channels": 3,
        "out_channels": 6,
        "model_channels": 256,
        "channels": [256, 256, 512, 512, 1024, 1024],
        "blocks": 2,
        "attention": [32, 16, 8],
        "heads": ["head_channels", 64],
        "attention_order": "legacy",
        "block_resampling": True,
        "scale_shift": True,
        "num_classes": 0,
    },
}
"""The 256x256 network of guided diffusion, 553 million parameters."""

CARD = {
    "name": "random",
    "kind": "ncvsd",
    "image_shape": (3, 64, 64),
    "gamma": 0.414,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "licence": "none",
    "data": "none",
    "training": {},
    "evaluation": {},
    "weaknesses": "random weights",
    "intended_use": "to measure memory",
}


def measure(action: Callable[[], object]) -> float:
    """Return how much memory an action took at most, beyond what was held before, bytes."""
    memory = PeakMemory(torch.device("cpu"))
    before = memory.held()
    memory.reset()  # the largest begins at what is held now
    held = action()
    peak = memory.peak() - before
    del held
    return peak


def concat_shape(millions: float) -> UNetShape:
    """Return the narrowest network that has so many parameters at least."""
    for width in range(8, 1024, 8):
        shape = UNetShape(64, channels=(width, 2 * width, 3 * width, 4 * width))
        with torch.device("meta"):
            network = ConcatDenoiser(shape)
        if sum(value.numel() for value in network.parameters()) >= 1e6 * millions:
            return shape
    raise ValueError(f"millions must be less, got {millions}")


def write_ours(stem: Path, millions: float) -> None:
    """Write a distilled prior and print what saving took beyond the network itself."""
    save_prior(stem.with_name("small"), ConcatDenoiser(concat_shape(0)), CARD)
    network = ConcatDenoiser(concat_shape(millions))
    bytes_held = 4 * sum(value.numel() for value in network.state_dict().values())
    print(measure(lambda: save_prior(stem, network, CARD)) / bytes_held)


def write_library(stem: Path) -> None:
    """Write a teacher whose network a library builds."""
    network: Any = build_converted(ADM, "cpu")
    with torch.no_grad():
        for value in network.state_dict().values():
            value.uniform_(-1, 1)
    card = PriorCard.from_dict(
        CARD
        | {"kind": "diffusion", "gamma": None, "image_shape": (3, 256, 256)}
        | {"network": ADM, "sha256": "0" * 64}
    )
    digest = write_tensors(Path(f"{stem}.safetensors"), network.state_dict())
    Path(f"{stem}.json").write_text(replace(card, sha256=digest).to_json())


def load(stem: Path, how: str) -> None:
    """Load the prior, print the bytes of its weights in the dtype loaded, and what it took."""
    build_converted(ADM, "meta")  # the first network without memory makes torch import more
    small = stem.with_name("small")
    if small.with_suffix(".json").exists():
        load_prior(small)
    held: list[torch.nn.Module] = []

    def action() -> None:
        if how == "train":
            held.append(load_network(stem))
        else:
            held.append(load_prior(stem, dtype=getattr(torch, how)).network)

    peak = measure(action)
    weights = sum(v.numel() * v.element_size() for v in held[0].state_dict().values())
    print(weights, peak)


def run(*arguments: object) -> list[float]:
    """Run this script in another process; return the numbers that it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [float(number) for number in out.split()]


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--millions", type=float, default=550, help="parameters of ours")
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        stem = Path(options.write[0])
        write_library(stem) if options.write[1] == "library" else write_ours(stem, options.millions)
        return 0
    if options.load:
        load(Path(options.load[0]), options.load[1])
        return 0
    print("| prior | what | weights, MiB | peak, MiB | peak / weights |")
    print("| --- | --- | --- | --- | --- |")
    worst = 0.0
    for name, ways in (("ours", ("float32", "bfloat16", "train")), ("library", ("float32",))):
        with tempfile.TemporaryDirectory() as folder:
            stem = Path(folder) / "prior"
            saving = run("--millions", options.millions, "--write", stem, name)
            for how in ways:
                weights, peak = run("--load", stem, how)
                worst = max(worst, peak / weights)
                mib = f"{weights / 2**20:.0f} | {peak / 2**20:.0f}"
                print(f"| {name} | load, {how} | {mib} | {peak / weights:.2f} |", flush=True)
            for share in saving:
                print(f"| {name} | save, beyond the network | | | {share:.2f} |", flush=True)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
