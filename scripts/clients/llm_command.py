"""Simon Willison's ``llm``: its command line, with the server among its extra models."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cells import QUESTION, address, cell, run

URL, MODEL, _ = address()
home = tempfile.TemporaryDirectory()
Path(home.name, "extra-openai-models.yaml").write_text(
    f"- model_id: gossamer\n  model_name: {MODEL}\n  api_base: {URL}/v1\n"
    "  supports_tools: true\n  supports_schema: true\n"
)
TOOL = "def weather(city: str) -> str:\n    'A forecast.'\n    return 'blue'\n"


def ask(*arguments: str) -> str:
    program = Path(sys.executable).with_name("llm")
    environment = os.environ | {"LLM_USER_PATH": home.name, "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [str(program), "prompt", "-m", "gossamer", "-o", "max_tokens", "32", "-o", "temperature", "0", *arguments],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@cell("answer")
def answer() -> None:
    assert ask("--no-stream", QUESTION).strip()


@cell("stream")
def stream() -> None:
    assert ask(QUESTION) == ask("--no-stream", QUESTION)


@cell("tools")
def tools() -> None:
    assert ask("--functions", TOOL, QUESTION).strip()


@cell("structured")
def structured() -> None:
    assert ask("--schema", "name, age int", "-o", "max_tokens", "64", "Ada is 36.").lstrip().startswith("{")


run()
