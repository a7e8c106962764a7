"""RED-diff: a point estimate mu by optimisation, with the denoiser's residual as regulariser.

Adam steps along falling levels sigma of the variance-preserving diffusion, evenly spaced in its
time, follow the gradient of

    ||y - A(mu)||^2 / (2 M) + (lambda / D) w(sigma) <stopgrad(eps_hat - eps), mu>,
    eps_hat = (x - Den(x, sigma)) / sigma,   x = mu + sigma eps,   w(sigma) = sigma,

M and D being the numbers of entries of y and of mu. The weight w is the paper's 1 / SNR and makes
the second gradient lambda (mu - Den(mu + sigma eps, sigma)) / D. Nothing is differentiated through
the network. Adam cares for the ratio of the two terms only, so we multiply both by D. Its update
stands here in full: the first use of torch.optim loads torch's compiler, which takes seconds.

The paper starts at the pseudo-inverse of y; we start at a draw of the likelihood around a grey
image (std 0.25), which every operator has.

Source:
    Mardani et al., arXiv 2305.04391; lambda 0.25, rate 0.1 and Adam's betas from the authors'
    configuration. Adam: Kingma & Ba, arXiv 1412.6980.
"""

import torch
from torch import Tensor

from baselines.interface import Ladder, Method, Models, Problem, Settings, misfit_gradient
from ncvsd_inverse.checks import check_stays_finite
from ncvsd_inverse.numerics import draw_normal
from ncvsd_inverse.sampling.likelihood import likelihood_step
from ncvsd_inverse.schedules import variance_preserving

__all__ = ["METHOD", "run"]

_BETA_1, _BETA_2 = 0.9, 0.99
"""Weights that Adam keeps on the past of the gradient and of its square."""

_ADAM_EPS = 1e-8 * 3 * 256 * 256
"""What Adam adds to the root of the mean square: the authors' 1e-8 for the mean over the entries of
an image of theirs, where our gradient is a sum. It is no trifle: it calms the last steps."""

_START_STD = 0.25
"""Std of the images around grey from which the start is drawn, image units."""


@torch.no_grad()
def run(problem: Problem, models: Models, nfe: int, settings: Settings) -> Tensor:
    """Estimate each image; exactly `nfe` calls of the teacher, none differentiated."""
    generators = problem.generators()
    likelihood = likelihood_step(problem.operator, problem.y, problem.sigma_y)
    grey = problem.y.new_zeros(problem.shape)
    mu = likelihood.sample(grey, _START_STD, generator=generators)
    first, second = torch.zeros_like(mu), torch.zeros_like(mu)
    scale = mu[0].numel() / problem.y[0].numel()
    for step, sigma in enumerate(variance_preserving(nfe, models.sigma_max), start=1):
        x = mu + sigma * draw_normal(mu, generators)
        residual = mu - models.teacher.denoise(x, sigma)
        gradient = scale * misfit_gradient(problem, mu) + settings["lambda"] * residual
        first = _BETA_1 * first + (1 - _BETA_1) * gradient
        second = _BETA_2 * second + (1 - _BETA_2) * gradient**2
        spread = (second / (1 - _BETA_2**step)).sqrt() + _ADAM_EPS
        mu = mu - settings["rate"] * first / (1 - _BETA_1**step) / spread
        check_stays_finite("mu", mu, f"step {step} of {nfe} at sigma = {sigma:.4g}")
    return mu


METHOD = Method(
    name="reddiff",
    title="RED-diff",
    run=run,
    network="teacher",
    samples=False,
    linear_only=False,
    calls=(100, 1000),
    reference="mardani2024reddiff",
    settings={"rate": 0.1, "lambda": 0.25},
    search={"lambda": Ladder(), "rate": Ladder()},
)
