"""The load generator of ``gossamer bench serve``: what its clients see of servers, and its figures."""

from __future__ import annotations

import asyncio
import math
import os
from itertools import pairwise
from typing import Any

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_completions import (
    CLOSING,
    DROP,
    ERROR_EVENT,
    GARBAGE,
    HANGING_UP,
    NO_DONE,
    ODD,
    OK,
    SILENT,
    STATUS,
    TOKENS,
    Characters,
    events,
    fake_server,
    run,
    small,
)
from gossamer.bench.http_client import Address, Connection, EventSplitter
from gossamer.bench.memory_growth import anonymous_kilobytes, slope_per_minute
from gossamer.bench.serve_load import Prompts, percentiles, run_load
from gossamer.errors import ConfigurationError


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    """No character twice, so that other places are other texts."""
    monkeypatch.setattr("gossamer.bench.serve_load.reference_text", lambda: "".join(map(chr, range(0x4E00, 0x6000))))


class TestClients:
    def test_what_they_ask_and_what_they_count(self) -> None:
        load = small()
        with fake_server() as fake:
            result = run(fake, load, first=100)
        assert (result.asked, result.completed, result.errors, result.short_answers) == (6, 6, {}, 0)
        assert (result.completion_tokens, result.prompt_tokens, result.cached_tokens) == (6 * TOKENS, 60, 48)
        assert len(result.ttft) == len(result.e2e) == 6
        assert len(result.itl) == 6 * (TOKENS - 1)  # the event without text is no token's
        assert result.connections == fake.connections == fake.most_at_once == 2  # kept, one request at a time
        prompts = Prompts(Characters(), load)
        assert sorted(body["prompt"] for body in fake.bodies) == sorted(prompts[100 + i] for i in range(6))
        one = fake.bodies[0]
        assert one["ignore_eos"] is True and one["temperature"] == 0 and one["max_tokens"] == TOKENS
        assert one["stream_options"] == {"include_usage": True} and one["model"] == "fake"

    def test_where_a_stream_is_cut_does_not_matter(self) -> None:
        with fake_server(*[ODD] * 4) as fake:
            result = run(fake, small(clients=1, requests=4))
        assert (result.completed, result.errors, result.completion_tokens) == (4, {}, 4 * TOKENS)
        assert len(result.itl) == 4 * (TOKENS - 1)
        assert all(0 < first < end for first, end in zip(result.ttft, result.e2e, strict=True))

    @pytest.mark.parametrize(
        ("way", "kind"),
        [
            (STATUS, "status 429"),
            (DROP, "disconnected"),
            (ERROR_EVENT, "error in the stream"),
            (NO_DONE, "incomplete stream"),
            (GARBAGE, "not HTTP"),
        ],
    )
    def test_one_that_fails_is_counted_and_the_others_go_on(self, way: int, kind: str) -> None:
        with fake_server(OK, way) as fake:
            result = run(fake, small(clients=1, requests=4))
        assert result.errors == {kind: 1}
        assert (result.asked, result.completed, result.completion_tokens) == (4, 3, 3 * TOKENS)
        assert len(result.e2e) == 3

    def test_one_that_takes_too_long(self) -> None:
        with fake_server(SILENT) as fake:
            result = run(fake, small(clients=1, requests=2, timeout=0.2))
        assert result.errors == {"timeout": 1} and result.completed == 1

    def test_a_connection_may_end_with_the_answer(self) -> None:
        with fake_server(CLOSING, CLOSING) as fake:
            result = run(fake, small(clients=1, requests=3))
        assert (result.completed, result.errors, fake.connections) == (3, {}, 3)

    def test_a_connection_may_end_between_two_requests(self) -> None:
        with fake_server(*[HANGING_UP] * 5) as fake:
            result = run(fake, small(clients=1, requests=5))
        assert (result.completed, result.errors, len(fake.bodies)) == (5, {}, 5)
        assert result.connections == fake.connections == 5

    def test_answers_that_are_no_streams(self) -> None:
        with fake_server() as fake:
            result = run(fake, small(stream=False, new=20))
        assert (result.completed, result.completion_tokens, result.short_answers) == (6, 54, 6)
        assert not result.ttft and not result.itl and len(result.e2e) == 6
        assert "stream" not in fake.bodies[0] and result.to_dict()["itl_ms"] is None

    def test_a_server_that_is_gone_is_given_up(self) -> None:
        load = small(requests=1000)
        result = run_load("http://127.0.0.1:9", load, Prompts(Characters(), load), model="fake")
        assert result.completed == 0 and set(result.errors) == {"no connection"} and result.asked < 20
        assert result.to_dict()["output_tokens_per_s"] == 0

    def test_a_time_instead_of_a_number_of_requests(self) -> None:
        with fake_server() as fake:
            result = run(fake, small(requests=None, seconds=0.3), pid=os.getpid())
        assert result.asked == result.completed > 0 and result.duration >= 0.3
        assert result.memory and result.memory[0][1] > 1000
        assert result.to_dict()["memory"]["kb_per_minute"] is None  # no minute is over

    def test_a_server_that_counts_no_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        without = [each for each in events() if b"completion_tokens" not in each]
        monkeypatch.setattr("fake_completions.events", lambda: without)
        with fake_server() as fake:
            result = run(fake, small())
        assert result.completion_tokens == 6 * TOKENS and result.cached_tokens is None
        assert result.to_dict()["cached_share"] is None


class TestHttp:
    @given(st.lists(st.integers(0, 400), max_size=8), st.sampled_from([b"\n", b"\r\n"]))
    def test_events_do_not_depend_on_cuts(self, cuts: list[int], line_end: bytes) -> None:
        wire = b": hello\n\ndata: one\ndata: more\n\nevent: x\ndata:two\n\n" + b"".join(events())
        wire = wire.replace(b"\n", line_end)
        places = [0, *sorted(cuts), len(wire)]
        splitter = EventSplitter()
        found = [each for a, b in pairwise(places) for each in splitter.feed(wire[a:b])]
        assert found[:2] == [b"one\nmore", b"two"] and found[-1] == b"[DONE]"
        assert found[2:] == [each[6:-2] for each in events()]

    @pytest.mark.parametrize("url", ["127.0.0.1:80", "https://host", "http://", "http://host:port", "http://a:99999"])
    def test_addresses_that_are_none(self, url: str) -> None:
        with pytest.raises(ConfigurationError):
            Address.parse(url)

    def test_addresses(self) -> None:
        assert Address.parse("http://[::1]:80/proxy/v1/") == Address("::1", 80, "/proxy")

    def test_what_is_no_http_is_an_error(self) -> None:
        async def ask(url: str) -> None:
            connection = Connection(Address.parse(url), 5)
            try:
                await connection.request("POST", "/v1/completions", b"{}")
            finally:
                connection.close()

        with fake_server(GARBAGE) as fake, pytest.raises(httptools.HttpParserError):
            asyncio.run(ask(fake.url))


class TestPrompts:
    def test_prefixes_in_turn_and_suffixes_that_begin_elsewhere(self) -> None:
        load = small(num_prefixes=2, token_ids=True)
        prompts = Prompts(Characters(), load)
        many = [prompts[number] for number in range(200)]
        assert {len(ids) for ids in many} == {25}
        assert {tuple(ids[:20]) for ids in many[::2]} == {tuple(many[0][:20])} != {tuple(many[1][:20])}
        assert len({tuple(ids[20:]) for ids in many}) == 200
        assert Prompts(Characters(), small(num_prefixes=2))[3] == Characters().decode(many[3])
        assert Prompts(Characters(), small(num_prefixes=2, seed=1, token_ids=True))[0][20:] != many[0][20:]

    def test_a_text_shorter_than_a_prompt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gossamer.bench.serve_load.reference_text", lambda: "abcdefg")
        prompts = Prompts(Characters(), small(prefix=10, suffix=9, num_prefixes=2))
        assert prompts[0][:10] == "abcdefgabc" and prompts[1][:10] == "efgabcdefg"
        assert len({prompts[number][10:] for number in range(7)}) == 7

    @pytest.mark.parametrize(
        "change", [{"clients": 0}, {"new": 0}, {"seconds": 1.0}, {"requests": None}, {"timeout": math.inf}]
    )
    def test_loads_that_are_none(self, change: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError):
            small(**change)


class TestFigures:
    def test_percentiles(self) -> None:
        found = percentiles([number / 1e3 for number in range(101)])
        assert found == {"p50": 50, "p90": 90, "p99": 99}
        assert percentiles([0.5]) == {"p50": 500, "p90": 500, "p99": 500}
        assert percentiles([]) is None

    @given(st.floats(-1e4, 1e4), st.floats(0, 1e6))
    def test_the_slope_of_a_line_is_found_whatever_came_before(self, per_minute: float, start: float) -> None:
        line = [(second, start + per_minute * second / 60) for second in range(60, 180)]
        noise = [(second, 1e7 - second) for second in range(0, 60, 7)]
        assert slope_per_minute([*noise, *line]) == pytest.approx(per_minute, abs=1e-3)

    @pytest.mark.parametrize("samples", [[], [(10, 1.0), (20, 2.0)], [(70, 1.0)], [(70, 1.0), (70, 2.0)]])
    def test_no_slope_without_two_settled_samples(self, samples: list[tuple[float, float]]) -> None:
        assert slope_per_minute(samples) is None

    def test_memory_of_nobody(self) -> None:
        assert anonymous_kilobytes(2**22 + 1) is None
