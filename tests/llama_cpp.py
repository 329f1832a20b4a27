"""llama.cpp as an independent reader of GGUF files, in an environment of its own (``LLAMA_CPP_PYTHON``)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

PYTHON = os.environ.get("LLAMA_CPP_PYTHON", str(Path(__file__).parents[1] / ".venv-bench/llama.cpp/bin/python"))
_LOGPROBS = """
import json, sys
import numpy as np
from llama_cpp import Llama
ids = json.loads(sys.argv[2])
model = Llama(sys.argv[1], n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
model.eval(ids)
scores = np.array(model.scores[: len(ids)], dtype=np.float64)
scores -= scores.max(1, keepdims=True)
logprobs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
print(json.dumps([float(logprobs[i, each]) for i, each in enumerate(ids[1:])]))
"""


def logprobs(file: Path, ids: Sequence[int]) -> np.ndarray:
    """Log-probability of every token but the first."""
    if not Path(PYTHON).exists():
        pytest.skip("llama-cpp-python is not installed; see LLAMA_CPP_PYTHON")
    command = [PYTHON, "-c", _LOGPROBS, str(file), json.dumps(list(ids))]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return np.array(json.loads(run.stdout.strip().splitlines()[-1]))
