"""The engine without a server, in a process of its own: what a server can reach at best. See ``peers/child.py``."""

from __future__ import annotations

import time
from typing import Any


class Decoder:
    """Not another project, but asked like one."""

    def load(self, model: str, **arguments: Any) -> dict[str, Any]:
        """Arguments are those of :class:`gossamer.LLM`."""
        from gossamer import LLM

        self.llm = LLM(model, **arguments)
        return {}

    def generate(self, prompts: list[str | list[int]], new: int) -> dict[str, Any]:
        """Answer all of them; returns seconds and tokens."""
        from gossamer import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        asked: list[Any] = [each if isinstance(each, str) else {"prompt_token_ids": each} for each in prompts]
        start = time.perf_counter()
        outputs = self.llm.generate(asked, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "completion_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
            "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
            "cached_tokens": sum(output.num_cached_tokens for output in outputs),
        }
