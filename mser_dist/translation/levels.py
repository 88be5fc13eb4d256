"""Each speaker's own level, of some recordings of every label: what one process finds, the others read."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mser_dist import __version__
from mser_dist.files import digest, whole
from mser_dist.translation.parts import NotMadeError, Source
from mser_dist.translation.sources import Recordings
from mser_dist.translation.transplant import Level, level

_RECORDINGS = 14  # of a speaker: two of each common label


class Levels:
    """The levels of the speakers of a set; folder: where they are kept."""

    def __init__(self, recordings: Recordings, folder: Path) -> None:
        self._recordings, self._folder = recordings, folder
        self._clips: dict[tuple[str, str], list[int]] = defaultdict(list)
        for clip in recordings.clips.tolist():
            facts = recordings.facts(clip)
            if facts["speaker"]:
                self._clips[facts["corpus"], facts["speaker"]].append(clip)
        self._known: dict[tuple[str, str], Level | None] = {}

    def of(self, source: Source) -> Level | None:
        """Of a recording's speaker; None for one without a name, or of whom no recording can be used."""
        if source.speaker is None:
            return None
        who = source.corpus, source.speaker
        if who not in self._known:
            self._known[who] = self._found(who)
        return self._known[who]

    def _found(self, who: tuple[str, str]) -> Level | None:
        clips = self._chosen(self._clips[who])
        places = [int(place) for place in self._recordings.shards.place_keys(np.array(clips))]
        # By what it is made of: the folder may be of another call, with other recordings.
        file = self._folder / f"level-{digest([who, places, __version__])[:16]}.npz"
        if file.is_file():
            with np.load(file) as kept:
                return Level(float(kept["pitch"]), kept["shape"])
        found = level(self._waves(clips))
        if found is not None:
            with whole(file) as staging, staging.open("wb") as into:
                np.savez(into, pitch=found.pitch, shape=found.shape)
        return found

    def _chosen(self, clips: list[int]) -> list[int]:
        """As many recordings of each label, the first ones of the set."""
        by_label = defaultdict[str, list[int]](list)
        for clip in clips:
            by_label[self._recordings.facts(clip)["label"]].append(clip)
        each = -(-_RECORDINGS // len(by_label))
        return [clip for own in by_label.values() for clip in own[:each]]

    def _waves(self, clips: list[int]) -> Iterator[np.ndarray]:
        for clip in clips:
            try:
                source, _, _ = self._recordings.read(clip)
            except NotMadeError:
                continue
            yield source.audio
