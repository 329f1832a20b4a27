"""Processes of ``torch.distributed`` that compute one thing: every call is checked before it is made.

Gloo ends a process (SIGABRT) whose peer sends another number of bytes than it expects, and a process that left without
a word keeps the others waiting. So each collective begins with a *frame*: a sum of one fixed size, in which each
process has a slot for a digest of what it is about to do, or for the word that something is wrong with it. All see all
slots, and come to the same decision. Up to 2,048 numbers travel inside of the frame: a product with m gradients is one
sum.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gossamer import errors
from gossamer.errors import ConfigurationError, GossamerError

TIMEOUT = 60.0  # seconds
_INSIDE = 2048  # numbers of a frame
_FAULT = -1.0  # in place of a digest
_MOST_TEXT = 1 << 20  # bytes that a process tells the others


class Group:
    """The processes of a process group, as :class:`~gossamer.operators.ranks.Ranks`.

    What is sent goes over gloo, through the CPU's memory, in a group of its own with a timeout of its own: the one that
    is given only says who takes part.

    Args:
        processes: a process group; all processes by default.
        timeout: seconds after which those that wait for another one give up.

    Attributes:
        rank, size: number of this process, and how many there are.
        process_group: of gloo.

    Raises:
        ConfigurationError: ``torch.distributed`` is not initialized.
        GossamerError: a process did not come; over gloo it is named.
    """

    def __init__(self, processes: dist.ProcessGroup | None = None, timeout: float = TIMEOUT) -> None:
        if not dist.is_initialized():
            raise ConfigurationError("call torch.distributed.init_process_group first: it says who takes part")
        self._wait = datetime.timedelta(seconds=timeout)
        members = dist.get_process_group_ranks(processes or dist.group.WORLD)
        self._lost: str | None = None
        self._told: GossamerError | None = None
        self._meshes: dict[str, DeviceMesh] = {}
        try:
            if "gloo" in str(dist.get_backend_config(processes)):  # others cannot say who is missing
                dist.monitored_barrier(processes, self._wait, wait_all_ranks=True)
            self.process_group = dist.new_group(
                members, timeout=self._wait, backend="gloo", use_local_synchronization=processes is not None
            )
        except RuntimeError as error:
            raise GossamerError(f"not all processes of the group came within {timeout:g} s: {error}") from error
        self.rank, self.size = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)

    def add(self, sums: Tensor, fault: GossamerError | None = None, agreed: str = "") -> Tensor:
        """See :class:`~gossamer.operators.ranks.Ranks`.

        Raises:
            GossamerError: the fault of a process, in all of them; or one is gone, or does not answer.
        """
        inside = sums.numel() <= _INSIDE
        self._frame(sums if inside else sums.new_zeros(0), fault, f"{agreed}\nsum of {list(sums.shape)}")
        if inside:
            return self._received.view(sums.shape).to(sums.device)
        total = sums.detach().to("cpu", torch.float64, copy=True).contiguous()
        self._call(dist.all_reduce, total)
        return total.to(sums.device)

    def gather(self, part: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """See :class:`~gossamer.operators.ranks.Ranks`."""
        fault = None
        if part.shape != (lengths[self.rank],):
            fault = ConfigurationError(f"a part of {lengths[self.rank]} numbers is expected, got {tuple(part.shape)}")
        self._frame(torch.zeros(0), fault, f"gathering {list(lengths)} numbers, {part.dtype}")
        longest = max(lengths)  # gloo gathers parts of one length
        own = torch.nn.functional.pad(part.detach().cpu(), (0, longest - len(part)))
        found = [torch.empty_like(own) for _ in lengths]
        self._call(dist.all_gather, [each.view(torch.uint8) for each in found], own.view(torch.uint8))
        return [each[:length].to(part.device) for each, length in zip(found, lengths, strict=True)]

    def exchange(self, parts: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """See :class:`~gossamer.operators.ranks.Ranks`."""
        matrix = torch.zeros(2, self.size, self.size, dtype=torch.float64)
        matrix[0, self.rank], matrix[1, :, self.rank] = torch.tensor(sent), torch.tensor(received)
        plan = self.add(matrix, None, f"exchanging {parts.dtype}")
        if not torch.equal(plan[0], plan[1]):
            raise ConfigurationError("the processes expect other numbers of each other than they send")
        own = parts.detach().cpu().contiguous()
        out = own.new_empty(sum(received))
        width = own.element_size()  # as bytes: gloo does not know every type
        counts = ([width * count for count in each] for each in (received, sent))
        self._call(dist.all_to_all_single, out.view(torch.uint8), own.view(torch.uint8), *counts)
        return out.to(parts.device)

    def share(self, tensors: Mapping[str, Tensor] | None, source: int) -> dict[str, Tensor]:
        """See :class:`~gossamer.operators.ranks.Ranks`. They travel as a safetensors file does."""
        packed = b""
        if self.rank == source:
            packed = save({name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()})
        size = torch.tensor([len(packed)], dtype=torch.float64)
        length = int(self.add(size, None, f"sharing what process {source} has"))
        buffer = torch.empty(length, dtype=torch.uint8)
        if packed:
            buffer = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        self._call(dist.broadcast, buffer, group_src=source)
        return dict(tensors or {}) if self.rank == source else load(buffer.numpy().tobytes())

    @property
    def is_lost(self) -> bool:
        """Whether a process is gone, so that nothing can be done together any more."""
        return self._lost is not None

    def was_told(self, error: GossamerError) -> bool:
        """Whether all processes have this error."""
        return error is self._told

    def mesh(self, device_type: str) -> DeviceMesh:
        """See :class:`~gossamer.operators.ranks.Ranks`."""
        if device_type not in self._meshes:
            self._meshes[device_type] = DeviceMesh.from_group(self.process_group, device_type)
        return self._meshes[device_type]

    def _frame(self, sums: Tensor, fault: GossamerError | None, agreed: str) -> None:
        """One sum of a fixed size; ``self._received`` is that of ``sums``."""
        count = sums.numel()
        frame = torch.zeros(_INSIDE + self.size, dtype=torch.float64)
        if fault is None:
            frame[:count] = sums.detach().reshape(-1)
        frame[_INSIDE + self.rank] = _FAULT if fault is not None else _digest(agreed)
        self._call(dist.all_reduce, frame)
        slots = frame[_INSIDE:]
        if bool((slots == _FAULT).any()):
            words = self._tell(f"{type(fault).__name__}\n{fault}" if fault is not None else "")
            wrong = {rank: words[rank] for rank in range(self.size) if slots[rank] == _FAULT}
            self._told = _error_of(wrong, words)
            raise self._told from fault
        if bool((slots != slots[0]).any()):
            self._told = ConfigurationError(_difference(self._tell(agreed)))
            raise self._told
        self._received = frame[:count]

    def _tell(self, text: str) -> list[str]:
        """What each process says."""
        own = torch.tensor(list(text.encode()[:_MOST_TEXT]), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(own)
        self._call(dist.all_reduce, lengths)
        found = [torch.zeros(int(lengths.max()), dtype=torch.uint8) for _ in range(self.size)]
        self._call(dist.all_gather, found, torch.nn.functional.pad(own, (0, int(lengths.max()) - len(own))))
        pairs = zip(found, lengths.tolist(), strict=True)
        return [bytes(each[:length].tolist()).decode(errors="replace") for each, length in pairs]

    def _call(self, collective: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        if self._lost is None:
            try:
                collective(*arguments, group=self.process_group, **named)
                return
            except RuntimeError as error:
                self._lost = str(error).splitlines()[0]
        # what the others have of this call is unknown: there is no way to go on with them
        raise GossamerError(
            f"process {self.rank} lost the others: one of {self.size} ended, or did not answer for "
            f"{self._wait.total_seconds():g} s ({self._lost}); start all of them again from the last checkpoint"
        )


def _digest(text: str) -> float:
    """48 bits, which are a whole number in fp64."""
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()))


def _error_of(wrong: Mapping[int, str], words: Sequence[str]) -> GossamerError:
    """The error of all processes from the class and message of those that had one.

    >>> _error_of({1: "CheckpointError\\nx is damaged"}, ["", "CheckpointError\\nx is damaged"])
    CheckpointError('process 1: x is damaged')
    """
    kinds, texts = zip(*(text.split("\n", 1) for text in wrong.values()), strict=True)
    kind: type[GossamerError] = getattr(errors, kinds[0], GossamerError)
    if issubclass(kind, (errors.RequestError, errors.PeerError)):  # which take more than a message
        kind = GossamerError
    if len(set(words)) == 1:
        return kind(texts[0])
    return kind("; ".join(f"process {rank}: {text}" for rank, text in zip(wrong, texts, strict=True)))


def _difference(texts: Sequence[str]) -> str:
    """The first line in which a process differs from the first one.

    >>> _difference(["window 4\\nbfloat16", "window 4\\nbfloat16", "window 4\\nfloat32"])
    "the processes do not do the same: process 0 has 'bfloat16', process 2 has 'float32'"
    """
    first = texts[0].split("\n")
    for rank, text in enumerate(texts):
        lines = text.split("\n")
        for number in range(max(len(first), len(lines))):
            one, other = (each[number] if number < len(each) else "nothing" for each in (first, lines))
            if one != other:
                return f"the processes do not do the same: process 0 has {one!r}, process {rank} has {other!r}"
    return "the processes do not do the same"
