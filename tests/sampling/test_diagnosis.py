"""What looks wrong about a measurement or a result."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ncvsd_inverse import operators as ops
from ncvsd_inverse import solve
from ncvsd_inverse.images import centre_crop, read_image
from ncvsd_inverse.priors.selfcheck import PHOTOGRAPH

TRUTH = centre_crop(read_image(PHOTOGRAPH), (96, 96))


def noise(seed=0):
    return torch.randn(TRUTH.shape, generator=torch.Generator().manual_seed(seed))


def notes_of(y, operator, sigma_y):
    """Return what `solve` warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solve(y, operator=operator, prior="ncvsd_natural", nfe=4, sigma_y=sigma_y)
    return [str(entry.message) for entry in caught]


def jpeg(quality):
    pixels = ((TRUTH[0].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None] / 127.5 - 1


def smooth():
    wide = torch.randn(1, 3, 98, 98, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.avg_pool2d(wide, 3, 1) * 3


def photons():
    source = torch.Generator().manual_seed(0)
    return torch.poisson(20 * (TRUTH + 1), generator=source) / 20 - 1


BLUR = ops.GaussianBlur(1.5, 9)
TOO_BRIGHT = ops.Blur(3 * BLUR.kernel)
CASES = {
    "0 to 1": ((TRUTH + 1) / 2 + 0.02 * noise(), ops.Denoise(), 0.02, "y lies in [0, 1]"),
    "0 to 255": ((TRUTH + 1) * 127.5, BLUR, 0.05, "y reaches 2"),
    "kernel": (TOO_BRIGHT(TRUTH) + 0.05 * noise(), TOO_BRIGHT, 0.05, "the kernel sums to 3"),
    "JPEG": (jpeg(30), ops.Denoise(), 0.05, "y has blocks of 8 pixels, as from JPEG"),
    "resized": (TRUTH + 0.1 * smooth(), ops.Denoise(), 0.1, "noise of neighbouring pixels is al"),
    "photons": (photons(), ops.Denoise(), "auto", "the noise is stronger where y is brighter"),
    "more noise": (BLUR(TRUTH) + 0.1 * noise(), BLUR, 0.03, "the residual is 3"),
    "other kernel": (TRUTH + 0.02 * noise(), BLUR, 0.02, "kernel, boundary, scale, mask or range"),
    "less noise": (BLUR(TRUTH) + 0.02 * noise(), BLUR, 0.1, "noise of y seems to be 0.02, not 0.1"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_what_is_odd_is_said(name):
    y, operator, sigma_y, message = CASES[name]
    assert any(message in note for note in notes_of(y, operator, sigma_y))


@pytest.mark.parametrize("sigma_y", [0.02, 0.1, "auto"])
@pytest.mark.parametrize(
    "operator",
    [ops.Denoise(), BLUR, ops.SuperResolution(2), ops.Inpaint.random((96, 96), 0.5)],
    ids=lambda operator: type(operator).__name__,
)
def test_nothing_is_said_of_what_is_as_it_should_be(operator, sigma_y):
    level = 0.05 if sigma_y == "auto" else sigma_y
    y = operator.measure(TRUTH, level, generator=torch.Generator().manual_seed(3))
    assert notes_of(y, operator, sigma_y) == []


def test_nothing_is_said_of_a_physics_whose_images_have_half_our_range():
    dp = pytest.importorskip("deepinv").physics
    kernel = BLUR.kernel.float()
    physics = dp.BlurFFT(TRUTH.shape[1:], filter=kernel, noise_model=dp.GaussianNoise(0.02))
    y = BLUR((TRUTH + 1) / 2) + 0.02 * noise()
    assert notes_of(y, physics, None) == []
