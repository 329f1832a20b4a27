"""lm-evaluation-harness: ``local-completions`` and ``local-chat-completions``, with the tokenizer of the checkpoint.

The log-likelihoods are compared with those of transformers in fp32, which ``table.py`` has computed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cells import address, cell, run
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

URL, MODEL, _ = address()
CHECKPOINT, EXPECTED = sys.argv[4], Path(sys.argv[5])


@cell("scoring")
def scoring() -> None:
    model = LocalCompletionsAPI(
        base_url=f"{URL}/v1/completions", model=MODEL, tokenizer=CHECKPOINT, tokenizer_backend="huggingface",
        num_concurrent=2, max_length=1024,
    )  # fmt: skip
    expected = json.loads(EXPECTED.read_text())
    pairs = [(each["context"], each["continuation"]) for each in expected]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for (found, greedy), each in zip(model.loglikelihood(asked), expected, strict=True):
        assert abs(found - each["loglikelihood"]) <= 1e-4 * max(1, abs(each["loglikelihood"])), (found, each)
        assert greedy == each["greedy"], each


@cell("answer")
def answer() -> None:
    model = LocalChatCompletion(
        base_url=f"{URL}/v1/chat/completions", model=MODEL, tokenizer_backend=None, num_concurrent=1
    )
    settings = {"until": ["\n\n"], "max_gen_toks": 16, "temperature": 0}
    prompt = model.apply_chat_template([{"role": "user", "content": "Name a colour."}])
    (text,) = model.generate_until([Instance("generate_until", {}, (prompt, settings), 0)])
    assert text.strip()


run()
