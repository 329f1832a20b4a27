"""The text of a completion, token by token, and what each of its tokens adds to it."""

from __future__ import annotations

from gossamer.engine.detokenizer import IncrementalDetokenizer
from gossamer.engine.sequence import Sequence
from gossamer.engine.stopping import Stop
from gossamer.engine.token_bytes import TokenBytes
from gossamer.outputs import Logprob


def extend_text(
    sequence: Sequence, tokens: TokenBytes, logprobs: dict[int, Logprob] | None, stop: Stop | None
) -> Stop | None:
    """Add the last token of ``sequence`` to its text.

    Args:
        logprobs: those at the token's place, if they were asked for; they are told their texts.
        stop: why the token ends the sequence, if it does.

    Returns:
        Why the sequence ends: ``stop``, or a stop string that the text now holds.
    """
    params, checker, text = sequence.request.params, sequence.stop, sequence.detokenizer
    assert params is not None and checker is not None
    token = sequence.output_ids[-1]
    hidden = stop is not None and stop.hides_token
    if logprobs is not None:
        assert text is not None
        text.describe(logprobs, token)
        if hidden:
            logprobs[token].token_bytes = b""
        sequence.logprobs.append(logprobs)
    if text is not None and not hidden:
        text.push([token])
    return settle_text(sequence, tokens, stop)


def settle_text(sequence: Sequence, tokens: TokenBytes, stop: Stop | None) -> Stop | None:
    """Bring the text of ``sequence`` up to its tokens, and to its end if it ends: for ``stop``, or a stop string."""
    params, checker, text = sequence.request.params, sequence.stop, sequence.detokenizer
    assert params is not None and checker is not None
    hidden = stop is not None and stop.hides_token
    if text is None and stop is not None and params.detokenize:  # nobody needed it until now
        text = IncrementalDetokenizer(tokens, params.skip_special_tokens, sequence.request.prompt_token_ids)
        text.push(sequence.output_ids[:-1] if hidden else sequence.output_ids)
    if text is None:
        return stop
    if stop is not None:
        _complete_last(sequence, text.flush())
    if checker.needs_text:
        stop = checker.check_text(text.text, len(sequence.output_ids)) or stop
    if params.detokenize:
        sequence.text = text.text if stop is None or stop.text is None else stop.text
    return stop


def describe_prompt(sequence: Sequence, start: int, tokens: TokenBytes, entries: list[dict[int, Logprob]]) -> None:
    """Tell the log-probabilities of the tokens of a prompt from ``start`` on their texts, each behind those before."""
    params = sequence.request.params
    assert params is not None
    text = IncrementalDetokenizer(tokens, params.skip_special_tokens, sequence.tokens[:start])
    for token, candidates in zip(sequence.tokens[start:], entries, strict=False):
        text.describe(candidates, token)
        text.push([token])


def _complete_last(sequence: Sequence, rest: str) -> None:
    """What stands for a character that was not completed is the text of the last token that belongs to it."""
    if not rest:
        return
    for token, candidates in zip(reversed(sequence.output_ids), reversed(sequence.logprobs), strict=False):
        if candidates[token].token_bytes:
            candidates[token].decoded_token = (candidates[token].decoded_token or "") + rest
            return
