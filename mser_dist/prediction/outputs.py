"""The files and the table that predictions are written as."""

import csv
import json
from collections.abc import Iterator, Sequence
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from mser_dist.errors import UserError
from mser_dist.files import whole, write_text
from mser_dist.prediction.model import Prediction, Window
from mser_dist.tables import Table

KINDS = (".json", ".csv", ".parquet")


class Result(Protocol):
    """As of `job.Result`."""

    @property
    def recording(self) -> str: ...
    @property
    def prediction(self) -> Prediction | None: ...
    @property
    def error(self) -> str: ...


def check(path: Path) -> None:
    """Raise `UserError` for a file of a kind that is not written."""
    if path.suffix not in KINDS:
        raise UserError(f"{path}: its name ends with none of {', '.join(KINDS)}: name it so")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")


def write(path: Path, results: Sequence[Result], labels: Sequence[str]) -> None:
    """Write results as JSON, CSV or Parquet, by the file's name; it is there whole or not at all.

    JSON: a list of `entry`. CSV and Parquet: a row for each recording and, where it was cut into several, for each of
    its windows: recording, window (empty: the whole), begin and end in seconds, label, p_<label> …, error.
    """
    if path.suffix == ".json":
        write_text(path, json.dumps([entry(result) for result in results], indent=1, ensure_ascii=False) + "\n")
        return
    rows = [row for result in results for row in _rows(result, labels)]
    names = ["recording", "window", "begin", "end", "label", *(f"p_{label}" for label in labels), "error"]
    if path.suffix == ".csv":
        text = StringIO()
        table = csv.DictWriter(text, names, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(path, text.getvalue())
        return
    import pyarrow
    from pyarrow import parquet

    kinds = {"recording": pyarrow.string(), "label": pyarrow.string(), "error": pyarrow.string()}
    kinds |= {"window": pyarrow.int32()}
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.float64())) for name in names])
    with whole(path) as staging:
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), staging, compression="zstd")


def entry(result: Result, top: int | None = None) -> dict[str, Any]:
    """A result for JSON: recording, label, probabilities (the `top` likeliest), seconds, timeline; or its error."""
    found = result.prediction
    if found is None:
        return {"recording": result.recording, "error": result.error}
    timeline = [
        {"begin": w.begin, "end": w.end, "label": w.label, "probabilities": _likeliest(w, top)} for w in found.timeline
    ]
    return {
        "recording": result.recording,
        "label": found.label,
        "probabilities": _likeliest(found, top),
        "seconds": found.seconds,
        "timeline": timeline,
    }


def table(results: Sequence[Result], top: int) -> Table:
    """What a person reads: a line a recording and, where it was cut, a window, with the `top` likeliest labels."""
    lines = []
    for result in results:
        if (found := result.prediction) is None:
            continue
        lines.append([result.recording, f"{found.seconds:.1f} s", _told(found, top)])
        if len(found.timeline) > 1:
            lines += [["", f"{w.begin:.1f}-{w.end:.1f} s", _told(w, top)] for w in found.timeline]
    return Table(["recording", "length", "labels" if top > 1 else "label"], [lines], align="lrl")


def _told(found: Prediction | Window, top: int) -> str:
    return ", ".join(f"{label} {p:.3f}" for label, p in _likeliest(found, top).items())


def _likeliest(found: Prediction | Window, top: int | None) -> dict[str, float]:
    return dict(islice(found.probabilities.items(), top))


def _rows(result: Result, labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    found = result.prediction
    if found is None:
        yield {"recording": result.recording, "error": result.error}
        return
    parts = [Window(0.0, found.seconds, found.probabilities), *(found.timeline if len(found.timeline) > 1 else ())]
    for number, part in enumerate(parts, -1):
        row = {"recording": result.recording, "begin": part.begin, "end": part.end, "label": part.label}
        row |= {"window": number} if number >= 0 else {}
        yield row | {f"p_{label}": part.probabilities[label] for label in labels}
