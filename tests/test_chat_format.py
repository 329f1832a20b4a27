"""What a template can do with tools is found by asking it; calls are spelled as it will render them again."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken
from transformers import AutoTokenizer

from chat_templates import BY_FORMAT, HERMES, NO_SYSTEM, PLAIN, THINKING, assistant, call
from gossamer.chat import Answer, ChatFormat, Tool, ToolUse
from gossamer.chat.call_formats import WILD
from gossamer.engine.grammar.program import grammar
from gossamer.errors import RequestError

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name"],
}
SCHEMAS: dict[str, dict[str, Any] | None] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"type": "string", "enum": ["C", "F"]}},
        "required": ["city", "unit"],
    },
    "invite": {
        "type": "object",
        "properties": {
            "who": {"type": "array", "items": {"$ref": "#/$defs/person"}, "minItems": 1, "maxItems": 2},
            "when": {"anyOf": [{"type": "null"}, {"type": "string", "format": "date"}]},
        },
        "required": ["who", "when"],
        "$defs": {"person": PERSON},
    },
    "nothing": None,
    "unique": {
        "type": "object",
        "properties": {"x": {"type": "array", "uniqueItems": True, "items": {"enum": [1, "a"]}, "maxItems": 1}},
        "required": ["x"],
    },
}
TOOLS = [Tool(name, schema) for name, schema in SCHEMAS.items()]
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module", params=[False, True], ids=["text", "special"])
def tokenizer(request: pytest.FixtureRequest, smollm2_path: Any) -> Any:
    """SmolLM2's, as it is, and with tokens for what calls and thoughts are marked with."""
    found = AutoTokenizer.from_pretrained(smollm2_path)
    if request.param:
        for text in ("<tool_call>", "</tool_call>", "<think>", "</think>"):
            found.add_tokens(AddedToken(text, special=False, normalized=False))
        deepseek = [f"<｜tool▁{each}｜>" for each in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")]
        for text in ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"):
            found.add_tokens(AddedToken(text, special=False, normalized=False))
        for text in ("[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<|/tool_call|>", *deepseek):
            found.add_tokens(AddedToken(text, special=True, normalized=False), special_tokens=True)
    return found


def chat_format(tokenizer: Any, template: str) -> ChatFormat:
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


def rendered(chat: ChatFormat, tokenizer: Any, messages: list[Any], tools: list[Tool], **options: Any) -> str:
    return str(tokenizer.decode(chat.prompt_ids(messages, tools, **options)))


@pytest.mark.parametrize("name", sorted(BY_FORMAT))
def test_the_format_is_what_the_template_renders(tokenizer, name):
    chat = chat_format(tokenizer, BY_FORMAT[name])
    assert chat.native and chat.calls.name == name
    text = rendered(chat, tokenizer, [USER], TOOLS)
    assert '"weather"' in text


@pytest.mark.parametrize("template", [PLAIN, NO_SYSTEM])
def test_a_template_without_tools_is_told_of_them_in_words(tokenizer, template):
    chat = chat_format(tokenizer, template)
    assert not chat.native and chat.calls.name == "hermes"
    result = {"role": "tool", "tool_call_id": "call00001", "content": "sunny"}
    turns = [USER, assistant(call("weather", '{"city": "Oslo"}')), result, {**result, "content": "wet"}]
    text = rendered(chat, tokenizer, turns, TOOLS)
    assert text.count('"name": "weather", "description"') + text.count('"name": "weather", "parameters"') == 1
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n<user>' in text
    assert text.count("<user>") == 2  # both results come in one turn
    assert "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nwet\n</tool_response>" in text
    assert ("<system>" in text) == (template == PLAIN)


def test_a_system_message_stays_and_comes_first(tokenizer):
    chat = chat_format(tokenizer, PLAIN)
    text = rendered(chat, tokenizer, [{"role": "system", "content": "Be brief."}, USER], TOOLS)
    assert text.startswith("<system>Be brief.\n\n") and text.count("<system>") == 1
    assert rendered(chat, tokenizer, [USER], []) == "<user>Hi\n<assistant>"


@pytest.mark.parametrize("arguments", ['{"city": "Zoë"}', {"city": "Zoë"}, '{"city": "cut', "[1]", ""])
@pytest.mark.parametrize("name", [*BY_FORMAT, "plain"])
def test_arguments_of_the_history_may_be_text_an_object_or_broken(tokenizer, name, arguments):
    chat = chat_format(tokenizer, BY_FORMAT.get(name, PLAIN))
    text = rendered(chat, tokenizer, [USER, assistant(call("weather", arguments))], TOOLS)
    assert ("Zoë" in text) == ("Zoë" in str(arguments)) and "cut" not in text


def follow(chat: ChatFormat, tokenizer: Any, use: ToolUse, **options: Any) -> LLMatcher:
    """What follows the grammar of an answer."""
    if not hasattr(tokenizer, "trie"):
        backend = tokenizer.backend_tokenizer.to_str()
        tokenizer.trie = LLTokenizer(backend, n_vocab=len(tokenizer), eos_token=[tokenizer.eos_token_id])
    form = chat.form(use, {}, **options)
    assert form is not None
    matcher = LLMatcher(tokenizer.trie, grammar(form.to_dict()), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def random_answer(chat: ChatFormat, tokenizer: Any, use: ToolUse, seed: int, **options: Any) -> tuple[str, bool]:
    """A text that the grammar permits, at random, and whether it came to an end."""
    end = tokenizer.eos_token_id
    matcher = follow(chat, tokenizer, use, **options)
    random = np.random.default_rng(seed)
    ids = tokenizer.encode("so </think>") if chat.opens_thoughts({}) else []  # random thoughts have no end
    assert matcher.consume_tokens(ids)
    for _ in range(300):
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").view(bool)
        allowed = np.flatnonzero(mask)
        if end in allowed and (random.random() < 0.3 or len(allowed) == 1):
            return tokenizer.decode(ids), True
        allowed = allowed[allowed != end]
        near = allowed[allowed < 300]  # single characters end a string now and then
        token = int(random.choice(near if len(near) and random.random() < 0.8 else allowed))
        assert matcher.consume_token(token)
        ids.append(token)
        if matcher.is_stopped():
            return tokenizer.decode(ids), True
    return tokenizer.decode(ids), False


def read(chat: ChatFormat, use: ToolUse, text: str) -> Answer:
    reader, answer = chat.reader(use, {}), Answer()
    assert reader is not None
    for part in [*reader.push(text), *reader.finish()]:
        answer.add(part)
    return answer


@pytest.mark.parametrize("name", [*BY_FORMAT, "plain", "thinking"])
def test_whatever_the_grammar_permits_is_a_valid_call_that_comes_back(tokenizer, name):
    template = {"plain": PLAIN, "thinking": THINKING}.get(name) or BY_FORMAT[name]
    chat = chat_format(tokenizer, template)
    ended = 0
    for seed in range(8):
        use = ToolUse(TOOLS, required=True, parallel=seed % 2 == 0)
        text, whole = random_answer(chat, tokenizer, use, seed)
        answer = read(chat, use, text)
        assert answer.content == ""
        if not whole:
            continue
        ended += 1
        assert len(answer.calls) >= 1 and (use.parallel or len(answer.calls) == 1)
        for each in answer.calls:
            jsonschema_rs.validate(SCHEMAS[each.name] or {"type": "object"}, json.loads(each.arguments))
        if chat.marks or (chat.calls.tags and any(each.name in ("invite", "unique") for each in answer.calls)):
            continue  # in a union, this template writes a string as it is, which could be something else
        history = assistant(*(call(each.name, each.arguments, each.id) for each in answer.calls))
        again = rendered(chat, tokenizer, [USER, history], TOOLS, add_generation_prompt=False)
        ids = re.compile(r', "id": "[^"]*"')  # those that a model chooses are not those of the API
        assert ids.sub("", again).endswith(ids.sub("", f"<assistant>{text}\n"))
    assert ended > 0


@pytest.mark.parametrize("name", [*BY_FORMAT, "plain", "thinking"])
def test_where_calls_are_possible_text_is_too(tokenizer, name):
    template = {"plain": PLAIN, "thinking": THINKING}.get(name) or BY_FORMAT[name]
    chat = chat_format(tokenizer, template)
    of = chat.calls
    nothing = ("nothing", "" if of.tags else "{}")
    one, two = (of.spell([nothing] * count).replace(WILD, "7") for count in (1, 2))
    wrong = f"{of.marker}{of.begin}{of.opening}unknown{of.middle}"
    opened = "" if name != "thinking" else "so </think>\n\n"
    texts = {"Hello there": True, one: True, wrong: False}
    if not of.anchored:
        texts |= {f"Let me see. {one}": True, two: True, f"{one} more": False}
    for text, permitted in texts.items():
        matcher = follow(chat, tokenizer, ToolUse(TOOLS))
        ids = tokenizer.encode(opened + text, add_special_tokens=False)
        taken = matcher.validate_tokens(ids)
        assert (taken == len(ids)) == permitted, text
        if permitted:
            assert matcher.consume_tokens(ids) and matcher.is_accepting()


def test_text_without_calls_may_have_a_schema(tokenizer):
    chat = chat_format(tokenizer, HERMES)
    for seed in range(20):
        text, whole = random_answer(chat, tokenizer, ToolUse(TOOLS), seed, schema=PERSON)
        answer = read(chat, ToolUse(TOOLS), text)
        if whole and not answer.calls:
            jsonschema_rs.validate(PERSON, json.loads(answer.content))
            return
    pytest.fail("no answer without a call")


def test_thoughts_that_the_prompt_opens(tokenizer):
    chat = chat_format(tokenizer, THINKING)
    assert chat.marks and chat.opens_thoughts({}) and not chat.opens_thoughts({"enable_thinking": False})
    reader = chat.reader(None, {})
    assert reader is not None
    assert [part.kind for part in reader.push("a</think>b")] == ["reasoning", "content"]
    assert chat_format(tokenizer, PLAIN).reader(None, {}) is None


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Tool("a b"), "is no name of a function"),
        (lambda: Tool(""), "is no name of a function"),
        (lambda: Tool("f", {"type": "array"}), "are of the type 'array'"),
        (lambda: Tool("f", {"properties": {"x": {"type": "nonsense"}}}), r"parameters\.properties\.x\.type"),
        (lambda: ToolUse([Tool("f"), Tool("f")]), "two functions have the name 'f'"),
        (lambda: ToolUse([Tool("f")], ["g"]), "names the function 'g', which is not among the tools"),
    ],
)
def test_what_is_no_tool_is_refused(make, reason):
    with pytest.raises(RequestError, match=reason):
        make()


def test_no_schema_is_fetched():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/schema"
        assert Tool("f", {"$schema": address, "properties": {"x": {"$ref": address}}}).name == "f"
        with pytest.raises(TimeoutError):
            listener.accept()


def test_what_tags_cannot_enforce_is_refused_if_strict(tokenizer):
    chat = chat_format(tokenizer, BY_FORMAT["qwen-xml"])
    schema = {"type": "object", "properties": {"x": {"type": "string", "maxLength": 3}}}
    assert chat.form(ToolUse([Tool("f", schema)]), {}) is not None
    with pytest.raises(RequestError, match="maxLength of x cannot be enforced"):
        chat.form(ToolUse([Tool("f", schema, strict=True)]), {})


SPELLED = '{"city": "\\u00e9\\/", "n": [1.50, 1e3, -0], "m": 2.0}'


@pytest.mark.parametrize("name", [*BY_FORMAT, "plain"])
@pytest.mark.parametrize("compact", [False, True])
def test_arguments_come_back_in_the_spelling_they_had(tokenizer, name, compact):
    chat = chat_format(tokenizer, BY_FORMAT.get(name, PLAIN))
    given = SPELLED.replace(": ", ":").replace(", ", ",") if compact else SPELLED
    turns = [USER, assistant(call("weather", given, "call_0123456789"))]
    text = rendered(chat, tokenizer, turns, TOOLS)
    assert "[1.50, 1e3, -0]" in text and "2.0" in text and "spelled-" not in text
    assert (SPELLED in text) == (chat.calls.tags is None)
    plain = rendered(chat, tokenizer, [USER, assistant(call("weather", json.loads(given)))], TOOLS)
    assert "1.5, 1000.0" in plain


def test_stand_ins_make_the_tokens_that_the_template_makes(tokenizer, monkeypatch):
    chat = chat_format(tokenizer, HERMES)
    turns = [USER, assistant(call("weather", '{"city": "Oslo", "n": 1.5}')), USER]
    expected = chat.prompt_ids(turns, TOOLS)
    monkeypatch.setattr("gossamer.chat.history.dumped", lambda value: "never the same")
    assert chat.prompt_ids(turns, TOOLS) == expected


def test_a_template_that_leaves_arguments_out_is_rendered_as_it_is(tokenizer):
    shy = HERMES.replace("call.function.arguments | tojson", '(\'{"probe_key": "probe value"}\')')
    chat = chat_format(tokenizer, shy)
    assert chat.native
    text = rendered(chat, tokenizer, [USER, assistant(call("weather", SPELLED))], TOOLS)
    assert "spelled-" not in text and text.count("probe value") == 1


def test_a_template_that_looks_into_arguments_is_rendered_as_it_is(tokenizer):
    curious = HERMES.replace(
        "{{- call.function.arguments | tojson }}",
        "{%- if call.function.arguments is not mapping %}{{- raise_exception('no') }}{%- endif %}"
        "{{- call.function.arguments | tojson }}",
    )
    chat = chat_format(tokenizer, curious)
    assert chat.native and chat.calls.name == "hermes"
    assert "1.5, 1000.0" in rendered(chat, tokenizer, [USER, assistant(call("weather", SPELLED))], TOOLS)


def test_ids_are_shortened_where_a_template_wants_it(tokenizer):
    chat = chat_format(tokenizer, BY_FORMAT["mistral-list"])
    result = {"role": "tool", "tool_call_id": "call_0123456789", "content": "sunny"}
    turns = [USER, assistant(call("weather", "{}", "call_0123456789")), result]
    first, second = (rendered(chat, tokenizer, turns, TOOLS) for _ in range(2))
    assert first == second and "call_0123456789" not in first
    kept = rendered(chat_format(tokenizer, HERMES), tokenizer, turns, TOOLS)
    assert "sunny" in kept


def test_where_tools_are_told_is_said(tokenizer):
    assert chat_format(tokenizer, PLAIN).tools_stand_in == "the system message"
    assert chat_format(tokenizer, NO_SYSTEM).tools_stand_in == "the first message"
