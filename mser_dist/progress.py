"""One look for every progress bar: rate and time left in a terminal, a line now and then in a log file."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(items: Iterable[Any] | None = None, *, title: str, unit: str, total: int, **options: Any) -> "tqdm[Any]":
    """A tqdm bar on standard error. `options` go to tqdm (initial, disable, leave …)."""
    terminal = sys.stderr.isatty()
    interval = 0.3 if terminal else 20.0  # a log file should not fill with bars
    return tqdm(items, desc=title, unit=unit, total=total, mininterval=interval, dynamic_ncols=terminal, **options)
