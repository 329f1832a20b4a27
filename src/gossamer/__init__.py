"""Gossamer makes transformer language models light."""
