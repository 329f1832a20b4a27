"""Damaged model files end in an error that names them, or load: some here, others by ``scripts/damaged_files.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "damaged_files.py"


def test_some_damaged_files_are_refused_or_load() -> None:
    run = subprocess.run([sys.executable, SCRIPT, "--count", "30"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1] == "30 files, 0 faults"
