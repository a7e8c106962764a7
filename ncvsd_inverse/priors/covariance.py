"""Covariances of images, dense or stationary, in coordinates where they are diagonal."""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ncvsd_inverse.machine import exact_arithmetic
from ncvsd_inverse.numerics import digest

__all__ = ["DenseCovariance", "SpectralCovariance"]


class DenseCovariance:
    """A covariance of images of one shape by its eigenvalues and eigenvectors.

    Args:
        vectors: orthonormal columns, shape (D, D), D = C * H * W.
        values: their variances, >= 0, shape (D,).
        image_shape: (C, H, W).

    Attributes:
        variances: the values, shape (D, 1, 1, 1).
    """

    def __init__(self, vectors: Tensor, values: Tensor, image_shape: Sequence[int]) -> None:
        self.variances = values.reshape(-1, 1, 1, 1)
        self._vectors = vectors
        self._image_shape = tuple(image_shape)

    def double(self) -> "DenseCovariance":
        """Return the covariance in float64."""
        values = self.variances.flatten().double()
        return DenseCovariance(self._vectors.double(), values, self._image_shape)

    def scaled(self, factor: float) -> "DenseCovariance":
        """Return the covariance times a factor."""
        return DenseCovariance(self._vectors, factor * self.variances.flatten(), self._image_shape)

    @exact_arithmetic()
    def coordinates(self, x: Tensor) -> Tensor:
        """Return the coordinates (B, D, 1, 1, 1) of images (B, C, H, W)."""
        return (x.flatten(1) @ self._vectors)[:, :, None, None, None]

    @exact_arithmetic()
    def images(self, z: Tensor) -> Tensor:
        """Return the images (B, C, H, W) of coordinates: inverse and adjoint of `coordinates`."""
        return (z.flatten(1) @ self._vectors.T).reshape(-1, *self._image_shape)

    def colour(self, noise: Tensor) -> Tensor:
        """Turn white noise (B, C, H, W) into noise of this covariance."""
        return self.images(self.variances.sqrt() * self.coordinates(noise))


class SpectralCovariance:
    """A covariance of periodic images that is diagonal over frequencies and mixtures of colours.

    With an orthonormal matrix `mixing` of colours and the orthonormal two-dimensional Fourier
    transform F, it is S = mixing^T F^H diag(spectrum) F mixing. Images are seen through
    coordinates: real numbers in which S is diagonal and lengths are those of images.

    Args:
        mixing: orthonormal rows, shape (C, C).
        spectrum: variances of the Fourier coefficients, in the layout of `torch.fft.rfft2`, the
            same at a frequency and its negative, >= 0, shape (C, H, W // 2 + 1).
        width: W.

    Attributes:
        variances: the spectrum in a shape that broadcasts over coordinates, (C, H, W // 2 + 1, 1).
    """

    def __init__(self, mixing: Tensor, spectrum: Tensor, width: int) -> None:
        self.mixing = mixing
        self.spectrum = spectrum
        self.variances = spectrum[..., None]
        self.size = (spectrum.shape[1], width)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.mixing.nbytes + self.spectrum.nbytes

    @property
    def dimension(self) -> int:
        """Number of coordinates, C * H * W."""
        return len(self.mixing) * math.prod(self.size)

    @cached_property
    def extremes(self) -> tuple[float, float]:
        """The least and the largest variance."""
        least, most = torch.stack(torch.aminmax(self.spectrum)).tolist()
        return least, most

    @cached_property
    def digest(self) -> str:
        """A hash of what it holds."""
        return f"{self.size} {digest(self.mixing, self.spectrum)}"

    @cached_property
    def is_even(self) -> bool:
        """Whether it stays the same if images are mirrored on one axis."""
        mirrored = self.spectrum.flip(1).roll(1, 1)
        return torch.allclose(self.spectrum, mirrored, rtol=1e-5, atol=0)

    @cached_property
    def _weights(self) -> Tensor:
        # Columns between the first and the last stand for their negative frequencies too.
        weights = self.spectrum.new_full((self.spectrum.shape[2], 1), math.sqrt(2.0))
        weights[0] = 1
        if self.size[1] % 2 == 0:
            weights[-1] = 1
        return weights

    def double(self) -> "SpectralCovariance":
        """Return the covariance in float64; its mixtures are orthonormal in float64 too."""
        return self if self.spectrum.dtype == torch.float64 else self._in_double

    @cached_property
    def _in_double(self) -> "SpectralCovariance":
        left, _, right = torch.linalg.svd(self.mixing.double())
        return SpectralCovariance(left @ right, self.spectrum.double(), self.size[1])

    def scaled(self, factor: float) -> "SpectralCovariance":
        """Return the covariance times a factor."""
        return SpectralCovariance(self.mixing, factor * self.spectrum, self.size[1])

    def mix(self, x: Tensor) -> Tensor:
        """Return the mixtures (B, C, H, W) of the colours of images."""
        return (self.mixing @ x.flatten(2)).view(x.shape)

    def unmix(self, x: Tensor) -> Tensor:
        """Return the images whose mixtures are x, (B, C, H, W)."""
        return (self.mixing.T @ x.flatten(2)).view(x.shape)

    @exact_arithmetic()
    def coordinates(self, x: Tensor) -> Tensor:
        """Return the coordinates (B, C, H, W // 2 + 1, 2) of images (B, C, H, W)."""
        return torch.view_as_real(torch.fft.rfft2(self.mix(x), norm="ortho")) * self._weights

    @exact_arithmetic()
    def images(self, z: Tensor) -> Tensor:
        """Return the images (B, C, H, W) of coordinates: inverse and adjoint of `coordinates`."""
        waves = torch.view_as_complex(z / self._weights)
        return self.unmix(torch.fft.irfft2(waves, s=self.size, norm="ortho"))

    def colour(self, noise: Tensor) -> Tensor:
        """Turn white noise (B, C, H, W) into noise of this covariance."""
        return self.images(self.variances.sqrt() * self.coordinates(noise))
