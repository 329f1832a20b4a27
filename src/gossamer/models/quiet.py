"""Silence from transformers, whose bars and warnings are about its own workings and not about what the user asked."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import modeling_gguf_pytorch_utils as gguf_reader
from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Mutes transformers' logging, progress bars and Python warnings; restores them afterwards."""
    verbosity, bars, gguf_bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), gguf_reader.tqdm
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The GGUF reader uses tqdm itself and heeds none of the switches above.
    gguf_reader.tqdm = functools.partial(gguf_bar, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gguf_reader.tqdm = gguf_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
