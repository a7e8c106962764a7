"""Training of priors: a teacher by denoising, then a generative denoiser by NCVSD distillation."""

from ncvsd_inverse.distill.config import DistillConfig, TeacherConfig
from ncvsd_inverse.distill.data import ImageData
from ncvsd_inverse.distill.trainer import DistillRun, TeacherRun

__all__ = ["DistillConfig", "DistillRun", "ImageData", "TeacherConfig", "TeacherRun"]
