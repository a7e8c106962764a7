"""Images to train on: pictures, data sets and latents, in memory or streamed."""

from ncvsd_inverse.training.data.in_memory import ImageData, LatentData
from ncvsd_inverse.training.data.reading import read_data
from ncvsd_inverse.training.data.sampler import Batch, DigestedData, TrainingData
from ncvsd_inverse.training.data.streamed import StreamedData

__all__ = [
    "Batch",
    "DigestedData",
    "ImageData",
    "LatentData",
    "StreamedData",
    "TrainingData",
    "read_data",
]
