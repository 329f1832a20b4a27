"""Gradients of models, sample by sample: the same one by one and together, from real and from drawn targets."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.operators.drawn_targets import TargetDrawing
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
    data = [(x.repeat(200, 1), torch.zeros(1000, dtype=torch.int64))]
    rows, one_by_one = (_drawn(model, data, count, vectorize) for count, vectorize in ((40_000, True), (1500, False)))
    assert torch.allclose(one_by_one, rows[:1500], atol=1e-6)  # of the same targets
    p = model(x).softmax(-1).detach()
    exact = sum(torch.kron(p[i].diag() - p[i].outer(p[i]), x[i].outer(x[i])) for i in range(5)) / 5
    assert (rows.T @ rows / len(rows) - exact).abs().max() < 0.02 * exact.abs().max() + 0.005


def _drawn(model: nn.Module, data: list[tuple[Tensor, Tensor]], count: int, vectorize: bool) -> Tensor:
    """Gradients of targets drawn from the same seed."""
    torch.manual_seed(4)
    loss = nn.functional.cross_entropy
    return torch.stack(list(gradients_of(model, loss, data, count, fisher="mc", vectorize=vectorize)))


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.3)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    classes = nn.functional.one_hot(targets.long(), outputs.shape[-1]) if targets.dim() == 1 else targets
    return nn.functional.mse_loss(outputs, classes.to(outputs.dtype))


@pytest.mark.parametrize(
    ("outputs", "loss", "targets"),
    [
        (3, nn.functional.mse_loss, torch.randn(8, 3)),
        (1, nn.functional.mse_loss, torch.randn(8, 1)),
        (3, squares, torch.randint(3, (8,))),
        (3, smoothed, torch.randint(3, (8,))),
        (3, nn.functional.cross_entropy, torch.rand(8, 3).softmax(-1)),
        (1, lambda out, y: nn.functional.poisson_nll_loss(out[:, 0], y), torch.randint(5, (8,))),
        (3, nn.functional.multi_margin_loss, torch.randint(3, (8,))),
        (3, nn.functional.binary_cross_entropy_with_logits, torch.randint(2, (8, 3)).float()),
    ],
)
def test_losses_whose_targets_cannot_be_drawn_are_refused(outputs: int, loss: Any, targets: Tensor) -> None:
    torch.manual_seed(0)
    with pytest.raises(ConfigurationError, match=r"fisher='mc' draws"):
        next(gradients_of(nn.Linear(4, outputs), loss, [(torch.randn(8, 4), targets)], 8, fisher="mc"))


@pytest.mark.parametrize("loss", ["cross_entropy", "sum", "weighted", "nll"])
def test_losses_of_class_numbers_have_targets(loss: str) -> None:
    losses: dict[str, Any] = {
        "cross_entropy": nn.functional.cross_entropy,
        "sum": nn.CrossEntropyLoss(reduction="sum"),
        "weighted": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.5])),
        "nll": nn.functional.nll_loss,
    }
    model = nn.Sequential(classifier(), nn.LogSoftmax(-1)) if loss == "nll" else classifier()
    assert len(list(gradients_of(model, losses[loss], loader(), 10, fisher="mc"))) == 10


class TestLabelsOfTransformers:
    """Whether a label is predicted at its own place or at the one before is told by the loss, not by its name."""

    settings: ClassVar[dict[str, Any]] = {
        "vocab_size": 11,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }

    @pytest.mark.parametrize("kind", ["causal", "masked", "sequence"])
    def test_drawn_labels_stand_where_they_are_predicted(self, kind: str) -> None:
        torch.manual_seed(0)
        model: Any
        if kind == "causal":
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**self.settings))
        elif kind == "masked":
            model = hf.BertForMaskedLM(hf.BertConfig(**self.settings))
        else:
            model = hf.BertForSequenceClassification(hf.BertConfig(**self.settings, num_labels=4))
        ids = torch.randint(11, (2, 6))
        labels = torch.randint(4, (2,)) if kind == "sequence" else ids.clone()
        if kind != "sequence":
            labels[:, 2] = -100
        with torch.no_grad():  # certain of one class, so that what is drawn is known
            bias = torch.zeros(4 if kind == "sequence" else 11)
            bias[3] = 60.0
            if kind == "causal":
                model.lm_head = nn.Linear(16, 11)
                model.lm_head.bias.copy_(bias)
            elif kind == "masked":
                model.cls.predictions.bias.copy_(bias)
            else:
                model.classifier.bias.copy_(bias)
        drawing = TargetDrawing(model.eval(), lambda out, batch: out.loss)
        drawn = drawing.draw({"input_ids": ids, "labels": labels})["labels"]
        expected = torch.full_like(labels, 3)
        if kind != "sequence":
            expected[:, 2] = -100
        if kind == "causal":
            expected[:, 0] = labels[:, 0]
        assert torch.equal(drawn, expected)


class TestBatches:
    def test_inputs_alone_are_one_batch(self) -> None:
        model, data = nn.Linear(4, 3), torch.randn(6, 4)
        seen: list[tuple[int, ...]] = []
        model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))

        def loss(outputs: Tensor, inputs: Tensor) -> Tensor:
            return (outputs.sum(-1) - inputs.sum(-1)).square().mean()

        for batch in (data, [data], (data,)):
            whole = list(gradients_of(model, lambda out, x: loss(out, data), [batch], 1, per_sample=False))
            assert seen.pop() == (6, 4) and len(whole) == 1
        one = torch.stack(list(gradients_of(model, loss, [data], 6)))
        together = torch.stack(list(gradients_of(model, loss, [data], 6, vectorize=True)))
        assert torch.allclose(one, together, atol=1e-6) and one.shape == (6, 15)

    def test_inputs_may_be_mappings(self) -> None:
        class Named(nn.Linear):
            def forward(self, inputs: Any) -> Tensor:  # type: ignore[override]  # a mapping in place of a tensor
                return super().forward(inputs["x"])

        data = [({"x": torch.randn(4, 2)}, torch.randint(3, (4,)))]
        assert len(list(gradients_of(Named(2, 3), nn.functional.cross_entropy, data, 4))) == 4

    @pytest.mark.parametrize("batch", [(torch.ones(2), torch.ones(2), torch.ones(2)), "text", 3, ()])
    def test_other_kinds_are_refused(self, batch: Any) -> None:
        with pytest.raises(ConfigurationError, match="a batch is a mapping of tensors"):
            next(gradients_of(nn.Linear(2, 2), nn.functional.mse_loss, [batch], 1, per_sample=False))

    def test_complex_parameters_are_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="weight is complex"):
            next(gradients_of(nn.Linear(2, 2, dtype=torch.complex64), nn.functional.mse_loss, [], 1))
