"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from gossamer.errors import ConfigurationError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(size: str | int) -> int:
    """``"4GB"``, ``"512 MiB"`` or a number of bytes -> bytes.

    Raises:
        ConfigurationError: not a positive size.

    >>> parse_bytes("4GB"), parse_bytes("1.5 GiB"), parse_bytes(4096)
    (4000000000, 1610612736, 4096)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?|)b?\s*", str(size).lower())
    value = int(Fraction(match[1]) * _UNITS[match[2]]) if match else 0
    if value <= 0:
        raise ConfigurationError(f"memory must be a size such as '4GB', '512MiB' or a number of bytes, got {size!r}")
    return value
