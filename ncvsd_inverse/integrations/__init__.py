"""Priors and solver as parts of other libraries."""
