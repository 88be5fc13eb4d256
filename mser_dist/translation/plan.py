"""What a translation will take: time on one core by some clips that are made, disk and cost by these."""

import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from mser_dist.config.translation_keys import TranslateConfig
from mser_dist.encoded.encode import in_bytes
from mser_dist.tables import Table, count
from mser_dist.translation import backends, made
from mser_dist.translation.making import Maker, one_thread
from mser_dist.translation.measures import seconds_of
from mser_dist.translation.selection import KEPT, outcome
from mser_dist.translation.sources import Block, Recordings


def outlook(recordings: Recordings, blocks: list[Block], mine: list[Block], missing: list[Block]) -> str:
    """A line of what there is to do; its size is that of the recordings, once for each language."""
    total, own, to_make = (
        recordings.pairs([i for block in some for i in block.clips]) for some in (blocks, mine, missing)
    )
    numbers = [i for block in missing for i in block.clips]
    seconds = sum(float(recordings.shards.duration[i]) * len(recordings.languages_of(i)) for i in numbers)
    size = in_bytes(round(seconds * _bytes_per_second(recordings)))
    long = f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
    share = f", {own:,} of them here" if own != total else ""
    left = ", ".join(f"{what}: {number:,}" for what, number in sorted(recordings.left_out.items()))
    return (
        f"{len(recordings.clips):,} recordings, {count(total, 'clip')} in {', '.join(recordings.config.to)}{share}: "
        f"{own - to_make:,} are there, {to_make:,} to make (about {long} of speech, {size})"
        + (f"; left out: {left}" if left else "")
    )


def _bytes_per_second(recordings: Recordings) -> float:
    """Of the recordings' own audio, a shard's bytes over its clips' seconds."""
    shards = recordings.shards
    size = sum(shard.bytes for shard in shards.shards)
    return min(size / max(float(shards.duration.sum()), 1e-9), 32_000.0)


def measured(
    path: str, config: TranslateConfig, *, clips: int, wanted: int | None, workers: int, price: float | None
) -> Table:
    """Make some clips, and say what `wanted` of them will take on so many processes.

    clips: recordings that are tried, spread over the set. wanted: None: as many as the set becomes. price: of an hour
    of a core.
    """
    recordings = Recordings(path, config)
    able = np.array([i for i in recordings.clips.tolist() if recordings.languages_of(i)])
    which = able[np.linspace(0, len(able) - 1, min(clips, len(able))).astype(int)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, one_thread():
        built = backends.build(config, recordings, Path(folder))
        loaded = time.monotonic()
        rows = [one for i in which for one in Maker(recordings, built).of(int(i))]
        spent = time.monotonic() - loaded
        file = Path(folder) / "made.tar"
        made.write(file, "", rows)
        size = file.stat().st_size / len(rows)
    for part in built:
        if close := getattr(part, "close", None):
            close()
    wanted = recordings.pairs([int(i) for i in recordings.clips]) if wanted is None else wanted
    outcomes = Counter(outcome(one, config.selection) for one in rows)
    each = spent / len(rows)
    hours = wanted * each / 3600
    speech = sum(seconds_of(one.measures) for one in rows)
    dropped = "".join(f", {what} {number}" for what, number in outcomes.most_common() if what != KEPT)
    scored = config.selection.adapt and bool(config.selection.scorer or config.selection.probe)
    dropped += "; so few clips are not adapted (selection.adapt), more are kept" if scored else ""
    cells = [
        ["tried", f"{len(which)} recordings, {count(len(rows), 'clip')}: {outcomes[KEPT]} kept{dropped}"],
        ["loading", f"{loaded - began:.1f} s a process"],
        ["a process", f"{1 / each:.2f} clips/s, {speech / spent:.1f} x real time"],
        ["clips", f"{wanted:,}, of which about {round(wanted * outcomes[KEPT] / len(rows)):,} are kept"],
        ["disk", f"{in_bytes(round(size * wanted))} made, and as much again at most while the set is written"],
        ["time", f"{hours:.1f} hours of a core, {hours / workers:.1f} h by {workers} at once"],
    ]
    if price is not None:
        cells.append(["cost", f"{hours * price:,.2f} at {price:g} an hour of a core"])
    return Table((), [cells], align="ll")
