"""Training of priors: a teacher by denoising, then a generative denoiser by NCVSD distillation."""

from ncvsd_inverse.distill.config import DistillConfig, TeacherConfig
from ncvsd_inverse.distill.data import ImageData, read_data
from ncvsd_inverse.distill.student import DistillRun
from ncvsd_inverse.distill.teacher import TeacherRun, load_teacher

__all__ = [
    "DistillConfig",
    "DistillRun",
    "ImageData",
    "TeacherConfig",
    "TeacherRun",
    "load_teacher",
    "read_data",
]
