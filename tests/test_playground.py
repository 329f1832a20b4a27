"""The playground in a real browser: it streams, stops, counts, can be used by keyboard, and calls nobody else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt install chromium)"),
]
expect = playwright.expect
expect.set_options(timeout=20_000)
MAIN = "from gossamer.cli.app import main; main()"
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
KEY = "clé-of-the-tests"
WIDE, NARROW = {"width": 1400, "height": 900}, {"width": 390, "height": 800}


@pytest.fixture(scope="module")
def model(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It goes on until it is stopped: no token ends its texts."""
    changes = {"initializer_range": 0.4, "max_position_embeddings": 32768, "eos_token_id": None}
    path = make_tiny_llama(tmp_path_factory.mktemp("chat"), **changes)
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@contextmanager
def serving(model: Path, log: Path, *arguments: str) -> Iterator[str]:
    """A server's address, once it is ready."""
    options = ["--port", "0", "--memory", "256MB", "--log-format", "json", "--drain-timeout", "1", *arguments]
    with log.open("w") as stderr:
        process = subprocess.Popen([sys.executable, "-c", MAIN, "serve", str(model), *options], stderr=stderr)
    try:
        deadline = time.monotonic() + 120
        while '"ready: ' not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        address = re.search(r"listening on (http://[\d.:]+)", log.read_text())
        assert address is not None
        yield address[1]
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(model, tmp_path_factory.mktemp("log") / "server.log") as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a server; in the end, checks that no script failed and that no other server was called."""
    contexts, faults = [], []

    def open_page(address: str, *, quiet: bool = True, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce"} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        if quiet:
            page.on("console", lambda line: faults.append(line.text) if line.type in ("error", "warning") else None)
        allowed = (f"{address}/", "data:")
        page.on("request", lambda request: None if request.url.startswith(allowed) else faults.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def page(opened: Callable[..., Any], server: str) -> Any:
    page = opened(server)
    expect(page.get_by_text("Ready")).to_be_visible()
    return page


def ask(page: Any, text: str, **settings: object) -> None:
    for name, value in ({"Temperature": 0, "Max_tokens": 12} | settings).items():
        page.get_by_label(name.replace("_", " "), exact=True).fill(str(value))
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def finished(page: Any) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_an_answer_is_streamed_and_continued(page):
    with page.expect_request("**/v1/chat/completions") as first:
        ask(page, "Hello")
    finished(page)
    assert first.value.post_data_json["stream"] and first.value.post_data_json["max_tokens"] == 12
    answer = page.locator(".answer .text").text_content()
    assert answer
    expect(page.locator(".turn")).to_contain_text("12 tokens in")
    with page.expect_request("**/v1/chat/completions") as second:
        ask(page, "And <b>then</b>?")
    finished(page)
    said = [message["content"] for message in second.value.post_data_json["messages"]]
    assert said == ["Hello", answer, "And <b>then</b>?"]
    expect(page.get_by_text("And <b>then</b>?")).to_be_visible()
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_several_answers_are_beside_each_other_and_the_chosen_one_goes_on(page):
    page.get_by_label("Answers").select_option("3")
    ask(page, "Hello", Temperature=1, Seed=1)
    finished(page)
    boxes = [each.bounding_box() for each in page.locator(".answer").all()]
    assert len({box["y"] for box in boxes}) == 1 and len({box["x"] for box in boxes}) == 3
    texts = page.locator(".answer .text").all_text_contents()
    assert len(set(texts)) == 3
    page.get_by_label("Answer 3").check()
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "Go on")
    assert request.value.post_data_json["messages"][1]["content"] == texts[2]


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_keeps_what_has_come(page, how):
    ask(page, "Hello", Max_tokens=30000)
    expect(page.locator(".answer .text")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click() if how == "button" else page.keyboard.press("Escape")
    finished(page)
    assert page.locator(".answer .note").text_content() == "Stopped."
    expect(page.locator("#sequences")).to_have_text("0 running, 0 waiting")


def test_a_message_can_be_sent_by_keyboard_alone(page):
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the message")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.type("Two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    expect(page.locator(".question .text")).to_have_text("Two\nlines")
    page.keyboard.press("Escape")
    finished(page)
    reached = set()
    for _ in range(60):  # nothing keeps the focus
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.name"))
    assert {"model", "new", "system", "n", "api-key", "log", "message", "send", "pin-name", "pin"} <= reached


def test_every_control_has_a_name(page):
    controls = "[...document.querySelectorAll('input, select, textarea')]"
    assert page.evaluate(f"{controls}.filter((each) => !each.labels.length && !each.ariaLabel).length") == 0


def test_the_tree_is_drawn_and_prefixes_are_pinned(page):
    page.get_by_label("System prompt").fill("You are a patient librarian. " * 5)
    ask(page, "Hello")
    finished(page)
    expect(page.locator("#tree g.node.done")).not_to_have_count(0)
    page.get_by_label("Name").fill("<i>Librarian</i>")
    page.get_by_role("button", name="Pin system prompt").click()
    unpin = page.get_by_role("button", name="Unpin <i>Librarian</i>")
    expect(unpin).to_be_visible()
    expect(page.locator("#tree g.node.pinned")).not_to_have_count(0)
    page.get_by_text("The same as a table").click()
    expect(page.locator("#table tr").first).to_contain_text("yes")
    unpin.click()
    expect(unpin).to_have_count(0)
    expect(page.get_by_role("button", name="Pin system prompt")).to_be_focused()
    expect(page.locator("#tree g.node.pinned")).to_have_count(0)


def test_what_the_server_refuses_is_said_and_the_question_is_kept(opened, server):
    page = opened(server, quiet=False)  # the browser itself reports statuses of 400 and above
    ask(page, "Hello", Max_tokens=0)  # the page knows this itself
    expect(page.get_by_role("alert")).to_contain_text("Max tokens: ")
    expect(page.get_by_label("Max tokens")).to_be_focused()
    ask(page, "Hello", Repetition_penalty=0)
    expect(page.get_by_role("alert")).to_have_text("repetition_penalty must be a number > 0, got 0.0.")
    expect(page.get_by_label("Message")).to_have_value("Hello")
    ask(page, "Hello", Repetition_penalty=1)
    finished(page)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_key_is_asked_for_and_stays_in_the_tab(opened, model, tmp_path):
    with serving(model, tmp_path / "server.log", "--api-key", KEY) as address:
        page = opened(address, quiet=False)
        expect(page.get_by_text("The server needs an API key")).to_be_visible()
        page.get_by_label("API key").fill("wrong")
        ask(page, "Hello")
        expect(page.get_by_role("alert")).to_contain_text("does not know this API key")
        page.get_by_label("API key").fill(KEY)
        ask(page, "Hello")
        finished(page)
        expect(page.locator(".answer .text")).not_to_be_empty()
        assert page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [[KEY], 0, ""]
        page.reload()
        expect(page.get_by_text("Ready")).to_be_visible()


def test_light_dark_and_narrow(opened, server):
    background = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => +a + +b, 0) / 3"
    light, dark = (opened(server, color_scheme=scheme) for scheme in ("light", "dark"))
    assert light.evaluate(background) > 200 and dark.evaluate(background) < 50
    narrow = opened(server, viewport=NARROW)
    narrow.get_by_label("Message").fill("a" * 200)
    narrow.get_by_label("Message").press("Enter")
    finished(narrow)
    assert narrow.evaluate("document.documentElement.scrollWidth <= innerWidth")
