"""Errors that are neither a wrong value nor a wrong type."""

__all__ = [
    "CheckpointError",
    "DivergenceError",
]


class DivergenceError(RuntimeError):
    """A sampler left the finite numbers; the message names sweep, rho and step size."""


class CheckpointError(RuntimeError):
    """A weights file is missing, damaged, of another kind, or not what its card says."""
