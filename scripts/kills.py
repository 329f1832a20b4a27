"""Kills commands at random moments, lets them go on, and checks that nothing finished was lost or done again.

    python scripts/kills.py --seed 1 --kills 15

Four subjects, each killed (SIGKILL) that many times: `gossamer batch`, `gossamer serve` while it runs a batch of
`/v1/batches`, `gossamer compress`, and `gossamer pull` of a GGUF file. The model is random and small. A round starts
the subject a few times, kills it each time, lets it end, and checks its invariants:

- batch, serve: every line that was complete at a kill is in the end there, under the same id (so it was not computed
  again); each request has one answer, the one of an undisturbed run; the files of a batch can be read; nothing else is
  left in the directories.
- compress, pull: at any moment the output is missing, or the old one, or the new one, whole; nothing is left beside it.

`--full-disk` does the same with a disk that is full in place of a kill: a file system in memory of a random size
(mounted, which takes root). Prints one JSON object; its `faults` are empty, or the exit status is 1.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kill_subjects import (
    CONTEXT,
    IMPORTED,
    LINES,
    Report,
    Subject,
    answered,
    check_lines,
    make_model,
    records,
    requests,
)

from gossamer.models.manifest import verify

KILLS_PER_ROUND = 3


def size_of(path: Path) -> int:
    """Bytes of a file, or -1 if there is none."""
    return path.stat().st_size if path.exists() else -1


def grown(path: Path, size: int) -> bool:
    """Whether a file is there, and of another size."""
    return size_of(path) not in (-1, size)


class Harness:
    def __init__(self, directory: Path, seed: int, report: Report) -> None:
        self.directory, self.random, self.report = directory, random.Random(seed), report
        self.model = make_model(directory / "model")
        self.input = directory / "in.jsonl"
        self.input.write_text("".join(json.dumps(each) + "\n" for each in requests()))
        output = directory / "undisturbed.jsonl"
        assert Subject("--version").end() == 0  # now there is a process to fork
        start = time.monotonic()
        assert Subject("batch", str(self.model), str(self.input), "-o", str(output)).end() == 1  # some are refused
        self.seconds = dict.fromkeys(("batch", "serve"), time.monotonic() - start)
        self.expected = {key: text for key, (_, text) in answered(records(output)).items()}
        assert len(self.expected) == LINES - LINES // 20

    def killed(self, what: str, subject: Subject, condition: Callable[[], bool], seconds: float) -> bool:
        """Kill it at a random moment: of its whole life, or within ``seconds`` of the condition."""
        if self.random.random() < 0.3:
            done = subject.kill_after(self.random.uniform(0, self.seconds[what]))
        else:
            done = subject.kill_after(self.random.uniform(0, seconds), condition)
        self.report.kills[what] = self.report.kills.get(what, 0) + done
        return done

    def batch(self) -> None:
        """One output, killed and resumed until it is complete."""
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        output = directory / "out.jsonl"
        command = ("batch", str(self.model), str(self.input), "-o", str(output), "--resume", "--max-num-seqs", "4")
        kept: dict[str, str] = {}
        for _ in range(KILLS_PER_ROUND):
            size = size_of(output)
            subject = Subject(*command)
            self.killed("batch", subject, functools.partial(grown, output, size), self.seconds["batch"] / 4)
            kept |= {key: record_id for key, (record_id, _) in answered(records(output)).items()}
        self.report.check(Subject(*command).end() in (0, 1), "batch: resuming failed")
        check_lines(self.report, "batch", records(output), kept, self.expected)
        self.report.check([path.name for path in directory.iterdir()] == ["out.jsonl"], "batch: leftovers")

    def serve(self) -> None:
        """One batch on servers that are killed one after the other."""
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        kept: dict[str, str] = {}
        batch_id = ""
        for turn in range(KILLS_PER_ROUND + 1):
            with self.server(directory) as (subject, url):
                if not batch_id:
                    batch_id = self.create(url)
                if turn == KILLS_PER_ROUND:
                    self.check_served(directory, url, batch_id, kept)
                    return
                part = directory / "batches" / f"{batch_id}.answers.jsonl"
                size = size_of(part)
                if self.random.random() < 0.33:  # around the end of the batch
                    due, seconds = functools.partial(self.at_the_end, part, url, batch_id), 0.1
                else:  # somewhere between its lines
                    due, seconds = (
                        functools.partial(self.under_way, part, size, url, batch_id),
                        self.seconds["batch"] / 3,
                    )
                self.killed("serve", subject, due, seconds)
                lines = records(part)
                for path in (directory / "files").glob("file-*"):
                    if path.suffix == "" and path.read_bytes().startswith(b'{"id": "batch_req_'):
                        lines += records(path)
                kept |= {key: record_id for key, (record_id, _) in answered(lines).items()}

    def under_way(self, part: Path, size: int, url: str, batch_id: str) -> bool:
        return grown(part, size) or self.status(url, batch_id) == "completed"

    def at_the_end(self, part: Path, url: str, batch_id: str) -> bool:
        return len(records(part)) >= len(self.expected) - 1 or self.status(url, batch_id) in ("finalizing", "completed")

    @contextmanager
    def server(self, directory: Path) -> Iterator[tuple[Subject, str]]:
        subject = Subject(
            "serve", str(self.model), "--port", "0", "--data-dir", str(directory), "--log-format", "json",
            "--max-num-seqs", "4", "--served-model-name", "tiny", "--threads", "1",
        )  # fmt: skip
        try:
            while not (found := re.search(r"listening on (http://\S+?)\"", subject.text())):
                assert subject.process.is_alive(), subject.text()
                time.sleep(0.02)
            while self.call(found[1], "/health")[0] != 200:
                assert subject.process.is_alive(), subject.text()
                time.sleep(0.02)
            yield subject, found[1]
        finally:
            if subject.process.is_alive():
                subject.process.kill()
                subject.end()

    @staticmethod
    def call(url: str, path: str, data: bytes | None = None, kind: str = "application/json") -> tuple[int, bytes]:
        request = urllib.request.Request(url + path, data, {"content-type": kind})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:  # it was killed
            return 0, b"{}"

    def create(self, url: str) -> str:
        form = b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\ncontent-disposition: '
        form += b'form-data; name="file"; filename="in.jsonl"\r\n\r\n' + self.input.read_bytes() + b"\r\n--x--\r\n"
        file = json.loads(self.call(url, "/v1/files", form, "multipart/form-data; boundary=x")[1])
        body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch_id: str = json.loads(self.call(url, "/v1/batches", json.dumps(body).encode())[1])["id"]
        return batch_id

    def status(self, url: str, batch_id: str) -> str:
        status: str = json.loads(self.call(url, f"/v1/batches/{batch_id}")[1]).get("status", "")
        return status

    def check_served(self, directory: Path, url: str, batch_id: str, kept: dict[str, str]) -> None:
        while self.status(url, batch_id) not in ("completed", "failed", "cancelled"):
            time.sleep(0.1)
        batch = json.loads(self.call(url, f"/v1/batches/{batch_id}")[1])
        self.report.check(batch["status"] == "completed", f"serve: the batch is {batch['status']}: {batch['errors']}")
        lines = []
        for file_id in (batch["output_file_id"], batch["error_file_id"]):
            status, content = self.call(url, f"/v1/files/{file_id}/content")
            self.report.check(status == 200, f"serve: {file_id} cannot be read")
            lines += [json.loads(line) for line in content.splitlines()]
        check_lines(self.report, "serve", lines, kept, self.expected)
        counts = batch["request_counts"]
        right = (counts["completed"], counts["failed"]) == (len(self.expected), LINES - len(self.expected))
        self.report.check(right, f"serve: counts are {counts}")
        names = {path.name for path in directory.rglob("*") if path.is_file()}
        listed = {each["id"] for each in json.loads(self.call(url, "/v1/files")[1])["data"]}
        wanted = {"lock", f"{batch_id}.json"} | listed | {f"{each}.json" for each in listed}
        self.report.check(names == wanted, f"serve: leftovers {names ^ wanted}")
        self.report.check(len(listed) == 3, f"serve: {len(listed)} files are listed")

    def compress(self) -> None:
        """An output that is replaced, over and over."""
        output = self.directory / "int8"
        command = ["compress", str(self.model), "--int8", "--overwrite", "-o", str(output)]
        if "compress" not in self.seconds:
            start = time.monotonic()
            assert Subject(*command).end() == 0
            self.seconds["compress"] = time.monotonic() - start
        self.replaced("compress", output, command)

    def replaced(self, what: str, output: Path, command: list[str], **environment: str) -> None:
        """At every kill the old one or the new one is there, whole."""

        def being_written() -> bool:
            return any(output.parent.glob(f".{output.name}.*.tmp"))

        for _ in range(KILLS_PER_ROUND):
            self.killed(what, Subject(*command, **environment), being_written, 0.2)
            self.report.check(verify(output, full=True) == [], f"{what}: the output is damaged or gone")
        self.report.check(Subject(*command, **environment).end() == 0, f"{what}: failed after kills")
        self.report.check(verify(output, full=True) == [], f"{what}: the output is damaged")
        self.report.check(not any(output.parent.glob(".*.tmp")), f"{what}: leftovers")

    def pull(self) -> None:
        """A GGUF file into a cache of its own, over and over."""
        gguf = self.directory / "model.gguf"
        if not gguf.exists():
            if not (self.directory / "int8").exists():
                assert Subject("compress", str(self.model), "--int8", "-o", str(self.directory / "int8")).end() == 0
            assert Subject("export", str(self.directory / "int8"), "--format", "gguf", "-o", str(gguf)).end() == 0
        cache = self.directory / "cache"
        command = ["pull", str(gguf), "--force"]
        if "pull" not in self.seconds:
            start = time.monotonic()
            assert Subject(*command, GOSSAMER_CACHE=str(cache)).end() == 0
            self.seconds["pull"] = time.monotonic() - start
        [entry] = (cache / "models").glob("gguf-*")
        self.replaced("pull", entry, command, GOSSAMER_CACHE=str(cache))

    # --- full disks -------------------------------------------------------------------------------------------------

    @contextmanager
    def disk(self, size: int) -> Iterator[Path]:
        """A file system of that many bytes."""
        directory = Path(tempfile.mkdtemp(dir=self.directory))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)], check=True)
        try:
            yield directory
        finally:
            subprocess.run(["umount", str(directory)], check=True)

    def grow(self, directory: Path) -> None:
        subprocess.run(["mount", "-o", "remount,size=100m", str(directory)], check=True)

    def full_batch(self) -> None:
        with self.disk(self.random.randrange(2, 8) * 4096) as directory:
            output = directory / "out.jsonl"
            command = ("batch", str(self.model), str(self.input), "-o", str(output), "--resume")
            subject = Subject(*command)
            status, text = subject.outcome()
            self.report.check(status == 2 and "No space left" in text, f"full batch: {status}, {text[-300:]}")
            self.report.check("Traceback" not in text, f"full batch: {text[-900:]}")
            lines = records(output)
            self.report.check(output.read_bytes().count(b"\n") == len(lines) > 0, "full batch: torn lines")
            kept = {key: record_id for key, (record_id, _) in answered(lines).items()}
            self.grow(directory)
            self.report.check(Subject(*command).end() == 1, "full batch: resuming failed")
            check_lines(self.report, "full batch", records(output), kept, self.expected)

    def full_serve(self) -> None:
        with self.disk(self.random.randrange(13, 17) * 4096) as directory, self.server(directory) as (_, url):
            batch_id = self.create(url)
            errors = None
            while errors is None and self.status(url, batch_id) != "completed":
                time.sleep(0.1)
                errors = json.loads(self.call(url, f"/v1/batches/{batch_id}")[1])["errors"]
            self.report.check(errors is not None, "full serve: the disk was not full")
            lines = records(directory / "batches" / f"{batch_id}.answers.jsonl")
            kept = {key: record_id for key, (record_id, _) in answered(lines).items()}
            self.report.check(self.call(url, "/health")[0] == 200, "full serve: it does not answer any more")
            self.grow(directory)
            self.check_served(directory, url, batch_id, kept)

    def full_compress(self) -> None:
        with self.disk(self.random.randrange(8, 700) * 4096) as directory:
            subject = Subject("compress", str(self.model), "--int8", "-o", str(directory / "int8"))
            status, text = subject.outcome()
            self.report.check(status == 2 and "No space left" in text, f"full compress: {status}, {text[-300:]}")
            self.report.check("Traceback" not in text, f"full compress: {text[-900:]}")
            self.report.check(not any(directory.iterdir()), "full compress: leftovers")

    def full_pull(self) -> None:
        with self.disk(self.random.randrange(8, 2500) * 4096) as directory:
            subject = Subject("pull", str(self.directory / "model.gguf"), GOSSAMER_CACHE=str(directory))
            status, text = subject.outcome()
            self.report.check(status == 2 and "No space left" in text, f"full pull: {status}, {text[-300:]}")
            self.report.check("Traceback" not in text, f"full pull: {text[-900:]}")
            left = [path.name for path in (directory / "models").iterdir() if not path.name.endswith(".lock")]
            self.report.check(not left, f"full pull: leftovers {left}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=15, help="of each subject, at least")
    parser.add_argument("--only", choices=("batch", "serve", "compress", "pull"), action="append")
    parser.add_argument("--full-disk", type=int, default=0, metavar="ROUNDS", help="full disks of each subject")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    CONTEXT.set_forkserver_preload(IMPORTED)
    report = Report()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gossamer-kills-") as directory:
        harness = Harness(Path(directory), options.seed, report)
        for what in options.only or ("batch", "serve", "compress", "pull"):
            while report.kills.get(what, 0) < options.kills:
                getattr(harness, what)()
                print(what, report.kills.get(what, 0), file=sys.stderr)
            for _ in range(options.full_disk):
                getattr(harness, f"full_{what}")()
                report.kills[f"full disk, {what}"] = report.kills.get(f"full disk, {what}", 0) + 1
    minutes = (time.monotonic() - start) / 60
    print(json.dumps({"seed": options.seed, "counts": report.kills, "minutes": minutes, "faults": report.faults}))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
