"""Training of priors: a teacher by denoising, then a generative denoiser by NCVSD distillation."""

from ncvsd_inverse.training.config import DistillConfig, TeacherConfig
from ncvsd_inverse.training.data import ImageData, read_data
from ncvsd_inverse.training.distillation import DistillationTrainer
from ncvsd_inverse.training.teacher import TeacherTrainer, load_teacher

__all__ = [
    "DistillConfig",
    "DistillationTrainer",
    "ImageData",
    "TeacherConfig",
    "TeacherTrainer",
    "load_teacher",
    "read_data",
]
