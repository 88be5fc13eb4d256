"""The mean UA over languages that were, or were not, seen in training.

Over the rows of a report, each of one language in one corpus: a language in two corpora counts twice. What leaked from
training, and clips whose language nobody names, tell nothing of unseen languages, and are left out of their mean.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mser_dist.evaluation.bootstrap import mean_interval
from mser_dist.shards.ledger import UNNAMED

Rows = Iterable[Mapping[str, Any]]


def rows_of_mean(rows: Rows, model: str, seen: bool) -> list[Mapping[str, Any]]:
    """The rows of a model that the mean is over."""
    mine = [row for row in rows if row["model"] == model and row["seen_language"] is seen]
    return mine if seen else [row for row in mine if not _why_not(row)]


def _why_not(row: Mapping[str, Any]) -> str:
    """Why a row of an unseen language is not in the mean over these."""
    if row.get("leaks"):
        return "it leaks"
    return "its language is not named" if str(row["language"] or "") in UNNAMED else ""


def macro_ua(rows: Rows, model: str, seen: bool) -> float:
    """Mean UA over the languages that were, or were not, seen in training; NaN if there is none."""
    values = [row["ua"] for row in rows_of_mean(rows, model, seen)]
    return float(np.mean(values)) if values else float("nan")


def macro_interval(rows: Rows, model: str, seen: bool) -> tuple[float, float] | None:
    """95 % interval of `macro_ua`, of languages that are independent of each other; None if one has none."""
    mine = rows_of_mean(rows, model, seen)
    ends = [None if row["ua_low"] is None else (row["ua_low"], row["ua_high"]) for row in mine]
    return mean_interval([row["ua"] for row in mine], ends)


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every model, the mean UA over the languages that were, or were not, seen in training, and its interval."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for seen in (True, False):
            if over := rows_of_mean(rows, model, seen):
                low, high = macro_interval(rows, model, seen) or (None, None)
                mean = {"model": model, "seen": seen, "ua": macro_ua(rows, model, seen), "low": low, "high": high}
                found.append({**mean, "n_languages": len({row["language"] for row in over}), "n_rows": len(over)})
    return found


def left_out(rows: Rows) -> list[str]:
    """A line for the rows that no mean over unseen languages has."""
    out = [(f"{row['language']} of {row['corpus']}", _why_not(row)) for row in rows if row["seen_language"] is False]
    named = dict.fromkeys(f"{where} ({why})" for where, why in out if why)
    return [f"the mean over unseen languages is without {', '.join(named)}"] if named else []
