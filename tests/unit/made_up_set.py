"""A small data set of noise, for the tests of shards."""

from pathlib import Path
from typing import Any

import numpy as np

from mser_dist import audio
from mser_dist.shards.index import sound
from mser_dist.shards.writer import DatasetWriter

LANGUAGES = ("de", "el", "fr")


def pcm(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(-3000, 3000, 1600 + 16 * i).astype(np.int16)


def meta(i: int, **changes: Any) -> dict[str, Any]:
    return {
        "emotion": "joy" if i % 2 else "calm",
        "label": "happy" if i % 2 else None,
        "language": LANGUAGES[i % 3],
        "speaker": f"s{i % 4}",
        "gender": "female",
        "corpus": "made-up",
        "text": "größer",
        "source_id": f"u{i // 3}",
        "synthetic": True,
        "duration": len(pcm(i)) / 16000,
        "sample_rate": 16000,
    } | changes


def write_set(out: Path, n: int = 20, ext: str = "flac", **options: Any) -> Path:
    with DatasetWriter(out, "made-up", {"seed": 0}, shard_samples=6, **options) as writer:
        for i in range(n):
            split, data = "test" if i % 5 == 0 else "train", audio.encode(pcm(i), 16000, ext)
            writer.write(split, f"k{i:02d}", data, ext, meta(i), sound(pcm(i)))
    return out
