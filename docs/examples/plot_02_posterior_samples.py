"""
Posterior samples and an uncertainty map
========================================

A measurement leaves things open. Samples from the posterior show what, and their standard deviation
says how much, pixel by pixel. We check that it tells the truth.
"""

from importlib.resources import files

import matplotlib.pyplot as plt
import torch

from ncvsd_inverse import read_image, solve
from ncvsd_inverse.images import plot_pictures
from ncvsd_inverse.metrics import coverage, crps, psnr
from ncvsd_inverse.operators import Inpaint
from ncvsd_inverse.priors import ncvsd_natural

# %%
# Two crops of photographs, of which 70% of the pixels are missing.

photographs = files("ncvsd_inverse") / "assets" / "photographs"
cat = read_image(photographs / "cat.png")[..., 28:92, 10:74]
coffee = read_image(photographs / "coffee.png")[..., 20:84, 30:94]
truth = torch.cat([cat, coffee])
operator = Inpaint.random((64, 64), keep=0.3)
y = operator.measure(truth, 0.05, generator=torch.Generator().manual_seed(0))

# %%
# With ``num_samples`` above 1, ``samples`` are draws from the posterior; ``mean`` and ``std`` are
# theirs.

draws = solve(y, operator=operator, prior=ncvsd_natural, nfe=10, sigma_y=0.05, num_samples=19)
print(draws)

# %%
# Each draw fits the known pixels. They differ where these say little: at edges and in texture.
# Their mean is closer to the truth than any of them, and softer.

grey = draws.std.mean(1, keepdim=True)
spread = 2 * grey / grey.amax((-2, -1), keepdim=True) - 1
plot_pictures(
    [
        [images[i : i + 1] for images in (y, *draws.samples[:2], draws.mean, spread, truth)]
        for i in range(2)
    ],
    ["measurement", "a draw", "another", "mean", "std", "truth"],
)

# %%
# Is the std right? If it is, the true pixel lies inside the central 90% interval of the draws in
# 90% of all cases, and the error of the mean is as large as the std says, small or large.

print("PSNR of a draw and of the mean, dB:", psnr(draws.samples[0], truth), psnr(draws.mean, truth))
print("share of pixels inside 90% intervals:", coverage(draws.samples, truth))
print("CRPS, lower is better:", crps(draws.samples, truth))

error, std = (draws.mean - truth).flatten(), draws.std.flatten()
groups = std.argsort().chunk(12)
said = [float(std[group].square().mean().sqrt()) for group in groups]
found = [float(error[group].square().mean().sqrt()) for group in groups]

figure, axis = plt.subplots(figsize=(4, 4), layout="constrained")
top = max(said + found)
axis.plot([0, top], [0, top], color="0.7", label="as it should be")
axis.plot(said, found, "o", label="twelfths of the pixels")
axis.set(xlabel="std of the draws", ylabel="error of their mean (root mean square)")
axis.legend()
