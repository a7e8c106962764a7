"""
Your own forward model
======================

Anything that maps images to measurements will do: a plain function, or a class with an adjoint.
Here a cheap camera with one colour at each pixel (a Bayer filter) whose optics darken the
corners.
"""

from importlib.resources import files

import torch
from torch import Tensor

from ncvsd_inverse import read_image, solve
from ncvsd_inverse.images import plot_pictures
from ncvsd_inverse.metrics import psnr
from ncvsd_inverse.operators import check_operator, from_function
from ncvsd_inverse.priors import ncvsd_natural

photograph = read_image(files("ncvsd_inverse") / "assets" / "photographs" / "coffee.png")
truth = photograph[..., 24:104, 24:104]
height, width = truth.shape[-2:]

bayer = torch.zeros(3, height, width)
bayer[0, 0::2, 0::2] = 1
bayer[1, 0::2, 1::2] = 1
bayer[1, 1::2, 0::2] = 1
bayer[2, 1::2, 1::2] = 1
rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
darkening = 1 - 0.35 * (rows**2 + columns**2)

# %%
# A function
# ----------
# ``from_function`` finds out that it is linear and gets the adjoint by autograd.


def camera(x: Tensor) -> Tensor:
    """Return what the sensor counts, shape (B, 1, H, W)."""
    return darkening * (bayer * x).sum(1, keepdim=True)


operator = from_function(camera, tuple(truth.shape[1:]))
y = operator.measure(truth, 0.03, generator=torch.Generator().manual_seed(0))
result = solve(y, operator=operator, prior=ncvsd_natural, nfe=10, sigma_y=0.03)
print(result)

# %%
# A class
# -------
# A class needs a call and ``input_shape``. An adjoint makes it linear. With ``solve_normal``,
# which is optional, the Gibbs loop needs no iterations. ``check_operator`` tries all of it on
# random images and is silent if all is well.


class Camera:
    """Bayer filter and darkening; A A^T is diagonal, so the solve is a formula."""

    gain = 1.0  # y is about as large as x; 127.5 if it were in steps of 8 bits

    def __call__(self, x: Tensor) -> Tensor:
        return camera(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return bayer * (darkening * y)

    def input_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (y_shape[0], 3, *y_shape[2:])

    def solve_normal(self, rhs: Tensor, *, a: float, b: float) -> Tensor:
        return rhs / (a * bayer * darkening**2 + b)


check_operator(Camera(), tuple(truth.shape[1:]))
print("largest difference to the function:", float((Camera()(truth) - camera(truth)).abs().max()))
print(f"estimate {float(psnr(result.x0, truth)):.1f} dB")

# %%

plot_pictures([[y, result.x0, truth]], ["sensor", "estimate", "truth"])

# %%
# A mistake is named. Here the adjoint forgets the darkening.


class Wrong(Camera):
    """A camera with a wrong adjoint."""

    def adjoint(self, y: Tensor) -> Tensor:
        return bayer * y


try:
    check_operator(Wrong(), tuple(truth.shape[1:]))
except ValueError as error:
    print(error)
