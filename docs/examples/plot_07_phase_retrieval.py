"""
Phase retrieval
===============

A detector sees how strong a wave is, not its phase. Only the amplitudes of the Fourier transform
are known, and the image must be found from them.
"""

from importlib.resources import files

import torch

from ncvsd_inverse import read_image, solve
from ncvsd_inverse.images import plot_pictures
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.operators import PhaseRetrieval
from ncvsd_inverse.priors import ncvsd_faces64

portraits = files("ncvsd_inverse") / "assets"
truth = torch.cat(
    [read_image(portraits / f"{name}.png") for name in ("grace_hopper", "eileen_collins")]
)

# %%
# The image is padded to twice its side before the transform. Its amplitudes stay the same when
# the image is turned by 180 degrees, so there are always two answers; a prior of upright faces
# picks one.

operator = PhaseRetrieval(pad=32)
y = operator.measure(truth, 0.05, generator=torch.Generator().manual_seed(0))

# %%
# The problem is not linear and has many wrong solutions. Several chains are run and the one that
# fits the amplitudes best is kept, without a look at the truth. ``nfe`` of the result counts the
# calls of all.

result = solve(y, operator=operator, prior=ncvsd_faces64, nfe=10, sigma_y=0.05, restarts=4)
print(result)
print("PSNR in dB:", psnr(result.x0, truth))

# %%

amplitude = torch.fft.fftshift(y.clamp(min=0), dim=(-2, -1)).mean(1, keepdim=True)
shown = 2 * (1 + 20 * amplitude).log() / (1 + 20 * amplitude.amax((-2, -1), keepdim=True)).log() - 1
plot_pictures(
    [[shown[i : i + 1], result.x0[i : i + 1], truth[i : i + 1]] for i in range(2)],
    ["log amplitude", "estimate", "truth"],
)
