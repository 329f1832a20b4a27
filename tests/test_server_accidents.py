"""A server's batches over accidents: crashes at every write, full disks, a second server, a restart beside a drain."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gossamer.server import batches as batches_module
from gossamer.server.batches import Batch, Batches
from gossamer.server.files import FileStore, StoredFile, new_id

ENDED = ("completed", "failed", "cancelled")


class Crash(BaseException):
    """The process is gone: nothing is written any more, and nothing is cleaned up."""


class Disk:
    """Counts what is changed on the disk; ``dies_at`` that change, of which a write does a half.

    Args:
        full: changes that fail because the disk is full, by number.
    """

    CHANGES = ((os, "write"), (os, "replace"), (os, "unlink"), (os, "ftruncate"), (Path, "write_text"))

    def __init__(self, *, dies_at: int | None = None, full: range = range(0)) -> None:
        self.dies_at, self.full, self.changes, self.dead, self.refused = dies_at, full, 0, False, 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in self.CHANGES:
                patch.setattr(owner, name, self._changing(getattr(owner, name), name))
            yield

    def _changing(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            if self.dead:
                raise Crash
            number, self.changes = self.changes, self.changes + 1
            if number == self.dies_at:
                if name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                self.dead = True
                raise Crash
            if number in self.full and name in ("write", "write_text"):
                self.refused += 1
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)

        return change


class Answers:
    """What `Answering` is for batches. ``computed`` holds the prompts in their order."""

    def __init__(self, error: Exception | None = None) -> None:
        self.has_free_places, self.failure = True, None
        self.computed: list[str] = []
        self.error = error

    async def complete(self, body: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        [prompt] = body.prompt
        self.computed.append(prompt)
        if self.error is not None and "odd" in prompt:
            raise self.error
        return {"choices": [{"text": f"{prompt}!"}]}


def lines(count: int = 5) -> bytes:
    """So many good ones, and two others."""
    url = "/v1/completions"
    requests = [
        {"custom_id": f"r{i}", "method": "POST", "url": url, "body": {"prompt": f"Number {i}"}} for i in range(count)
    ]
    odd = {"custom_id": "odd", "method": "POST", "url": url, "body": {"prompt": "odd", "stream": True}}
    return b"\n".join([json.dumps(each).encode() for each in [*requests[:2], odd, *requests[2:]]] + [b"no JSON"])


def start(directory: Path, answers: Answers) -> tuple[FileStore, Batches]:
    files = FileStore(directory / "files")
    batches = Batches(directory / "batches", files, answers, max_in_flight=2)  # type: ignore[arg-type]  # enough of one
    files.remove_leftovers(batches.expected_files)
    return files, batches


def create(files: FileStore, batches: Batches, content: bytes) -> Batch:
    upload = files.directory / "upload.part"
    upload.write_bytes(content)
    file = files.adopt(upload, StoredFile(new_id("file"), "in.jsonl", "batch", len(content), 0))
    return batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata=None)


async def ended(batches: Batches, batch_id: str) -> Batch:
    async with asyncio.timeout(30):
        while batches.get(batch_id).status not in ENDED:
            await asyncio.sleep(0.002)
    return batches.get(batch_id)


def records(path: Path) -> list[dict[str, Any]]:
    """The complete ones."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def found_answers(directory: Path) -> dict[str, str]:
    """Record ids by custom id, wherever they lie."""
    paths = [*directory.glob("batches/*.answers.jsonl"), *directory.glob("files/file-*")]
    everything = [path.read_bytes().splitlines(keepends=True) for path in paths if path.suffix in ("", ".jsonl")]
    lines = [
        line for each in everything for line in each if line.startswith(b'{"id": "batch_req') and line[-1:] == b"\n"
    ]
    return ids([each for each in map(json.loads, lines) if (each["response"] or {}).get("status_code") == 200])


def ids(found: list[dict[str, Any]]) -> dict[str, str]:
    return {each["custom_id"]: each["id"] for each in found}


def assert_whole(directory: Path, files: FileStore, batch: Batch, count: int = 5) -> list[dict[str, Any]]:
    """Every line is where clients read it, once, and nothing lies beside it. The answers."""
    shown = batch.to_dict()
    assert shown["status"] == "completed" and shown["errors"] is None
    answers = records(files.path(files.get(shown["output_file_id"]).id))
    failures = records(files.path(files.get(shown["error_file_id"]).id))
    assert sorted(each["custom_id"] for each in answers) == sorted(f"r{i}" for i in range(count))
    assert sorted(str(each["custom_id"]) for each in failures) == ["None", "odd"]
    assert shown["request_counts"] == {"total": count + 2, "completed": count, "failed": 2}
    assert files.get(shown["output_file_id"]).bytes == files.path(shown["output_file_id"]).stat().st_size
    expected = {batch.input_file_id, shown["output_file_id"], shown["error_file_id"]}
    names = {path.name for path in directory.rglob("*") if path.is_file()}
    assert names == expected | {f"{each}.json" for each in expected} | {f"{batch.id}.json"}
    return answers


def changes_of_an_undisturbed_run(directory: Path) -> int:
    disk = Disk()

    async def live() -> None:
        files, batches = start(directory, Answers())
        batch = create(files, batches, lines())
        with disk.installed():
            await ended(batches, batch.id)
        assert_whole(directory, files, batch)
        await batches.stop()

    asyncio.run(live())
    return disk.changes


def test_a_crash_at_any_write_loses_nothing_and_computes_nothing_twice(tmp_path: Path) -> None:
    changes = changes_of_an_undisturbed_run(tmp_path / "undisturbed")
    assert changes > 15

    async def crash_and_go_on(directory: Path, dies_at: int) -> None:
        disk = Disk(dies_at=dies_at)
        files, batches = start(directory, Answers())
        batch = create(files, batches, lines())
        with disk.installed():
            while not disk.dead:
                await asyncio.sleep(0.001)
            await batches.stop()
        kept = found_answers(directory)
        answers = Answers()
        files, batches = start(directory, answers)
        found = assert_whole(directory, files, await ended(batches, batch.id))
        assert ids(found).items() >= kept.items()
        assert len(answers.computed) == 5 - len(kept)
        await batches.stop()
        assert start(directory, answers)[1].get(batch.id).to_dict() == batches.get(batch.id).to_dict()

    for dies_at in range(changes):
        asyncio.run(crash_and_go_on(tmp_path / str(dies_at), dies_at))


def test_two_crashes_in_a_row(tmp_path: Path) -> None:
    async def crash(directory: Path, places: tuple[int, int]) -> None:
        files, batches = start(directory, Answers())
        batch = create(files, batches, lines())
        for dies_at in places:
            disk = Disk(dies_at=dies_at)
            with disk.installed():
                while not disk.dead and batches.get(batch.id).status not in ENDED:
                    await asyncio.sleep(0.001)
                await batches.stop()
            kept = found_answers(directory)
            files, batches = start(directory, Answers())
        found = assert_whole(directory, files, await ended(batches, batch.id))
        assert ids(found).items() >= kept.items()
        await batches.stop()

    for number, places in enumerate([(7, 4), (12, 5), (16, 1), (17, 2), (17, 6), (18, 3)]):
        asyncio.run(crash(tmp_path / str(number), places))


def test_a_cancelled_batch_keeps_its_lines_over_a_crash(tmp_path: Path) -> None:
    async def live() -> None:
        answers = Answers()
        files, batches = start(tmp_path, answers)
        batch = create(files, batches, lines(50))
        while batch.completed < 4 or batch.failed < 1:
            await asyncio.sleep(0)
        batches.cancel(batch.id)
        await batches.stop()
        kept = found_answers(tmp_path)
        computed = len(answers.computed)
        files, batches = start(tmp_path, answers)
        shown = (await ended(batches, batch.id)).to_dict()
        assert shown["status"] == "cancelled" and len(answers.computed) == computed
        assert ids(records(files.path(shown["output_file_id"]))) == kept
        assert [each["custom_id"] for each in records(files.path(shown["error_file_id"]))] == ["odd"]
        await batches.stop()

    asyncio.run(live())


def test_a_full_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "DISK_SECONDS", 0.01)
    changes = changes_of_an_undisturbed_run(tmp_path / "undisturbed")

    async def live(directory: Path, first: int) -> None:
        answers = Answers()
        files, batches = start(directory, answers)
        batch = create(files, batches, lines())
        hindrances = set()
        disk = Disk(full=range(first, first + 9))
        with disk.installed():
            while batch.status not in ENDED:
                hindrances.add(json.dumps(batch.to_dict()["errors"]))
                await asyncio.sleep(0.001)
        assert any("insufficient_storage" in each for each in hindrances) == (disk.refused > 0)
        assert disk.refused > 0 or first > changes - 4  # the last of them move and remove
        assert_whole(directory, files, batch)
        assert len(answers.computed) == 5  # none was computed twice
        await batches.stop()

    for first in range(0, changes, 3):
        asyncio.run(live(tmp_path / str(first), first))


def test_a_batch_whose_input_is_gone_fails_and_shows_what_it_has(tmp_path: Path) -> None:
    async def live() -> None:
        files, batches = start(tmp_path, Answers())
        batch = create(files, batches, lines(50))
        while batch.completed < 4:
            await asyncio.sleep(0)
        await batches.stop()
        files.delete(batch.input_file_id)
        kept = found_answers(tmp_path)
        files, batches = start(tmp_path, Answers())
        shown = (await ended(batches, batch.id)).to_dict()
        assert shown["status"] == "failed" and "cannot be read" in shown["errors"]["data"][0]["message"]
        assert ids(records(files.path(shown["output_file_id"]))) == kept
        another = create(files, batches, lines())
        assert (await ended(batches, another.id)).status == "completed"
        await batches.stop()

    asyncio.run(live())


@pytest.mark.parametrize("error", [ZeroDivisionError("secret"), RecursionError(), MemoryError(), OSError(5, "odd")])
def test_whatever_a_line_raises_stays_with_the_line(tmp_path: Path, error: Exception) -> None:
    async def live() -> None:
        files, batches = start(tmp_path, Answers(error))
        batch = create(files, batches, lines().replace(b', "stream": true', b""))
        await ended(batches, batch.id)
        assert_whole(tmp_path, files, batch)
        [odd] = [each for each in records(files.path(batch.error_file_id or "")) if each["custom_id"] == "odd"]
        assert odd["response"]["status_code"] == 500
        assert odd["response"]["body"]["error"]["message"] == "internal error"
        await batches.stop()

    asyncio.run(live())


def test_a_drain_begins_no_lines_and_writes_those_in_flight(tmp_path: Path) -> None:
    async def live() -> None:
        gate, answers = asyncio.Event(), Answers()
        complete = answers.complete

        async def gated(body: Any) -> dict[str, Any]:
            answer = await complete(body)
            await gate.wait()
            return answer

        answers.complete = gated  # type: ignore[method-assign]  # as slow as a model
        files, batches = start(tmp_path, answers)
        batch = create(files, batches, lines(20))
        while len(answers.computed) < 2:
            await asyncio.sleep(0.001)
        batches.drain()
        gate.set()
        await asyncio.sleep(0.1)
        assert len(answers.computed) <= 3 and len(found_answers(tmp_path)) == len(answers.computed)
        assert batch.status == "in_progress"
        await batches.stop()
        kept = found_answers(tmp_path)
        files, batches = start(tmp_path, answers)
        found = assert_whole(tmp_path, files, await ended(batches, batch.id), 20)
        assert ids(found).items() >= kept.items()
        assert len(answers.computed) == 20
        await batches.stop()

    asyncio.run(live())
