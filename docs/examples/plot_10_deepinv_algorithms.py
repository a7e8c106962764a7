"""
Our priors in deepinv's algorithms
==================================

A prior becomes a denoiser for deepinv by ``as_deepinv_denoiser``, and the whole of ``solve`` a
reconstructor by ``as_deepinv_reconstructor``.
"""

from importlib.resources import files

import deepinv
import torch

from ncvsd_inverse import as_deepinv_denoiser, as_deepinv_reconstructor, read_image
from ncvsd_inverse.images import plot_pictures
from ncvsd_inverse.metrics import psnr

truth = read_image(files("ncvsd_inverse") / "assets" / "photographs" / "coffee.png")
unit = (truth + 1) / 2

physics = deepinv.physics.BlurFFT(
    img_size=tuple(truth.shape[1:]),
    filter=deepinv.physics.functional.blur.gaussian_blur(sigma=(1.5, 1.5)),
    noise_model=deepinv.physics.GaussianNoise(0.02),
)
torch.manual_seed(0)
y = physics(unit)

# %%
# The teacher of our prior as the denoiser of two algorithms of deepinv: plug-and-play
# half-quadratic splitting (DPIR), and denoising diffusion restoration (DDRM).

denoiser = as_deepinv_denoiser("ncvsd_natural_teacher")
splitting = deepinv.optim.DPIR(sigma=0.02, denoiser=denoiser, device="cpu")
diffusion = deepinv.sampling.DDRM(denoiser=denoiser, sigmas=torch.logspace(0, -2, 20).tolist())

# %%
# Our solver with the same call, ``model(y, physics)``. All three end close to each other here.

ours = as_deepinv_reconstructor("ncvsd_natural", nfe=10)
restored = {}
for name, model in (
    ("DPIR, 8 calls", splitting),
    ("DDRM, 20 calls", diffusion),
    ("ours, 10 calls", ours),
):
    with torch.no_grad():
        restored[name] = 2 * model(y, physics).clamp(0, 1) - 1
    print(f"{name:18} {float(psnr(restored[name], truth)):.1f} dB")

# %%

plot_pictures(
    [[2 * y.clamp(0, 1) - 1, *restored.values(), truth]], ["measurement", *restored, "truth"]
)
