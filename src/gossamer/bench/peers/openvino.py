"""OpenVINO GenAI: int8 weights, continuous batching with prefix caching, its pipeline stepped by hand."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Decoder:
    """See child.py for the methods."""

    def load(
        self, model: str, threads: int, sequences: int, context: int, cache_bytes: int, dtype: str
    ) -> dict[str, Any]:
        import openvino

        self.model, self.sequences = model, sequences
        self.properties = {"INFERENCE_NUM_THREADS": threads}
        self.cache_gb = cache_bytes // 10**9 + 1
        # the pipeline does not tell what its keys and values are, but the model on the same device does
        compiled = openvino.Core().compile_model(Path(model) / "openvino_model.xml", "CPU", self.properties)
        keys = compiled.get_property("KV_CACHE_PRECISION").get_type_name()
        packages = ("openvino-genai", "openvino")
        return {"versions": {name: version(name) for name in packages}, "weights": "int8", "keys": keys}

    def prepare(self, prompts: list[list[int]], shared: int, steps: int) -> dict[str, Any]:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.cache_size = self.cache_gb
        scheduler.max_num_seqs = max(scheduler.max_num_seqs, self.sequences)
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, self.sequences)
        # a pipeline cannot forget prefixes, so that each combination gets a new one
        self.pipeline: Any = openvino_genai.ContinuousBatchingPipeline(self.model, scheduler, "CPU", self.properties)
        self._compute(prompts[0][:shared][-512:][::-1])  # another text: what is set up on first use is not timed
        start = time.perf_counter()
        self._compute(prompts[0][:shared])
        seconds = time.perf_counter() - start
        self.handles = [self._add(number, prompt, steps) for number, prompt in enumerate(prompts)]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        while not all(self.tokens):
            self._step()
        return {"prefill_s": seconds}

    def decode(self, steps: int) -> dict[str, Any]:
        before = [len(tokens) for tokens in self.tokens]
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": [own[n:] for own, n in zip(self.tokens, before, strict=True)]}

    def release(self) -> dict[str, Any]:
        del self.handles, self.pipeline
        return {}

    def _compute(self, tokens: list[int]) -> None:
        handle = self._add(0, tokens, 1)  # dropped, it would cancel the request
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        handle.read()

    def _add(self, number: int, tokens: list[int], new: int) -> Any:
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = new
        config.ignore_eos = True
        config.do_sample = False
        return self.pipeline.add_request(number, openvino.Tensor(np.array([tokens], dtype=np.int64)), config)

    def _step(self) -> None:
        self.pipeline.step()
        for handle, tokens in zip(self.handles, self.tokens, strict=True):
            if handle.can_read():
                for output in handle.read().values():
                    tokens.extend(output.generated_ids)
