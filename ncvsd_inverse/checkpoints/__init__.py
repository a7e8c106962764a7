"""Checkpoints that other programs saved, read without running code from them."""
