"""sentence-transformers: its own ``encode``, which sorts texts by length and pads those of a batch.

Methods, asked as child.py says: ``load(model, threads, dtype)`` returns versions and the number format of the weights;
``encode(texts, batch)`` returns ``{"seconds": ..., "embeddings": base64 of little-endian fp32, row after row}``.
"""

from __future__ import annotations

import base64
import time
from importlib.metadata import version
from typing import Any


class Encoder:
    """See above."""

    def load(self, model: str, threads: int, dtype: str) -> dict[str, Any]:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        self.model: Any = SentenceTransformer(
            model, device="cpu", local_files_only=True, model_kwargs={"dtype": getattr(torch, dtype)}
        )
        self.model.encode(["Once upon a time."])  # what is set up on first use is not timed
        packages = ("sentence-transformers", "transformers", "torch")
        return {"versions": {name: version(name) for name in packages}, "weights": dtype}

    def encode(self, texts: list[str], batch: int) -> dict[str, Any]:
        start = time.perf_counter()
        vectors = self.model.encode(texts, batch_size=batch, normalize_embeddings=True)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "embeddings": base64.b64encode(vectors.astype("<f4").tobytes()).decode()}
