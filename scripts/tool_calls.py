"""Call the functions of the Berkeley Function Calling Leaderboard, and count calls that are not valid: there are none.

    pip download --no-deps bfcl-eval==2026.3.23
    .venv/bin/python scripts/tool_calls.py bfcl_eval-2026.3.23-py3-none-any.whl

Only the form is looked at: whether an answer is a call of a function that was offered, with arguments that are JSON and
valid under its schema. What a model of 135 million parameters asks for is not what a person would.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema_rs

from gossamer import RequestError, Tool, ToolUse

FILES = ("simple_python", "multiple", "parallel_multiple", "live_simple", "live_multiple", "live_parallel")
# The leaderboard names types as Python and Java do.
TYPES = {
    "dict": "object",
    "HashMap": "object",
    "tuple": "array",
    "Array": "array",
    "ArrayList": "array",
    "list": "array",
}
TYPES |= {
    "float": "number",
    "double": "number",
    "long": "integer",
    "String": "string",
    "char": "string",
    "bool": "boolean",
}


def as_json_schema(given: Any) -> Any:
    """A schema with JSON Schema's names of types."""
    if isinstance(given, list):
        return [as_json_schema(each) for each in given]
    if not isinstance(given, dict):
        return given
    schema = {key: as_json_schema(each) for key, each in given.items()}
    if isinstance(given.get("type"), str):
        schema["type"] = TYPES.get(given["type"], given["type"])
        if schema["type"] == "any":
            del schema["type"]
    return schema


def read_cases(wheel: Path) -> list[tuple[list[Any], list[Tool]]]:
    """Conversations and their functions."""
    cases = []
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            for line in archive.read(f"bfcl_eval/data/BFCL_v4_{name}.json").decode().splitlines():
                entry = json.loads(line)
                functions = entry["function"]
                try:
                    tools = [
                        Tool(each["name"], as_json_schema(each["parameters"]), description=each["description"])
                        for each in functions
                    ]
                    ToolUse(tools)
                except RequestError:  # two functions of one name, or a schema that is none
                    continue
                cases.append((entry["question"][0], tools))
    return cases


def body(messages: list[Any], tools: list[Tool], calls: int, seed: int, max_tokens: int) -> dict[str, Any]:
    """A request for so many answers, each of which must be one call."""
    functions = [{"name": tool.name, "description": tool.description, "parameters": tool.parameters} for tool in tools]
    return {
        "messages": messages,
        "tools": [{"type": "function", "function": function} for function in functions],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "n": calls,
        "temperature": 1,
        "seed": seed,
        "max_tokens": max_tokens,
    }


def judge(choice: dict[str, Any], tools: list[Tool]) -> str:
    """What is to be said of an answer."""
    if choice["finish_reason"] == "length":
        return "cut by max_tokens"
    calls = choice["message"].get("tool_calls") or []
    if choice["message"]["content"] or len(calls) != 1:
        return "no call"
    function = calls[0]["function"]
    schema = next((tool.parameters for tool in tools if tool.name == function["name"]), None)
    try:
        jsonschema_rs.validate(dict(schema or {}), json.loads(function["arguments"]))
        return "valid"
    except (ValueError, jsonschema_rs.ValidationError) as error:
        print(f"{function['name']} {function['arguments']!r}: {error}")
        return "invalid"


def main() -> None:
    """Draw cases, ask for calls in one batch file, count, print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("wheel", type=Path, help="of bfcl-eval")
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--quantization", default="int8", help="or none")
    arguments.add_argument("--schemas", type=int, default=100)
    arguments.add_argument("--calls", type=int, default=10, help="for each")
    arguments.add_argument("--max-tokens", type=int, default=512)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    cases = read_cases(given.wheel)
    drawn = random.Random(given.seed).sample(cases, given.schemas)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        asked, answered = Path(directory, "asked.jsonl"), Path(directory, "answered.jsonl")
        with asked.open("w") as file:
            for number, (messages, tools) in enumerate(drawn):
                line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions"}
                line["body"] = body(messages, tools, given.calls, number, given.max_tokens)
                print(json.dumps(line), file=file)
        command = [sys.executable, "-c", "from gossamer.cli.app import main; main()", "batch", given.model, str(asked)]
        subprocess.run(
            [
                *command,
                "-o",
                str(answered),
                "--memory",
                "4GiB",
                "--max-model-len",
                "4096",
                "--quantization",
                given.quantization,
            ],
            check=False,
        )
        for text in answered.read_text().splitlines():
            line = json.loads(text)
            if (response := line["response"]) is None or response["status_code"] != 200:
                error = line["error"] or response["body"]["error"]
                counts[f"refused: {error['message'][:120]}"] += 1
                continue
            tools = drawn[int(line["custom_id"])][1]
            counts.update(judge(choice, tools) for choice in response["body"]["choices"])
    print(f"{given.model}, {given.schemas} of {len(cases)} conversations, {given.calls} answers each: {dict(counts)}")


if __name__ == "__main__":
    main()
