"""Commands of gossamer in processes that can be killed, and what `kills.py` gives them and looks for."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LINES = 160

# Forked from a process that has imported everything, a command begins at once: most of the time is that of its work.
CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = [
    "torch",
    "transformers.models.llama.modeling_llama",
    "gossamer.cli.app",
    "gossamer.llm",
    "gossamer.server.run",
]
IMPORTED += ["gossamer.batch", "gossamer.compress.int8", "gossamer.compress.export", "gossamer.models.convert"]


def run(arguments: tuple[str, ...], environment: dict[str, str], log: str) -> None:
    """``gossamer`` with these arguments, in this process."""
    from gossamer.cli.app import main

    os.environ.update(environment)
    file = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["gossamer", *arguments]
    main()


class Subject:
    """One command of gossamer, in a process."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        handle, self._log = tempfile.mkstemp()
        os.close(handle)
        self.process = CONTEXT.Process(target=run, args=(arguments, environment, self._log))
        self.process.start()

    def text(self) -> str:
        """What it has written until now."""
        return Path(self._log).read_text(errors="replace")

    def kill_after(self, seconds: float, condition: Callable[[], bool] = lambda: True) -> bool:
        """Kill it that long after the condition holds. Whether it still ran."""
        while self.process.is_alive() and not condition():
            time.sleep(0.005)
        self.process.join(seconds)
        self.process.kill()
        return self.end() == -signal.SIGKILL

    def outcome(self) -> tuple[int, str]:
        """Its exit status, and what it wrote."""
        self.process.join()
        text = self.text()
        return self.end(), text

    def end(self, seconds: float = 300) -> int:
        """Its exit status."""
        self.process.join(seconds)
        status = self.process.exitcode
        assert status is not None, f"it does not end: {self.text()}"
        Path(self._log).unlink()
        return status


class Report:
    """Counts, and what was found."""

    def __init__(self) -> None:
        self.kills: dict[str, int] = {}
        self.faults: list[str] = []
        self.notes: dict[str, Any] = {}

    def check(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)
            print("FAULT:", fault, file=sys.stderr)


# --- what is made for it ----------------------------------------------------------------------------------------------


def make_model(directory: Path) -> Path:
    """A random Llama with about a token per byte, of some megabytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<eos>", *alphabet, "th"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))  # GGUF takes none without merges
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    return directory


def requests() -> list[dict[str, Any]]:
    """Some of them are refused."""
    body = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    bodies = [body | {"prompt": f"Number {i} of many"} | ({"top_p": 7} if i % 20 == 7 else {}) for i in range(LINES)]
    return [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": each}
        for i, each in enumerate(bodies)
    ]


def records(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file, if it is there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def answered(lines: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Id and text of each answer, by custom id."""
    return {
        line["custom_id"]: (line["id"], line["response"]["body"]["choices"][0]["text"])
        for line in lines
        if line["response"] and line["response"]["status_code"] == 200
    }


def check_lines(
    report: Report, what: str, lines: list[dict[str, Any]], kept: dict[str, str], expected: dict[str, str]
) -> None:
    """``kept``: ids of records that were seen complete; ``expected``: texts."""
    found = answered(lines)
    report.check(len(lines) == len({line["custom_id"] for line in lines}), f"{what}: a request has two lines")
    report.check({key: text for key, (_, text) in found.items()} == expected, f"{what}: answers differ or are missing")
    for custom_id, record_id in kept.items():
        report.check(custom_id in found and found[custom_id][0] == record_id, f"{what}: {custom_id} was computed twice")
