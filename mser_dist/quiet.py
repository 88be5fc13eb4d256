"""Keeps third-party chatter off the terminal, so that what is said there is worth reading. Errors and warnings stay."""

import logging
import os
import warnings


def hush() -> None:
    """Call once, before torch, DeepSpeed, transformers or MLflow are imported."""
    # DeepSpeed still calls collectives by names that torch has deprecated, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    for name in ("DeepSpeed", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # DataLoader workers fork after the tokenizer was used
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
