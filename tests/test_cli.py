"""The commands: fast to start, one line per error, exit codes that scripts can rely on."""

from __future__ import annotations

import builtins
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import gossamer
from fake_llm import CONTEXT, FakeLLM, chat_prompt, expected_answer
from forked import run_program
from gossamer.cli.app import app
from gossamer.cli.chat import _converse
from gossamer.cli.conversation import Conversation
from gossamer.errors import ConfigurationError, GossamerError, PromptTooLongError
from gossamer.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=100)
MAIN = "from gossamer.cli.app import main; main()"
FAKE_MAIN = (
    "import gossamer, fake_llm; gossamer.LLM = fake_llm.FakeLLM; "
    "import gossamer.cli.chat; gossamer.cli.chat._check_generates = lambda model, task: None; "
) + MAIN


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[FakeLLM]:
    """Commands load the fake engine; the list holds what they loaded."""
    loaded: list[FakeLLM] = []

    def load(model: str, **arguments: object) -> FakeLLM:
        loaded.append(FakeLLM(model, **arguments))
        return loaded[-1]

    monkeypatch.setattr(gossamer, "LLM", load, raising=False)
    monkeypatch.setattr("gossamer.cli.chat._check_generates", lambda model, task: None)  # there are no such models
    return loaded


def invoke(*arguments: object, input: str | bytes | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)


def environment(**variables: str) -> dict[str, str]:
    search_path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": search_path} | variables


def run_main(*arguments: str, script: str = MAIN, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=60)


# --- the command itself ----------------------------------------------------------------------------------------------


def test_help_imports_only_what_prints_it():
    """It is fast for that reason: PyTorch alone takes seconds, and pydantic a good part of one."""
    script = f"import sys; sys.argv = ['gossamer', '--help']\ntry: {MAIN}\nexcept SystemExit: pass\n"
    script += "print(*{name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    imported = set(run_main(script=script).stdout.splitlines()[-1].split())
    prints = {"typer", "annotated_doc", "shellingham", "rich", "pygments", "markdown_it", "mdurl", "attr"}
    installed = {name for name in imported if name.startswith(("_", "sitecustomize", "distutils-"))}
    assert imported - prints - installed == {"gossamer"}


COMMANDS = [
    "pull",
    "batch",
    "chat",
    "serve",
    "deploy",
    "simulate",
    "compress",
    "eval",
    "inspect",
    "export",
    "info",
    "bench",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    assert command in invoke("--help").output
    assert invoke(command, "--help").exit_code == 0


def test_version():
    assert invoke("--version").output.startswith("gossamer ")


def test_info_as_json_names_what_a_bug_report_needs():
    facts = json.loads(invoke("info", "--json").output)
    assert facts.keys() >= {"gossamer", "python", "torch", "threads", "cpu_flags", "cache_directory"}


def test_an_error_is_one_line_and_exit_code_2(tmp_path, monkeypatch):
    arguments = ("batch", "fake", str(tmp_path / "missing.jsonl"), "-o", str(tmp_path / "out.jsonl"))
    failed = run_program(MAIN, *arguments)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr == f"error: cannot read {tmp_path}/missing.jsonl: No such file or directory\n"
    monkeypatch.setenv("GOSSAMER_DEBUG", "1")
    assert "Traceback" in run_program(MAIN, *arguments).stderr


def test_a_wrong_option_is_exit_code_2():
    assert run_main("batch", "--no-such-option").returncode == 2


# --- batch -----------------------------------------------------------------------------------------------------------


def write_batch(path: Path, *prompts: str) -> Path:
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt}}
        for i, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_batch_exit_code_says_whether_all_lines_were_answered(fake, tmp_path):
    source, output = write_batch(tmp_path / "in.jsonl", "a", "b"), tmp_path / "out.jsonl"
    assert invoke("batch", "fake", source, "-o", output).exit_code == 0
    write_batch(source, "a", "b", "FAIL")
    result = invoke("batch", "fake", source, "-o", output, "--resume")
    assert result.exit_code == 1
    assert "line 3: the model cannot answer this" in result.stderr


def test_batch_json_is_one_object_on_stdout(fake, tmp_path):
    source = write_batch(tmp_path / "in.jsonl", "a", "b")
    result = invoke("batch", "fake", source, "-o", tmp_path / "out.jsonl", "--json")
    summary = json.loads(result.stdout)
    assert (summary["completed"], summary["failed"], summary["interrupted"]) == (2, 0, False)
    assert summary["engine"]["requests"] == 2


def test_batch_hands_its_options_to_the_engine(fake, tmp_path):
    source = write_batch(tmp_path / "in.jsonl", "a")
    options = ("--sharing", "off", "--dtype", "float32", "--memory", "1GB", "--max-model-len", 99)
    limits = ("--max-num-seqs", 3, "--max-num-batched-tokens", 7)
    formats = ("--runner", "native", "--kv-dtype", "float32", "--sparse-weights", "off", "--int8-head")
    formats += ("--prefix-eps", "0.1")
    assert invoke("batch", "fake", source, "-o", tmp_path / "out.jsonl", *options, *limits, *formats).exit_code == 0
    assert fake[0].arguments == {
        "sharing": "off",
        "dtype": "float32",
        "memory": "1GB",
        "max_model_len": 99,
        "runner": "native",
        "kv_dtype": "float32",
        "sparse_weights": "off",
        "prefix_eps": 0.1,
        "int8_head": True,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 7,
    }


def test_batch_checks_its_files_before_it_loads_a_model(fake, tmp_path):
    source = write_batch(tmp_path / "in.jsonl", "a")
    assert isinstance(invoke("batch", "fake", source, "-o", source).exception, ConfigurationError)
    assert fake == []


# --- chat ------------------------------------------------------------------------------------------------------------


def ask(conversation: Conversation, text: str, dropped: list | None = None) -> str:
    return "".join(conversation.answer(text, lambda turn, error: dropped.append(turn.user)))


def prompt_of(*texts: str) -> str:
    roles = ("user", "assistant")
    return chat_prompt([{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)])


def test_each_question_sees_the_turns_before_it():
    llm = FakeLLM()
    conversation = Conversation(llm, PARAMS)
    first = ask(conversation, "one")
    assert first == expected_answer(prompt_of("one"))
    assert ask(conversation, "two") == expected_answer(prompt_of("one", first, "two"))
    assert conversation.finish_reason == "stop"


def test_an_answer_arrives_in_pieces():
    pieces = [piece for piece in Conversation(FakeLLM(), PARAMS).answer("one", print) if piece]
    assert len(pieces) > 5


def test_a_stopped_answer_is_remembered_as_far_as_it_went():
    llm = FakeLLM()
    conversation = Conversation(llm, PARAMS)
    pieces = conversation.answer("one", print)
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert [(turn.user, turn.assistant) for turn in conversation.turns] == [("one", begun)]
    assert llm.engine.aborted == ["chat-0"]
    assert ask(conversation, "two") == expected_answer(prompt_of("one", begun, "two"))


def test_the_oldest_turns_make_room_and_are_reported():
    conversation = Conversation(FakeLLM(), PARAMS, system="Be brief")
    dropped: list[str] = []
    asked = [f"question {i} " + "x" * 80 for i in range(6)]
    for question in asked:
        ask(conversation, question, dropped)
    assert 0 < len(dropped) < 6
    assert dropped + [turn.user for turn in conversation.turns] == asked


def test_a_question_that_fits_nowhere_is_an_error_and_not_remembered():
    conversation = Conversation(FakeLLM(), PARAMS)
    with pytest.raises(PromptTooLongError):
        ask(conversation, "x" * CONTEXT)
    assert conversation.turns == []
    assert ask(conversation, "short")


def test_without_a_chat_template_each_text_stands_alone():
    conversation = Conversation(FakeLLM("base"), PARAMS)
    for text in ("Once", "upon"):
        assert ask(conversation, text) == expected_answer(text)
    with pytest.raises(ConfigurationError, match="no chat template"):
        Conversation(FakeLLM("base"), PARAMS, system="Be brief")


def test_conversations_without_a_seed_draw_differently(fake):
    for _ in range(2):
        assert invoke("chat", "fake", input="Hi").exit_code == 0
    first, second = (llm.arguments["seed"] for llm in fake)
    assert first != second


def test_piped_text_is_one_message_and_stdout_is_the_answer(fake):
    result = invoke("chat", "fake", input="line one\nline two\n")
    assert result.exit_code == 0
    assert result.stdout == expected_answer(prompt_of("line one\nline two")) + "\n"


def test_chat_says_when_a_model_only_completes(fake):
    result = invoke("chat", "base", input="Once")
    assert result.stdout == expected_answer("Once") + "\n"
    assert "no chat template" in result.stderr


@pytest.mark.parametrize("text", [b"", b" \n", b"\xff"])
def test_nothing_usable_in_the_pipe_is_an_error(fake, text):
    assert isinstance(invoke("chat", "fake", input=text).exception, ConfigurationError)
    assert fake == []


def test_a_wrong_sampling_parameter_is_found_before_loading(fake):
    assert isinstance(invoke("chat", "fake", "--top-p", 2, input="x").exception, GossamerError)
    assert fake == []


def converse(monkeypatch: pytest.MonkeyPatch, llm: FakeLLM, *lines: str | type[BaseException]) -> Conversation:
    """Type the lines, then Ctrl-D."""
    typed = iter([*lines, EOFError])

    def type_line(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", type_line)
    conversation = Conversation(llm, PARAMS)
    _converse(llm, conversation)
    return conversation


def test_commands_of_the_conversation(monkeypatch, capsys):
    llm = FakeLLM()
    conversation = converse(monkeypatch, llm, "one", "/stats", "/help", "/nonsense", "", "/reset", "two")
    shown = capsys.readouterr().out
    assert [turn.user for turn in conversation.turns] == ["two"]
    assert "requests: 1" in shown
    assert "Ctrl-C stops an answer" in shown
    assert "no command /nonsense" in shown


def test_exit_leaves(monkeypatch):
    assert converse(monkeypatch, FakeLLM(), "/exit", "never asked").turns == []


def test_ctrl_c_at_the_prompt_does_not_leave(monkeypatch):
    assert len(converse(monkeypatch, FakeLLM(), KeyboardInterrupt, "one").turns) == 1


def test_an_error_does_not_end_the_conversation(monkeypatch, capsys):
    conversation = converse(monkeypatch, FakeLLM(), "FAIL", "x" * CONTEXT, "one")
    assert [turn.user for turn in conversation.turns] == ["one"]
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_in_a_terminal_stops_the_answer_only():
    import pty

    parent, child = pty.openpty()
    command = [sys.executable, "-c", FAKE_MAIN, "chat", "fake"]
    variables = environment(FAKE_LLM_DELAY="0.05", TERM="dumb")
    with subprocess.Popen(command, env=variables, stdin=child, stdout=child, stderr=child) as process:
        os.close(child)
        read_until(parent, b"> ")
        os.write(parent, b"one\n")
        read_until(parent, expected_answer(prompt_of("one"))[:5].encode())
        process.send_signal(signal.SIGINT)
        assert b"model" not in read_until(parent, b"> ")
        os.write(parent, b"/exit\n")
        assert process.wait(timeout=30) == 0
    os.close(parent)


def read_until(terminal: int, awaited: bytes) -> bytes:
    seen = b""
    while awaited not in seen:
        readable, _, _ = select.select([terminal], [], [], 30)
        assert readable, seen
        seen += os.read(terminal, 1024)
    return seen
