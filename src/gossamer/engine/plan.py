"""The plan of one step: which rows of the packed batch attend to which keys. Built once, used by every layer.

All new tokens of a step stand in one row of tokens, without padding. Each row's keys are covered exactly once, by

* *segments*: computed keys that come before all of the segment's rows, so no causal mask is needed. A tree node is one
  segment for all rows below it: that is where sharing happens;
* *chunks*: consecutive new tokens of one sequence, causal among themselves;
* *groups*: sequences with one new token each, whose private keys stand in the same bucket of slots.

The partial results of a row are merged in the order of their levels, from the root of the tree to the row's own token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gossamer.engine.slots import Bucket, Slot
from gossamer.engine.states import State
from gossamer.engine.tree import Node

Rows = slice | Tensor  # contiguous rows are a view; others are gathered


@dataclass(slots=True)
class Segment:
    """``rows`` see the first ``length`` keys of ``source``, the first of which stands at position ``start``.

    ``per_row`` makes every row attend on its own, for the mode that shares storage but not computation. ``certain`` of
    the rows are no drafts.
    """

    rows: Rows
    source: Node | Slot
    length: int
    start: int
    level: int
    per_row: bool = False
    certain: int = 1


@dataclass(slots=True)
class Chunk:
    """New tokens ``rows`` at positions from ``position``; their keys go to ``target`` from ``offset`` on."""

    rows: slice
    target: Node | Slot
    offset: int
    position: int
    level: int = 0


@dataclass(slots=True)
class Group:
    """One new token of each of several sequences: ``slots`` (n,) of ``bucket``, written at ``offsets`` (n,)."""

    rows: Rows
    bucket: Bucket
    slots: Tensor
    offsets: Tensor
    longest: int
    level: int


@dataclass(slots=True)
class StateRun:
    """Rows of a step that go on from one state: consecutive tokens of a text.

    Attributes:
        rows: of the packed batch.
        target: where their keys and values go, the first of them to ``offset``.
        certain: so many of them are no drafts.
        after: the state behind the last row; a runner sets it, and the engine keeps it if the step succeeds.
        kept: the state behind the certain ones, if drafts follow them.
    """

    rows: slice
    target: Node | Slot
    offset: int
    certain: int
    after: State | None = None
    kept: State | None = None

    @property
    def before(self) -> State | None:
        """The state in front of the first row; ``None`` where a text begins."""
        if isinstance(self.target, Slot):
            return self.target.state
        return self.target.state_before(self.offset)

    @property
    def drafted(self) -> bool:
        """Whether drafts follow the certain rows."""
        return self.certain < self.rows.stop - self.rows.start


@dataclass(frozen=True, slots=True)
class AdapterRun:
    """Rows from ``first`` up to ``stop`` that have this adapter, or none."""

    adapter: str | None
    first: int
    stop: int


@dataclass(slots=True)
class WindowedSegment:
    """A segment as a layer with a sliding window sees it: keys from ``first`` on, ``seen`` (1, R, keys) or all."""

    segment: Segment
    first: int
    seen: Tensor | None


@dataclass(slots=True)
class StepPlan:
    """See the module's documentation.

    Most steps only go on where the last one ended: then the plan moves on with them (:meth:`go_on`). What follows from
    how far it is ahead is computed when it is asked for.

    Attributes:
        token_ids: of the packed batch, (T).
        device: of the tensors.
        logit_rows: rows whose logits are needed.
        num_levels: how many partial results a row has at most.
        adapters: which rows have which adapter, run by run; empty if none has any.
        state_runs: rows that go on from a state, for models with recurrent layers; together all rows, in their order.
        ahead: how many steps the plan has gone on since it was made.
        windows, biases: what :meth:`segments_within` and :meth:`bias` have computed.
    """

    token_ids: list[int]
    _positions: Tensor
    device: torch.device
    logit_rows: Tensor
    segments: list[Segment] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    _groups: list[Group] = field(default_factory=list)
    num_levels: int = 1
    adapters: list[AdapterRun] = field(default_factory=list)
    state_runs: list[StateRun] = field(default_factory=list)
    ahead: int = 0
    _reached: int = 0  # the step that positions and groups stand at
    windows: dict[int | None, list[WindowedSegment]] = field(default_factory=dict)
    biases: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def go_on(self, token_ids: list[int]) -> None:
        """One new token of each of the same sequences, which stand one position further, and see one key more."""
        assert not self.chunks
        self.token_ids = token_ids
        self.ahead += 1

    @property
    def tokens(self) -> Tensor:
        """(T,) int64."""
        return torch.tensor(self.token_ids, device=self.device)

    @property
    def positions(self) -> Tensor:
        """(T,) int64."""
        self._catch_up()
        return self._positions

    @property
    def groups(self) -> list[Group]:
        """See :class:`Group`."""
        self._catch_up()
        return self._groups

    def _catch_up(self) -> None:
        if steps := self.ahead - self._reached:
            self._reached = self.ahead
            self._positions = self._positions + steps
            for group in self._groups:
                group.offsets = group.offsets + steps
                group.longest += steps
            self.windows.clear()
            self.biases.clear()

    def segments_within(self, window: int | None) -> list[WindowedSegment]:
        """The segments a layer with this window attends to; the same for all such layers."""
        self._catch_up()
        if window not in self.windows:
            self.windows[window] = [w for s in self.segments if (w := self._within(s, window)) is not None]
        return self.windows[window]

    def _within(self, segment: Segment, window: int | None) -> WindowedSegment | None:
        if window is None:
            return WindowedSegment(segment, 0, None)
        positions = self.positions[segment.rows]
        oldest, newest = int(positions.min()) - window + 1, int(positions.max()) - window + 1
        first = max(oldest - segment.start, 0)
        if first >= segment.length:
            return None
        if newest <= segment.start + first:
            return WindowedSegment(segment, first, None)
        keys = torch.arange(segment.start + first, segment.start + segment.length, device=positions.device)
        return WindowedSegment(segment, first, (keys > positions[:, None] - window)[None])

    def bias(self, index: int, window: int | None) -> Tensor:
        """The mask of group ``index``: (n, longest), 0 where the sequence sees the key and -inf where not."""
        self._catch_up()
        if (index, window) not in self.biases:
            group = self.groups[index]
            keys = torch.arange(group.longest, device=group.offsets.device)
            hidden = keys > group.offsets[:, None]
            if window is not None:
                hidden |= keys <= group.offsets[:, None] - window
            bias = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
            self.biases[index, window] = bias.masked_fill_(hidden, -math.inf)
        return self.biases[index, window]
