"""Measures a deployment of two replicas: what its router saves, what Ray costs, and how long it takes to recover.

Everything is started here and ends here: a Ray cluster of this machine for each contestant, so that none finds what
another has left.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.bench.fleet_load import Answered, Load, drive
from gossamer.bench.machine import describe
from gossamer.bench.server_process import ServerProcess, free_port
from gossamer.errors import ConfigurationError

Progress = Callable[[str], None]
ROUTERS = ("prefix", "round-robin", "ray")
READY_SECONDS = 600.0
STEP_TOKENS = 256  # that a replica computes in one step, as `gossamer serve` does
RUNNING_SEQUENCES = 16  # that memory is left for beside the prefixes, where memory is scarce


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is deployed.

    Attributes:
        model, quantization, threads, max_num_seqs: of each replica.
        replicas: how many.
        memory: of each, for keys and values.
        speculation: whether they draft; the simulator does not.
    """

    model: str
    quantization: str | None = "int8"
    threads: int = 1
    replicas: int = 2
    max_num_seqs: int = 32
    memory: str = "1GB"
    speculation: str = "auto"

    @property
    def engine(self) -> dict[str, Any]:
        """Options of :class:`gossamer.LLM`."""
        quantization = {} if self.quantization is None else {"quantization": self.quantization}
        steps = {"max_num_seqs": self.max_num_seqs, "max_num_batched_tokens": STEP_TOKENS}
        return {"memory": self.memory, "speculation": self.speculation} | steps | quantization


@contextmanager
def deployed(setting: Setting, router: str, *, trace: Path | None = None) -> Iterator[str]:
    """A deployment of its own. Its address."""
    from gossamer.distributed.cluster import local_cluster
    from gossamer.distributed.quiet import quiet_ray
    from gossamer.distributed.serving.deploying import Deployment

    deployment = Deployment.of(
        setting.model,
        engine=setting.engine,
        server={"model_names": ("model",), "drain_timeout": 10.0},
        replicas=setting.replicas,
        threads=setting.threads,
        trace=None if trace is None else str(trace),
        host="127.0.0.1",
        port=free_port(),
        router=router,
    )
    with quiet_ray(), local_cluster(cpus=setting.replicas * setting.threads):
        yield deployment.start()
        deployment.end()


def bench_routing(
    setting: Setting, load: Load, *, routers: tuple[str, ...], concurrency: int, scarce: int | None, progress: Progress
) -> dict[str, Any]:
    """Prompt tokens that are computed, for each router.

    Args:
        setting, load: what is asked of what.
        routers: names of :data:`~gossamer.distributed.serving.settings.Router`.
        concurrency: requests at once.
        scarce: prefixes that the memory of a replica holds; ``None`` takes the setting's.
        progress: told what is being done.
    """
    tokenizer, bytes_per_token = _of_model(setting)
    load.prepare(tokenizer, "model")
    if scarce is not None:
        tokens = scarce * load.prefix + RUNNING_SEQUENCES * (load.suffix + load.new + 64)
        setting = Setting(**(vars(setting) | {"memory": str(tokens * bytes_per_token)}))
    rows = []
    for router in routers:
        progress(f"{router}: starting {setting.replicas} replicas")
        with deployed(setting, router) as url:
            progress(f"{router}: {len(load.bodies)} requests")
            answers, seconds = drive([url], load.bodies, concurrency)
        rows.append({"router": router} | _summary(answers, seconds))
    longest = max(each.usage["prompt_tokens"] for each in answers if each.usage)
    head = longest - load.prefix - load.suffix  # tokens of what all begin with, and what the tokenizer makes at seams
    ideal = head + load.groups * (load.prefix + load.each * load.suffix)
    return {
        "kind": "routing",
        "machine": describe(),
        "setting": vars(setting),
        "load": {name: value for name, value in vars(load).items() if name != "bodies"},
        "concurrency": concurrency,
        "scarce": scarce,
        "ideal": ideal,
        "results": rows,
    }


def bench_overhead(
    setting: Setting, load: Load, *, concurrency: int, rounds: int, progress: Progress
) -> dict[str, Any]:
    """Streamed tokens per second through a deployment, and from as many plain servers behind the same clients."""
    tokenizer, _ = _of_model(setting)
    load.prepare(tokenizer, "model")
    measured: dict[str, list[dict[str, Any]]] = {"plain servers": [], "deployment": []}
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}: plain servers")
        with plain_servers(setting) as urls:
            drive(urls, load.bodies[: 2 * len(urls)], 2 * len(urls))
            measured["plain servers"].append(_summary(*drive(urls, load.bodies, concurrency)))
        progress(f"round {number + 1} of {rounds}: deployment")
        with deployed(setting, "prefix") as url:
            drive([url], load.bodies[:4], 4)
            measured["deployment"].append(_summary(*drive([url], load.bodies, concurrency)))
    rows = [
        {
            "what": what,
            "tokens_per_second": statistics.median(each["tokens_per_second"] for each in rounds_),
            "rounds": [each["tokens_per_second"] for each in rounds_],
            "ttft_p50": statistics.median(each["ttft_p50"] for each in rounds_),
            "errors": sum(each["errors"] for each in rounds_),
        }
        for what, rounds_ in measured.items()
    ]
    return {
        "kind": "overhead",
        "machine": describe(),
        "setting": vars(setting),
        "concurrency": concurrency,
        "ratio": rows[1]["tokens_per_second"] / rows[0]["tokens_per_second"],
        "results": rows,
    }


def bench_kills(setting: Setting, load: Load, *, kills: int, concurrency: int, progress: Progress) -> dict[str, Any]:
    """What becomes of requests while processes are killed, in turn a replica and the ingress."""
    tokenizer, _ = _of_model(setting)
    load.prepare(tokenizer, "model")
    recovered: list[dict[str, Any]] = []
    answers: list[Answered] = []
    with deployed(setting, "prefix") as url, ThreadPoolExecutor(1) as pool:
        alone, _ = drive([url], load.bodies[:1], 1)
        for number in range(kills):
            what = "engine" if number % 4 != 3 else "ingress"
            bodies = load.bodies[number * concurrency % len(load.bodies) :][:concurrency]
            running = pool.submit(drive, [url], bodies * 2, concurrency)
            time.sleep(random.Random(number).uniform(0.3, 2.0))
            before = _processes(what)
            killed, start = random.Random(number).choice(sorted(before)), time.perf_counter()
            os.kill(killed, signal.SIGKILL)
            answers += running.result()[0]
            while len(_processes(what) - {killed}) < len(before) or not _healthy(url, setting.replicas):
                if time.perf_counter() - start > READY_SECONDS:
                    raise ConfigurationError(f"the {what} that was killed has not been replaced")
                time.sleep(0.05)
            recovered.append({"killed": what, "seconds": time.perf_counter() - start})
            progress(f"kill {number + 1} of {kills}: {what}, whole again after {recovered[-1]['seconds']:.1f} s")
    outcomes = Counter("answered" if each.error is None else each.error for each in answers)
    return {
        "kind": "kills",
        "machine": describe(),
        "setting": vars(setting),
        "requests": len(answers),
        "outcomes": dict(outcomes),
        "without_end": sum(each.error is None and each.usage is None for each in answers),
        "recovered": recovered,
        "answered_before": len(alone),
    }


def bench_simulation(setting: Setting, load: Load, *, concurrency: int, progress: Progress) -> dict[str, Any]:
    """What replicas do, and what :func:`~gossamer.distributed.simulate.cluster.replay` says they would.

    The simulator has the log of the requests, and step times that as many processes as there are replicas measured at
    the same time, since they share the machine's memory.
    """
    from gossamer.distributed.simulate.cluster import FleetOptions, replay
    from gossamer.distributed.simulate.report import summary
    from gossamer.distributed.simulate.speeds import read_speeds
    from gossamer.distributed.simulate.trace import read_trace
    from gossamer.sizes import parse_bytes

    tokenizer, _ = _of_model(setting)
    load.prepare(tokenizer, "model")
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory) / f"speeds-{number}.json" for number in range(setting.replicas)]
        progress("measuring steps")
        with ExitStack() as stack:
            for each in [stack.enter_context(_measuring(setting, file)) for file in files]:
                if each.wait() != 0:
                    raise ConfigurationError("the times of steps could not be measured: see above")
        speeds = read_speeds(files[0])
        log = Path(directory) / "trace.jsonl"
        progress(f"a deployment: {len(load.bodies)} requests")
        with deployed(setting, "prefix", trace=log) as url:
            answers, seconds = drive([url], load.bodies, concurrency)
        trace = read_trace(log)
    trace.model = speeds.model  # the deployment calls it by another name
    options = FleetOptions(
        replicas=setting.replicas,
        memory_tokens=parse_bytes(setting.memory) // speeds.kv_bytes_per_token,
        max_num_seqs=setting.max_num_seqs,
        max_num_batched_tokens=STEP_TOKENS,
        in_flight=concurrency,
    )
    progress("simulating")
    outcome = replay(trace, speeds, options)
    simulated = {
        "computed": outcome.computed_tokens,
        "tokens_per_second": outcome.output_tokens / outcome.seconds,
        "seconds": outcome.seconds,
        "ttft_p50": statistics.median(outcome.ttft),
        "ttft_p95": sorted(outcome.ttft)[int(0.95 * (len(outcome.ttft) - 1))],
    }
    real = _summary(answers, seconds)
    return {
        "kind": "simulation",
        "machine": describe(),
        "setting": vars(setting),
        "concurrency": concurrency,
        "fit": speeds.residuals,
        "summary": summary(outcome, options),
        "results": [
            {"what": name, "real": real[name], "simulated": value, "off": value / real[name] - 1}
            for name, value in simulated.items()
        ],
    }


def _measuring(setting: Setting, file: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gossamer.cli", "simulate", "--measure", setting.model, "-o", str(file)]
    if setting.quantization is not None:
        command += ["--quantization", setting.quantization]
    environment = os.environ | {"OMP_NUM_THREADS": str(setting.threads)}
    return subprocess.Popen([*command, "--threads", str(setting.threads)], env=environment, stdout=subprocess.DEVNULL)


def _processes(deployment: str) -> set[int]:
    """Those of a deployment, which Ray names so."""
    import psutil

    name = f"ray::ServeReplica:gossamer:{deployment}"
    return {each.pid for each in psutil.process_iter(["cmdline"]) if name in " ".join(each.info["cmdline"] or [])}


def _healthy(url: str, replicas: int) -> bool:
    import json

    from gossamer.bench.server_process import get

    response = get(url, "/health")
    return response is not None and response.status == 200 and json.loads(response.body)["replicas"] == replicas


@contextmanager
def plain_servers(setting: Setting) -> Iterator[list[str]]:
    """As many servers as replicas, each alone. Their addresses."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in setting.engine.items()]
    command = [sys.executable, "-m", "gossamer.cli", "serve", setting.model, "--port", "0", *options]
    command += ["--threads", str(setting.threads), "--served-model-name", "model"]
    environment = os.environ | {"OMP_NUM_THREADS": str(setting.threads)}
    servers = []
    try:
        for _ in range(setting.replicas):
            servers.append(ServerProcess("gossamer serve", command, environment))
        for each in servers:
            each.wait_ready("/health", READY_SECONDS)
        yield [each.url for each in servers]
    finally:
        for each in servers:
            each.stop()


def _summary(answers: list[Answered], seconds: float) -> dict[str, Any]:
    good = [each for each in answers if each.error is None and each.usage is not None]
    if not good:
        raise ConfigurationError(f"no request was answered: {answers[0].error if answers else 'there was none'}")
    ttfts = sorted(each.ttft or 0.0 for each in good)
    generated = sum(each.usage["completion_tokens"] for each in good if each.usage)
    return {
        "computed": sum(each.computed for each in good),
        "prompt_tokens": sum(each.usage["prompt_tokens"] for each in good if each.usage),
        "seconds": seconds,
        "tokens_per_second": generated / seconds,
        "ttft_p50": statistics.median(ttfts),
        "ttft_p95": ttfts[int(0.95 * (len(ttfts) - 1))],
        "errors": len(answers) - len(good),
    }


def _of_model(setting: Setting) -> tuple[Any, int]:
    """Its tokenizer, and the bytes of keys and values of a token."""
    import torch

    from gossamer import LLM

    torch.set_num_threads(setting.threads)
    with LLM(setting.model, **setting.engine) as llm:
        return llm.tokenizer, llm.engine.tree.layout.bytes_per_token
