"""The losses of teacher training and of NCVSD distillation, as pure functions.

Image tensors are (B, C, H, W); sigma and t are noise stds, (B,), in image units; z and eps are
standard normal, shaped like the images; u is an observation on which networks are conditioned.
Networks come as plain functions, their learned log variances (B, 1, 1, 1) beside them.

Source: Peng et al., arXiv 2506.09416; Karras et al., arXiv 2206.00364 and 2312.02696.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ncvsd_inverse.numerics import expand_level
from ncvsd_inverse.priors.observations import combine_observations, raise_noise

__all__ = [
    "Conditional",
    "Observation",
    "UnconditionalDenoiser",
    "add_noise",
    "adversarial_loss",
    "denoising_loss",
    "discriminator_losses",
    "distillation_loss",
    "energy_loss",
    "generate",
    "score_loss",
    "tempered_loss",
]

DETAIL_STD = 0.2
"""Std of a band of detail over that of the images; 0.12 to 0.28 of faces and photographs."""

COARSE_STD = 0.8
"""Std of what remains below the bands, likewise; 0.75 to 1.1."""


class UnconditionalDenoiser(Protocol):
    """A teacher, analytic or a network: E[x0 | x] at noise level sigma."""

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Denoise `x` (B, C, H, W) of noise std `sigma` (B,)."""
        ...


class Conditional(Protocol):
    """A network of `x` that is conditioned on a second noisy observation of the same image.

    A denoiser returns images (B, C, H, W), a discriminator logits (B,).
    """

    def __call__(
        self, x: Tensor, sigma: Tensor, condition: Tensor, condition_sigma: Tensor, /
    ) -> Tensor:
        """Judge or denoise `x` (B, C, H, W) at `sigma` given `condition`."""
        ...


class Observation(NamedTuple):
    """Noisy images (B, C, H, W) and their noise stds (B,)."""

    image: Tensor
    sigma: Tensor


def add_noise(x: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """Return x + sigma eps, (B, C, H, W)."""
    return x + expand_level(sigma, x) * eps


def _loss_weight(t: Tensor, x: Tensor, sigma_data: float) -> Tensor:
    """Return lambda(t) = (t^2 + s^2) / (t s)^2 in a shape that broadcasts over `x`."""
    level = expand_level(t, x)
    return (level**2 + sigma_data**2) / (level * sigma_data) ** 2


def _weighted_error(error: Tensor, t: Tensor, log_variance: Tensor, sigma_data: float) -> Tensor:
    """Return exp(-w) lambda(t) error^2 + w per pixel, (B, C, H, W)."""
    weight = _loss_weight(t, error, sigma_data) * (-log_variance).exp()
    return weight * error.square() + log_variance


def denoising_loss(
    teacher: UnconditionalDenoiser,
    log_variance: Tensor,
    images: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    sigma_data: float = 0.5,
) -> Tensor:
    """Return the teacher's loss per pixel, (B, C, H, W)."""
    error = teacher(add_noise(images, t, eps), t) - images
    return _weighted_error(error, t, log_variance, sigma_data)


def generate(
    generator: Conditional, u: Observation, z: Tensor, *, gamma: float
) -> tuple[Tensor, Tensor]:
    """Return the generator's draws given `u` and the level (B,) its network was called with."""
    raised, sigma_hat = raise_noise(u.image, u.sigma, z, gamma)
    return generator(raised, sigma_hat, u.image, u.sigma), sigma_hat


def score_loss(
    score: Conditional,
    log_variance: Tensor,
    generated: Tensor,
    u: Observation,
    t: Tensor,
    eps: Tensor,
    *,
    sigma_data: float = 0.5,
) -> Tensor:
    """Return the score model's denoising loss on generated images per pixel, (B, C, H, W)."""
    error = score(add_noise(generated, t, eps), t, u.image, u.sigma) - generated
    return _weighted_error(error, t, log_variance, sigma_data)


def discriminator_losses(
    discriminator: Conditional,
    real: Tensor,
    fake: Tensor,
    u: Observation,
    t: Tensor,
    eps: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the cross entropies of real and fake images at level t, each (B,).

    `eps` holds the noise of the real and of the fake images. Both go through the discriminator
    in one pass.
    """
    noisy = torch.cat([add_noise(real, t, eps[0]), add_noise(fake, t, eps[1])])
    condition, sigma = u.image.repeat(2, 1, 1, 1), u.sigma.repeat(2)
    real_logits, fake_logits = discriminator(noisy, t.repeat(2), condition, sigma).chunk(2)
    return nn.functional.softplus(-real_logits), nn.functional.softplus(fake_logits)


def distillation_loss(
    teacher: UnconditionalDenoiser,
    score: Conditional,
    generated: Tensor,
    log_variance: Tensor,
    u: Observation,
    t: Tensor,
    eps: Tensor,
    *,
    sigma_data: float = 0.5,
) -> Tensor:
    """Return the variational score distillation loss per pixel, (B, C, H, W).

    Its gradient with respect to `generated` is that of the divergence between the law of the
    generated images and the teacher's posterior given u, at noise level t. `log_variance` is the
    generator's own head at the level its network was called with.
    """
    with torch.no_grad():
        x_t = add_noise(generated, t, eps)
        target = teacher(*combine_observations(u.image, u.sigma, x_t, t))
        target = target - score(x_t, t, u.image, u.sigma) + generated
    return _weighted_error(generated - target, t, log_variance, sigma_data)


def adversarial_loss(
    discriminator: Conditional, generated: Tensor, u: Observation, t: Tensor, eps: Tensor
) -> Tensor:
    """Return -log C(x_t, t | u, sigma) of generated images, (B,)."""
    logits = discriminator(add_noise(generated, t, eps), t, u.image, u.sigma)
    return nn.functional.softplus(-logits)


def energy_loss(
    draws: tuple[Tensor, Tensor],
    images: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float = 0.5,
    patch: int = 8,
) -> Tensor:
    """Return the energy score of two draws given u at level sigma against the true images, (B,).

    (|a - x0| + |b - x0| - |a - b|) / 2 in root mean squares: of whole images, of patches, and of
    patches of half the side in each band of a Laplacian pyramid, so that fine and coarse structure
    count alike. Each is taken in units of its posterior std given u. The expectation is least where
    the draws follow the law of x0 given u, and no other network is needed.

    Source: Gneiting & Raftery, Strictly proper scoring rules, JASA 2007.
    """
    first, second = draws
    pairs = ((first, images, 0.5), (second, images, 0.5), (first, second, -0.5))
    scores = [sign * _distance(a - b, sigma, sigma_data, patch) for a, b, sign in pairs]
    return torch.stack(scores).sum(0)


def tempered_loss(
    tempered: Tensor,
    drawn: Tensor,
    images: Tensor,
    temperature: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float = 0.5,
) -> Tensor:
    """Return the squared error of tempered draws given u at level sigma, (B,).

    A draw tempered by T is the mean given u plus T times the distance of `drawn` from it. As the
    true images have that mean, (1 - T) images + T drawn is an unbiased target. The error is the
    mean over pixels in units of the squared error of the best linear denoiser of white images of
    std `sigma_data`, so that all levels count alike.

    Args:
        tempered: what the generator makes of T z, (B, C, H, W).
        drawn: what it makes of z, (B, C, H, W); no gradient flows here.
        images: the true images, (B, C, H, W).
        temperature: T, (B,).
        sigma: level of u, (B,), image units.
        sigma_data: std of the images, image units.
    """
    share = expand_level(temperature, images)
    target = images + share * (drawn.detach().float() - images)
    error = (tempered.float() - target).square().flatten(1).mean(1)
    return error / _unknown(sigma, sigma_data).square()


def _distance(difference: Tensor, sigma: Tensor, sigma_data: float, patch: int) -> Tensor:
    """Return the sum of root mean squares of a difference of images, by patches and bands, (B,)."""
    difference = difference.float()
    pixels = _root_mean_square(difference, max(difference.shape)) / 2
    pixels = pixels + _root_mean_square(difference, patch) / 2
    *details, coarse = _pyramid(difference)
    bands = [
        _root_mean_square(band, patch // 2) / _unknown(sigma / 2**octave, DETAIL_STD * sigma_data)
        for octave, band in enumerate(details)
    ]
    # Averaging 2 by 2 pixels halves the noise.
    unknown = _unknown(sigma / 2 ** len(details), COARSE_STD * sigma_data)
    bands.append(_root_mean_square(coarse, patch // 2) / unknown)
    return pixels / _unknown(sigma, sigma_data) + torch.stack(bands).mean(0)


def _unknown(sigma: Tensor, std: float) -> Tensor:
    """Return the root mean square error of the best linear denoiser of one number, (B,)."""
    return sigma * std / (sigma**2 + std**2).sqrt()


def _root_mean_square(x: Tensor, patch: int) -> Tensor:
    """Return the root mean square over patches (or the image if smaller), their mean, (B,)."""
    square = x.square().mean(1, keepdim=True)
    sides = [min(max(patch, 1), side) for side in x.shape[2:]]
    parts = nn.functional.avg_pool2d(square, sides).flatten(1)
    return (parts + torch.finfo(parts.dtype).tiny).sqrt().mean(1)


def _pyramid(x: Tensor) -> list[Tensor]:
    """Return the bands of a Laplacian pyramid, finest first; the coarsest is 4 to 7 pixels wide.

    Source: Burt & Adelson, IEEE Transactions on Communications 31 (1983).
    """
    taps = x.new_tensor([1, 4, 6, 4, 1]) / 16
    channels, bands = x.shape[1], []
    while min(x.shape[2:]) >= 8:
        smooth = nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
        for shape in ((1, 1, 1, 5), (1, 1, 5, 1)):
            kernel = taps.reshape(shape).repeat(channels, 1, 1, 1)
            smooth = nn.functional.conv2d(smooth, kernel, groups=channels)
        bands.append(x - smooth)
        x = smooth[:, :, ::2, ::2]
    return [*bands, x]
