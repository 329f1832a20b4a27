"""llama.cpp through its C interface: the weights of a GGUF file, one unified cache, flash attention.

The prefix is computed on sequence 0 and becomes part of the others by ``llama_memory_seq_cp``, which copies nothing.
Every step submits one token per sequence.
"""

from __future__ import annotations

import ctypes
import sys
import time
from importlib.metadata import version
from typing import Any

_WARNING = 3  # GGML_LOG_LEVEL_WARN


def _log(level: int, text: bytes, user_data: Any) -> None:
    """By default every graph that is built is described."""
    if level >= _WARNING:
        sys.stderr.write(text.decode(errors="replace"))


class Decoder:
    """See child.py for the methods."""

    def load(
        self, model: str, threads: int, sequences: int, context: int, cache_bytes: int, dtype: str
    ) -> dict[str, Any]:
        import llama_cpp

        self.lib: Any = llama_cpp
        self.threads = threads
        self.log = llama_cpp.llama_log_callback(_log)  # kept: the library holds no reference of its own
        llama_cpp.llama_log_set(self.log, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama_model_load_from_file cannot read {model}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        packages = ("llama-cpp-python",)
        described = ctypes.create_string_buffer(128)  # such as "qwen2 1.5B Q4_K - Medium"
        llama_cpp.llama_model_desc(self.model, described, len(described))
        weights = described.value.decode(errors="replace")
        return {"versions": {name: version(name) for name in packages}, "weights": weights, "keys": "float16"}

    def prepare(self, prompts: list[list[int]], shared: int, steps: int) -> dict[str, Any]:
        lib, batch = self.lib, len(prompts)
        params = lib.llama_context_default_params()
        params.n_ctx = shared + batch * (len(prompts[0]) - shared + steps)
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = True
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama_init_from_model has no context of {params.n_ctx} tokens to give")
        self.chunk = params.n_batch
        self.rows = lib.llama_batch_init(self.chunk, 0, 1)
        memory = lib.llama_get_memory(self.context)

        prefix = [(token, position, 0) for position, token in enumerate(prompts[0][:shared])]
        # another text first: what is set up on first use is not timed
        self._compute([(token, position, 0) for position, (token, _, _) in enumerate(prefix[-512:][::-1])])
        lib.llama_memory_clear(memory, True)
        start = time.perf_counter()
        self._compute(prefix)
        seconds = time.perf_counter() - start

        for sequence in range(1, batch):
            lib.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        suffixes = [list(enumerate(prompt))[shared:] for prompt in prompts]
        self.last = self._compute([(token, n, i) for i, suffix in enumerate(suffixes) for n, token in suffix])
        self.position = len(prompts[0])
        return {"prefill_s": seconds}

    def decode(self, steps: int) -> dict[str, Any]:
        tokens = []
        start = time.perf_counter()
        for _ in range(steps):
            rows = [(token, self.position, sequence) for sequence, token in enumerate(self.last)]
            self.last = self._compute(rows)
            self.position += 1
            tokens.append(self.last)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": [list(own) for own in zip(*tokens, strict=True)]}

    def release(self) -> dict[str, Any]:
        self.lib.llama_batch_free(self.rows)
        self.lib.llama_free(self.context)
        return {}

    def _compute(self, rows: list[tuple[int, int, int]]) -> list[int]:
        """Submit rows (token, position, sequence); returns the next token after the last row of each sequence."""
        import numpy as np

        found: list[int] = []
        last = {sequence: number for number, (_, _, sequence) in enumerate(rows)}
        for first in range(0, len(rows), self.chunk):
            part = rows[first : first + self.chunk]
            wanted = 0
            self.rows.n_tokens = len(part)
            for n, (token, position, sequence) in enumerate(part):
                self.rows.token[n], self.rows.pos[n] = token, position
                self.rows.n_seq_id[n], self.rows.seq_id[n][0] = 1, sequence
                self.rows.logits[n] = last[sequence] == first + n
                wanted += self.rows.logits[n]
            if code := self.lib.llama_decode(self.context, self.rows):
                raise RuntimeError(f"llama_decode returned {code}")
            if wanted:
                logits = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (wanted, self.vocabulary))
                found += logits.argmax(axis=1).tolist()
            else:
                self.lib.llama_synchronize(self.context)
        return found
