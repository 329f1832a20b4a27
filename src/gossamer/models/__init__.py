"""Finds, fetches, checks and loads models."""

from gossamer.models.resolve import resolve_model

__all__ = ["resolve_model"]
