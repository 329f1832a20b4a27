"""What Codex sends to /v1/responses, by its shape: streamed, stateless, tools that only OpenAI runs among its own."""

from __future__ import annotations

import openai
from cells import PARAMETERS, QUESTION, address, cell, check_arguments, run

URL, MODEL, _ = address()
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
MESSAGE = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]}
TOOLS = [
    {"type": "function", "name": "weather", "description": "A forecast.", "parameters": PARAMETERS, "strict": False},
    {"type": "web_search"},
    {"type": "local_shell"},
]
FIELDS = {
    "model": MODEL,
    "instructions": "You are an agent in a terminal.",
    "tools": TOOLS,
    "parallel_tool_calls": False,
    "reasoning": None,
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "5f4b1f5e-0000-4000-8000-000000000000",
    "temperature": 0,
    "max_output_tokens": 64,
}


def ask(given: list[object], **fields: object) -> object:
    with client.responses.stream(**(FIELDS | fields), input=given) as events:
        return list(events) and events.get_final_response()


@cell("responses")
def responses() -> None:
    made = ask([MESSAGE], tool_choice="required")
    (call,) = [item for item in made.output if item.type == "function_call"]
    check_arguments(call.arguments)
    # no `id` and no `status`, as it sends items back
    again = {"type": "function_call", "name": call.name, "arguments": call.arguments, "call_id": call.call_id}
    blue = {"type": "input_text", "text": "blue"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": [blue]}
    next_ = ask([MESSAGE, again, result], tool_choice="auto")
    assert next_.output and next_.usage.input_tokens_details.cached_tokens > 0


run()
