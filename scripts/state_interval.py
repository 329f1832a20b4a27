"""What keeping states on the way through a prefix costs in memory, and saves in tokens that are gone through again.

Prompts come one after the other; three of four part from an earlier one at a random place. A tiny hybrid model computes
them: tokens and bytes are counted, not timed.

    python scripts/state_interval.py
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def main() -> None:
    from architectures import VOCAB, make_model
    from gossamer.engine.engine import Engine
    from gossamer.options import EngineOptions
    from gossamer.runners.transformers import IMPLEMENTATION, TransformersRunner
    from test_exactness import NumberTokenizer, answers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--intervals", default="64,128,256,512,1024,2048,100000")
    given = parser.parse_args()
    draw = random.Random(0)
    prompts: list[list[int]] = []
    for _ in range(given.prompts):
        length = draw.randrange(600, 4000)
        base: list[int] = []
        if prompts and draw.random() < 0.75:
            other = draw.choice(prompts)
            base = other[: draw.randrange(len(other) // 4, len(other))]
        prompts.append(base[:length] + draw.choices(range(VOCAB), k=max(length - len(base), 20)))
    model = make_model("qwen3_5", max_position_embeddings=8192)
    model.set_attn_implementation(IMPLEMENTATION)
    needed = sum(
        len(prompt) - max((_common(prompt, other) for other in prompts[:i]), default=0)
        for i, prompt in enumerate(prompts)
    )
    runner = TransformersRunner(model)
    print("| tokens between states | gone through again, of those computed | states kept per 1,000 tokens |")
    print("|---|---|---|")
    for interval in map(int, given.intervals.split(",")):
        engine = Engine(runner, NumberTokenizer(), EngineOptions(state_interval=interval))
        for prompt in prompts:
            answers(engine, [prompt], 1)
        again = engine.stats.computed_tokens - needed
        states, tokens = sum(len(node.states) for node in engine.tree), sum(len(node) for node in engine.tree)
        name = f"{interval:,}" if interval < 100000 else "none on the way"
        print(f"| {name} | {again / engine.stats.computed_tokens:.1%} | {1000 * states / tokens:.1f} |", flush=True)


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


if __name__ == "__main__":
    main()
