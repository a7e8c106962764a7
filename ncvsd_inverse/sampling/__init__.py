"""Sampling from the posterior of an image given a measurement."""
