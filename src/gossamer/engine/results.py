"""Turns a request's sequences into what the user gets."""

from __future__ import annotations

from gossamer.engine.beam import BeamSearch
from gossamer.engine.detokenizer import decode
from gossamer.engine.sequence import Request, Sequence
from gossamer.engine.token_bytes import TokenBytes
from gossamer.errors import RequestError
from gossamer.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    ContinuationScore,
    RequestMetrics,
    RequestOutput,
    ScoreOutput,
)

Output = RequestOutput | ScoreOutput | BeamSearchOutput


class ResultBuilder:
    """Builds outputs; the vocabulary is needed for the texts of tokens."""

    def __init__(self, tokens: TokenBytes) -> None:
        self.tokens = tokens

    def build(self, request: Request, error: RequestError | None = None) -> Output:
        """The output of a request as it stands, finished or not."""
        if request.beam is not None:
            return self._hypotheses(request, request.beam, error)
        if request.params is None:
            return self._scores(request, error)
        output = RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            finished=request.finished,
            error=error,
            metrics=RequestMetrics(
                request.arrived, request.admitted, request.first_token, request.last_token, request.params.max_tokens
            ),
            adapter=request.adapter,
        )
        if error is None:
            output.outputs = [self._completion(sequence) for sequence in request.sequences]
            # Completions beyond the first share the prompt with the first; only that one tells what was cached.
            output.num_cached_tokens = request.sequences[0].num_cached
            first = request.sequences[0]
            if request.params.prompt_logprobs is not None and (first.output_ids or first.finished_without_tokens):
                output.prompt_logprobs = [None, *request.sequences[0].top_scores]
        return output

    def _hypotheses(self, request: Request, beam: BeamSearch, error: RequestError | None) -> BeamSearchOutput:
        output = BeamSearchOutput(request.request_id, request.prompt_token_ids, error=error)
        if error is None:
            output.sequences = [
                BeamSearchSequence(
                    decode(
                        self.tokens,
                        each.output_ids[:-1] if each.finish_reason == "stop" else each.output_ids,
                        prompt_token_ids=request.prompt_token_ids,
                    ),
                    each.output_ids,
                    each.logprob,
                    each.score,
                    each.finish_reason,
                )
                for each in beam.finished
            ]
        return output

    def _completion(self, sequence: Sequence) -> CompletionOutput:
        params = sequence.request.params
        assert params is not None
        completion = CompletionOutput(
            sequence.index,
            _settled(sequence),
            list(sequence.output_ids),
            finish_reason="length" if sequence.finished_without_tokens else sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )
        if sequence.sampling is not None and sequence.sampling.reasoning is not None:
            completion.num_reasoning_tokens = sequence.sampling.reasoning.count
        if sequence.position is not None:
            completion.num_accepted_prediction_tokens = sequence.position.accepted
            completion.num_rejected_prediction_tokens = sequence.position.rejected
        if params.logprobs is not None:
            completion.logprobs = list(sequence.logprobs)
            completion.cumulative_logprob = sum(
                entry[token].logprob for entry, token in zip(sequence.logprobs, sequence.output_ids, strict=True)
            )
        return completion

    def _scores(self, request: Request, error: RequestError | None) -> ScoreOutput:
        output = ScoreOutput(request.request_id, request.prompt_token_ids, error=error)
        if error is not None:
            return output
        output.num_cached_tokens = request.sequences[0].num_cached
        if not request.continuations:
            output.token_logprobs = [None, *request.sequences[0].scores]
        else:
            for sequence, text in zip(request.sequences, request.continuations, strict=True):
                ids = sequence.tokens[len(request.prompt_token_ids) :]
                output.continuations.append(ContinuationScore(text, ids, sequence.scores))
        return output


def _settled(sequence: Sequence) -> str:
    """The text without what may yet be cut: the end of an unfinished text may be the beginning of a stop string."""
    params = sequence.request.params
    assert params is not None
    if sequence.finish_reason is not None or not params.stop or params.include_stop_str_in_output:
        return sequence.text
    longest = max(len(string) for string in params.stop)
    return sequence.text[: max(len(sequence.text) - (longest - 1), 0)]
