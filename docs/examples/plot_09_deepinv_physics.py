"""
A physics of deepinv: tomography and multi-coil MRI
===================================================

deepinv has physics of many instruments. Each is an operator for ``solve``: the noise level comes
from its noise model, and its image range of 0 to 1 is converted.
"""

from importlib.resources import files

import deepinv
import torch

from ncvsd_inverse import read_image, solve
from ncvsd_inverse.images import plot_pictures
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.priors import ncvsd_natural

picture = read_image(files("ncvsd_inverse") / "assets" / "photographs" / "cat.png").mean(
    1, keepdim=True
)
truth = torch.nn.functional.avg_pool2d(picture, 2)  # 64x64 keeps this short
unit = (truth + 1) / 2  # deepinv's images are in [0, 1]

# %%
# Tomography
# ----------
# 30 views. Draws need the exact adjoint, which deepinv computes when asked.

physics = deepinv.physics.Tomography(
    angles=30,
    img_width=64,
    circle=False,
    normalize=True,
    adjoint_via_backprop=True,
    noise_model=deepinv.physics.GaussianNoise(0.012),
)
torch.manual_seed(0)
y = physics(unit)
result = solve(y, operator=physics, prior=ncvsd_natural, nfe=10)
print(result)

# %%
# The filtered back-projection is deepinv's own.

filtered = (2 * physics.fbp(y) - 1).clamp(-1, 1)
sinogram = torch.nn.functional.interpolate(2 * y / y.max() - 1, (64, 64))
print(
    f"filtered {float(psnr(filtered, truth)):.1f} dB, ours {float(psnr(result.x0, truth)):.1f} dB"
)
plot_pictures(
    [[sinogram, filtered, result.x0, truth]],
    ["views", "filtered back-projection", "estimate", "truth"],
)

# %%
# Multi-coil MRI
# --------------
# Several coils listen, each best near itself, and a third of the columns of k-space is kept.
# deepinv's image has a real and an imaginary part. Ours is real, so a small physics puts a zero
# imaginary part beside it.

coils = 4
rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
angles = torch.arange(coils) * torch.pi / 2 + 0.6
distances = (rows - angles.sin()[:, None, None]) ** 2 + (columns - angles.cos()[:, None, None]) ** 2
maps = torch.polar(torch.exp(-distances / 1.5), 0.5 * distances)

kept = torch.zeros(64, 64)
kept[:, ::4] = 1
kept[:, 28:36] = 1
scanner = deepinv.physics.MultiCoilMRI(mask=kept, coil_maps=maps)


def listen(x: torch.Tensor, **_: object) -> torch.Tensor:
    """Return the k-space of all coils for real images (B, 1, H, W)."""
    return scanner.A(torch.cat([x, torch.zeros_like(x)], 1))


def back(y: torch.Tensor, **_: object) -> torch.Tensor:
    """Return the adjoint's real part, shape (B, 1, H, W)."""
    return scanner.A_adjoint(y)[:, :1]


physics = deepinv.physics.LinearPhysics(
    A=listen, A_adjoint=back, img_size=(1, 64, 64), noise_model=deepinv.physics.GaussianNoise(0.01)
)
y = physics(unit)
result = solve(y, operator=physics, prior=ncvsd_natural, nfe=10)
print("k-space of the coils:", tuple(y.shape))

# %%
# Without a prior, the least-squares solution of deepinv amplifies the noise that coils share.

least_squares = (2 * physics.A_dagger(y) - 1).clamp(-1, 1)
print(
    f"least squares {float(psnr(least_squares, truth)):.1f} dB, "
    f"ours {float(psnr(result.x0, truth)):.1f} dB"
)
plot_pictures(
    [[kept[None, None] * 2 - 1, least_squares, result.x0, truth]],
    ["measured frequencies", "least squares", "estimate", "truth"],
)
