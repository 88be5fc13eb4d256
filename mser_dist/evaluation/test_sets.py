"""The clips of an evaluation as data sets of MLflow: one for each corpus and language, by a hash of what was asked."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mser_dist.evaluation.report import place_name


def test_sets(predictions: Path, sets: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """The data set of each (corpus, language), of the predictions of an evaluation; `sets`: where its clips lie.

    The hash is of keys and labels: one that holds other clips, or the same with other labels, is another set.
    """
    from pyarrow import compute, parquet

    table = parquet.read_table(predictions, columns=["model", "corpus", "language", "key", "label"])
    first = table.filter(compute.equal(table["model"], table["model"][0])).sort_by("key")  # all models have the same
    rows = zip(*(first[name].to_pylist() for name in ("corpus", "language", "key", "label")), strict=True)
    clips: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for corpus, language, key, label in rows:
        clips.setdefault((corpus or "", language or ""), []).append((key, label))
    return {
        place: {
            "name": place_name(*place),
            "digest": hashlib.blake2b(json.dumps(own).encode(), digest_size=8).hexdigest(),
            "source": sets,
            "context": "test",
            "clips": len(own),
        }
        for place, own in clips.items()
    }
