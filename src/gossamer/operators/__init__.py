"""Matrices that are never built: objects with state, and products with them."""
