"""What runs in the environment of another project: ``python -P child.py SCRIPT`` reads requests, answers each.

Both are JSON objects, one a line, on stdin and stdout. ``command`` of a request names a method of the class ``Decoder``
or ``Encoder`` that SCRIPT defines; the rest are its arguments, and what it returns is the answer. An exception becomes
``{"error": ...}``. An ``Encoder`` documents its methods itself. Those of a ``Decoder``:

``load(model, threads, sequences, context, cache_bytes, dtype)``
    Called once. ``model`` is a path in the project's own format, ``context`` the tokens of the longest sequence there
    will be, ``cache_bytes`` what the keys and values of the largest combination take in 16 bit with the prefix stored
    once. Returns ``{"versions": {package: version}, "weights": number format, "keys": number format}``.
``prepare(prompts, shared, steps)``
    Computes the prompts (B lists of token ids that have the first ``shared`` in common), so that all sequences are
    about to decode. ``steps`` is the most tokens that one of them will have then, with those that it is ahead of the
    others when the last prompt is computed. Returns ``{"prefill_s": seconds}`` of the first ``shared`` tokens alone.
``decode(steps)``
    Greedy, for all sequences. Returns ``{"seconds": ..., "tokens": [...]}``; tokens are B lists of ``steps`` ids.
``release()``
    Forgets the sequences. Returns ``{}``.

Every answer has ``idle_s`` and ``idle_cpu_s`` as well: how long this process has waited for the request, and the
processor time it used meanwhile. That should be none, since it was another contestant's turn.

This file and the scripts import nothing of Gossamer, which is not installed where they run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def load_decoder(script: str) -> Any:
    """An instance of the script's class. The script's directory does not go onto sys.path: it has a vllm.py."""
    spec = importlib.util.spec_from_file_location("decoder", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["decoder"] = module
    spec.loader.exec_module(module)
    return module.Decoder() if hasattr(module, "Decoder") else module.Encoder()


def main() -> None:
    """Answer until stdin ends."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, this process is to be ended
    # Libraries write progress and warnings to stdout, some of them from C++; answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    decoder = None
    rested, used = time.monotonic(), time.process_time()
    for line in sys.stdin:
        idle = {"idle_s": time.monotonic() - rested, "idle_cpu_s": time.process_time() - used}
        try:
            request = json.loads(line)
            if decoder is None:
                decoder = load_decoder(sys.argv[1])
            answer = json.dumps(getattr(decoder, request.pop("command"))(**request) | idle)
        except Exception as error:  # other projects raise what they like; the caller shows it, and the others go on
            traceback.print_exc()
            answer = json.dumps({"error": f"{type(error).__name__}: {error}"})
        answers.write(answer + "\n")
        answers.flush()
        rested, used = time.monotonic(), time.process_time()


if __name__ == "__main__":
    main()
