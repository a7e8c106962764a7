"""The losses of teacher training and of NCVSD distillation, as pure functions.

They must not know optimisers, schedules or data sets. Image tensors are (B, C, H, W); sigma and t
are noise stds, (B,), in image units; z and eps are standard normal, shaped like the images.
Networks come as plain functions, their learned log variances (B, 1, 1, 1) beside them.

Source: Peng et al., arXiv 2506.09416; Karras et al., arXiv 2206.00364 and 2312.02696.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ncvsd_inverse.numerics import expand_level
from ncvsd_inverse.priors.views import combine_views, raise_noise


class UnconditionalDenoiser(Protocol):
    """A teacher, analytic or a network: E[x0 | x] at noise level sigma."""

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """Denoise `x` (B, C, H, W) of noise std `sigma` (B,)."""
        ...


class Conditional(Protocol):
    """A network of `x` that is also given a second noisy view of the same image.

    A denoiser returns images (B, C, H, W), a discriminator logits (B,).
    """

    def __call__(
        self, x: Tensor, sigma: Tensor, condition: Tensor, condition_sigma: Tensor, /
    ) -> Tensor:
        """Judge or denoise `x` (B, C, H, W) at `sigma` given `condition`."""
        ...


class View(NamedTuple):
    """A noisy image and its noise std (B,)."""

    image: Tensor
    sigma: Tensor


def add_noise(x: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """Return x + sigma eps, (B, C, H, W)."""
    return x + expand_level(sigma, x) * eps


def loss_weight(t: Tensor, x: Tensor, sigma_data: float) -> Tensor:
    """Return lambda(t) = (t^2 + s^2) / (t s)^2 in a shape that broadcasts over `x`."""
    level = expand_level(t, x)
    return (level**2 + sigma_data**2) / (level * sigma_data) ** 2


def weighted_error(error: Tensor, t: Tensor, log_variance: Tensor, sigma_data: float) -> Tensor:
    """Return exp(-w) lambda(t) error^2 + w per pixel, (B, C, H, W)."""
    weight = loss_weight(t, error, sigma_data) * (-log_variance).exp()
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
    return weighted_error(error, t, log_variance, sigma_data)


def generate(generator: Conditional, y: View, z: Tensor, *, gamma: float) -> tuple[Tensor, Tensor]:
    """Return the generator's draws given `y` and the level (B,) its network was called with."""
    y_hat, sigma_hat = raise_noise(y.image, y.sigma, z, gamma)
    return generator(y_hat, sigma_hat, y.image, y.sigma), sigma_hat


def score_loss(
    score: Conditional,
    log_variance: Tensor,
    generated: Tensor,
    y: View,
    t: Tensor,
    eps: Tensor,
    *,
    sigma_data: float = 0.5,
) -> Tensor:
    """Return the score model's denoising loss on generated images per pixel, (B, C, H, W)."""
    error = score(add_noise(generated, t, eps), t, y.image, y.sigma) - generated
    return weighted_error(error, t, log_variance, sigma_data)


def discriminator_losses(
    discriminator: Conditional,
    real: Tensor,
    fake: Tensor,
    y: View,
    t: Tensor,
    eps: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the cross entropies of real and fake images at level t, each (B,).

    `eps` holds the noise of the real and of the fake images. Both go through the discriminator
    in one pass.
    """
    noisy = torch.cat([add_noise(real, t, eps[0]), add_noise(fake, t, eps[1])])
    condition, sigma = y.image.repeat(2, 1, 1, 1), y.sigma.repeat(2)
    real_logits, fake_logits = discriminator(noisy, t.repeat(2), condition, sigma).chunk(2)
    return nn.functional.softplus(-real_logits), nn.functional.softplus(fake_logits)


def distillation_loss(
    teacher: UnconditionalDenoiser,
    score: Conditional,
    generated: Tensor,
    log_variance: Tensor,
    y: View,
    t: Tensor,
    eps: Tensor,
    *,
    sigma_data: float = 0.5,
) -> Tensor:
    """Return the variational score distillation loss per pixel, (B, C, H, W).

    Its gradient with respect to `generated` is that of the divergence between the law of the
    generated images and the teacher's posterior given y, at noise level t. `log_variance` is the
    generator's own head at the level its network was called with.
    """
    with torch.no_grad():
        x_t = add_noise(generated, t, eps)
        target = teacher(*combine_views(y.image, y.sigma, x_t, t))
        target = target - score(x_t, t, y.image, y.sigma) + generated
    return weighted_error(generated - target, t, log_variance, sigma_data)


def adversarial_loss(
    discriminator: Conditional, generated: Tensor, y: View, t: Tensor, eps: Tensor
) -> Tensor:
    """Return -log C(x_t, t | y, sigma) of generated images, (B,)."""
    logits = discriminator(add_noise(generated, t, eps), t, y.image, y.sigma)
    return nn.functional.softplus(-logits)


def energy_loss(
    draws: tuple[Tensor, Tensor],
    images: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float = 0.5,
    patch: int = 8,
) -> Tensor:
    """Return the energy score of two draws given y at level sigma against the true images, (B,).

    (|a - x0| + |b - x0| - |a - b|) / 2 in root mean squares, in units of sigma's typical error;
    the mean over norms of whole images and of patches. Its expectation is least where the draws
    follow the law of x0 given y, and it needs no other network.

    Source: Gneiting & Raftery, Strictly proper scoring rules, JASA 2007.
    """
    weight = loss_weight(sigma, images, sigma_data).sqrt().flatten()
    first, second = draws
    pairs = ((first, images, 0.5), (second, images, 0.5), (first, second, -0.5))
    scores = [sign * _distances(a - b, patch) for a, b, sign in pairs]
    return weight * torch.stack(scores).sum(0)


def _distances(difference: Tensor, patch: int) -> Tensor:
    """Return the mean of root mean squares over an image and over its patches, (B,)."""
    square = difference.float().square().mean(1, keepdim=True)
    whole = square.flatten(1).mean(1)
    parts = nn.functional.avg_pool2d(square, min(patch, *square.shape[2:])).flatten(1)
    tiny = torch.finfo(square.dtype).tiny
    return ((whole + tiny).sqrt() + (parts + tiny).sqrt().mean(1)) / 2
