"""What is said when a model is asked for what it was not made for."""

from __future__ import annotations

from gossamer.errors import UnsupportedModelError


def makes_no_embeddings(model: str) -> UnsupportedModelError:
    """A model that generates text is asked for vectors or scores of texts."""
    return UnsupportedModelError(
        f"{model} is made to generate text, and its hidden states are poor embeddings; use a model of embeddings, such "
        "as all-minilm-l6-v2, or ask for it when the model is loaded: --task embed, or LLM(..., task='embed')"
    )


def generates_no_text(model: str, task: str) -> UnsupportedModelError:
    """A model of embeddings or scores is asked for text."""
    uses = {
        "embed": "it makes embeddings: /v1/embeddings, /v1/rerank and /v1/score, or LLM.embed() and LLM.rank()",
        "score": "it scores pairs of texts: /v1/rerank and /v1/score, or LLM.rank()",
    }
    return UnsupportedModelError(f"{model} generates no text here; {uses[task]}")
