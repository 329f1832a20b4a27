"""What a step does for beam searches: logits reach their hypotheses, and the best continuations replace these."""

from __future__ import annotations

from torch import Tensor

from gossamer.engine.scheduler import Scheduler
from gossamer.engine.sequence import Request, Sequence, Status


def hand_out(branching: list[tuple[int, Sequence]], logits: Tensor) -> tuple[list[Request], list[Request]]:
    """Give every hypothesis its row of the logits.

    Returns:
        The requests whose hypotheses are all up to date, and those that got logits that are not numbers.
    """
    requests: dict[Request, bool] = {}  # -> whether its logits are numbers
    for row, sequence in branching:
        request = sequence.request
        assert request.beam is not None
        requests[request] = requests.get(request, True) and not bool(logits[row].isnan().any())
        request.beam.push(sequence, logits[row])
    ready = [
        request for request, sound in requests.items() if sound and request.beam is not None and request.beam.ready
    ]
    return ready, [request for request, sound in requests.items() if not sound]


def descend(request: Request, scheduler: Scheduler) -> int:
    """Replace the hypotheses of a request by their best continuations. Returns how many live; 0 ends the search."""
    assert request.beam is not None
    branches = request.beam.advance()
    last = {branch.parent: place for place, branch in enumerate(branches)}
    living: dict[Sequence, float] = {}
    for place, branch in enumerate(branches):
        parent = branch.parent  # goes on itself with its last branch; the others are copies made before that
        child = parent if last[parent] == place else scheduler.fork(parent)
        child.tokens.append(branch.token)
        child.output_ids.append(branch.token)
        living[child] = branch.logprob
    for sequence in request.sequences:
        if sequence not in living:
            scheduler.release(sequence)
            sequence.status = Status.FINISHED
    request.sequences = list(living)
    request.beam.descend(living)
    return len(living)
