"""Imaging inverse problems solved with distilled generative denoisers as plug-and-play priors.

    from ncvsd_inverse import solve
    from ncvsd_inverse.operators import Inpaint
    from ncvsd_inverse.priors import ncvsd_ffhq
    result = solve(y, operator=Inpaint(mask), prior=ncvsd_ffhq, nfe=10)

Every name is loaded when first used, so that importing the package costs little.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ncvsd_inverse import metrics, operators, priors, tasks
    from ncvsd_inverse.errors import CheckpointError, DivergenceError
    from ncvsd_inverse.integrations.deepinv import as_deepinv_denoiser, as_deepinv_reconstructor
    from ncvsd_inverse.operators.deepinv_physics import from_deepinv
    from ncvsd_inverse.priors import list_priors, load_prior
    from ncvsd_inverse.priors.tiled import tiled
    from ncvsd_inverse.sampling.result import Result
    from ncvsd_inverse.sampling.solve import solve

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DivergenceError",
    "Result",
    "__version__",
    "as_deepinv_denoiser",
    "as_deepinv_reconstructor",
    "from_deepinv",
    "list_priors",
    "load_prior",
    "metrics",
    "operators",
    "priors",
    "solve",
    "tasks",
    "tiled",
]

_HOMES = {
    "CheckpointError": "errors",
    "DivergenceError": "errors",
    "Result": "sampling.result",
    "as_deepinv_denoiser": "integrations.deepinv",
    "as_deepinv_reconstructor": "integrations.deepinv",
    "from_deepinv": "operators.deepinv_physics",
    "list_priors": "priors",
    "load_prior": "priors",
    "solve": "sampling.solve",
    "tiled": "priors.tiled",
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
