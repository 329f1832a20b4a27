"""Fisher matrices whose columns several processes keep: equal to those of one, and what happens if one fails."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fisher_matrices import dense, error, gradients
from gossamer import MFAC, GradientStore, InverseFisher, MFACPreconditioner, SlidingFisher
from gossamer.distributed.fisher import Group, load_checkpoint, save_checkpoint
from gossamer.distributed.fisher.condition import measure
from gossamer.errors import CheckpointError, ConfigurationError, GossamerError
from gossamer.operators.adapters import to_scipy
from gossamer.operators.ranks import own_columns
from process_groups import run_ranks, start_ranks

BOUND, PER_CONDITION = 1e-10, 1e-15  # the first up to a condition of 1e5
SETTINGS: dict[str, Any] = {"lr": 0.05, "window": 5, "damping": 1e-2, "momentum": 0.5, "weight_decay": 0.01}


def everywhere(group: Group, tensor: Tensor) -> bool:
    """Whether all processes have the same bits."""
    flat = tensor.detach().reshape(-1)
    return all(torch.equal(each, flat) for each in group.gather(flat, [len(flat)] * group.size))


# Operators


def operators() -> None:
    group = Group()
    check_conditions(group)
    for number, (m, d, kind) in enumerate([(9, 23, "normal"), (6, 50, "low rank"), (8, 31, "duplicates"), (4, 2, "")]):
        check_static(group, gradients(m, d, kind, number))
    check_window(group)
    check_models(group)
    check_refusals(group)


def check_conditions(group: Group) -> None:
    """Rounding of the sum changes K by 3e-16, and so ``K^-1 w`` by up to that times its condition."""
    rows = list(measure(group, seed=int(group.size)))
    assert min(row.condition for row in rows) < 1e3 and max(row.condition for row in rows) > 1e12
    for row in rows:
        bound = max(BOUND if row.condition <= 1e5 else 0.0, PER_CONDITION * row.condition)
        assert max(row.product, row.span) <= bound, row
        assert row.gram < 1e-14


def check_static(group: Group, rows: Tensor) -> None:
    """Every method against the dense matrix in fp64, and the same bits at each try."""
    d = rows.shape[1]
    columns = own_columns(d, group.rank, group.size)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(d, 3, generator=generator, dtype=torch.float64)
    keep = torch.rand(d, generator=generator) > 0.4
    stores = []
    for _ in range(2):
        store = GradientStore(len(rows), columns.stop - columns.start, ranks=group)
        for row in rows[:, columns]:
            store.append(row)
        stores.append(store)
    stores.append(GradientStore.of(rows[:, columns].contiguous(), group))
    assert all(torch.equal(store.gram(), stores[0].gram()) for store in stores)
    assert everywhere(group, stores[0].gram()) and stores[0].total == d
    inverse = InverseFisher(stores[0], damping=0.1)
    matrix = dense(rows, 0.1)
    expected = torch.linalg.inv(matrix)

    def close(found: Tensor, wanted: Tensor) -> bool:
        return torch.allclose(found, wanted, rtol=BOUND, atol=BOUND * float(expected.abs().max()))

    assert close(inverse @ x[columns], (expected @ x)[columns])
    assert close(inverse @ x[columns, 0], (expected @ x[:, 0])[columns])
    assert close(inverse.diag(), expected.diagonal()[columns])
    index = [d - 1, 0, d // 2]
    assert close(inverse.block(index), expected[index][:, index]) and everywhere(group, inverse.block(index))
    inverse.precompute()
    assert close(inverse.block(index), expected[index][:, index])
    assert inverse.elem(0, d - 1) == pytest.approx(float(expected[0, d - 1]), abs=1e-9)
    assert inverse.quad(x[columns, 0]) == pytest.approx(float(x[:, 0] @ expected @ x[:, 0]), rel=1e-9)
    assert inverse.curvature(x[columns, 1]) == pytest.approx(float(x[:, 1] @ matrix @ x[:, 1]), rel=1e-9)
    assert inverse.logdet() == pytest.approx(float(torch.logdet(matrix)), rel=1e-9) and inverse.shape == (d, d)
    if columns.stop > columns.start:
        squares = inverse.diagonal_blocks(1)[:, 0, 0]
        assert close(squares, expected.diagonal()[columns])
    inside = matrix[keep][:, keep]
    step = -x[:, 0].clone()
    step[keep] = torch.linalg.solve(inside, matrix[keep][:, ~keep] @ x[~keep, 0])
    assert close(inverse.joint_step(x[columns, 0], keep[columns]), step[columns])
    relative = InverseFisher(stores[1], relative_damping=0.3)
    assert relative.damping == pytest.approx(0.3 * float(rows.double().square().mean()), rel=1e-12)
    stores[1].replace(1, rows[0, columns])
    changed = rows.clone()
    changed[1] = rows[0]
    assert torch.allclose(stores[1].gram(), changed.double() @ changed.double().T, rtol=1e-13, atol=1e-12)


def check_window(group: Group) -> None:
    """The last gradients against the dense matrix, past the point where old ones are replaced."""
    d, m = 41, 4
    rows = gradients(7, d, "normal", 3)
    columns = own_columns(d, group.rank, group.size)
    runs = []
    for _ in range(2):
        fisher = SlidingFisher([(columns.stop - columns.start,)], m, 0.05, ranks=group)
        for number, row in enumerate(rows):
            fisher.push([row[columns]])
            kept = rows[max(0, number + 1 - m) : number + 1]
            weights = fisher.ema_weights(0.5)
            average = kept.flip(0).double().T @ (weights[fisher.ages.argsort()])
            found = fisher.natural_gradient(weights)[0]
            assert error(found, torch.linalg.solve(dense(kept, 0.05), average)[columns]) < 1e-5
        solution = fisher.solve()
        kernel = fisher.rows.double() @ fisher.rows.double().T
        kernel = group.add(kernel) + m * 0.05 * torch.eye(m, dtype=torch.float64)
        assert torch.allclose(kernel @ solution / m, torch.eye(m, dtype=torch.float64)[fisher.newest], atol=BOUND)
        x = torch.randn(d, generator=torch.Generator().manual_seed(1))
        wanted = torch.linalg.solve(dense(rows[-m:], 0.05), x.double())[columns]
        assert error(fisher.mv(x[columns]), wanted) < 1e-5
        runs.append(solution)
    assert torch.equal(*runs) and everywhere(group, runs[0])


def check_models(group: Group) -> None:
    """Gradients that the processes share out, more than there are samples and fewer than there are processes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.randn(size, 4), torch.randint(3, (size,))) for size in (2, 1, 3)]
    for m, per_sample in ((5, True), (8, True), (1, True), (4, False)):
        found = InverseFisher.from_model(
            model, nn.functional.cross_entropy, data, m, per_sample=per_sample, damping=0.1, ranks=group
        )
        one = InverseFisher.from_model(
            model, nn.functional.cross_entropy, data, m, per_sample=per_sample, damping=0.1, solver="dual"
        )
        assert (found.m, found.total) == (m, one.d)
        columns = own_columns(one.d, group.rank, group.size)
        assert torch.allclose(found.diag(), one.diag()[columns], rtol=1e-6)
        assert found.logdet() == pytest.approx(one.logdet(), rel=1e-8)
    bad = [(x.clone(), y) for x, y in data]
    bad[0][0][1] = torch.nan
    with pytest.raises(ConfigurationError, match=r"^process 1: the gradient of 0.weight has NaN"):
        InverseFisher.from_model(model, nn.functional.cross_entropy, bad, 4, damping=0.1, ranks=group)


def check_refusals(group: Group) -> None:
    """What one process does wrong is said by all of them, and the next call works."""
    rank, last = group.rank, group.size - 1
    odd = nn.Parameter(torch.ones(3, dtype=torch.float32 if rank != last else torch.float64))
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("'a store of 4 gradients.*'a store of 3 gr", lambda: GradientStore(4 if rank != last else 3, 5, ranks=group)),
        ("bfloat16", lambda: GradientStore(4, 5, torch.float32 if rank != last else torch.bfloat16, ranks=group)),
        ("at least one column", lambda: GradientStore(4, 0, ranks=group)),
        ("window 4.*window 5", lambda: SlidingFisher([(3,)], 4 if rank != last else 5, 0.1, ranks=group)),
        ("damping 0.1.*damping 0.2", lambda: SlidingFisher([(3,)], 4, 0.1 if rank != last else 0.2, ranks=group)),
        ("float32 True.*float64 True", lambda: MFACPreconditioner([odd], group=group)),
    ]
    for message, call in cases:
        with pytest.raises(ConfigurationError, match=message):
            call()
    store = GradientStore(4, 5, ranks=group)
    store.append(torch.ones(5))
    kept, bad = store.rows.clone(), torch.ones(5)
    bad[2] = torch.nan if rank == last else 1
    with pytest.raises(ConfigurationError, match=f"^process {last}: the gradient has NaN"):
        store.append(bad)
    with pytest.raises(ConfigurationError, match=f"^process {last}: a gradient of 5 numbers is expected, got 4"):
        store.replace(0, torch.ones(4 if rank == last else 5))
    assert len(store) == 1 and torch.equal(store.rows, kept)
    with pytest.raises(ConfigurationError, match=f"keeps 5 of {5 * group.size} columns, and other libraries"):
        to_scipy(InverseFisher(store, 0.1))
    with pytest.raises(ConfigurationError, match="let each process have its own"):
        InverseFisher(store, 0.1, structure="block", block_size=2)
    assert float(InverseFisher(store, 1.0).quad(torch.ones(5))) == pytest.approx(5 * group.size / (1 + 5 * group.size))
    with pytest.raises(ConfigurationError, match="processes do not do the same"):
        group.add(torch.zeros(2 + rank))
    sent = [rank + 1] * group.size
    received = [other + 1 for other in range(group.size)]
    found = group.exchange(torch.full((sum(sent),), float(rank)), sent, received)
    assert found.tolist() == [float(other) for other in range(group.size) for _ in range(other + 1)]
    big = {"a": (torch.arange((1 << 24) + 3) % 251).byte(), "b": torch.tensor([True])}  # bytes that fp32 cannot count
    shared = group.share(big if rank == last else None, last)
    assert torch.equal(shared["a"], big["a"]) and shared["b"].dtype == torch.bool
    assert group.share({} if rank == last else None, last) == {}
    assert torch.equal(
        group.add(torch.full((60, 60), rank + 1.0)), torch.full((60, 60), sum(range(group.size + 1)) + 0.0)
    )


@pytest.mark.parametrize("size", [2, 3])
def test_operators_of_several_processes_are_those_of_one(size: int, tmp_path: Path) -> None:
    run_ranks(operators, size, tmp_path / "ranks")


# Training


class Network(nn.Module):
    """Shapes that do not divide: a first dimension of 7, of 3, of 1, and a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 7)
        self.second = nn.Linear(7, 3)
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()).tanh())


def loss(model: nn.Module, step: int, part: slice = slice(None)) -> Tensor:
    """Of the samples of a step, or of those that one process has."""
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
    return (model(x[part]) - x[part].sum(1, keepdim=True).sin()).square().mean()


def train(model: nn.Module, optimizer: MFAC, steps: range, part: slice = slice(None)) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(model, step, part).backward()
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]  # type: ignore[operator]
    return torch.cat([p.detach().reshape(-1) for p in whole])


def same(one: nn.Module, other: nn.Module, tolerance: float = 2e-5) -> bool:
    return bool((flat(one) - flat(other)).norm() <= tolerance * flat(other).norm())


def wrapped(kind: str) -> tuple[nn.Module, nn.Module]:
    """A network as it is trained, and the one inside."""
    inside = Network()
    if kind == "ddp":
        return DistributedDataParallel(inside), inside
    fully_shard(inside, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return inside, inside


def training(directory: Path) -> None:
    group = Group()
    for kind in ("ddp", "fsdp"):
        check_steps(group, kind, directory)
        check_faults(group, kind)
        check_torch_checkpoints(group, kind)
    check_thawing(group)
    check_preconditioner(group)


def check_steps(group: Group, kind: str, directory: Path) -> None:
    """Steps with data that is split over the processes, against one process with all of it."""
    part = slice(group.rank * 12 // group.size, (group.rank + 1) * 12 // group.size)
    for settings in (
        SETTINGS,
        SETTINGS | {"compat": "paper"},
        SETTINGS | {"clip": 0.05, "maximize": True, "lr": torch.tensor(1e-3)},
    ):
        model, inside = wrapped(kind)
        alone = Network()
        optimizer = MFAC(inside.named_parameters(), group=group, **settings)
        one = MFAC(alone.parameters(), **settings)
        assert optimizer.fisher.d < one.fisher.d
        for step in range(8):
            train(model, optimizer, range(step, step + 1), part)
            train(alone, one, range(step, step + 1))
            assert same(inside, alone), (kind, step)
        assert everywhere(group, flat(inside)) and everywhere(group, optimizer.fisher.gram)
        assert group.add(torch.tensor([optimizer.fisher.d]).double()).item() == one.fisher.d
        again, inside_again = wrapped(kind)
        train(again, MFAC(inside_again.named_parameters(), group=group, **settings), range(8), part)
        assert torch.equal(flat(inside_again), flat(inside))
    model, inside = wrapped(kind)
    alone = Network()
    train(model, MFAC(inside.parameters(), group=group, history_dtype=torch.bfloat16, **SETTINGS), range(8), part)
    train(alone, MFAC(alone.parameters(), history_dtype=torch.bfloat16, **SETTINGS), range(8))
    assert same(inside, alone, 1e-2)  # a gradient that is rounded the other way differs by 2^-9


def check_faults(group: Group, kind: str) -> None:
    """NaN in one process, and a gradient that only one has, stop all, and change nothing."""
    last = group.size - 1
    model, inside = wrapped(kind)
    if kind == "fsdp":
        with pytest.raises(
            ConfigurationError, match=f"cut over {group.size} processes, and the group has 1: pass group="
        ):
            MFAC(inside.parameters())
    optimizer = MFAC(inside.named_parameters(), group=group, **SETTINGS)
    train(model, optimizer, range(7))
    before, rows = flat(inside), optimizer.fisher.rows.clone()
    gram, count = optimizer.fisher.gram.clone(), optimizer.fisher.count
    optimizer.zero_grad()
    loss(model, 7).backward()
    gradient: Any = inside.first.weight.grad  # type: ignore[union-attr]
    values = gradient.to_local() if kind == "fsdp" else gradient
    if group.rank == last:
        values[-1, 0] = torch.inf
    with pytest.raises(ConfigurationError, match=f"^process {last}: the gradient of first.weight has NaN or inf"):
        optimizer.step()
    if group.rank == 0:
        inside.last.bias.grad = None  # type: ignore[union-attr]
    values.fill_(0.5)
    with pytest.raises(ConfigurationError, match=r"process 0 has 'gradients of parameters \[0, 1, 2, 3, 4\]'"):
        optimizer.step()
    if group.rank == 0:
        optimizer.zero_grad()
    with pytest.raises(ConfigurationError, match=r"process 0 has 'no gradients'"):
        optimizer.step()
    assert torch.equal(flat(inside), before) and optimizer.fisher.count == count
    assert torch.equal(optimizer.fisher.rows, rows) and torch.equal(optimizer.fisher.gram, gram)
    optimizer.zero_grad()
    assert optimizer.step() is None and optimizer.fisher.count == count
    train(model, optimizer, range(7, 8))
    alone = Network()
    train(alone, MFAC(alone.parameters(), **SETTINGS), range(8))
    assert same(inside, alone)


def check_torch_checkpoints(group: Group, kind: str) -> None:
    """PyTorch's state dicts of optimizers hold the window, and making one does not take a step."""
    model, inside = wrapped(kind)
    optimizer = MFAC(inside.parameters(), group=group, **SETTINGS)
    get_optimizer_state_dict(inside, optimizer)
    assert optimizer.fisher.count == 0
    train(model, optimizer, range(4))
    state = get_optimizer_state_dict(inside, optimizer)
    assert optimizer.fisher.count == 4 and state["state"]["first.weight"]["history"].shape == (5, 7, 6)
    again, inside_again = wrapped(kind)
    with torch.no_grad():
        for p, q in zip(inside_again.parameters(), inside.parameters(), strict=True):
            p.copy_(q)
    resumed = MFAC(inside_again.parameters(), group=group, **SETTINGS)
    set_optimizer_state_dict(inside_again, resumed, state)
    assert resumed.fisher.count == 4 and torch.equal(resumed.fisher.rows, optimizer.fisher.rows)
    train(model, optimizer, range(4, 8))
    train(again, resumed, range(4, 8))
    assert same(inside_again, inside)


def check_thawing(group: Group) -> None:
    """A frozen layer joins the window; then its history is in its state as well."""
    model, alone = Network(), Network()
    model.first.requires_grad_(False)
    alone.first.requires_grad_(False)
    optimizer, one = MFAC(model.parameters(), group=group, **SETTINGS), MFAC(alone.parameters(), **SETTINGS)
    train(model, optimizer, range(2))
    train(alone, one, range(2))
    assert "history" not in optimizer.state[model.first.weight]
    model.first.requires_grad_(True)
    alone.first.requires_grad_(True)
    loss(model, 2).backward()
    assert model.first.bias.grad is not None
    model.first.bias.grad[:] = torch.nan
    with pytest.raises(ConfigurationError, match=r"gradient of parameter 1 of group 0 has NaN"):
        optimizer.step()
    train(model, optimizer, range(2, 6))
    train(alone, one, range(2, 6))
    assert same(model, alone)
    shown = optimizer.state[model.first.weight]["history"]
    assert torch.allclose(shown.full_tensor(), one.state[alone.first.weight]["history"], atol=1e-4)


def check_preconditioner(group: Group) -> None:
    """It rewrites the gradients that there are, a number and complex ones among them."""
    torch.manual_seed(4)
    number, pair, matrix = torch.randn(()), torch.randn(5, dtype=torch.complex64), torch.randn(2, 9)
    whole = [nn.Parameter(each.clone()) for each in (number, pair, matrix)]
    cut = [nn.Parameter(each.clone()) for each in (number, pair, matrix)]
    one = MFACPreconditioner(whole, window=4, damping=0.1)
    several = MFACPreconditioner(cut, window=4, damping=0.1, group=group)
    for _ in range(6):
        for p, q in zip(whole, cut, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        several.step()
        for p, q in zip(whole, cut, strict=True):
            assert p.grad is not None and q.grad is not None and torch.allclose(p.grad, q.grad, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_training_steps_are_those_of_one_process(size: int, tmp_path: Path) -> None:
    run_ranks(training, size, tmp_path / "ranks", tmp_path)


# Checkpoints


def first_third(directory: Path, kind: str) -> None:
    """Two processes; then what they saved is read by them, and refused by others."""
    group = Group()
    model, inside = wrapped(kind)
    optimizer = MFAC(inside.named_parameters(), group=group, **SETTINGS)
    train(model, optimizer, range(7))
    path = save_checkpoint(directory, 7, optimizer, model=inside, group=group)
    with pytest.raises(ConfigurationError, match=r"step-7 exists"):
        save_checkpoint(directory, 7, optimizer, group=group)
    again, inside_again = wrapped(kind)
    with torch.no_grad():
        for p in inside_again.parameters():
            p.fill_(3.0)
    resumed = MFAC(inside_again.named_parameters(), group=group, **SETTINGS)
    assert load_checkpoint(directory, resumed, model=inside_again, group=group) == 7
    train(model, optimizer, range(7, 10))
    train(again, resumed, range(7, 10))
    assert torch.equal(flat(inside_again), flat(inside))  # the same processes: the same bits
    refused: list[tuple[dict[str, Any], nn.Module | None, str]] = [
        ({"window": 6}, None, r"first.weight.history in .*step-7 is \(5, 7, 6\) in torch.float32; here it is \(6, 7"),
        ({"history_dtype": torch.bfloat16}, None, r"float32; here it is \(5, 7, 6\) in torch.bfloat16"),
        ({}, nn.ModuleDict({"first": nn.Linear(5, 7), "second": nn.Linear(7, 3), "last": nn.Linear(3, 1)}), "here it"),
        ({}, nn.ModuleDict({"first": nn.Linear(6, 7)}), "has optimizer.last.bias.history, and the optimizer has no"),
        ({}, nn.ModuleDict({"other": nn.Linear(6, 7)}), "the optimizer has no such parameter"),
    ]
    for changes, other, message in refused:
        network = other or Network()
        optimizer = MFAC(network.named_parameters(), group=group, **(SETTINGS | changes))
        with pytest.raises(ConfigurationError, match=message):
            load_checkpoint(path, optimizer, group=group)
        assert optimizer.fisher.count == 0 and not optimizer.fisher.rows.any()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_checkpoint(directory / "nothing", optimizer, group=group)


def second_third(directory: Path, kind: str) -> None:
    """Three processes go on."""
    group = Group()
    model, inside = wrapped(kind)
    optimizer = MFAC(inside.named_parameters(), group=group, **SETTINGS)
    assert load_checkpoint(directory, optimizer, model=inside, group=group) == 7
    train(model, optimizer, range(7, 13))
    save_checkpoint(directory, 13, optimizer, model=inside, group=group)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_three_and_one_process_continue_each_other(kind: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    run_ranks(first_third, 2, tmp_path / "two", saved, kind)
    run_ranks(second_third, 3, tmp_path / "three", saved, kind)
    assert {path.suffix for path in saved.rglob("*") if path.is_file()} == {".safetensors"}
    assert sorted(path.name for path in saved.iterdir()) == ["step-13", "step-7"]
    (saved / "step-14.tmp").mkdir()  # of a run that was killed
    model, uninterrupted = Network(), Network()
    optimizer = MFAC(model.named_parameters(), **SETTINGS)
    assert load_checkpoint(saved, optimizer, model=model) == 13
    train(model, optimizer, range(13, 20))
    train(uninterrupted, MFAC(uninterrupted.parameters(), **SETTINGS), range(20))
    assert same(model, uninterrupted)


@pytest.mark.parametrize("compat", [None, "paper"])
def test_one_process_alone_keeps_checkpoints_as_well(compat: Any, tmp_path: Path) -> None:
    model, again = Network(), Network()
    optimizer = MFAC(model.named_parameters(), compat=compat, **SETTINGS)
    train(model, optimizer, range(7))
    path = save_checkpoint(tmp_path, 7, optimizer, model=model)
    resumed = MFAC(again.named_parameters(), compat=compat, **SETTINGS)
    load_checkpoint(tmp_path, resumed, model=again)
    train(model, optimizer, range(7, 12))
    train(again, resumed, range(7, 12))
    assert torch.equal(flat(model), flat(again))
    file = next(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-40])
    before, count = resumed.fisher.rows.clone(), resumed.fisher.count
    with pytest.raises(CheckpointError, match="step-7 cannot be read"):
        load_checkpoint(tmp_path, resumed, model=again)
    assert torch.equal(resumed.fisher.rows, before) and resumed.fisher.count == count
    assert torch.equal(flat(model), flat(again))


# Processes that end or do not answer


def dying(killed: bool) -> None:
    group = Group(timeout=2)
    fisher = SlidingFisher([(4,)], 3, 0.1, ranks=group)
    fisher.push([torch.ones(4)])
    if group.rank == group.size - 1:
        if not killed:
            time.sleep(4)  # alive, and silent for longer than the others wait
        os.kill(os.getpid(), signal.SIGKILL)
    rows = fisher.rows.clone()
    for _ in range(2):  # and once more, without waiting
        with pytest.raises(GossamerError, match=r"lost the others: one of 3 ended, or did not answer for 2 s"):
            fisher.push([torch.full((4,), 2.0)])
    assert fisher.count == 1 and torch.equal(fisher.rows, rows)


@pytest.mark.parametrize("killed", [True, False])
def test_the_others_hear_of_a_process_that_is_gone(killed: bool, tmp_path: Path) -> None:
    start_ranks(dying, 3, tmp_path / "ranks", killed, killed=1)


def absent() -> None:
    if dist.get_rank() == 1:
        return
    with pytest.raises(GossamerError, match=r"not all processes of the group came within 2 s.*Ranks? 1"):
        Group(timeout=2)


def test_a_process_that_never_comes_is_named(tmp_path: Path) -> None:
    run_ranks(absent, 2, tmp_path / "ranks")


def test_a_group_needs_torch_distributed() -> None:
    with pytest.raises(ConfigurationError, match="init_process_group first"):
        Group()
