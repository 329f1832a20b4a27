"""The architectures that native kernels run: the one list, which help texts and the documentation quote."""

from __future__ import annotations

NATIVE_ARCHITECTURES = {  # model type -> name
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma3_text": "Gemma 3",
}


def native_names() -> str:
    """Their names, as a sentence lists them.

    >>> native_names()
    'Llama, Mistral, Qwen2, Qwen3 and Gemma 3'
    """
    *names, last = NATIVE_ARCHITECTURES.values()
    return f"{', '.join(names)} and {last}"
