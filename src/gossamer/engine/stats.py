"""What the engine did: tokens computed and saved, steps with shared attention and why not, memory, time."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.engine.planner import KeyCount
    from gossamer.engine.scheduler import Work
    from gossamer.engine.sequence import Sequence
    from gossamer.engine.tree import Node


@dataclass
class EngineStats:
    """Counters since the engine was made.

    Attributes:
        prompt_tokens: tokens of all prompts, once per completion.
        saved_tokens: those that were not computed because another sequence had computed them.
        saved_by_level: the same by depth in the prefix tree; level 1 hangs below the root.
        computed_tokens: tokens fed to the model, generated ones included.
        generated_tokens: tokens sampled.
        steps, decode_steps: forward passes; those in which every sequence had exactly one token.
        shared_steps: steps in which two sequences or more attended to a node together.
        unshared_reasons: for the other steps, why not -> how many.
        keys_read, keys_unshared: keys per layer that attention walked through; that it would have without sharing.
        kv_bytes, kv_bytes_peak: bytes of keys and values held after the last step; at most.
        forward_seconds, sampling_seconds, overhead_seconds: time in the model's forward pass; in choosing tokens
            from its logits; in everything else of the steps.
        speculation: what drafts brought, see :class:`~gossamer.engine.speculation.stats.SpeculationStats`; ``None`` if
            there are none.
        prefix_store: what was read from disk and written to it since the engine was made, see
            :class:`~gossamer.engine.prefix_store.writer.StoreStats`; ``None`` without a directory for it.
        prefix_tolerance: what attention within a tolerance did; see
            :meth:`~gossamer.runners.tolerance.PrefixTolerance.summary`. ``None`` if all of it is exact.
    """

    prompt_tokens: int = 0
    saved_tokens: int = 0
    saved_by_level: Counter[int] = field(default_factory=Counter)
    computed_tokens: int = 0
    generated_tokens: int = 0
    finished_requests: int = 0
    failed_requests: int = 0
    steps: int = 0
    decode_steps: int = 0
    shared_steps: int = 0
    unshared_reasons: Counter[str] = field(default_factory=Counter)
    keys_read: int = 0
    keys_unshared: int = 0
    kv_bytes: int = 0
    kv_bytes_peak: int = 0
    preemptions: int = 0
    evicted_tokens: int = 0
    forward_seconds: float = 0.0
    sampling_seconds: float = 0.0
    overhead_seconds: float = 0.0
    prefix_tolerance: dict[str, Any] | None = None
    prefix_store: dict[str, int] | None = None
    speculation: dict[str, Any] | None = None

    def count_prompt(self, sequence: Sequence, path: list[Node]) -> None:
        """A sequence starts below ``path``: what of its prompt did others compute?"""
        if sequence.counted:
            return
        sequence.counted = True
        self.prompt_tokens += len(sequence.request.prompt_token_ids)
        for level, node in enumerate(path, start=1):
            if node.owner != sequence.order:
                sequence.num_cached += len(node)
                self.saved_by_level[level] += len(node)
        self.saved_tokens += sequence.num_cached

    def count_step(self, works: list[Work], count: KeyCount, mode: str) -> None:
        """A step was computed; ``mode`` is how the engine shares."""
        tokens = sum(work.count for work in works)
        self.steps += 1
        self.decode_steps += tokens == len(works) and all(work.sequence.output_ids for work in works)
        self.computed_tokens += tokens
        self.keys_read += count.keys_read
        self.keys_unshared += count.keys_unshared
        if count.segments:
            self.shared_steps += 1
        elif mode != "attention":
            self.unshared_reasons[f"sharing is {mode!r}"] += 1
        elif len(works) == 1:
            self.unshared_reasons["one sequence only"] += 1
        else:
            self.unshared_reasons["no common prefix worth a segment"] += 1

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dictionaries, for JSON."""
        values = asdict(self)
        values["saved_by_level"] = {str(level): count for level, count in sorted(self.saved_by_level.items())}
        values["unshared_reasons"] = dict(self.unshared_reasons)
        return values
