"""
Magnetic resonance imaging
==========================

A scanner measures Fourier coefficients, column by column. A scan that keeps one column of four is
four times as fast, and leaves more of the image to be guessed.
"""

from importlib.resources import files

import torch

from ncvsd_inverse import read_image, solve
from ncvsd_inverse.images import plot_pictures
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.operators import MaskedFourier
from ncvsd_inverse.priors import ncvsd_natural

# %%
# No scan comes with the package, so a grey photograph stands in. A prior of colour pictures takes
# grey ones too.

truth = read_image(files("ncvsd_inverse") / "assets" / "photographs" / "cat.png").mean(
    1, keepdim=True
)
results = {}
for acceleration in (2, 3, 4):
    operator = MaskedFourier.lines((128, 128), acceleration=acceleration, seed=0)
    y = operator.measure(truth, 0.02, generator=torch.Generator().manual_seed(0))
    result = solve(y, operator=operator, prior=ncvsd_natural, nfe=10, sigma_y=0.02)
    results[acceleration] = (operator, operator.adjoint(y), result.x0)
print("k-space as real and imaginary parts:", tuple(y.shape))

# %%
# Complex k-space of shape ``(B, C, H, W)`` is taken as it is. ``centred=True`` says that
# frequency 0 is in the middle, as in fastMRI's files.

rows = []
for acceleration, (operator, zero_filled, x0) in results.items():
    mask = torch.fft.fftshift(operator.mask)[None, None].float() * 2 - 1
    rows.append([mask, zero_filled, x0, truth])
    print(
        f"{acceleration} times as fast: zero-filled {float(psnr(zero_filled, truth)):.1f} dB, "
        f"estimate {float(psnr(x0, truth)):.1f} dB"
    )
plot_pictures(
    rows,
    ["measured frequencies", "zero-filled", "estimate", "truth"],
    [f"{acceleration} times as fast" for acceleration in results],
)
