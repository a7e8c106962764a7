"""`ncvsd doctor`: what a report of a bug needs to know of this machine."""

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import typer

import ncvsd_inverse
from ncvsd_inverse import CheckpointError, __version__, list_priors
from ncvsd_inverse.files import cache_folder, write_whole
from ncvsd_inverse.machine import find_device
from ncvsd_inverse.networks import cpu_has_bfloat16, inference_dtype
from ncvsd_inverse.priors import PublishedPrior, describe_prior
from ncvsd_inverse.priors.files import WEIGHTS_VARIABLE, search_folders, weights_path
from ncvsd_inverse.priors.registry import locate
from ncvsd_inverse.priors.stored import check_files

__all__ = ["EXTRAS", "REQUIRED", "VARIABLES", "doctor"]

REQUIRED = (
    "torch",
    "torchvision",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "typer",
    "rich",
    "pillow",
    "lpips",
    "piq",
    "kornia",
    "jinja2",
    "scipy",
    "deepinv",
    "matplotlib",
)
"""Packages that come with this one."""

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "train": ("accelerate", "filelock", "tensorboard"),
    "data": ("datasets",),
    "latents": ("diffusers",),
    "app": ("gradio",),
}
"""Packages that an extra of this one installs."""

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "LOCAL_RANK",
    "MKL_NUM_THREADS",
    WEIGHTS_VARIABLE,
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_HOME",
    "WORLD_SIZE",
    "XDG_CACHE_HOME",
)
"""Environment variables that change what happens, besides all that begin with NCVSD_."""


def doctor(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the report to this file instead.")
    ] = None,
) -> None:
    """Print versions, devices, folders, weights, threads and variables: what a bug report needs.

    The weights of every prior on this machine are read and compared with their cards; where one
    is damaged the exit status is 1. No network is asked. The home folder is written as ~; read
    the report before you post it.
    """
    weights, damaged = _weights()
    parts = {
        "ncvsd-inverse": _package(),
        "packages": _versions(),
        "devices": _devices(),
        "folders": _folders(),
        "weights": weights,
        "variables": _variables(),
    }
    lines = [line for title, told in parts.items() for line in (f"{title}:", *_indented(told))]
    text = "\n".join(lines).replace(f"{Path.home()}{os.sep}", f"~{os.sep}")
    if out is None:
        typer.echo(text)
    else:
        write_whole(out, text + "\n")
        typer.echo(f"{out}: the report, {len(lines)} lines")
    if damaged:
        raise CheckpointError(f"{', '.join(damaged)} cannot be used; the report says why")


def _indented(told: Mapping[str, str]) -> Iterator[str]:
    return (f"  {name}: {' '.join(text.split())}" for name, text in told.items())


def _package() -> dict[str, str]:
    folder = Path(ncvsd_inverse.__file__).parent
    linked = (folder / "operators").is_symlink()
    return {
        "version": __version__,
        "folder": f"{folder}, {'a checkout' if linked else 'installed'}",
        "python": f"{platform.python_version()}, {sys.executable}",
        "system": f"{platform.platform()}, {platform.machine()}",
    }


def _versions() -> dict[str, str]:
    found = {name: _version(name) or "MISSING" for name in REQUIRED}
    for extra, names in EXTRAS.items():
        for name in names:
            found[name] = _version(name) or f"not installed, the extra {extra} does"
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    own = find_device()
    bfloat16 = "with" if cpu_has_bfloat16() else "no"
    found = {
        "cpu": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of "
        f"torch, {bfloat16} bfloat16"
    }
    for index in range(torch.cuda.device_count()):
        of_this = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{of_this.name}, {of_this.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
    if len(found) == 1:
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        found["cuda"] = f"no GPU that torch can use; it was built {built}"
    if torch.backends.mps.is_available():
        found["mps"] = "there is one, but it has no float64: the CPU is used"
    found["unless --device is given"] = f"{own}, networks in {str(inference_dtype(own))[6:]}"
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _folders() -> dict[str, str]:
    shipped, *others = search_folders()
    kept = cache_folder()
    found = {"shipped weights": _contents(shipped)}
    found |= {f"${WEIGHTS_VARIABLE}": _contents(folder) for folder in others if folder != kept}
    return found | {"cache": _contents(kept)}


def _contents(folder: Path) -> str:
    """Return how much a folder holds, and whether files can be written there."""
    if not folder.is_dir():
        return f"{folder}, which is not there"
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    writable = "writable" if os.access(folder, os.W_OK) else "read-only"
    return f"{folder}, {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB, {writable}"


def _weights() -> tuple[dict[str, str], list[str]]:
    """Return how it stands with each prior and metric, and the names of damaged priors."""
    found, damaged = {}, []
    for name in list_priors():
        try:
            card = describe_prior(name)
            if isinstance(card, PublishedPrior):
                found[name] = "not on this machine, fetched when first used"
                continue
            place = locate(name)
            check_files(place, card)
            found[name] = f"whole, {weights_path(place)}, SHA-256 {card.sha256[:12]}..."
        except (ValueError, OSError, CheckpointError) as error:
            found[name] = f"DAMAGED: {error}"
            damaged.append(name)
    own = os.environ.get(WEIGHTS_VARIABLE)
    for net in ("alex", "squeeze", "vgg"):
        file = None if own is None else Path(own) / f"lpips_{net}_features.safetensors"
        shipped = "comes with the package" if net == "alex" else None
        here = str(file) if file is not None and file.is_file() else shipped
        found[f"lpips-{net}"] = here or "torchvision downloads it when first used"
    return found, damaged


def _variables() -> dict[str, str]:
    names = sorted({name for name in os.environ if name.startswith("NCVSD_")} | set(VARIABLES))
    return {name: os.environ.get(name, "not set") for name in names}
