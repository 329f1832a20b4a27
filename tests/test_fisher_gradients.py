"""Gradients of models, sample by sample: the same one by one and together, from real and from drawn targets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.operators.fisher_gradients import gradients_of
from gossamer.operators.inverse_fisher import InverseFisher


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))


def loader(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 4), torch.randint(3, (4,))) for _ in range(count)]


@pytest.mark.parametrize("per_sample", [True, False])
def test_gradients_are_those_of_single_samples_or_of_batches(per_sample: bool) -> None:
    model = classifier()
    model[0].weight.grad = torch.ones(5, 4)
    found = torch.stack(list(gradients_of(model, nn.functional.cross_entropy, loader(), 14, per_sample=per_sample)))
    assert model.training and model[2].training and torch.equal(model[0].weight.grad, torch.ones(5, 4))
    model.eval()
    batches = loader() * 5
    pieces = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(4)] if per_sample else batches
    expected = []
    for x, y in pieces[:14]:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        expected.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    assert torch.allclose(found, torch.stack(expected), atol=1e-6)


def test_gradients_computed_together_are_the_same() -> None:
    model, loss = classifier(), nn.functional.cross_entropy
    one = torch.stack(list(gradients_of(model, loss, loader(), 10, params=r".*weight")))
    together = torch.stack(list(gradients_of(model, loss, loader(), 10, params=r".*weight", vectorize=True)))
    assert torch.allclose(one, together, atol=1e-6)
    named = [{"input": x, "y": y} for x, y in loader()]

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input: Tensor, y: Tensor) -> Tensor:
            return self.inner(input)

    for vectorize in (False, True):
        found = list(gradients_of(Named(), lambda out, batch: loss(out, batch["y"]), named, 10, vectorize=vectorize))
        assert torch.allclose(torch.stack(found), torch.stack(list(gradients_of(model, loss, loader(), 10))), atol=1e-6)
    nn.init.constant_(model[3].bias, math.nan)
    with pytest.raises(ConfigurationError, match=r"gradient of 0.weight has NaN"):
        next(gradients_of(model, loss, loader(), 1, vectorize=True))


def test_from_model_takes_chosen_parameters_and_streams() -> None:
    model, loss = classifier(), nn.functional.cross_entropy
    weights = InverseFisher.from_model(model, loss, loader(), 12, params=r"3\..*", damping=0.1)
    rows = torch.stack(list(gradients_of(model, loss, loader(), 12, params=["3.weight", "3.bias"])))
    assert weights.d == 18 and weights.m == 12
    x = torch.randn(18)
    assert torch.allclose(weights @ x, InverseFisher(rows, 0.1) @ x)
    streamed = InverseFisher.from_model(
        model, loss, loader(), 12, params=r"3\..*", damping=0.1, structure="block", block_size=6, streaming=True
    )
    assert torch.allclose(streamed @ x, InverseFisher(rows, 0.1, structure="block", block_size=6) @ x)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"params": "nothing"}, "no trainable parameter matches"),
        ({"params": ["4.weight"]}, "no trainable parameter '4.weight'"),
        ({"fisher": "exact"}, "fisher is 'empirical' or 'mc'"),
        ({"streaming": True}, "streaming needs"),
    ]
    for arguments, message in cases:
        with pytest.raises(ConfigurationError, match=message):
            InverseFisher.from_model(model, loss, loader(), 12, damping=0.1, **arguments)
    with pytest.raises(ConfigurationError, match="no batch after 0 of 12"):
        InverseFisher.from_model(model, loss, [], 12, damping=0.1)
    nn.init.constant_(model[3].bias, math.nan)
    with pytest.raises(ConfigurationError, match=r"gradient of 0.weight has NaN"):
        InverseFisher.from_model(model, loss, loader(), 12, damping=0.1)


def test_drawn_targets_make_the_fisher_matrix_on_average() -> None:
    """For a linear softmax model it is known: the mean of (diag(p) - p p^T) kron x x^T."""
    torch.manual_seed(3)
    model = nn.Linear(2, 3, bias=False)
    x = torch.randn(5, 2)
    data = [(x, torch.zeros(5, dtype=torch.int64))]
    rows = torch.stack(list(gradients_of(model, nn.functional.cross_entropy, data, 40_000, fisher="mc")))
    p = model(x).softmax(-1).detach()
    exact = sum(torch.kron(p[i].diag() - p[i].outer(p[i]), x[i].outer(x[i])) for i in range(5)) / 5
    assert (rows.T @ rows / len(rows) - exact).abs().max() < 0.02 * exact.abs().max() + 0.005
