"""The clips that the loaders are measured on: speech of a lognormal mix of lengths, 16 kHz mono PCM16."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mser_dist import audio
from mser_dist.errors import UserError
from mser_dist.shards.writer import DatasetWriter
from mser_dist.synth.speech import SynthConfig, generate
from tools.stream_peers.common import SHARD_CLIPS

Pcm = NDArray[np.int16]  # [samples]

CODECS = ("wav", "flac")
MEAN, SIGMA, SHORTEST, LONGEST = 6.3, 0.7, 0.6, 30.0  # seconds; SIGMA of their logarithm
FADE = np.linspace(1, 0, audio.SAMPLE_RATE // 20)
EMOTIONS = ("anger", "disgust", "fear", "happy", "neutral", "sad")


def lengths(count: int, seed: int = 0) -> NDArray[np.float64]:
    """Seconds (count,)."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, count)
    return np.clip(drawn, SHORTEST, LONGEST)


def speech(folder: Path | None, count: int) -> list[Pcm]:
    """The recordings in `folder`, or `count` synthetic ones."""
    if folder is None:
        return [wave for _, wave, _ in islice(generate(SynthConfig()), count)]
    files = sorted(file for ext in CODECS for file in folder.rglob(f"*.{ext}"))
    if not files:
        raise UserError(f"{folder}: holds no wav or flac file; give a folder of recorded speech")
    return [audio.to_pcm16(audio.decode(file.read_bytes(), where=str(file))) for file in files]


def concatenated(pool: list[Pcm], seconds: NDArray[np.float64], seed: int = 0) -> Iterator[Pcm]:
    """For each length, recordings of `pool` end to end, cut to it; all of the pool comes before any comes again.

    The last 50 ms fade out: behind a hard cut, padding with zeros is a click, which can be the loudest frame of a clip,
    and the log-mel is clamped to 8 below that.
    """
    random = np.random.default_rng(seed)
    waiting: list[int] = []
    for samples in np.rint(seconds * audio.SAMPLE_RATE).astype(int):
        parts: list[Pcm] = []
        while sum(map(len, parts)) < samples:
            waiting = waiting or random.permutation(len(pool)).tolist()
            parts.append(pool[waiting.pop()])
        wave = np.concatenate(parts)[:samples]
        wave[-len(FADE) :] = np.rint(wave[-len(FADE) :] * FADE)
        yield wave


def write(folder: Path, source: Path | None, count: int) -> float:
    """Write `<codec>/plain/<key>.<codec>`, and our shards of these files in `<codec>/shards`. Returns the mean seconds.

    source: recorded speech; None: synthetic.
    """
    seconds = lengths(count)
    waves = list(concatenated(speech(source, min(count, 256)), seconds))
    for codec in CODECS:
        plain = folder / codec / "plain"
        plain.mkdir(parents=True)
        with DatasetWriter(folder / codec / "shards", "bench", {"clips": count}, shard_samples=SHARD_CLIPS) as writer:
            for number, wave in enumerate(waves):
                key, data = f"clip{number:06d}", audio.encode(wave, audio.SAMPLE_RATE, codec)
                (plain / f"{key}.{codec}").write_bytes(data)
                writer.write("train", key, data, codec, _meta(number, len(wave)))
    return float(seconds.mean())


def _meta(number: int, samples: int) -> dict[str, object]:
    emotion = EMOTIONS[number % len(EMOTIONS)]
    return {
        "emotion": emotion,
        "label": emotion,
        "language": "de",
        "speaker": f"s{number % 10}",
        "gender": None,
        "corpus": "bench",
        "text": None,
        "source_id": f"u{number}",
        "synthetic": True,
        "duration": samples / audio.SAMPLE_RATE,
        "sample_rate": audio.SAMPLE_RATE,
    }
