"""How close a prior is to its teacher, and how good the images are that it generates."""

from ncvsd_inverse.evaluation.calibration import calibrate_noise_scale
from ncvsd_inverse.evaluation.generation import Generation, evaluate_generation
from ncvsd_inverse.evaluation.posterior import Evaluation, evaluate

__all__ = [
    "Evaluation",
    "Generation",
    "calibrate_noise_scale",
    "evaluate",
    "evaluate_generation",
]
