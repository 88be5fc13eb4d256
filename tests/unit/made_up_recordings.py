"""A small set of labelled recordings to translate, a program that speaks, and words in a table."""

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mser_dist import audio
from mser_dist.config.translation_keys import TranslateConfig
from mser_dist.shards.index import sound
from mser_dist.shards.writer import DatasetWriter
from mser_dist.translation.job import translate
from mser_dist.translation.selection import Outcomes

PROGRAM = Path(__file__).with_name("speech_program.py")
SENTENCE = "The cat sleeps."


def wave(seed: int, level: float = 0.1) -> np.ndarray:
    return (level * np.random.default_rng(seed).standard_normal(8000)).clip(-1, 1).astype(np.float32)


def write_set(out: Path, names: dict[str, str], **changes: Any) -> Path:
    """A set of clips by key, each in a split; those named silent or clipped are so, those named mute say nothing."""
    with DatasetWriter(out, "made-up", {}, shard_samples=20) as writer:
        for number, (name, split) in enumerate(names.items()):
            level = 1e-5 if name.startswith("silent") else 5.0 if name.startswith("clipped") else 0.1
            pcm = audio.to_pcm16(wave(number, level))
            meta = {
                "emotion": ("joy", "wut")[number % 2],
                "label": ("happy", "anger")[number % 2],
                "language": "en",
                "speaker": f"{split}{number % 3}",
                "gender": "female",
                "corpus": "ravdess",
                "text": None if name.startswith("mute") else SENTENCE,
                "source_id": f"said-{number}",
                "synthetic": False,
                "duration": len(pcm) / 16000,
                "sample_rate": 16000,
            } | changes
            writer.write(split, name, audio.encode(pcm, 16000, "flac"), "flac", meta, sound(pcm))
    return out


def table(folder: Path) -> Path:
    """Words of the recordings in three languages, of which the program does not speak the last."""
    path = folder / "words.csv"
    path.write_text(f"en,de,fr,el\n{SENTENCE},Die Katze schläft.,Le chat dort.,Η γάτα κοιμάται.\n", encoding="utf-8")
    return path


def config(folder: Path, to: str = "de,fr", **changes: Any) -> TranslateConfig:
    """By the program; what it was asked for is in `folder/log`. changes: dotted keys with __ for the point."""
    (folder / "once").mkdir(exist_ok=True)
    made = TranslateConfig(to=to.split(","))
    made.text.table = str(table(folder))
    made.speech.backend = "command"
    made.speech.command = shlex.join([sys.executable, "-S", str(PROGRAM), str(folder / "log"), str(folder / "once")])
    made.selection.whisper = None
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        setattr(getattr(made, section) if section else made, name, value)
    made.check()
    return made


def run(recordings: Path, out: Path, asked: TranslateConfig, **how: Any) -> Outcomes | None:
    return translate(str(recordings), out, asked, **how)


def asked_for(folder: Path) -> list[str]:
    return (folder / "log").read_text(encoding="utf-8").splitlines()


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )
