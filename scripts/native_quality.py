"""Prints what the native kernels change: perplexity of int8 layers, natively against their PyTorch reference.

    .venv/bin/python scripts/native_quality.py --windows 4      (about a minute)

Windows of 1,024 tokens of Python's language reference; with the output layer in 16 bit and in int8, and with keys and
values of each type. Behind +- stands the standard error of the change, from the differences of single tokens: whatever
rounds elsewhere moves codes, and with them the loss of every token a little.
"""

from __future__ import annotations

import argparse
import math
import statistics
from typing import Any

from gossamer import LLM
from gossamer.texts import reference_text

WINDOW = 1024


def logprobs(model: str, windows: int, **arguments: Any) -> list[float]:
    llm = LLM(model, quantization="int8", **arguments)
    ids = llm.tokenizer.encode(reference_text(), add_special_tokens=False)
    prompts = [{"prompt_token_ids": ids[start : start + WINDOW]} for start in range(0, windows * WINDOW, WINDOW)]
    return [x for output in llm.score(prompts, use_tqdm=False) for x in output.token_logprobs if x is not None]


def perplexity(found: list[float]) -> float:
    return math.exp(-statistics.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=4)
    arguments = parser.parse_args()
    for int8_head in (False, True):
        run = {"int8_head": int8_head}
        reference = logprobs(arguments.model, arguments.windows, runner="transformers", **run)
        print(f"output layer in {'int8' if int8_head else '16 bit'}: reference {perplexity(reference):.4f}", flush=True)
        for kv_dtype in ("bfloat16", "float32", "int8"):
            found = logprobs(arguments.model, arguments.windows, runner="native", kv_dtype=kv_dtype, **run)
            losses = [a - b for a, b in zip(reference, found, strict=True)]
            error = statistics.stdev(losses) / math.sqrt(len(losses))
            change = perplexity(found) / perplexity(reference) - 1
            print(
                f"  native, keys and values in {kv_dtype}: {perplexity(found):.4f} ({change:+.3%} +- {error:.3%})",
                flush=True,
            )


if __name__ == "__main__":
    main()
