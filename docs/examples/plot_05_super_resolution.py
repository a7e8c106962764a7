"""
Enlarging a photograph
======================

A photograph of 64x64 pixels becomes one of 128x128. Interpolation cannot add detail; a prior can,
and samples show which of it is invented.
"""

from importlib.resources import files

import torch

from ncvsd_inverse import read_image, solve
from ncvsd_inverse.images import plot_pictures
from ncvsd_inverse.metrics import psnr, ssim
from ncvsd_inverse.operators import SuperResolution
from ncvsd_inverse.priors import ncvsd_natural

photographs = files("ncvsd_inverse") / "assets" / "photographs"
truth = torch.cat([read_image(photographs / f"{name}.png") for name in ("cat", "coffee")])
operator = SuperResolution(2)
y = operator.measure(truth, 0.01, generator=torch.Generator().manual_seed(0))

# %%
# The reduction is that of MATLAB's ``imresize``, whose tables fill the literature.
# ``SuperResolution`` takes ``filter="box"`` for means of blocks.

result = solve(y, operator=operator, prior=ncvsd_natural, nfe=10, sigma_y=0.01)
bicubic = torch.nn.functional.interpolate(y, scale_factor=2, mode="bicubic").clamp(-1, 1)
for name, x in (("bicubic", bicubic), ("ours", result.x0)):
    print(f"{name:8} PSNR {psnr(x, truth).tolist()} SSIM {ssim(x, truth).tolist()}")

# %%

plot_pictures(
    [[y[i : i + 1], bicubic[i : i + 1], result.x0[i : i + 1], truth[i : i + 1]] for i in range(2)],
    ["measurement", "bicubic", "estimate", "truth"],
)

# %%
# A closer look at the cat's eye, 40x40 pixels.

corner = (..., slice(36, 76), slice(20, 60))
plot_pictures(
    [[bicubic[:1][corner], result.x0[:1][corner], truth[:1][corner]]],
    ["bicubic", "estimate", "truth"],
)
