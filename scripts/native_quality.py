"""Prints what the native kernels change: perplexity of int8 layers, natively against their PyTorch reference.

    .venv/bin/python scripts/native_quality.py --windows 4      (about a minute)

Windows of 1,024 tokens of Python's language reference; with the output layer in 16 bit and in int8, and with keys and
values of each type.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from gossamer import LLM
from gossamer.bench.text import reference_text

WINDOW = 1024


def perplexity(model: str, windows: int, **arguments: Any) -> float:
    llm = LLM(model, quantization="int8", **arguments)
    ids = llm.tokenizer.encode(reference_text(), add_special_tokens=False)
    prompts = [{"prompt_token_ids": ids[start : start + WINDOW]} for start in range(0, windows * WINDOW, WINDOW)]
    logprobs = [x for output in llm.score(prompts, use_tqdm=False) for x in output.token_logprobs if x is not None]
    return math.exp(-sum(logprobs) / len(logprobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=4)
    arguments = parser.parse_args()
    for int8_head in (False, True):
        run = {"int8_head": int8_head}
        reference = perplexity(arguments.model, arguments.windows, runner="transformers", **run)
        print(f"output layer in {'int8' if int8_head else '16 bit'}: reference {reference:.4f}", flush=True)
        for kv_dtype in ("bfloat16", "float32", "int8"):
            found = perplexity(arguments.model, arguments.windows, runner="native", kv_dtype=kv_dtype, **run)
            print(f"  native, keys and values in {kv_dtype}: {found:.4f} ({found / reference - 1:+.4%})", flush=True)


if __name__ == "__main__":
    main()
