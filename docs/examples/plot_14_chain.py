"""
A chain, call by call
=====================

``callback`` sees the images after each network call. This is how an image comes out of noise, in
the two loops that ``solve`` has.
"""

from importlib.resources import files

import torch

from ncvsd_inverse import read_image, solve
from ncvsd_inverse.images import plot_pictures
from ncvsd_inverse.operators import Inpaint
from ncvsd_inverse.priors import ncvsd_faces64

truth = read_image(files("ncvsd_inverse") / "assets" / "eileen_collins.png")
operator = Inpaint.random((64, 64), keep=0.2)
y = operator.measure(truth, 0.05, generator=torch.Generator().manual_seed(0))

# %%
# The conditioning loop gives a face at the first call and settles its details. The Gibbs loop,
# begun at level 80 as published, spends its first calls where the noisy image says nothing. The
# levels of both are printed.


def watch(**options: object) -> list[torch.Tensor]:
    """Return the first image after each call of a chain of draws."""
    seen = []

    def keep(progress):
        seen.append(progress.x0[:1].clone())
        print(f"{progress.rho:.2g}", end=" ")

    solve(
        y,
        operator=operator,
        prior=ncvsd_faces64,
        nfe=10,
        sigma_y=0.05,
        estimate="sample",
        callback=keep,
        **options,
    )
    print()
    return seen


conditioning = watch()
gibbs = watch(method="gibbs", schedule=[80, 52, 30, 16, 8, 3, 1, 0.3, 0.1, 0.03])

# %%

shown = [1, 2, 3, 5, 7, 10]
plot_pictures(
    [[images[number - 1] for number in shown] for images in (conditioning, gibbs)],
    [f"call {number}" for number in shown],
    ["conditioning", "Gibbs"],
)
