"""Ray Data gives parts to actors, and starts those again that die. What it is not asked for: to keep anything."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from gossamer import errors
from gossamer.distributed.batch.job_directory import JobDirectory, read_json
from gossamer.distributed.batch.nodes import Workers
from gossamer.distributed.batch.ownership import BEAT, Run
from gossamer.distributed.batch.part_runner import ActorTask, PartRunner
from gossamer.distributed.batch.quiet import quiet_ray_data
from gossamer.distributed.batch.tally import Tally

#: Processes that may die one after the other while they load the model, for each actor.
MOST_LOADS = 3
_POLL_SECONDS = 0.5


def answer_parts(
    parts: list[int],
    task: ActorTask,
    workers: Workers,
    run: Run,
    progress: Callable[[Tally], None],
    *,
    runner: type[PartRunner] = PartRunner,
) -> None:
    """Have parts answered, in their order, by actors that each load the model once.

    Args:
        parts: their numbers.
        progress: called now and then with what is done of all of them.
        runner: what an actor is.

    Raises:
        GossamerError: what an actor could not go on after, such as a full disk, or a model that cannot be loaded.
    """
    directory = JobDirectory(task.directory)
    watch = _Watch(directory, run, workers.actors, progress)
    with quiet_ray_data() as data:
        blocks = data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
        reports = blocks.map_batches(
            runner,
            batch_size=1,
            fn_constructor_args=(task,),
            compute=data.ActorPoolStrategy(size=min(workers.actors, len(parts)), max_tasks_in_flight_per_actor=1),
            num_cpus=workers.threads,
            memory=workers.memory,
        )
        for row in _interruptible(reports.iter_rows(), watch):
            report = json.loads(row["report"])
            if report["error"] is not None:
                kind, message = report["error"]
                raise getattr(errors, kind, errors.OutputError)(message)
            watch.finished(report)


def _interruptible(rows: Any, watch: _Watch) -> Iterator[Any]:
    """Rows from a thread of their own, so that what the watch finds ends the wait for the next one."""
    got: list[Any] = []
    there = threading.Condition()
    end = object()

    def read() -> None:
        try:
            for row in rows:
                with there:
                    got.append(row)
                    there.notify()
            last: Any = end
        except BaseException as error:
            last = error
        with there:
            got.append(last)
            there.notify()

    threading.Thread(target=read, daemon=True, name="gossamer-reports").start()
    while True:
        with there:
            if not got:
                there.wait(_POLL_SECONDS)
            row = got.pop(0) if got else None
        watch.look()
        if row is end:
            return
        if isinstance(row, BaseException):
            reason = next((line for line in reversed(str(row).splitlines()) if line.strip()), repr(row))
            raise errors.EngineError(f"Ray ended the job: {reason.strip()}; go on later with --resume") from row
        if row is not None:
            yield row


class _Watch:
    """Shows that the command lives, and how far its parts are; finds actors that die while they load the model.

    Ray starts an actor again whatever it died of, and a part waits for it in silence.
    """

    def __init__(self, directory: JobDirectory, run: Run, actors: int, progress: Callable[[Tally], None]) -> None:
        self._directory, self._run, self._progress = directory, run, progress
        self._most_loads = MOST_LOADS * actors
        self._done = Tally()
        self._beaten = 0.0

    def finished(self, report: dict[str, Any]) -> None:
        """A part is done."""
        self._done = self._done.plus(Tally(**{name: report[name] for name in vars(Tally())}))
        self._show()

    def look(self) -> None:
        """Do what is due.

        Raises:
            GossamerError: the job cannot go on.
        """
        now = time.monotonic()
        if now - self._beaten < BEAT / 3:
            return
        self._beaten = now
        self._run.beat()
        self._show()
        loads = self._loads()
        if loads > self._most_loads:
            raise errors.EngineError(
                f"{loads} processes died while they loaded the model, most likely for lack of memory: take fewer "
                "--actors, or a smaller --memory, and go on with --resume"
            )

    def _loads(self) -> int:
        """Processes that began to load the model after the last one that succeeded."""
        count = 0
        try:
            for line in self._directory.loads.read_text().splitlines():
                run, what = json.loads(line)
                count = 0 if what == "done" or run != self._run.number else count + 1
        except (FileNotFoundError, ValueError):
            pass
        return count

    def _show(self) -> None:
        total = self._done
        for path in self._directory.running.glob("part-*"):
            part = read_json(path)
            if part is not None:
                total = total.plus(Tally(**part))
        self._progress(total)
