"""CTranslate2: int8 weights; the prefix is a static prompt, computed once and copied into every sequence."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Decoder:
    """See child.py for the methods.

    Its generator runs from prompts to answers in one call and cannot be halted, so that every turn begins again after
    the static prompt. A callback takes the time at which each step ends.
    """

    def load(
        self, model: str, threads: int, sequences: int, context: int, cache_bytes: int, dtype: str
    ) -> dict[str, Any]:
        self.model, self.threads = model, threads
        self.vocabulary = json.loads((Path(model) / "vocabulary.json").read_text())  # it takes tokens as texts
        packages = ("ctranslate2",)
        return {"versions": {name: version(name) for name in packages}, "weights": "int8", "keys": "float32"}

    def prepare(self, prompts: list[list[int]], shared: int, steps: int) -> dict[str, Any]:
        import ctranslate2

        # a generator keeps all static prompts it has seen, so that each combination gets a new one
        self.generator: Any = ctranslate2.Generator(
            self.model, device="cpu", compute_type="int8", intra_threads=self.threads, inter_threads=1
        )
        self.prefix = self._texts(prompts[0][:shared])
        self.suffixes = [self._texts(prompt[shared:]) for prompt in prompts]
        one = [self.suffixes[0][:1]]
        self._generate(one, self.prefix[-512:][::-1], 1)  # another text: what is set up on first use is not timed
        start = time.perf_counter()
        self._generate(one, self.prefix, 1)
        return {"prefill_s": time.perf_counter() - start}

    def decode(self, steps: int) -> dict[str, Any]:
        ends: dict[int, float] = {}
        results = self._generate(self.suffixes, self.prefix, steps + 1, ends)
        tokens = [result.sequences_ids[0][1:] for result in results]
        return {"seconds": ends[max(ends)] - ends[min(ends)], "tokens": tokens}

    def release(self) -> dict[str, Any]:
        del self.generator
        return {}

    def _texts(self, tokens: list[int]) -> list[str]:
        return [self.vocabulary[token] for token in tokens]

    def _generate(
        self, suffixes: list[list[str]], prefix: list[str], new: int, ends: dict[int, float] | None = None
    ) -> Any:
        """Generate ``new`` tokens after each suffix; ``ends`` gets the time at which each step ended."""

        def note(result: Any) -> bool:
            if ends is not None:
                ends[result.step] = time.perf_counter()
            return False

        return self.generator.generate_batch(
            suffixes,
            static_prompt=prefix,
            max_length=new,
            min_length=new,  # no end before
            include_prompt_in_result=False,
            callback=note,
        )
