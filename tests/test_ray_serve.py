"""`gossamer deploy`: replicas on two nodes of a real Ray cluster, with real processes that are really killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import ray_clusters
from running_server import TEMPLATE, wait_for

pytest.importorskip("ray")

from gossamer import LLM, SamplingParams
from gossamer.distributed.serving.deploying import Deployment
from gossamer.distributed.simulate.trace import read_trace
from gossamer.errors import ConfigurationError

PORT = 18311
KEY = "a-key-of-the-tests"
OPTIONS: dict[str, Any] = {"dtype": "float32", "memory": "64MiB", "max_num_seqs": 8}


@pytest.fixture(scope="module")
def model(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tiny_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    before = os.environ.get("GOSSAMER_API_KEY")
    os.environ["GOSSAMER_API_KEY"] = KEY
    try:
        with ray_clusters.cluster() as made:
            yield made
    finally:
        os.environ.pop("GOSSAMER_API_KEY")
        if before is not None:
            os.environ["GOSSAMER_API_KEY"] = before


def deployment(model: Path, **changes: Any) -> Deployment:
    settings: dict[str, Any] = {"replicas": 2, "host": "127.0.0.1", "port": PORT} | changes
    return Deployment.of(
        str(model), engine=OPTIONS, server={"model_names": ("tiny",), "drain_timeout": 10.0}, **settings
    )


class Client:
    def __init__(self, url: str) -> None:
        self.url = url

    def open(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> Any:
        names = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        names |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, names, method=method), timeout=60)

    def call(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> tuple[int, Any]:
        try:
            with self.open(path, body, method, **headers) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def complete(self, prompt: str, **more: Any) -> dict[str, Any]:
        headers = more.pop("headers", {})
        status, answer = self.call("/v1/completions", {"prompt": prompt, "ignore_eos": True} | more, **headers)
        assert status == 200, answer
        return dict(answer)


@pytest.fixture(scope="module")
def served(cluster: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    from ray import serve

    trace = tmp_path_factory.mktemp("trace") / "requests.jsonl"
    client = Client(deployment(model, trace=str(trace)).start())
    client.trace = trace  # type: ignore[attr-defined]
    wait_for(lambda: client.call("/health")[1].get("replicas") == 2)
    yield client
    serve.shutdown()


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[LLM]:
    with LLM(model, **OPTIONS) as llm:
        yield llm


def prompts(groups: int, each: int, length: int = 600) -> list[str]:
    """Questions about documents, in no order."""
    made = [f"{'abcdefgh'[group]}: {'the same document again and ' * (length // 28)}{number}?" for number in range(each)
            for group in range(groups)]  # fmt: skip
    return sorted(made, key=lambda text: hash(text[::-1]) % 1009)


def pids_of(deployment: str) -> list[int]:
    """The processes of a deployment's replicas, which Ray names so."""
    name = f"ray::ServeReplica:gossamer:{deployment}"
    return [each.pid for each in psutil.process_iter(["cmdline"]) if name in " ".join(each.info["cmdline"] or [])]


def test_tokens_are_those_of_one_engine(served: Client, alone: LLM) -> None:
    texts = prompts(4, 6)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.8, "seed": 8, "n": 2},
    ]
    asked = [(text, kinds[place % 3] | {"max_tokens": 12}) for place, text in enumerate(texts)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda each: served.complete(each[0], **each[1], return_token_ids=True), asked))
    wanted = alone.generate(texts, [SamplingParams(**settings, ignore_eos=True) for _, settings in asked], False)
    for answer, output in zip(answers, wanted, strict=True):
        assert [choice["token_ids"] for choice in answer["choices"]] == [each.token_ids for each in output.outputs]


def test_a_request_without_a_seed_has_one_answer_by_its_id(served: Client) -> None:
    ask = {"temperature": 1.0, "max_tokens": 16, "headers": {"x_request_id": "one"}}
    texts = {served.complete("Once upon a time", **dict(ask))["choices"][0]["text"] for _ in range(4)}
    assert len(texts) == 1
    other = served.complete("Once upon a time", temperature=1.0, max_tokens=16, headers={"x_request_id": "two"})
    assert other["choices"][0]["text"] not in texts


def test_streams_end_as_they_do_everywhere(served: Client) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 8, "ignore_eos": True}
    with served.open("/v1/chat/completions", body) as response:
        *events, end, rest = response.read().decode().split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    assert json.loads(events[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_prompts_go_where_they_are_cached(served: Client) -> None:
    texts = prompts(6, 6, length=1000)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda text: served.complete(text, max_tokens=2), texts))
    computed = sum(
        answer["usage"]["prompt_tokens"] - answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        for answer in answers
    )
    once = sum(len(text) for text in texts if text.endswith("g0?")) or 6 * 1000
    assert computed < 1.2 * once  # with each document on both replicas it would be twice as much


def test_a_conversation_goes_on_where_it_is_kept(served: Client) -> None:
    previous = None
    for turn in range(4):
        body = {"input": f"turn {turn}", "max_output_tokens": 4, "ignore_eos": True} | (
            {"previous_response_id": previous} if previous else {}
        )
        status, answer = served.call("/v1/responses", body)
        assert status == 200, answer
        previous = answer["id"]
    status, kept = served.call(f"/v1/responses/{previous}/input_items")
    assert status == 200 and len(kept["data"]) == 7
    assert served.call(f"/v1/responses/{previous}", method="DELETE")[0] == 200
    assert served.call(f"/v1/responses/{previous}")[0] == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v1/completions", b"{", 400, None),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, 400, None),
        ("/v1/completions", {"prompt": "x", "model": "another"}, 404, "model_not_found"),
        ("/v1/completions", {"prompt": "x" * 5000}, 400, "context_length_exceeded"),
        ("/v1/completions", b"x" * 9_000_000, 413, "body_too_large"),
        ("/v1/files", {}, 404, "not_found"),
        ("/nothing", {}, 404, None),
    ],
)
def test_refusals(served: Client, path: str, body: Any, status: int, code: str | None) -> None:
    got, answer = served.call(path, body)
    assert got == status, answer
    assert code is None or answer["error"]["code"] == code


def test_keys_are_asked_for(served: Client) -> None:
    assert served.call("/v1/models", authorization="Bearer wrong")[0] == 401
    assert served.call("/v1/models")[0] == 200


def test_replicas_answer_nobody_but_the_ingress(served: Client) -> None:
    from ray import serve

    address = serve.get_deployment_handle("engine", "gossamer").record_replica_metadata.remote().result()["address"]
    assert address.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        Client(address).open("/v1/models")


def test_pins_are_on_all_replicas(served: Client) -> None:
    text = "a prefix that stays " * 20
    status, pinned = served.call("/v1/prefixes", {"prompt": text, "name": "stays"})
    assert (status, pinned["replicas"]) == (200, 2)
    picture = served.call("/v1/prefixes")[1]
    assert {node["replica"] for node in picture["nodes"] if node["pinned"]} == {
        each["tag"] for each in picture["replicas"]
    }
    assert len({node["id"] for node in picture["nodes"]}) == len(picture["nodes"])
    assert served.call(f"/v1/prefixes/{pinned['id']}", method="DELETE")[0] == 200
    assert not any(node["pinned"] for node in served.call("/v1/prefixes")[1]["nodes"])
    assert served.call(f"/v1/prefixes/{pinned['id']}", method="DELETE")[0] == 404


def test_metrics_tell_replicas_apart(served: Client) -> None:
    with served.open("/metrics") as response:
        text = response.read().decode()
    tags = {each["tag"] for each in served.call("/v1/prefixes")[1]["replicas"]}
    assert all(f'replica="{tag}"' in text for tag in tags) and "gossamer:router_routed_total" in text


def test_the_trace_has_no_texts(served: Client) -> None:
    def lines() -> list[Any]:
        return [json.loads(line) for line in served.trace.read_text().splitlines()[1:]]  # type: ignore[attr-defined]

    before = len(lines())
    for _ in range(2):
        served.complete("a secret prompt " * 40, max_tokens=3)
    wait_for(lambda: len(lines()) == before + 2, 10)  # each is written when its client has everything
    first, second = lines()[-2:]
    assert first["chain"] == second["chain"] and len(first["chain"]) == 2 and first["output_tokens"] == 3
    assert second["cached_tokens"] > 0 and "secret" not in json.dumps(lines())
    assert 250 < read_trace(served.trace).block_tokens <= 256  # type: ignore[attr-defined]  # about a token per byte


def test_nothing_is_computed_for_a_client_that_has_left(served: Client) -> None:
    body = {"prompt": "Once", "max_tokens": 1800, "stream": True, "ignore_eos": True, "temperature": 0}
    response = served.open("/v1/completions", body)
    response.read(200)
    assert served.call("/v1/prefixes")[1]["running"] >= 1
    response.close()
    wait_for(lambda: served.call("/v1/prefixes")[1]["running"] == 0, 5)


def test_a_replica_that_is_killed(served: Client, alone: LLM) -> None:
    """Streams that had begun end with an error of their own; all else is answered, with the same tokens."""
    ask = {"max_tokens": 1200, "temperature": 0.9, "ignore_eos": True, "seed": 5}
    begun = [served.open("/v1/completions", ask | {"prompt": f"{place} begun", "stream": True}) for place in range(6)]
    for each in begun:
        each.read(100)
    answers: list[tuple[int, Any]] = []
    texts = [f"{place} " + "waits " * 60 for place in range(8)]
    whole = {"max_tokens": 60, "temperature": 0.9, "ignore_eos": True, "seed": 5, "return_token_ids": True}

    def answer(text: str) -> tuple[int, Any]:
        return served.call("/v1/completions", whole | {"prompt": text})

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(answer, text) for text in texts]
        time.sleep(0.1)
        killed = pids_of("engine")[0]
        os.kill(killed, signal.SIGKILL)
        answers = [each.result() for each in asked]
    assert [status for status, _ in answers] == [200] * len(texts)
    params = SamplingParams(max_tokens=60, temperature=0.9, seed=5, ignore_eos=True)
    for (_, got), output in zip(answers, alone.generate(texts, params, False), strict=True):
        assert got["choices"][0]["token_ids"] == output.outputs[0].token_ids
    ends = [each.read().decode().split("\n\n") for each in begun]
    lost = [end for end in ends if "replica_lost" in end[-3]]
    assert len(lost) >= 1 and all(end[-2:] == ["data: [DONE]", ""] for end in ends)
    wait_for(lambda: len(pids_of("engine")) == 2 and killed not in pids_of("engine"), 60)
    wait_for(lambda: served.call("/health")[1].get("replicas") == 2, 60)


def test_an_ingress_that_is_killed(served: Client) -> None:
    """It comes back, and knows from the replicas where prompts are cached."""
    text = "what was cached before " * 40
    served.complete(text, max_tokens=2)
    [pid] = pids_of("ingress")
    os.kill(pid, signal.SIGKILL)

    def well() -> bool:
        try:
            return bool(served.call("/health")[1].get("replicas") == 2)
        except OSError:
            return False

    wait_for(lambda: pids_of("ingress") not in ([], [pid]), 60)
    wait_for(well, 60)
    for _ in range(3):
        assert served.complete(text, max_tokens=2)["usage"]["prompt_tokens_details"]["cached_tokens"] > 800


@pytest.mark.slow
def test_a_node_that_is_lost(model: Path, alone: LLM) -> None:
    """What its replica had not begun is answered by the other one; then there is one replica."""
    from ray import serve

    before = os.environ.get("GOSSAMER_API_KEY")
    os.environ["GOSSAMER_API_KEY"] = KEY
    try:
        with ray_clusters.cluster() as made:
            client = Client(deployment(model, port=PORT + 2).start())
            wait_for(lambda: client.call("/health")[1].get("replicas") == 2)
            texts = [f"{place} " + "waits " * 60 for place in range(12)]
            whole = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
            with ThreadPoolExecutor(12) as pool:
                asked = [pool.submit(client.call, "/v1/completions", whole | {"prompt": text}) for text in texts]
                time.sleep(0.1)
                made.remove_node(made.worker_nodes.copy().pop(), allow_graceful=False)
                answers = [each.result() for each in asked]
            assert [status for status, _ in answers] == [200] * len(texts), answers
            params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
            for (_, got), output in zip(answers, alone.generate(texts, params, False), strict=True):
                assert got["choices"][0]["token_ids"] == output.outputs[0].token_ids
            wait_for(lambda: client.call("/health")[1].get("replicas") == 1, 60)
            serve.shutdown()
    finally:
        os.environ.pop("GOSSAMER_API_KEY")
        if before is not None:
            os.environ["GOSSAMER_API_KEY"] = before


class TestRefusedBeforeItStarts:
    def test_more_than_there_is_room_for(self, cluster: Any, model: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"3 replicas of .* do not fit, there is room for 2"):
            deployment(model, replicas=3).check_cluster()

    def test_more_than_this_machine_has(self, model: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"need 1,000 CPUs|this machine has"):
            deployment(model, threads=1000).check_machine()

    def test_a_port_that_is_taken(self, model: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(ConfigurationError, match="cannot listen on"):
                deployment(model, port=taken.getsockname()[1]).check_machine()

    def test_another_model_on_a_node(self, cluster: Any, model: Path) -> None:
        from dataclasses import replace

        settings = replace(deployment(model).settings, digest="0" * 64)
        with pytest.raises(ConfigurationError, match=r"node 127\.0\.0\.1 .* has other weights"):
            Deployment(settings).check_cluster()

    def test_another_version_on_a_node(self, cluster: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gossamer.__version__", "0.0.1")  # of this process only
        with pytest.raises(ConfigurationError, match=r"has Gossamer \d.*, this one 0\.0\.1"):
            deployment(model).check_cluster()

    def test_no_ray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        from gossamer.distributed.extra import check_ray

        monkeypatch.setitem(sys.modules, "ray", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigurationError, match=r"pip install 'gossamer\[ray\]'"):
            check_ray()

    @pytest.mark.parametrize("changes", [{"replicas": 0}, {"max_replicas": 1}, {"threads": 0}, {"ingresses": -1}])
    def test_numbers(self, model: Path, changes: dict[str, int]) -> None:
        with pytest.raises(ConfigurationError, match=next(iter(changes))):
            deployment(model, **changes)


def test_it_is_not_imported_without_need() -> None:
    import subprocess
    import sys

    code = "import gossamer, gossamer.cli.app, sys; assert not {'ray', 'simpy', 'aiohttp'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def config_of(path: Path) -> Any:
    import yaml

    content = yaml.safe_load(path.read_text())
    return yaml.safe_load(content["spec"]["serveConfigV2"]) if "spec" in content else content


class TestConfigFiles:
    DEPLOY = Path(__file__).parents[1] / "deploy"

    @pytest.mark.parametrize("name", ["ray-serve.yaml", "kuberay.yaml"])
    def test_ray_and_we_understand_them(self, model: Path, name: str) -> None:
        from ray.serve.schema import ServeDeploySchema

        from gossamer.distributed.serving.app import build_app

        config = config_of(self.DEPLOY / name)
        ServeDeploySchema(**config)
        [application] = config["applications"]
        assert application["import_path"] == f"{build_app.__module__}:{build_app.__name__}"
        build_app(application["args"] | {"model": str(model)})

    def test_what_a_dry_run_prints_can_be_deployed(self, model: Path) -> None:
        import subprocess
        import sys

        import yaml

        from gossamer.distributed.serving.app import build_app

        command = [sys.executable, "-m", "gossamer.cli", "deploy", str(model), "--replicas", "1", "--dry-run"]
        printed = subprocess.run([*command, "--memory", "64MiB"], check=True, capture_output=True, text=True)
        config = yaml.safe_load(printed.stdout)
        [application] = config["applications"]
        assert application["args"]["memory"] == "64MiB" and "key" not in application["args"]
        build_app(application["args"])

    def test_behind_the_proxies_of_ray(self, served: Client, model: Path) -> None:
        """As a config file has it; the last test, as it ends the other deployment."""
        from ray import serve

        from gossamer.distributed.serving.app import build_app

        serve.shutdown()
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": PORT + 1})
        serve.run(build_app(OPTIONS | {"model": str(model), "replicas": 2}), name="another-name")
        client = Client(f"http://127.0.0.1:{PORT + 1}")
        wait_for(lambda: client.call("/health")[0] == 200)
        assert client.complete("Once", max_tokens=3)["usage"]["completion_tokens"] == 3
        body = {"prompt": "Once", "stream": True, "max_tokens": 3, "ignore_eos": True}
        with client.open("/v1/completions", body) as response:
            assert response.read().endswith(b"data: [DONE]\n\n")
        assert client.call("/v1/models", authorization="Bearer wrong")[0] == 401


def test_the_command_finishes_what_is_running(model: Path) -> None:
    """As with `gossamer serve`, SIGTERM is the end of new requests only. On a cluster of its own."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "gossamer.cli", "deploy", str(model), "--replicas", "1", "--port", str(PORT + 3)]
    command += ["--memory", "64MiB", "--dtype", "float32", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        started = json.loads(process.stdout.readline())
        client = Client(started["address"])
        body = {"prompt": "Once", "max_tokens": 1500, "stream": True, "ignore_eos": True}
        with client.open("/v1/completions", body) as response:
            response.read(100)
            process.send_signal(signal.SIGTERM)
            assert response.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
    with pytest.raises(OSError):
        client.open("/health")
