"""Chat templates in the manner of several families of models, and conversations with calls."""

from __future__ import annotations

from typing import Any

HEAD = (
    """{%- if tools %}{{- '<system>' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{%- endif %}"""
)
REST = """{%- else %}{{- '<' + message.role + '>' + message.content + '\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"""

HERMES = (
    HEAD
    + """{%- for message in messages %}{%- if message.tool_calls %}{{- '<assistant>' + message.content }}
{%- for call in message.tool_calls %}{%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}{%- endfor %}{{- '\\n' }}
{%- elif message.role == 'tool' %}{{- '<user>' + message.content + '\\n' }}"""
    + REST
)
LLAMA = (
    HEAD
    + """{%- for message in messages %}{%- if message.tool_calls %}
{%- if message.tool_calls | length > 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<assistant>{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}\\n' }}
{%- elif message.role == 'tool' %}{{- '<ipython>' + message.content + '\\n' }}"""
    + REST
)
MISTRAL = (
    HEAD
    + """{%- for message in messages %}{%- if message.tool_calls %}{{- '<assistant>' + message.content }}
{%- for call in message.tool_calls %}{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments }}
{%- endfor %}{{- '\\n' }}
{%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS]' + message.content + '\\n' }}"""
    + REST
)
QWEN_XML = (
    HEAD
    + """{%- for message in messages %}{%- if message.tool_calls %}{{- '<assistant>' + message.content }}
{%- for call in message.tool_calls %}{%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
{%- for key, value in call.function.arguments.items() %}
{{- '<parameter=' + key + '>\\n' }}{{- value if value is string else value | tojson }}{{- '\\n</parameter>\\n' }}
{%- endfor %}{{- '</function>\\n</tool_call>' }}{%- endfor %}{{- '\\n' }}
{%- elif message.role == 'tool' %}{{- '<user>' + message.content + '\\n' }}"""
    + REST
)


def listed(begin: str, repeat: str, end: str, one: str) -> str:
    """A template that writes all calls of an answer together."""
    return (
        (
            HEAD
            + "{%- for message in messages %}{%- if message.tool_calls %}{{- '<assistant>' + message.content }}"
            + "{{- BEGIN }}{%- for call in message.tool_calls %}{%- if not loop.first %}{{- REPEAT }}{%- endif %}"
            + one
            + "{%- endfor %}{{- END + '\\n' }}"
            + "{%- elif message.role == 'tool' %}{{- '<user>' + message.content + '\\n' }}"
            + REST
        )
        .replace("BEGIN", repr(begin))
        .replace("REPEAT", repr(repeat))
        .replace("END", repr(end))
    )


MISTRAL_ID = """{%- if call.id | length != 9 %}{{- raise_exception('ids have 9 characters') }}{%- endif %}"""
MISTRAL_LIST = listed(
    "[TOOL_CALLS][",
    ", ",
    "]",
    MISTRAL_ID + """{%- set out = call.function | tojson %}{{- out[:-1] + ', "id": "' + call.id + '"}' }}""",
)
MISTRAL_SPACED_LIST = MISTRAL_LIST.replace("[TOOL_CALLS][", "[TOOL_CALLS] [")
DEEPSEEK = listed(
    "<｜tool▁calls▁begin｜>",
    "\n",
    "<｜tool▁calls▁end｜>",
    "{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' }}"
    "{{- call.function.arguments + '\\n```<｜tool▁call▁end｜>' }}",
)
DEEPSEEK_V31 = listed(
    "<｜tool▁calls▁begin｜>",
    "",
    "<｜tool▁calls▁end｜>",
    "{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' }}"
    "{{- (call.function.arguments if call.function.arguments is string else call.function.arguments | tojson) }}"
    "{{- '<｜tool▁call▁end｜>' }}",
)
PHI = listed(
    "<|tool_call|>[",
    ", ",
    "]<|/tool_call|>",
    """{{- '{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson + '}' }}""",
)
GLM = (
    HEAD
    + """{%- for message in messages %}{%- if message.tool_calls %}{{- '<assistant>' + message.content }}
{%- for call in message.tool_calls %}{%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
{{- '<tool_call>' + call.function.name + '\\n' }}
{%- for key, value in call.function.arguments.items() %}
{{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' }}{{- value if value is string else value | tojson }}
{{- '</arg_value>\\n' }}{%- endfor %}{{- '</tool_call>' }}{%- endfor %}{{- '\\n' }}
{%- elif message.role == 'tool' %}{{- '<user>' + message.content + '\\n' }}"""
    + REST
)
PLAIN = (
    "{%- for message in messages %}{{- '<' + message.role + '>' + message.content + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"
)
NO_SYSTEM = "{%- if messages[0].role == 'system' %}{{- raise_exception('no system') }}{%- endif %}" + PLAIN
THINKING = PLAIN.replace("'<assistant>'", "'<assistant>' + ('' if enable_thinking is false else '<think>\\n')")

BY_FORMAT = {
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral-list": MISTRAL_LIST,
    "mistral-spaced-list": MISTRAL_SPACED_LIST,
    "qwen-xml": QWEN_XML,
    "glm": GLM,
    "deepseek": DEEPSEEK,
    "deepseek-v3.1": DEEPSEEK_V31,
    "phi": PHI,
}


def call(name: str, arguments: Any, id: str = "call00001") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def assistant(*calls: dict[str, Any], content: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}
