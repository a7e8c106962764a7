"""Gaussian conditioning as linear algebra: S A^T (A S A^T + s^2 I)^-1, each A in its best way."""

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ncvsd_inverse.numerics import (
    Map,
    conjugate_gradient,
    digest,
    filter_periodic,
    squared_norm,
)
from ncvsd_inverse.priors.covariance import DenseCovariance, SpectralCovariance
from ncvsd_inverse.protocols import (
    Covariance,
    LinearForm,
    LinearOperator,
    OperatorTraits,
    StructuredOperator,
)
from ncvsd_inverse.sampling.dense_solves import (
    KEPT_TENSORS,
    DenseMask,
    MaskMatrices,
    separable_covariance,
)

__all__ = ["LinearSolver", "Move"]

CONDITION_IN_SINGLE = 3e5
"""Largest condition of a matrix that is solved in float32."""

IS_CONVOLUTION = 1e-8
"""Squared share of A^T A x that the diagonal over frequencies of a convolution leaves out."""

ROUGHLY = 10.0
"""How many times the error of a move a rough one may have."""

LEAST_IN_SINGLE = 1e-3
"""Least noise std, units of y, at which misfits are taken in float32."""


FINER = (0.2, 0.04, 0.008)
"""Shares of the first size of steps at which iterations go on while the error's bound is larger."""

SMALL_BOUND = 0.05
"""Bound of the error of a move, in stds of x given y, with which iterations end."""


class Move(NamedTuple):
    """How far images move towards a measurement.

    Attributes:
        images: S A^T (A S A^T + s^2 I)^-1 misfit, shape (B, C, H, W).
        error: root mean square of what is missing, in stds of the law of x given y, a bound or an
            estimate from what the solve left of its equations, shape (B,); 0 for closed forms.
    """

    images: Tensor
    error: Tensor


class LinearSolver:
    """Moves Gaussian images of covariance S towards a measurement by a matrix A with noise std s.

    The move is S A^T (A S A^T + s^2 I)^-1 of the misfit y - A x. How it is found depends on the
    steps of A (`LinearForm`) and on S:

    - periodic blurs, grey images and Fourier coefficients: S and A^T A are diagonal over
      frequencies, and the move is a quotient;
    - every d-th pixel: A S A^T is diagonal over the frequencies of the small image, the sum over
      the d^2 that alias;
    - masks, on blurred or grey images too, and blurs that keep what is inside: with T the
      covariance of what the mask sees, the misfit is filled in at the unknown pixels by its mean
      under T + s^2 I, which conjugate gradients find there. Their matrix is the unknown block of
      (T + s^2 I)^-1, whose condition does not grow without bound as s falls. Holes are
      preconditioned by the unknown block of T + s^2 I; scattered pixels need nothing;
    - forms that hold but for the edges of images: if rows and columns have matrices, the inverse of
      A S A^T + s^2 I for a small y, or conjugate gradients on it in the singular vectors of a blur,
      where S is nearly diagonal; else conjugate gradients, preconditioned by the periodic form;
    - small images of dense S, or under blurs with other edges and little noise: least squares for
      w, the move in stds, by a QR factorisation;
    - all else: conjugate gradients for w, preconditioned by the diagonal of A^T A over
      frequencies, as noise images show it.

    Iterations stop once the error of a move is about `tolerance` stds of x given y, root mean
    square. All moves of a solver are of one dtype and device.

    Args:
        operator: the matrix A.
        sigma_lik: noise std s, > 0, units of y.
        rough: whether a form that does not hold at the edges of images counts as if it did, and
            `ROUGHLY` times the error is good enough.

    Attributes:
        iterations: conjugate gradient iterations of the last move.

    Sources:
        Zhao, Wei, Basarab, Dobigeon, Kouame & Tourneret, IEEE TIP 25 (2016), for aliased
        frequencies; Rue & Held, Gaussian Markov Random Fields (2005), for conditioning by blocks
        of the precision.
    """

    tolerance: ClassVar[float] = 0.01
    """Root mean square error of a move, in stds of x given y, at which iterations stop."""

    max_iterations: ClassVar[int] = 1000
    """Most iterations of a solve."""

    PROBES: ClassVar[int] = 8
    """Noise images through which the diagonal of an unknown A^T A is seen."""

    SMALL: ClassVar[int] = 1024
    """Most pixels of y whose matrix is inverted, if A has axes."""

    EXACT: ClassVar[int] = 12
    """Singular vectors of each axis of a blur among which its preconditioner is exact."""

    DENSE: ClassVar[int] = 2048
    """Most pixels (channels counted) of images whose matrix is written out for a dense S."""

    def __init__(self, operator: LinearOperator, sigma_lik: float, *, rough: bool = False) -> None:
        self.operator = operator
        self.sigma_lik = sigma_lik
        self.rough = rough
        self._tolerance = ROUGHLY * self.tolerance if rough else self.tolerance
        self.iterations = 0
        self._most_iterations = self.max_iterations
        self._form: LinearForm | None = None
        self._is_read = False
        self._holes: _Holes | None = None
        self._matrices: MaskMatrices | None = None
        self._weights: tuple[float, ...] | None = None
        self._axes_digest: str | None = None
        self._vectors: tuple[tuple[Tensor, ...], ...] | None = None
        self._gram: _Gram | None = None

    def needs_double(self, covariance: Covariance, like: Tensor) -> bool:
        """Return whether float32 is too coarse for moves of images `like` (B, C, H, W)."""
        if self.sigma_lik < LEAST_IN_SINGLE:
            return True
        if not isinstance(covariance, SpectralCovariance):
            return False
        form = self._read_form(like)
        exact = form is not None and form.exact
        if exact and form is not None and form.mask is None:
            return False
        least, most = covariance.extremes
        noise = self.sigma_lik**2
        known = least if exact and form is not None and form.transfer is None else 0.0
        return (most + noise) / (known + noise) > CONDITION_IN_SINGLE

    def move(
        self,
        misfit: Tensor,
        covariance: Covariance,
        like: Tensor,
        *,
        iterations: int | None = None,
    ) -> Move:
        """Return how far images move.

        Args:
            misfit: y - A x, shape (B, ...).
            covariance: covariance S of x.
            like: images (B, C, H, W), in the dtype of the misfit.
            iterations: most iterations; None for `max_iterations`.
        """
        self.iterations = 0
        self._most_iterations = iterations or self.max_iterations
        if not isinstance(covariance, SpectralCovariance):
            if isinstance(covariance, DenseCovariance) and self._can_be_written_out(like):
                return self._by_least_squares(misfit, covariance, like)
            return self._by_coordinates(misfit, covariance, like)
        form = self._read_form(like)
        if form is None:
            gram = self._look(like, covariance)
            form = LinearForm(shares=gram.diagonal[..., 0]) if gram.is_all else None
        if form is not None and form.shares is not None:
            return self._by_quotient(misfit, form, form.shares, covariance)
        if self._is_steep(form) and self._can_be_written_out(like):
            return self._by_least_squares(misfit, covariance, like)
        if form is not None and form.mask is None:
            return self._by_folding(misfit, form, covariance)
        if form is None or form.mask is None or not form.exact:
            return self._by_coordinates(misfit, covariance, like)
        return self._by_filling_in(misfit, form, form.mask, covariance)

    def _is_steep(self, form: LinearForm | None) -> bool:
        """Return whether little noise makes A S A^T + s^2 I of these steps hard to invert.

        Where a blur leaves little, a small error of the inverse is no small one of the move. Steps
        that are diagonal, whole pixels that are missing, and reductions bear any noise.
        """
        if self.sigma_lik >= LEAST_IN_SINGLE:
            return False
        blurs = form is not None and form.transfer is not None and form.stride == 1
        return form is None or (blurs and (form.mask is not None or not form.exact))

    def _read_form(self, like: Tensor) -> LinearForm | None:
        if not self._is_read and isinstance(self.operator, StructuredOperator):
            form = self.operator.linear_form(like)
            if form is not None and not form.exact and self.rough:
                form = replace(form, exact=True)
            self._form = form
        self._is_read = True
        return self._form

    def _by_quotient(
        self, misfit: Tensor, form: LinearForm, shares: Tensor, covariance: SpectralCovariance
    ) -> Move:
        """Divide: A^T A is diagonal over frequencies."""
        gain = covariance.spectrum / (shares * _seen(form, covariance) + self.sigma_lik**2)
        # What is not measured does not move, though rounding may say so.
        gain = torch.where(shares > 1e-10 * shares.amax(), gain, 0.0)
        waves = torch.fft.rfft2(covariance.mix(self.operator.adjoint(misfit)))
        images = covariance.unmix(torch.fft.irfft2(gain * waves, s=covariance.size))
        return Move(images, images.new_zeros(len(images)))

    def _by_folding(self, misfit: Tensor, form: LinearForm, covariance: SpectralCovariance) -> Move:
        """Invert A S A^T + s^2 I, diagonal over the frequencies of y but for the edges."""
        seen = _fold(_seen(form, covariance), form.stride, covariance.size[1])
        inverse = 1 / (seen + self.sigma_lik**2)
        entered = _enter(misfit, form, covariance)
        if form.exact and form.stride == 1:
            waves = inverse * torch.fft.rfft2(entered)
            waves = waves if form.transfer is None else form.transfer.conj() * waves
            return Move(_leave(waves, form, covariance), misfit.new_zeros(len(misfit)))
        if form.exact:
            z, error = filter_periodic(entered, inverse), misfit.new_zeros(len(misfit))
        elif form.axes is not None and math.prod(misfit.shape[2:]) <= self.SMALL:
            z, error = self._by_matrix(entered, form, form.axes, covariance)
        elif form.axes is not None and form.stride == 1:
            z, error = self._in_singular_vectors(entered, form, form.axes, covariance)
        else:
            z, error = self._near_the_periodic(entered, form, inverse, covariance)
        waves = torch.fft.rfft2(_backward(form, z))
        return Move(_leave(waves, form, covariance), error)

    def _by_matrix(
        self,
        rhs: Tensor,
        form: LinearForm,
        axes: tuple[Tensor, Tensor],
        covariance: SpectralCovariance,
    ) -> tuple[Tensor, Tensor]:
        """Return (A S A^T + s^2 I)^-1 rhs by the inverse, kept, and the error (B,)."""
        noise, spectrum = self.sigma_lik**2, _mixed(form, covariance)
        key = (self._digest(axes), *self._key(form, covariance, rhs))

        def make() -> Tensor:
            function = torch.fft.irfft2(spectrum, s=covariance.size)
            matrix = separable_covariance(*axes, function)
            matrix.diagonal(dim1=1, dim2=2).add_(noise)
            inverse: Tensor = torch.linalg.inv(matrix)
            return inverse

        inverse = KEPT_TENSORS.get(key, make)

        def solve(r: Tensor) -> Tensor:
            flat = r.flatten(2).permute(1, 2, 0)  # (K, n, B)
            return (inverse @ flat).permute(2, 0, 1).view(r.shape)

        def left(z: Tensor) -> Tensor:
            return rhs - _forward(form, filter_periodic(_backward(form, z), spectrum)) - noise * z

        z = solve(rhs)
        z = z + solve(left(z))  # what the rounding of the inverse leaves
        return z, (squared_norm(left(z)) / rhs[0].numel() / noise).sqrt()

    def _key(
        self, form: LinearForm, covariance: SpectralCovariance, like: Tensor
    ) -> tuple[Hashable, ...]:
        """Return what variances of what A blurs follow from, in the arithmetic of `like`."""
        if self._weights is None and form.weights is not None:
            self._weights = tuple(form.weights.tolist())
        return covariance.digest, self._weights, self.sigma_lik, like.dtype, like.device

    def _digest(self, axes: tuple[Tensor, Tensor]) -> str:
        if self._axes_digest is None:
            self._axes_digest = digest(*axes)
        return self._axes_digest

    def _in_singular_vectors(
        self,
        rhs: Tensor,
        form: LinearForm,
        axes: tuple[Tensor, Tensor],
        covariance: SpectralCovariance,
    ) -> tuple[Tensor, Tensor]:
        """Return (A S A^T + s^2 I)^-1 rhs, and the error (B,), for a separable blur.

        In the singular vectors of A the blur is diagonal and S nearly so. The preconditioner is its
        diagonal there, and exact among the vectors that A keeps best, which hold most of an image.
        """
        if self._vectors is None:
            self._vectors = tuple(_singular(axis) for axis in axes)
        (left, values, right, waves), (left_w, values_w, right_w, waves_w) = self._vectors
        gains = torch.outer(values, values_w)
        spectra, noise = _mixed(form, covariance), self.sigma_lik**2
        whole = _whole(spectra, covariance.size[1])
        variances = waves.abs().square() @ whole @ waves_w.abs().square().T
        inverse = 1 / (gains.square() * variances + noise)
        rows, columns = (min(self.EXACT, len(part)) for part in (values, values_w))

        def make() -> Tensor:
            pairs, pairs_w = (
                (part[:, None] * part.conj()).flatten(0, 1)
                for part in (waves[:rows], waves_w[:columns])
            )
            block = (pairs @ whole.to(pairs) @ pairs_w.T).real
            block = block.view(-1, rows, rows, columns, columns).transpose(2, 3).flatten(1, 2)
            kept = gains[:rows, :columns].flatten()
            block = kept[:, None] * block.flatten(2) * kept
            block.diagonal(dim1=1, dim2=2).add_(noise)
            exact: Tensor = torch.linalg.inv(block)
            return exact

        key = ("kept best", self._digest(axes), *self._key(form, covariance, rhs))
        exact = KEPT_TENSORS.get(key, make)

        def maps(places: Tensor) -> tuple[Map, Map]:
            spectrum, own, best = spectra[places], inverse[places], exact[places]

            def apply(z: Tensor) -> Tensor:
                self.iterations += 1
                images = filter_periodic(right.T @ (gains * z) @ right_w, spectrum)
                return gains * (right @ images @ right_w.T) + noise * z

            def precondition(r: Tensor) -> Tensor:
                out, some = own * r, r[..., :rows, :columns]
                flat = some.flatten(2).transpose(0, 1) @ best
                out[..., :rows, :columns] = flat.transpose(0, 1).view(some.shape)
                return out

            return apply, precondition

        start = left.T @ rhs @ left_w
        z, error = self._invert(start, maps)
        return left @ z @ left_w.T, error

    def _near_the_periodic(
        self, rhs: Tensor, form: LinearForm, inverse: Tensor, covariance: SpectralCovariance
    ) -> tuple[Tensor, Tensor]:
        """Return (A S A^T + s^2 I)^-1 rhs and the error (B,)."""
        spectra = _mixed(form, covariance)
        noise = self.sigma_lik**2

        def maps(places: Tensor) -> tuple[Map, Map]:
            spectrum, filtered = spectra[places], inverse[:, places]

            def apply(z: Tensor) -> Tensor:
                self.iterations += 1
                return _forward(form, filter_periodic(_backward(form, z), spectrum)) + noise * z

            return apply, partial(filter_periodic, gains=filtered)

        return self._invert(rhs, maps)

    def _by_filling_in(
        self, misfit: Tensor, form: LinearForm, mask: Tensor, covariance: SpectralCovariance
    ) -> Move:
        """Fill the misfit in where the mask hides it, then divide."""
        noisy = _seen(form, covariance) + self.sigma_lik**2
        known = nn.functional.pad(misfit, form.margins)
        dense = self._find_dense(noisy, form, mask, covariance)
        if dense is not None:
            waves, energy = dense.solve(_enter(known, form, covariance), noisy)
        else:
            filled, energy = self._fill_in(known, form, mask, covariance, noisy)
            waves = torch.fft.rfft2(filled) / noisy
        waves = waves if form.transfer is None else form.transfer.conj() * waves
        error = (energy / covariance.dimension).sqrt()
        return Move(_leave(waves, form, covariance), error)

    def _find_dense(
        self,
        noisy: Tensor,
        form: LinearForm,
        mask: Tensor,
        covariance: SpectralCovariance,
    ) -> DenseMask | None:
        if form.transfer is not None or mask.shape[:2] != (1, 1):
            return None
        if self._matrices is None:
            self._matrices = MaskMatrices(mask[0, 0])
        least, most = (variance + self.sigma_lik**2 for variance in covariance.extremes)
        return self._matrices.find(
            noisy,
            self._key(form, covariance, noisy),
            condition=most / least,
            is_even=covariance.is_even,
        )

    def _fill_in(
        self,
        known: Tensor,
        form: LinearForm,
        mask: Tensor,
        covariance: SpectralCovariance,
        noisy: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return mixtures (B, C, H, W) of what is known, filled in, and the squared error (B,)."""
        precision = 1 / noisy
        unknown = (~mask).to(known.dtype)
        if self._holes is None:
            self._holes = _Holes.find(mask, everywhere=form.transfer is not None)
        holes = self._holes
        meet = mask.shape[1] > 1  # mixtures of colours meet where a channel alone is known
        begin = known if meet else _enter(known, form, covariance)

        def through(x: Tensor, spectrum: Tensor) -> Tensor:
            if meet:
                return unknown * covariance.unmix(filter_periodic(covariance.mix(x), spectrum))
            return unknown * filter_periodic(x, spectrum)

        def maps(places: Tensor) -> tuple[Map, Map | None]:
            narrow, wide = (part if meet else part[:, places] for part in (precision, noisy))

            def apply(v: Tensor) -> Tensor:
                self.iterations += 1
                return through(v, narrow)

            def widen(r: Tensor) -> Tensor:
                widened = through(r, wide)
                return widened if holes.every else torch.where(holes.are_large, widened, r)

            return apply, widen if holes.some else None

        dimension = covariance.dimension / (1 if meet else begin.shape[1])
        most = self._tolerance * math.sqrt(dimension)
        # Steps can be much smaller than the error, which the preconditioner bounds if there is one.
        ptol, etol = (most, 0.0) if holes.every else (0.0, most)
        rhs = -through(begin, precision)
        filling, left, energy = torch.zeros_like(rhs), rhs, rhs.new_zeros(len(rhs))
        waiting = torch.ones_like(energy, dtype=torch.bool)
        for finer in (1.0, *FINER):
            more, left = self._iterate(left, maps, ptol=ptol, etol=finer * etol, meet=meet)
            filling = filling + more
            # The block of T + s^2 I is at least the inverse of the matrix, so that this is a bound.
            bound = _energy(left, partial(through, spectrum=noisy))
            energy = torch.where(waiting, bound, energy)
            waiting = (energy / covariance.dimension).sqrt() > SMALL_BOUND
            if self.rough or holes.every or not bool(waiting.any()):
                break
            left = torch.where(waiting[:, None, None, None], left, 0.0)
        filled = begin + filling
        return _enter(filled, form, covariance) if meet else filled, energy

    def _by_least_squares(
        self, misfit: Tensor, covariance: DenseCovariance | SpectralCovariance, like: Tensor
    ) -> Move:
        """Solve min |A L w - misfit|^2 / s^2 + |w|^2 for w, with S = L L^T."""
        size = like[0].numel()
        units = torch.eye(size, dtype=like.dtype, device=like.device)
        roots = covariance.colour(units.view(size, *like.shape[1:]))
        seen = self.operator(roots).flatten(1).T
        q, r = torch.linalg.qr(torch.cat((seen, self.sigma_lik * units)))
        onto = misfit.flatten(1) @ q[: len(seen)]
        w = torch.linalg.solve_triangular(r, onto.T, upper=True).T
        images = (w @ roots.flatten(1)).view(like.shape)
        return Move(images, images.new_zeros(len(images)))

    def _can_be_written_out(self, like: Tensor) -> bool:
        repeated = OperatorTraits.of(self.operator).repeated
        alike = repeated is not None and repeated(2) is self.operator
        return alike and like[0].numel() <= self.DENSE

    def _by_coordinates(self, misfit: Tensor, covariance: Covariance, like: Tensor) -> Move:
        """Solve (I + L^T A^T A L / s^2) w = L^T A^T misfit / s^2, with S = L L^T, for w."""
        gram = self._look(like, covariance)
        precision = 1 / self.sigma_lik**2
        root = covariance.variances.sqrt()
        inverse = 1 / (1 + precision * covariance.variances * gram.diagonal)

        def gather(y: Tensor) -> Tensor:
            return precision * root * covariance.coordinates(self.operator.adjoint(y))

        def apply(w: Tensor) -> Tensor:
            self.iterations += 1
            return w + gather(self.operator(covariance.images(root * w)))

        def precondition(r: Tensor) -> Tensor:
            return inverse * r

        right, size = gather(misfit), like[0].numel()
        most = self._tolerance * math.sqrt(size)
        # What A does not see has no place among the frequencies of such a diagonal.
        chosen = precondition if gram.has_rank else None
        # The matrix is at least I: without a preconditioner what is left bounds the error.
        w = conjugate_gradient(
            apply,
            right,
            rtol=0.0,
            ptol=most,
            # Rounding may keep what is left above that; then steps come to nothing.
            etol=1e-3 * most,
            max_iterations=self._most_iterations,
            precondition=chosen,
        )
        error = (_energy(right - apply(w), precondition) / size).sqrt()
        return Move(covariance.images(root * w), error)

    def _iterate(
        self,
        rhs: Tensor,
        maps: Callable[[Tensor], tuple[Map, Map | None]],
        *,
        atol: float = 0.0,
        ptol: float = 0.0,
        etol: float = 0.0,
        meet: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run conjugate gradients.

        Args:
            rhs: right-hand sides, shape (B, K, h, w).
            maps: places along K -> the matrix and the preconditioner of these.
            atol: norm of the residual at which one of the K stops,
            ptol: or its norm by the preconditioner,
            etol: or norm of the last step.
            meet: whether the K are one problem, not K of them.

        Returns:
            The solutions and what is left of `rhs`, both of its shape.
        """
        apply, precondition = maps(torch.arange(rhs.shape[1]))
        solved = conjugate_gradient(
            apply,
            rhs,
            rtol=0.0,
            atol=atol,
            ptol=ptol,
            etol=etol,
            max_iterations=self._most_iterations,
            precondition=precondition,
            narrow=None if meet else maps,
        )
        return solved, rhs - apply(solved)

    def _invert(
        self, rhs: Tensor, maps: Callable[[Tensor], tuple[Map, Map | None]]
    ) -> tuple[Tensor, Tensor]:
        """Return (A S A^T + s^2 I)^-1 rhs, (B, K, h, w), and the error of the move, (B,).

        What is left of rhs, over s, bounds the error of the move in the norm of the precision
        S^-1 + A^T A / s^2 of the law given y.
        """
        each = math.sqrt(math.prod(rhs.shape[2:]))
        z, left = self._iterate(rhs, maps, atol=self._tolerance * self.sigma_lik * each)
        return z, (squared_norm(left) / rhs[0].numel()).sqrt() / self.sigma_lik

    def _look(self, like: Tensor, covariance: Covariance) -> "_Gram":
        if self._gram is None:
            self._gram = self._probe(like, covariance)
        return self._gram

    def _probe(self, like: Tensor, covariance: Covariance) -> "_Gram":
        """Look at A^T A through noise images.

        They show its diagonal up to their own noise, which the mean over neighbouring frequencies
        and colours removes. Where A^T A is a convolution, one shows it exactly.
        """
        source = torch.Generator(like.device).manual_seed(0)
        sums: list[Tensor] = []
        has_rank = False
        for number in range(self.PROBES):
            single = torch.empty(like.shape[1:], dtype=torch.float32, device=like.device)
            white = single.normal_(generator=source)
            probe = white.to(like).expand(like.shape)
            y = self.operator(probe)
            sent = covariance.coordinates(probe)
            seen = covariance.coordinates(self.operator.adjoint(y))
            power = (sent * sent).sum((1, 4), keepdim=True)
            overlap = (sent * seen).sum((1, 4), keepdim=True)
            if number == 0:
                has_rank = int((y != 0).flatten(1).sum(1).min()) >= like[0].numel()
            elif number == 1:
                first = (sums[0][:, :1] / sums[0][:, 1:]).clamp(min=0)[..., None]
                rest = (seen - first * sent).square().sum() / seen.square().sum()
                if float(rest) < IS_CONVOLUTION:
                    return _Gram(first, is_all=True, has_rank=True)
            sums.append(torch.cat((overlap, power), 1)[..., 0])
        total = torch.stack(sums).sum(0)
        rows = torch.stack([total.roll(step, 2) for step in range(-2, 3)]).mean(0)
        wide = nn.functional.pad(rows, (2, 2, 0, 0), mode="replicate")
        smooth = nn.functional.avg_pool2d(wide, (1, 5), 1)
        diagonal = (smooth[:, :1] / smooth[:, 1:]).clamp(min=0)[..., None]
        return _Gram(diagonal, is_all=False, has_rank=has_rank)


class _Gram(NamedTuple):
    """What noise images show of A^T A.

    Attributes:
        diagonal: its diagonal in coordinates, shape (B, 1, H, W // 2 + 1, 1).
        is_all: whether the rest is nothing.
        has_rank: whether y has as many entries as x, zeros not counted.
    """

    diagonal: Tensor
    is_all: bool
    has_rank: bool


def _singular(axis: Tensor) -> tuple[Tensor, ...]:
    """Return U, S and V^T of a matrix, largest values first, and the Fourier transform of V^T."""
    left, values, right = torch.linalg.svd(axis)
    return left, values, right, torch.fft.fft(right, dim=1, norm="ortho")


def _energy(residual: Tensor, precondition: Callable[[Tensor], Tensor]) -> Tensor:
    """Return r^T P r of each item, (B,): the squared error where P is about the inverse matrix."""
    return (residual * precondition(residual)).flatten(1).sum(1).clamp(min=0)


def _mixed(form: LinearForm, covariance: SpectralCovariance) -> Tensor:
    """Return the variances of what A blurs: mixtures, (C, H, W // 2 + 1), or the grey image."""
    if form.weights is None:
        return covariance.spectrum
    shares = (covariance.mixing @ form.weights).square()
    return (shares[:, None, None] * covariance.spectrum).sum(0, keepdim=True)


def _seen(form: LinearForm, covariance: SpectralCovariance) -> Tensor:
    """Return the variances of what A keeps pixels of, (1 or B, C or 1, H, W // 2 + 1)."""
    mixed = _mixed(form, covariance)[None]
    return mixed if form.transfer is None else mixed * form.transfer.abs().square()


def _enter(y: Tensor, form: LinearForm, covariance: SpectralCovariance) -> Tensor:
    """Return the mixtures (B, C, h, w) of colours of y; a grey y as it is."""
    return covariance.mix(y) if form.weights is None else y


def _leave(waves: Tensor, form: LinearForm, covariance: SpectralCovariance) -> Tensor:
    """Return S times the transpose of the mixing step, images (B, C, H, W), of waves."""
    gain = covariance.spectrum
    if form.weights is not None:
        gain = gain * (covariance.mixing @ form.weights)[:, None, None]
    return covariance.unmix(torch.fft.irfft2(gain * waves, s=covariance.size))


def _forward(form: LinearForm, x: Tensor) -> Tensor:
    """Return what A makes of mixtures or grey images (B, K, H, W), each by itself."""
    if form.axes is not None:
        return form.axes[0] @ x @ form.axes[1].T
    return _one_by_one(form.forward, x)


def _backward(form: LinearForm, y: Tensor) -> Tensor:
    """Return the transpose of `_forward`, (B, K, H, W)."""
    if form.axes is not None:
        return form.axes[0].T @ y @ form.axes[1]
    return _one_by_one(form.backward, y)


def _one_by_one(act: Map | None, x: Tensor) -> Tensor:
    if act is None:
        raise TypeError("a linear form must have axes, or forward and backward, to be undone")
    return torch.cat([act(x[:, k : k + 1]) for k in range(x.shape[1])], dim=1)


def _whole(spectrum: Tensor, width: int) -> Tensor:
    """Return the whole spectrum (..., H, W) of a half one."""
    negative = spectrum[..., 1 : (width + 1) // 2].flip(-1, -2).roll(1, -2)
    return torch.cat((spectrum, negative), dim=-1)


def _fold(spectrum: Tensor, stride: int, width: int) -> Tensor:
    """Return the variances of every `stride`-th pixel of images with this half spectrum."""
    if stride == 1:
        return spectrum
    full = _whole(spectrum, width)
    height = full.shape[-2]
    sizes = (stride, height // stride, stride, width // stride)
    folded: Tensor = full.reshape(*full.shape[:-2], *sizes).sum((-4, -2)) / stride**2
    return folded[..., : width // stride // 2 + 1]


class _Holes(NamedTuple):
    """Which masks of a batch have their unknown pixels in holes, found once: a GPU is waited for.

    Attributes:
        are_large: whether most unknown pixels of a mask touch no known one, (1 or B, 1, 1, 1).
        some: whether that is so of any mask.
        every: whether it is of all.
    """

    are_large: Tensor
    some: bool
    every: bool

    @classmethod
    def find(cls, mask: Tensor, *, everywhere: bool) -> "_Holes":
        """Look at masks of known pixels; with `everywhere` all count as holes."""
        near = nn.functional.max_pool2d(mask.float(), 3, stride=1, padding=1) > 0
        unknown, alone = (part.flatten(1).sum(1) for part in (~mask, ~near))
        large = (2 * alone > unknown).reshape(-1, 1, 1, 1) | everywhere
        return cls(large, bool(large.any()), bool(large.all()))
