"""Forward models y = A(x) + noise.

Images have shape (B, C, H, W) and values in [-1, 1]. Linear operators carry `adjoint` and, but for
compositions, `solve_normal`; every operator but `BlindBlur` carries `measure`, `input_shape`,
`measured`, `count_measured` and `repeated`. What an operator is given it copies, so that later
changes of a mask or kernel do not reach it.
"""

if __name__ == "operators":
    raise ImportError(
        "import ncvsd_inverse.operators, not operators: the bare name would load a second copy"
    )

from ncvsd_inverse.operators.blind import BlindBlur
from ncvsd_inverse.operators.blur import Blur, GaussianBlur, MotionBlur
from ncvsd_inverse.operators.colorize import Colorize
from ncvsd_inverse.operators.compose import Compose
from ncvsd_inverse.operators.compressed import CompressedSensing
from ncvsd_inverse.operators.custom import check_operator, from_function
from ncvsd_inverse.operators.denoise import Denoise
from ncvsd_inverse.operators.fourier import MaskedFourier
from ncvsd_inverse.operators.hdr import HDR
from ncvsd_inverse.operators.inpainting import Inpaint
from ncvsd_inverse.operators.phase import PhaseRetrieval
from ncvsd_inverse.operators.poisson import Poisson
from ncvsd_inverse.operators.superres import SuperResolution

__all__ = [
    "HDR",
    "BlindBlur",
    "Blur",
    "Colorize",
    "Compose",
    "CompressedSensing",
    "Denoise",
    "GaussianBlur",
    "Inpaint",
    "MaskedFourier",
    "MotionBlur",
    "PhaseRetrieval",
    "Poisson",
    "SuperResolution",
    "check_operator",
    "from_function",
]
