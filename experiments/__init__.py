"""Configurations of training runs, shipped as `ncvsd_inverse.presets`; scripts beside them."""
