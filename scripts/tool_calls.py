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
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema_rs

from gossamer import LLM, RequestError, SamplingParams, Tool, ToolUse

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


def main() -> None:
    """Draw cases, call, count, print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("wheel", type=Path, help="of bfcl-eval")
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--schemas", type=int, default=100)
    arguments.add_argument("--calls", type=int, default=10, help="for each")
    arguments.add_argument("--max-tokens", type=int, default=512)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    cases = read_cases(given.wheel)
    drawn = random.Random(given.seed).sample(cases, given.schemas)
    counts: Counter[str] = Counter()
    with LLM(given.model, memory="4GiB", max_model_len=4096) as llm:
        for number, (messages, tools) in enumerate(drawn):
            params = SamplingParams(n=given.calls, temperature=1, seed=number, max_tokens=given.max_tokens)
            use = ToolUse(tools, required=True, parallel=False)
            (output,) = llm.chat(messages, params, use_tqdm=False, tools=use, on_error="return")
            if output.error is not None:
                counts[f"refused: {output.error.message[:120]}"] += 1
                continue
            for completion in output.outputs:
                if completion.finish_reason == "length":
                    counts["cut by max_tokens"] += 1
                    continue
                if completion.answer.content or len(completion.answer.calls) != 1:
                    counts["no call"] += 1
                    continue
                (call,) = completion.answer.calls
                schema = next(tool.parameters for tool in tools if tool.name == call.name)
                try:
                    jsonschema_rs.validate(dict(schema or {}), json.loads(call.arguments))
                    counts["valid"] += 1
                except (ValueError, jsonschema_rs.ValidationError) as error:
                    counts["invalid"] += 1
                    print(f"{call.name} {call.arguments!r}: {error}")
    print(f"{given.model}, {given.schemas} of {len(cases)} conversations, {given.calls} answers each: {dict(counts)}")


if __name__ == "__main__":
    main()
