"""Imaging inverse problems solved with distilled generative denoisers as plug-and-play priors.

    from ncvsd_inverse import solve
    from ncvsd_inverse.operators import Inpaint
    from ncvsd_inverse.priors import ncvsd_ffhq
    result = solve(y, operator=Inpaint(mask), prior=ncvsd_ffhq, nfe=10)

Every name is loaded when first used, so that importing the package costs little.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ncvsd_inverse import metrics, operators, priors, tasks
    from ncvsd_inverse.errors import CheckpointError, DivergenceError
    from ncvsd_inverse.images import read_image, write_image
    from ncvsd_inverse.integrations.deepinv import as_deepinv_denoiser, as_deepinv_reconstructor
    from ncvsd_inverse.operators.deepinv_physics import from_deepinv
    from ncvsd_inverse.priors import list_priors, load_card, load_prior, save_prior
    from ncvsd_inverse.priors.convert import convert
    from ncvsd_inverse.priors.statistics import measure_statistics
    from ncvsd_inverse.priors.tiled import tiled
    from ncvsd_inverse.protocols import Operator, Prior
    from ncvsd_inverse.sampling.result import Result
    from ncvsd_inverse.sampling.solve import solve
    from ncvsd_inverse.schedules import karras
    from ncvsd_inverse.tasks import Task, list_tasks, make_task

__version__ = "0.2.0"

if not (Path(__file__).parent / "operators").is_dir():
    raise ImportError(
        "ncvsd_inverse/operators must be a link to the folder operators beside it: this checkout "
        "lost its symbolic links (a zip, or Windows without core.symlinks); clone it with them"
    )

__all__ = [
    "CheckpointError",
    "DivergenceError",
    "Operator",
    "Prior",
    "Result",
    "Task",
    "__version__",
    "as_deepinv_denoiser",
    "as_deepinv_reconstructor",
    "convert",
    "from_deepinv",
    "karras",
    "list_priors",
    "list_tasks",
    "load_card",
    "load_prior",
    "make_task",
    "measure_statistics",
    "metrics",
    "operators",
    "priors",
    "read_image",
    "save_prior",
    "solve",
    "tasks",
    "tiled",
    "write_image",
]

_HOMES = {
    "CheckpointError": "errors",
    "DivergenceError": "errors",
    "Operator": "protocols",
    "Prior": "protocols",
    "Result": "sampling.result",
    "Task": "tasks",
    "as_deepinv_denoiser": "integrations.deepinv",
    "as_deepinv_reconstructor": "integrations.deepinv",
    "convert": "priors.convert",
    "from_deepinv": "operators.deepinv_physics",
    "karras": "schedules",
    "list_priors": "priors",
    "list_tasks": "tasks",
    "load_card": "priors",
    "load_prior": "priors",
    "make_task": "tasks",
    "measure_statistics": "priors.statistics",
    "read_image": "images",
    "save_prior": "priors",
    "solve": "sampling.solve",
    "tiled": "priors.tiled",
    "write_image": "images",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value: object = getattr(import_module(f"ncvsd_inverse.{_HOMES[name]}"), name)
    elif name in __all__:
        value = import_module(f"ncvsd_inverse.{name}")
    else:
        raise AttributeError(f"module 'ncvsd_inverse' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
