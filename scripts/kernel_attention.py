"""Attention of real heads within a tolerance, beside exact attention: time and error of every layer.

    .venv/bin/python scripts/kernel_attention.py --length 8192 --eps 0.1 --heads 1

Queries, keys and values are those of a language model on Python's language reference, after rotary embedding. Exact is
PyTorch's flash attention. Without a causal mask, every query over all keys, as over a long shared prefix; with --causal
as in a prompt. "first" builds the index of keys and queries, "again" has it. The error is the root mean square over
queries of what the output is off by, over that of the values around their mean; "said" is the reported one, which
counts what the log-sum-exp is off by as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from real_heads import RealHeads
from torch import Tensor

from gossamer.operators.gaussian.attention import KernelAttention
from gossamer.operators.gaussian.report import ProductReport


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--heads", type=int, default=1, help="of every layer")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    model = RealHeads(arguments.model)
    length = min(arguments.length, model.longest, len(model.ids))
    every = model.heads // arguments.heads
    wanted = {(layer, every * head) for layer in range(model.layers) for head in range(arguments.heads)}
    print(f"{length} tokens, eps = {arguments.eps:g}, {torch.get_num_threads()} threads, seconds")
    print(
        f"{'layer':>5}{'head':>5}{'flash':>8}{'first':>8}{'again':>8}{'flash / again':>15}"
        f"{'error':>8}{'said':>7}{'of K':>7}  how"
    )
    faster, kept = [], 0
    for (layer, head), (q, k, v) in model.on_text(0, length, wanted).items():
        times, error, report = compare(q, k, v, arguments.causal, arguments.eps, arguments.repeats)
        flash, first, again = times
        figures = f"{flash:8.3f}{first:8.3f}{again:8.3f}{flash / again:15.2f}{error:8.3f}{report.error:7.3f}"
        print(f"{layer:5}{head:5}{figures}{report.entries:7.2f}  {report.mode}", flush=True)
        kept += error <= arguments.eps
        if again < flash:
            faster.append(f"{layer}.{head}")
    print(f"within eps: {kept} of {len(wanted)} heads")
    print(f"faster than flash attention with the index known: {', '.join(faster) or 'none'}")


def compare(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, eps: float, repeats: int
) -> tuple[tuple[float, float, float], float, ProductReport]:
    """Seconds of flash attention and of ours, the first time and again; the error; the report."""
    attention = KernelAttention(q, k, causal)
    batch = [part[None, None] for part in (q, k, v)]
    first, _ = timed(lambda: attention.apply(v, eps))
    flash, again = [], []
    for _ in range(repeats):
        exact_time, exact = timed(lambda: torch.nn.functional.scaled_dot_product_attention(*batch, is_causal=causal))
        our_time, product = timed(lambda: attention.apply(v, eps))
        flash.append(exact_time)
        again.append(our_time)
    spread = (v - v.mean(0)).square().sum(1).mean().sqrt()
    error = float((product.state.out - exact).square().sum(-1).mean().sqrt() / spread)
    return (statistics.median(flash), first, statistics.median(again)), error, product.report


if __name__ == "__main__":
    main()
