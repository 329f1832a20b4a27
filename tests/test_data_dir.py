"""The directory of files and batches: one server has it, a restart waits for it, and it may be full."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gossamer.errors import ConfigurationError, GossamerError
from gossamer.server.data_dir import DataDirectory
from running_server import Running, make_chat_llm, running, wait_for
from test_server_accidents import found_answers, ids, lines, records

TINY_CONTEXT = 512
FORM = b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\ncontent-disposition: form-data; '
FORM += b'name="file"; filename="in.jsonl"\r\n\r\n%s\r\n--x--\r\n'
MULTIPART = "multipart/form-data; boundary=x"


def test_one_server_has_the_directory(tmp_path: Path) -> None:
    async def live() -> None:
        first, second = DataDirectory(tmp_path / "data"), DataDirectory(tmp_path / "data")
        await first.acquire()
        with pytest.raises(
            ConfigurationError, match=rf"{tmp_path}/data is in use by another server \(process {os.getpid()}"
        ):
            await second.acquire()
        first.drain()
        waiting = asyncio.create_task(second.acquire())
        await asyncio.sleep(0.5)
        assert not waiting.done()
        first.release()
        await waiting
        with pytest.raises(ConfigurationError, match="is in use"):
            await first.acquire()
        second.release()
        await first.acquire()

    asyncio.run(live())


def run_batch(server: Running, count: int, **fields: Any) -> str:
    content = lines(count).replace(b'"body": {', b'"body": {' + json.dumps(fields)[1:-1].encode() + b", ")
    status, raw, _ = server.raw("/v1/files", FORM % content, content_type=MULTIPART)
    assert status == 200, raw
    body = {"input_file_id": json.loads(raw)["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    return str(server.call("/v1/batches", body)[1]["id"])


def test_a_server_that_is_started_beside_one_that_drains(tiny: Path, tmp_path: Path) -> None:
    """The first finishes its clients' requests; the second waits, and goes on with the batch."""
    with running(lambda: make_chat_llm(tiny, max_num_seqs=4), data_dir=tmp_path) as first:
        with (
            pytest.raises(AssertionError, match="could not start"),
            running(lambda: make_chat_llm(tiny), data_dir=tmp_path),
        ):
            pass
        batch_id = run_batch(first, 80, max_tokens=30, ignore_eos=True)
        part = tmp_path / "batches" / f"{batch_id}.answers.jsonl"
        wait_for(lambda: len(records(part)) >= 3)
        answered: list[int] = []
        client = threading.Thread(
            target=lambda: answered.append(
                first.call("/v1/completions", {"prompt": "x", "max_tokens": 300, "ignore_eos": True})[0]
            )
        )
        client.start()
        wait_for(lambda: first.llm.engine.scheduler.active and len(first.llm.engine.requests) > 0)
        time.sleep(0.1)
        first.server.should_exit = True
        wait_for(lambda: first.server.service.state == "draining")
        with running(lambda: make_chat_llm(tiny, max_num_seqs=4), data_dir=tmp_path) as second:
            client.join(60)
            assert answered == [200]
            kept = found_answers(tmp_path)
            wait_for(lambda: second.call(f"/v1/batches/{batch_id}")[1]["status"] == "completed", 60)
            shown = second.call(f"/v1/batches/{batch_id}")[1]
            content = second.raw(f"/v1/files/{shown['output_file_id']}/content")[1]
            found = ids([json.loads(line) for line in content.splitlines()])
            assert len(found) == len(content.splitlines()) == 80 and found.items() >= kept.items()


def test_uploads_and_batches_on_a_full_disk_are_told_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(lambda: make_chat_llm(tiny)) as server:
        batch_id = run_batch(server, 3, max_tokens=2)
        wait_for(lambda: server.call(f"/v1/batches/{batch_id}")[1]["status"] == "completed")
        file_id = server.call(f"/v1/batches/{batch_id}")[1]["input_file_id"]
        before = server.call("/v1/files")[1], server.call("/v1/batches")[1]

        def full(path: Path, *arguments: Any, **options: Any) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            status, raw, _ = server.raw("/v1/files", FORM % b"{}", content_type=MULTIPART)
            assert status == 507 and json.loads(raw)["error"]["code"] == "insufficient_storage"
            body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
            status, answer = server.call("/v1/batches", body)
            assert status == 507 and "No space left" in answer["error"]["message"]
        assert (server.call("/v1/files")[1], server.call("/v1/batches")[1]) == before
        assert server.call("/v1/batches", body)[0] == 200


def test_the_error_of_a_directory_that_cannot_be_held(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GossamerError, match="cannot keep files in"):
        asyncio.run(DataDirectory(tmp_path / "file").acquire())
