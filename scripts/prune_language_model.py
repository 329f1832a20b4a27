"""Prunes a language model in one shot, by every curvature, and prints perplexities of text that none of them saw.

    .venv/bin/python scripts/prune_language_model.py --pattern unstructured
    .venv/bin/python scripts/prune_language_model.py --pattern 2:4 --seeds 0 1 --methods sparsegpt gram-reconstructed

Half of the linear layers' weights become zero; the embedding and the output layer stay. The text is Python's language
reference, each of its paragraphs once: the first three quarters to calibrate with, the rest to measure on. A seed draws
the calibration sequences, the same for all methods. SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774) is written
here after the paper, to compare with: column by column, in blocks of 128, with its damping of 0.01.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gossamer.models import resolve_model
from gossamer.models.load import load_model
from gossamer.pruning import (
    NM,
    BlockFisher,
    DiagFisher,
    LayerGram,
    Magnitude,
    MFACFisher,
    Pruner,
    Reconstruction,
    Wanda,
    decoder_blocks,
)
from gossamer.pruning.blocks import BlockRun
from gossamer.pruning.patterns import Pattern, parse_pattern
from gossamer.pruning.quadratic import SharedGram
from gossamer.pruning.statistics import begin, watching
from gossamer.pruning.targets import find_targets
from gossamer.report.quality import evaluate
from gossamer.texts import reference_topics

SPARSITY = 0.5
WINDOW = 1024  # tokens that are measured on together


def texts() -> tuple[str, str]:
    """To calibrate with, and to measure on."""
    seen: dict[str, None] = {}
    for topic in reference_topics():
        seen.update(dict.fromkeys(part for part in topic.split("\n\n") if part.strip()))
    paragraphs = list(seen)
    cut = len(paragraphs) * 3 // 4
    return "\n\n".join(paragraphs[:cut]), "\n\n".join(paragraphs[cut:])


def sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """A weight (N, K) pruned as the paper does; ``hessian`` (K, K) is damped."""
    weight = weight.clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    for first in range(0, weight.shape[1], 128):
        last = min(first + 128, weight.shape[1])
        part, square = weight[:, first:last].clone(), factor[first:last, first:last]
        errors, drop = torch.zeros_like(part), torch.zeros_like(part, dtype=torch.bool)
        if not isinstance(pattern, NM):
            scores = (part / square.diagonal()) ** 2
            drop = scores <= scores.flatten().kthvalue(int(scores.numel() * SPARSITY)).values
        for column in range(last - first):
            if isinstance(pattern, NM) and column % pattern.m == 0:
                group = slice(column, column + pattern.m)
                scores = (part[:, group] / square.diagonal()[group]) ** 2
                chosen = scores.topk(pattern.m - pattern.n, dim=1, largest=False).indices
                drop.scatter_(1, column + chosen, True)
            kept = torch.where(drop[:, column], 0.0, part[:, column])
            error = (part[:, column] - kept) / square[column, column]
            part[:, column:] -= error[:, None] * square[column, column:]
            part[:, column], errors[:, column] = kept, error
        weight[:, first:last] = part
        weight[:, last:] -= errors @ factor[first:last, last:]
    return weight


@torch.no_grad()
def prune_with_sparsegpt(model: Any, batches: list[dict[str, Tensor]], pattern: Pattern) -> None:
    blocks = decoder_blocks(model)
    run = BlockRun(model, blocks, batches)
    for index, block in enumerate(blocks):
        targets = find_targets(block)
        seen = begin(targets, LayerGram())
        with watching(targets, seen):
            run.outputs(index, run.hidden)
        for name, target in targets.items():
            form = seen[name].quadratic(0.01 * seen[name].scale)
            assert isinstance(form, SharedGram)
            target.write(sparsegpt(target.read(), form.matrix, pattern))
        run.hidden = run.outputs(index, run.hidden)


def methods(model: Any, pattern: str, epochs: int) -> dict[str, Callable[[], Pruner]]:
    """By name, what makes the pruner; every one of them gets the same sequences."""
    blocks = decoder_blocks(model)
    everywhere, layer, row = (
        parse_pattern(pattern, "global"),
        parse_pattern(pattern, "layer"),
        parse_pattern(pattern, "row"),
    )
    train = Reconstruction(epochs)
    return {
        "magnitude": lambda: Pruner(model, Magnitude(), layer, "none"),
        "wanda": lambda: Pruner(model, Wanda(), row, "none", blocks=blocks),
        "gram": lambda: Pruner(model, LayerGram(), layer, blocks=blocks),
        "diagonal-fisher": lambda: Pruner(model, DiagFisher(), everywhere, "none"),
        "block-fisher": lambda: Pruner(model, BlockFisher(16), everywhere),
        "mfac": lambda: Pruner(model, MFACFisher(32), everywhere),
        "gram-reconstructed": lambda: Pruner(model, LayerGram(), layer, blocks=blocks, reconstruction=train),
        "block-fisher-reconstructed": lambda: Pruner(
            model, BlockFisher(16), everywhere, blocks=blocks, reconstruction=train
        ),
    }


def sequences(ids: list[int], count: int, length: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - length, (count,), generator=generator).tolist()
    parts = [torch.tensor(ids[start : start + length])[None] for start in starts]
    return [{"input_ids": part, "labels": part} for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pattern", default="unstructured", help="unstructured, 2:4, block4 ...")
    parser.add_argument("--methods", nargs="*", help="some of the methods; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration sequences")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=2, help="of reconstruction")
    parser.add_argument("--windows", type=int, default=16, help=f"of {WINDOW} tokens that are measured")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each run too")
    arguments = parser.parse_args()
    model, tokenizer = load_model(resolve_model(arguments.model), dtype="float32")
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate, measure = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts())
    held = [torch.tensor(measure[at : at + WINDOW]) for at in range(0, len(measure) - WINDOW + 1, WINDOW)]
    held = held[: arguments.windows]
    print(f"dense: {evaluate(model, held).perplexity:.3f} on {len(held)} windows of {WINDOW} tokens", flush=True)
    known = methods(model, arguments.pattern, arguments.epochs)
    for name in arguments.methods or ["sparsegpt", *known]:
        found, seconds = [], []
        for seed in arguments.seeds:
            model.load_state_dict(dense)
            batches = sequences(calibrate, arguments.sequences, arguments.length, seed)
            start = time.perf_counter()
            if name == "sparsegpt":
                prune_with_sparsegpt(model, batches, parse_pattern(arguments.pattern))
                report = None
            else:
                pruner = known[name]()
                # measuring the loss would take as long as pruning does; what counts is the held-out text
                loss = (lambda outputs, batch: outputs.loss) if pruner.curvature.source == "gradients" else None
                report = pruner.prune_to(SPARSITY, batches, loss)
            seconds.append(time.perf_counter() - start)
            found.append(evaluate(model, held).perplexity)
            if arguments.json:
                line = {"method": name, "seed": seed, "perplexity": found[-1], "seconds": seconds[-1]}
                line |= {"report": None if report is None else report.to_dict() | {"layers": None}}
                print(json.dumps(line), flush=True)
        spread = f" +- {statistics.stdev(found):.3f}" if len(found) > 1 else ""
        print(f"{name:28} {statistics.mean(found):8.3f}{spread}   {statistics.mean(seconds):6.0f} s", flush=True)


if __name__ == "__main__":
    main()
