"""Sampling from the posterior of an image given a measurement."""

from ncvsd_inverse.sampling.problem import Problem

__all__ = ["Problem"]
