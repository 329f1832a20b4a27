"""A replica in time: the engine's steps as events of a simulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from gossamer.distributed.simulate.engine_model import EngineModel, Sequence, Work

if TYPE_CHECKING:
    import simpy


class ReplicaModel:
    """Runs an engine as long as it has anything to do.

    Args:
        env: the simulation.
        engine: see there.
        on_first_token, on_end: called with a sequence when it had its first token, and when it has ended or failed.
    """

    def __init__(
        self,
        env: simpy.Environment,
        engine: EngineModel,
        on_first_token: Callable[[Sequence], None],
        on_end: Callable[[Sequence], None],
    ) -> None:
        self.env, self.engine = env, engine
        self.on_first_token, self.on_end = on_first_token, on_end
        self.busy_seconds = 0.0
        self.events = 0
        self._works: list[Work] = []
        self._repeats = 0
        self._began = 0.0
        self._first_step = 0.0  # seconds
        self._growth = 0.0  # seconds by which each further step takes longer
        self._serial = 0  # of the event that ends these steps; those of other serials are void
        self._between = False  # two steps, telling of the first; requests that come by this are in the next

    def wake(self) -> None:
        """A request has been added."""
        if self._between:
            return
        if not self._works:
            self._begin()
        elif self._repeats > 1 and len(self.engine.active) < self.engine.max_num_seqs:
            done = self._steps_after(self.env.now - self._began)
            if done < self._repeats:
                self._repeats = done
                self._end_at(self._began + self._seconds(done))

    def _begin(self) -> None:
        """Start the next step, if there is anything to do."""
        while True:
            self._works, self._repeats = self.engine.plan()
            failed, self.engine.failed = self.engine.failed, []
            if failed:
                self._tell([], failed)
                self._repeats = min(self._repeats, 1)  # that may have brought new requests
            if self._works or not self.engine.busy:
                break
            if not failed:
                raise RuntimeError("the simulated scheduler found nothing to do for unfinished requests; report this")
        if self._works:
            counts, speeds = self.engine.counts(self._works), self.engine.speeds
            self._first_step, self._growth = speeds.seconds(counts), speeds.private_pair * counts.rows
            self._began = self.env.now
            self._end_at(self._began + self._seconds(self._repeats))

    def _tell(self, first: list[Sequence], ended: list[Sequence]) -> None:
        self._between = True
        for sequence in first:
            self.on_first_token(sequence)
        for sequence in ended:
            self.on_end(sequence)
        self._between = False

    def _seconds(self, steps: int) -> float:
        return steps * self._first_step + self._growth * (steps * (steps - 1) / 2)

    def _steps_after(self, elapsed: float) -> int:
        """How many steps have ended once the one that runs after so many seconds has."""
        half = self._growth / 2
        linear = self._first_step - half
        if half > 0:
            steps = math.ceil((math.sqrt(linear * linear + 4 * half * elapsed) - linear) / (2 * half))
        else:
            steps = math.ceil(elapsed / self._first_step)
        while steps > 1 and self._seconds(steps - 1) >= elapsed:
            steps -= 1
        while self._seconds(steps) < elapsed:
            steps += 1
        return max(steps, 1)

    def _end_at(self, time: float) -> None:
        self._serial += 1
        event = self.env.timeout(max(time - self.env.now, 0.0), self._serial)
        event.callbacks.append(self._ended)

    def _ended(self, event: simpy.Event) -> None:
        if event.value != self._serial:
            return
        self.events += 1
        self.busy_seconds += self.env.now - self._began
        first, ended = self.engine.commit(self._works, self._repeats)
        self._tell(first, ended)
        self._begin()
