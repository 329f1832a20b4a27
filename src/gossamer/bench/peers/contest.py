"""The peers of one benchmark: started once, given every combination to prepare, and turns to decode in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gossamer.bench.peers.process import Peer
from gossamer.bench.peers.registry import ENVIRONMENTS, HERE, KINDS, PeerKind, chosen_names
from gossamer.errors import GossamerError, PeerError
from gossamer.models.resolve import resolve_model
from gossamer.system import available_memory

# OpenMP's threads look out for work for a while before they sleep, up to 0.2 s: the next one waits until they do.
SETTLE_SECONDS = 0.25
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class PeerOptions:
    """What to compare with.

    Attributes:
        names: of peers; see :func:`peer_names`.
        environments: the directory that has an environment for each of them.
        timeout: seconds after which a peer that has not finished what it was asked is given up for the combination.
    """

    names: tuple[str, ...]
    environments: Path = ENVIRONMENTS
    timeout: float = 600.0


def peer_names(text: str) -> tuple[str, ...]:
    """``"vllm,openvino"`` or ``"all"`` -> names.

    Raises:
        ConfigurationError: there is no such peer.

    >>> peer_names("vllm, openvino")
    ('vllm', 'openvino')
    """
    return chosen_names(text, KINDS)


@dataclass(frozen=True)
class Sizes:
    """What peers that reserve memory when they load have to know of all combinations.

    Attributes:
        combinations: (batch, prefix) pairs.
        suffix: prompt tokens that each sequence has of its own.
        new: tokens that each sequence decodes.
        numbers_per_token: keys and values of one token in all layers.
    """

    combinations: list[tuple[int, int]]
    suffix: int
    new: int
    numbers_per_token: int

    def steps(self, batch: int) -> int:
        """Tokens that a sequence may decode: ``new``, and what the first are ahead when the last prompt is computed."""
        return self.new + WARM_UP_STEPS + batch * self.suffix // 128 + 8

    def load_arguments(self) -> dict[str, int]:
        """See ``load`` in child.py."""
        own = [(batch, prefix, self.suffix + self.steps(batch)) for batch, prefix in self.combinations]
        return {
            "sequences": max(batch for batch, _, _ in own),
            "context": max(prefix + length for _, prefix, length in own),
            "cache_bytes": 2 * self.numbers_per_token * max(prefix + batch * length for batch, prefix, length in own),
        }

    def copied_bytes(self, batch: int, prefix: int, number_bytes: int) -> int:
        """Keys and values when every sequence has a copy of the prefix."""
        return batch * (prefix + self.suffix + self.new) * self.numbers_per_token * number_bytes


def numbers_per_token(network: Any) -> int:
    """How many numbers the keys and values of one token are, in all layers of a transformers model."""
    config = network.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * int(config.num_hidden_layers * heads * head)


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"


@dataclass
class _Entry:
    """One peer and how it fares: ``out`` says why it cannot take part at all, ``error`` why not in this combination."""

    kind: PeerKind
    peer: Peer | None = None
    description: dict[str, Any] = field(default_factory=lambda: {"versions": {}, "weights": None, "keys": None})
    out: str | None = None
    error: str | None = None
    prefill_s: float = 0.0
    turns: list[float] = field(default_factory=list)
    idle_s: float = 0.0
    idle_cpu_s: float = 0.0

    @property
    def failed(self) -> str | None:
        return self.out or self.error


class Contest:
    """Peers that decode the same prompts as Gossamer, in turn with it.

    A peer that fails, or takes too long, is out for the combination; the next one starts it again. One that cannot be
    loaded is out for all. Nothing of this raises: the reason takes the place of the figures.

    Args:
        options: which peers, and where they are.
        model: whatever :func:`gossamer.models.resolve_model` understands.
        sizes: of the combinations there will be.
        threads: CPU threads of each.
        dtype: of peers that run the checkpoint as it is.
        memory: bytes of keys and values that a peer may hold.
        progress: called with what happens now.
    """

    def __init__(
        self,
        options: PeerOptions,
        model: str,
        sizes: Sizes,
        *,
        threads: int,
        dtype: torch.dtype,
        memory: int,
        progress: Callable[[str], None],
    ) -> None:
        self._options = options
        self._model = model
        self._sizes = sizes
        self._threads = threads
        self._dtype = str(dtype).removeprefix("torch.")
        self._memory = memory
        self._progress = progress
        self._batch = 0
        self._room: int | None = None  # memory that is free, less what peers will take
        self._entries = [_Entry(KINDS[name]) for name in options.names]

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *exception: object) -> None:
        for entry in self._entries:
            if entry.peer is not None:
                entry.peer.close()

    def prepare(self, prompts: list[list[int]], prefix: int) -> None:
        """Let every peer compute the prompts (B lists of token ids with ``prefix`` in common)."""
        self._batch = len(prompts)
        steps = self._sizes.steps(self._batch)
        self._room = available_memory()
        for entry in self._entries:
            entry.error, entry.prefill_s, entry.turns = None, 0.0, []
            if entry.out:
                continue
            note = f"{self._batch} x {prefix} tokens, {entry.kind.name}"
            try:
                self._check_memory(entry.kind, prefix)
                peer = self._loaded(entry, note)
                self._progress(f"{note}: prefill")
                time.sleep(SETTLE_SECONDS)
                entry.prefill_s = peer.request("prepare", prompts=prompts, shared=prefix, steps=steps)["prefill_s"]
                self._decode(entry, WARM_UP_STEPS)
            except GossamerError as error:
                entry.error = str(error)

    def take_turns(self, steps: int) -> None:
        """Let every peer decode ``steps`` tokens per sequence, one peer after another."""
        able = [entry for entry in self._entries if not entry.failed]
        for entry in able:
            time.sleep(SETTLE_SECONDS)
            try:
                entry.turns.append(self._decode(entry, steps) / steps)
            except GossamerError as error:
                entry.error = str(error)
        if able:
            time.sleep(SETTLE_SECONDS)

    def results(self, prefix: int) -> dict[str, dict[str, Any]]:
        """What was measured since :meth:`prepare`, by peer: fields of :class:`gossamer.bench.decode.DecodeResult`."""
        return {entry.kind.name: self._figures(entry, prefix) for entry in self._entries}

    def release(self) -> None:
        """Let every peer forget its sequences."""
        for entry in self._entries:
            if entry.peer is None or not entry.peer.running:
                continue
            try:
                entry.peer.request("release")
            except PeerError:
                entry.peer.close()  # the next combination starts it again

    def report(self) -> dict[str, dict[str, Any]]:
        """By peer, what it is, or ``error``, why it does not take part.

        What it is: ``versions`` of its packages, number formats of ``weights`` and ``keys``, and ``idle_cores``, how
        many processor cores it used, on average, while it was waiting for a turn.
        """
        return {
            entry.kind.name: {"error": entry.out}
            if entry.out
            else {**entry.description, "idle_cores": entry.idle_cpu_s / entry.idle_s if entry.idle_s else 0.0}
            for entry in self._entries
        }

    def _check_memory(self, kind: PeerKind, prefix: int) -> None:
        if kind.copies is None:
            return
        form = self._dtype if kind.copies == "same" else kind.copies
        needed = self._sizes.copied_bytes(self._batch, prefix, 4 if form == "float32" else 2) * kind.copies_at_once
        what = f"copies the prefix for every sequence and needs {_size(needed)} of keys and values"
        if needed > self._memory:
            raise PeerError(f"{what}; --memory is {_size(self._memory)}", peer=kind.name)
        if self._room is not None:
            if needed > self._room:
                raise PeerError(f"{what}; {_size(self._room)} of memory are free", peer=kind.name)
            self._room -= needed

    def _loaded(self, entry: _Entry, note: str) -> Peer:
        """The running peer with the model loaded. What goes wrong here will not go better next time."""
        if entry.peer is not None and entry.peer.running:
            return entry.peer
        kind = entry.kind
        try:
            python = kind.python(self._options.environments)
            if python is None:
                raise PeerError("is not installed (make bench-peers)", peer=kind.name)
            self._progress(f"{note}: loading")
            found = resolve_model(self._model, as_file=kind.takes_files)
            model = kind.model(found, self._options.environments / kind.name, self._threads)
            entry.peer = Peer(
                kind.name, python, HERE / kind.script, threads=self._threads, timeout=self._options.timeout
            )
            answer = entry.peer.request(
                "load",
                model=str(model),
                threads=self._threads,
                dtype=self._dtype,
                **self._sizes.load_arguments(),
            )
        except GossamerError as error:
            entry.out = str(error)
            raise
        entry.description = {name: answer[name] for name in ("versions", "weights", "keys")}
        return entry.peer

    def _decode(self, entry: _Entry, steps: int) -> float:
        """Seconds for ``steps`` steps."""
        assert entry.peer is not None
        answer = entry.peer.request("decode", steps=steps)
        lengths = [len(tokens) for tokens in answer["tokens"]]
        if lengths != [steps] * self._batch:
            raise PeerError(
                f"decoded {sum(lengths)} tokens in {len(lengths)} sequences, not {steps} in each of {self._batch}",
                peer=entry.kind.name,
            )
        entry.idle_s += answer["idle_s"]
        entry.idle_cpu_s += answer["idle_cpu_s"]
        return float(answer["seconds"])

    def _figures(self, entry: _Entry, prefix: int) -> dict[str, Any]:
        if entry.failed or not entry.turns:
            return {"error": entry.failed or "had no turn"}
        step = statistics.median(entry.turns)
        return {
            "prefix_tokens_per_s": prefix / entry.prefill_s,
            "decode_tokens_per_s": self._batch / step,
            "step_ms": step * 1e3,
            "step_ms_range": (min(entry.turns) * 1e3, max(entry.turns) * 1e3),
        }
