"""transformers: its model and its DynamicCache, in which every sequence has a copy of the prefix."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any


class Decoder:
    """See child.py for the methods."""

    def load(
        self, model: str, threads: int, sequences: int, context: int, cache_bytes: int, dtype: str
    ) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch: Any = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True).eval()
        form = str(self.model.dtype).removeprefix("torch.")
        packages = ("transformers", "torch")
        return {"versions": {name: version(name) for name in packages}, "weights": form, "keys": form}

    def prepare(self, prompts: list[list[int]], shared: int, steps: int) -> dict[str, Any]:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache(config=self.model.config)
        # another text first: what is set up on first use is not timed
        self._forward([prompts[0][:shared][-512:][::-1]])
        self.cache = DynamicCache(config=self.model.config)
        start = time.perf_counter()
        self._forward([prompts[0][:shared]])
        seconds = time.perf_counter() - start
        self.cache.batch_repeat_interleave(len(prompts))
        self.last = self._forward([prompt[shared:] for prompt in prompts])
        return {"prefill_s": seconds}

    def decode(self, steps: int) -> dict[str, Any]:
        tokens = []
        start = time.perf_counter()
        for _ in range(steps):
            self.last = self._forward(self.last)
            tokens.append(self.last)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": self.torch.cat(tokens, dim=1).tolist()}

    def release(self) -> dict[str, Any]:
        del self.cache, self.last
        return {}

    def _forward(self, tokens: Any) -> Any:
        """(B, n) ids -> the next id of each sequence (B, 1)."""
        ids = self.torch.as_tensor(tokens)
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1)
