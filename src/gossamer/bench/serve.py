"""Servers under the same load, in turn: ours, other projects', and our engine without a server.

All of them stay up during the whole run and wait while it is not their turn. Before the first round each gets one
request per client, so that prefixes are cached; every round has suffixes that none has seen. What HTTP costs is the
share of the engine's tokens per second that is lost on the way through the server, in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gossamer.bench.machine import describe
from gossamer.bench.peers.contest import SETTLE_SECONDS
from gossamer.bench.serve_contestants import OFFLINE, OURS, Contest, Contestant, ServeOptions
from gossamer.bench.serve_load import Load, LoadResult, Prompts
from gossamer.errors import ConfigurationError, GossamerError
from gossamer.models.load import load_config_and_tokenizer
from gossamer.models.resolve import resolve_model

WARM_UP_TOKENS = 4
_MEDIANS = ("output_tokens_per_s", "requests_per_s", "cached_share", "client_cores")
_TIMES = ("ttft_ms", "itl_ms", "e2e_ms")


@dataclass
class _Turns:
    """What one contestant did in its turns, and what it used of the processor meanwhile and between them."""

    contestant: Contestant
    rounds: list[LoadResult] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)
    idle_s: float = 0.0
    idle_cpu_s: float = 0.0
    rested: tuple[float, float] | None = None

    def take(self, load: Load, first: int) -> LoadResult | None:
        """Let it answer a load. If it cannot, there is no result, and it is out."""
        contestant = self.contestant
        if contestant.run is None or contestant.error is not None:
            return None
        time.sleep(SETTLE_SECONDS)
        start, used = time.monotonic(), contestant.cpu_seconds()
        if self.rested is not None and used is not None:
            self.idle_s += start - self.rested[0]
            self.idle_cpu_s += used - self.rested[1]
        try:
            result = contestant.run(load, first)
        except GossamerError as error:
            contestant.error = str(error)
            return None
        end, used_then = time.monotonic(), contestant.cpu_seconds()
        if used is not None and used_then is not None:
            self.cores.append((used_then - used) / (end - start))
            self.rested = end, used_then
        if not result.completed:
            kinds = ", ".join(f"{kind} ({count} times)" for kind, count in result.errors.items())
            contestant.error = f"{contestant.name} answered no request: {kinds}"
            return None
        return result


def bench_serve(
    model: str,
    load: Load,
    options: ServeOptions,
    *,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Measure all servers. Returns ``{"machine": {...}, "model": ..., "load": {...}, "results": [...]}``.

    Each result has the fields of :class:`~gossamer.bench.serve_contestants.Contestant` that are for the record, and,
    unless there is an ``error``:

    - the medians of the rounds of what :meth:`~gossamer.bench.serve_load.LoadResult.to_dict` has, sums of its
      ``errors`` and ``short_answers``, and all of it for each of the ``rounds``
    - ``over_offline``: median, over the rounds, of its tokens per second over those of our engine without a server;
      for our server also ``http_cost``, which is 1 - ``over_offline``
    - ``server_cores`` and ``idle_cores``: processor cores that it used in its turns, and between them

    Args:
        model: whatever :func:`gossamer.models.resolve.resolve_model` understands.
        load: the same for all; where it is given in seconds, the engine without a server gets as many requests as our
            server has answered.
        options: who takes part.
        repeats: rounds.
        progress: called with what happens now.

    Raises:
        ConfigurationError: the load does not fit into the model's context, or there are no rounds.
        GossamerError: the model cannot be found or read. What goes wrong with a server takes the place of its figures.
    """
    if repeats < 1:
        raise ConfigurationError(f"repeats must be at least 1, got {repeats}")
    progress(f"loading the tokenizer of {model}")
    path = resolve_model(model, as_file=True)
    config, tokenizer = load_config_and_tokenizer(path)
    contest = Contest(model, path, config, load, Prompts(tokenizer, load), options, progress)
    blocks = [contest.ours()]
    blocks += [contest.offline()] if options.offline else []
    blocks += [contest.at(name, url) for name, url in options.urls.items()]
    blocks += [contest.peer(name) for name in options.peers]
    with ExitStack() as stack:
        turns = [_Turns(stack.enter_context(block)) for block in blocks]
        _race(turns, load, repeats, progress)
    offline = next((each.rounds for each in turns if each.contestant.name == OFFLINE), [])
    return {
        "machine": describe() | {"threads": options.threads},
        "model": model,
        "load": asdict(load),
        "results": [_figures(each, offline) for each in turns],
    }


def _race(turns: list[_Turns], load: Load, repeats: int, progress: Callable[[str], None]) -> None:
    warm_up = replace(load, requests=load.clients, seconds=None, new=min(load.new, WARM_UP_TOKENS))
    for each in turns:
        progress(f"{each.contestant.name}: computing the prefix")
        each.take(warm_up, 0)
    for each in turns:
        each.cores.clear()
    first = load.clients
    for number in range(repeats):
        asked = load.requests or 0
        for each in turns:
            progress(f"round {number + 1} of {repeats}, {each.contestant.name}")
            # our server comes first, and says how much the engine has to do
            own = replace(load, requests=asked or load.clients, seconds=None)
            result = each.take(own if each.contestant.name == OFFLINE else load, first)
            if result is not None:
                each.rounds.append(result)
                asked = max(asked, result.asked) if load.requests is None else asked
        first += asked


def _figures(turns: _Turns, offline: list[LoadResult]) -> dict[str, Any]:
    """See :func:`bench_serve`."""
    contestant = turns.contestant
    record = {name: getattr(contestant, name) for name in ("name", "command", "version", "weights", "error", "ended")}
    if contestant.error is not None or not turns.rounds:
        return record | {"error": contestant.error or f"{contestant.name} had no turn"}
    rounds = [result.to_dict() for result in turns.rounds]
    figures: dict[str, Any] = {name: _median([each[name] for each in rounds]) for name in _MEDIANS}
    for name in _TIMES:
        known = [each[name] for each in rounds if each[name] is not None]
        figures[name] = {which: _median([each[which] for each in known]) for which in known[0]} if known else None
    figures["errors"] = dict(sum((result.errors for result in turns.rounds), Counter()))
    figures["short_answers"] = sum(result.short_answers for result in turns.rounds)
    figures["memory"] = rounds[-1]["memory"]
    figures["server_cores"] = _median(turns.cores)
    figures["idle_cores"] = turns.idle_cpu_s / turns.idle_s if turns.idle_s else None
    pairs = zip(turns.rounds, offline, strict=False)
    ratios = [own.output_tokens_per_s / best.output_tokens_per_s for own, best in pairs]
    figures["over_offline"] = _median(ratios) if contestant.name != OFFLINE else None
    if contestant.name == OURS and ratios:
        figures["http_cost"] = 1 - statistics.median(ratios)
    return record | figures | {"rounds": rounds}


def _median(values: list[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
