"""Writing safetensors block by block gives what safetensors and transformers read."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.errors import CheckpointError, ConfigurationError, GossamerError, UnsupportedModelError
from gossamer.models.checkpoint import WEIGHTS_INDEX, weight_files
from gossamer.models.shard_reader import ShardReader
from gossamer.models.shards import DTYPE_NAMES, ShardWriter, TensorSpec

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    small = torch.randint(0, 2, shape) if dtype == torch.bool else torch.randint(0, 100, shape)
    return small.to(dtype)


def same(left: Tensor, right: Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*flat)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    kinds = draw(st.lists(st.tuples(st.sampled_from(list(DTYPE_NAMES)), SHAPES), min_size=1, max_size=8))
    return {f"layer.{i}.weight": random_tensor(dtype, shape) for i, (dtype, shape) in enumerate(kinds)}


def specs_of(wanted: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in wanted.items()]


def check_alignment(path: Path) -> None:
    """Readers that view the bytes in place need every tensor to start at a multiple of its element size."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    for entry in header.values():
        size = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}[entry["dtype"]]
        assert (8 + length + entry["data_offsets"][0]) % size == 0


@settings(max_examples=150, deadline=None)
@given(wanted=tensors(), max_shard_bytes=st.integers(1, 400), data=st.data())
def test_any_tensors_in_any_order_of_blocks_are_read_back(wanted, max_shard_bytes, data):
    blocks = [
        [name, block] for name, tensor in wanted.items() for block in (tensor.split(2) if tensor.dim() else [tensor])
    ]
    order = data.draw(st.permutations(range(len(blocks))))
    # A tensor's own blocks come in order, whatever comes between them.
    queues = {name: [block for owner, block in blocks if owner == name] for name in wanted}
    with TemporaryDirectory() as name:
        directory = Path(name)
        with ShardWriter(directory, specs_of(wanted), max_shard_bytes=max_shard_bytes) as writer:
            for index in order:
                owner = blocks[index][0]
                writer.write(owner, queues[owner].pop(0))
        found: dict[str, Tensor] = {}
        for path in weight_files(directory):
            check_alignment(path)
            with safe_open(path, framework="pt") as file:
                # (an open safetensors file is no dictionary: it cannot be iterated)
                shard = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                assert file.metadata() == {"format": "pt"}
            assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= max_shard_bytes
            assert not shard.keys() & found.keys()
            found |= shard
        assert found.keys() == wanted.keys()
        assert all(same(found[key], wanted[key]) for key in wanted)
        if (index := directory / WEIGHTS_INDEX).exists():
            assert json.loads(index.read_text())["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
        with ShardReader(directory) as reader:
            assert sorted(reader.specs.values()) == sorted(specs_of(wanted), key=lambda spec: spec.name)
            assert all(same(reader.tensor(key), wanted[key]) for key in wanted)


def test_transformers_loads_the_shards(tiny, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny).to(torch.bfloat16)
    weights = dict(model.state_dict())
    with ShardWriter(tmp_path, specs_of(weights), max_shard_bytes=10_000) as writer:
        for name, weight in weights.items():
            for rows in weight.split(5):
                writer.write(name, rows)
    AutoConfig.from_pretrained(tiny).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16").state_dict()
    assert len(weight_files(tmp_path)) > 2
    assert all(same(again[name], weight) for name, weight in weights.items())


def test_files_have_ordinary_permissions(tmp_path):
    mask = os.umask(0o027)
    try:
        with ShardWriter(tmp_path, [TensorSpec("a", torch.int8, (0,))]):
            pass
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(1, 3),  # another dtype
        torch.zeros(1, 4, dtype=torch.int8),  # too wide
        torch.zeros(3, dtype=torch.int8),  # no rows
        torch.zeros(3, 3, dtype=torch.int8),  # too many
    ],
)
def test_rows_that_do_not_fit_are_refused_and_change_nothing(rows, tmp_path):
    with ShardWriter(tmp_path, [TensorSpec("a", torch.int8, (2, 3))]) as writer:
        with pytest.raises(ConfigurationError, match="a "):
            writer.write("a", rows)
        with pytest.raises(ConfigurationError, match="not among"):
            writer.write("b", rows)
        writer.write("a", torch.ones(2, 3, dtype=torch.int8))
    with ShardReader(tmp_path) as reader:
        assert reader.tensor("a").sum() == 6


def test_an_incomplete_tensor_is_an_error_that_names_it(tmp_path):
    specs = [TensorSpec("a", torch.int8, (2, 3)), TensorSpec("b", torch.float32, (5,))]
    with pytest.raises(CheckpointError, match="b lacks 20 bytes"), ShardWriter(tmp_path, specs) as writer:
        writer.write("a", torch.ones(2, 3, dtype=torch.int8))


def test_an_error_inside_is_not_covered_by_the_missing_data(tmp_path):
    specs = [TensorSpec(name, torch.int8, (9,)) for name in "ab"]
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, specs, max_shard_bytes=9):
        raise KeyboardInterrupt
    assert not (tmp_path / WEIGHTS_INDEX).exists()


def test_what_cannot_be_written_is_refused_beforehand(tmp_path):
    spec = TensorSpec("a", torch.int8, (2,))
    with pytest.raises(ConfigurationError, match="same name"):
        ShardWriter(tmp_path, [spec, spec])
    with pytest.raises(ConfigurationError, match="cannot hold a"):
        ShardWriter(tmp_path, [spec._replace(dtype=torch.complex64)])
    with pytest.raises(GossamerError, match="cannot write"):
        ShardWriter(tmp_path / "missing", [spec])


def test_a_full_disk_is_a_typed_error(tmp_path, monkeypatch):
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ShardWriter(tmp_path, [TensorSpec("a", torch.int8, (1,))]) as writer:
        with monkeypatch.context() as full_disk, pytest.raises(GossamerError, match="No space left"):
            full_disk.setattr(os, "pwrite", refuse)
            writer.write("a", torch.ones(1, dtype=torch.int8))
        writer.write("a", torch.ones(1, dtype=torch.int8))


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: whole.replace(b'"I8"', b'"U9"')])
def test_a_damaged_file_is_named(damage, tmp_path):
    with ShardWriter(tmp_path, [TensorSpec("a", torch.int8, (90,))]) as writer:
        writer.write("a", torch.ones(90, dtype=torch.int8))
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ShardReader(tmp_path)


def test_an_unknown_dtype_is_named(tmp_path):
    save_file({"a": torch.zeros(3, dtype=torch.uint16)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="a has the dtype U16"):
        ShardReader(tmp_path)


def test_a_name_that_is_not_there_is_named(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    with ShardReader(tmp_path) as reader, pytest.raises(CheckpointError, match="no tensor b"):
        reader.tensor("b")
