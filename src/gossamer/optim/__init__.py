"""Optimizers."""

from gossamer.optim.mfac import MFAC, MFACPreconditioner

__all__ = ["MFAC", "MFACPreconditioner"]
