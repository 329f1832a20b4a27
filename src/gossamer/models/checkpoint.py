"""What a Hugging Face checkpoint directory has to contain, checked without loading it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from gossamer.errors import CheckpointError
from gossamer.models.json_file import check_regular, read_object

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
_LONGEST_NAME = 255  # bytes of a file's name, on the usual file systems
_READ_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
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
        CheckpointError: lists what is missing, or names what is no regular file.
    """
    paths = sorted(directory.iterdir())
    for path in paths:
        if path.suffix in _READ_SUFFIXES:
            check_regular(path)
    check_parts([path.name for path in paths], str(directory))
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
    index = weight_map(directory)
    return [directory / name for name in sorted(set(index.values()))] if index else [directory / WEIGHTS]


def weight_map(directory: Path) -> dict[str, str]:
    """Name of each tensor -> name of the file it is in, as the index says; empty where all are in one file.

    Raises:
        CheckpointError: the index cannot be read, or names something else than files beside it.
    """
    if (directory / WEIGHTS).exists():
        return {}
    index = directory / WEIGHTS_INDEX
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index} is not a safetensors index: it has no weight_map from tensors to files")
    for tensor, name in names.items():
        if not _is_file_name(name):
            shown = repr(name)[:80]
            raise CheckpointError(f"{index}: weight_map.{tensor} is {shown}; it has to be the name of a file beside it")
    return names


def _is_file_name(name: object) -> bool:
    """Whether it names a file in a directory, whatever the system."""
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable():
        return False
    return not {"/", "\\"} & set(name) and len(name.encode()) <= _LONGEST_NAME
