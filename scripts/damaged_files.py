"""Loads damaged model files, each in a process of its own, and counts what becomes of them.

    python scripts/damaged_files.py [--count 1000] [--seed 0] [--only NUMBER] [--format NAME] [--keep DIRECTORY]

Small checkpoints in every format are damaged at random: cut off, bytes changed, moved or left out, odd values put into
JSON files and binary headers. A damaged file has to end in one of Gossamer's errors, or to load and answer a prompt, as
it does where what is damaged is a number among the weights. Anything else is a fault: another exception, a crash, a
process that takes more than ``--memory`` GB beside what it began with, or more than ``--seconds``. The program ends
with 1 if there was any; a case is run again with its number, and ``--keep`` leaves its files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gossamer import LLM, GossamerInt8Config, SamplingParams
from gossamer.compress.export import export
from gossamer.compress.int8 import compress_int8
from gossamer.errors import GossamerError
from gossamer.models.manifest import verify, write_manifest
from gossamer.models.quiet import quiet_transformers

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 10**9, 2**31, 2**63, 2**70, -(2**70), 0.5, 1e400, float("nan"), "", "x", "\ud800"),
    *([], {}, [[]], ["x"], [0], {"x": 1}, "x" * 100_000, json.loads("[" * 200 + "]" * 200)),
)
SIZES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
WAYS = ("serve", "int8", "export")
GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


class Case(NamedTuple):
    """One damaged model: its directory or file, and in words what was done to it."""

    path: Path
    what: str


def make_models(directory: Path) -> dict[str, Path]:
    """Whole models of every format, by name."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("t", "h"), ("th", "e")]
    words = ["<eos>", *alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    made = {name: directory / name for name in ("dense", "sharded", "int8", "compressed-tensors", "bitsandbytes")}
    with quiet_transformers():
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(words), eos_token_id=0, bos_token_id=None, **sizes, **heads)
        )
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
        for name, shard in (("dense", "5GB"), ("sharded", "50KB")):
            model.save_pretrained(made[name], max_shard_size=shard)
            fast.save_pretrained(made[name])
    compress_int8(made["dense"], made["int8"], GossamerInt8Config())
    for name in ("compressed-tensors", "bitsandbytes"):
        export(made["int8"], made[name], name)
    export(made["int8"], directory / "model.gguf", "gguf")
    for name in ("dense", "sharded"):
        write_manifest(made[name], {"made": "here"})
    return made | {"gguf": directory / "model.gguf"}


def damage(whole: Path, target: Path, draw: random.Random) -> Case:
    """Copies a model to ``target`` and damages one of its files."""
    if whole.is_dir():
        shutil.copytree(whole, target)
        file = draw.choice(sorted(target.iterdir()))
    else:
        target.mkdir()
        file = target / whole.name
        shutil.copyfile(whole, file)
    data = file.read_bytes()
    ways: list[Callable[[bytes, random.Random], tuple[bytes, str]]] = [cut, change_bytes, move_bytes]
    if file.suffix == ".json":
        ways += [odd_json] * 9
    elif file.suffix == ".safetensors":
        ways += [odd_safetensors] * 4
    elif file.suffix == ".gguf":
        ways += [odd_numbers] * 6
    damaged, what = draw.choice(ways)(data, draw)
    file.write_bytes(damaged)
    return Case(target if whole.is_dir() else file, f"{whole.name}: {file.name}: {what}")


def cut(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Less of it: mostly the end is missing."""
    length = draw.choice([0, 1, 7, 8, 9, len(data) - 1, draw.randrange(len(data))])
    return data[:length], f"cut to {length} of {len(data)} bytes"


def change_bytes(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """Some bytes, mostly at the beginning, where headers are."""
    changed = bytearray(data)
    reach = draw.choice([16, 256, 4096, len(data)])
    places = [draw.randrange(min(reach, len(data))) for _ in range(draw.choice([1, 1, 2, 8]))]
    for place in places:
        changed[place] = draw.choice([0, 255, changed[place] ^ (1 << draw.randrange(8)), draw.randrange(256)])
    return bytes(changed), f"bytes {places} changed"


def move_bytes(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A part twice, missing, or zero."""
    first = draw.randrange(len(data))
    last = min(len(data), first + draw.choice([1, 8, 64, 1000]))
    part, kind = draw.choice([(2 * data[first:last], "twice"), (b"", "gone"), (bytes(last - first), "zero")])
    return data[:first] + part + data[last:], f"bytes {first} to {last} {kind}"


def odd_json(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A value of a JSON file that should not be there."""
    tree = json.loads(data)
    parent, key = draw.choice(list(_entries(tree)))
    if draw.random() < 0.2:
        del parent[key]
        return json.dumps(tree).encode(), f"{key!r} left out"
    parent[key] = draw.choice(ODD)
    return json.dumps(tree).encode("utf-8", "surrogatepass"), f"{key!r} set to {str(parent[key])[:30]!r}"


def _entries(tree: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Where a value can be replaced; of long lists and vocabularies some."""
    keys: list[Any] = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    for key in keys[:40]:
        yield tree, key
        if isinstance(tree[key], (dict, list)) and depth < 8:
            yield from _entries(tree[key], depth + 1)


def odd_safetensors(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A value of the header that does not fit; lengths are right again afterwards."""
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.15:
        wrong = draw.choice(SIZES)
        return wrong.to_bytes(8, "little") + data[8:], f"header of {wrong} bytes"
    header, what = odd_json(data[8 : 8 + length], draw)
    header = header.replace(b"NaN", b"null").replace(b"Infinity", b"1e999")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :], f"header: {what}"


def odd_numbers(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A count, type or length in the header of a binary file."""
    place = draw.choice([4, 8, 16, draw.randrange(24, 12_000), draw.randrange(24, 600)])
    form = draw.choice(["<I", "<Q"])
    value = draw.choice(SIZES) % (1 << (32 if form == "<I" else 64))
    size = struct.calcsize(form)
    return data[:place] + struct.pack(form, value) + data[place + size :], f"{value} at byte {place}"


def use(case: Case, way: str) -> None:
    """What users do with a model."""
    verify(case.path if case.path.is_dir() else case.path.parent)
    if way == "export":
        with tempfile.TemporaryDirectory() as directory:
            export(case.path, Path(directory) / "exported", "compressed-tensors")
        return
    options: dict[str, Any] = {"quantization": "int8"} if way == "int8" else {}
    llm = LLM(case.path, **options)
    llm.generate(["ab", {"prompt_token_ids": [1, 2, 3]}], GREEDY, use_tqdm=False)
    llm.score("ab", ["c"])


class Outcome(NamedTuple):
    """What became of a case: the kind, the message, the seconds it took and the bytes it held at most."""

    kind: str
    message: str
    seconds: float
    peak: int


def outcome(case: Case, way: str, memory: int, seconds: float) -> Outcome:
    """What becomes of a case in a process of its own."""
    start = time.monotonic()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _run(case, way, memory, send)
    os.close(send)
    data, deadline = b"", time.monotonic() + seconds
    while True:
        ready, _, _ = select.select([receive], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            break
        if not (piece := os.read(receive, 1 << 16)):
            break
        data += piece
    os.close(receive)
    _, status, usage = os.wait4(child, 0)
    now = time.monotonic()
    if data:
        kind, message = json.loads(data)
    else:
        kind, message = ("hang", f"more than {seconds:g} s") if now >= deadline else ("crash", f"status {status}")
    return Outcome(kind, message, now - start, 1024 * usage.ru_maxrss)


def _run(case: Case, way: str, memory: int, send: int) -> None:
    """In the child: uses the case, tells what happened, and ends."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        use(case, way)
        told = ("loaded", "")
    except GossamerError as error:
        told = ("refused", str(error))
    except MemoryError:
        told = ("memory", traceback.format_exc())
    except BaseException as error:  # whatever else there is, a panic of Rust code included, is what is looked for
        kind = "memory" if "memory" in str(error).lower() else "untyped"
        told = (
            kind,
            f"{type(error).__name__}: {str(error)[:300]}\n{''.join(traceback.format_tb(error.__traceback__)[-4:])}",
        )
    os.write(send, json.dumps((told[0], told[1][:4000])).encode())
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case, by its number")
    parser.add_argument("--format", help="damage only models of this format, such as gguf")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument(
        "--memory", type=float, default=8.0, help="address space in GB beside what a process begins with"
    )
    parser.add_argument("--keep", type=Path, help="leave the files of faults here")
    arguments = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    faults, slowest, largest = 0, (0.0, -1), (0, -1)
    memory = int(arguments.memory * 1e9)
    with tempfile.TemporaryDirectory(prefix="damaged-") as name:
        scratch = Path(name)
        os.environ["GOSSAMER_CACHE"] = str(scratch / "cache")
        (scratch / "whole").mkdir()
        whole = make_models(scratch / "whole")
        if arguments.format:
            whole = {arguments.format: whole[arguments.format]}
        for kind, path in whole.items():  # or what is counted below would mean nothing
            for way in WAYS:
                result, message, _, _ = outcome(Case(path, "whole"), way, memory, arguments.seconds)
                expected = "refused" if way == "export" and kind != "int8" else "loaded"
                if way == "int8" and kind in ("int8", "compressed-tensors", "bitsandbytes"):
                    expected = result  # it is int8 already, which may be said
                if result != expected:
                    raise SystemExit(f"{path} was not damaged: {way}: {result}: {message}")
        numbers = range(arguments.count) if arguments.only is None else [arguments.only]
        for number in numbers:
            draw = random.Random(f"{arguments.seed}-{number}")
            kind = sorted(whole)[draw.randrange(len(whole))]
            case = damage(whole[kind], scratch / "case", draw)
            way = draw.choice(WAYS if case.path.is_dir() else WAYS[:2])
            result, message, seconds, peak = outcome(case, way, memory, arguments.seconds)
            slowest, largest = max(slowest, (seconds, number)), max(largest, (peak, number))
            counts[kind, result] += 1
            if result not in ("refused", "loaded") or arguments.only is not None:
                faults += result not in ("refused", "loaded")
                print(f"{number}: {case.what}; {way}\n    {result}: {message}", flush=True)
                if arguments.keep:
                    shutil.copytree(scratch / "case", arguments.keep / str(number), dirs_exist_ok=True)
            shutil.rmtree(scratch / "case")
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(scratch / "cache")
    results = sorted({result for _, result in counts})
    print(f"{'':20}" + "".join(f"{result:>10}" for result in results))
    for kind in sorted({kind for kind, _ in counts}):
        print(f"{kind:20}" + "".join(f"{counts[kind, result]:10}" for result in results))
    print(
        f"longest: {slowest[0]:.1f} s (number {slowest[1]}), largest: {largest[0] / 1e6:.0f} MB (number {largest[1]})"
    )
    print(f"{sum(counts.values())} files, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
