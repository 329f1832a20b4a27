"""Which projects can be measured beside Gossamer, where they are installed, and how the model gets to them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gossamer.bench.peers import models
from gossamer.errors import ConfigurationError

HERE = Path(__file__).parent
INSTALLED = ".installed"  # written last by `make bench-peers`
ENVIRONMENTS = Path(".venv-bench")
ALL = "all"  # in the place of names


@dataclass(frozen=True)
class PeerKind:
    """A project.

    Attributes:
        name: as in ``--peers`` and in the table; also the directory of its environment.
        script: defines its ``Decoder``.
        model: from a checkpoint, the peer's environment and the number of threads to what it loads.
        copies: number format of its keys and values if every sequence has a copy of the prefix, ``same`` for the
            checkpoint's; ``None`` if sequences share it.
        copies_at_once: how many such copies exist at the worst moment.
        own_environment: it does not run in Gossamer's.
        takes_files: a GGUF file is loaded as it is, and not as the checkpoint that it would be converted to.
    """

    name: str
    script: str
    model: Callable[[Path, Path, int], Path] = lambda checkpoint, environment, threads: checkpoint
    copies: str | None = None
    copies_at_once: int = 1
    own_environment: bool = True
    takes_files: bool = False

    def python(self, environments: Path) -> Path | None:
        """The interpreter to run it with; ``None`` if the peer is not installed."""
        if not self.own_environment:
            return Path(sys.executable)
        environment = environments / self.name
        return environment / "bin" / "python" if (environment / INSTALLED).exists() else None


KINDS = {
    kind.name: kind
    for kind in (
        PeerKind("llama.cpp", "llama_cpp.py", lambda model, environment, threads: models.gguf(model), takes_files=True),
        PeerKind("openvino", "openvino.py", models.openvino),
        PeerKind("vllm", "vllm.py"),
        PeerKind("ctranslate2", "ctranslate2.py", models.ctranslate2, copies="float32", copies_at_once=3),
        PeerKind("transformers", "transformers.py", copies="same", own_environment=False),
    )
}


def chosen_names(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """The names in a list, each once, or all that are known.

    Raises:
        ConfigurationError: one is not known.
    """
    known = tuple(known)
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if ALL in names:
        return known
    if unknown := [name for name in names if name not in known]:
        raise ConfigurationError(f"--peers takes names among {', '.join(known)}, or {ALL}; got {unknown[0]!r}")
    return names
