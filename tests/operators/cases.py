"""A row for each operator, and the dense matrix that it is compared with."""

import math
from dataclasses import dataclass

import pytest
import torch

from ncvsd_inverse import operators as ops

BOUNDARIES = ("circular", "reflect", "replicate", "valid")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=seeded(seed))


def positive(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=seeded(seed)) + 0.1


def some(*shape, seed=0):
    return torch.rand(shape, generator=seeded(seed)) > 0.4


class Gains:
    """A user's operator with the least it may have and one gain an image."""

    def __init__(self, *gains):
        self.gains = torch.tensor(gains, dtype=torch.float64).view(-1, 1, 1, 1)

    def __call__(self, x):
        return self.gains.to(x) * x

    adjoint = __call__

    def input_shape(self, y_shape):
        return tuple(y_shape)


@dataclass
class Case:
    name: str
    operator: object
    shape: tuple  # of the images, (B, C, H, W)
    y_shape: tuple
    family: str


def make_local():
    odd, flat = (2, 3, 5, 7), (2, 2, 6, 8)
    cases = [
        Case("inpaint", ops.Inpaint(some(5, 7)), odd, odd, "inpainting"),
        Case("inpaint_float", ops.Inpaint(some(1, 5, 7).float()), odd, odd, "inpainting"),
        Case("inpaint_channels", ops.Inpaint(some(3, 5, 7)), odd, odd, "inpainting"),
        Case("inpaint_images", ops.Inpaint(some(2, 1, 5, 7)), odd, odd, "inpainting"),
        Case("inpaint_all", ops.Inpaint(some(2, 3, 5, 7)), odd, odd, "inpainting"),
        Case("inpaint_box", ops.Inpaint.box((5, 7), (2, 3)), odd, odd, "inpainting"),
        Case("inpaint_random", ops.Inpaint.random((5, 7), keep=0.5), odd, odd, "inpainting"),
        Case("sr2", ops.SuperResolution(2), flat, (2, 2, 3, 4), "superres"),
        Case("sr3", ops.SuperResolution(3), (2, 1, 9, 6), (2, 1, 3, 2), "superres"),
        Case("sr4", ops.SuperResolution(4), (2, 1, 12, 4), (2, 1, 3, 1), "superres"),
        Case("sr2_box", ops.SuperResolution(2, filter="box"), flat, (2, 2, 3, 4), "superres"),
        Case("sr3_box", ops.SuperResolution(3, "box"), (2, 1, 3, 9), (2, 1, 1, 3), "superres"),
        Case("gaussian", ops.GaussianBlur(1.2, 5), odd, odd, "blur"),
        Case("motion", ops.MotionBlur(4, 0.5, seed=1, boundary="reflect"), odd, odd, "motion_blur"),
        Case("denoise", ops.Denoise(), odd, odd, "denoise"),
    ]
    kernels = {
        "odd": positive(5, 3),
        "even": positive(2, 4),
        "full": positive(5, 7),
        "images": positive(2, 1, 3, 4),
        "all": positive(2, 3, 3, 3),
    }
    for boundary in BOUNDARIES:
        for label, kernel in kernels.items():
            height, width = kernel.shape[-2:]
            y_shape = (2, 3, 6 - height, 8 - width) if boundary == "valid" else odd
            operator = ops.Blur(kernel, boundary=boundary)
            cases.append(Case(f"blur_{boundary}_{label}", operator, odd, y_shape, "blur"))
        even = ops.Blur(kernels["odd"], boundary=boundary)
        y_shape = (2, 2, 2, 6) if boundary == "valid" else flat
        cases.append(Case(f"blur_{boundary}_even_image", even, flat, y_shape, "blur"))
    return cases


def make_mixing():
    odd, flat = (2, 3, 5, 7), (2, 2, 6, 8)
    sensing, fourier = "compressed_sensing", "masked_fourier"
    centred = ops.MaskedFourier.lines((6, 8), 2, 0.25, centred=True)
    return [
        Case("luma", ops.Colorize(), odd, (2, 1, 5, 7), "colorization"),
        Case("mean", ops.Colorize("mean"), (2, 3, 1, 4), (2, 1, 1, 4), "colorization"),
        Case("sense_32", ops.CompressedSensing((4, 8), 0.4), (2, 2, 4, 8), (2, 2, 13), sensing),
        Case("sense_35", ops.CompressedSensing((5, 7), 0.6, 1), odd, (2, 3, 21), sensing),
        Case("sense_48", ops.CompressedSensing((6, 8), 0.1, 2), flat, (2, 2, 5), sensing),
        Case("sense_all", ops.CompressedSensing((3, 5), 1.0), (2, 1, 3, 5), (2, 1, 15), sensing),
        Case("sense_one", ops.CompressedSensing((5, 7), 1e-9), odd, (2, 3, 1), sensing),
        Case("sense_1", ops.CompressedSensing((1, 1)), (2, 1, 1, 1), (2, 1, 1), sensing),
        Case("fourier_odd", ops.MaskedFourier(some(5, 7)), odd, (*odd, 2), fourier),
        Case("fourier_even", ops.MaskedFourier(some(6, 8).float()), flat, (*flat, 2), fourier),
        Case("fourier_all", ops.MaskedFourier(torch.ones(5, 7)), odd, (*odd, 2), fourier),
        Case("fourier_centred", ops.MaskedFourier(some(5, 7), True), odd, (*odd, 2), fourier),
        Case("fourier_centred_even", centred, flat, (*flat, 2), fourier),
        Case("lines", ops.MaskedFourier.lines((6, 8), 2, 0.25), flat, (*flat, 2), fourier),
        Case("mri", ops.MaskedFourier.lines((3, 1), 1, 1), (2, 1, 3, 1), (2, 1, 3, 1, 2), fourier),
    ]


def make_compositions():
    flat, colours = (2, 2, 6, 8), (2, 3, 6, 8)
    blur = ops.GaussianBlur(1.1, 3)
    parts = {
        "reduce_blur": (ops.SuperResolution(2), blur, flat, (2, 2, 3, 4)),
        "mask_blur": (ops.Inpaint(some(6, 8)), blur, flat, flat),
        "masks_blurs": (
            ops.Inpaint(some(2, 1, 6, 8)),
            ops.Blur(normal(2, 1, 3, 2), boundary="valid"),
            (2, 2, 8, 9),
            flat,
        ),
        "grey_mask": (ops.Colorize(), ops.Inpaint(some(3, 6, 8)), colours, (2, 1, 6, 8)),
        "lines_grey": (
            ops.MaskedFourier.lines((6, 8), 2, 0.25),
            ops.Colorize(),
            colours,
            (2, 1, 6, 8, 2),
        ),
        "sense_reduce": (
            ops.CompressedSensing((3, 4), 0.5),
            ops.SuperResolution(2),
            flat,
            (2, 2, 6),
        ),
        "nested": (ops.Compose(ops.SuperResolution(2), blur), ops.Colorize("mean"), colours, None),
        "user_inner": (ops.SuperResolution(2), Gains(0.5, 2.0), flat, (2, 2, 3, 4)),
        "user_outer": (Gains(0.5, 2.0), ops.Inpaint(some(2, 1, 6, 8)), flat, flat),
    }
    return [
        Case(name, ops.Compose(outer, inner), shape, y_shape or (2, 1, 3, 4), "composed")
        for name, (outer, inner, shape, y_shape) in parts.items()
    ]


def dense(operator, shape):
    """The matrix of each image, shape (B, M, N), one column for each of the N pixels."""
    batch, *image = shape
    size = math.prod(image)
    columns = []
    for index in range(size):
        unit = torch.zeros(batch, size, dtype=torch.float64)
        unit[:, index] = 1
        columns.append(operator(unit.view(shape)).flatten(1))
    return torch.stack(columns, dim=2)


LOCAL, MIXING, COMPOSITIONS = make_local(), make_mixing(), make_compositions()
SOLVABLE = LOCAL + MIXING


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)
