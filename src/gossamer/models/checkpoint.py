"""What a Hugging Face checkpoint directory has to contain, checked without loading it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gossamer.errors import CheckpointError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def missing_parts(names: Collection[str]) -> list[str]:
    """Which parts of a checkpoint are absent from a list of file names.

    >>> missing_parts(["config.json", "tokenizer.json", "pytorch_model.bin"])
    ['model.safetensors (or model.safetensors.index.json with its shards)']
    """
    present = set(names)
    missing = []
    if "config.json" not in present:
        missing.append("config.json")
    if not present & {WEIGHTS, WEIGHTS_INDEX}:
        missing.append(f"{WEIGHTS} (or {WEIGHTS_INDEX} with its shards)")
    if not present.intersection(_TOKENIZER_FILES):
        missing.append("tokenizer.json (or another tokenizer file)")
    return missing


def check_parts(names: Collection[str], where: str) -> None:
    """Refuses a list of file names that cannot be a checkpoint.

    Raises:
        CheckpointError: lists what is missing; explains why pickled weights do not count.
    """
    missing = missing_parts(names)
    if not missing:
        return
    message = f"{where} is not a complete checkpoint; missing: {', '.join(missing)}."
    pickles = sorted(name for name in names if name.endswith(_PICKLE_SUFFIXES))
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if any(part.startswith(WEIGHTS) for part in missing):
        if pickles:
            message += (
                f" Its weights are pickled ({pickles[0]}), and reading a pickle can run any code, so Gossamer never "
                "does. Convert them: load the model with transformers where you trust it, then `save_pretrained(...)`."
            )
        elif ggufs:
            message += f" It holds {ggufs[0]}; pass the path of a GGUF file itself."
    raise CheckpointError(message)


def check_directory(directory: Path) -> None:
    """Refuses a directory that is not a complete checkpoint, by its file names and shard index.

    Raises:
        CheckpointError: lists what is missing.
    """
    check_parts([path.name for path in directory.iterdir()], str(directory))
    absent = [path.name for path in weight_files(directory) if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{directory} lacks {len(absent)} of the weight files its index names: {', '.join(absent[:5])}"
        )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in name order.

    Raises:
        CheckpointError: the shard index cannot be read.
    """
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    index = directory / WEIGHTS_INDEX
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [directory / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error!r}") from error


def check_weights(directory: Path) -> None:
    """Opens every safetensors file, which compares its header with its length; reads no tensor.

    Raises:
        CheckpointError: names the damaged file.
    """
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut off ({path.stat().st_size} bytes): {error}. Copy or download it again."
            ) from error


def stored_dtype(directory: Path) -> str:
    """The floating-point type that most tensors of a checkpoint have: ``float32``, ``bfloat16`` or ``float16``."""
    counts: Counter[str] = Counter()
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as file:
            counts.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118  no dictionary
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return next((names[dtype] for dtype, _ in counts.most_common() if dtype in names), "float32")
