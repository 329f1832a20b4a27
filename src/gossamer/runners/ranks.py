"""The processes that compute one model together: what they tell each other, and how all end when one does.

A rank that fails tells the others why, through the store in which torchrun's processes meet, and closes its
connections. One that is killed or stands still tells nothing; it is noticed by its connections, or after
:data:`TIMEOUT`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from gossamer.engine.runner import RunnerEndedError
from gossamer.errors import ConfigurationError, GossamerError

TIMEOUT = timedelta(seconds=60)  # that a rank waits for the others in a step
STORE = timedelta(seconds=5)  # and for what another has said about its end
_FAILURE = "gossamer/failure"  # where the store has the first one


class Ranks:
    """The processes that compute one model together, seen from one of them.

    Attributes:
        rank: this one's number.
        size: how many there are.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._failure = ""

    @property
    def leads(self) -> bool:
        """Whether this is the one that chooses tokens, writes and prints."""
        return self.rank == 0

    def all(self, value: Any) -> list[Any]:
        """What each rank gives, as JSON has it."""
        data = torch.frombuffer(bytearray(json.dumps(value, default=str).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(int(size) for size in sizes)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))))
        return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def first(self, value: Any) -> Any:
        """What rank 0 gives, as JSON has it."""
        return self.all(value if self.leads else None)[0]

    def compare(self, value: Mapping[str, Any], what: str) -> None:
        """Whether all ranks give the same.

        Raises:
            RunnerEndedError: on all of them, if they do not; it names the first difference.
        """
        digest = hashlib.blake2b(json.dumps(value, default=str).encode(), digest_size=8).digest()
        digests = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(digests, torch.from_numpy(np.frombuffer(digest, np.int64).copy()))
        if len({int(each) for each in digests}) > 1:
            raise RunnerEndedError(f"the ranks differ in {what}: {_difference(self.all(value))}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Whatever fails inside ends all ranks: the others learn why.

        Raises:
            GossamerError: of this rank, as it was raised.
            RunnerEndedError: for anything else, and for what has happened to others.
        """
        if self._failure:
            raise RunnerEndedError(self._failure)
        try:
            yield
        except RunnerEndedError as error:  # which all ranks raise
            self._end(str(error), tell=False)
            raise
        except KeyboardInterrupt:
            self._end("it was interrupted", tell=False)
            raise
        except Exception as error:
            if (lost := _lost(error)) is not None:
                seconds = f"{TIMEOUT.total_seconds():g} seconds"
                reason = self._told() or f"another rank has ended, or did not answer within {seconds} ({lost})"
            else:
                reason = str(error) if isinstance(error, GossamerError) else f"{type(error).__name__}: {error}"
            self._end(reason, tell=lost is None)
            if lost is None and isinstance(error, GossamerError):
                raise
            raise RunnerEndedError(reason) from error

    def _told(self) -> str:
        """What the first rank that failed has said about it; empty if none has, or nobody answers any more."""
        there = _soon(lambda: self._store.get(_FAILURE) if self._store.check([_FAILURE]) else b"")
        return (there or b"").decode()

    def _end(self, reason: str, *, tell: bool) -> None:
        if tell:
            _soon(lambda: self._store.compare_set(_FAILURE, "", f"rank {self.rank} has ended: {reason}"))
        self._failure = reason
        dist.destroy_process_group()  # closes the connections, by which the others notice


def _soon(ask: Callable[[], bytes]) -> bytes | None:
    """What a store answers, if it does: its process may be gone, or stand still."""
    answers: list[bytes] = []

    def run() -> None:
        with suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(STORE.total_seconds())
    return answers[0] if answers else None


def _lost(error: BaseException | None) -> str | None:
    """What a connection to another rank says about its end, if that is what an error comes from."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
            return re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0]
        error = error.__cause__
    return None


_ranks: Ranks | None = None


def join(size: int) -> Ranks:
    """Meet the other processes that torchrun has started; a second call returns the same.

    Raises:
        ConfigurationError: torchrun has started another number of them, or none; or they could not compute on the CPU.
    """
    global _ranks
    start = f"torchrun --nproc-per-node {size} -m gossamer.cli batch ..."
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ConfigurationError(
            f"tensor_parallel={size} takes {size} processes, and this one was started alone: start them with `{start}`"
        )
    if (world := int(os.environ["WORLD_SIZE"])) != size:
        raise ConfigurationError(
            f"tensor_parallel={size} takes {size} processes, and torchrun has started {world}: give both the same "
            f"number, as in `{start} --tensor-parallel {size}`"
        )
    if (accelerator := torch.accelerator.current_accelerator()) is not None:
        raise ConfigurationError(
            f"tensor_parallel computes on CPUs, and this PyTorch is made for {accelerator.type}, which transformers "
            "would use: install a build of PyTorch for the CPU"
        )
    if _ranks is None:
        if dist.is_initialized():
            raise ConfigurationError("tensor_parallel makes the process group itself: do not call init_process_group")
        try:
            store, rank, _ = next(dist.rendezvous("env://", timeout=5 * TIMEOUT))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise ConfigurationError(f"the processes of torchrun do not find each other: {error}") from error
        _ranks = Ranks(store, rank, size)
    return _ranks


def _difference(values: list[dict[str, Any]]) -> str:
    """Where the first rank that differs from rank 0 does so first.

    >>> _difference([{"tokens": [1, 2]}, {"tokens": [1, 2]}, {"tokens": [1, 3]}])
    'tokens[1] is 2 in rank 0 and 3 in rank 2'
    """
    rank = next(number for number, value in enumerate(values) if value != values[0])
    ours, others = values[0], values[rank]
    name = next(name for name in [*ours, *others] if ours.get(name) != others.get(name))
    one, other = ours.get(name), others.get(name)
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            name, one, other = f"the number of {name}", len(one), len(other)
        else:
            place = next(place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
            name, one, other = f"{name}[{place}]", one[place], other[place]
    return f"{name} is {one} in rank 0 and {other} in rank {rank}"
