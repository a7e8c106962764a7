"""
Your own photograph and mask
============================

Writing is taken off a photograph. The mask says which pixels are known; what is under it does not
matter.
"""

from importlib.resources import files

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw

from ncvsd_inverse import read_image, solve
from ncvsd_inverse.images import plot_pictures
from ncvsd_inverse.operators import Inpaint
from ncvsd_inverse.priors import ncvsd_natural

# %%
# ``read_image`` takes any picture file: ``read_image("photo.jpg")``. Here it is a cat of 128x128
# pixels. ``ncvsd_natural`` takes any size.

photograph = files("ncvsd_inverse") / "assets" / "photographs" / "cat.png"
truth = read_image(photograph)

# %%
# A mask is a boolean tensor, true where the picture is known. A picture file serves as well:
# ``torch.from_numpy(np.array(Image.open("mask.png").convert("L")) > 127)``. We write one.

page = Image.new("L", (128, 128), 255)
pen = ImageDraw.Draw(page)
for row, words in enumerate(("do not", "copy", "this cat")):
    pen.text((6, 4 + 40 * row), words, fill=0, font_size=34)
pen.line((0, 127, 127, 0), fill=0, width=3)
known = torch.from_numpy(np.array(page) > 127)

# %%
# Photographs have noise, and this one gets some: a std of 0.03, four steps of 8 bits.
# What is under the writing is set to white.

operator = Inpaint(known)
noisy = operator.measure(truth, 0.03, generator=torch.Generator().manual_seed(0))
damaged = noisy.where(known, torch.ones(()))
draws = solve(
    damaged, operator=operator, prior=ncvsd_natural, sigma_y=0.03, num_samples=8, estimate="point"
)
print(draws)
plot_pictures(
    [[damaged, 2 * known[None, None].float() - 1, draws.x0, truth]],
    ["damaged", "mask", "restored", "truth"],
)

# %%
# On the command line the same is
#
# .. code-block:: console
#
#    $ ncvsd solve photo.png --task inpaint --mask mask.png --samples 8 --estimate point
#
# The std of the draws says how sure the filling is: bright pixels are guesses.

figure, axis = plt.subplots(figsize=(4, 3.4), layout="constrained")
shown = axis.imshow(draws.std[0].mean(0), cmap="magma")
axis.set(xticks=[], yticks=[], title="std of 8 draws")
figure.colorbar(shown)
