"""Checkpoints of a window of gradients that any number of processes can go on from: safetensors files, no pickle.

A directory ``step-N`` appears when it is complete. Each process writes what it keeps; who reads takes what it needs of
all files (``torch.distributed.checkpoint`` with its Hugging Face storage). Names are those of the parameters:

    optimizer.NAME.history      (window, *shape) in the type of the history
    optimizer.NAME.momentum     the average of steps, with compat="paper"
    window.gram                 (window, window) fp64
    window.count, .damping      numbers
    model.NAME                  the model's state, if it was given
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from gossamer.distributed.fisher.group import Group
from gossamer.errors import CheckpointError, ConfigurationError, OutputError
from gossamer.operators.ranks import ALONE, Ranks, together
from gossamer.optim.mfac import MFAC
from gossamer.optim.parts import local

_STEP = re.compile(r"step-(\d+)")


def save_checkpoint(
    directory: str | Path, step: int, optimizer: MFAC, *, model: nn.Module | None = None, group: Group | None = None
) -> Path:
    """Writes ``directory/step-N``; every process calls it.

    Args:
        directory: on storage that all processes see.
        step: N.
        optimizer: whose window is written. Learning rates and schedules are the caller's to keep.
        model: whose parameters and buffers are written too.
        group: the optimizer's.

    Raises:
        ConfigurationError: there is such a step.
        OutputError: it cannot be written; there is no ``step-N`` then.
    """
    ranks: Ranks = group or ALONE
    target = Path(directory) / f"step-{step}"
    draft = target.with_name(f"{target.name}.tmp")
    with together(ranks, "preparing a checkpoint"), _writing(target):
        if target.exists():
            raise ConfigurationError(f"{target} exists; remove it, or save another step")
        if ranks.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)  # of a run that was interrupted
            draft.mkdir(parents=True)
    tensors = _window(optimizer) | _momentum(optimizer) | _model(model)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    writer = dcp.HuggingFaceStorageWriter(str(draft), save_distributed=True)
    with together(ranks, "writing a checkpoint"), _writing(target):
        dcp.save(tensors, storage_writer=writer, **_among(group))
    with together(ranks, "finishing a checkpoint"), _writing(target):
        if ranks.rank == 0:
            os.rename(draft, target)
    return target


def load_checkpoint(
    path: str | Path, optimizer: MFAC, *, model: nn.Module | None = None, group: Group | None = None
) -> int:
    """Goes on from a checkpoint of any number of processes; every process calls it. Returns its step.

    Args:
        path: ``step-N``, or the directory of several, of which the newest is taken.
        optimizer: with the same parameters, window and type of history. Holds the window twice meanwhile.
        model: whose parameters and buffers are read too.
        group: the optimizer's.

    Raises:
        ConfigurationError: the checkpoint is of other parameters, or another window or type. Nothing has changed.
        CheckpointError: there is none, or it cannot be read. The optimizer has not changed.
    """
    ranks: Ranks = group or ALONE
    found: Path | None = None
    with together(ranks, "looking at a checkpoint"):
        found = _newest(Path(path))
        stored = _stored(found)
        wanted = _wanted(optimizer, stored)
        wanted |= {name: torch.empty_like(tensor) for name, tensor in _model(model).items()}
        for name, tensor in wanted.items():
            _check(name, tensor, stored, found)
    assert found is not None
    ranks.add(torch.zeros(0), agreed=f"loading {found.name}")
    with together(ranks, "reading a checkpoint"), _reading(found):
        reader = dcp.HuggingFaceStorageReader(str(found))
        dcp.load(wanted, storage_reader=reader, **_among(group))
    _take(optimizer, wanted)
    if model is not None:
        with torch.no_grad():
            for name, tensor in _model(model).items():
                tensor.copy_(wanted[name])
    return int(found.name.removeprefix("step-"))


def _names(optimizer: MFAC) -> list[str]:
    """Of all parameters, by place."""
    names: list[str] = []
    for group in optimizer.param_groups:
        names += group.get("param_names") or [str(len(names) + place) for place in range(len(group["params"]))]
    return names


def _window(optimizer: MFAC) -> dict[str, Tensor]:
    names, fisher = _names(optimizer), optimizer.fisher
    histories = optimizer.preconditioner.history().items()
    return {f"optimizer.{names[place]}.history": history for place, history in histories} | {
        "window.gram": fisher.gram,
        "window.count": torch.tensor(fisher.count),
        "window.damping": torch.tensor(fisher.damping, dtype=torch.float64),
    }


def _momentum(optimizer: MFAC) -> dict[str, Tensor]:
    params = zip(_names(optimizer), optimizer.preconditioner.params, strict=True)
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in params}
    return {f"optimizer.{name}.momentum": state["momentum"] for name, state in states.items() if "momentum" in state}


def _model(model: nn.Module | None) -> dict[str, Tensor]:
    """Parameters and buffers themselves."""
    if model is None:
        return {}
    state = get_model_state_dict(model).items()
    return {f"model.{name}": value.detach() for name, value in state if isinstance(value, Tensor)}


def _wanted(optimizer: MFAC, stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """Empty tensors for what is read: histories of the parameters that the checkpoint has."""
    preconditioner = optimizer.preconditioner
    parts, m, dtype = preconditioner.parts, optimizer.fisher.window, optimizer.fisher.rows.dtype
    wanted: dict[str, Tensor] = {}
    for place, name in enumerate(_names(optimizer)):
        key = f"optimizer.{name}.history"
        if key in stored or place in preconditioner.places:
            part = torch.zeros(m, *parts.shape(place), dtype=dtype, device=optimizer.fisher.device)
            wanted[key] = parts.spread(place, part)
        key = f"optimizer.{name}.momentum"
        if key in stored:
            wanted[key] = torch.empty_like(preconditioner.params[place].detach(), dtype=torch.float32)
    unknown = {name for name in stored if name.startswith("optimizer.")} - set(wanted)
    if unknown:
        raise ConfigurationError(f"the checkpoint has {min(unknown)}, and the optimizer has no such parameter")
    return wanted | {
        "window.gram": torch.empty(m, m, dtype=torch.float64),
        "window.count": torch.tensor(0),
        "window.damping": torch.tensor(0.0, dtype=torch.float64),
    }


def _take(optimizer: MFAC, read: Mapping[str, Tensor]) -> None:
    """Gives the optimizer what was read."""
    names, columns, places = _names(optimizer), [], []
    for place, name in enumerate(names):
        if (history := read.get(f"optimizer.{name}.history")) is not None:
            places.append(place)
            columns.append(local(history).flatten(1))
        if (average := read.get(f"optimizer.{name}.momentum")) is not None:
            optimizer.state[optimizer.preconditioner.params[place]]["momentum"] = average
    fisher = optimizer.fisher.state_dict() | {
        "rows": torch.cat(columns, 1),
        "gram": read["window.gram"],
        "count": int(read["window.count"]),
        "damping": float(read["window.damping"]),
    }
    optimizer.take_window({"fisher": fisher, "places": places})


def _newest(path: Path) -> Path:
    if _STEP.fullmatch(path.name) and path.is_dir():
        return path
    steps = {int(match[1]): each for each in path.glob("step-*") if (match := _STEP.fullmatch(each.name))}
    if not steps:
        raise CheckpointError(f"{path} holds no checkpoint: no directory step-N")
    return steps[max(steps)]


def _stored(path: Path) -> Mapping[str, TensorStorageMetadata]:
    with _reading(path):
        tensors: Any = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    if "window.gram" not in tensors:
        raise CheckpointError(f"{path} holds no window of gradients")
    found: Mapping[str, TensorStorageMetadata] = tensors
    return found


def _check(name: str, tensor: Tensor, stored: Mapping[str, TensorStorageMetadata], path: Path) -> None:
    there = stored.get(name)
    if there is None:
        raise ConfigurationError(f"{path} has no {name}: it is of another model")
    if tuple(there.size) != tuple(tensor.shape) or there.properties.dtype != tensor.dtype:
        raise ConfigurationError(
            f"{name} in {path} is {tuple(there.size)} in {there.properties.dtype}; here it is {tuple(tensor.shape)} in "
            f"{tensor.dtype}"
        )


def _among(group: Group | None) -> dict[str, Any]:
    return {"no_dist": True} if group is None else {"process_group": group.process_group}


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant
            yield
    except ConfigurationError:
        raise
    except (OSError, dcp.api.CheckpointException) as error:
        raise OutputError(f"cannot write {target}: {_first_cause(error)}") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except Exception as error:  # safetensors, JSON and the planner each have their own
        raise CheckpointError(f"{path} cannot be read: {_first_cause(error)}") from error


def _first_cause(error: BaseException) -> str:
    """A ``CheckpointException`` holds the traceback of each process that failed."""
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    return f"{type(cause).__name__}: {cause}"
