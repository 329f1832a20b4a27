"""The processes that torchrun started for one command, which sum up the statistics of its calibration data.

``torchrun --nproc-per-node 2 -m gossamer.cli compress ...`` starts the command twice. What one of them cannot do ends
both, and the first one says why.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from gossamer.distributed.fisher.group import TIMEOUT, Group
from gossamer.errors import GossamerError
from gossamer.operators.ranks import ALONE, Ranks

# One that ends closes its connections, which the others see at once. This is for a machine that vanishes: between two
# words of it there may be the training of a large block.
_PATIENCE = 3600.0  # seconds
_TOLD_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def was_launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return all(name in os.environ for name in _TOLD_BY_TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def launched() -> Iterator[Ranks]:
    """The processes that torchrun started; this one alone if it did not.

    An error of ours in the body is raised in the first process, whoever had it; the others end with its exit status.

    Raises:
        GossamerError: the others did not come, or one is gone.
    """
    if not was_launched():
        yield ALONE
        return
    try:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT))
    except (RuntimeError, ValueError) as error:
        raise GossamerError(f"the processes that torchrun started do not find each other: {error}") from error
    group = Group(timeout=_PATIENCE)
    try:
        yield group
    except GossamerError as error:
        if not group.was_told(error):
            with suppress(GossamerError):
                group.add(torch.zeros(0), error)
        if group.rank == 0 or group.is_lost:
            raise
        with suppress(GossamerError):  # torchrun ends all when one has ended: the first one has to speak before
            group.add(torch.zeros(0), agreed="the end")
        raise SystemExit(2) from error
    dist.destroy_process_group()
