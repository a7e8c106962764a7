"""Images to train on: pictures, data sets and latents, whole or streamed."""

from ncvsd_inverse.training.data.image_data import ImageData, read_data

__all__ = ["ImageData", "read_data"]
