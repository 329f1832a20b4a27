"""Makes requests, and the sequences they consist of, out of what the user asks for."""

from __future__ import annotations

from collections.abc import Sequence as Many

from gossamer.engine.beam import BeamSearch
from gossamer.engine.detokenizer import IncrementalDetokenizer
from gossamer.engine.endings import EndingEncoder
from gossamer.engine.grammar import Constraint, GrammarCompiler
from gossamer.engine.intake import Intake, Prompt
from gossamer.engine.reasoning import Reasoning
from gossamer.engine.sampling import SamplingState, make_random
from gossamer.engine.sequence import Request, Sequence
from gossamer.engine.stopping import StopChecker
from gossamer.engine.token_bytes import TokenBytes
from gossamer.errors import InvalidPromptError
from gossamer.sampling_params import BeamSearchParams, SamplingParams


class RequestFactory:
    """Each method checks its arguments, raises a :class:`~gossamer.errors.RequestError`, or returns a request.

    Args:
        intake: checks and encodes prompts.
        eos_token_ids: tokens that end a text.
        sharing: whether prompts may stand in the prefix tree.
        seed: where the random streams of requests without a seed come from.
    """

    def __init__(self, intake: Intake, eos_token_ids: frozenset[int], *, sharing: bool, seed: int) -> None:
        self.intake = intake
        self.grammars = GrammarCompiler(intake.tokenizer, intake.vocab_size, eos_token_ids)
        self.eos_token_ids = eos_token_ids
        self.sharing = sharing
        self.seed = seed
        self.tokens = TokenBytes(intake.tokenizer)
        self._number = 0

    def generation(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, stream: bool, draw: int | None
    ) -> Request:
        """``params.n`` completions of a prompt."""
        self.intake.check_params(params, request_id)
        text, ids = self.intake.encode(prompt, request_id)
        generate = params.max_tokens != 0
        self.intake.check_length(len(ids), int(generate), request_id)
        request = self._request(request_id, prompt, text, ids, params=params, stream=stream)
        stop_ids = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        limit = self.intake.max_model_len - len(ids)
        form = None if params.structured_outputs is None else self.grammars.form(params.structured_outputs)
        if form is not None:
            self.grammars.check(form)
        # A sequence has something to compute itself; the last token of a prompt only if its logits are wanted.
        own = 1 if generate else 2
        closing: list[int] = []
        if params.reasoning is not None and params.reasoning.max_tokens is not None:
            closing = EndingEncoder(self.intake.tokenizer, ".").encode(params.reasoning.closing)
        if params.prediction is not None:
            request.prediction = self.intake.prediction(params.prediction, request_id)
        for index in range(params.n):
            # The prompt's log-probabilities need its logits, so it is computed privately, once.
            score = index == 0 and params.prompt_logprobs is not None
            sequence = Sequence(
                request,
                index,
                list(ids),
                shareable=0 if score or not self.sharing else max(len(ids) - own, 0),
                generate=generate,
                score_from=1 if score else None,
                score_until=len(ids),
                max_new_tokens=limit if params.max_tokens is None else min(params.max_tokens, limit),
            )
            random = make_random(params.seed, self.seed, request.number if draw is None else draw, index)
            constraint = None if form is None else Constraint(self.grammars, form)
            thoughts = None if params.reasoning is None else Reasoning(params.reasoning, closing)
            sequence.sampling = SamplingState(params, ids, sequence.output_ids, stop_ids, random, constraint, thoughts)
            sequence.stop = StopChecker(params, self.eos_token_ids, sequence.max_new_tokens)
            if params.stop or thoughts is not None or (stream and params.detokenize) or params.logprobs is not None:
                sequence.detokenizer = IncrementalDetokenizer(self.tokens, params.skip_special_tokens, ids)
            request.sequences.append(sequence)
        return request

    def score(
        self, request_id: str, prompt: Prompt, continuations: Many[tuple[str | None, list[int]]] | None
    ) -> Request:
        """The log-likelihood of a prompt, or of each of its continuations."""
        text, ids = self.intake.encode(prompt, request_id)
        if continuations is not None and not continuations:
            raise InvalidPromptError(
                "continuations is empty; give at least one", request_id=request_id, param="continuations"
            )
        request = self._request(request_id, prompt, text, ids)
        for index, (name, ending) in enumerate(continuations or [(None, [])]):
            if continuations is not None:
                ending = self.intake.check_ids(ending, request_id, f"continuations[{index}]")
                request.continuations.append(name)
            self.intake.check_length(len(ids) + len(ending), 0, request_id)
            score_from = len(ids) if ending else 1
            sequence = Sequence(
                request,
                index,
                ids + ending,
                shareable=0 if not self.sharing else score_from - 1,
                generate=False,
                score_from=score_from,
                score_until=len(ids) + len(ending),
            )
            request.sequences.append(sequence)
        return request

    def beam_search(self, request_id: str, prompt: Prompt, params: BeamSearchParams) -> Request:
        """The best hypotheses behind a prompt."""
        text, ids = self.intake.encode(prompt, request_id)
        self.intake.check_length(len(ids), 1, request_id)
        end_ids = frozenset() if params.ignore_eos else self.eos_token_ids
        limit = min(params.max_tokens, self.intake.max_model_len - len(ids))
        beam = BeamSearch(params, end_ids, limit)
        request = self._request(request_id, prompt, text, ids, beam=beam)
        shareable = 0 if not self.sharing else len(ids) - 1
        root = Sequence(request, 0, list(ids), shareable=shareable, generate=True, max_new_tokens=limit)
        request.sequences.append(root)
        beam.start(root)
        return request

    def _request(
        self,
        request_id: str,
        prompt: Prompt,
        text: str | None,
        ids: list[int],
        *,
        params: SamplingParams | None = None,
        beam: BeamSearch | None = None,
        stream: bool = False,
    ) -> Request:
        """A request without sequences, the next one in order."""
        salt, adapter = self.intake.cache_salt(prompt, request_id), self.intake.adapter(prompt, request_id)
        self._number += 1
        return Request(
            request_id, self._number - 1, text, ids, params, beam, stream=stream, cache_salt=salt, adapter=adapter
        )
