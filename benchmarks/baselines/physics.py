"""Our operators, teachers and generators in the forms that deepinv takes, and results back.

A linear operator is the same matrix in every unit; only
what is affine differs, so images in [0, 1] cost a shift of the measurement, `unit_measurement`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from baselines.interface import Ladder, Method, Models, Problem, Settings
from ncvsd_inverse import DivergenceError
from ncvsd_inverse.numerics import draw_normal, expand_level, hartley
from ncvsd_inverse.operators import Blur, Denoise, Inpaint, SuperResolution
from ncvsd_inverse.protocols import Denoiser, LinearOperator, Operator, SolvableOperator

__all__ = [
    "BLUR_FLOOR",
    "MakeReconstructor",
    "OwnDraws",
    "SingularSystem",
    "TeacherDenoiser",
    "UnitDenoiser",
    "deepinv_reconstructor_method",
    "finish",
    "linear",
    "make_decomposed_physics",
    "make_physics",
    "pseudo_inverse",
    "singular_system",
    "unit_measurement",
    "unit_problem",
]

BLUR_FLOOR = 1e-3
"""What `pseudo_inverse` adds to the squared singular values of a blur, whose smallest are 0."""


def linear(operator: Operator) -> SolvableOperator:
    """Return `operator`; TypeError unless it is linear and solves its normal equations."""
    if not isinstance(operator, SolvableOperator):
        raise TypeError(
            f"operator must have adjoint and solve_normal, got {type(operator).__name__}"
        )
    return operator


def pseudo_inverse(operator: Operator, y: Tensor) -> Tensor:
    """Return A^+ y, shape (B, C, H, W), as (A^T A + b I)^-1 A^T y in float64.

    b is 1e-8, far below the squared singular values of masks and reductions; for blurs, whose
    exact inverse is nothing but amplified noise, it is `BLUR_FLOOR`: no gain exceeds 16.
    """
    solvable = linear(operator)
    floor = BLUR_FLOOR if isinstance(operator, Blur) else 1e-8
    x0 = solvable.solve_normal(solvable.adjoint(y.double()), a=1.0, b=floor)
    return x0.to(y.dtype)


def unit_measurement(operator: Operator, y: Tensor) -> Tensor:
    """Return what a linear operator would measure of (x + 1) / 2 where it measured y of x.

    That is (y + A 1) / 2, with half the noise.
    """
    ones = torch.ones(tuple(operator.input_shape(y.shape)), dtype=y.dtype, device=y.device)
    return (y + operator(ones)) / 2


def make_physics(operator: Operator, device: torch.device) -> nn.Module:
    """Return the operator as deepinv physics without noise, a LinearPhysics if it is linear.

    A, A_adjoint, A_dagger (`pseudo_inverse`) and prox_l2 (exact, by `solve_normal`) are ours.

    Args:
        operator: the forward model.
        device: where its measurements are.
    """
    from deepinv.physics import LinearPhysics, Physics

    if not isinstance(operator, SolvableOperator):
        forward: nn.Module = Physics(A=operator)
        return forward
    physics = LinearPhysics(A=operator, A_adjoint=operator.adjoint, device=device)

    def prox(z: Tensor, y: Tensor, gamma: float | Tensor) -> Tensor:
        """Return the minimiser of gamma / 2 ||A x - y||^2 + 1 / 2 ||x - z||^2."""
        gain = float(gamma)
        return operator.solve_normal(gain * operator.adjoint(y) + z, a=gain, b=1.0)

    physics.prox_l2 = prox
    physics.A_dagger = lambda y: pseudo_inverse(operator, y)
    adapted: nn.Module = physics
    return adapted


def make_decomposed_physics(operator: Operator, y: Tensor, sigma_y: float) -> nn.Module:
    """Return the operator as a deepinv DecomposablePhysics with its `singular_system`.

    Args:
        operator: the forward model; see `singular_system` for those that are known.
        y: the measurements it will see, shape (B, ...).
        sigma_y: their noise std, > 0.
    """
    from deepinv.physics import DecomposablePhysics, GaussianNoise

    system = singular_system(operator, y)
    physics: nn.Module = DecomposablePhysics(
        U=system.left,
        U_adjoint=system.left_adjoint,
        V=system.right,
        V_adjoint=system.right_adjoint,
        mask=system.values,
        noise_model=GaussianNoise(sigma_y),
        device=y.device,
    )
    return physics


@dataclass(frozen=True)
class SingularSystem:
    """A = left diag(values) right_adjoint with real orthonormal bases.

    Coordinates have the shape (B, C, H, W) of the images. Where there are fewer measurements than
    pixels, `left` ignores and `left_adjoint` leaves 0 the coordinates that have no value.

    Attributes:
        values: singular values, >= 0, shape (1, C, H, W).
        left: U, coordinates to measurements.
        left_adjoint: U^T, measurements to coordinates.
        right: V, coordinates to images.
        right_adjoint: V^T, images to coordinates.
    """

    values: Tensor
    left: Callable[[Tensor], Tensor]
    left_adjoint: Callable[[Tensor], Tensor]
    right: Callable[[Tensor], Tensor]
    right_adjoint: Callable[[Tensor], Tensor]


def singular_system(operator: Operator, y: Tensor) -> SingularSystem:
    """Return the singular system of an operator that treats all images of a batch alike.

    Known are masks, the identity, circular blurs (in Hartley's basis, the real sibling of
    Fourier's) and separable reductions (two small decompositions). The values come from what the
    operator does to unit vectors.

    Args:
        operator: the forward model.
        y: measurements, shape (B, ...), whose dtype and device the system takes.

    Raises:
        TypeError: if the operator is of another kind.
        ValueError: if it holds a mask or kernel for each image.
    """
    _, channels, height, width = operator.input_shape(y.shape)
    shape = (1, channels, height, width)
    if isinstance(operator, Denoise):
        return _diagonal_system(torch.ones(shape, dtype=y.dtype, device=y.device))
    if isinstance(operator, Inpaint):
        _check_common("mask", operator.mask)
        return _diagonal_system(operator.mask.to(y).expand(shape).clone())
    if isinstance(operator, Blur) and operator.boundary == "circular":
        _check_common("kernel", operator.kernel)
        return _circular_system(operator, shape, y)
    if isinstance(operator, SuperResolution):
        return _separable_system(operator, shape, y)
    raise TypeError(
        "operator must be a mask, a circular blur or a reduction to have a known singular "
        f"system, got {type(operator).__name__}"
    )


def _check_common(name: str, held: Tensor) -> None:
    if held.shape[0] != 1:
        raise ValueError(f"{name} must be one for all images, got {held.shape[0]} of them")


def _diagonal_system(values: Tensor) -> SingularSystem:
    # Copies, because deepinv's DDRM writes into the coordinates it is given.
    return SingularSystem(values, torch.clone, torch.clone, torch.clone, torch.clone)


def _circular_system(operator: Blur, shape: Sequence[int], like: Tensor) -> SingularSystem:
    """Return the system of the convolution with the response h to a point.

    V is Hartley's basis, in which every even filter is diagonal: with |h| as values, what is left
    of A is the filter h / |h|, which is orthonormal. So U = filter(h / |h|) V.
    """
    point = torch.zeros(tuple(shape), dtype=torch.float64, device=like.device)
    point[..., 0, 0] = 1
    response: Tensor = torch.fft.fft2(operator(point))
    values = response.abs()
    # Below that only rounding is left, whose phase is not that of a real filter.
    known = values > 1e-8 * values.max()
    phase = torch.where(known, response / values, torch.ones_like(response))
    phase = phase.to(torch.promote_types(like.dtype, torch.complex64))

    def left(coordinates: Tensor) -> Tensor:
        spectrum = torch.fft.fft2(hartley(coordinates)) * phase
        filtered: Tensor = torch.fft.ifft2(spectrum).real
        return filtered

    def left_adjoint(y: Tensor) -> Tensor:
        spectrum = torch.fft.fft2(y, norm="ortho") * phase.conj()
        coordinates: Tensor = spectrum.real - spectrum.imag
        return coordinates

    values = torch.where(known, values, torch.zeros_like(values)).to(like)
    return SingularSystem(values, left, left_adjoint, hartley, hartley)


def _separable_system(
    operator: SuperResolution, shape: Sequence[int], like: Tensor
) -> SingularSystem:
    """Return the system of y = R_H x R_W^T from those of R_H and R_W."""
    height, width = shape[-2:]
    left_h, values_h, right_h = _reduction_system(operator, height, like)
    left_w, values_w, right_w = _reduction_system(operator, width, like)
    small_h, small_w = len(left_h), len(left_w)

    def left(coordinates: Tensor) -> Tensor:
        return left_h @ coordinates[..., :small_h, :small_w] @ left_w.T

    def left_adjoint(y: Tensor) -> Tensor:
        coordinates = left_h.T @ y @ left_w
        return functional.pad(coordinates, (0, width - small_w, 0, height - small_h))

    return SingularSystem(
        torch.outer(values_h, values_w).expand(tuple(shape)).clone(),
        left,
        left_adjoint,
        lambda coordinates: right_h @ coordinates @ right_w.T,
        lambda x: right_h.T @ x @ right_w,
    )


def _reduction_system(
    operator: SuperResolution, side: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (h, h), the values padded to (side,) and V (side, side) of one axis's matrix R."""
    left, values, right = operator.singular_system(side)
    padded = functional.pad(values, (0, side - len(values)))
    return left.to(like), padded.to(like), right.to(like)


class TeacherDenoiser(nn.Module):
    """A teacher as a deepinv denoiser of images in [-1, 1]; gradients pass.

    The schedules of the papers start at about 150, above what networks are trained for: images with
    more noise than sigma_max are scaled down to sigma_max, where they still are nothing but noise.

    Args:
        teacher: the denoiser.
        sigma_max: largest noise std it knows, image units.
    """

    def __init__(self, teacher: Denoiser, sigma_max: float) -> None:
        super().__init__()
        self.teacher = teacher
        self.sigma_max = sigma_max

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Return E[x0 | x], shape (B, C, H, W); sigma is a float or has one entry or B."""
        level = expand_level(sigma, x)
        known = level.clamp(max=self.sigma_max)
        mean: Tensor = self.teacher.denoise(x * (known / level), known.flatten())
        return mean


class UnitDenoiser(nn.Module):
    """A denoiser of images in [-1, 1] as one of images in [0, 1], the range of deepinv's own."""

    def __init__(self, denoiser: TeacherDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Return E[x0 | x], shape (B, C, H, W); sigma in units of [0, 1]."""
        denoised: Tensor = self.denoiser(2 * x - 1, 2 * sigma)
        return (denoised + 1) / 2


class OwnDraws(TorchFunctionMode):
    """A context in which each image of a batch draws its noise from its own generator.

    deepinv's samplers draw for a whole batch at once, from one generator or torch's global one;
    inside, `torch.randn_like` and `Tensor.normal_` take item i from generator i instead, and the
    global one stays as it is.

    Args:
        generators: one for each item of what is drawn.
        scale: factor on the draws of `torch.randn_like`.
    """

    def __init__(self, generators: Sequence[torch.Generator], scale: float = 1.0) -> None:
        super().__init__()
        self.generators = generators
        self.scale = scale

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Return what `func` returns, or the draws in its place."""
        if func is torch.randn_like:
            return self.scale * draw_normal(args[0], self.generators)
        if func is torch.Tensor.normal_:
            return args[0].copy_(draw_normal(args[0], self.generators))
        return func(*args, **(kwargs or {}))


def finish(problem: Problem, x0: Tensor) -> Tensor:
    """Return the images in the dtype of y; DivergenceError if they are not finite."""
    if not bool(x0.isfinite().all()):
        raise DivergenceError("x0 must stay finite, got NaN or infinity at the end of the method")
    return x0.detach().to(problem.y.dtype)


MakeReconstructor: TypeAlias = Callable[[nn.Module, float, int, Settings], nn.Module]
"""(denoiser, sigma, network calls, settings) -> a deepinv reconstructor, called as (y, physics).

All is in units of images in [0, 1]: the denoiser, the teacher as (x, sigma) -> clean images, sigma,
the noise std of y, and what the reconstructor returns.
"""


def deepinv_reconstructor_method(
    name: str,
    title: str,
    make: MakeReconstructor,
    *,
    calls: tuple[int, ...] = (0,),
    least_calls: int = 1,
    samples: bool = False,
    linear_only: bool = True,
    settings: Settings | None = None,
    search: Mapping[str, Ladder] | None = None,
    reference: str = "",
) -> Method:
    """Return a deepinv reconstructor as a method of the benchmark.

    It is given one image at a time with the task's operator as physics (`unit_problem`), and draws
    from torch's global generator, which is seeded by the image and left as it was.

    Args:
        name: by which it is asked for and recorded.
        title: its name in tables.
        make: makes the reconstructor, anew for each image; one with weights should load them once.
        calls: network passes of the teacher at which it is run; (0,): it does not use the teacher.
        least_calls: fewest of them.
        samples: whether it draws from the posterior.
        linear_only: whether it takes linear physics alone.
        settings: values of all free settings.
        search: those that are tuned.
        reference: key of its paper in `references.bib`.
    """
    return Method(
        name=name,
        title=title,
        run=partial(_reconstruct, make),
        network="none" if calls == (0,) else "teacher",
        samples=samples,
        linear_only=linear_only,
        calls=calls,
        reference=reference,
        settings=settings or {},
        search=search or {},
        least_calls=least_calls,
    )


def _reconstruct(
    make: MakeReconstructor, problem: Problem, models: Models, calls: int, settings: Settings
) -> Tensor:
    y, physics, sigma = unit_problem(problem)
    denoiser = UnitDenoiser(TeacherDenoiser(models.teacher, models.sigma_max))
    restored = []
    for image, generator in enumerate(problem.generators()):
        with torch.random.fork_rng([y.device] if y.is_cuda else []):
            torch.manual_seed(generator.initial_seed())
            model = make(denoiser, sigma, calls, settings)
            if not isinstance(model, nn.Module):
                raise TypeError(f"make must return a module, got {type(model).__name__}")
            restored.append(model.to(y.device).eval()(y[image : image + 1], physics).detach())
    return finish(problem, 2 * torch.cat(restored) - 1)


def unit_problem(problem: Problem) -> tuple[Tensor, nn.Module, float]:
    """Return measurements, physics and noise std of images in [0, 1].

    The physics have the noise as their noise model. A linear operator stays linear: its
    measurements are shifted, see `unit_measurement`.
    """
    from deepinv.physics import GaussianNoise, Physics

    operator, y, sigma = problem.operator, problem.y, problem.sigma_y
    if isinstance(operator, LinearOperator):
        physics, y, sigma = (
            make_physics(operator, y.device),
            unit_measurement(operator, y),
            sigma / 2,
        )
    else:
        physics = Physics(A=lambda x, **_: operator(2 * x - 1))
    physics.noise_model = GaussianNoise(sigma)
    return y, physics.to(y.device), sigma
