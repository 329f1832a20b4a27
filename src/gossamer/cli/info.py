"""``gossamer info``: what a bug report or a benchmark needs to know about this installation."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import typer

from gossamer.cli.engine_options import AsJson

# The instruction sets that decide how fast matrix products are, as Linux spells them (x86, then Arm).
_MATRIX_FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "avx512_bf16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)


def info(as_json: AsJson = False) -> None:
    """Show versions, the processor's abilities and where models are kept."""
    facts = _collect()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        shown = " ".join(value) if isinstance(value, list) else value
        typer.echo(f"{name.replace('_', ' '):16}{shown}")


def _collect() -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    from gossamer.kernels.library import core, instruction_set, instruction_sets
    from gossamer.models.cache import cache_directory

    processor, flags = _processor()
    return {
        "gossamer": version("gossamer"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "platform": platform.platform(),
        "processor": processor,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_kernels": (instruction_set() or "switched off") if core() else "not installed",
        "native_choices": instruction_sets(),
        "cpu_flags": [flag for flag in _MATRIX_FLAGS if flag in flags],
        "cache_directory": str(cache_directory()),
    }


def _processor() -> tuple[str, set[str]]:
    """Name and flags of the processor; flags are only known on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor(), set()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor()
    return name, set((fields.get("flags") or fields.get("Features") or "").split())
