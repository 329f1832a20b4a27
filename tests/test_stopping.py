"""When sequences end: tokens, strings and lengths."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gossamer.engine.stopping import Stop, StopChecker
from gossamer.sampling_params import SamplingParams

EOS = frozenset({2, 3})


def make_checker(max_new_tokens: int = 100, **options: object) -> StopChecker:
    return StopChecker(SamplingParams(max_tokens=100, **options), EOS, max_new_tokens)


def feed(checker: StopChecker, pieces: list[str]) -> tuple[int, Stop] | None:
    """The number of pieces after which a stop string ended the text."""
    text = ""
    for count, piece in enumerate(pieces, start=1):
        text += piece
        stop = checker.check_text(text, count)
        if stop:
            return count, stop
    return None


def test_end_of_sequence_stops_unless_ignored() -> None:
    assert make_checker().check_token(3, 1) == Stop("stop", None, hides_token=True)
    assert make_checker(ignore_eos=True).check_token(3, 1) is None
    assert make_checker().check_token(4, 1) is None


def test_stop_tokens_give_themselves_as_the_reason() -> None:
    assert make_checker(stop_token_ids=[9]).check_token(9, 1) == Stop("stop", 9, hides_token=True)
    assert make_checker(stop_token_ids=[2], ignore_eos=True).check_token(2, 1) == Stop("stop", 2, hides_token=True)
    assert make_checker(stop_token_ids=[2]).check_token(2, 1) == Stop("stop", None, hides_token=True)
    kept = make_checker(stop_token_ids=[9], include_stop_str_in_output=True).check_token(9, 1)
    assert kept == Stop("stop", 9, hides_token=False)


def test_length_is_the_last_reason() -> None:
    checker = make_checker(max_new_tokens=5)
    assert checker.check_token(7, 4) is None
    assert checker.check_token(7, 5) == Stop("length")
    assert checker.check_token(2, 5) == Stop("stop", None, hides_token=True)


def test_nothing_but_the_length_stops_before_min_tokens() -> None:
    checker = make_checker(min_tokens=3, stop="b", max_new_tokens=4)
    assert checker.check_token(2, 2) is None
    assert checker.check_token(2, 3) is not None
    # vLLM: a stop string counts once it is completed by a token after the first min_tokens.
    assert feed(checker, ["b", "b", "b", "a", "ab"]) == (5, Stop("stop", "b", text="bbbaa"))
    # The context may end before min_tokens.
    assert make_checker(min_tokens=9, max_new_tokens=4).check_token(7, 4) == Stop("length")


def test_a_stop_string_may_span_tokens_and_cuts_the_text() -> None:
    assert feed(make_checker(stop="\n\nUser:"), ["Hi.\n", "", "\nUs", "er: what"]) == (
        4,
        Stop("stop", "\n\nUser:", text="Hi."),
    )
    included = feed(make_checker(stop="END", include_stop_str_in_output=True), ["a E", "ND b"])
    assert included == (2, Stop("stop", "END", text="a END"))
    assert feed(make_checker(stop="END"), ["E", "N", "d"]) is None


def test_of_two_strings_completed_together_the_longer_wins() -> None:
    assert feed(make_checker(stop=["END", "THE END"]), ["THE E", "ND"]) == (2, Stop("stop", "THE END", text=""))


def test_only_sequences_with_stop_strings_need_text() -> None:
    assert make_checker(stop="x").needs_text
    assert not make_checker().needs_text


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    include=st.booleans(),
)
def test_the_result_does_not_depend_on_how_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    def run(pieces: list[str]) -> Stop | None:
        found = feed(make_checker(stop=stops, include_stop_str_in_output=include), pieces)
        return found[1] if found else None

    bounds = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    assert run(pieces) == run(list(text)) == run([text])
    assert (run([text]) is not None) == any(stop in text for stop in stops)
