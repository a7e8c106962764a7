"""Training of priors: a teacher by denoising, then a generative denoiser by NCVSD distillation."""

from ncvsd_inverse.training.config import DistillConfig, TeacherConfig
from ncvsd_inverse.training.data.image_data import ImageData, read_data
from ncvsd_inverse.training.distillation import DistillRun
from ncvsd_inverse.training.teacher import TeacherRun, load_teacher

__all__ = [
    "DistillConfig",
    "DistillRun",
    "ImageData",
    "TeacherConfig",
    "TeacherRun",
    "load_teacher",
    "read_data",
]
