"""Stands in for the program that follows grammars: some choices and some tokens have it work without end.

Not imported by tests: they have it run as that program.
"""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from typing import Any

REAL = Path(__file__).parent.parent / "src/gossamer/engine/grammar/program.py"


def spin() -> None:
    """Work that ends by no means of its own."""
    while True:
        time.perf_counter()


def main() -> None:
    real = runpy.run_path(str(REAL), run_name="program")
    compile_form, next_masks = real["compile_form"], real["next_masks"]

    def slow_compile(form: dict[str, Any], trie: Any) -> Any:
        if "slow to compile" in form.get("choice", ()):
            spin()
        return compile_form(form, trie)

    def slow_masks(matcher: Any, tokens: list[int], *others: Any) -> Any:
        answer = next_masks(matcher, tokens, *others)
        if ord("~") - ord("!") + 1 in tokens:  # in the tests' tokenizer, of one token per byte
            spin()
        return answer

    namespace = real["main"].__globals__
    namespace["compile_form"], namespace["next_masks"] = slow_compile, slow_masks
    real["main"]()


if __name__ == "__main__":
    main()
