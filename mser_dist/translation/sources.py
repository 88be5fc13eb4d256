"""Which recordings of a set are translated, into which languages, and in which blocks of work."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mser_dist import __version__, files
from mser_dist.config.translation_keys import TranslateConfig
from mser_dist.errors import UserError
from mser_dist.prediction.locate import find_export
from mser_dist.shards.metadata import SPLITS, as_text
from mser_dist.shards.shard_set import ShardSet
from mser_dist.translation.measures import CLIPPED, decoded, level
from mser_dist.translation.parts import NotMadeError, Source

BLOCK = 16  # recordings: what is lost where a process is killed, and so many files the fewer
_SILENT = -65.0  # dB of full scale


@dataclass(frozen=True)
class Block:
    """Recordings that one process translates one after the other, and whose clips it writes into one file.

    clips: their numbers in the set. recipe: stands for all that decides its bytes.
    """

    split: str
    number: int
    clips: tuple[int, ...]
    recipe: str

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}"


class Recordings:
    """The labelled clips of a set that are translated. Raises `UserError` where there are none, or a set is damaged."""

    def __init__(self, path: str, config: TranslateConfig) -> None:
        self.path, self.config = path, config
        self.shards = ShardSet.open(path, keep=config.keep, drop=config.drop, sound=True)
        split, label = self.shards.column("split"), self.shards.column("label")
        language = self.shards.column("language")
        self._languages = [_base(name) for name in language]
        wanted = np.isin(split.astype(str), config.split)
        labelled = np.array([name is not None for name in label])
        self.clips = np.flatnonzero(wanted & labelled)
        if not len(self.clips):
            there = ", ".join(sorted({str(name) or "none" for name in split}))
            raise UserError(f"{path}: no labelled clip in split={','.join(config.split)}; the set has: {there}")
        self.labels = sorted({str(label[i]) for i in self.clips})
        self.left_out = Counter(
            [f"split {split[i] or 'unknown'}" for i in np.flatnonzero(~wanted)]
            + ["without label"] * int((wanted & ~labelled).sum())
        )
        if not any(self.languages_of(i) for i in self.clips.tolist()):
            raise UserError(f"{path}: every clip is in {', '.join(config.to)} already: name other languages by --to")
        self._splits = split

    def languages_of(self, clip: int) -> list[str]:
        """Those that a clip is translated into: all that are asked for but its own."""
        return [name for name in self.config.to if name != self._languages[clip]]

    def blocks(self) -> list[Block]:
        """All of the work, in the order of the set: of a split at a time."""
        found = []
        places = self.shards.place_keys(self.clips)
        chosen = self.config.selection
        common = _made_by(self.config) | {"labels": self.labels if chosen.scorer or chosen.probe else []}
        if self.config.speech.level == "voice":  # a speaker's mean is of other recordings too
            common["set"] = [int(place) for place in places]
        for split in SPLITS:
            own = [k for k, i in enumerate(self.clips) if self._splits[i] == split]
            for number, begin in enumerate(range(0, len(own), BLOCK)):
                which = own[begin : begin + BLOCK]
                clips = tuple(int(self.clips[k]) for k in which)
                what = files.digest([common, [int(places[k]) for k in which], [self.shards.key(i) for i in clips]])
                found.append(Block(split, number, clips, what))
        return found

    def pairs(self, clips: Sequence[int]) -> int:
        """Clips in another language that these are to become."""
        return sum(len(self.languages_of(i)) for i in clips)

    def read(self, clip: int) -> tuple[Source, dict[str, Any], str]:
        """A recording, its json, and the hash of its audio file.

        Raises `NotMadeError` where nothing can be made of it.
        """
        sample = self.shards.read(clip)
        try:
            wave, clipped = decoded(sample.audio, sample.where)
        except UserError:
            raise NotMadeError("source cannot be decoded") from None
        if level(wave) < _SILENT:
            raise NotMadeError("silent source")
        if clipped > CLIPPED:
            raise NotMadeError("clipped source")
        meta, of = sample.meta, self.facts(clip)
        text = as_text(meta.get("text"))
        source = Source(
            id=sample.key,
            audio=wave,
            text=text.strip() or None if text else None,
            language=of["language"],
            emotion=of["label"],
            corpus=of["corpus"],
            speaker=of["speaker"] or None,
            gender=of["gender"],
        )
        return source, meta, hashlib.sha256(sample.audio).hexdigest()

    def facts(self, clip: int) -> dict[str, Any]:
        """What the index says of a clip."""
        names = ("label", "emotion", "language", "speaker", "gender", "corpus", "split")
        return {name: self.shards.coded[name].names[self.shards.coded[name].codes[clip]] for name in names}

    def key(self, clip: int, language: str) -> str:
        """The key of a clip in a language: the recording's with the language behind it, as far as a key may be so."""
        key = self.shards.key(clip)
        if not re.fullmatch(r"[A-Za-z0-9_+=-]{1,80}", key):
            key = f"{re.sub(r'[^A-Za-z0-9_+=-]+', '-', key)[-60:]}-{files.digest(key)[:10]}"
        return f"{key}_{language}"


def _base(language: str) -> str:
    return language.partition("-")[0].lower()


def _made_by(config: TranslateConfig) -> dict[str, Any]:
    """What decides the bytes of a clip and its scores: keys, and what stands in the files that they name; which clips
    are kept is decided afterwards."""
    tree = asdict(config)
    chosen = config.selection
    for name in ("timeout", "tries"):  # patience makes no other clip
        del tree["speech"][name]
    return {name: tree[name] for name in ("to", "seed", "transcript", "text", "speech")} | {
        "asked": [chosen.scorer, chosen.probe, chosen.whisper],
        "files": [
            _sum(Path(config.text.table)) if config.text.table else None,
            _sum(find_export(chosen.scorer) / "card.json") if chosen.scorer else None,
            ShardSet.open(chosen.probe).fingerprint() if chosen.probe else None,
        ],
        "version": __version__,
    }


def _sum(file: Path) -> str | None:
    return files.file_sha256(file) if file.is_file() else None
