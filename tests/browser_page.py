"""The page at / in a real browser, and what tests do with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import Any

WIDE = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 800}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT = 60_000  # milliseconds; the machine may be busy


class Browser:
    """Opens the page. In the end, `check` tells whether a script failed, or called another server.

    Args:
        chromium: playwright's browser.
    """

    def __init__(self, chromium: Any) -> None:
        self._chromium = chromium
        self._contexts: list[Any] = []
        self._faults: list[str] = []

    def open(self, address: str, *, quiet: bool = True, ready: bool = True, **options: Any) -> Any:
        """The page of a server. ``quiet``: the browser has nothing to report, such as a status of 400."""
        context = self._chromium.new_context(**{"viewport": WIDE, "reduced_motion": "reduce"} | options)
        self._contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("pageerror", lambda error: self._faults.append(str(error)))
        if quiet:
            page.on("console", lambda line: self._report(line.text) if line.type in ("error", "warning") else None)
        allowed = (f"{address}/", "data:", f"blob:{address}/")
        page.on("request", lambda request: None if request.url.startswith(allowed) else self._report(request.url))
        page.goto(address)
        if ready:
            page.locator("#status.ready").wait_for(state="attached")
        return page

    def _report(self, fault: str) -> None:
        self._faults.append(fault)

    def check(self) -> None:
        for context in self._contexts:
            context.close()
        assert self._faults == []


def expect(locator: Any) -> Any:
    """Playwright's assertions, which wait for what they say."""
    from playwright.sync_api import expect as playwright_expect

    playwright_expect.set_options(timeout=TIMEOUT)
    return playwright_expect(locator)


def stored(page: Any) -> dict[str, Any]:
    """The one conversation in the browser's storage."""
    keys = "Object.keys(localStorage).filter((key) => key.includes('conversation'))"
    [text] = page.evaluate(f"{keys}.map((key) => localStorage[key])")
    conversation: dict[str, Any] = json.loads(text)
    return conversation


def ask(page: Any, text: str, **settings: object) -> None:
    """Send a message, with settings by their labels, blanks as underscores."""
    for name, value in ({"Temperature": 0, "Max_tokens": 12} | settings).items():
        page.get_by_label(name.replace("_", " "), exact=True).fill(str(value))
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def finished(page: Any) -> None:
    """Until nothing is being answered."""
    page.locator("#log[aria-busy=false]").wait_for()


def answer(page: Any, text: str, **settings: object) -> dict[str, Any]:
    """Send a message, wait for the answer; returns the body of the request."""
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, text, **settings)
    finished(page)
    body: dict[str, Any] = request.value.post_data_json
    return body


def script(page: Any, deltas: Sequence[dict[str, Any]], *, finish: str = "stop") -> None:
    """The next answers consist of these deltas, whatever is asked."""
    usage = {"prompt_tokens": 40, "completion_tokens": len(deltas), "prompt_tokens_details": {"cached_tokens": 30}}
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "usage": usage} for delta in deltas]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}], "usage": usage})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
