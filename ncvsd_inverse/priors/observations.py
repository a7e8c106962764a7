"""Noisy observations of one image: raising their noise, and merging two into one.

Source: Peng et al., arXiv 2506.09416.
"""

import torch
from torch import Tensor

from ncvsd_inverse.numerics import expand_level

__all__ = ["combine_observations", "raise_noise"]


def raise_noise(u: Tensor, sigma: float | Tensor, z: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Raise the noise of `u` from sigma to (1 + gamma) sigma with the standard normals `z`.

    Args:
        u: noisy images, shape (B, C, H, W).
        sigma: noise std of `u`, image units; a float or shape (B,).
        z: standard normals, the shape of `u`.
        gamma: how far to raise, >= 0.

    Returns:
        The noisier images (B, C, H, W) and their noise std (B,).
    """
    level = expand_level(sigma, u)
    raised = (1 + gamma) * level
    return u + (raised**2 - level**2).sqrt() * z, raised.flatten()


def combine_observations(
    u: Tensor, sigma: float | Tensor, x_t: Tensor, t: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Merge two independent noisy observations of one image into one of the same information.

    Args:
        u: first observation, shape (B, C, H, W).
        sigma: its noise std; a float or shape (B,).
        x_t: second observation, the shape of `u`.
        t: its noise std; a float or shape (B,); infinity: it tells nothing.

    Returns:
        u_eff = sigma_eff^2 (u / sigma^2 + x_t / t^2), shape (B, C, H, W), and
        sigma_eff = (sigma^-2 + t^-2)^(-1/2), shape (B,).
    """
    first, second = expand_level(sigma, u), expand_level(t, u)
    # Written so that neither square overflows nor infinity divides.
    share = 1 / (1 + (first / second) ** 2)
    second_or_zero = torch.where(share < 1, x_t, torch.zeros_like(x_t))
    return share * u + (1 - share) * second_or_zero, (first * share.sqrt()).flatten()
