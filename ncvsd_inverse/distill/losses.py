"""The losses of teacher training and of NCVSD distillation, as pure functions.

They must not know optimisers, schedules or data sets. Image tensors are (B, C, H, W); sigma and t
are noise stds, (B,), in image units; z and eps are standard normal, shaped like the images.

Source: Peng et al., arXiv 2506.09416; Karras et al., arXiv 2206.00364 and 2312.02696.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ncvsd_inverse.numerics import expand_level
from ncvsd_inverse.priors.views import combine_views, raise_noise


class UnconditionalDenoiser(Protocol):
    """A teacher, analytic or a network: E[x0 | x] at noise level sigma."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Denoise `x` (B, C, H, W) of noise std `sigma` (B,)."""
        ...


class ConditionalDenoiser(Protocol):
    """A denoiser of `x` that is also given a second noisy view of the same image."""

    def __call__(
        self, x: Tensor, sigma: Tensor, condition: Tensor, condition_sigma: Tensor
    ) -> Tensor:
        """Denoise `x` (B, C, H, W) at `sigma` given `condition` at `condition_sigma`."""
        ...

    def log_variance(self, sigma: Tensor) -> Tensor:
        """Return the learned log variance of the loss, (B, 1, 1, 1)."""
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
    teacher: nn.Module, images: Tensor, t: Tensor, eps: Tensor, *, sigma_data: float = 0.5
) -> Tensor:
    """Return the teacher's loss per pixel, (B, C, H, W)."""
    error = teacher(add_noise(images, t, eps), t) - images
    return weighted_error(error, t, teacher.log_variance(t), sigma_data)  # type: ignore[operator]


def generate(
    generator: ConditionalDenoiser, y: View, z: Tensor, *, gamma: float
) -> tuple[Tensor, Tensor]:
    """Return the generator's draws given `y` and the level (B,) its network was called with."""
    y_hat, sigma_hat = raise_noise(y.image, y.sigma, z, gamma)
    return generator(y_hat, sigma_hat, y.image, y.sigma), sigma_hat


def score_loss(
    score: ConditionalDenoiser,
    generated: Tensor,
    y: View,
    t: Tensor,
    eps: Tensor,
    *,
    sigma_data: float = 0.5,
) -> Tensor:
    """Return the score model's denoising loss on generated images per pixel, (B, C, H, W)."""
    error = score(add_noise(generated, t, eps), t, y.image, y.sigma) - generated
    return weighted_error(error, t, score.log_variance(t), sigma_data)


def discriminator_losses(
    discriminator: nn.Module,
    real: Tensor,
    fake: Tensor,
    y: View,
    t: Tensor,
    eps: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the cross entropies of real and fake images at level t, each (B,).

    `eps` holds the noise of the real and of the fake images.
    """
    real_logits = discriminator(add_noise(real, t, eps[0]), t, y.image, y.sigma)
    fake_logits = discriminator(add_noise(fake, t, eps[1]), t, y.image, y.sigma)
    return nn.functional.softplus(-real_logits), nn.functional.softplus(fake_logits)


def distillation_loss(
    teacher: UnconditionalDenoiser,
    score: ConditionalDenoiser,
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
    generated images and the teacher's posterior given y, at noise level t. `log_variance`
    (B, 1, 1, 1) is the generator's own head at the level its network was called with.
    """
    with torch.no_grad():
        x_t = add_noise(generated, t, eps)
        view = combine_views(y.image, y.sigma, x_t, t)
        target = teacher(*view) - score(x_t, t, y.image, y.sigma) + generated
    return weighted_error(generated - target, t, log_variance, sigma_data)


def adversarial_loss(
    discriminator: nn.Module, generated: Tensor, y: View, t: Tensor, eps: Tensor
) -> Tensor:
    """Return -log C(x_t, t | y, sigma) of generated images, (B,)."""
    logits = discriminator(add_noise(generated, t, eps), t, y.image, y.sigma)
    return nn.functional.softplus(-logits)
