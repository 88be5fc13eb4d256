"""What the ledger of a training costs, against a table of the same hashes as Parquet (zstd).

    python tools/bench_ledger.py [--clips 1000000] [--tested 100000] [--json FILE]

The columns are made up: a set of so many clips, as it is once its indexes are read, of 40 corpora and languages and
5,000 speakers.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from mser_dist.evaluation.unseen import Unseen, places
from mser_dist.shards.columns import Column
from mser_dist.shards.ledger import FILE, Ledger, part_of
from mser_dist.shards.shard_set import ShardSet


def made_up(clips: int, seed: int) -> Any:
    """A set's columns, without its shards."""
    random = np.random.default_rng(seed)
    place = random.integers(0, 40, clips).astype(np.uint8)
    names = {"corpus": [f"c{i:02d}" for i in range(40)], "language": [f"l{i:02d}" for i in range(40)]}
    coded = {name: Column(place, listed) for name, listed in names.items()}
    coded["label"] = Column(random.integers(0, 6, clips).astype(np.uint8), [f"e{i}" for i in range(6)])
    voices = (place.astype(np.int64) * 125 + random.integers(0, 125, clips)).astype(np.uint16)
    coded["speaker"] = Column(voices, [f"s{i}" for i in range(5000)])

    class Columns(SimpleNamespace):
        content_keys, place_keys, column = ShardSet.content_keys, ShardSet.place_keys, ShardSet.column

        def __len__(self) -> int:
            return clips

    sound, source = (random.integers(1, 2**63, clips, dtype=np.int64) for _ in range(2))
    return Columns(sound=sound, source=source, coded=coded, _place=[np.zeros(clips, np.uint8)] * 5)


def timed(work: Callable[[], Any], rounds: int = 3) -> tuple[float, Any]:
    """Seconds, the least of some rounds, and the result."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        result = work()
        found.append(time.perf_counter() - began)
    return min(found), result


def rows(clips: int, tested: int) -> list[dict[str, Any]]:
    """The measurements, of which `seconds` and `bytes` are those of the ledger and `other` those of Parquet."""
    shards, test = made_up(clips, 0), made_up(tested, 1)
    made, part = timed(lambda: part_of(shards, "run", 1))
    ledger = Ledger((part,), "")
    with tempfile.TemporaryDirectory(prefix="bench_ledger-") as name:
        file, other = Path(name) / FILE, Path(name) / "ledger.parquet"
        table = pyarrow.table({"clips": part.clips, "texts": part.texts})
        saved, _ = timed(lambda: ledger.save(file))
        written, _ = timed(lambda: parquet.write_table(table, other, compression="zstd"))
        loaded, again = timed(lambda: Ledger.load(file))
        read, _ = timed(lambda: parquet.read_table(other))
        sizes = file.stat().st_size, other.stat().st_size

    def judged() -> int:
        against = Unseen(again, test)
        return sum(against.of(c, la, [], own).unseen["stage1"]["speakers_shared"] for c, la, own in places(test))

    def judged_by_sets() -> int:
        known = set(part.clips.tolist())
        return sum(key in known for key in test.content_keys().tolist())

    asked, _ = timed(judged)
    by_sets, _ = timed(judged_by_sets)
    return [
        {"name": "made", "seconds": made, "clips": clips},
        {"name": "saved", "seconds": saved, "other": written, "bytes": sizes[0], "other_bytes": sizes[1]},
        {"name": "loaded", "seconds": loaded, "other": read},
        {"name": "judged", "seconds": asked, "other": by_sets, "clips": tested, "rows": 40},
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--tested", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = rows(options.clips, options.tested)
    for row in found:
        print(
            "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    if options.json:
        options.json.write_text(json.dumps({"rows": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
