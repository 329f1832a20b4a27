"""When does a tree node deserve its own segment? A cost model with coefficients measured at start-up.

Attending to a node as a segment costs a call, and reads each key once; its partial results, one for every reader, must
be stored and merged. Copying the node's keys into each reader's private slot ("folding") costs every reader a read of
every key at every step:

    segment(readers, keys) = call + per_reader * readers + per_key * keys + per_pair * readers * keys
    folded(readers, keys)  = per_private_pair * readers * keys

Small nodes are cheaper folded (DeFT, arXiv 2404.00242, and FastTree found the same on GPUs). What is small depends on
what computes the model, so the runner is asked: PyTorch's calls cost much more than those of the native kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.engine.runner import Runner

MAX_FOLDED = 128  # tokens; longer private copies would cost the memory that sharing is to save
_OWN = 16  # keys that every reader has for itself while it is timed
_FEW, _MANY = 2, 16  # readers
_SHORT, _LONG = 16, MAX_FOLDED  # keys


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds per layer, none of them negative. See the module's documentation."""

    call: float
    per_reader: float
    per_key: float
    per_pair: float
    per_private_pair: float

    def worth_segment(self, readers: int, keys: int) -> bool:
        """Whether ``readers`` sequences should attend to a node of ``keys`` tokens as one segment.

        If it is worth it, then for more readers and for more keys too.

        >>> model = CostModel(call=1e-4, per_reader=1e-7, per_key=1e-8, per_pair=2e-8, per_private_pair=1e-7)
        >>> model.worth_segment(readers=64, keys=2048), model.worth_segment(readers=2, keys=10)
        (True, False)
        """
        if keys > MAX_FOLDED:
            return True
        segment = self.call + self.per_reader * readers + self.per_key * keys + self.per_pair * readers * keys
        return segment < self.per_private_pair * readers * keys


def calibrate(runner: Runner) -> CostModel:
    """Measure the coefficients for a model on what computes it, on this machine; takes some tens of milliseconds.

    A step in which the readers attend to some keys of their own is timed alone, with a segment beside them, and with
    more keys of their own. Two numbers of readers and two of keys give the four coefficients of a segment; what noise
    makes negative is 0. All is timed twice, and the shorter time counts: another program only ever adds to it, and for
    longer than a median of few steps can see.
    """
    cases = [(readers, _OWN, keys) for readers in (_FEW, _MANY) for keys in (0, _SHORT, _LONG)]
    cases.append((_MANY, _OWN + _LONG, 0))
    rounds = [[runner.attention_seconds(readers=r, own=o, common=c) for r, o, c in cases] for _ in range(2)]
    few, few_short, few_long, many, many_short, many_long, many_folded = map(min, *rounds)
    few_short, few_long = max(few_short - few, 0.0), max(few_long - few, 0.0)
    many_short, many_long = max(many_short - many, 0.0), max(many_long - many, 0.0)
    folded = max(many_folded - many, 0.0)

    readers, keys = _MANY - _FEW, _LONG - _SHORT
    per_pair = max(((many_long - many_short) - (few_long - few_short)) / (readers * keys), 0.0)
    per_key = max((few_long - few_short) / keys - per_pair * _FEW, 0.0)
    per_reader = max((many_short - few_short) / readers - per_pair * _SHORT, 0.0)
    return CostModel(
        call=max(few_short - per_reader * _FEW - per_key * _SHORT - per_pair * _FEW * _SHORT, 0.0),
        per_reader=per_reader,
        per_key=per_key,
        per_pair=per_pair,
        per_private_pair=folded / (_MANY * _LONG),
    )
