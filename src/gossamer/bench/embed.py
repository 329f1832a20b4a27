"""Embeddings of a file of texts, beside another project's: throughput, and how far the vectors are apart.

The contestants take turns: in every round each embeds all texts once, from strings to normalized vectors, in the same
number of threads. Ratios are medians of the ratios within a round. The vectors of the first contestant, a peer where
there is one, are what cosines are taken to.
"""

from __future__ import annotations

import base64
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from gossamer import LLM
from gossamer.bench.machine import describe
from gossamer.bench.peers.contest import SETTLE_SECONDS
from gossamer.bench.peers.process import Peer
from gossamer.bench.peers.registry import ENVIRONMENTS, HERE, INSTALLED, chosen_names
from gossamer.errors import ConfigurationError, GossamerError, PeerError
from gossamer.models.resolve import resolve_model
from gossamer.options import ModelOptions, Options
from gossamer.texts import read_text, reference_text

PEERS = {"sentence-transformers": "sentence_transformers.py"}
_SHORTEST = 10  # characters of a sentence


@dataclass
class EmbedResult:
    """One contestant.

    Attributes:
        contestant: a peer's name, or what ours computes with.
        texts_per_s: median over the rounds.
        over_peer: median, over the rounds, of the first peer's time over the own.
        cosine_min, cosine_mean: of its vectors and the first contestant's, over the texts.
        error: why there is no result.
    """

    contestant: str
    texts_per_s: float | None = None
    over_peer: float | None = None
    cosine_min: float | None = None
    cosine_mean: float | None = None
    error: str | None = None


class _Contestant(Protocol):
    name: str

    def embed(self, texts: list[str]) -> tuple[float, np.ndarray]:
        """Seconds, and (texts, D) vectors of length 1."""

    def close(self) -> None: ...


class _Own:
    def __init__(self, model: str, options: ModelOptions) -> None:
        self._llm = LLM(model, **Options(options).changed())
        self.name = f"gossamer {self._llm.weights}"

    def embed(self, texts: list[str]) -> tuple[float, np.ndarray]:
        start = time.perf_counter()
        outputs = self._llm.embed(texts, False, truncate_prompt_tokens=-1)
        return time.perf_counter() - start, np.stack([output.embedding for output in outputs])

    def close(self) -> None:
        del self._llm


class _PeerContestant:
    def __init__(self, name: str, environments: Path, model: Path, batch: int, timeout: float) -> None:
        self.name = name
        environment = environments / name
        if not (environment / INSTALLED).exists():
            raise PeerError("is not installed (make bench-embed)", peer=name)
        threads = torch.get_num_threads()
        python = environment / "bin" / "python"
        self._peer = Peer(name, python, HERE / PEERS[name], threads=threads, timeout=timeout)
        self._batch = batch
        self.about = self._peer.request("load", model=str(model), threads=threads, dtype="float32")

    def embed(self, texts: list[str]) -> tuple[float, np.ndarray]:
        answer = self._peer.request("encode", texts=texts, batch=self._batch)
        vectors = np.frombuffer(base64.b64decode(answer["embeddings"]), "<f4").reshape(len(texts), -1)
        return float(answer["seconds"]), vectors

    def close(self) -> None:
        self._peer.close()


def peer_names(text: str) -> tuple[str, ...]:
    """``"sentence-transformers"`` or ``"all"`` -> names.

    Raises:
        ConfigurationError: there is no such peer.
    """
    return chosen_names(text, PEERS)


def sentences(path: Path | None, count: int) -> list[str]:
    """The first ``count`` texts: lines of a file that are not blank, or sentences of the standard library's topics.

    Raises:
        ConfigurationError: the file cannot be read, or there are none.

    >>> len(sentences(None, 2000))
    2000
    """
    if path is None:
        found = [each.strip() for each in re.split(r"(?<=[.!?])\s+", reference_text())]
        found = [each for each in found if len(each) >= _SHORTEST]
    else:
        found = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not found:
        raise ConfigurationError(f"there is no text in {path}")
    return found[:count]


def bench_embed(
    model: str,
    *,
    texts: list[str],
    options: list[ModelOptions],
    peers: tuple[str, ...] = (),
    environments: Path = ENVIRONMENTS,
    batch: int = 32,
    rounds: int = 3,
    timeout: float = 600.0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Embed the texts with every contestant, in turn.

    Args:
        model: what ``LLM`` takes.
        texts: what is embedded; those that are too long are cut.
        options: one contestant of ours for each.
        peers: names of :data:`PEERS`.
        environments: the directory that has an environment for each of them.
        batch: texts that a peer pads together.
        rounds: that count, after one that warms up.
        timeout: seconds that a peer may take for all texts.
        progress: called with what is being done.

    Returns:
        ``machine``, ``peers`` (versions by name), ``texts``, ``characters``, ``results``: see :class:`EmbedResult`.

    Raises:
        GossamerError: the model cannot be loaded. A peer that fails has an error in its place.
    """
    path = resolve_model(model)
    results: dict[str, EmbedResult] = {}
    about: dict[str, Any] = {}
    contestants: list[_Contestant] = []
    for name in peers:
        progress(f"loading {name}")
        try:
            peer = _PeerContestant(name, environments, path, batch, timeout)
        except GossamerError as error:
            results[name] = EmbedResult(name, error=str(error))
            continue
        about[name] = {"versions": peer.about["versions"], "weights": peer.about["weights"], "batch": batch}
        contestants.append(peer)
    first_peer = contestants[0].name if contestants else None
    contestants += [_Own(model, each) for each in options]
    try:
        times, vectors = _take_turns(contestants, texts, rounds, results, progress)
    finally:
        for each in contestants:
            each.close()
    for each in contestants:
        if each.name not in results:
            results[each.name] = _result(each.name, first_peer, next(iter(vectors)), len(texts), times, vectors)
    return {
        "machine": describe(),
        "model": model,
        "texts": len(texts),
        "characters": sum(map(len, texts)),
        "peers": about,
        "results": [asdict(result) for result in results.values()],
    }


def _take_turns(
    contestants: list[_Contestant],
    texts: list[str],
    rounds: int,
    results: dict[str, EmbedResult],
    progress: Callable[[str], None],
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    times: dict[str, list[float]] = {each.name: [] for each in contestants}
    vectors: dict[str, np.ndarray] = {}
    for number in range(rounds + 1):
        for each in contestants:
            if each.name in results:
                continue  # it has failed
            progress(f"round {number} of {rounds}: {each.name}")
            try:
                seconds, vectors[each.name] = each.embed(texts if number else texts[: len(texts) // 10 + 1])
            except PeerError as error:
                results[each.name] = EmbedResult(each.name, error=str(error))
                continue
            if number:
                times[each.name].append(seconds)
            time.sleep(SETTLE_SECONDS)
    return times, {name: found for name, found in vectors.items() if len(found) == len(texts)}


def _result(
    name: str,
    peer: str | None,
    reference: str,
    count: int,
    times: dict[str, list[float]],
    vectors: dict[str, np.ndarray],
) -> EmbedResult:
    cosines = (vectors[name] * vectors[reference]).sum(-1)
    over = None
    if peer is not None and len(times[peer]) == len(times[name]):
        over = statistics.median(theirs / own for theirs, own in zip(times[peer], times[name], strict=True))
    return EmbedResult(name, count / statistics.median(times[name]), over, float(cosines.min()), float(cosines.mean()))
