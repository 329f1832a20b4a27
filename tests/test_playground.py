"""The page at / in a real browser: it streams, branches, stops, counts, and can be used by keyboard and on a phone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser_page import PHONE, Browser, answer, ask, expect, finished, stored
from gossamer import LLM
from html_page import Page
from running_server import MODEL, TEMPLATE, Running, make_chat_llm, running

pytestmark = pytest.mark.browser
TINY_CONTEXT = 32768
KEY = "clé-of-the-tests"
TOOL = {
    "type": "function",
    "function": {
        "name": "depth",
        "parameters": {
            "type": "object",
            "properties": {"harbour": {"enum": ["Oslo", "Bergen"]}},
            "required": ["harbour"],
        },
    },
}


@pytest.fixture(scope="module")
def endless(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that goes on until it is stopped: no token ends its texts."""
    changes = {"initializer_range": 0.4, "max_position_embeddings": TINY_CONTEXT, "eos_token_id": None}
    path = make_tiny_llama(tmp_path_factory.mktemp("endless"), **changes)
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    return path


@pytest.fixture(scope="module")
def server(endless: Path) -> Iterator[Running]:
    with running(lambda: make_chat_llm(endless, memory="256MB")) as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: Running) -> Any:
    return browser.open(server.url)


def texts(page: Any) -> list[str]:
    found: list[str] = page.locator("#messages .text").all_text_contents()
    return found


# --- asking -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_streamed_continued_and_its_cost_is_told(page: Any) -> None:
    body = answer(page, "Hello")
    assert body["stream"] and body["max_tokens"] == 12 and body["model"] == MODEL
    said = stored(page)["messages"][1]["content"]
    assert said
    expect(page.locator(".figures").first).to_contain_text("12 tokens at")
    expect(page.locator(".figures").first).to_contain_text("first token after")
    body = answer(page, "And <b>then</b>?")
    assert [each["content"] for each in body["messages"]] == ["Hello", said, "And <b>then</b>?"]
    assert texts(page)[2] == "And <b>then</b>?"
    first, second = page.locator(".figures meter").all()
    assert (
        second.evaluate("(each) => each.value") >= first.evaluate("(each) => each.max") - 1
    )  # the last token of a prompt


def test_an_edited_message_is_a_branch_that_shares_the_prefix(page: Any) -> None:
    page.get_by_label("System prompt").fill("You are a patient librarian of the harbour. " * 4)
    answer(page, "First")
    answer(page, "Second")
    before = texts(page)
    page.get_by_role("button", name="Edit message").last.click()
    expect(page.get_by_label("Edited message")).to_be_focused()
    page.keyboard.type("!")
    with page.expect_request("**/v1/chat/completions") as request:
        page.keyboard.press("Enter")
    finished(page)
    said = [each["content"] for each in request.value.post_data_json["messages"]]
    assert said[1:] == ["First", said[2], "Second!"]
    assert texts(page)[:2] == before[:2] and texts(page)[2] == "Second!"
    share = page.locator(".figures meter").last.evaluate("(each) => each.value / each.max")
    assert share > 0.8
    page.get_by_role("button", name="Previous version").click()
    assert texts(page) == before
    expect(page.get_by_role("button", name="Next version")).to_be_focused()
    page.get_by_role("button", name="Next version").click()
    assert texts(page)[2] == "Second!"


def test_editing_can_be_given_up(page: Any) -> None:
    answer(page, "First")
    page.get_by_role("button", name="Edit message").click()
    page.keyboard.type(" else")
    page.keyboard.press("Escape")
    assert texts(page)[0] == "First"
    expect(page.get_by_role("button", name="Edit message")).to_be_focused()
    expect(page.get_by_label("Edited message")).to_have_count(0)


def test_regenerating_keeps_the_first_answer_and_computes_no_prompt_again(page: Any) -> None:
    answer(page, "Tell me about the tide", Temperature=1)
    first = texts(page)[1]
    page.get_by_role("button", name="Regenerate").click()
    finished(page)
    expect(page.locator(".pager")).to_contain_text("2 / 2")
    cached, of = page.locator(".figures meter").evaluate("(each) => [each.value, each.max]")
    assert cached == of - 1  # the last token gives the logits
    page.get_by_role("button", name="Previous version").click()
    assert texts(page)[1] == first


def test_an_answer_that_was_cut_goes_on(page: Any) -> None:
    answer(page, "Hello", Max_tokens=5)
    expect(page.locator(".answer .note")).to_contain_text("Cut off at the token limit.")
    with page.expect_request("**/v1/chat/completions") as request:
        page.get_by_role("button", name="Continue").click()
    finished(page)
    body = request.value.post_data_json
    assert body["continue_final_message"] and body["messages"][-1]["role"] == "assistant"
    _, longer = stored(page)["messages"]
    shorter = body["messages"][-1]["content"]
    assert longer["content"].startswith(shorter) and len(longer["content"]) > len(shorter)


def test_several_answers_are_beside_each_other_and_the_chosen_one_goes_on(page: Any) -> None:
    page.get_by_label("Answers").select_option("3")
    answer(page, "Hello", Temperature=1, Seed=1)
    boxes = [each.bounding_box() for each in page.locator(".answer").all()]
    assert len({box["y"] for box in boxes}) == 1 and len({box["x"] for box in boxes}) == 3
    assert len(set(texts(page)[1:])) == 3
    page.get_by_label("Answer 3").check()
    third = stored(page)["messages"][3]
    assert answer(page, "Go on")["messages"][1]["content"] == third["content"]


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_keeps_what_has_come(page: Any, server: Running, how: str) -> None:
    ask(page, "Hello", Max_tokens=30000)
    expect(page.locator(".answer .text")).not_to_be_empty()
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    finished(page)
    expect(page.locator(".answer .note")).to_have_text("Stopped.")
    expect(page.locator(".figures")).to_contain_text("prompt tokens cached")
    server.wait_idle()
    assert texts(page)[1]


def test_the_settings_reach_the_server(page: Any) -> None:
    page.get_by_label("Stop", exact=True).fill("END\n\\n\\n")
    page.get_by_label("Reasoning").select_option("low")
    body = answer(page, "Hello", Top_p=0.9, Top_k=5, Seed=3, Repetition_penalty=1.1)
    sent = {name: body[name] for name in ("top_p", "top_k", "seed", "repetition_penalty", "stop", "reasoning_effort")}
    assert sent == {
        "top_p": 0.9,
        "top_k": 5,
        "seed": 3,
        "repetition_penalty": 1.1,
        "stop": ["END", "\n\n"],
        "reasoning_effort": "low",
    }
    assert "min_p" not in body  # what is empty is left to the server
    page.reload()
    expect(page.get_by_label("Top k")).to_have_value("5")
    expect(page.get_by_label("Stop", exact=True)).to_have_value("END\n\\n\\n")


def test_what_the_server_refuses_is_said_and_the_question_is_kept(browser: Browser, server: Running) -> None:
    page = browser.open(server.url, quiet=False)  # the browser itself reports statuses of 400 and above
    ask(page, "Hello", Max_tokens=0)  # the page knows this itself
    expect(page.get_by_role("alert")).to_contain_text("Max tokens: ")
    expect(page.get_by_label("Max tokens")).to_be_focused()
    ask(page, "Hello", Repetition_penalty=0)
    expect(page.get_by_role("alert")).to_have_text("repetition_penalty must be a number > 0, got 0.0.")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Hello")
    expect(page.locator(".message")).to_have_count(0)
    answer(page, "Hello", Repetition_penalty=1)
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_label("Repetition penalty").fill("0")
    page.get_by_role("button", name="Edit message").click()
    page.get_by_label("Edited message").fill("Another")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("repetition_penalty")
    expect(page.get_by_label("Edited message")).to_have_value("Another")
    expect(page.locator(".pager")).to_have_count(0)


def test_thoughts_of_a_model_that_thinks_are_folded(browser: Browser, endless: Path) -> None:
    def make() -> LLM:
        llm = make_chat_llm(endless, memory="64MB")
        llm.tokenizer.chat_template = TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}")
        return llm

    with running(make) as server:
        page = browser.open(server.url)
        answer(page, "Hello", Max_tokens=30)
        expect(page.locator(".answer .text")).to_be_empty()  # it has not come to an end of its thoughts
        expect(page.locator(".reasoning > div")).to_be_hidden()
        page.get_by_text("Thought for").click()
        expect(page.locator(".reasoning > div")).not_to_be_empty()
        assert stored(page)["messages"][1]["reasoning"]


# --- tools ------------------------------------------------------------------------------------------------------------


def test_a_call_is_shown_and_answered_by_hand(page: Any) -> None:
    page.get_by_text("Tools", exact=True).click()
    page.get_by_label("Functions as JSON").fill(json.dumps([TOOL["function"]]))  # a function alone is a tool, too
    page.get_by_label("Calls").select_option("required")
    page.get_by_label("At once").select_option("one")
    body = answer(page, "How deep is it?", Max_tokens=200)
    assert body["tools"] == [TOOL] and body["tool_choice"] == "required"
    expect(page.locator(".call figcaption")).to_have_text("Call of depth")
    shown = page.locator(".call pre").text_content()
    assert json.loads(shown)["harbour"] in ("Oslo", "Bergen") and shown.startswith('{\n  "')
    expect(page.locator(".answer .note")).to_contain_text("the chat template knows none")
    page.get_by_label("Calls").select_option("none")
    page.get_by_label("Result of depth", exact=True).fill("<i>12</i> m")
    with page.expect_request("**/v1/chat/completions") as request:
        page.get_by_role("button", name="Send result").click()
    finished(page)
    *_, call, result = request.value.post_data_json["messages"]
    assert json.loads(call["tool_calls"][0]["function"]["arguments"]) == json.loads(shown)
    assert result == {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "<i>12</i> m"}
    expect(page.locator(".result pre")).to_have_text("<i>12</i> m")
    expect(page.locator(".message")).to_have_count(4)
    page.get_by_role("button", name="Edit results").click()
    page.get_by_label("Result of depth", exact=True).fill("13 m")
    page.get_by_role("button", name="Send result").click()
    finished(page)
    expect(page.locator(".result pre")).to_have_text("13 m")
    expect(page.locator(".results .pager")).to_contain_text("2 / 2")


def test_tools_that_are_no_json_are_refused_by_the_page(page: Any) -> None:
    page.get_by_text("Tools", exact=True).click()
    page.get_by_label("Functions as JSON").fill("[{")
    ask(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("Tools: ")
    expect(page.get_by_label("Functions as JSON")).to_be_focused()
    expect(page.get_by_label("Message", exact=True)).to_have_value("Hello")


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_tree_is_drawn_and_prefixes_are_pinned(page: Any) -> None:
    page.get_by_label("System prompt").fill("You are a patient librarian. " * 5)
    answer(page, "Hello")
    expect(page.locator("#tree g.node.done")).not_to_have_count(0)
    page.get_by_label("Name").fill("<i>Librarian</i>")
    page.get_by_role("button", name="Pin system prompt").click()
    unpin = page.get_by_role("button", name="Unpin <i>Librarian</i>")
    expect(unpin).to_be_visible()
    expect(page.locator("#tree g.node.pinned")).not_to_have_count(0)
    page.get_by_text("The same as a table").click()
    expect(page.locator("#table tr", has_text="yes")).not_to_have_count(0)
    unpin.click()
    expect(unpin).to_have_count(0)
    expect(page.get_by_role("button", name="Pin system prompt")).to_be_focused()
    expect(page.locator("#tree g.node.pinned")).to_have_count(0)


# --- everybody --------------------------------------------------------------------------------------------------------


def test_the_page_can_be_used_by_keyboard_alone(page: Any) -> None:
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("Two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    expect(page.locator(".question .text")).to_have_text("Two\nlines")
    expect(page.locator(".answer .text")).not_to_be_empty()
    page.keyboard.press("Escape")
    finished(page)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    reached = set()
    for _ in range(80):  # nothing keeps the focus
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.name"))
        reached.add(page.evaluate("document.activeElement.textContent.slice(0, 40)"))
    assert {"model", "new", "import", "system", "n", "log", "message", "send", "pin-name", "pin"} <= reached
    assert {"Edit", "Regenerate", "Skip to the message"} <= reached


def test_every_control_has_a_name(page: Any) -> None:
    answer(page, "Hello")
    controls = "[...document.querySelectorAll('input, select, textarea, button, meter')]"
    unnamed = f"{controls}.filter((each) => !each.labels?.length && !each.ariaLabel && !each.textContent.trim()).length"
    assert page.evaluate(unnamed) == 0


def test_light_and_dark(browser: Browser, server: Running) -> None:
    background = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => +a + +b, 0) / 3"
    light, dark = (browser.open(server.url, color_scheme=scheme) for scheme in ("light", "dark"))
    assert light.evaluate(background) > 200 and dark.evaluate(background) < 50


def test_a_phone(browser: Browser, server: Running) -> None:
    page = browser.open(server.url, viewport=PHONE, has_touch=True)
    expect(page.get_by_label("System prompt")).to_be_hidden()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Max tokens").fill("12")
    page.locator("#settings").get_by_role("button", name="Close").click()
    expect(page.get_by_label("Max tokens")).to_be_hidden()
    page.get_by_label("Message", exact=True).fill("a" * 200)
    page.get_by_role("button", name="Send", exact=True).click()
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for panel in ("Conversations", "Cache"):
        page.get_by_role("button", name=panel, exact=True).click()
        box = page.locator(f"#{panel.lower()}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
        page.keyboard.press("Escape")
        expect(page.locator(f"#{panel.lower()}")).to_be_hidden()


def test_a_key_is_asked_for_and_stays_in_the_tab(browser: Browser, endless: Path) -> None:
    with running(lambda: make_chat_llm(endless, memory="64MB"), api_keys=(KEY,)) as server:
        page = browser.open(server.url, quiet=False, ready=False)
        expect(page.get_by_text("The server needs an API key")).to_be_visible()
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_text("The server does not know this API key")).to_be_visible()
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.get_by_label("API key")).to_be_hidden()
        answer(page, "Hello")
        expect(page.locator(".answer .text")).not_to_be_empty()
        assert KEY in page.evaluate("Object.values(sessionStorage)")
        assert KEY not in page.evaluate("JSON.stringify({...localStorage}) + document.cookie")
        page.reload()
        expect(page.get_by_text("Ready")).to_be_visible()


# --- the files --------------------------------------------------------------------------------------------------------


class TestFiles:
    """Without a browser: what is served, to whom, and under which policy."""

    @pytest.fixture(scope="class")
    def locked(self, endless: Path) -> Iterator[Running]:
        with running(lambda: make_chat_llm(endless, memory="64MB"), api_keys=("key",)) as server:
            yield server

    def test_all_files_are_there_without_a_key(self, locked: Running) -> None:
        status, raw, headers = locked.raw("/")
        assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
        links = Page(raw.decode()).links
        assert len(links) > 4
        for link in links:
            if link == "#message":
                continue
            assert locked.raw(f"/{link}")[0] == 200, link
        assert locked.raw("/v1/models")[0] == 401

    def test_the_policy_permits_nothing_inline_and_nobody_else(self, locked: Running) -> None:
        for path in ("/", "/playground/main.js", "/playground/base.css"):
            _, _, headers = locked.raw(path)
            policy = headers["content-security-policy"]
            assert "unsafe" not in policy and "http" not in policy and "*" not in policy
            assert "default-src 'none'" in policy and "require-trusted-types-for 'script'" in policy
            assert headers["x-content-type-options"] == "nosniff"

    @pytest.mark.parametrize("path", ["/playground/", "/playground/nothing.js", "/playground/..%2fapp.py"])
    def test_there_are_no_other_files(self, locked: Running, path: str) -> None:
        assert locked.raw(path, authorization="Bearer key")[0] == 404

    def test_no_script_writes_markup(self, locked: Running) -> None:
        pending, seen = {"/playground/main.js"}, set()
        while pending:
            path = pending.pop()
            seen.add(path)
            status, raw, headers = locked.raw(path)
            assert status == 200 and headers["content-type"].startswith("text/javascript"), path
            text = raw.decode()
            assert not any(word in text for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"))
            pending |= {
                f"/playground/{line.split('./')[1][:-2]}" for line in text.split("\n") if ' from "./' in line
            } - seen
        assert len(seen) > 10
