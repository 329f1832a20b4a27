"""From logits to tokens.

In this order: ``logit_bias``, the ban of stop tokens before ``min_tokens``, the penalties (repetition over prompt and
output; frequency and presence over the output), the grammar, ``temperature``, ``top_k``, ``top_p``, ``min_p``, then
the draw. From ``temperature`` on it is the order of transformers' ``generate``.

    Sampler.sample -> adjust_ (bias, ban, penalties, grammar) -> argmax, or draw (truncation_threshold)
        -> chosen_logprobs
"""

from gossamer.engine.sampling.logprobs import token_logprobs, top_logprobs
from gossamer.engine.sampling.sampler import Sampled, Sampler
from gossamer.engine.sampling.state import SamplingState, make_random

__all__ = ["Sampled", "Sampler", "SamplingState", "make_random", "token_logprobs", "top_logprobs"]
