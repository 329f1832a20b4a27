"""Ray Data gives parts to actors, and starts those again that die. What it is not asked for: to keep anything."""

from __future__ import annotations

import _thread
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from gossamer import errors
from gossamer.distributed.batch.job_directory import JobDirectory, read_json
from gossamer.distributed.batch.ownership import BEAT, Run
from gossamer.distributed.batch.part_runner import ActorTask, PartRunner
from gossamer.distributed.batch.tally import Tally
from gossamer.distributed.batch.workers import Workers
from gossamer.distributed.quiet import quiet_ray_data

#: Processes that may die one after the other while they load the model, for each actor.
MOST_LOADS = 3
_SECONDS = BEAT / 3


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
        with _told_as_ours(watch), watch, closing(iter(reports.iter_rows())) as rows:
            for row in rows:
                report = json.loads(row["report"])
                if report["error"] is not None:
                    kind, message = report["error"]
                    raise getattr(errors, kind, errors.OutputError)(message)
                watch.finished(report)


@contextmanager
def _told_as_ours(watch: _Watch) -> Iterator[None]:
    """What ends the wait for Ray, as an error of ours."""
    try:
        yield
    except (KeyboardInterrupt, errors.GossamerError):
        if watch.error is not None:
            raise watch.error from None
        raise
    except Exception as error:  # of Ray, of many kinds
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), repr(error))
        raise errors.EngineError(f"Ray ended the job: {reason.strip()}; go on later with --resume") from error
    if watch.error is not None:
        raise watch.error


class _Watch:
    """Shows that the command lives, and how far its parts are; finds actors that die while they load the model.

    Ray starts an actor again whatever it died of, and a part waits for it in silence. So this runs beside the wait for
    Ray, and interrupts it as Ctrl-C does.

    Attributes:
        error: why the job cannot go on.
    """

    def __init__(self, directory: JobDirectory, run: Run, actors: int, progress: Callable[[Tally], None]) -> None:
        self.error: Exception | None = None
        self._directory, self._run, self._progress = directory, run, progress
        self._most_loads = MOST_LOADS * actors
        self._done = Tally()
        self._showing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="gossamer-watch")
        self._may_interrupt = threading.current_thread() is threading.main_thread()

    def _watch(self) -> None:
        while not self._ended.wait(_SECONDS):
            try:
                self.look()
            except Exception as error:  # whatever it is, it is raised again in the thread that waits
                self.error = error
                if self._may_interrupt:
                    _thread.interrupt_main()
                return

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def finished(self, report: dict[str, Any]) -> None:
        """A part is done."""
        self._done = self._done.plus(Tally(**{name: report[name] for name in vars(Tally())}))
        self._show()

    def look(self) -> None:
        """Do what is due.

        Raises:
            GossamerError: the job cannot go on.
        """
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
        with self._showing:
            total = self._done
            for path in self._directory.running.glob("part-*"):
                part = read_json(path)
                if part is not None:
                    total = total.plus(Tally(**part))
            self._progress(total)
