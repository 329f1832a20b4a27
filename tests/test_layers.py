"""What imports what."""

from __future__ import annotations

import subprocess
import sys


def test_the_scheduler_needs_no_model() -> None:
    code = "import sys, gossamer.engine.scheduler; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
