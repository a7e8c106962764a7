"""Small numerical tools: random draws, levels that broadcast, linear solves, Jacobians, moments."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ncvsd_inverse.machine import Signal, exact_arithmetic
from ncvsd_inverse.protocols import Generators, Tangent

__all__ = [
    "Map",
    "Moments",
    "conjugate_gradient",
    "digest",
    "draw_normal",
    "ensemble_crps",
    "expand_level",
    "filter_periodic",
    "frechet_distance",
    "hartley",
    "interpolate",
    "jacobian",
    "local_part",
    "make_generators",
    "squared_norm",
    "white_probe",
    "working_dtype",
]


Map: TypeAlias = Callable[[Tensor], Tensor]
"""A function of a tensor that returns one."""


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


def local_part(tensor: Tensor) -> Tensor:
    """Return the rows of `tensor` that this process holds: all, unless it is spread (DTensor)."""
    to_local = getattr(tensor, "to_local", None)  # importing DTensor to ask would take long
    part: Tensor = tensor if to_local is None else to_local()
    return part


def draw_normal(like: Tensor, generator: Generators = None) -> Tensor:
    """Draw standard normals of the shape, dtype and device of `like`, (B, ...).

    Args:
        like: tensor of shape (B, ...).
        generator: None, one generator for the whole batch, or one for each of the B items.

    Raises:
        ValueError: if the number of generators is not B, or they are on another device.
        TypeError: if `generator` is something else.
    """
    check_generator(generator, like)
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    for item, source in zip(out, generator, strict=True):
        item.normal_(generator=source)
    return out


def check_generator(generator: Generators, like: Tensor) -> None:
    """Raise as `draw_normal` does unless `generator` can draw for images `like` (B, ...)."""
    if generator is None:
        return
    sources = [generator] if isinstance(generator, torch.Generator) else generator
    if not isinstance(sources, Sequence) or not all(
        isinstance(source, torch.Generator) for source in sources
    ):
        raise TypeError(
            f"generator must be a torch.Generator, or one for each image, got {generator!r:.80}"
        )
    if sources is generator and len(sources) != like.shape[0]:
        raise ValueError(
            f"generator must be one or one for each of {like.shape[0]} images, got {len(sources)}"
        )
    for source in sources:
        if source.device.type != like.device.type:
            raise ValueError(
                f"generator must be on the device of the images, {like.device}, got {source.device}"
            )


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
    apply: Map,
    rhs: Tensor,
    *,
    rtol: float = 1e-6,
    atol: float = 0.0,
    ptol: float = 0.0,
    etol: float = 0.0,
    max_iterations: int = 1000,
    precondition: Map | None = None,
    narrow: Callable[[Tensor], tuple[Map, Map | None]] | None = None,
) -> Tensor:
    """Solve M x = rhs for symmetric positive definite M, every item on its own.

    An item stops changing once one of four bounds holds, or after `max_iterations`. A GPU is not
    waited for: it may go on for some iterations, in which nothing changes.

    Args:
        apply: x -> M x on tensors of the shape of `rhs`; must not mix items.
        rhs: right-hand sides, shape (B, ...): B items; with `narrow` (B, K, ...): B K items.
        rtol: the residual norm is at most rtol * ||rhs||,
        atol: or at most this,
        ptol: or the residual is at most this in the norm of the preconditioner,
        etol: or the last iteration moved x by at most this in the norm of M. Near the end that is
            what x is off by, in the same norm, to a factor of order one.
        max_iterations: most applications of M.
        precondition: r -> an approximation of M^-1 r, symmetric positive definite.
        narrow: called with the places along K of the items that still change, when those of others
            are done; returns `apply` and `precondition` for them alone. On a CPU only.

    Returns:
        The solutions, shape (B, ...); items that did not stop as they are after `max_iterations`,
        NaN where a residual is not finite.

    Sources:
        Hestenes & Stiefel, J. Res. NBS 49 (1952); Strakos & Tichy, ETNA 13 (2002), for the
        estimate of the error in the norm of M.
    """
    dims = 1 if narrow is None else 2

    def dot(a: Tensor, b: Tensor) -> Tensor:
        products = (a * b).flatten(dims).sum(dims)
        return products.reshape(*products.shape, *[1] * (a.ndim - dims))

    x, residual = torch.zeros_like(rhs), rhs.clone()
    squared = dot(rhs, rhs)
    least = (rtol**2 * squared).clamp(min=atol**2)
    by_residual = rtol > 0 or atol > 0
    direction = z = precondition(residual) if precondition else residual
    rz = dot(residual, z) if precondition else squared
    # Nothing is left to do where the right-hand side is nothing. NaN counts as something.
    active = ~((squared <= least) | (rz <= 0))
    done, places = torch.zeros_like(rhs), None
    all_done = Signal(rhs.device)
    for _ in range(max_iterations):
        if all_done.seen(~active.any()):
            break
        if narrow and rhs.device.type == "cpu":
            alive = active.flatten(2).any(2).any(0)
            if not bool(alive.all()):
                _put(done, places, x, rz)
                left = alive.nonzero()[:, 0]
                places = left if places is None else places[left]
                kept = (x, residual, direction, rz, active, least)
                x, residual, direction, rz, active, least = (part[:, left] for part in kept)
                apply, precondition = narrow(places)
        image = apply(direction)
        curvature = dot(direction, image)
        moves = active & ~(curvature <= 0)
        step = torch.where(moves, rz / curvature, 0.0)
        x = torch.addcmul(x, step, direction)
        residual = torch.addcmul(residual, step, image, value=-1)
        z = precondition(residual) if precondition else residual
        rz_next = dot(residual, z)
        active = moves & (step * rz > etol**2) & (rz_next > ptol**2)
        if by_residual:
            active &= (dot(residual, residual) if precondition else rz_next) > least
        direction = torch.addcmul(z, torch.where(active, rz_next / rz, 0.0), direction)
        rz = rz_next
    _put(done, places, x, rz)
    return done


def _put(done: Tensor, places: Tensor | None, x: Tensor, rz: Tensor) -> None:
    """Write solutions to their places along dimension 1, NaN where rz is not finite."""
    x = torch.where(torch.isfinite(rz), x, torch.nan)
    if places is None:
        done.copy_(x)
    else:
        done[:, places] = x


def interpolate(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Return the piecewise linear function through points, constant beyond them, as numpy.interp.

    Args:
        x: any shape.
        places: increasing, shape (n,).
        values: shape (n,).
    """
    if len(places) == 1:
        return values.expand(x.shape)
    right = torch.searchsorted(places, x.contiguous()).clamp(1, len(places) - 1)
    low, high = places[right - 1], places[right]
    share = ((x - low) / (high - low)).clamp(0, 1)
    return values[right - 1] + share * (values[right] - values[right - 1])


def squared_norm(x: Tensor) -> Tensor:
    """Return the squared norm of each batch item, shape (B,), of x (B, ...)."""
    return x.flatten(1).square().sum(dim=1)


def digest(*tensors: Tensor) -> str:
    """Return a hash of the shapes and values of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(repr(tensor.shape).encode())
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def white_probe(like: Tensor) -> Tensor:
    """Return one image of standard normals, always the same, for each of `like`, (B, ...)."""
    source = torch.Generator().manual_seed(0)
    single = torch.randn(like.shape[1:], generator=source, dtype=torch.float32)
    return single.to(like).expand(like.shape)


def filter_periodic(x: Tensor, gains: Tensor) -> Tensor:
    """Return images (..., H, W) convolved periodically, by the gains (..., H, W // 2 + 1)."""
    if 0 in x.stride():
        x = x.contiguous()  # the FFTs of torch 2.6 refuse what is expanded
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * gains, s=x.shape[-2:])
    return filtered


def hartley(x: Tensor) -> Tensor:
    """Return the orthonormal 2-D Hartley transform of x (..., H, W): its own inverse.

    The real basis cos + sin turns real white noise into real white noise, and diagonalises every
    symmetric circular convolution with the eigenvalues of the FFT.
    """
    spectrum = torch.fft.fft2(x, norm="ortho")
    real: Tensor = spectrum.real - spectrum.imag
    return real


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tangent:
    """Return f(x) and, for the Jacobian J of f at x, the functions v -> J v and r -> J^T r.

    By automatic differentiation: J^T r is linear in r, and its own gradient along v is J v.

    Args:
        function: a differentiable function of x (B, ...).
        x: where J is taken.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = function(x)
        weights = torch.zeros_like(value, requires_grad=True)
        (pulled,) = torch.autograd.grad(value, x, weights, create_graph=True)

    def push(v: Tensor) -> Tensor:
        return torch.autograd.grad(pulled, weights, v, retain_graph=True)[0]

    def pull(r: Tensor) -> Tensor:
        return torch.autograd.grad(value, x, r, retain_graph=True)[0]

    return value.detach(), push, pull


@exact_arithmetic()
def ensemble_crps(draws: Tensor, truth: Tensor) -> Tensor:
    """Return the continuous ranked probability score of draws, for every entry on its own.

    The fair score: its mean is that of infinitely many draws, whatever their number m. With pairs
    of two different draws,

        mean_i |draw_i - truth| - 1/2 mean_(i != j) |draw_i - draw_j|

    Args:
        draws: independent draws, shape (m, ...), m >= 2.
        truth: what came true, shape (...).

    Returns:
        Scores in the units of `truth`, shape (...); lower is better; one can be below 0.

    Source:
        Gneiting & Raftery, JASA 102 (2007) for the score; Ferro, QJRMS 140 (2014) for fairness.
    """
    num = len(draws)
    # Sorted, the k-th of m draws is the larger of a pair k times and the smaller m - 1 - k times.
    signs = torch.arange(num, dtype=draws.dtype, device=draws.device) * 2 - (num - 1)
    pairs = torch.tensordot(signs, draws.sort(0).values, dims=1)
    scores: Tensor = (draws - truth).abs().mean(0) - pairs / (num * (num - 1))
    return scores


@dataclass(frozen=True)
class Moments:
    """Sums from which mean and covariance of many rows follow; two of them add to that of both.

    Attributes:
        count: number of rows.
        total: their sum, shape (D,), float64.
        products: sum of their outer products, shape (D, D), float64.
    """

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def none(cls) -> Self:
        """Return the moments of no rows, to add to."""
        return cls(0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))

    @classmethod
    def of(cls, rows: Tensor) -> Self:
        """Return the moments of `rows`, shape (N, D), on the CPU."""
        exact = rows.detach().to("cpu", torch.float64)
        return cls(len(exact), exact.sum(0), exact.T @ exact)

    def __add__(self, other: Self) -> Self:
        """Return the moments of the rows of both."""
        return type(self)(
            self.count + other.count, self.total + other.total, self.products + other.products
        )

    @property
    def mean(self) -> Tensor:
        """Mean row, shape (D,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance of the rows, shape (D, D)."""
        mean = self.mean
        return (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return the squared 2-Wasserstein distance of the Gaussians with the moments of two sets.

    With means m and covariances C it is |m1 - m2|^2 + tr(C1 + C2) - 2 tr((C1 C2)^(1/2)). The last
    trace is the sum of the singular values of R1 R2, where R is the symmetric root of C by its
    eigenvectors: no root of a matrix that is not symmetric is taken, and singular covariances do
    no harm.

    Raises:
        ValueError: if a set has fewer than two rows or the rows differ in length.

    Source:
        Dowson & Landau, J. Multivariate Analysis 12 (1982).
    """
    for name, moments in (("first", first), ("second", second)):
        if moments.count < 2:
            raise ValueError(f"{name} must be moments of at least 2 rows, got {moments.count}")
    if first.total.shape != second.total.shape:
        raise ValueError(
            f"second must have rows of length {len(first.total)}, got {len(second.total)}"
        )
    covariances = (first.covariance, second.covariance)
    roots = [_symmetric_root(covariance) for covariance in covariances]
    overlap = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    spread = covariances[0].trace() + covariances[1].trace() - 2 * overlap
    return float((first.mean - second.mean).square().sum() + spread)


def _symmetric_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
