"""llama.cpp's server as the wheel of xllamacpp has it. Runs in that project's environment until it is ended."""

from __future__ import annotations

import argparse
import importlib
import signal
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    for name in ("--port", "--threads", "--sequences", "--context"):
        parser.add_argument(name, type=int)
    parser.add_argument("--speculation", help="such as ngram-mod")
    given = parser.parse_args()
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.port = given.port
    params.n_parallel = given.sequences
    params.n_ctx = given.sequences * given.context
    params.kv_unified = True
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.threads
    if given.speculation:
        kind = "COMMON_SPECULATIVE_TYPE_" + given.speculation.replace("-", "_").upper()
        params.speculative.types = [getattr(xllamacpp.common_speculative_type, kind)]
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
