"""What the page at / makes of a model's text: Markdown as elements, markup as text, thoughts folded, calls gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from browser_page import Browser, ask, expect, finished, script, stored
from running_server import Running

pytestmark = pytest.mark.browser
Render = Callable[[str], str]
SHOW = """async (text) => {
  const { showMarkdown } = await import("/playground/markdown.js");
  const element = document.createElement("div");
  showMarkdown(element, text);
  return element.innerHTML;
}"""
GROW = """async (texts) => {
  const { showMarkdown } = await import("/playground/markdown.js");
  const element = document.createElement("div");
  const first = [];
  for (const text of texts) {
    showMarkdown(element, text);
    first.push(element.firstChild);
  }
  return [element.innerHTML, first.every((each) => each === first[0])];
}"""


@pytest.fixture
def page(browser: Browser, server: Running) -> Any:
    return browser.open(server.url)


@pytest.fixture(scope="module")
def render(chromium: Any, server: Running) -> Render:
    page = chromium.new_context().new_page()
    page.goto(server.url)

    def render(text: str) -> str:
        found: str = page.evaluate(SHOW, text)
        return found

    return render


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
        (
            "*a* **b** ***c*** _d_ ~~e~~",
            "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> <em>d</em> <del>e</del></p>",
        ),
        ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
        ("2 * 3 * 4, snake_case_name, **open", "<p>2 * 3 * 4, snake_case_name, **open</p>"),
        ("a `<b>` ``c`d``", "<p>a <code>&lt;b&gt;</code> <code>c`d</code></p>"),
        (r"\*a\*", "<p>*a*</p>"),
        ("# A\n### B #", '<h4 class="level-1">A</h4><h6 class="level-3">B</h6>'),
        ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><p>c</p>"),
        ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("1. a\n\n2. b", '<ol start="1"><li><p>a</p></li><li><p>b</p></li></ol>'),
        ("1. a\n   ```\n   x\n   ```\n2. b", None),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        ("a | b", "<p>a | b</p>"),
    ],
)
def test_blocks_and_text(render: Render, text: str, expected: str | None) -> None:
    if expected is not None:
        assert render(text) == expected
    else:  # code within an item
        assert render(text).count("<li>") == 2 and "<code>x</code>" in render(text)


def test_code_is_kept_to_the_blank(render: Render) -> None:
    shown = render('```python\ndef f():\n    return "<b>**x**</b>"\n\n```\nend')
    assert '<code>def f():\n    return "&lt;b&gt;**x**&lt;/b&gt;"\n</code>' in shown
    assert "<span>python</span>" in shown and ">Copy</button>" in shown and shown.endswith("<p>end</p>")


def test_a_table_has_as_many_cells_as_its_head(render: Render) -> None:
    shown = render("| a | b |\n|:--|--:|\n| 1 | `x` | 3 |\n| 2 |\n\nend")
    assert '<th class="left">a</th><th class="right">b</th>' in shown
    assert '<tr><td class="left">1</td><td class="right"><code>x</code></td></tr>' in shown
    assert '<tr><td class="left">2</td><td class="right"></td></tr>' in shown and shown.endswith("<p>end</p>")


def test_links_lead_to_pages_only(render: Render) -> None:
    link = '<a href="https://a.example/x" target="_blank" rel="noopener noreferrer" title="https://a.example/x">{}</a>'
    assert render("[see *this*](https://a.example/x)") == f"<p>{link.format('see <em>this</em>')}</p>"
    assert render("(https://a.example/x).") == f"<p>({link.format('https://a.example/x')}).</p>"
    assert render("<https://a.example/x>") == f"<p>{link.format('https://a.example/x')}</p>"
    assert render("![a picture](https://a.example/x)") == f"<p>{link.format('a picture')}</p>"  # nothing is loaded
    for kept in ("[a](other:b)", "[a](/relative)", "[a](data:text/plain,b)", "[a] (https:)", "[a](mailto:b@c.example)"):
        assert render(kept) == f"<p>{kept}</p>"


@pytest.mark.parametrize(
    "place", ["{}", "# {}", "- {}", "> {}", "| {} |\n|---|\n| {} |", "*{}*", "[{}](https://a.example/)"]
)
def test_markup_is_text_everywhere(render: Render, place: str) -> None:
    shown = render(place.replace("{}", '<b id="x">x</b>'))
    assert '&lt;b id="x"&gt;x&lt;/b&gt;' in shown and "<b" not in shown.replace("<blockquote", "")


@pytest.mark.parametrize(
    "piece", ["> ", "- ", "*a ", "[", "`a", "``a`", "**_", "| ", "![a](", "<https://", "1. a\n  ", "- a\n", "a\n\n"]
)
def test_no_text_is_too_much(render: Render, piece: str) -> None:
    # Deep nesting, many nodes, marks that nothing closes: neither the stack nor the arguments of a call may run out.
    assert render(piece * (100_000 // len(piece)))


def test_what_stays_the_same_is_left_alone(page: Any) -> None:
    text = "first\n\n```\ncode\n```\n\nthe *last* one"
    shown, same = page.evaluate(GROW, [text[:length] for length in range(6, len(text) + 1)])
    assert same and shown == page.evaluate(SHOW, text)


# --- in the conversation ----------------------------------------------------------------------------------------------


def test_markup_in_answers_thoughts_and_calls_is_text(page: Any) -> None:
    call = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "<b>f</b>", "arguments": ""}}
    script(
        page,
        [
            {"role": "assistant", "content": ""},
            {"reasoning_content": "<b>hm</b>"},
            {"content": "<b>x</b> and "},
            {"content": "**bold**"},
            {"tool_calls": [call]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": '}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '"<b>y</b>"}'}}]},
        ],
        finish="tool_calls",
    )
    ask(page, "<b>q</b>")
    finished(page)
    assert page.locator("#messages b").count() == 0
    expect(page.locator(".answer .text")).to_have_text("<b>x</b> and bold")
    expect(page.locator(".answer .text strong")).to_have_text("bold")
    expect(page.locator(".call figcaption")).to_have_text("Call of <b>f</b>")
    expect(page.locator(".call pre")).to_have_text('{\n  "a": "<b>y</b>"\n}')
    expect(page.locator("#conversation-list .name span")).to_have_text("<b>q</b>")
    expect(page.locator(".figures")).to_contain_text("30 of 40 prompt tokens cached (75%)")
    answer = stored(page)["messages"][1]
    assert answer["calls"] == [{"id": "call-1", "name": "<b>f</b>", "arguments": '{"a": "<b>y</b>"}'}]
    assert (answer["promptTokens"], answer["cachedTokens"], answer["answerTokens"]) == (40, 30, 7)


def test_thoughts_are_folded_and_sent_back(page: Any) -> None:
    script(page, [{"reasoning_content": "Let me "}, {"reasoning_content": "*think*."}, {"content": "42"}])
    ask(page, "What is it?")
    finished(page)
    thoughts = page.locator(".reasoning > div")
    expect(thoughts).to_be_hidden()
    page.get_by_text("Thought for").click()
    expect(thoughts).to_have_text("Let me think.")
    expect(page.locator(".answer .text")).to_have_text("42")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "Why?")
    assert request.value.post_data_json["messages"][1] == {
        "role": "assistant",
        "content": "42",
        "reasoning_content": "Let me *think*.",
    }


def test_code_is_copied(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    script(page, [{"content": "Here:\n```js\nlet a = 1;\n```"}])
    ask(page, "Code, please")
    finished(page)
    page.get_by_role("button", name="Copy code").click()
    expect(page.locator(".code button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "let a = 1;"


def test_an_error_in_the_middle_keeps_what_has_come(page: Any) -> None:
    half = 'data: {"choices": [{"index": 0, "delta": {"content": "Half"}}]}\n\n'
    body = half + 'data: {"error": {"message": "the <b>engine</b> failed"}}\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    ask(page, "Hello")
    finished(page)
    expect(page.get_by_role("alert")).to_have_text("The <b>engine</b> failed.")
    expect(page.locator(".answer .text")).to_have_text("Half")
    expect(page.locator(".answer .note")).to_have_text("Ended by an error. The <b>engine</b> failed.")
