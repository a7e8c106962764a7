"""All methods of the benchmark by name."""

from baselines import classics, daps, ddnm, deepinv_methods, guided, pnpdm, reddiff
from baselines.interface import Method
from baselines.ours import OURS

__all__ = ["METHODS"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *OURS,
        daps.METHOD,
        pnpdm.METHOD,
        reddiff.METHOD,
        ddnm.METHOD,
        *guided.METHODS,
        *deepinv_methods.METHODS,
        *classics.METHODS,
    )
}
