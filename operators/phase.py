"""Phase retrieval."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ncvsd_inverse.checks import check_count, check_images, check_positive, check_shape
from ncvsd_inverse.numerics import working_dtype
from ncvsd_inverse.operators.base import BaseOperator, check_image_shape

__all__ = ["PhaseRetrieval"]


class PhaseRetrieval(BaseOperator):
    """The amplitude of the Fourier transform of the zero-padded image, each channel alone.

    y = |F P (x + 1)/2|: P pads with `pad` zeros on every side and F is the orthonormal 2-D
    Fourier transform. Not linear. Shifts and turns by 180 degrees of (x + 1)/2 inside the padded
    frame leave y unchanged, as does its sign (which [-1, 1] excludes), so the posterior has
    several modes.

    Centred, y = S |F P (x + 1)/2| with the permutation S of `torch.fft.fftshift`: frequency 0 is
    at row h // 2 and column w // 2 of a channel of y, shape (h, w), instead of first.

    Args:
        pad: zeros on every side, pixels, >= 0; at least half the image separates most images
            from all others but the ambiguities above.
        centred: whether frequency 0 is in the middle of y.

    Raises:
        ValueError: if pad < 0.
    """

    family = "phase_retrieval"

    gain = 0.5
    lipschitz = 0.5
    """Bound on ||A(x) - A(x')|| / ||x - x'||: F and P keep norms, (x + 1)/2 halves them."""

    SEARCH_LEVELS: ClassVar[tuple[float, float]] = (1.2, 0.15)
    """Couplings of waves and image at the ends of `search`, in units of y."""

    def __init__(self, pad: int, centred: bool = False) -> None:
        self.pad = check_count("pad", pad, least=0)
        self.centred = centred

    def __call__(self, x: Tensor) -> Tensor:
        """Return amplitudes, shape (B, C, H + 2 pad, W + 2 pad), all >= 0."""
        check_images("x", x)
        waves = self._waves((x.to(working_dtype(x.dtype)) + 1) / 2)
        amplitude: Tensor = waves.abs()
        return amplitude.to(x.dtype)

    def input_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (B, C, H, W) for measurements (B, C, H + 2 pad, W + 2 pad)."""
        batch, channels, height, width = check_image_shape("y_shape", y_shape)
        if min(height, width) <= 2 * self.pad:
            raise ValueError(
                f"y_shape must exceed twice pad = {self.pad} in height and width, "
                f"got {tuple(y_shape)}"
            )
        return batch, channels, height - 2 * self.pad, width - 2 * self.pad

    def linearise(
        self, x: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Return A(x), v -> J v and r -> J^T r for the Jacobian J at images x (B, C, H, W).

        With the waves f = S F P (x + 1)/2, S = I if not centred, J v = Re(conj(f / |f|) S F P v
        / 2); where f is 0 so is J.
        """
        check_images("x", x)
        waves = self._waves((x.to(working_dtype(x.dtype)) + 1) / 2)
        amplitude: Tensor = waves.abs()
        phase = waves.sgn()

        def push(v: Tensor) -> Tensor:
            moved = self._waves(v / 2)
            return moved.real * phase.real + moved.imag * phase.imag

        def pull(r: Tensor) -> Tensor:
            return self._crop(r * phase) / 2

        return amplitude, push, pull

    @torch.no_grad()
    def search(
        self,
        y: Tensor,
        x: Tensor,
        shrink: Callable[[Tensor, float], Tensor],
        *,
        sigma_y: float,
        iterations: int = 60,
    ) -> Tensor:
        """Move first guesses towards images that give y, past many of its wrong modes.

        Waves w with the measured amplitudes and images x in [-1, 1] are fitted in turn, each to
        the other, with scaled multipliers m that keep count of F P (x + 1)/2 - w:

            w = q / |q| (y / sigma_y^2 + |q| / t^2) / (1 / sigma_y^2 + 1 / t^2),
                q = F P (x + 1)/2 + m,
            x = the image that `shrink` makes of the crop of w - m, clamped.

        The coupling t falls from `SEARCH_LEVELS`, so coarse structure is settled first. The
        guesses choose among the equivalent images: for aligned objects, their mean does.

        Args:
            y: measurements, shape (B, C, H + 2 pad, W + 2 pad).
            x: first guesses, shape (B, C, H, W).
            shrink: (u, sigma) -> the Gaussian posterior mean of images given noisy ones u of noise
                std sigma, in image units.
            sigma_y: noise std of y, > 0, in units of y.
            iterations: >= 1, of two Fourier transforms each.

        Returns:
            Images in [-1, 1], the shape of x; they fit y less closely than its noise allows.

        Raises:
            ValueError: if an argument is out of range or the shapes disagree.

        Source:
            Wen, Yang, Liu & Marchesini, Inverse Problems 28 (2012), for alternating directions in
            phase retrieval; noise, the falling coupling and `shrink` are added.
        """
        check_shape("x", check_images("x", x), self.input_shape(y.shape))
        sigma_y = check_positive("sigma_y", sigma_y)
        iterations = check_count("iterations", iterations)
        first, last = self.SEARCH_LEVELS
        size = tuple(y.shape[-2:])
        if self.centred:
            y = torch.fft.ifftshift(y, dim=(-2, -1))
        # Real images have equal amplitudes at a frequency and its negative; noise that differs
        # there would only pile up in the multipliers.
        mirrored = y.flip(-2, -1).roll((1, 1), (-2, -1))
        amplitude = ((y + mirrored) / 2)[..., : size[1] // 2 + 1]
        waves = self._half_waves(x)
        multipliers = torch.zeros_like(waves)
        for k in range(iterations):
            t = first * (last / first) ** (k / max(1, iterations - 1))
            q = waves + multipliers
            share = sigma_y**2 / (sigma_y**2 + t**2)
            fitted = (amplitude + share * (q.abs() - amplitude)).clamp(min=0) * q.sgn()
            frame = torch.fft.irfft2(fitted - multipliers, s=size, norm="ortho")
            x = shrink(2 * self._middle(frame) - 1, 2 * t).clamp(-1, 1)
            waves = self._half_waves(x)
            multipliers = multipliers + waves - fitted
        return x

    def symmetries(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return images (B, C, H, W) with the amplitudes of x: x itself and its half turn.

        Turns of some channels alone are left out.
        """
        return x, check_images("x", x).flip(-2, -1)

    def _half_waves(self, x: Tensor) -> Tensor:
        """Return F P (x + 1)/2 at the frequencies that `torch.fft.rfft2` keeps."""
        padded = torch.nn.functional.pad((x + 1) / 2, (self.pad,) * 4)
        waves: Tensor = torch.fft.rfft2(padded, norm="ortho")
        return waves

    def _waves(self, unit: Tensor) -> Tensor:
        """Return the Fourier transform, laid out as y, of images (B, C, H, W) padded by zeros."""
        padded = torch.nn.functional.pad(unit, (self.pad,) * 4)
        waves: Tensor = torch.fft.fft2(padded, norm="ortho")
        return torch.fft.fftshift(waves, dim=(-2, -1)) if self.centred else waves

    def _crop(self, waves: Tensor) -> Tensor:
        """Return the images (B, C, H, W) in the middle of the frame: the adjoint of `_waves`."""
        if self.centred:
            waves = torch.fft.ifftshift(waves, dim=(-2, -1))
        return self._middle(torch.fft.ifft2(waves, norm="ortho").real)

    def _middle(self, frame: Tensor) -> Tensor:
        """Return the images (B, C, H, W) in the middle of a frame."""
        rows, columns = (slice(self.pad, side - self.pad) for side in frame.shape[-2:])
        middle: Tensor = frame[..., rows, columns]
        return middle
