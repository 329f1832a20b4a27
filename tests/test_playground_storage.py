"""Conversations that the page at / keeps in the browser: bounded, deleted, exported, imported, checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from browser_page import Browser, answer, ask, expect, script, stored
from running_server import Running

pytestmark = pytest.mark.browser
SAVE = """async (sizes) => {
  const storage = await import("/playground/storage.js");
  const { add, newConversation } = await import("/playground/conversation.js");
  const results = sizes.map((size, place) => {
    const conversation = newConversation();
    conversation.updated = place;
    add(conversation, null, { role: "user", content: `${place} ` + "x".repeat(size) });
    return storage.save(conversation);
  });
  return [results, storage.list(), storage.LIMITS];
}"""
READ = """async (text) => {
  const { read } = await import("/playground/conversation_file.js");
  const { path } = await import("/playground/conversation.js");
  try {
    const conversation = read(text);
    return { ...conversation, path: path(conversation) };
  } catch (error) {
    return `${error.constructor.name}: ${error.message}`;
  }
}"""


@pytest.fixture
def page(browser: Browser, server: Running) -> Any:
    page = browser.open(server.url)
    page.on("dialog", lambda dialog: dialog.accept())
    return page


@pytest.fixture(scope="module")
def read(chromium: Any, server: Running) -> Callable[[str], Any]:
    """What the page makes of a file: a conversation with the messages on its path, or the error."""
    page = chromium.new_context().new_page()
    page.goto(server.url)
    return lambda text: page.evaluate(READ, text)


def shown(page: Any) -> list[str]:
    found: list[str] = page.locator("#messages .text").all_text_contents()
    return found


def scripted(page: Any, question: str, text: str) -> None:
    page.unroute_all()
    script(page, [{"content": text}])
    answer(page, question)


def test_conversations_outlive_the_page_and_are_kept_apart(page: Any) -> None:
    page.get_by_label("System prompt").fill("Be brief.")
    scripted(page, "First question", "One")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".message")).to_have_count(0)
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")  # so that the two share it
    page.get_by_label("System prompt").fill("Be wordy.")
    scripted(page, "Second question", "Two")
    page.reload()
    assert shown(page) == ["Second question", "Two"]
    page.locator("#conversation-list").get_by_text("First question").click()
    assert shown(page) == ["First question", "One"]
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    page.reload()
    assert shown(page) == ["First question", "One"]
    page.get_by_role("button", name="Delete First question").click()
    expect(page.locator("#conversation-list li")).to_have_count(1)
    expect(page.locator(".message")).to_have_count(0)
    page.get_by_role("button", name="Delete all").click()
    expect(page.locator("#conversation-list li")).to_have_count(0)
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.includes('conversation'))") == []


def test_a_conversation_that_is_deleted_while_its_answer_comes_stays_deleted(page: Any) -> None:
    page.route("**/v1/chat/completions", lambda route: None)  # no answer comes
    ask(page, "Never mind")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.locator("#conversation-list li")).to_have_count(1)
    page.get_by_role("button", name="Delete Never mind").click()
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(page.locator("#conversation-list li")).to_have_count(0)
    page.unroute_all()
    scripted(page, "Another", "One")
    assert [each["content"] for each in stored(page)["messages"]] == ["Another", "One"]


def test_an_answer_ends_when_another_conversation_is_opened(page: Any) -> None:
    scripted(page, "First", "One")
    page.get_by_role("button", name="New conversation").click()
    page.unroute_all()
    page.route("**/v1/chat/completions", lambda route: None)
    ask(page, "Second")
    page.locator("#conversation-list").get_by_text("First").click()
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    assert shown(page) == ["First", "One"]
    page.reload()
    assert shown(page) == ["First", "One"]
    page.locator("#conversation-list").get_by_text("Second").click()
    assert shown(page) == ["Second"]
    expect(page.get_by_role("button", name="Generate an answer")).to_be_visible()


def test_a_new_tab_begins_with_the_last_system_prompt(page: Any, server: Running) -> None:
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Message", exact=True).focus()
    other = page.context.new_page()
    other.goto(server.url)
    expect(other.get_by_label("System prompt")).to_have_value("Be brief.")


def test_the_oldest_make_room(page: Any) -> None:
    results, kept, limits = page.evaluate(SAVE, [10] * 103)
    assert len(kept) == limits["conversations"] == 100
    assert [each["dropped"] for each in results[99:]] == [[], ["0 xxxxxxxxxx"], ["1 xxxxxxxxxx"], ["2 xxxxxxxxxx"]]
    page.evaluate("localStorage.clear()")
    results, kept, limits = page.evaluate(SAVE, [1_500_000] * 4)
    assert [each["dropped"] != [] for each in results] == [False, False, True, True]
    assert sum(each["size"] for each in kept) <= limits["characters"]
    assert kept[0]["title"].startswith("3 ") and len(kept) == 2
    (result,), kept, _ = page.evaluate(SAVE, [4_000_001])
    assert not result["kept"] and len(kept) == 2  # nothing is dropped for what cannot be kept


def test_a_browser_that_refuses_storage_is_enough(browser: Browser, server: Running) -> None:
    page = browser.open(server.url)
    page.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage'])"
        " Object.defineProperty(window, name, { get() { throw new DOMException('no', 'SecurityError'); } });"
    )
    page.reload()
    page.locator("#status.ready").wait_for()
    scripted(page, "Hello", "Hi")
    assert shown(page) == ["Hello", "Hi"]
    expect(page.locator("#conversation-list li")).to_have_count(1)


def test_damaged_entries_disturb_nothing(page: Any) -> None:
    page.evaluate(
        "localStorage.setItem('gossamer:conversation:a', '{'); localStorage.setItem('gossamer:settings', '[')"
    )
    page.reload()
    page.get_by_role("button", name="Without a title", exact=False).first.click()
    expect(page.get_by_role("alert")).to_have_text("This conversation cannot be read.")
    page.get_by_role("button", name="Delete Without a title").click()
    expect(page.locator("#conversation-list li")).to_have_count(0)


def test_an_export_is_imported_with_its_branches(page: Any, tmp_path: Path) -> None:
    page.get_by_label("System prompt").fill("Be brief.")
    scripted(page, "A <b>question</b>", "One")
    page.unroute_all()
    script(page, [{"content": "Another"}])
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".pager")).to_contain_text("2 / 2")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    path = tmp_path / "conversation.json"
    download.value.save_as(path)
    assert download.value.suggested_filename == "A-b-question-b.json"
    before = stored(page)
    page.get_by_role("button", name="Delete all").click()
    page.locator("#import-file").set_input_files(path)
    assert shown(page) == ["A <b>question</b>", "Another"]
    expect(page.locator(".pager")).to_contain_text("2 / 2")
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    page.get_by_role("button", name="Previous version").click()
    assert shown(page)[1] == "One"
    after = stored(page)
    assert after["id"] != before["id"]
    contents = [[each["content"] for each in side["messages"]] for side in (before, after)]
    assert contents[0] == contents[1]


def test_messages_of_openai_are_imported(page: Any, read: Callable[[str], Any]) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Call f"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "assistant", "content": "Done", "reasoning_content": "So."},
        {"role": "user", "content": "Thanks"},
    ]
    found = read(json.dumps({"messages": messages}))
    assert found["system"] == "Be brief." and found["title"] == "Call f"
    assert [each["role"] for each in found["path"]] == ["user", "assistant", "tool", "assistant", "user"]
    assert found["path"][1]["calls"] == [{"id": "c1", "name": "f", "arguments": "{}"}]
    page.locator("#import-file").set_input_files(
        {"name": "chat.json", "mimeType": "application/json", "buffer": json.dumps(messages).encode()}
    )
    page.get_by_role("button", name="Generate an answer").wait_for()  # the last message has none


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ("no JSON", "Failure: The file is not JSON"),
        ("{}", "Failure: The file holds no conversation: it has no list of messages."),
        ('{"messages": [3]}', "Failure: messages.0.role must be system, user, assistant or tool."),
        ('[{"role": "user", "content": [1]}]', "Failure: messages.0.content.text must be a text."),
        ('[{"role": "assistant", "tool_calls": [{"id": 1}]}]', "Failure: messages.0.calls.id must be a text."),
        ({"messages": [{"id": "a", "parent": "b", "role": "user", "content": "x"}]}, "messages.0.parent is no message"),
        ({"messages": [{"id": "a", "parent": "a", "role": "user", "content": "x"}]}, "messages.0.parent is no message"),
        (
            {"messages": [{"id": "a", "parent": None, "role": "user", "content": {}}]},
            "messages.0.content must be a text",
        ),
        (
            {"messages": [{"id": "a", "parent": None, "role": "root"}]},
            "messages.0.role must be user, assistant or tool",
        ),
        ({"messages": [], "system": 1}, "System must be a text"),
    ],
)
def test_files_that_are_no_conversation_are_refused_with_the_place(
    read: Callable[[str], Any], data: Any, error: str
) -> None:
    text = data if isinstance(data, str) else json.dumps({"format": "gossamer-conversation"} | data)
    assert error in read(text)


def test_what_a_file_says_beside_is_left_out(read: Callable[[str], Any]) -> None:
    message = {"id": "__proto__", "parent": None, "role": "user", "content": "x", "html": "<b>x</b>"}
    text = json.dumps(
        {"format": "gossamer-conversation", "messages": [message], "chosen": {"": "__proto__"}, "more": 1}
    )
    found = read(text)
    assert "more" not in found and found["messages"] == found["path"]
    assert set(found["messages"][0]) == {"id", "parent", "role", "content"}
