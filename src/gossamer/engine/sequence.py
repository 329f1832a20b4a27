"""A request, and the sequences it becomes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum

from gossamer.engine.beam import BeamSearch
from gossamer.engine.detokenizer import IncrementalDetokenizer
from gossamer.engine.grammar import Constraint
from gossamer.engine.sampling import SamplingState
from gossamer.engine.slots import Slot
from gossamer.engine.speculation.texts import Position
from gossamer.engine.stopping import StopChecker
from gossamer.engine.tree import Node, TreeSalt, tree_salt
from gossamer.outputs import Logprob
from gossamer.sampling_params import SamplingParams


class Status(Enum):
    WAITING = "waiting"  # holds nothing
    PREFILL = "prefill"  # its path in the tree is locked; parts of it may be computed by others
    RUNNING = "running"  # owns a slot; what is left to compute is its own
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One completion of a request, or one text to be scored.

    Its tokens are cut in two: ``tokens[:private_start]`` are shared, their keys and values stand in the tree nodes from
    the root down to ``node``; the others stand in ``slot``, ``slot.length`` of them computed.

    Attributes:
        tokens: the prompt, then what was generated.
        shareable: how many leading tokens of the prompt may stand in the tree. At most all but the last: the last
            one must be computed by the sequence itself, for its logits. A text to be scored shares only
            what comes before the first token to be scored.
        generate: whether a token is sampled after the last one; otherwise the sequence ends when all is computed.
        score_from: index of the first token whose log-probability is wanted, or ``None``.
        score_until: index behind the last such token.
        max_new_tokens: how many tokens may be generated.
    """

    request: Request
    index: int
    tokens: list[int]
    shareable: int
    generate: bool
    score_from: int | None = None
    score_until: int = 0
    status: Status = Status.WAITING
    node: Node | None = None
    slot: Slot | None = None
    private_start: int = 0
    max_new_tokens: int = 0
    sampling: SamplingState | None = None
    stop: StopChecker | None = None
    detokenizer: IncrementalDetokenizer | None = None  # only if the text is needed before the end
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    top_scores: list[dict[int, Logprob]] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_cached: int = 0
    position: Position | None = None  # where drafts for it are looked up, once they are
    last_token: float | None = None  # when its last token came
    sought: bool = False  # whether its prefix was looked for on disk
    counted: bool = False  # whether its prompt is in the statistics already (a preempted sequence starts twice)

    @property
    def constraint(self) -> Constraint | None:
        """The grammar that it follows, if any."""
        return None if self.sampling is None else self.sampling.constraint

    def has_mask(self) -> bool:
        """Whether it is known which tokens may come next; asks for that if nobody has."""
        constraint = self.constraint
        if constraint is None:
            return True
        constraint.begin()
        return constraint.ready and not constraint.complete

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are there, once the sequence runs."""
        return self.private_start + (self.slot.length if self.slot else 0)

    @property
    def num_to_compute(self) -> int:
        """Tokens that have to be fed: the last token of a scored text predicts nothing that is wanted."""
        return len(self.tokens) if self.generate else len(self.tokens) - 1

    @property
    def finished_without_tokens(self) -> bool:
        """Whether it has ended, and was to generate nothing."""
        return not self.generate and self.status is Status.FINISHED

    @property
    def tokens_left(self) -> int:
        return self.max_new_tokens - len(self.output_ids)

    @property
    def order(self) -> tuple[int, int]:
        """Older sequences go first, and give way last."""
        return (self.request.number, self.index)


@dataclass(eq=False)
class Request:
    """What the user asked for.

    Attributes:
        number: order of arrival, also the source of the default seeds.
        stream: whether unfinished outputs are wanted at each step.
        cache_salt: what is computed for it is shared with requests of the same salt only.
        adapter: of the model; ``None`` for the model itself. What is computed with it is shared within it.
        prediction: tokens that the completions are expected to be, more or less.
        arrived, admitted, first_token, last_token: when it was queued, first got memory, and its tokens came, in
            seconds of ``time.perf_counter``.
    """

    request_id: str
    number: int
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams | None = None  # what to generate; with neither this nor a beam search, tokens are scored
    beam: BeamSearch | None = None
    stream: bool = False
    cache_salt: str | None = None
    adapter: str | None = None
    prediction: list[int] | None = None
    arrived: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    continuations: list[str | None] = field(default_factory=list)  # texts of the endings to be scored
    sequences: list[Sequence] = field(default_factory=list)

    @property
    def tree_salt(self) -> TreeSalt:
        """What keeps its keys and values apart in the prefix tree."""
        return tree_salt(self.cache_salt, self.adapter)

    @property
    def finished(self) -> bool:
        return all(s.status is Status.FINISHED for s in self.sequences)

    def release(self) -> None:
        """Let go of the sequences, which refer to it: so nothing of an ended request waits for a garbage collection."""
        for sequence in self.sequences:
            if sequence.constraint is not None:
                sequence.constraint.close()
        self.sequences, self.beam = [], None
