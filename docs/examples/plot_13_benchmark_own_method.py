"""
Benchmarking a method of your own
=================================

A method is a function from a measurement to an image. Here it is held against ours on the same
measurements, with the same network and the same number of calls.
"""

from importlib.resources import files

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from ncvsd_inverse import Operator, list_tasks, load_prior, make_task, read_image, solve
from ncvsd_inverse.images import plot_pictures
from ncvsd_inverse.metrics import psnr, ssim
from ncvsd_inverse.priors import ncvsd_faces64

teacher = load_prior("ncvsd_faces64_teacher")

# %%
# Plug-and-play gradient descent, in five lines: a step towards the measurement, then the denoiser
# at a level that falls.


def mine(y: Tensor, operator: Operator, nfe: int) -> Tensor:
    """Return images (B, C, H, W) after `nfe` calls of the teacher."""
    x = operator.adjoint(y)
    for sigma in torch.logspace(0, -1.3, nfe).tolist():
        x = x - operator.adjoint(operator(x) - y)
        x = teacher.denoise(x, sigma)
    return x


def ours(y: Tensor, operator: Operator, nfe: int) -> Tensor:
    """Return the point estimates of `solve`."""
    return solve(y, operator=operator, prior=ncvsd_faces64, nfe=nfe, sigma_y=0.05).x0


# %%
# The tasks of the benchmark come by name. Two portraits are no benchmark: the harness takes a
# hundred images, tunes every rival by the same number of trials, counts the calls and adds
# perceptual distances.

portraits = files("ncvsd_inverse") / "assets"
truth = torch.cat(
    [read_image(portraits / f"{name}.png") for name in ("grace_hopper", "eileen_collins")]
)
print(list_tasks())

calls = (4, 10, 20)
figures: dict[str, list[float]] = {"mine": [], "ours": []}
task = make_task("inpaint_random", (64, 64))
y = task.operator.measure(truth, task.sigma_y, generator=torch.Generator().manual_seed(0))
for nfe in calls:
    for name, method in (("mine", mine), ("ours", ours)):
        x0 = method(y, task.operator, nfe)
        figures[name].append(float(psnr(x0, truth).mean()))
        similar = float(ssim(x0, truth).mean())
        print(f"{nfe:3} calls, {name}: {figures[name][-1]:.1f} dB, SSIM {similar:.3f}")

# %%

figure, axis = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
for name, values in figures.items():
    axis.plot(calls, values, "o-", label=name)
axis.set(xlabel="network calls", ylabel="PSNR, dB", title=task.name)
axis.legend()

# %%

plot_pictures(
    [[y[:1], mine(y, task.operator, 10)[:1], ours(y, task.operator, 10)[:1], truth[:1]]],
    ["measurement", "mine, 10 calls", "ours, 10 calls", "truth"],
)

# %%
# In a clone of the repository the same method becomes a row of the tables:
#
# .. code-block:: console
#
#    $ python benchmarks/run.py --task inpaint_random --methods my_methods.py:METHOD ncvsd
#
# :doc:`/howto/benchmark` shows the file ``my_methods.py``.
