"""Covariances of images, dense or stationary, in coordinates where they are diagonal."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ncvsd_inverse.machine import exact_arithmetic

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
        self.variances = spectrum[..., None]
        self.size = (spectrum.shape[1], width)
        # Columns between the first and the last stand for their negative frequencies too.
        weights = spectrum.new_full((spectrum.shape[2], 1), math.sqrt(2.0))
        weights[0] = 1
        if width % 2 == 0:
            weights[-1] = 1
        self._weights = weights

    @exact_arithmetic()
    def coordinates(self, x: Tensor) -> Tensor:
        """Return the coordinates (B, C, H, W // 2 + 1, 2) of images (B, C, H, W)."""
        mixed = torch.einsum("kc,bchw->bkhw", self.mixing, x)
        return torch.view_as_real(torch.fft.rfft2(mixed, norm="ortho")) * self._weights

    @exact_arithmetic()
    def images(self, z: Tensor) -> Tensor:
        """Return the images (B, C, H, W) of coordinates: inverse and adjoint of `coordinates`."""
        waves = torch.view_as_complex(z / self._weights)
        mixed = torch.fft.irfft2(waves, s=self.size, norm="ortho")
        return torch.einsum("kc,bkhw->bchw", self.mixing, mixed)

    def colour(self, noise: Tensor) -> Tensor:
        """Turn white noise (B, C, H, W) into noise of this covariance."""
        return self.images(self.variances.sqrt() * self.coordinates(noise))
