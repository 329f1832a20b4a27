"""From logits to tokens.

The order of operations is vLLM's: ``logit_bias``, the ban of stop tokens before ``min_tokens``, the penalties
(repetition over prompt and output; frequency and presence over the output), ``temperature``, ``top_k``, ``top_p``,
``min_p``, then the draw. (vLLM's current release applies ``min_p`` before ``top_k``; this is the order of its earlier
releases and of transformers.)

``top_k``, ``top_p`` and ``min_p`` each keep the tokens whose logit reaches some threshold, so a row is truncated by the
largest of three thresholds. The threshold is looked for among a few candidates, and only a row whose threshold lies
below them is sorted. Tokens that tie with the threshold are all kept: which of them a sort puts first would be chance.

A token is drawn by inverting the cumulative distribution, in the order of the vocabulary, at one uniform number per
row. So a sequence's tokens depend on its own logits and its own random stream alone, and when a different batch size
perturbs the logits in the last bit, the boundaries of the distribution move by as little. Sorted by probability, two
nearly equal tokens could swap places.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from gossamer.outputs import Logprob
from gossamer.sampling_params import SamplingParams

CANDIDATES = (64, 256, 1024)  # how many of the largest logits to look at before sorting a row
STRIDE = 16  # tokens that compete for one place in the preselection of candidates
BLOCK = 256  # tokens whose probabilities are summed before the cumulative distribution is formed
CHUNK_ELEMENTS = 1 << 21  # elements (8 MB) of a temporary: memory the allocator keeps, instead of mapping it anew


def make_random(seed: int | None, engine_seed: int, request_number: int, index: int) -> random.Random:
    """The random stream of completion ``index`` of a request.

    A request with a seed gets the same stream whenever it comes; one without is told apart by its number. Seeding with
    a string hashes it with SHA-512, which is the same in every process.

    >>> make_random(7, 0, 3, 0).random() == make_random(7, 1, 4, 0).random()
    True
    >>> make_random(None, 0, 3, 0).random() == make_random(None, 0, 3, 1).random()
    False
    """
    request = f"engine {engine_seed} request {request_number}" if seed is None else f"seed {seed}"
    return random.Random(f"{request} completion {index}")


class TokenCounts:
    """The tokens that penalties apply to, each once, with the number of times it was generated.

    Kept up to date token by token: counting a long prompt anew in each step would cost more than the step.
    """

    def __init__(self, prompt_token_ids: list[int], output_token_ids: list[int]) -> None:
        self._output = output_token_ids
        self._position = {token: i for i, token in enumerate(dict.fromkeys(prompt_token_ids))}
        self._tokens = array("q", self._position)
        self._counts = array("f", bytes(4 * len(self._tokens)))
        self._counted = 0

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int64) and how often each was generated (float32, 0 for those of the prompt only)."""
        for token in self._output[self._counted :]:
            position = self._position.setdefault(token, len(self._tokens))
            if position == len(self._tokens):
                self._tokens.append(token)
                self._counts.append(0.0)
            self._counts[position] += 1.0
        self._counted = len(self._output)
        return np.array(self._tokens), np.array(self._counts)


@dataclass
class SamplingState:
    """What the sampler knows of one generated sequence.

    Attributes:
        output_token_ids: shared with the engine, which appends to it after each step.
        stop_token_ids: tokens that may not be chosen before ``params.min_tokens``.
        random: the sequence's own stream; one number is taken from it per drawn token, none by greedy rows.
    """

    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    stop_token_ids: frozenset[int]
    random: random.Random
    penalized: bool = field(init=False)
    plain: bool = field(init=False)  # the token is the argmax of the logits and nothing else is asked for

    def __post_init__(self) -> None:
        params = self.params
        bias = dict(params.logit_bias or {})
        self.bias_tokens = np.fromiter(bias, np.int64, len(bias))
        self.bias_values = np.fromiter(bias.values(), np.float32, len(bias))
        self.banned_tokens = np.fromiter(sorted(self.stop_token_ids), np.int64, len(self.stop_token_ids))
        self.penalized = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
        prompt = self.prompt_token_ids if params.repetition_penalty != 1 else []
        self.counts = TokenCounts(prompt, self.output_token_ids)
        self.plain = params.greedy and not bias and not self.penalized and params.logprobs is None

    @property
    def bans(self) -> bool:
        """Whether stop tokens may not be chosen yet."""
        return len(self.output_token_ids) < self.params.min_tokens and bool(self.stop_token_ids)

    @property
    def adjusts(self) -> bool:
        """Whether a logit of this row is to be changed before a token is chosen."""
        return self.penalized or len(self.bias_tokens) > 0 or self.bans


@dataclass
class Sampled:
    """One entry per row of the logits.

    Attributes:
        token_ids: the chosen tokens; -1 where the logits hold NaN or leave no token to choose.
        logprobs: the chosen token first, then the most probable ones; ``None`` for rows that did not ask.
    """

    token_ids: list[int]
    logprobs: list[dict[int, Logprob] | None]


class Sampler:
    """Chooses one token per row.

    >>> greedy = SamplingState(SamplingParams(temperature=0), [1], [], frozenset(), random.Random(0))
    >>> Sampler().sample(torch.tensor([[0.0, 2.0, 1.0]]), [greedy]).token_ids
    [1]
    """

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    @torch.no_grad()
    def sample(self, logits: Tensor, states: list[SamplingState]) -> Sampled:
        """Choose a token for each row of ``logits`` (B, V), which is left as it is.

        Token ids of ``logit_bias``, prompt and stop tokens that are not below V have no effect.
        """
        plain = all(state.plain and not state.bans for state in states)
        adjusts = not plain and any(state.adjusts for state in states)
        scores = self._copy(logits) if adjusts or logits.dtype != torch.float32 else logits.detach()
        if plain:
            return Sampled(_argmax(scores).tolist(), [None] * len(states))
        if adjusts:
            adjust_(scores, states)
        tokens = _choose(scores, states).tolist()
        return Sampled(tokens, _chosen_logprobs(logits, tokens, states))

    def _copy(self, logits: Tensor) -> Tensor:
        # The memory is kept: having the system map as many pages in each step costs more than the copy.
        if self._scratch.numel() < logits.numel() or self._scratch.device != logits.device:
            self._scratch = torch.empty(logits.numel(), device=logits.device)
        return self._scratch[: logits.numel()].view(logits.shape).copy_(logits)


def _choose(scores: Tensor, states: list[SamplingState]) -> Tensor:
    if all(state.params.greedy for state in states):
        return _argmax(scores)
    peak = scores.amax(-1, keepdim=True)  # NaN if the row holds one
    # Rows without a finite maximum have nothing to draw from: argmax finds their +inf, or nothing at all.
    finite = peak.isfinite().flatten().tolist()
    drawn = [i for i, state in enumerate(states) if finite[i] and not state.params.greedy]
    if not drawn:
        return _argmax(scores)
    rows = torch.tensor(drawn, device=scores.device)
    tokens = draw(scores, Draws.of(rows, peak[rows], [states[i] for i in drawn], scores.shape[1]))
    return tokens if len(drawn) == len(states) else _argmax(scores).index_copy(0, rows, tokens)


def _argmax(scores: Tensor) -> Tensor:
    """Lowest index of the maximum of each row of ``scores`` (B, V), or -1 where it is NaN or -inf."""
    # numpy's argmax is vectorised; torch's is 5 to 10 times slower on the CPU. Both return the first NaN, if any.
    on_cpu = scores.device.type == "cpu"
    tokens = torch.from_numpy(scores.numpy().argmax(-1)) if on_cpu else scores.argmax(-1)
    chosen = scores.gather(1, tokens[:, None]).flatten()
    return tokens.masked_fill_(~(chosen > -torch.inf), -1)


# ---- bias, ban and penalties -----------------------------------------------------------------------------------------


def adjust_(scores: Tensor, states: list[SamplingState]) -> None:
    """Apply bias, ban and penalties to float32 logits (B, V), in place.

    Touches only the entries that change: one gather and one scatter for all rows.
    """
    biased = [(i, s.bias_tokens, s.bias_values) for i, s in enumerate(states) if len(s.bias_tokens)]
    banned = [(i, s.banned_tokens, s.banned_tokens) for i, s in enumerate(states) if s.bans]
    penalized = [(i, *s.counts.arrays()) for i, s in enumerate(states) if s.penalized]
    flat = scores.view(-1)
    if biased:
        _, index, values = _entries(biased, scores)
        flat.index_add_(0, index, values)
    if banned:
        _, index, _ = _entries(banned, scores)
        flat.index_fill_(0, index, -torch.inf)
    if penalized:
        rows, index, counts = _entries(penalized, scores)
        flat.scatter_(0, index, _penalize(flat.take(index), counts, rows, states))


def _entries(parts: list[tuple[int, np.ndarray, np.ndarray]], scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, flat indices into ``scores`` and values of (row, tokens, values) parts."""
    vocabulary = scores.shape[1]
    rows = np.repeat([row for row, _, _ in parts], [len(tokens) for _, tokens, _ in parts])
    tokens = np.concatenate([tokens for _, tokens, _ in parts])
    values = np.concatenate([values for _, _, values in parts])
    inside = tokens < vocabulary
    if not inside.all():
        rows, tokens, values = rows[inside], tokens[inside], values[inside]
    entries = (rows, rows * vocabulary + tokens, values)
    return tuple(torch.from_numpy(entry).to(scores.device) for entry in entries)  # type: ignore[return-value]


def _penalize(values: Tensor, counts: Tensor, rows: Tensor, states: list[SamplingState]) -> Tensor:
    """Penalised logits of tokens that were generated ``counts`` times in their row."""
    settings = [(s.params.repetition_penalty, s.params.frequency_penalty, s.params.presence_penalty) for s in states]
    columns = torch.tensor(settings, dtype=torch.float32, device=values.device).unbind(1)
    repetition, frequency, presence = (column.take(rows) for column in columns)
    values = torch.where(values > 0, values / repetition, values * repetition)
    return values - frequency * counts - presence * (counts > 0)


# ---- truncation and draw ---------------------------------------------------------------------------------------------


@dataclass
class Draws:
    """The rows of a batch that are drawn at random (n,), and their parameters as columns (n, 1)."""

    rows: Tensor
    peak: Tensor  # the largest logit, finite
    temperature: Tensor
    top_k: Tensor  # 0: off
    top_p: Tensor  # above 1: off
    min_p: Tensor  # 0: off
    uniform: Tensor

    @classmethod
    def of(cls, rows: Tensor, peak: Tensor, states: list[SamplingState], vocabulary: int) -> Draws:
        """Read the parameters of ``states``, and one number from the random stream of each."""
        params = [state.params for state in states]
        tiny = torch.finfo(torch.float32).tiny  # a temperature below it would round to 0
        columns = (
            torch.tensor([max(p.temperature, tiny) for p in params]),
            torch.tensor([p.top_k if 0 < p.top_k < vocabulary else 0 for p in params]),
            torch.tensor([p.top_p if p.top_p < 1 else 2.0 for p in params], dtype=torch.float64),
            torch.tensor([p.min_p for p in params]),
            torch.tensor([state.random.random() for state in states], dtype=torch.float64),
        )
        return cls(rows, peak, *(column[:, None].to(peak.device) for column in columns))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, which: Tensor) -> Draws:
        """Those at the positions ``which``."""
        return Draws(*(getattr(self, f.name)[which] for f in fields(self)))

    def mass(self, logits: Tensor) -> Tensor:
        """exp((logits - peak) / temperature) of ``logits`` (n, c): (n, c)."""
        # The maximum goes first: dividing by a tiny temperature may overflow, but only to -inf.
        return (logits - self.peak).div_(self.temperature).exp_()


def draw(scores: Tensor, draws: Draws) -> Tensor:
    """Draw one token for each of ``draws`` from its row of ``scores`` (B, V); returns (n,)."""
    vocabulary = scores.shape[1]
    tokens = torch.empty_like(draws.rows)
    threshold = torch.full_like(draws.peak, -torch.inf)
    truncates = (draws.top_k > 0) | (draws.top_p <= 1) | (draws.min_p > 0)
    pending, whole = _split(torch.arange(len(draws), device=scores.device), truncates)
    total = _totals(scores, draws)
    for count in CANDIDATES:
        fits, pending = _split(pending, (draws.top_k[pending] < count) & (count < vocabulary))
        if not len(fits):
            continue
        part = draws.take(fits)
        values, indices = largest(scores, part.rows, count)
        limit = truncation_threshold(values, part, total[fits])
        found = (limit > values[:, -1:]).flatten()  # strictly: what ties with the last candidate may be outside
        tokens[fits] = _draw_candidates(values, indices, limit, part)  # the others are drawn again
        pending = torch.cat([pending, fits[~found]]).sort().values
    if len(pending):
        threshold[pending] = _sorted_threshold(scores, draws.take(pending))
    whole = torch.cat([whole, pending]).sort().values
    if len(whole):
        tokens[whole] = _draw_vocabulary(scores, draws.take(whole), threshold[whole])
    return tokens


def _split(positions: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    condition = condition.flatten()
    return positions[condition], positions[~condition]


def _chunks(scores: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``scores[rows]`` for ascending ``rows``, as many at a time as CHUNK_ELEMENTS allows."""
    if not len(rows):
        return
    first, step = int(rows[0]), max(1, CHUNK_ELEMENTS // scores.shape[1])
    consecutive = int(rows[-1]) - first + 1 == len(rows)
    for start in range(0, len(rows), step):
        part = slice(start, min(len(rows), start + step))
        yield part, scores[first + part.start : first + part.stop] if consecutive else scores[rows[part]]


def _gather(scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``scores[rows[:, None], columns]`` for ``columns`` (n, c)."""
    return scores.take(rows[:, None] * scores.shape[1] + columns)


def largest(scores: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the ``count`` largest of ``rows`` (n,) of ``scores`` (B, V), descending: (n, count) each.

    ``topk`` copies the whole row into pairs. Here every 16 tokens, V / 16 apart, first elect their maximum: the
    ``count`` groups with the largest maxima hold the ``count`` largest tokens.
    """
    vocabulary = scores.shape[1]
    groups = vocabulary // STRIDE
    if groups < 2 * max(count, 1):
        values, indices = scores[rows].topk(count)
        return values, indices
    maxima = scores.new_empty(len(rows), groups)
    for part, chunk in _chunks(scores, rows):
        torch.amax(chunk[:, : groups * STRIDE].unflatten(1, (STRIDE, groups)), 1, out=maxima[part])
    _, elected = largest(maxima, torch.arange(len(rows), device=scores.device), count)
    members = torch.arange(0, groups * STRIDE, groups, device=scores.device)
    remainder = torch.arange(groups * STRIDE, vocabulary, device=scores.device).expand(len(rows), -1)
    candidates = torch.cat([(members[:, None] + elected[:, None]).flatten(1), remainder], dim=1)
    values, position = _gather(scores, rows, candidates).topk(count)
    return values, candidates.gather(1, position)


def truncation_threshold(values: Tensor, draws: Draws, total: Tensor) -> Tensor:
    """The smallest logit (n, 1) that ``top_k``, ``top_p`` and ``min_p`` keep among descending ``values`` (n, c).

    ``total`` (n, 1) is the mass of all logits of the row; it matters where ``top_p`` is on and ``top_k`` off.
    """
    kth = values.gather(1, (draws.top_k - 1).clamp_min(0))
    within_k = (draws.top_k == 0) | (values >= kth)
    mass = draws.mass(values) * within_k
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    total = torch.where(draws.top_k > 0, cumulative[:, -1:], total)
    kept = within_k & (cumulative - mass < draws.top_p * total) & (mass >= draws.min_p)
    return values.gather(1, kept.sum(-1, keepdim=True) - 1)


def _totals(scores: Tensor, draws: Draws) -> Tensor:
    """Mass (n, 1) of the logits of each row, float64; inf where no threshold depends on it."""
    total = torch.full_like(draws.uniform, torch.inf)
    which = ((draws.top_p <= 1) & (draws.top_k == 0)).flatten().nonzero().flatten()
    if len(which):
        # The softmax of the largest logit is 1 / total.
        part = [probabilities.amax(-1) for _, probabilities in _probabilities(scores, draws.take(which), None)]
        total[which] = torch.cat(part).double().reciprocal()[:, None]
    return total


def _probabilities(scores: Tensor, draws: Draws, threshold: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Softmax at each row's temperature, a few rows at a time, padded with zeros to whole blocks of tokens.

    Logits below ``threshold`` (n, 1) get 0; the others are not rescaled. softmax is twice as fast as exp.
    """
    vocabulary = scores.shape[1]
    width = -(-vocabulary // BLOCK) * BLOCK
    scaled = scores.new_full((min(len(draws), max(1, CHUNK_ELEMENTS // vocabulary)), width), -torch.inf)
    probabilities = torch.empty_like(scaled)
    for part, chunk in _chunks(scores, draws.rows):
        size = len(chunk)
        torch.sub(chunk, draws.peak[part], out=scaled[:size, :vocabulary]).div_(draws.temperature[part])
        torch.softmax(scaled[:size], -1, out=probabilities[:size])
        if threshold is not None:
            probabilities[:size, :vocabulary].masked_fill_(chunk < threshold[part], 0.0)
        yield part, probabilities[:size]


def _sorted_threshold(scores: Tensor, draws: Draws) -> Tensor:
    """:func:`truncation_threshold` from all logits of the rows."""
    thresholds = []
    for part, chunk in _chunks(scores, draws.rows):
        if chunk.device.type == "cpu":
            values = torch.from_numpy(np.sort(chunk.numpy(), -1)).flip(-1)  # half the time of torch.sort
        else:
            values = chunk.sort(-1, descending=True).values
        some = draws.take(torch.arange(part.start, part.stop, device=scores.device))
        total = some.mass(values).sum(-1, keepdim=True, dtype=torch.float64)
        thresholds.append(truncation_threshold(values, some, total))
    return torch.cat(thresholds)


def _draw_candidates(values: Tensor, indices: Tensor, limit: Tensor, draws: Draws) -> Tensor:
    """Draw from the descending ``values`` (n, c) not below ``limit`` (n, 1); returns their ``indices``, (n,)."""
    kept = values >= limit
    width = int(kept.sum(-1).max())  # no row keeps more
    indices, order = indices[:, :width].sort(-1)
    mass = (draws.mass(values) * kept)[:, :width].gather(1, order)
    position, _ = _invert(mass, draws.uniform)
    return indices.gather(1, position).flatten()


def _draw_vocabulary(scores: Tensor, draws: Draws, threshold: Tensor) -> Tensor:
    """Draw from the logits not below ``threshold`` (n, 1): first a block of tokens, then a token of the block."""
    vocabulary = scores.shape[1]
    truncated = threshold if bool((threshold > -torch.inf).any()) else None
    blocks = [p.unflatten(1, (-1, BLOCK)).sum(-1) for _, p in _probabilities(scores, draws, truncated)]
    block, uniform = _invert(torch.cat(blocks), draws.uniform)
    columns = block * BLOCK + torch.arange(BLOCK, device=scores.device)
    logits = _gather(scores, draws.rows, columns.clamp_max(vocabulary - 1))
    kept = (columns < vocabulary) & (logits >= threshold)
    position, _ = _invert(draws.mass(logits) * kept, uniform)
    return (block * BLOCK + position).flatten()


def _invert(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution of ``mass`` (n, m) at ``uniform`` (n, 1), in [0, 1].

    Returns:
        The position (n, 1), never one without mass, and how far into its mass ``uniform`` falls, in [0, 1].
    """
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    target = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    position = (cumulative <= target).sum(-1, keepdim=True)
    inside = mass.gather(1, position).double()
    into = (target - (cumulative.gather(1, position) - inside)) / inside
    return position, into.clamp(0.0, 1.0)


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Natural log-probability of ``targets`` (T,) under ``logits`` (T, V), float32: (T,).

    >>> token_logprobs(torch.zeros(2, 4), torch.tensor([0, 3])).exp()
    tensor([0.2500, 0.2500])
    """
    everything = torch.arange(len(logits), device=logits.device)
    chosen = [
        chunk.float().log_softmax(-1).gather(1, targets[part, None].long()).flatten()
        for part, chunk in _chunks(logits, everything)
    ]
    return torch.cat(chosen) if chosen else torch.empty(0, device=logits.device)


def top_logprobs(logits: Tensor, targets: Tensor, k: int) -> list[dict[int, Logprob]]:
    """Log-probabilities of ``targets`` (T,) and of the ``k`` most probable tokens under ``logits`` (T, V).

    The target comes first in each mapping. A token's rank is 1 plus the number of tokens more probable than it.

    >>> top_logprobs(torch.tensor([[0.0, 3.0, 3.0]]), torch.tensor([0]), 1)[0][0].rank
    3
    """
    return _logprobs(logits, torch.arange(len(logits), device=logits.device), targets, [k] * len(logits))


def _logprobs(logits: Tensor, rows: Tensor, targets: Tensor, counts: list[int]) -> list[dict[int, Logprob]]:
    results = []
    k = min(max(counts, default=0), logits.shape[1])
    for part, chunk in _chunks(logits, rows):
        logprobs = chunk.float().log_softmax(-1)
        chosen = logprobs.gather(1, targets[part, None].long())
        ranks = (logprobs > chosen).sum(-1) + 1
        top, tokens = largest(logprobs, torch.arange(len(chunk), device=logits.device), k)
        columns = (targets[part], chosen[:, 0], ranks, top, tokens)
        for count, (target, logprob, rank, values, indices) in zip(
            counts[part], zip(*(column.tolist() for column in columns), strict=True), strict=True
        ):
            row = {target: Logprob(logprob, rank)}
            for token, value in zip(indices[:count], values, strict=False):
                row.setdefault(token, Logprob(value, 1 + values.index(value)))
            results.append(row)
    return results


def _chosen_logprobs(
    logits: Tensor, token_ids: list[int], states: list[SamplingState]
) -> list[dict[int, Logprob] | None]:
    counts = {i: s.params.logprobs for i, s in enumerate(states) if s.params.logprobs is not None and token_ids[i] >= 0}
    results: list[dict[int, Logprob] | None] = [None] * len(states)
    rows = torch.tensor(list(counts), dtype=torch.int64, device=logits.device)
    targets = torch.tensor([token_ids[i] for i in counts], dtype=torch.int64, device=logits.device)
    for i, row in zip(counts, _logprobs(logits, rows, targets, list(counts.values())), strict=True):
        results[i] = row
    return results
