#!/usr/bin/env bash
# Asking PyTorch's helper for the state of an optimizer whose first step is still to come.
#
# One would guess: `get_optimizer_state_dict(model, optimizer)` reads the state, and changes nothing.
# What happens: where `optimizer.state` is empty, the helper makes a step of its own: it gives parameters without a
# gradient one of zeros, sets the learning rate to 0, calls `step()` and takes the gradients away again. An optimizer that
# counts or remembers its gradients outside of `state` has one more of them after its state was looked at, each time.
# Version: torch 2.13.0. Source: this script; torch/distributed/checkpoint/state_dict.py, _init_optim_state.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


class Window(torch.optim.SGD):
    """Gradient descent that remembers the gradients of its steps."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.gradients = []

    def step(self, closure=None):
        self.gradients.append([p.grad.norm().item() for group in self.param_groups for p in group["params"]])
        return super().step(closure)


print("torch", torch.__version__)
model = torch.nn.Linear(3, 1)
optimizer = Window(model.parameters())
for _ in range(2):
    optimizer.zero_grad()
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
optimizer.zero_grad()
before = len(optimizer.gradients)
counts = []
for _ in range(2):
    get_optimizer_state_dict(model, optimizer)
    counts.append(len(optimizer.gradients))
print(f"gradients that it remembers: {before} after two steps, then {counts} after its state was asked for")
print("the norms of the last one:", optimizer.gradients[-1])
sys.exit(0 if counts == [before + 1, before + 2] and not any(optimizer.gradients[-1]) else 1)
PYTHON
