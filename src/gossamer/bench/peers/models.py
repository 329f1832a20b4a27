"""The model in each peer's own format, converted by the peer's own tool and kept in the cache."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

from gossamer.bench.peers.process import child_environment
from gossamer.errors import PeerError
from gossamer.models.cache import get_or_build
from gossamer.models.manifest import write_manifest

_TIMEOUT_SECONDS = 3600
_LINES = 6


def converted(peer: str, checkpoint: Path, convert: Callable[[Path], None]) -> Path:
    """The cached directory that ``convert`` makes of a checkpoint for a peer.

    Args:
        peer: its name.
        checkpoint: a directory with safetensors; another key of the cache when any of its files changes.
        convert: fills a directory that does not exist yet.

    Raises:
        GossamerError: whatever ``convert`` raises, or the cache cannot be written.
    """
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(repr((str(checkpoint.resolve()), stats)).encode()).hexdigest()

    def build(scratch: Path) -> Path:
        directory = scratch / "model"
        convert(directory)
        write_manifest(directory, {"converted_for": peer, "from": str(checkpoint)})
        return directory

    return get_or_build(f"peer-{peer}-{digest[:16]}", build).path


def gguf(model: Path) -> Path:
    """What llama.cpp loads: a GGUF file itself, or one in Q8_0, which Gossamer exports from a checkpoint."""
    if model.is_file():
        return model

    def convert(directory: Path) -> None:
        # Imported here: quantizing needs PyTorch and transformers.
        from gossamer.compress.export import export
        from gossamer.compress.int8 import compress_int8
        from gossamer.models.int8_quantizer import GossamerInt8Config

        directory.mkdir()
        work = directory.with_name("work")  # the directory around it is held by whoever builds, and would be again
        work.mkdir()
        int8 = work / "int8"
        compress_int8(model, int8, GossamerInt8Config())
        export(int8, directory / "model.gguf", "gguf")

    return converted("llama.cpp", model, convert) / "model.gguf"


def openvino(checkpoint: Path, environment: Path, threads: int) -> Path:
    """OpenVINO's representation, int8 weights with one scale per output channel."""
    command = [str(environment / "bin" / "optimum-cli"), "export", "openvino", "--model", str(checkpoint)]
    command += ["--task", "text-generation-with-past", "--weight-format", "int8"]
    return converted("openvino", checkpoint, lambda directory: _run("openvino", [*command, str(directory)], threads))


def ctranslate2(checkpoint: Path, environment: Path, threads: int) -> Path:
    """CTranslate2's format, int8 weights."""
    command = [str(environment / "bin" / "ct2-transformers-converter"), "--model", str(checkpoint)]
    command += ["--quantization", "int8", "--output_dir"]
    return converted(
        "ctranslate2", checkpoint, lambda directory: _run("ctranslate2", [*command, str(directory)], threads)
    )


def _run(peer: str, command: list[str], threads: int) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=child_environment(threads), timeout=_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"cannot convert the model: {error}", peer=peer) from error
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise PeerError(
            f"cannot convert the model; {Path(command[0]).name} returned {done.returncode}",
            peer=peer,
            stderr=lines[-_LINES:],
        )
