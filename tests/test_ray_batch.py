"""A batch on a Ray cluster: the answers of one engine, each computed once, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")
pytest.importorskip("pyarrow")

from gossamer import LLM
from gossamer.batch import BatchRunner, BatchSummary
from gossamer.distributed.batch import attempts
from gossamer.distributed.batch.job import RayBatch
from gossamer.distributed.batch.job_directory import JobDirectory
from gossamer.distributed.batch.ownership import latest
from gossamer.distributed.batch.part_runner import PartRunner
from gossamer.distributed.batch.plan import draw_of, read_rows
from gossamer.distributed.tokens import check_address
from gossamer.errors import ConfigurationError
from test_batch import completion, write

TINY_CONTEXT = 256
OPTIONS = {"memory": "64MB", "dtype": "float32", "runner": "transformers", "max_num_seqs": 4}
TOKEN = "5" * 64


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two machines of one processor each, as far as Ray knows, that ask for a token."""
    from ray._private.authentication_test_utils import reset_auth_token_state
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patched:
        for name, value in {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "4",
        }.items():
            patched.setenv(name, value)
        reset_auth_token_state()  # Ray reads these variables once
        head = {"num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        node = {"num_cpus": 1, "memory": 4 << 30, "object_store_memory": 80 << 20}
        for _ in range(2):
            cluster.add_node(**node, wait=False)
        cluster.wait_for_nodes()
        yield cluster
        cluster.shutdown()
    reset_auth_token_state()  # Ray reads these variables once


class Slow(PartRunner):
    """Steps that take some milliseconds, so that there is something to interrupt."""

    def load(self) -> LLM:
        llm = super().load()
        step = llm.engine.step
        llm.engine.step = lambda: (time.sleep(0.02), step())[1]  # type: ignore[method-assign]
        return llm


class Poisoned(PartRunner):
    """A process that is killed when a prompt of poison is computed; suspected sooner, which saves restarts."""

    def load(self) -> LLM:
        attempts.SUSPECT = attempts.MOST_ALONE = 1
        llm = super().load()
        step = llm.engine.step

        def deadly() -> Any:
            for request in llm.engine.requests.values():
                if "POISON" in (request.prompt or ""):
                    os.kill(os.getpid(), signal.SIGKILL)
            return step()

        llm.engine.step = deadly  # type: ignore[method-assign]
        return llm


def shipped(runner: type[PartRunner]) -> type[PartRunner]:
    """The class, by its code: processes of the cluster cannot import tests."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[runner.__module__])
    return runner


def requests(groups: int, each: int, prefix: int = 90, seed: int = 0) -> list[dict[str, Any]]:
    """Requests that share prefixes in groups, shuffled; greedy, seeded and free ones."""
    rng = random.Random(seed)
    rows = []
    for group in range(groups):
        head = "".join(rng.choices("abcdefgh ", k=prefix))
        for number in range(each):
            how: dict[str, Any] = [{"temperature": 0}, {"seed": number}, {"temperature": 0.9}][number % 3]
            tail = "".join(rng.choices("abcdefgh ", k=6))
            rows.append(completion(f"{group}-{number}", head + tail, max_tokens=6, ignore_eos=True, **how))
    rng.shuffle(rows)
    return rows


@pytest.fixture
def job(cluster: Any, tiny: Path, tmp_path: Path) -> Callable[..., RayBatch]:
    """A batch on the cluster; its input is in.jsonl, its output in out/."""

    def make(rows: list[Any] | None = None, **arguments: Any) -> RayBatch:
        if rows is not None:
            write(tmp_path / "in.jsonl", *rows)
        given = {"input": tmp_path / "in.jsonl", "output": tmp_path / "out", "actors": 2, "threads": 1} | arguments
        return RayBatch(str(tiny), address=cluster.address, options=OPTIONS | given.pop("options", {}), **given)

    return make


def run(job: RayBatch) -> BatchSummary:
    return job.run(lambda _: None)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def texts(records: list[dict[str, Any]]) -> dict[str, str]:
    return {
        each["custom_id"]: each["response"]["body"]["choices"][0]["text"]
        for each in records
        if each["error"] is None and each["response"]["status_code"] == 200
    }


def by_one_engine(tiny: Path, rows: list[dict[str, Any]], directory: Path) -> tuple[dict[str, str], int]:
    """Texts by ``custom_id``, each drawn as the row says, and the prompt tokens that were computed."""
    directory.mkdir()
    seeded = [row for row in rows if row["body"].get("temperature") == 0 or "seed" in row["body"]]
    write(directory / "in.jsonl", *sorted(rows, key=lambda row: row["body"]["prompt"]))
    with LLM(tiny, **OPTIONS) as llm:
        summary = BatchRunner(directory / "in.jsonl", directory / "out.jsonl", max_in_flight=16).run(llm)
        found = texts(lines(directory / "out.jsonl"))
        from gossamer.protocol import CompletionRequest

        for row in (row for row in rows if row not in seeded):  # those draw by their id on the cluster
            body = CompletionRequest.parse(row["body"])
            llm.engine.add_request("x", body.prompt[0], body.to_sampling_params(), draw=draw_of(row["custom_id"]))
            while llm.engine.has_unfinished_requests():
                for output in llm.engine.step():
                    found[row["custom_id"]] = output.outputs[0].text
    return found, summary.prompt_tokens - summary.tokens_saved


def begun(directory: JobDirectory, since: dict[str, int] | None = None) -> list[str]:
    """Ids of rows that were begun, once for each time; those of files that were there before not again."""
    found = []
    for path in sorted(directory.path.glob("part-*.attempts.*")):
        part = int(path.name[5:10])
        names = {row.number: row.custom_id for row in read_rows(directory.rows(part))}
        values = path.read_text().split()
        skipped = (since or {}).get(path.name, 0)
        found += [names[int(each)] for each in values[skipped:] if each.isdigit()]
    return found


def standing(directory: JobDirectory) -> tuple[set[str], dict[str, int]]:
    """Ids that have an answer now, and how long the journals were just after."""
    answered: set[str] = set()
    for path in directory.path.glob("part-*.answers.*"):
        try:
            complete = path.read_bytes().rpartition(b"\n")[0]
        except FileNotFoundError:  # its successor has taken over what it had
            return standing(directory)
        answered |= {json.loads(line)["custom_id"] for line in complete.splitlines()}
    return answered, {path.name: len(path.read_text().split()) for path in directory.path.glob("part-*.attempts.*")}


def test_answers_are_those_of_one_engine_and_prefixes_are_computed_as_often(
    job: Callable[..., RayBatch], tiny: Path, tmp_path: Path
) -> None:
    rows = requests(16, 6)
    expected, computed = by_one_engine(tiny, rows, tmp_path / "one")
    bad = completion("bad", "x", top_p=9)
    over_ray = job([*rows[:30], b"{", *rows[30:], bad])
    seen: list[BatchSummary] = []
    summary = over_ray.run(lambda now: seen.append(now))
    found = lines(tmp_path / "out" / "answers.jsonl")
    ids = [row["custom_id"] for row in rows]
    assert [each["custom_id"] for each in found] == [*ids[:30], None, *ids[30:], "bad"]
    assert texts(found) == expected
    assert (summary.total, summary.completed, summary.failed, summary.skipped) == (98, 96, 2, 0)
    assert {error["line"] for each in found if (error := each["error"] or each["response"]["body"].get("error"))} == {
        31,
        98,
    }
    assert len(summary.first_failures) == 2 and seen[-1].done == 98
    assert summary.prompt_tokens - summary.tokens_saved <= 1.05 * computed
    assert sorted(begun(over_ray.directory)) == sorted([*ids, "bad"])
    assert len(list(over_ray.directory.path.glob("part-*.owner.1"))) >= 2
    # the same command again
    with pytest.raises(ConfigurationError, match=r"answers\.jsonl exists; add --resume"):
        job()
    with pytest.raises(ConfigurationError, match=r"in\.jsonl is not the input"):
        run(job(rows[1:], resume=True))
    with pytest.raises(ConfigurationError, match=r"^max_model_len was None .* and is 99 now"):
        run(job([*rows[:30], b"{", *rows[30:], bad], resume=True, options={"max_model_len": 99}))
    assert texts(lines(tmp_path / "out" / "answers.jsonl")) == expected


def start(tiny: Path, cluster: Any, tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command with slow steps, in a process of its own."""
    code = (
        "import sys; import test_ray_batch as tests; from gossamer.distributed.batch import job, part_runner\n"
        "job.RayBatch.__dataclass_fields__['runner'].default = None\n"
        "before = job.RayBatch.__init__\n"
        "def init(self, *given, **named): before(self, *given, **named, runner=tests.shipped(tests.Slow))\n"
        "job.RayBatch.__init__ = init\n"
        "from gossamer.cli.app import main; main()"
    )
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    command = [sys.executable, "-c", code, "batch", str(tiny), str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out")]
    command += ["--ray", cluster.address, "--actors", "2", "--threads", "1", "--json", *flags, *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def actor_of(directory: JobDirectory) -> int | None:
    """The process of an actor that is at work: the newest owner of a part that is not done."""
    owners = [
        path for path in directory.path.glob("part-*.owner.*") if not directory.done(int(path.name[5:10])).exists()
    ]
    for path in sorted(owners, key=lambda path: path.stat().st_mtime, reverse=True):
        content = path.read_text().strip()
        pid = json.loads(content)["pid"] if content else None
        if pid and Path(f"/proc/{pid}").exists():
            return int(pid)
    return None


def kill_a_node(cluster: Any, pid: int) -> None:
    """Switch off the machine that a process runs on."""
    parent = int(re.search(r"PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    for node in list(cluster.worker_nodes):
        raylets = node.all_processes["raylet"]
        if any(each.process.pid == parent for each in raylets):
            cluster.remove_node(node, allow_graceful=False)
            os.kill(pid, signal.SIGKILL) if Path(f"/proc/{pid}").exists() else None
            return
    raise AssertionError("no node has this process")


def test_what_is_finished_outlives_the_command_an_actor_and_a_machine(
    cluster: Any, tiny: Path, tmp_path: Path, job: Callable[..., RayBatch]
) -> None:
    rows = requests(12, 8)
    expected, _ = by_one_engine(tiny, rows, tmp_path / "one")
    directory = job(rows).directory
    kept: set[str] = set()

    def progress(more: int) -> Callable[[], bool]:
        goal = len(kept) + more
        return lambda: len(standing(directory)[0]) >= goal

    first = start(tiny, cluster, tmp_path)
    wait_for(progress(12), first)
    kept, lengths = standing(directory)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = start(tiny, cluster, tmp_path, "--resume")
    wait_for(progress(12), second)
    assert not kept & set(begun(directory, lengths))
    kept, lengths = standing(directory)
    os.kill(wait_for(lambda: actor_of(directory), second), signal.SIGKILL)
    wait_for(progress(12), second)
    assert not kept & set(begun(directory, lengths))
    kept, lengths = standing(directory)
    kill_a_node(cluster, wait_for(lambda: actor_of(directory), second))
    try:
        stdout, stderr = second.communicate(timeout=150)
    finally:
        second.kill()
        cluster.add_node(num_cpus=1, memory=4 << 30, object_store_memory=80 << 20)
    assert second.returncode == 0, stderr
    assert not kept & set(begun(directory, lengths))
    found = lines(tmp_path / "out" / "answers.jsonl")
    assert [each["custom_id"] for each in found] == [row["custom_id"] for row in rows]
    assert texts(found) == expected
    summary = json.loads(stdout)
    assert summary["completed"] + summary["skipped"] == len(rows) and summary["skipped"] >= 12
    assert "Traceback" not in stderr


def test_a_row_that_kills_its_process_gets_an_error_and_parquet_comes_back_as_parquet(
    job: Callable[..., RayBatch], tiny: Path, tmp_path: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = requests(6, 4, prefix=40)
    expected, _ = by_one_engine(tiny, rows, tmp_path / "one")
    rows.insert(9, completion("poison", "POISON", max_tokens=4))
    columns = {name: [row[name] for row in rows] for name in ("custom_id", "method", "url")}
    bodies = [json.dumps(row["body"]) for row in rows]
    pyarrow.parquet.write_table(pyarrow.table(columns | {"body": bodies}), tmp_path / "in.parquet")
    summary = run(job(input=tmp_path / "in.parquet", runner=shipped(Poisoned), actors=1))
    found = pyarrow.parquet.read_table(tmp_path / "out" / "answers.parquet").to_pylist()
    assert [each["custom_id"] for each in found] == [row["custom_id"] for row in rows]
    got = {each["custom_id"]: json.loads(each["body"]) for each in found}
    error = got.pop("poison")["error"]
    assert error["code"] == "engine_error" and "died 1 times" in error["message"] and error["line"] == 10
    assert {name: body["choices"][0]["text"] for name, body in got.items()} == expected
    assert (summary.completed, summary.failed) == (len(rows) - 1, 1)


@pytest.mark.slow
def test_twenty_kills_cost_no_finished_row(
    cluster: Any, tiny: Path, tmp_path: Path, job: Callable[..., RayBatch]
) -> None:
    """The command or an actor is killed at a random moment, twenty times; prints how long until the next answer."""
    rows = requests(64, 8, seed=1)
    expected, _ = by_one_engine(tiny, rows, tmp_path / "one")
    directory, rng = job(rows).directory, random.Random(2)
    process, recoveries = start(tiny, cluster, tmp_path), []

    def more_than(count: int) -> Callable[[], bool]:
        return lambda: len(standing(directory)[0]) > count

    def has_loaded(number: int) -> Callable[[], bool]:
        return lambda: json.dumps([number, "done"]) in directory.loads.read_text()

    try:
        for number in range(20):
            wait_for(more_than(len(standing(directory)[0])), process, 300)
            time.sleep(rng.uniform(0, 0.5))
            what = rng.choice(["command", "actor"])
            killed = time.monotonic()
            kept, lengths = standing(directory)
            assert len(kept) < len(rows)
            if what == "command":
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                process = start(tiny, cluster, tmp_path, "--resume")
                # Actors of the one that was killed may answer for another moment.
                run_number = latest(directory.path, "run") + 1
                wait_for(has_loaded(run_number), process, 300)
                count = len(standing(directory)[0])
            else:
                os.kill(wait_for(lambda: actor_of(directory), process), signal.SIGKILL)
                count = len(kept)
            wait_for(more_than(count), process, 300)
            recoveries.append((what, time.monotonic() - killed))
            assert not kept & set(begun(directory, lengths))
            print(f"kill {number + 1}: {what}, {len(kept)} rows were finished, next after {recoveries[-1][1]:.1f} s")
        _, stderr = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    assert len(recoveries) == 20
    found = lines(tmp_path / "out" / "answers.jsonl")
    assert [each["custom_id"] for each in found] == [row["custom_id"] for row in rows]
    assert texts(found) == expected
    times = sorted(seconds for _, seconds in recoveries)
    print(
        f"recovery: median {times[10]:.1f} s, worst {times[-1]:.1f} s; {len(begun(directory)) - len(rows)} rows twice"
    )


# --- what is refused before anything starts ---------------------------------------------------------------------------


def test_a_cluster_is_refused_for_a_reason_that_helps(cluster: Any, job: Callable[..., RayBatch]) -> None:
    rows = requests(1, 2)
    with pytest.raises(ConfigurationError, match=r"3 actors of 1 CPUs and .* room for 2"):
        run(job(rows, actors=3))
    with pytest.raises(ConfigurationError, match=r"room for 0: .* smaller --memory"):
        run(job(options={"memory": "60GB"}))
    with pytest.raises(ConfigurationError, match=r"machine .* cannot find the model"):
        run(RayBatch("./nowhere-", job().input, job().output, cluster.address))


def test_an_address_is_looked_at_before_ray_is(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nothing = f"{socket.gethostbyname(socket.gethostname())}:{free.getsockname()[1]}"
    with pytest.raises(ConfigurationError, match=r"no Ray cluster answers at .*UNAVAILABLE"):
        check_address(nothing, insecure=True)
    with pytest.raises(ConfigurationError, match=r"give auto .* or HOST:PORT"):
        check_address("somewhere", insecure=False)
    with pytest.raises(ConfigurationError, match="ray://"):
        check_address("ray://somewhere:10001", insecure=False)
    assert check_address(cluster.address, insecure=False) == cluster.address

    class Open(grpc.GenericRpcHandler):  # a cluster without tokens answers strangers
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Open()])
    host = cluster.address.split(":")[0]
    address = f"{host}:{server.add_insecure_port(f'{host}:0')}"
    server.start()
    try:
        with pytest.raises(ConfigurationError, match=r"asks for no token.*--insecure"):
            check_address(address, insecure=False)
        assert check_address(address, insecure=True) == address
    finally:
        server.stop(0)
