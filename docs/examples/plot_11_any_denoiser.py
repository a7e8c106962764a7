"""
Any denoiser as a prior, in one call
====================================

A denoiser returns the mean of all clean images that fit a noisy one. Add noise of the right
covariance and the result is a draw, at one network call. The covariance is measured once.
"""

from importlib.resources import files

import deepinv
import torch
from torch import Tensor

from ncvsd_inverse import load_prior, measure_statistics, read_image, solve
from ncvsd_inverse.images import plot_pictures
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.operators import Inpaint
from ncvsd_inverse.priors import DiffusionPrior

photographs = files("ncvsd_inverse") / "assets" / "photographs"
truth, other = read_image(photographs / "cat.png"), read_image(photographs / "coffee.png")
operator = Inpaint.random((128, 128), keep=0.4)
y = operator.measure(truth, 0.05, generator=torch.Generator().manual_seed(0))

# %%
# A network of yours
# ------------------
# Any function ``(x, sigma) -> E[x0 | x]`` in [-1, 1] will do. Ours stands in for yours.

network = load_prior("ncvsd_natural_teacher").denoise


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the mean of clean images given noisy ones (B, C, H, W) and their stds (B,)."""
    return network(x, sigma)


# %%
# It was trained up to large noise, so it can generate the images that its covariance is measured
# from; ``solve`` would do that by itself. Where you have pictures, these are quicker: here crops
# of another photograph.

crops = torch.cat(
    [other[..., i : i + 64, j : j + 64] for i in range(0, 65, 32) for j in range(0, 65, 32)]
)
prior = DiffusionPrior.from_function(denoise)
prior = prior.with_statistics(measure_statistics(prior, crops))
result = solve(y, operator=operator, prior=prior, nfe=10, sigma_y=0.05)
print(result)

# %%
# A denoiser of deepinv
# ---------------------
# ``from_deepinv`` converts the range. Total variation knows nothing but that pictures are smooth
# with sharp edges.

plain = DiffusionPrior.from_deepinv(deepinv.models.TVDenoiser(n_it_max=50), sigma_max=3.0)
plain = plain.with_statistics(
    measure_statistics(plain, crops, levels=(0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0))
)
smooth = solve(y, operator=operator, prior=plain, nfe=10, sigma_y=0.05)

for name, each in (("network", result), ("total variation", smooth)):
    print(f"{name:16} {float(psnr(each.x0, truth)):.1f} dB")

# %%

plot_pictures(
    [[y, smooth.x0, result.x0, truth]], ["measurement", "total variation", "network", "truth"]
)
