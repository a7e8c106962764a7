"""The roles that parts of the toolkit play for one another, and defaults for what is optional.

A user's own class needs no inheritance: having the methods is enough. What else the toolkit asks
(a family, an image shape, the channels of a network) may be left out: `OperatorTraits`,
`PriorTraits` and `NetworkTraits` hold the defaults. Arguments of the methods are positional, so
that their names are free.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = [
    "SIGMA_Y",
    "Covariance",
    "Denoiser",
    "DiagonalOperator",
    "Generator",
    "Generators",
    "GlobalSearch",
    "HasNoiseLevel",
    "HasStatistics",
    "KernelFamily",
    "LikelihoodStep",
    "LinearForm",
    "LinearOperator",
    "Linearisable",
    "NetworkBacked",
    "NetworkInfo",
    "NetworkTraits",
    "Operator",
    "OperatorTraits",
    "Point",
    "Points",
    "Prior",
    "PriorTraits",
    "SolvableOperator",
    "Statistics",
    "StructuredOperator",
    "Tangent",
    "Temperable",
    "UnknownKernel",
]

SIGMA_Y = 0.05
"""Noise std of a measurement whose operator names none, in units of y."""

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""Where random numbers come from: torch's global state, one generator, or one an image."""

Tangent: TypeAlias = tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""A(x) and, for the Jacobian J of A at x, the functions v -> J v and r -> J^T r."""


class Point(NamedTuple):
    """How the chain of a point estimate runs; levels are stds in image units.

    Attributes:
        temperature: factor on the noise of draws and likelihood, in (0, 1].
        noise: what the likelihood assumes over sigma_y, > 0.
        first: first level of the sweeps, > 0.
        smallest: their last level, > 0, at sigma_y = 0.05; in proportion at others.
        last: level of the last call, which returns the mean, likewise; 0: no such call.
    """

    temperature: float
    noise: float
    first: float
    smallest: float
    last: float


Points: TypeAlias = Mapping[str | None, Mapping[int, Point]]
"""Settings of point estimates by operator family (None: any other) and number of calls."""


@runtime_checkable
class Operator(Protocol):
    """A forward model, batch first: y = A(x) + noise."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Map images (B, C, H, W) to noiseless measurements (B, ...)."""
        ...

    def input_shape(self, y_shape: Sequence[int], /) -> tuple[int, ...]:
        """Return the shape (B, C, H, W) of the images that give measurements of `y_shape`."""
        ...


@runtime_checkable
class LinearOperator(Operator, Protocol):
    """A forward model that is a matrix A."""

    def adjoint(self, y: Tensor, /) -> Tensor:
        """Map measurements (B, ...) to A^T y, shape (B, C, H, W)."""
        ...


@runtime_checkable
class SolvableOperator(LinearOperator, Protocol):
    """A linear forward model that solves its own regularised normal equations."""

    def solve_normal(self, rhs: Tensor, /, *, a: float, b: float) -> Tensor:
        """Return (a A^T A + b I)^-1 rhs, shape (B, C, H, W); a >= 0, b > 0."""
        ...


@runtime_checkable
class DiagonalOperator(SolvableOperator, Protocol):
    """A solvable operator that can, where `is_diagonal`, also take the root of the inverse."""

    @property
    def is_diagonal(self) -> bool:
        """Whether `solve_normal_spread` can be called."""
        ...

    def solve_normal_spread(self, rhs: Tensor, eps: Tensor, /, *, a: float, b: float) -> Tensor:
        """Return M^-1 rhs + M^(-1/2) eps for M = a A^T A + b I, shape (B, C, H, W)."""
        ...


@dataclass(frozen=True, eq=False)
class LinearForm:
    """A linear forward model in steps, so that a solver can choose how to invert it.

    y = keep(every `stride`-th pixel(blur(grey(x)))), where grey mixes the channels into one, blur
    is a periodic convolution of H x W pixels, and keep drops pixels; or y holds Fourier
    coefficients of blur(grey(x)). A step that is None does nothing.

    Attributes:
        weights: weights of the channels in the grey image, shape (C,).
        transfer: gains of the blur in the layout of `torch.fft.rfft2`, complex, shape
            (1 or B, 1, H, W // 2 + 1).
        stride: pixels from one kept pixel to the next on each axis, >= 1, a divisor of H and W.
        mask: pixels that are kept, boolean, shape (1 or B, 1 or C, H, W).
        margins: pixels at the left, right, top and bottom that y lacks; the mask drops them too.
        shares: how often each Fourier coefficient is measured, real, (1, 1, H, W // 2 + 1).
        exact: whether this is A itself; else A differs at the edges of images.
        axes: matrices (h, H) and (w, W) of rows and columns, if A is these after grey.
        forward: what A does to images of one channel, (B, 1, H, W), after grey, if it has no axes.
        backward: transpose of `forward`.
    """

    weights: Tensor | None = None
    transfer: Tensor | None = None
    stride: int = 1
    mask: Tensor | None = None
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)
    shares: Tensor | None = None
    exact: bool = True
    axes: tuple[Tensor, Tensor] | None = None
    forward: Callable[[Tensor], Tensor] | None = None
    backward: Callable[[Tensor], Tensor] | None = None


@runtime_checkable
class StructuredOperator(LinearOperator, Protocol):
    """A linear forward model that may know the steps it is made of."""

    def linear_form(self, like: Tensor, /) -> LinearForm | None:
        """Return the steps for images `like` (B, C, H, W), on its device; None: other steps."""
        ...


@runtime_checkable
class Linearisable(Operator, Protocol):
    """A forward model that knows its own Jacobian."""

    def linearise(self, x: Tensor, /) -> Tangent:
        """Return A(x), v -> J v and r -> J^T r at images x (B, C, H, W)."""
        ...


@runtime_checkable
class HasNoiseLevel(Protocol):
    """A forward model that knows how noisy its measurements are."""

    @property
    def sigma_y(self) -> float | None:
        """Noise std in units of y; None: not known."""
        ...


@runtime_checkable
class GlobalSearch(Operator, Protocol):
    """A forward model that finds images near y from far away, past wrong local minima."""

    def search(
        self,
        y: Tensor,
        x: Tensor,
        shrink: Callable[[Tensor, float], Tensor],
        /,
        *,
        sigma_y: float,
        iterations: int,
    ) -> Tensor:
        """Return images (B, C, H, W) that nearly give y, begun at images x.

        `shrink(u, sigma)` is the Gaussian posterior mean of an image given u, a noisy image of
        noise std sigma.
        """
        ...

    def symmetries(self, x: Tensor, /) -> Sequence[Tensor]:
        """Return x and other images (B, C, H, W) that give the same measurement."""
        ...


@dataclass(frozen=True)
class KernelFamily:
    """Kernels that one or two numbers tell apart.

    Attributes:
        names: what the numbers are, with their units.
        periods: after how much of each kernels are the same again; infinity: never.
        ranges: kernel size -> smallest and largest of each.
        draw: numbers, kernel size -> weights, shape (size, size), float64, of sum 1.
    """

    names: tuple[str, ...]
    periods: tuple[float, ...]
    ranges: Callable[[int], tuple[tuple[float, float], ...]]
    draw: Callable[[Sequence[float], int], Tensor]


@runtime_checkable
class UnknownKernel(Protocol):
    """A blur whose kernel is to be found; see `BlindBlur`.

    Attributes:
        kernel_size: side n of the kernel, pixels, odd.
    """

    kernel_size: int

    @property
    def boundary(self) -> str:
        """What is beyond the edges of images, as for `Blur`."""
        ...

    @property
    def family(self) -> KernelFamily | None:
        """The kernels that it may have; None: any."""
        ...

    def with_kernel(self, kernel: Tensor, /) -> LinearOperator:
        """Return the blur with a kernel, shape (n, n) or (1 or B, 1, n, n)."""
        ...


@runtime_checkable
class Prior(Protocol):
    """A sampler of clean images given noisy ones."""

    nfe_per_sample: int

    def sample(
        self, u: Tensor, sigma: float | Tensor, /, *, generator: Generators = None
    ) -> Tensor:
        """Draw x0 ~ p(x0 | u) for u = x0 + sigma * eps, shape (B, C, H, W)."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """Something that returns posterior means; a mean is no draw."""

    def denoise(self, u: Tensor, sigma: float | Tensor, /) -> Tensor:
        """Return E[x0 | u] for u = x0 + sigma * eps, shape (B, C, H, W)."""
        ...


@runtime_checkable
class Generator(Protocol):
    """A prior that generates images from noise alone.

    Attributes:
        image_shape: the one shape (C, H, W) of its images, or None when any size works.
    """

    image_shape: tuple[int, int, int] | None

    def generate(self, num: int, /) -> Tensor:
        """Generate `num` images, (num, C, H, W); a prior of any size takes `size=(H, W)` too."""
        ...


@runtime_checkable
class NetworkBacked(Protocol):
    """A prior whose draws come from passes through one module.

    Attributes:
        network: the module; images that go through it are counted.
    """

    network: nn.Module


class Covariance(Protocol):
    """A covariance S of images, seen in coordinates: real numbers in which S is diagonal.

    Lengths of coordinates are those of images.

    Attributes:
        variances: the variance of each coordinate, in a shape of four dimensions that broadcasts
            over coordinates (B, ...).
    """

    variances: Tensor

    def coordinates(self, x: Tensor) -> Tensor:
        """Return the coordinates of images (B, C, H, W), with five dimensions, batch first."""
        ...

    def images(self, z: Tensor) -> Tensor:
        """Return the images (B, C, H, W) of coordinates: inverse and adjoint of `coordinates`."""
        ...

    def colour(self, noise: Tensor) -> Tensor:
        """Turn white noise (B, C, H, W) into noise of this covariance."""
        ...


class Statistics(Protocol):
    """Mean and covariance of images, and the posterior covariance given a noisy image."""

    @property
    def note(self) -> str:
        """What users of the statistics should be told, "" for nothing."""
        ...

    def mean_image(self, like: Tensor) -> Tensor:
        """Return the mean image, shape (1, C, H, W), for images `like` (B, C, H, W)."""
        ...

    def covariance(self, sigma: float, like: Tensor) -> Covariance:
        """Return the covariance of images given u of noise std sigma; infinity: of images."""
        ...


@runtime_checkable
class HasStatistics(Protocol):
    """A prior that can hold statistics.

    Attributes:
        statistics: mean and covariances of its images, or None.
    """

    statistics: Statistics | None


@runtime_checkable
class Temperable(Protocol):
    """A prior whose draws can be made to vary less."""

    def tempered(self, temperature: float, /) -> Prior:
        """Return the prior with the noise of its draws scaled by a factor > 0."""
        ...


class LikelihoodStep(Protocol):
    """A sampler of the split variable given the current image and the measurement.

    Attributes:
        error: largest error of a linear solve so far, root mean square in units of rho, (B,).
    """

    @property
    def error(self) -> Tensor:
        """Largest error of a linear solve so far."""
        ...

    def sample(self, x0: Tensor, rho: float, /, *, generator: Generators = None) -> Tensor:
        """Draw u ~ p(u | x0, y) for the coupling std rho, shape (B, C, H, W)."""
        ...


class NetworkInfo(Protocol):
    """What a network says of the images that it takes."""

    @property
    def image_channels(self) -> int | None:
        """Channels of the images; None: any."""
        ...

    @property
    def size_multiple(self) -> int:
        """What both sides must be a multiple of."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of class labels, 0 for none."""
        ...


@dataclass(frozen=True)
class NetworkTraits:
    """`NetworkInfo` of a network of any origin; one that says nothing takes anything.

    Attributes:
        image_channels: see `NetworkInfo`.
        size_multiple: likewise.
        num_classes: likewise.
        compute_dtype: dtype in which it computes whatever autocast says; None: that of autocast.
    """

    image_channels: int | None = None
    size_multiple: int = 1
    num_classes: int = 0
    compute_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, network: object) -> Self:
        """Read the attributes that a network has."""
        return cls(**_known(network, cls))


@dataclass(frozen=True)
class OperatorTraits:
    """What a forward model says of itself beside `Operator`.

    Attributes:
        family: the kind of problem, by which default settings are looked up.
        lipschitz: largest singular value of its Jacobian anywhere; None: not known.
        measured: y -> y with 0 in the entries that it does not measure, where A(x) is 0 whatever
            x is; None: it measures all.
        count_measured: y -> number of measured entries of each y, integers (B,); None: those that
            `measured` keeps.
        takes_complex: whether y may come as complex numbers too, in place of pairs of real and
            imaginary part in a last dimension.
        gain: about how much y changes with its images: noise of std s in y is like noise of std
            s / gain in them.
        repeated: times -> the operator for a batch tiled `times` times along dimension 0, itself
            if it treats all images alike; None: not known whether it does.
    """

    family: str | None = None
    lipschitz: float | None = None
    measured: Callable[[Tensor], Tensor] | None = None
    count_measured: Callable[[Tensor], Tensor] | None = None
    takes_complex: bool = False
    gain: float = 1.0
    repeated: Callable[[int], Operator] | None = None

    @classmethod
    def of(cls, operator: object) -> Self:
        """Read the attributes that an operator has."""
        return cls(**_known(operator, cls))


@dataclass(frozen=True)
class PriorTraits:
    """What a prior says of itself beside `Prior`.

    Attributes:
        nfe_per_sample: network calls of a draw.
        image_shape: the one shape (C, H, W) of its images; None: any.
        sigma_max: largest noise std that it knows, image units.
        points: settings of point estimates that were found for it; None: the general ones.
        has_mean: whether tempered draws stay around the mean E[x0 | u], which `denoise` returns.
    """

    nfe_per_sample: int = 1
    image_shape: tuple[int, int, int] | None = None
    sigma_max: float = math.inf
    points: Points | None = None
    has_mean: bool = False

    @classmethod
    def of(cls, prior: object) -> Self:
        """Read the attributes that a prior has."""
        return cls(**_known(prior, cls))


def _known(subject: object, traits: type) -> dict[str, Any]:
    """Return the attributes of `subject` that `traits` asks for, as far as it has them."""
    names = traits.__dataclass_fields__  # type: ignore[attr-defined]
    return {name: getattr(subject, name) for name in names if hasattr(subject, name)}
