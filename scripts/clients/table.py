"""Tries clients of OpenAI's and Anthropic's APIs on a server of SmolLM2, and writes docs/reference/clients.md.

    python scripts/clients/table.py [NAME ...]

`make test-clients` installs the clients first, each in an environment of its kind. The server has a chat template with
tools (hermes.jinja); a second one has an encoder, for embeddings. Exits with 1 if a cell fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from cells import FEATURES

from gossamer.bench.server_process import ServerProcess
from gossamer.models.load import load_model
from gossamer.models.resolve import resolve_model

HERE = Path(__file__).parent
NODE = HERE / "node"
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".venv-clients"
PAGE = ROOT / "docs" / "reference" / "clients.md"
MODEL, ENCODER = "smollm2-135m", "all-minilm-l6-v2"
SECONDS = 600
SCORED = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " a small village in the north of Norway"),
    ("for i in range(10):\n", "    print(i)\n"),
    ("Water is made of hydrogen and", " oxygen, and boils at 100 degrees"),
]
HEAD = """# Clients

Which clients of OpenAI's and Anthropic's APIs were tried, and with what: a server of `smollm2-135m` with a chat
template that knows tools, and one of `all-minilm-l6-v2` for embeddings. `make test-clients` tries them, and writes this
page.

**answer**: one that is whole; **stream**: the same text in parts; **tools**: a request that offers tools; **required**:
a call that must come, whole and in parts, and whose arguments are valid; **results**: what tools have returned, in the
history; **structured**: an answer under a JSON schema; **responses**: the same over `/v1/responses`; **scoring**: the
log-likelihoods of texts, compared with those of transformers.

"""


@dataclass(frozen=True)
class Client:
    """A client, its program, and its environment below :data:`ENVIRONMENTS` (``node`` is no Python)."""

    name: str
    program: str
    packages: tuple[str, ...]
    environment: str = "python"


CLIENTS = [
    Client("openai (Python)", "openai_python.py", ("openai",)),
    Client("openai (Node)", "openai_node.mjs", ("openai",), "node"),
    Client("OpenAI Agents SDK", "openai_agents.py", ("openai-agents",)),
    Client("anthropic (Python)", "anthropic_python.py", ("anthropic",)),
    Client("langchain-openai", "langchain_openai_client.py", ("langchain-openai",)),
    Client("pydantic-ai", "pydantic_ai_client.py", ("pydantic-ai-slim",)),
    Client("instructor", "instructor_client.py", ("instructor",), "instructor"),
    Client("litellm", "litellm_client.py", ("litellm",)),
    Client("Vercel's AI SDK", "vercel_ai.mjs", ("ai", "@ai-sdk/openai-compatible"), "node"),
    Client("llm", "llm_command.py", ("llm",)),
    Client("lm-evaluation-harness", "lm_evaluation_harness.py", ("lm-eval",)),
    Client("guidellm", "guidellm_command.py", ("guidellm",)),
    Client("Codex, by the shape of its requests", "codex_traffic.py", ("openai",)),
]


def command(client: Client) -> list[str]:
    if client.environment == "node":
        return ["node", str(NODE / client.program)]
    return [str(ENVIRONMENTS / client.environment / "bin" / "python"), str(HERE / client.program)]


def version(client: Client, package: str) -> str:
    if client.environment == "node":
        described = NODE / "node_modules" / package / "package.json"
        return f"{package} {json.loads(described.read_text())['version']}"
    code = f"from importlib.metadata import version; print(version({package!r}))"
    python = ENVIRONMENTS / client.environment / "bin" / "python"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return f"{package} {done.stdout.strip()}"


def try_client(client: Client, arguments: list[str]) -> dict[str, str | None]:
    """What went wrong with each feature that it tries; ``None`` for nothing."""
    done = subprocess.run([*command(client), *arguments], capture_output=True, text=True, timeout=SECONDS, check=False)
    cells = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"feature":')]
    found = {cell["feature"]: cell["fault"] for cell in cells}
    if done.returncode or not found:
        raise RuntimeError(f"{client.program} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    for feature, fault in found.items():
        print(f"  {feature}: {'passes' if fault is None else fault}", flush=True)
    if any(found.values()):
        print(done.stderr[-4000:])
    return found


@contextmanager
def server(*arguments: str) -> Iterator[str]:
    """The address of a server."""
    program = [sys.executable, "-c", "from gossamer.cli.app import main; main()", "serve"]
    process = ServerProcess("gossamer", [*program, *arguments, "--port", "0", "--log-format", "text"], dict(os.environ))
    try:
        process.wait_ready("/health", 120)
        yield process.url
    finally:
        process.stop()


def score(checkpoint: Path) -> list[dict[str, object]]:
    """The log-likelihoods of :data:`SCORED`, by transformers in fp32."""
    model, tokenizer = load_model(checkpoint, "float32")
    found = []
    for context, continuation in SCORED:
        stripped = context.rstrip()  # the harness moves blanks over to the continuation
        context, continuation = stripped, context[len(stripped) :] + continuation
        before, whole = tokenizer(context).input_ids, tokenizer(context + continuation).input_ids
        with torch.inference_mode():
            logits = model(torch.tensor([whole])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)
        own = torch.tensor(whole[len(before) :])
        found.append(
            {
                "context": context,
                "continuation": continuation,
                "loglikelihood": float(logits.gather(1, own[:, None]).sum()),
                "greedy": bool((logits.argmax(-1) == own).all()),
            }
        )
    return found


def write(table: dict[str, dict[str, str | None]], versions: dict[str, str]) -> None:
    lines = [f"| client | {' | '.join(FEATURES)} |", "|---" * (1 + len(FEATURES)) + "|"]
    notes = []
    for name, cells in table.items():
        marks = []
        for feature in FEATURES:
            fault = cells.get(feature)
            marks.append("" if feature not in cells else "passes" if fault is None else "fails")
            notes += [f"- {name}, {feature}: {fault.splitlines()[0]}"] if fault else []
        lines.append(f"| {name} | {' | '.join(marks)} |")
    lines += ["", "An empty cell is not tried: the client has no such feature, or it is another cell's.", "", *notes]
    lines += ["", "Versions: " + ", ".join(dict.fromkeys(versions.values())) + "."]
    PAGE.write_text(HEAD + "\n".join(lines).replace("\n\n\n", "\n\n") + "\n")


def main() -> int:
    chosen = [each for each in CLIENTS if not sys.argv[1:] or any(word in each.program for word in sys.argv[1:])]
    checkpoint = resolve_model(MODEL)
    table, versions = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        expected = Path(directory, "expected.json")
        expected.write_text(json.dumps(score(checkpoint)))
        template = str(HERE / "hermes.jinja")
        with server(MODEL, "--chat-template", template, "--memory", "1GB") as url, server(ENCODER) as encoder:
            for client in chosen:
                print(client.name, flush=True)
                table[client.name] = try_client(client, [url, MODEL, encoder, str(checkpoint), str(expected)])
                versions[client.name] = ", ".join(version(client, package) for package in client.packages)
    if chosen == CLIENTS:
        write(table, versions)
    return 1 if any(fault for cells in table.values() for fault in cells.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
