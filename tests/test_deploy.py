"""What deploy/ says about the server is what the server has: options, metrics, limits, times."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from gossamer.cli.app import app
from gossamer.engine.stats import EngineStats
from gossamer.outputs import CompletionOutput, RequestMetrics, RequestOutput
from gossamer.server import ServerOptions
from gossamer.server.metrics import Metrics
from gossamer.server.run import GRACE
from gossamer.sizes import parse_bytes

DEPLOY = Path(__file__).parents[1] / "deploy"
SERVICE, CONTAINER, NGINX, PROMETHEUS, DASHBOARD = (
    (DEPLOY / name).read_text("utf-8")
    for name in ("gossamer.service", "Containerfile", "nginx.conf", "prometheus.yml", "grafana-dashboard.json")
)


def settings(unit: str) -> dict[str, str]:
    """The settings of a unit; of one that is given several times, the last."""
    joined = unit.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and line[0] not in "#["]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def container_command() -> list[str]:
    """What the container runs unless told otherwise."""
    parts = [re.search(rf"^{name} (\[.*\])$", CONTAINER, re.MULTILINE) for name in ("ENTRYPOINT", "CMD")]
    return [word for part in parts if part is not None for word in json.loads(part[1])]


COMMANDS = {"unit": shlex.split(settings(SERVICE)["ExecStart"]), "container": container_command()}


def nginx(setting: str, text: str = NGINX) -> list[str]:
    """The values of a setting, wherever it is."""
    return re.findall(rf"^\s*{setting}\s+(.*);$", text, re.MULTILINE)


def size(value: str) -> int:
    return int(value.removesuffix("m")) << 20


def expressions(value: Any) -> Iterator[str]:
    """Every query of the dashboard."""
    if isinstance(value, dict):
        for name, each in value.items():
            if name in ("expr", "query", "definition") and isinstance(each, str):
                yield each
            else:
                yield from expressions(each)
    elif isinstance(value, list):
        for each in value:
            yield from expressions(each)


def metric_names() -> set[str]:
    """The names of the samples that a server shows, once it has answered something."""
    engine: Any = SimpleNamespace(
        scheduler=SimpleNamespace(active=[], waiting=[]),
        budget=SimpleNamespace(used=0, total=1),
        stats=EngineStats(computed_tokens=5),
        store=None,
        emission=SimpleNamespace(on_token=None),
        speculator=None,
    )
    metrics = Metrics(engine, "tiny")
    completion = CompletionOutput(0, "x", [1], finish_reason="stop")
    metrics.count_outputs([RequestOutput("a", "x", [1], [completion], metrics=RequestMetrics(0.0, 1.0, 2.0, 3.0))])
    return set(re.findall(r"^(gossamer:\w+)\{", metrics.render().decode(), re.MULTILINE))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_only_options_of_the_server(name: str) -> None:
    words = COMMANDS[name]
    assert words[0].endswith("gossamer") and words[1] == "serve"
    # typer says Command; an application with several commands is a group
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    values = serve.make_context("serve", words[2:]).params  # raises if an option is unknown or has a wrong value
    assert values["model"] == ["smollm2-135m"]
    assert values["data_dir"] is not None


def test_the_unit_waits_until_the_server_has_ended() -> None:
    words = COMMANDS["unit"]
    drain = float(words[words.index("--drain-timeout") + 1])
    assert float(settings(SERVICE)["TimeoutStopSec"]) > drain + GRACE
    assert settings(SERVICE).get("KillSignal", "SIGTERM") == "SIGTERM"


def test_the_unit_keeps_the_key_out_of_the_arguments() -> None:
    assert "--api-key" not in SERVICE
    assert not settings(SERVICE)["EnvironmentFile"].startswith("-")  # without the file it would let everybody in


def test_the_unit_allows_what_pytorch_needs() -> None:
    assert "MemoryDenyWriteExecute" not in settings(SERVICE)
    assert "ProcSubset" not in settings(SERVICE)


def test_the_container_is_stopped_as_the_server_expects() -> None:
    assert "STOPSIGNAL SIGTERM" in CONTAINER
    assert re.search(r"^USER (?!root|0$)", CONTAINER, re.MULTILINE)
    words = COMMANDS["container"]
    port = words[words.index("--port") + 1]
    assert f"EXPOSE {port}" in CONTAINER and f"http://127.0.0.1:{port}/health" in CONTAINER


def test_what_the_container_is_built_from_exists() -> None:
    for line in re.findall(r"^COPY (?!--from)(.*)$", CONTAINER, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (DEPLOY.parent / source).exists(), source


def test_nginx_lets_the_server_refuse_and_give_up_by_itself() -> None:
    options = ServerOptions()
    body, file = map(size, nginx("client_max_body_size"))
    assert options.max_body < body <= options.max_body + (1 << 20)
    assert options.max_file < file <= options.max_file + (1 << 20)
    (read,) = nginx("proxy_read_timeout")
    assert float(read.removesuffix("s")) > options.request_timeout
    (keep,) = nginx("keepalive_timeout")
    assert float(keep.removesuffix("s")) < options.idle_timeout


def test_nginx_sends_events_on_as_they_come() -> None:
    assert nginx("proxy_buffering") == ["off"]
    assert nginx("proxy_http_version") == ["1.1"]
    assert any(value.startswith("X-Request-Id") for value in nginx("proxy_set_header"))


@pytest.mark.parametrize(
    "path", re.findall(r"location = (\S+)", NGINX) + re.findall(r"metrics_path: (\S+)", PROMETHEUS)
)
def test_paths_are_those_of_the_server(path: str) -> None:
    from gossamer.server import create_app

    # nothing is loaded for the document alone
    assert path in create_app(lambda: None, ServerOptions()).openapi()["paths"]  # type: ignore[arg-type, return-value]


def test_every_metric_of_the_dashboard_exists() -> None:
    dashboard = json.loads(DASHBOARD)
    wanted = {name for query in expressions(dashboard) for name in re.findall(r"gossamer:\w+", query)}
    assert len(wanted) > 20
    assert wanted <= metric_names()


def test_the_dashboard_can_be_pointed_at_any_source_and_model() -> None:
    dashboard = json.loads(DASHBOARD)
    assert {each["name"] for each in dashboard["templating"]["list"]} == {"datasource", "model_name"}
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)
    assert all('model_name=~"$model_name"' in target["expr"] for panel in panels for target in panel["targets"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.parametrize("page", ["README.md", "docs/how-to/deploy.md", "docs/how-to/serve.md"])
def test_options_in_the_docs_exist(page: str) -> None:
    # typer says Command; an application with several commands is a group
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in serve.params for option in parameter.opts}
    text = (DEPLOY.parent / page).read_text("utf-8")
    for line in re.findall(r"^(?:\S+=\S+ )?gossamer serve .*$", text, re.MULTILINE):
        assert set(re.findall(r"--[a-z0-9-]+", line)) <= known, line


def test_sizes_in_the_docs_are_the_defaults() -> None:
    options = ServerOptions()
    text = (DEPLOY.parent / "docs/how-to/serve.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \| ([^|]+) \|", text, re.MULTILINE))
    for name in ("max_queue", "request_timeout", "idle_timeout", "drain_timeout"):
        assert float(rows[name.replace("_", "-")]) == getattr(options, name)
    for name in ("max_body", "max_file"):
        assert parse_bytes(rows[name.replace("_", "-")].strip()) == getattr(options, name)
