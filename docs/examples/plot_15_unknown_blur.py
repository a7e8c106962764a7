"""
A blur that nobody knows
========================

Who holds a shaken photograph rarely holds the kernel. ``BlindBlur`` stands for a blur of which only
the size is known: half of the calls look for the kernel, and the rest restore the picture with it.
"""

from importlib.resources import files

import torch

from ncvsd_inverse import read_image, solve
from ncvsd_inverse.images import centre_crop, plot_pictures
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.operators import BlindBlur, MotionBlur
from ncvsd_inverse.priors import ncvsd_natural

# %%
# A shaken camera: the whole photograph is blurred, and we see its middle.

scene = read_image(files("ncvsd_inverse") / "assets" / "photographs" / "coffee.png")
camera = MotionBlur(15, 0.5, seed=0, boundary="replicate")
picture = camera.measure(scene, 0.01, generator=torch.Generator().manual_seed(0))
y, truth = (centre_crop(image, (128, 128)) for image in (picture, scene))

# %%
# We say how large the kernel is at most and what is beyond the edges of the picture. Kernel, noise
# and picture are found.

result = solve(y, operator=BlindBlur(15, "replicate"), prior=ncvsd_natural, nfe=20, sigma_y="auto")
print(result)
print("PSNR in dB:", float(psnr(y, truth)), "->", float(psnr(result.x0, truth)))
print("noise std:", float(result.sigma_y))

# %%
# ``kernel_std`` says how sure each weight is. Not every blur is found: where the std is as large as
# the kernel, or the result looks worse than the picture, take a larger size, or a family if you
# know one (``prior="gaussian"``, ``"defocus"`` or ``"motion"``).

scale = float(camera.kernel.max())
kernels = [
    2 * (weights / scale).clamp(0, 1) - 1
    for weights in (camera.kernel[:1, :1].float(), result.kernel, result.kernel_std)
]
plot_pictures([[y, result.x0, truth]], ["picture", "restored", "truth"])
plot_pictures([kernels], ["true kernel", "found kernel", "its std"])
