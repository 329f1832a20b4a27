"""How much of an agent's prompts a server computes twice.

    python scripts/agent_turns.py --url http://127.0.0.1:8000 [--url other=http://127.0.0.1:8080]

An agent with ten tools asks for twenty turns: in each a call is required, its result goes back, and the model answers.
Every prompt begins with the one before and what was generated after it, so only what is new has to be computed. What a
server computes of a prompt beyond that, it computes twice: the tokens of the prompt and the answer before, less those
it says it had cached (``usage.prompt_tokens_details.cached_tokens``, or ``timings.cache_n`` of llama.cpp).
"""

from __future__ import annotations

import argparse
import json

import openai

TOOLS = [
    ("weather", "The forecast of a city.", {"city": {"enum": ["Paris", "Oslo", "Rome"]}, "days": {"type": "integer"}}),
    ("search", "Search the web.", {"query": {"type": "string", "maxLength": 40}}),
    ("read_file", "Read a file.", {"path": {"type": "string", "maxLength": 40}, "lines": {"type": "integer"}}),
    ("write_file", "Write a file.", {"path": {"type": "string", "maxLength": 40}, "append": {"type": "boolean"}}),
    ("run_tests", "Run tests.", {"names": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}}),
    ("convert", "Convert an amount.", {"amount": {"type": "number"}, "to": {"enum": ["EUR", "USD", "NOK"]}}),
    ("calendar", "Events of a day.", {"day": {"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$"}}),
    ("send", "Send a message.", {"to": {"enum": ["Ada", "Bob"]}, "urgent": {"type": "boolean"}}),
    ("route", "A route.", {"from": {"enum": ["home", "work"]}, "by": {"enum": ["bus", "bike", "train"]}}),
    ("translate", "Translate a word.", {"word": {"type": "string", "maxLength": 12}, "to": {"enum": ["de", "fr"]}}),
]
SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": text,
            "parameters": {
                "type": "object",
                "properties": fields,
                "required": list(fields),
                "additionalProperties": False,
            },
        },
    }
    for name, text, fields in TOOLS
]
RULES = "You are an agent. Use a tool when it helps, and say in a few words what you found. " * 8
MAX_TOKENS = 96


def cached(answer: openai.types.chat.ChatCompletion) -> int:
    details = answer.usage.prompt_tokens_details
    if details is not None and details.cached_tokens is not None:
        return details.cached_tokens
    timings = (answer.model_extra or {}).get("timings") or {}
    return int(timings.get("cache_n", 0))


def converse(url: str, turns: int, temperature: float) -> dict[str, float]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)
    model = client.models.list().data[0].id
    history: list[dict[str, object]] = [{"role": "system", "content": RULES}]
    before = prompts = twice = calls = 0

    def ask(choice: str) -> openai.types.chat.ChatCompletionMessage:
        nonlocal before, prompts, twice
        answer = client.chat.completions.create(
            model=model, messages=history, tools=SCHEMAS, tool_choice=choice, parallel_tool_calls=False,
            max_tokens=MAX_TOKENS, temperature=temperature, seed=len(history),
        )  # fmt: skip
        prompts += answer.usage.prompt_tokens
        twice += max(0, before - cached(answer))
        before = answer.usage.prompt_tokens + answer.usage.completion_tokens
        return answer.choices[0].message

    for turn in range(turns):
        history.append({"role": "user", "content": f"Task {turn}: {TOOLS[turn * 7 % 10][1]}"})
        made = ask("required")
        if made.tool_calls:
            call = made.tool_calls[0]
            calls += 1
            json.loads(call.function.arguments)
            history.append({"role": "assistant", "content": made.content, "tool_calls": [call.model_dump()]})
            history.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps({"turn": turn, "ok": True})})
        else:  # cut off by its length
            history.append({"role": "assistant", "content": made.content or ""})
            continue
        history.append({"role": "assistant", "content": ask("none").content or ""})
    return {"turns": turns, "calls": calls, "prompt_tokens": prompts, "twice": twice, "share": twice / prompts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", action="append", required=True, help="ADDRESS or NAME=ADDRESS; may be repeated")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--temperature", type=float, default=1.0)
    given = parser.parse_args()
    for each in given.url:
        name, _, url = each.rpartition("=") if "=" in each else ("server", "", each)
        print(json.dumps({"server": name} | converse(url, given.turns, given.temperature)), flush=True)


if __name__ == "__main__":
    main()
