"""Files of prefixes: damage is found, the size is kept, and processes that share a directory get along."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from forked import Program
from gossamer.engine.memory import KVLayout, LayerShape, MemoryBudget
from gossamer.engine.prefix_store import PrefixStore
from gossamer.engine.prefix_store import writer as writer_module
from gossamer.engine.prefix_store.format import PrefixFormat
from gossamer.engine.tree import PrefixTree
from test_prefix_store import DIGEST, LOGGER, SECONDS, make_store
from test_prefix_tree import LAYOUT, fill, holds_its_content, new_tree

TEXT = tuple(range(100, 180))


def write(directory: Path, *texts: tuple[int, ...], size: int = 1 << 30, model: str = DIGEST) -> PrefixStore:
    """A store that has written these, pinned."""
    tree = new_tree(10_000)
    store = make_store(directory, tree, size=size, model=model)
    for text in texts:
        tree.unlock(fill(tree, text))
        store.pin(list(text), None)
        store.keep(list(text), None)
        assert store.wait(SECONDS)
    return store


def read(directory: Path, *texts: tuple[int, ...]) -> list[int]:
    """How many tokens of each come back in another process. Those that do have their keys."""
    tree = new_tree(10_000)
    store = make_store(directory, tree)
    for text in texts:
        store.restore(list(text), None)
    assert all(holds_its_content(node) for node in tree)
    assert tree.num_bytes == tree.budget.used
    return [tree.match(text) for text in texts]


def only_file(directory: Path) -> Path:
    (file,) = directory.iterdir()
    return file


def test_others_can_read_it(tmp_path: Path) -> None:
    write(tmp_path, TEXT)
    assert only_file(tmp_path).stat().st_mode & 0o777 == 0o600
    tensors = load_file(only_file(tmp_path))
    assert tensors["tokens"].tolist() == list(TEXT)
    assert tensors["keys.1"].shape == (1, 80, 4) and tensors["values.1"].shape == (1, 80, 1)
    assert len(tensors) == 2 + 2 * len(LAYOUT.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_every_dtype_comes_back_to_the_bit_and_nan_is_a_value(dtype: torch.dtype, tmp_path: Path) -> None:
    layout = KVLayout((LayerShape(2, 4, 4), LayerShape(1, 8, 2)), dtype, torch.device("cpu"))

    def tree() -> PrefixTree:
        return PrefixTree(layout, MemoryBudget(1 << 20))

    source, target = tree(), tree()
    node = source.insert(TEXT)
    assert source.allocate(node) and node.keys and node.values
    generator = torch.Generator().manual_seed(0)
    for each in (*node.keys, *node.values):
        own = each.view(torch.uint8)
        own.copy_(torch.randint(0, 256, own.shape, generator=generator, dtype=torch.uint8))
    if dtype != torch.int8:
        assert any(each.isnan().any() for each in node.keys)
    node.computed = len(node)
    store = make_store(tmp_path, source)
    store.pin(list(TEXT), None)
    store.keep(list(TEXT), None)
    assert store.wait(SECONDS)
    make_store(tmp_path, target).restore([*TEXT[:70], 5], None)  # a part of it
    (found,) = target
    assert found.complete and found.tokens == list(TEXT[:70])
    for one, other in zip((*node.keys, *node.values), (*(found.keys or []), *(found.values or [])), strict=True):
        assert torch.equal(one[:, :70].view(torch.uint8), other.view(torch.uint8))


def _cut(data: bytearray, place: int, _: int) -> bytes:
    return bytes(data[:place])


def _flip(data: bytearray, place: int, bits: int) -> bytes:
    data[place] ^= bits
    return bytes(data)


def _swap(data: bytearray, place: int, other: int) -> bytes:
    """Exchange two blocks of 16 bytes, as a disk may that writes them at the wrong places."""
    one, two = (place // 16 * 16, other * 16 % len(data) // 16 * 16)
    data[one : one + 16], data[two : two + 16] = data[two : two + 16], data[one : one + 16]
    return bytes(data)


@given(
    damage=st.sampled_from([_cut, _flip, _swap]),
    place=st.integers(0, 1 << 30),
    how=st.integers(1, 255),
    late=st.booleans(),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_never_used(
    damage: Callable[..., bytes], place: int, how: int, late: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever happened to the file, before a process starts or while it runs."""
    caplog.clear()
    write(tmp_path, TEXT)
    file = only_file(tmp_path)
    whole = file.read_bytes()
    damaged = damage(bytearray(whole), place % len(whole), how)
    tree = new_tree(1000)
    with caplog.at_level(logging.INFO, LOGGER):
        store = make_store(tmp_path, tree) if late else None
        file.write_bytes(damaged)
        store = store or make_store(tmp_path, tree)
        for _ in range(2):
            store.restore(list(TEXT), None)
    assert tree.match(TEXT) == (len(TEXT) if damaged == whole else 0)
    assert all(holds_its_content(node) for node in tree) and tree.num_bytes == tree.budget.used
    assert len(caplog.records) == store.stats.unusable_files == (damaged != whole)
    file.unlink()


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff" * 8,
        b'{"__metadata__": 3}',
        b'{"tokens": {"shape": [Infinity]}}',
        b"[" * 5000,
        json.dumps({"__metadata__": {"gossamer_prefix": "1", "model": DIGEST, "start": "-1"}, "tokens": 1}).encode(),
        json.dumps(
            {
                "__metadata__": {"gossamer_prefix": "1", "model": DIGEST, "start": "0"},
                "tokens": {"shape": [10**400]},
            }
        ).encode(),
    ],
)
def test_what_is_no_prefix_file(header: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = f"{'a' * 16}-{'0' * 32}.safetensors"
    (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header)
    assert read(tmp_path, TEXT) == [0]
    assert [record.getMessage() for record in caplog.records if name in record.getMessage()] != []
    assert len(caplog.records) == 1


def test_what_is_no_file_is_not_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{'a' * 16}-{str(number) * 32}.safetensors" for number in range(3)]
    os.mkfifo(tmp_path / names[0])  # a reader would wait for a writer
    (tmp_path / names[1]).mkdir()
    (tmp_path / names[2]).symlink_to("/dev/zero")
    assert read(tmp_path, TEXT) == [0] and not caplog.records


def test_token_ids_that_the_model_does_not_have(tmp_path: Path) -> None:
    write(tmp_path, TEXT)
    store = PrefixStore(tmp_path, 1 << 30, new_tree(1000), model=DIGEST, vocab_size=TEXT[-1])
    assert len(store) == 0 and store.stats.unusable_files == 1


# --- size -----------------------------------------------------------------------------------------------------------


def text(number: int) -> tuple[int, ...]:
    return (number, *TEXT)


def test_the_size_is_kept_and_what_was_used_last_stays(tmp_path: Path) -> None:
    others = [tmp_path / "model.safetensors", tmp_path / "notes"]
    for other in others:
        other.write_bytes(b"0" * 10_000_000)
    one = PrefixFormat(LAYOUT, DIGEST, 1000).size(0, 81)
    store = write(tmp_path, *map(text, range(3)), size=3 * one + 10)
    by_name = {each.name: each for each in tmp_path.iterdir() if each not in others}
    assert len(by_name) == 3
    for number, name in enumerate(by_name):  # the order in which they were used, whatever the clock's steps
        os.utime(by_name[name], (number, number))
    oldest, used, _ = by_name
    tokens = load_file(by_name[used])["tokens"].tolist()
    tree = new_tree(1000)
    make_store(tmp_path, tree).restore(tokens, None)
    assert tree.match(tokens) == 81
    assert by_name[used].stat().st_mtime > 3
    store.pin(list(text(5)), None)
    tree = store._tree
    tree.unlock(fill(tree, text(5)))
    store.keep(list(text(5)), None)
    assert store.wait(SECONDS) and len(store) == 3
    assert not by_name[oldest].exists() and by_name[used].exists()
    assert sum(each.stat().st_size for each in tmp_path.iterdir() if each not in others) <= 3 * one
    assert all(other.stat().st_size == 10_000_000 for other in others)


def test_one_that_is_larger_than_all_may_be_is_not_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = write(tmp_path, TEXT, size=1000)
    store.keep(list(TEXT), None)
    assert not list(tmp_path.iterdir()) and len(caplog.records) == 1


def test_what_waits_to_be_written_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow disk makes no queue grow: prefixes are left out, and are written when they are used again."""
    import threading

    allowed = threading.Event()
    original = PrefixFormat.write
    monkeypatch.setattr(PrefixFormat, "write", lambda *a: (allowed.wait(SECONDS), original(*a))[1])
    monkeypatch.setattr(writer_module, "QUEUED_BYTES", 3 * PrefixFormat(LAYOUT, DIGEST, 1000).size(0, 81))
    tree = new_tree(10_000)
    store = make_store(tmp_path, tree)
    for number in range(6):
        tree.unlock(fill(tree, text(number)))
        for _ in range(2):
            store.keep(list(text(number)), None)
    assert store.stats.skipped_files == 3
    tree.evict(tree.budget.total)  # what waits stays as it was
    allowed.set()
    assert store.wait(SECONDS)
    assert read(tmp_path, *map(text, range(6))) == [81, 81, 81, 0, 0, 0]


# --- accidents ------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_once_and_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Any, file: Any, *rest: Any) -> None:
        file.write(b"a part of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(PrefixFormat, "write", full)
        store = write(tmp_path, text(1), text(2))
    assert store.stats.write_failures == 1 and not list(tmp_path.iterdir())
    (record,) = caplog.records
    assert "No space left on device" in record.getMessage()
    monkeypatch.setattr(writer_module, "PAUSE", 0.0)
    for number in (1, 2):
        store.keep(list(text(number)), None)
        store.keep(list(text(number)), None)
        assert store.wait(SECONDS)
    assert read(tmp_path, text(1), text(2)) == [81, 81]


def test_a_directory_that_goes_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "disk"
    store = write(directory, text(1))
    only_file(directory).unlink()
    directory.rmdir()
    tree = store._tree
    tree.evict(tree.budget.total)
    store.restore(list(text(1)), None)
    assert tree.match(text(1)) == 0 and not caplog.records  # gone is not damaged
    tree.unlock(fill(tree, text(2)))
    store.pin(list(text(2)), None)
    store.keep(list(text(2)), None)
    assert store.wait(SECONDS) and store.stats.write_failures == 1 and len(caplog.records) == 1


def test_two_processes_share_a_directory(tmp_path: Path) -> None:
    one = PrefixFormat(LAYOUT, DIGEST, 1000).size(0, 81)
    first = write(tmp_path, text(1), text(2))
    second = write(tmp_path, text(1), text(3), size=2 * one)  # removes what the first one has
    assert len(list(tmp_path.iterdir())) == 2
    tree = first._tree
    tree.evict(tree.budget.total)
    for number in (1, 2, 3):
        first.restore(list(text(number)), None)
    assert all(holds_its_content(node) for node in tree)
    assert first.stats.unusable_files == second.stats.unusable_files == 0
    assert read(tmp_path, text(1), text(3)) == [81, 81]
    other = write(tmp_path, text(1), model="b" * 64)  # another model's
    assert other.stats.unusable_files == 2 and len(list(tmp_path.iterdir())) == 3


KILLED = """
import signal, sys
from pathlib import Path
from gossamer.engine.prefix_store import format
from test_prefix_files import text, write

directory = Path(sys.argv[1])
write(directory, text(1))
writes, original = 0, format._Checked.write

def slowly(self, data):
    global writes
    writes += 1
    original(self, data)
    if writes == int(sys.argv[2]):
        print("half", flush=True)
        signal.pause()

format._Checked.write = slowly
write(directory, text(2))
"""


def test_a_process_that_is_killed_leaves_whole_files_only(tmp_path: Path) -> None:
    with Program(KILLED, tmp_path, 5) as process:
        assert process.stdout.readline() == "half\n"
        unfinished = [each for each in tmp_path.iterdir() if each.suffix == ".unfinished"]
        assert len(unfinished) == 1 and unfinished[0].stat().st_size > 0
        assert read(tmp_path, text(1), text(2)) == [81, 0]  # beside the other one, whose file is left alone
        assert unfinished[0].exists()
        process.send_signal(signal.SIGKILL)
    assert read(tmp_path, text(1), text(2)) == [81, 0]
    assert [each.suffix for each in tmp_path.iterdir()] == [".safetensors"]
