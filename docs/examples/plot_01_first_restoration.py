"""
A first restoration
===================

A face with a hole in the middle is restored by a prior that knows faces, in ten network calls.
"""

from importlib.resources import files

import torch

from ncvsd_inverse import read_image, solve
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.operators import Inpaint
from ncvsd_inverse.priors import ncvsd_faces64

# %%
# Images are tensors of shape ``(B, C, H, W)`` with values from -1 to 1. We make the problem
# ourselves, so that we can compare: the operator says what was measured, and ``measure`` adds
# noise.

portraits = files("ncvsd_inverse") / "assets"
truth = torch.cat(
    [read_image(portraits / f"{name}.png") for name in ("grace_hopper", "eileen_collins")]
)
operator = Inpaint.box((64, 64), 24)
y = operator.measure(truth, 0.05, generator=torch.Generator().manual_seed(0))

# %%
# One call of ``solve`` does the rest. Its result prints what was done. The residual is about 1 or
# a little less where the estimate explains the measurement to within its noise.

result = solve(y, operator=operator, prior=ncvsd_faces64, nfe=10, sigma_y=0.05)
print(result)
print("PSNR in dB:", psnr(result.x0, truth))

# %%
# The hole is filled with a plausible face. It need not be the true one: the measurement does not
# tell. The next example shows how sure each pixel is.

result.plot(truth)
