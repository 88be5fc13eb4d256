"""Keeps third-party chatter off the terminal, so that what is said there is worth reading. Errors and warnings stay."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("DeepSpeed", "mlflow", "alembic")


def hush() -> None:
    """For the rest of the process. Call before torch, DeepSpeed, transformers or MLflow are imported."""
    set_environment()
    _ignore()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def hushed() -> Iterator[None]:
    """For the block. `set_environment` comes before it, and the imports of what is heavy in between."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        _ignore()
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def set_environment() -> None:
    """What libraries read when they are imported, or when a process forks."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers fork after the tokenizer was used
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")


def _ignore() -> None:
    # DeepSpeed still calls collectives by names that torch has deprecated, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # transformers' WavLM hands torch a boolean mask beside its position bias, at every forward.
    warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")
