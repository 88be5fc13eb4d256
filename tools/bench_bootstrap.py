"""How fast the intervals of a table are: the bootstrap over speakers, against drawing the clips anew.

    python tools/bench_bootstrap.py [--clips 100000] [--rows 20] [--speakers 200] [--json FILE]

Each row of --clips clips by --speakers speakers, six labels, 2,000 draws. Against it, for one row, the same draws of
speakers, whose clips are gathered and counted again for each draw. max_abs_diff: of the intervals' ends.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from mser_dist.evaluation.bootstrap import DRAWS, Drawn, draw_ua, kinds_of, weights_of
from mser_dist.evaluation.metrics import ua
from mser_dist.files import write_json

CLASSES = 6


def answers(clips: int, speakers: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """References, predictions and speakers (clips,) each."""
    random = np.random.default_rng(seed)
    reference, who = random.integers(0, CLASSES, clips), random.integers(0, speakers, clips)
    right = random.random(clips) < np.clip(random.normal(0.6, 0.15, speakers), 0.05, 0.98)[who]
    return reference, np.where(right, reference, random.integers(0, CLASSES, clips)), who


def drawn_again(
    reference: np.ndarray, predicted: np.ndarray, who: np.ndarray, draws: int, seed: int
) -> tuple[float, float]:
    """The interval by gathering the clips of the drawn speakers; the draws are those of `draw_ua`."""
    speakers = int(who.max()) + 1
    place = reference * CLASSES + predicted
    tables = np.stack([np.bincount(place[who == one], minlength=CLASSES**2) for one in range(speakers)])
    first, many = kinds_of(tables, np.random.default_rng(seed))
    if (many > 1).any():
        raise SystemExit("two speakers have the same answers: take more clips a speaker")
    order = np.argsort(who, kind="stable")
    clips = np.split(order, np.cumsum(np.bincount(who, minlength=speakers))[:-1])
    values = []
    for row in np.concatenate(list(weights_of(many, draws, seed))).astype(int):
        own = np.concatenate([clips[one] for one in np.repeat(first, row)])
        counts = np.bincount(place[own], minlength=CLASSES**2)
        values.append(float(ua(counts.reshape(CLASSES, CLASSES))))
    return Drawn(values[0], np.array(values[1:]), speakers, len(who)).interval()


def bootstrap(clips: int = 100_000, rows: int = 20, speakers: int = 200) -> dict[str, Any]:
    """The row `bootstrap`."""
    given = [answers(clips, speakers, row) for row in range(rows)]
    began, before = time.perf_counter(), time.process_time()
    ours = [draw_ua(*one, CLASSES).interval() for one in given]
    seconds, used = time.perf_counter() - began, time.process_time() - before
    began = time.perf_counter()
    theirs = drawn_again(*given[0], DRAWS, 0)
    against = time.perf_counter() - began
    return {
        "name": "bootstrap",
        "seconds": seconds,
        "cpu_seconds": used,
        "ratio": against * rows / seconds,
        "max_abs_diff": float(np.abs(np.array(ours[0]) - theirs).max()),
        "clips": clips,
        "rows": rows,
        "speakers": speakers,
        "against_seconds_a_row": against,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=100_000, help="of each row (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--speakers", type=int, default=200, help="of each row (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    options = parser.parse_args()
    row = bootstrap(options.clips, options.rows, options.speakers)
    took = f"{row['seconds']:.2f} s ({row['cpu_seconds']:.2f} s of a core)"
    print(
        f"{row['rows']} rows of {row['clips']} clips by {row['speakers']} speakers: {took}, {row['ratio']:.0f} x the "
        f"speed of drawing clips; intervals differ by {row['max_abs_diff']:.1e} at most"
    )
    if options.json:
        write_json(options.json, {"rows": [row]})


if __name__ == "__main__":
    main()
