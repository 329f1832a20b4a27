"""The M-FAC optimizer: its steps, the authors' recursion, and what PyTorch expects of an optimizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.optim import MFAC, MFACPreconditioner


class PublishedRecursion:
    """The dynamic algorithm as it was published, step by step in fp64 (arXiv 2107.03356, section 3.2)."""

    def __init__(self, m: int, d: int, damping: float) -> None:
        self.m, self.damping, self.slot = m, damping, 0
        self.rows = torch.zeros(m, d, dtype=torch.float64)

    def update_and_multiply(self, g: Tensor) -> Tensor:
        self.rows[self.slot] = g
        self.slot = (self.slot + 1) % self.m
        # D_ij = g_i^T F_(i-1)^-1 g_j for i <= j, by elimination without pivots
        dots = self.rows @ self.rows.T / self.damping
        matrix, products = dots.clone(), torch.zeros_like(dots)
        for i in range(self.m):
            products[i, i:] = matrix[i, i:]
            matrix[i + 1 :, i + 1 :] -= torch.outer(matrix[i, i + 1 :], matrix[i, i + 1 :]) / (self.m + matrix[i, i])
        # B: F_(i-1)^-1 g_i as a combination of the gradients
        coefficients = torch.eye(self.m, dtype=torch.float64) / self.damping
        for i in range(self.m):
            for k in range(i):
                coefficients[i] -= products[k, i] / (self.m + products[k, k]) * coefficients[k]
        vectors = coefficients @ self.rows
        result = g / self.damping
        for i in range(self.m):
            result = result - (vectors[i] @ g) / (self.m + products[i, i]) * vectors[i]
        return result


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)


def backward(model: nn.Module, step: int, factor: float = 1.0) -> Tensor:
    x, y = data(step)
    model.zero_grad()
    loss = factor * nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.003)])
def test_paper_mode_takes_the_published_steps(momentum: float, weight_decay: float) -> None:
    model = network()
    optimizer = MFAC(
        model.parameters(),
        lr=0.01,
        window=8,
        damping=1e-3,
        momentum=momentum,
        weight_decay=weight_decay,
        compat="paper",
    )
    weights = flat(model).double()
    recursion = PublishedRecursion(8, len(weights), 1e-3)
    average = torch.zeros_like(weights)
    for step in range(50):
        backward(model, step)
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double()
        product = recursion.update_and_multiply(gradient + weight_decay * flat(model).double())
        average = momentum * average + (1 - momentum) * product
        weights -= 0.01 * average
        optimizer.step()
        assert (flat(model).double() - weights).norm() < 1e-4 * weights.norm()


def test_a_step_is_the_gradient_times_the_inverse_fisher_matrix() -> None:
    model = network()
    optimizer = MFAC(model.parameters(), lr=0.1, window=3, damping=0.01, weight_decay=0.1)
    seen = []
    for step in range(5):
        backward(model, step)
        before = flat(model).double()
        seen.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double())
        kept = torch.stack(seen[-3:])
        matrix = kept.T @ kept / len(kept) + 0.01 * torch.eye(len(before), dtype=torch.float64)
        optimizer.step()
        expected = before - 0.1 * (torch.linalg.solve(matrix, seen[-1]) + 0.1 * before)
        assert torch.allclose(flat(model).double(), expected, atol=1e-5)


@pytest.mark.parametrize("foreach", [False, True, None])
def test_groups_schedules_and_tensor_rates(foreach: Any) -> None:
    """Each group has a rate and decay of its own; a schedule changes them."""
    one, other = network(), network()
    groups = [
        {"params": list(one[0].named_parameters()), "lr": 0.1, "weight_decay": 0.1},
        {"params": list(one[2].named_parameters()), "lr": torch.tensor(0.2)},
    ]
    optimizer = MFAC(groups, window=4, damping=1.0, foreach=foreach)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    preconditioner = MFACPreconditioner(other, window=4, damping=1.0)
    for step, factor in enumerate((1.0, 0.5, 0.25)):
        backward(one, step)
        optimizer.step()
        schedule.step()
        backward(other, step)
        preconditioner.step()
        with torch.no_grad():
            for p in other[0].parameters():
                p -= 0.1 * factor * (p.grad + 0.1 * p)
            for p in other[2].parameters():
                p -= 0.2 * factor * p.grad
        assert torch.allclose(flat(one), flat(other), atol=1e-6)


def test_closures_maximize_and_missing_gradients() -> None:
    up, down = network(), network()
    climb = MFAC(up.parameters(), lr=0.1, damping=0.1, maximize=True)
    descend = MFAC(down.parameters(), lr=0.1, damping=0.1)
    loss = climb.step(lambda: backward(up, 0))
    assert torch.is_tensor(loss) and torch.equal(loss, descend.step(lambda: backward(down, 0, -1.0)).neg())
    assert torch.allclose(flat(up), flat(down))
    frozen = down[0].weight.detach().clone()
    backward(down, 1)
    down[0].weight.grad = None
    before = down[2].weight.detach().clone()
    descend.step()
    assert torch.equal(down[0].weight, frozen) and not torch.equal(down[2].weight, before)
    down.zero_grad()
    pushed = descend.fisher.count
    descend.step()  # nothing to do
    assert descend.fisher.count == pushed


@pytest.mark.parametrize("history_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compat", [None, "paper"])
def test_training_goes_on_from_a_checkpoint(history_dtype: torch.dtype, compat: Any, tmp_path: Path) -> None:
    settings = {"lr": 0.05, "window": 5, "damping": 1e-2, "momentum": 0.5, "weight_decay": 0.01}
    model = network()
    optimizer = MFAC(model.parameters(), history_dtype=history_dtype, compat=compat, **settings)
    for step in range(7):
        backward(model, step)
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    again = network(1)
    again.load_state_dict(saved["model"])
    resumed = MFAC(again.parameters(), history_dtype=history_dtype, compat=compat, **(settings | {"lr": 1.0}))
    resumed.load_state_dict(saved["optimizer"])
    for step in range(7, 14):
        for each, its in ((model, optimizer), (again, resumed)):
            backward(each, step)
            its.step()
        assert torch.equal(flat(model), flat(again))


def test_a_gradient_that_is_not_finite_stops_before_anything_changes() -> None:
    model = network()
    optimizer = MFAC(model.named_parameters(), damping=0.1)
    backward(model, 0)
    optimizer.step()
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())
    backward(model, 1)
    model[2].weight.grad[0, 0] = torch.nan
    with pytest.raises(ConfigurationError, match=r"gradient of 2.weight has NaN"):
        optimizer.step()
    assert torch.equal(flat(model), before)
    assert torch.equal(state["fisher"]["rows"], optimizer.state_dict()["fisher"]["rows"])
    preconditioner = MFACPreconditioner(model)
    kept = model[0].weight.grad.clone()
    with pytest.raises(ConfigurationError, match="gradient of parameter 2 has NaN"):
        preconditioner.step()
    assert torch.equal(model[0].weight.grad, kept)


def test_with_a_scaler_of_gradients() -> None:
    """A step whose gradients overflow is left out, and the next one is as usual."""
    plain, scaled = network(), network()
    optimizer, other = MFAC(plain.parameters(), damping=0.1), MFAC(scaled.parameters(), damping=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        backward(scaled, step, float(scaler.get_scale()))
        if step == 2:
            scaled[0].weight.grad[0, 0] = torch.inf
        else:
            backward(plain, step)
            optimizer.step()
        # `scaler.scale` makes its scale on first use
        scaler.scale(torch.zeros(()))
        scaler.step(other)
        scaler.update()
    assert other.fisher.count == 3 and torch.allclose(flat(plain), flat(scaled), atol=1e-6)


def test_momentum_is_over_the_gradients_and_steps_are_no_longer_than_wanted() -> None:
    model = network()
    average = MFACPreconditioner(model, window=4, damping=0.5, momentum=0.5)
    rows = []
    for step in range(3):
        backward(model, step)
        rows.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double())
        average.step()
    stacked = torch.stack(rows)
    matrix = stacked.T @ stacked / 3 + 0.5 * torch.eye(stacked.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(matrix, stacked.T @ (torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64) / 7))
    found = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double()
    assert torch.allclose(found, expected, atol=1e-5)
    target = network()
    clipped = MFACPreconditioner(target, damping=1e-4, clip=0.01)
    backward(target, 0)
    g = torch.cat([p.grad.reshape(-1) for p in target.parameters()]).double()
    clipped.step()
    u = torch.cat([p.grad.reshape(-1) for p in target.parameters()]).double()
    assert float(((u @ g) ** 2 + 1e-4 * u @ u).sqrt()) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr and weight_decay"),
        ({"weight_decay": -1.0}, "lr and weight_decay"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"damping": 0.0}, "damping must be"),
        ({"window": 0}, "at least one number"),
        ({"clip": 0.0}, "clip must be"),
        ({"compat": "asdl"}, "compat is"),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MFAC(network().parameters(), **arguments)


def step_of(
    optimizer: torch.optim.Optimizer, model: nn.Module, preconditioner: MFACPreconditioner | None = None
) -> None:
    optimizer.zero_grad()
    model(torch.randn(16, 4)).square().mean().backward()
    if preconditioner:
        preconditioner.step()
    optimizer.step()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("compat", [None, "paper"])
@pytest.mark.parametrize("frozen", [[], [0], [1]])
def test_frozen_parameters_rest_and_thaw(frozen: list[int], compat: Any, momentum: float) -> None:
    """A layer that is frozen rests; freed again, it goes on in the matrix that all are part of."""
    settings: dict[str, Any] = {"lr": 1e-2, "window": 4, "damping": 1e-2, "momentum": momentum, "compat": compat}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    layers = [model[0], model[2]]
    for index in frozen:
        layers[index].requires_grad_(False)
    optimizer = MFAC(model.parameters(), **settings)
    rows: list[Tensor] = []  # every gradient in the order of the model, with zeros where there was none
    for resting in ([0], [1], [], [0, 1], [], [0]):
        for index, layer in enumerate(layers):
            layer.requires_grad_(index not in resting and not (index in frozen and not rows))
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        if any(p.requires_grad for p in model.parameters()):
            model(torch.randn(16, 4)).square().mean().backward()
        has = [p.grad is not None for p in model.parameters()]
        optimizer.step()
        for p, old, moved in zip(model.parameters(), before, has, strict=True):
            assert torch.equal(p, old) != moved
        if any(has):
            rows.append(
                torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])
            )
            window = torch.stack(rows[-4:]).double()
            n = 4 if compat else len(window)
            fisher = 1e-2 * torch.eye(window.shape[1], dtype=torch.float64) + window.T @ window / n
            if not momentum:
                step = torch.linalg.solve(fisher, window[-1])
                parts = step.split([p.numel() for p in model.parameters()])
                for p, old, part, moved in zip(model.parameters(), before, parts, has, strict=True):
                    if moved:
                        assert torch.allclose(p.detach(), old - 1e-2 * part.view_as(p).float(), atol=1e-5)


def test_a_preconditioner_takes_in_what_thaws() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    preconditioner = MFACPreconditioner(model, window=4, damping=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    step_of(optimizer, model, preconditioner)
    assert preconditioner.fisher.d == 18
    model.requires_grad_(True)
    step_of(optimizer, model, preconditioner)
    assert preconditioner.fisher.d == 58


def test_a_checkpoint_knows_in_which_order_parameters_joined() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    optimizer = MFAC(model.parameters(), lr=1e-2, window=4, damping=1e-3)
    step_of(optimizer, model)
    model.requires_grad_(True)
    step_of(optimizer, model)
    again = copy.deepcopy(model)
    resumed = MFAC(again.parameters(), lr=1.0, window=4, damping=1e-3)  # where nothing is frozen
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        state = torch.random.get_rng_state()
        step_of(optimizer, model)
        torch.random.set_rng_state(state)
        step_of(resumed, again)
        assert torch.equal(flat(model), flat(again))


@pytest.mark.parametrize("compat", [None, "paper"])
def test_complex_parameters_are_pairs_of_real_ones(compat: Any) -> None:
    torch.manual_seed(0)
    start = torch.randn(3, dtype=torch.complex64)
    one, pair = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_real(start).clone())
    settings: dict[str, Any] = {"lr": 0.1, "window": 4, "damping": 1e-2, "weight_decay": 0.1, "momentum": 0.5}
    optimizers = [MFAC([p], compat=compat, **settings) for p in (one, pair)]
    target = torch.randn(3, dtype=torch.complex64)
    for _ in range(6):
        for p, optimizer in zip((one, pair), optimizers, strict=True):
            optimizer.zero_grad()
            value = p if p.is_complex() else torch.view_as_complex(p)
            ((value - target).abs() ** 2).sum().backward()
            optimizer.step()
        assert torch.allclose(torch.view_as_real(one), pair, atol=1e-6)
    assert not torch.allclose(one, start)


def test_groups_cannot_be_added_later() -> None:
    optimizer = MFAC(network().parameters())
    with pytest.raises(ConfigurationError, match="pass every group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ConfigurationError, match="no parameter that requires"):
        MFAC([torch.zeros(3)])
