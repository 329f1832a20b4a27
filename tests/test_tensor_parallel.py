"""Several processes that each hold a part of a model answer as one process does, or all of them end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from forked import Program
from gossamer import LLM, SamplingParams
from gossamer.batch import BatchRunner
from gossamer.cli.app import app
from gossamer.errors import ConfigurationError, GossamerError, UnsupportedModelError
from gossamer.outputs import RequestOutput
from gossamer.runners import tensor_parallel
from gossamer.sampling_params import BeamSearchParams
from references import greedy

TINY_CONTEXT = 256
COMMON = "A beginning that all of these prompts have in common, long enough to be a segment of its own. "
PROMPTS = [COMMON + "Some of them go on in the same way, too: " + end for end in ("one", "two", "three")]
PROMPTS += [COMMON + "Others do not.", "And this one stands alone."]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1, seed=11, max_tokens=20, logprobs=3),
    SamplingParams(temperature=0.7, top_p=0.9, n=3, max_tokens=16),
    SamplingParams(temperature=1, top_k=20, repetition_penalty=1.2, min_tokens=5, max_tokens=24, stop=["a", "Q"]),
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=1),
]
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_batched_tokens": 48,
    "max_num_seqs": 6,
}
SHORT = 450  # tokens in memory, too few for all: some are preempted, and prefixes evicted


def answers(llm: LLM) -> list[Any]:
    """Everything that depends on the model: completions, requests that come and go between steps, scores, beams."""
    completions = [[each.token_ids for each in output.outputs] for output in llm.generate(PROMPTS, PARAMS, False)]
    return [
        completions,
        come_and_go(llm),
        [each.best for each in llm.score(PROMPTS, [" no", " yes", " perhaps"], False)],
        [
            each.sequences[0].token_ids
            for each in llm.beam_search(PROMPTS[:2], BeamSearchParams(beam_width=3, max_tokens=8), False)
        ],
    ]


def come_and_go(llm: LLM) -> dict[str, list[int]]:
    """Requests that arrive after so many steps, one of which is cancelled while it runs, and one while it waits."""
    engine, arrivals = llm.engine, {0: [0, 1], 3: [2], 4: [4, 3], 9: [1, 2, 0]}
    cancelled = {7: "0-0", 10: "9-0"}
    ended: dict[str, list[int]] = {}
    step = 0
    while step <= max(arrivals) or engine.has_unfinished_requests():
        for number, place in enumerate(arrivals.get(step, ())):
            params = SamplingParams(temperature=number % 2, max_tokens=20, ignore_eos=True)
            engine.add_request(f"{step}-{number}", PROMPTS[place], params)
        if step in cancelled:
            engine.abort(cancelled[step])
        for output in engine.step():
            assert isinstance(output, RequestOutput)
            ended[output.request_id] = output.outputs[0].token_ids
        step += 1
    assert not ended.keys() & set(cancelled.values())
    return ended


ANSWER = """
import json, sys, torch
from gossamer import LLM, SamplingParams
from gossamer.sampling_params import StructuredOutputsParams
from test_tensor_parallel import OPTIONS, answers

torch.set_num_threads(1)
llm = LLM(sys.argv[1], tensor_parallel=int(sys.argv[2]), memory=int(sys.argv[3]), **OPTIONS)
found = answers(llm)
form = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a", "b"]))
(refused,) = llm.generate("a", form, False, on_error="return")
runner, cost = llm.engine.runner, llm.engine.scheduler.cost
shape = [runner.num_heads, runner.layout.layers[0].num_kv_heads, cost.call, cost.per_private_pair]
print(json.dumps([found, str(refused.error), shape, llm.stats().preemptions, llm.stats().shared_steps]))
"""

# What rank 1 does in its tenth step, or asks for
ACCIDENT = """
import os, signal, sys, torch
from datetime import timedelta
from gossamer import LLM, SamplingParams
from gossamer.runners import ranks
from test_tensor_parallel import OPTIONS, PROMPTS

torch.set_num_threads(1)
ranks.TIMEOUT = timedelta(seconds=8)
accident, prompts = sys.argv[2], list(PROMPTS)
llm = LLM(sys.argv[1], tensor_parallel=2, **OPTIONS)
call, calls = llm.engine.runner._call, []

def accidents_happen(*arguments):
    calls.append(None)
    if len(calls) == 10 and accident == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if len(calls) == 10 and accident == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if len(calls) == 10 and accident == "raise":
        raise MemoryError("there is none left")
    return call(*arguments)

if os.environ["RANK"] == "1":
    llm.engine.runner._call = accidents_happen
    if accident == "ask":
        prompts[2] = prompts[2].replace("three", "thrice")[:-1]
llm.generate(prompts, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), False)
"""


def start(size: int, script: str, *arguments: object) -> list[Program]:
    """So many processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    return [Program(script, *arguments, environment=os.environ | meeting | {"RANK": str(rank)}) for rank in range(size)]


def answered_by(size: int, directory: Path, memory: int) -> list[Any]:
    """What the ranks print, which have all ended well."""
    printed = []
    for program in start(size, ANSWER, directory, size, memory):
        output, errors = program.communicate(600)
        assert program.returncode == 0, errors
        printed.append(json.loads(output.splitlines()[-1]))
    return printed


@pytest.mark.parametrize(("size", "heads", "kv_heads", "width"), [(2, 4, 2, 32), (3, 9, 3, 36)])
def test_ranks_answer_as_one_process(
    make_tiny_llama: Callable[..., Path], tmp_path: Path, size: int, heads: int, kv_heads: int, width: int
) -> None:
    directory = make_tiny_llama(
        tmp_path / "model",
        initializer_range=0.4,
        max_position_embeddings=TINY_CONTEXT,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=width,
        intermediate_size=50,  # which need not be divided
    )
    llm = LLM(directory, runner="transformers", speculation="off", **OPTIONS)
    expected = json.loads(json.dumps(answers(llm)))
    ranks = answered_by(size, directory, SHORT * llm.engine.runner.layout.bytes_per_token // size)
    for found, refused, shape, _, _ in ranks:
        assert found == expected
        assert "structured_outputs cannot be used with tensor_parallel" in refused
        assert shape[:2] == [heads // size, kv_heads // size]
    assert all(rank[2:] == ranks[0][2:] for rank in ranks)  # one cost model, and one history
    assert min(ranks[0][3], ranks[0][4]) > 0


def test_too_many_ranks_are_refused_before_weights_are_read(
    make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}
    directory = make_tiny_llama(tmp_path / "model", **settings)
    (directory / "model.safetensors").write_bytes(b"no weights")
    for program in start(2, ANSWER, directory, 2, SHORT):
        _, errors = program.communicate()
        assert program.returncode == 1
        assert "UnsupportedModelError: tensor_parallel=2 does not divide the 9 heads and 3 key-value heads" in errors
        assert "3 would" in errors


@pytest.mark.parametrize(
    ("accident", "first_says", "second_says"),
    [
        ("ask", "the ranks differ in step ", "the ranks differ in step "),
        ("raise", "rank 1 has ended: MemoryError: there is none left", "MemoryError: there is none left"),
        ("kill", "another rank has ended, or did not answer within 8 seconds", None),
        ("stop", "another rank has ended, or did not answer within 8 seconds", None),
    ],
)
def test_when_one_rank_cannot_go_on_all_end(
    tiny: Path, accident: str, first_says: str, second_says: str | None
) -> None:
    first, second = start(2, ACCIDENT, tiny, accident)
    _, errors = first.communicate()
    assert first.returncode == 1
    assert "RunnerEndedError: " + first_says in errors.splitlines()[-1]
    if accident == "stop":
        second.kill()
    _, errors = second.communicate()
    if second_says is None:
        assert second.returncode == -signal.SIGKILL
    else:
        assert second.returncode == 1
        assert "RunnerEndedError: " + second_says in errors.splitlines()[-1]


def started_here(*arguments: object) -> tuple[int, str, str]:
    """Exit status, output and errors of a command in two processes, of which only the first has them."""
    first, second = start(2, "from gossamer.cli.app import main\nmain()", *arguments)
    output, errors = first.communicate()
    assert second.communicate() == ("", "")
    assert second.returncode == 0
    return first.wait(), output, errors


def started_by_torchrun(*arguments: object) -> tuple[int, str, str]:
    """The same of all processes together, as people start them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "gossamer.cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("run", [started_here, pytest.param(started_by_torchrun, marks=pytest.mark.slow)])
def test_a_batch_is_answered_by_two_ranks_and_written_by_one(
    tiny: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    requests, output, alone = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    lines = [
        {
            "custom_id": f"request-{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {
                "prompt": f"{COMMON}{number}",
                "max_tokens": 8 + number % 5 if number != 5 else "many",
                "temperature": 0,
            },
        }
        for number in range(12)
    ]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with LLM(tiny, dtype="float32") as llm:
        BatchRunner(requests, alone).run(llm)
    texts = {record["custom_id"]: record["response"]["body"] for record in map(json.loads, alone.open())}
    answered = [line for line in alone.open() if json.loads(line)["response"]["status_code"] == 200]
    output.write_text("".join(answered[:3]) + answered[3][:40])

    status, printed, errors = run(
        "batch", tiny, requests, "-o", output, "--resume", "--dtype", "float32", "--tensor-parallel", 2, "--json"
    )
    assert status == 1, errors  # as without: a line failed
    summary = json.loads(printed)  # once
    assert (summary["completed"], summary["failed"], summary["skipped"]) == (8, 1, 3)
    assert errors.count("Loading") == 1
    assert errors.count("max_tokens: ") == 1
    found = {record["custom_id"]: record["response"]["body"] for record in map(json.loads, output.open())}
    assert len(output.read_text().splitlines()) == len(found) == 12
    for name, body in texts.items():
        assert found[name].get("choices") == body.get("choices")


def test_a_batch_that_one_rank_cannot_write_ends_all(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("")
    (tmp_path / "out.jsonl").write_text("")
    script = "from gossamer.cli.app import main\nmain()"
    files = [tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl"]
    first, second = start(2, script, "batch", tiny, *files, "--tensor-parallel", 2)
    _, errors = first.communicate()
    assert first.returncode == 2
    assert "out.jsonl exists; add --resume" in errors
    _, errors = second.communicate()
    assert second.returncode == 2
    assert errors.splitlines()[-1].startswith("error: another rank has ended")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runner": "native"}, "leave runner out"),
        ({"kv_dtype": "bfloat16"}, "leave kv_dtype out"),
        ({"prefix_eps": 0.1}, "leave prefix_eps out"),
        ({"batch_invariant": True}, "leave batch_invariant out"),
        ({"quantization": "int8"}, "leave quantization, int8_head and weights out"),
        ({"weights": "as-stored"}, "leave quantization, int8_head and weights out"),
        ({"int8_head": True}, "leave quantization, int8_head and weights out"),
        ({"device": "cuda:0"}, "computes on CPUs"),
        ({"task": "embed"}, "models that generate text"),
        ({"prefix_dir": "prefixes"}, "leave prefix_dir out"),
        ({"speculative_config": '{"method": "ngram"}'}, "leave speculative_config out"),
        ({"lora": {"sql": "adapters/sql"}}, "leave lora out"),
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1"),
        ({}, "start them with `torchrun --nproc-per-node 2 -m gossamer.cli batch"),
    ],
)
def test_what_it_does_not_compute_is_refused_by_name(tiny: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match="tensor_parallel") as refused:
        LLM(tiny, **{"tensor_parallel": 2} | options)
    assert said in str(refused.value)


def test_torchrun_must_have_started_as_many(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigurationError, match="takes 2 processes, and torchrun has started 3"):
        LLM(tiny, tensor_parallel=2)


def test_a_file_and_a_quantized_checkpoint_are_refused(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(tensor_parallel, "join", lambda size: SimpleNamespace(together=nullcontext))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match=r"model\.gguf is a GGUF file"):
        LLM(tmp_path / "model.gguf", tensor_parallel=2, task="generate")
    directory = tmp_path / "quantized"
    shutil.copytree(tiny, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quantized; take the checkpoint that they were made of"):
        LLM(directory, tensor_parallel=2)


def test_other_commands_do_not_take_it() -> None:
    result = CliRunner().invoke(app, ["eval", "any", "--tensor-parallel", "2"])
    assert isinstance(result.exception, GossamerError)
    assert "--tensor-parallel is for gossamer batch" in str(result.exception)


def test_one_process_is_what_it_was(tiny: Path, reference: Any) -> None:
    llm = LLM(tiny, dtype="float32", tensor_parallel=1)
    assert llm.engine.runner.num_ranks == 1
    ids = llm.tokenizer.encode(PROMPTS[0])
    (output,) = llm.generate(PROMPTS[0], PARAMS[0], False)
    assert output.outputs[0].token_ids == greedy(reference, ids, 20, eos_token_id=None)


@pytest.mark.slow
def test_three_ranks_compute_smollm2(smollm2_path: Path) -> None:
    llm = LLM(smollm2_path, runner="transformers", speculation="off", **OPTIONS)
    expected = json.loads(json.dumps(answers(llm)))
    for found, *_ in answered_by(3, smollm2_path, 1 << 30):
        assert found == expected
