"""Models, and servers of them, that several test files need."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401  torch.compile imports it, which fails once something has imported distutils

if TYPE_CHECKING:
    import openai

    from browser_page import Browser
    from gossamer import LLM
    from running_server import Running


# Files that take longest, first: what begins last in one process keeps the others waiting for it.
LONGEST = (
    "test_kernel_assembly.py",
    "test_ray_serve.py",
    "test_ray_batch.py",
    "test_smollm2.py",
    "test_exactness.py",
    "test_int8_loading.py",
    "test_server_life.py",
    "test_prefix_means.py",
    "test_batch_e2e.py",
    "test_tool_calls.py",
    "test_responses_api.py",
    "test_model_pool.py",
    "test_damaged_files.py",
    "test_bench_embed.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct in the user's cache; fetched on the first run, for tests that need real weights."""
    from gossamer.models import resolve_model

    return resolve_model("smollm2-135m")


@pytest.fixture(scope="session")
def make_tiny_llama() -> Callable[..., Path]:
    """A function that writes a random Llama with a tokenizer of one token per byte, and returns its directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from gossamer.models.quiet import quiet_transformers

    def make(directory: Path, *, max_shard_size: str = "5GB", **changes: object) -> Path:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: number for number, token in enumerate(["<eos>", *alphabet])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        settings: dict[str, object] = {
            "vocab_size": len(vocabulary),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "eos_token_id": 0,
            "bos_token_id": None,
        }
        torch.manual_seed(0)
        with quiet_transformers():
            model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
            model.save_pretrained(directory, max_shard_size=max_shard_size)
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="module")
def tiny(
    make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """A tiny Llama with sharp logits: greedy choices do not depend on rounding. Files with other needs override it.

    Its context is 128 tokens, or the ``TINY_CONTEXT`` of the file.
    """
    context = getattr(request.module, "TINY_CONTEXT", 128)
    directory = tmp_path_factory.mktemp("tiny")
    return make_tiny_llama(directory, initializer_range=0.4, max_position_embeddings=context)


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Any:
    """The same model as transformers runs it."""
    from references import load_reference

    return load_reference(tiny)


@pytest.fixture(scope="module")
def llm(tiny: Path) -> LLM:
    """The same model as Gossamer serves it."""
    from gossamer import LLM

    return LLM(tiny)


@pytest.fixture(scope="module")
def smollm2_server(smollm2_path: Path) -> Iterator[Running]:
    """A server of SmolLM2."""
    from gossamer import LLM
    from running_server import running

    with running(lambda: LLM(smollm2_path, memory="512MiB", max_model_len=2048)) as server:
        yield server


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    """A server of the same model. Files that need other options override it."""
    from running_server import make_chat_llm, running

    with running(lambda: make_chat_llm(tiny)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    """OpenAI's client of that server."""
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def slowed(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of some milliseconds, so that a request is still running when it is to be."""
    forward = server.llm.engine.runner.forward
    monkeypatch.setattr(server.llm.engine.runner, "forward", lambda plan: (time.sleep(0.01), forward(plan))[1])


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Programs that the test starts end at Ctrl-C, also where the shell has pytest ignore it, as behind ``&``."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def private_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's cache, except the slow ones that share its real model."""
    if "smollm2_path" not in request.fixturenames:
        monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A real browser."""
    from browser_page import CHROMIUM

    playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium (Debian: apt install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Browser]:
    """Opens the page at / of a server; no script may fail, and nobody else be called."""
    from browser_page import Browser

    browser = Browser(chromium)
    yield browser
    browser.check()
