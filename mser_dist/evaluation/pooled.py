"""What the folds of a cross-validation come to: metrics over all their test clips, and mean and spread over folds.

Languages are not pooled, as in `report`: a result is of one model, corpus and language.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mser_dist.errors import UserError
from mser_dist.evaluation.metrics import Metrics, score
from mser_dist.evaluation.summary import shown
from mser_dist.runs.names import Name
from mser_dist.tables import Table

if TYPE_CHECKING:
    import pyarrow

_SCORES = ("ua", "wa", "macro_f1")


@dataclass(frozen=True)
class Pooled:
    """A model's results in one language of one corpus.

    overall: over the test clips of all folds together. folds: of each fold that has clips of it, by its number.
    """

    model: str
    corpus: str
    language: str
    overall: Metrics
    folds: dict[int, Metrics]

    def mean(self, name: str) -> float:
        """Of a score (ua, wa, macro_f1) over the folds, each of which counts the same."""
        return float(np.mean([getattr(one, name) for one in self.folds.values()]))

    def sd(self, name: str) -> float | None:
        """Standard deviation of a score over the folds, as of a sample (n - 1); None of a single fold."""
        values = [getattr(one, name) for one in self.folds.values()]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


def read(folders: Mapping[int, Path]) -> "pyarrow.Table":
    """The predictions of evaluations, by the number of the fold, as one table with the column `fold` first."""
    import pyarrow
    from pyarrow import parquet

    parts = []
    for fold, folder in folders.items():
        file = folder / "predictions.parquet"
        try:
            part = parquet.read_table(file)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(f"{file} cannot be read ({error}): remove {folder}, and give the same command") from error
        parts.append(part.add_column(0, "fold", pyarrow.array([fold] * len(part), pyarrow.int32())))
    return pyarrow.concat_tables(parts)


def pool(predictions: "pyarrow.Table", labels: Sequence[str]) -> list[Pooled]:
    """The results of every model, corpus and language, in the order in which the models come."""
    columns = {
        name: np.array([value or "" for value in predictions[name].to_pylist()])  # null: the set does not name it
        for name in ("fold", "model", "corpus", "language")
    }
    number = {label: i for i, label in enumerate(labels)}
    reference, predicted = (
        np.array([number[label] for label in predictions[name].to_pylist()]) for name in ("label", "predicted")
    )
    found = []
    for model in dict.fromkeys(columns["model"].tolist()):
        own = columns["model"] == model
        for corpus, language in sorted({*zip(columns["corpus"][own], columns["language"][own], strict=True)}):
            mine = own & (columns["corpus"] == corpus) & (columns["language"] == language)
            folds = {}
            for fold in sorted(set(columns["fold"][mine].tolist())):
                here = mine & (columns["fold"] == fold)
                folds[fold] = score(reference[here], predicted[here], len(labels))
            overall = score(reference[mine], predicted[mine], len(labels))
            found.append(Pooled(model, str(corpus), str(language), overall, folds))
    return found


def as_rows(pooled: Sequence[Pooled]) -> list[dict[str, Any]]:
    """A row for each result, ready for JSON: scores of all clips, `ua_mean`, `ua_sd` … over folds, and the folds."""
    return [
        {"model": one.model, "corpus": one.corpus, "language": one.language, **_numbers(one.overall)}
        | {f"{name}_{what}": getattr(one, what)(name) for name in _SCORES for what in ("mean", "sd")}
        | {"folds": [{"fold": fold, **_numbers(metrics)} for fold, metrics in one.folds.items()]}
        for one in pooled
    ]


def _numbers(metrics: Metrics) -> dict[str, float]:
    return {name: getattr(metrics, name) for name in ("n", "k", "chance", *_SCORES)}


def table(pooled: Sequence[Pooled], speakers: Mapping[int, Sequence[str]]) -> Table:
    """The table that a person reads: a section a result, with a line for each fold and its `speakers`."""
    places = len({(one.corpus, one.language) for one in pooled}) > 1
    head = ["model", *(["corpus", "language"] if places else []), "fold", "speakers", "n", "UA", "WA", "macroF1"]

    def lines(one: Pooled) -> Iterator[list[str]]:
        what = [shown(one.model), *([one.corpus, one.language] if places else [])]
        for fold, metrics in one.folds.items():
            yield [*what, str(fold), _some(speakers[fold]), *_cells(metrics)]
        yield [*what, "all", "all clips pooled", *_cells(one.overall)]
        means = [f"{one.mean(s):.3f}" + ("" if one.sd(s) is None else f" ± {one.sd(s):.3f}") for s in _SCORES]
        yield [*what, "mean", "over folds ± sd", "", *means]

    return Table(head, [[*lines(one)] for one in pooled], align="l" * (len(head) - 4) + "rrrr")


def _cells(metrics: Metrics) -> list[str]:
    return [str(metrics.n), *(f"{getattr(metrics, name):.3f}" for name in _SCORES)]


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def metrics_of(pooled: Sequence[Pooled]) -> Iterator[tuple[int, dict[Name, float]]]:
    """What a tracker gets: (fold, its UAs), and as step 0 the scores over all clips, their means and deviations."""
    for fold in sorted({fold for one in pooled for fold in one.folds}):
        yield (
            fold,
            {
                ("ua_by_fold", one.model, one.corpus, one.language): one.folds[fold].ua
                for one in pooled
                if fold in one.folds
            },
        )
    numbers: dict[Name, float] = {}
    for one in pooled:
        place = (one.model, one.corpus, one.language)
        for name in _SCORES:
            numbers |= {(name, *place): getattr(one.overall, name), (f"{name}_mean", *place): one.mean(name)}
            if (sd := one.sd(name)) is not None:
                numbers[(f"{name}_sd", *place)] = sd
    yield 0, numbers
