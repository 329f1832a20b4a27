"""How far 4-bit files are from the model they were made of: ours, and llama.cpp's Q4_K_M with an importance matrix.

    .venv/bin/python scripts/int4_quality.py --model smollm2-135m
    .venv/bin/python scripts/int4_quality.py --model gemma3-270m --sequences 16

Perplexity ratio and KL(original || quantized) in nats per token of text that neither was calibrated on, in fp32 with
the weights of each file dequantized, and the sizes of the files. Both sides calibrate on the same sequences of Python's
language reference: ours takes the second moments of each layer's inputs, and llama.cpp's quantization the mean squares
that its llama-imatrix collects, computed here. llama.cpp is called through llama-cpp-python in an environment of its
own (``make .venv-bench/llama.cpp/.installed``, or LLAMA_CPP_PYTHON).

The models that can be fetched by name are 4-bit themselves, so their weights lie on a grid that a second rounding may
meet again. Unless ``--as-stored`` is given, each is first changed to one that computes the same: inputs of linear
layers are scaled by random factors between 1/2 and 2 in the norms and rows before them, and back in their columns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, get_tensor_name_map
from prune_language_model import texts
from torch import Tensor, nn

from gossamer.compress.calibration import calibration_batches
from gossamer.compress.export import export
from gossamer.compress.gguf_metadata import find_architecture
from gossamer.compress.int4 import Int4Recipe, compress_int4
from gossamer.models import resolve_model
from gossamer.models.load import load_model
from gossamer.pruning import Wanda, decoder_blocks
from gossamer.pruning.statistics import begin, see_inputs
from gossamer.pruning.targets import find_targets
from gossamer.report.quality import Evaluation, Quality
from gossamer.texts import token_windows

LLAMA_CPP = os.environ.get("LLAMA_CPP_PYTHON", str(Path(__file__).parents[1] / ".venv-bench/llama.cpp/bin/python"))
QUANTIZE = """
import ctypes, sys
import numpy as np, llama_cpp
source, target, matrix = sys.argv[1:]
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 1
if matrix:
    arrays = {name: np.ascontiguousarray(values, np.float32) for name, values in np.load(matrix).items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()  # ends with an empty one
    for entry, (name, values) in zip(entries, arrays.items()):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    parameters.imatrix = entries
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))
"""


def rescale(model: Any) -> None:
    """Takes the weights off the grid that they were stored on; what the model computes stays."""
    generator = torch.Generator().manual_seed(0)
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    offset = find_architecture(model.config).norm_offset

    def factors(size: int) -> Tensor:
        return torch.exp2(torch.rand(size, generator=generator) * 2 - 1)

    for block in decoder_blocks(model):
        attention, mlp = block.self_attn, block.mlp
        before_mlp = getattr(block, "pre_feedforward_layernorm", None) or block.post_attention_layernorm
        for norm, layers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (before_mlp, (mlp.gate_proj, mlp.up_proj)),
        ):
            scale = factors(len(norm.weight))
            norm.weight.add_(offset).div_(scale).sub_(offset)
            for layer in layers:
                layer.weight.mul_(scale)
        _move(mlp.up_proj, mlp.down_proj, scale := factors(mlp.up_proj.weight.shape[0]), scale)
        scale = factors(attention.v_proj.weight.shape[0])
        per_head = scale.view(groups, 1, -1).expand(groups, heads // groups, -1).flatten()
        _move(attention.v_proj, attention.o_proj, scale, per_head)


def _move(first: nn.Linear, second: nn.Linear, rows: Tensor, columns: Tensor) -> None:
    first.weight.div_(rows[:, None])
    if first.bias is not None:
        first.bias.div_(rows)
    second.weight.mul_(columns)


def importance_matrix(model: Any, batches: list[dict[str, Tensor]], path: Path) -> None:
    """Mean squares of each layer's inputs under the names of GGUF, as llama-imatrix collects them."""
    targets = find_targets(model)
    statistics = begin(targets, Wanda())
    see_inputs(model, targets, statistics, [batch["input_ids"] for batch in batches])
    names = get_tensor_name_map(find_architecture(model.config).gguf, model.config.num_hidden_layers)
    means = {name: statistics[name].quadratic(0.0).diagonal[0].numpy() for name in targets}
    np.savez(path, **{f"{names.get_name(name.removesuffix('.weight'))}.weight": value for name, value in means.items()})


def llama_cpp_quantize(source: Path, target: Path, matrix: Path | None) -> Path:
    if not target.exists():
        command = [LLAMA_CPP, "-c", QUANTIZE, str(source), str(target), str(matrix or "")]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"llama.cpp did not quantize {source}: {run.stderr[-2000:]}")
    return target


def files(source: Path, directory: Path, text: str, args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """What is compared: names and GGUF files."""
    model, tokenizer = load_model(source, "float32")
    if Path(LLAMA_CPP).exists():
        batches = calibration_batches(tokenizer, text, args.sequences, args.length)
        matrix, floats = directory / "importance.npz", directory / "f32.gguf"
        if not matrix.exists():
            importance_matrix(model, batches, matrix)
            export(source, floats, "gguf", type="f32", overwrite=True)
        yield "llama.cpp", llama_cpp_quantize(floats, directory / "plain.gguf", None)
        yield "llama.cpp, importance matrix", llama_cpp_quantize(floats, directory / "weighted.gguf", matrix)
    else:
        print(f"llama.cpp is left out: there is no {LLAMA_CPP}")
    nearest, second = directory / "nearest.gguf", directory / "second.gguf"
    if not nearest.exists():
        export(source, nearest, "gguf", type="q4_k_m")
    yield "ours, to the nearest", nearest
    if not second.exists():
        compress_int4(source, second, Int4Recipe("q4_k_m", args.sequences, args.length), text)
    yield "ours, second order", second


class Latest:
    """A model that remembers its latest answer, which several are compared with."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._ids, self._answer = torch.empty(0), None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        if not torch.equal(self._ids, input_ids):
            self._ids, self._answer = input_ids, self.model(input_ids=input_ids, **options)
        return self._answer


def describe(kind: str, file: Path, found: Quality) -> dict[str, Any]:
    """Prints the figures of a file."""
    assert found.kl_interval is not None and found.perplexity_ratio is not None
    types = [tensor.tensor_type.name for tensor in GGUFReader(file).tensors]
    counts = ", ".join(f"{types.count(each)} {each}" for each in sorted(set(types)))
    size, (low, high) = file.stat().st_size, found.kl_interval
    print(
        f"{kind}: KL {found.kl:.5f} ({low:.5f} to {high:.5f}), perplexity x {found.perplexity_ratio:.4f}, "
        f"{size / 1e6:.2f} MB ({counts})",
        flush=True,
    )
    return {"file": kind, "bytes": size, "types": counts} | found.to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=64, help="of the calibration")
    parser.add_argument("--length", type=int, default=512, help="tokens of each, and of each measured window")
    parser.add_argument("--windows", type=int, default=24, help="measured")
    parser.add_argument("--as-stored", action="store_true", help="do not take the weights off their grid")
    parser.add_argument("--directory", type=Path, help="for the files; those that are there are not made again")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    calibration, held_out = texts()
    figures = []
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        directory = args.directory or Path(name)
        original, tokenizer = load_model(resolve_model(args.model), "float32")
        windows = token_windows(tokenizer, held_out, args.length, args.windows)
        source = directory / args.model
        if not args.as_stored:
            rescale(original)
        if not source.exists():
            original.save_pretrained(source)
            tokenizer.save_pretrained(source)
        reference = Latest(original)
        compared = list(files(source, directory, calibration, args))
        evaluations = [Evaluation(load_model(file, "float32")[0], reference) for _, file in compared]
        for window in windows:
            for evaluation in evaluations:
                evaluation.add(window)
        for (kind, file), evaluation in zip(compared, evaluations, strict=True):
            figures.append(describe(kind, file, evaluation.quality()))
    if args.json:
        args.json.write_text(json.dumps({"figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
