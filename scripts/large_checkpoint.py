"""A Llama of three billion parameters becomes int8 while it is read: how much memory and time that takes.

    python scripts/large_checkpoint.py
    python scripts/large_checkpoint.py --shape 1b --write DIRECTORY

Writes a checkpoint of random bf16 weights (Llama 3.2 3B's shape, 6.4 GB in three shards) below the system's temporary
directory, loads it as int8 in a process of its own, asks it one question, and prints the most anonymous memory the
process had at any time (RssAnon; pages of mapped files are not counted, since the system drops them when it needs to).

With ``--write`` the checkpoint is written to a directory that stays, and nothing else happens. What a model of this
size takes to decode can be measured on it, for that does not depend on the weights: ``gossamer bench decode --model
DIRECTORY``. ``--shape 1b`` is the shape of Llama 3.2 1B (2.5 GB). With ``--sparsity 0.5`` half of the weights of every
linear layer are zero, as after pruning by magnitude.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gossamer.models.shards import ShardWriter, TensorSpec

SHARD_BYTES = 2_200_000_000
BLOCK_ROWS = 4096
SHAPES = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
}


def write_checkpoint(directory: Path, shape: dict[str, int], sparsity: float = 0.0) -> int:
    """Random weights, a block of rows at a time; returns the number of parameters."""
    smallest = math.sqrt(2) * float(torch.erfinv(torch.tensor(sparsity)))  # that many normal numbers are below it
    config = LlamaConfig(
        **shape,
        vocab_size=128256,
        intermediate_size=8192,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name != "lm_head.weight"}
    generator = torch.Generator().manual_seed(0)
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    with ShardWriter(directory, specs, max_shard_bytes=SHARD_BYTES) as writer:
        for name, shape in shapes.items():
            for start in range(0, shape[0], BLOCK_ROWS):
                rows = (min(BLOCK_ROWS, shape[0] - start), *shape[1:])
                block = torch.ones(rows) if len(shape) == 1 else torch.randn(rows, generator=generator) * 0.02
                if name.endswith("_proj.weight"):
                    block[block.abs() < smallest * 0.02] = 0
                writer.write(name, block.bfloat16())
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(["<eos>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def load_and_ask(directory: str) -> None:
    """The child: prints its figures as JSON."""
    peak = [0, 0]  # bytes: of all, and until the model was loaded
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    threading.Thread(target=watch, daemon=True).start()
    from gossamer import LLM, SamplingParams

    before = anonymous_bytes()
    started = time.perf_counter()
    llm = LLM(directory, quantization="int8")
    loaded = time.perf_counter()
    peak[1] = peak[0]
    output = llm.generate("What is the speed limit?", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0]
    answered = time.perf_counter()
    done.set()
    assert llm.quantization_report is not None
    figures = {
        "libraries_bytes": before,
        "peak_bytes_loading": peak[1],
        "peak_bytes": peak[0],
        "int8_bytes": llm.quantization_report.bytes_after,
        "bf16_bytes": llm.quantization_report.bytes_before,
        "load_seconds": round(loaded - started, 1),
        "answer_seconds": round(answered - loaded, 1),
        "tokens": output.outputs[0].token_ids,
    }
    print(json.dumps(figures))


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="3b", help="of Llama 3.2 1B or 3B")
    parser.add_argument("--layers", type=int, help="as many as the shape has by default")
    parser.add_argument("--sparsity", type=float, default=0.0, help="share of the linear layers' weights that are zero")
    parser.add_argument("--write", type=Path, metavar="DIRECTORY", help="only write the checkpoint, and keep it")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load_and_ask(arguments.load)
        return
    shape = SHAPES[arguments.shape]
    if arguments.layers:
        shape = shape | {"num_hidden_layers": arguments.layers}
    if arguments.write:
        arguments.write.mkdir(parents=True)  # not into a directory that is there: it may hold a model
        print(
            f"{write_checkpoint(arguments.write, shape, arguments.sparsity) / 1e9:.2f} billion parameters",
            file=sys.stderr,
        )
        return
    with tempfile.TemporaryDirectory() as directory:
        parameters = write_checkpoint(Path(directory), shape, arguments.sparsity)
        shards = len(list(Path(directory).glob("*.safetensors")))
        print(f"{parameters / 1e9:.2f} billion parameters in {shards} shards", file=sys.stderr)
        command = [sys.executable, __file__, "--load", directory]
        print(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout, end="")


if __name__ == "__main__":
    main()
