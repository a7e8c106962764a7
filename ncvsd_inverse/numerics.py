"""Small numerical tools: random draws per image, levels that broadcast, conjugate gradients.

It must not know what an image, an operator or a prior is.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ncvsd_inverse.errors import DivergenceError
from ncvsd_inverse.protocols import Generators


def make_generators(
    keys: Iterable[Sequence[int]], device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """Return one generator for each key, a sequence of non-negative integers.

    Keys that differ give independent streams (numpy's SeedSequence hashes them), so the draw of
    an image does not depend on which others share its batch. The length is hashed with the key,
    because SeedSequence alone takes (7, 1) and (7, 1, 0) for the same.
    """
    return [
        torch.Generator(device).manual_seed(
            int(np.random.SeedSequence([len(key), *key]).generate_state(1, np.uint64)[0] >> 1)
        )
        for key in keys
    ]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that FFTs and solves use for tensors of `dtype`: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def draw_normal(like: Tensor, generator: Generators = None) -> Tensor:
    """Draw standard normals of the shape, dtype and device of `like`, (B, ...).

    Args:
        like: tensor of shape (B, ...).
        generator: None, one generator for the whole batch, or one for each of the B items.

    Raises:
        ValueError: if the number of generators is not B.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    if len(generator) != like.shape[0]:
        raise ValueError(
            f"generator must be one or one for each of {like.shape[0]} images, got {len(generator)}"
        )
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    for item, source in zip(out, generator, strict=True):
        item.normal_(generator=source)
    return out


def expand_level(level: float | Tensor, like: Tensor) -> Tensor:
    """Return a noise level, a float or a (B,) tensor, in a shape that broadcasts over `like`.

    Returns:
        Tensor of shape (B, 1, ..., 1) with the dtype and device of `like`, (B, ...).

    Raises:
        ValueError: if the tensor has neither one nor B entries.
    """
    flat = torch.as_tensor(level, dtype=like.dtype, device=like.device).reshape(-1)
    if flat.numel() not in (1, like.shape[0]):
        raise ValueError(
            f"sigma must be a float or have shape ({like.shape[0]},), got {tuple(flat.shape)}"
        )
    return flat.expand(like.shape[0]).reshape(-1, *[1] * (like.ndim - 1))


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    rhs: Tensor,
    *,
    rtol: float = 1e-6,
    max_iterations: int = 1000,
    precondition: Callable[[Tensor], Tensor] | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Solve M x = rhs for symmetric positive definite M, every batch item on its own.

    Args:
        apply: x -> M x on tensors of the shape of `rhs`; must not mix batch items.
        rhs: right-hand sides, shape (B, ...).
        rtol: an item stops changing once its residual norm is at most rtol * ||rhs||.
        max_iterations: most applications of M.
        precondition: r -> an approximation of M^-1 r, symmetric positive definite.
        start: first guess, the shape of `rhs`; zeros if None.

    Returns:
        The solutions, shape (B, ...); items that did not reach `rtol` are returned as they are
        after `max_iterations`.

    Raises:
        DivergenceError: if a residual is not finite.

    Source:
        Hestenes & Stiefel, J. Res. NBS 49 (1952).
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))

    x = torch.zeros_like(rhs) if start is None else start.clone()
    residual = rhs - apply(x) if start is not None else rhs.clone()
    target = rtol**2 * dot(rhs, rhs)
    z = precondition(residual) if precondition else residual
    direction, rz = z, dot(residual, z)
    for iteration in range(max_iterations):
        squared = dot(residual, residual)
        if not bool(torch.isfinite(squared).all()):
            raise DivergenceError(
                f"conjugate gradients left the finite numbers at iteration {iteration}"
            )
        active = squared > target
        if not bool(active.any()):
            break
        image = apply(direction)
        curvature = dot(direction, image)
        step = torch.where(active & (curvature > 0), rz / curvature, torch.zeros_like(rz))
        x = x + step * direction
        residual = residual - step * image
        z = precondition(residual) if precondition else residual
        rz_next = dot(residual, z)
        ratio = torch.where(rz > 0, rz_next / rz, torch.zeros_like(rz))
        direction, rz = z + ratio * direction, rz_next
    return x
