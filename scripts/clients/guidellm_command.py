"""guidellm: its benchmark of a server, three requests one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from cells import address, cell, run

URL, MODEL, _ = address()
CHECKPOINT = sys.argv[4]


@cell("stream")
def stream() -> None:
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.json")
        done = subprocess.run(
            [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console",
             "--backend", f"kind=openai_http,target={URL},model={MODEL}", "--profile", "kind=synchronous",
             "--constraint", "kind=max_requests,count=3", "--tokenizer", f"kind=huggingface_auto,model={CHECKPOINT}",
             "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8", "--output", f"kind=json,path={report}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
        assert totals["successful"] == 3 and totals["errored"] == 0, totals


run()
