"""Optimizers of second order."""

from gossamer.optim.mfac import MFAC
from gossamer.optim.preconditioner import MFACPreconditioner

__all__ = ["MFAC", "MFACPreconditioner"]
