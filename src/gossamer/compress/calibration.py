"""Text that a compression is calibrated on, and what it keeps of an interrupted run over it."""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.texts import token_windows

_PARTS_FORMAT = 1  # of what an interrupted run leaves; those of another one are not taken


def check_calibration(sequences: int, length: int) -> None:
    """Refuses a calibration that holds no token to predict.

    Raises:
        ConfigurationError: says what is needed.
    """
    if sequences < 1 or length < 2:
        raise ConfigurationError(f"calibration takes at least one sequence of two tokens, got {sequences} of {length}")


def calibration_batches(tokenizer: Any, text: str, sequences: int, length: int) -> list[dict[str, Tensor]]:
    """Sequences of a text, spread over it: ``input_ids`` and ``labels`` (1, length) int64 each.

    Raises:
        ConfigurationError: the text is too short.
    """
    windows = token_windows(tokenizer, text, length)
    if len(windows) < sequences:
        raise ConfigurationError(
            f"the calibration text holds {len(windows)} sequences of {length} tokens, and {sequences} are needed: give "
            "a longer text, or ask for fewer or shorter sequences"
        )
    step = len(windows) / sequences
    chosen = [windows[int(number * step)][None] for number in range(sequences)]
    return [{"input_ids": ids, "labels": ids} for ids in chosen]


def digest(batches: Sequence[dict[str, Tensor]]) -> str:
    """SHA-256 of the tokens, hexadecimal."""
    return hashlib.sha256(torch.cat([batch["input_ids"] for batch in batches]).numpy().tobytes()).hexdigest()


def parts_directory(target: Path, source: Path, settings: dict[str, Any]) -> Path:
    """Where the parts of an unfinished ``target`` are kept: another place for other settings, and for other weights
    under the same name.
    """
    stats = {path.name: path.stat() for path in sorted(source.iterdir()) if path.is_file()}
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]
    key = hashlib.sha256(json.dumps([_PARTS_FORMAT, settings, str(source), files]).encode()).hexdigest()[:12]
    return target.parent / f".{target.name}.unfinished-{key}"


def remove_parts(target: Path) -> None:
    """Removes the parts of a ``target`` that is complete now, those of other settings included."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.unfinished-*"):
        shutil.rmtree(leftover, ignore_errors=True)
