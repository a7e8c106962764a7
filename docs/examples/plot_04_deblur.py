"""
Deblurring with a measured kernel and real borders
==================================================

A real camera sees past the edge of the picture: what lies outside is blurred in. An operator that
assumes otherwise leaves stripes. ``boundary="valid"`` says nothing about the outside and restores
a picture larger than the one that came in.
"""

from importlib.resources import files

import torch

from ncvsd_inverse import read_image, solve
from ncvsd_inverse.images import centre_crop, plot_pictures
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.operators import Blur, MotionBlur
from ncvsd_inverse.priors import ncvsd_natural

scene = read_image(files("ncvsd_inverse") / "assets" / "photographs" / "coffee.png")

# %%
# A kernel is what the camera made of a point of light. One that was measured is a small picture:
# subtract its background, divide by its sum, and give it an odd side, so that it has a centre.
# Here a shaken camera drew it, with a little noise on top.

point = MotionBlur(17, 0.5, seed=9).kernel[0, 0].float()
photographed = point + 2e-4 * torch.randn(point.shape, generator=torch.Generator().manual_seed(1))
kernel = (photographed - photographed.median()).clamp(min=0)
kernel = kernel / kernel.sum()

# %%
# The camera sees the part of the scene for which the kernel needs no outside.

camera = Blur(point, boundary="valid")
y = camera.measure(scene, 0.02, generator=torch.Generator().manual_seed(0))
print("scene", tuple(scene.shape[-2:]), "picture", tuple(y.shape[-2:]))

# %%
# Three guesses about the outside. The first restores the whole scene from the picture and is
# cropped for comparison; the others restore the picture's own frame, and ``solve`` warns that what
# they leave over does not look like noise.

frame = tuple(y.shape[-2:])
truth = centre_crop(scene, frame)
restored = {}
for boundary in ("valid", "replicate", "circular"):
    operator = Blur(kernel, boundary=boundary)
    x0 = solve(y, operator=operator, prior=ncvsd_natural, nfe=10, sigma_y=0.02).x0
    restored[boundary] = centre_crop(x0, frame)
    print(f"{boundary:9} {float(psnr(restored[boundary], truth)):.1f} dB")

# %%

plot_pictures(
    [[2 * kernel[None, None] / kernel.max() - 1, y, *restored.values(), truth]],
    ["kernel", "picture", *restored, "truth"],
)
