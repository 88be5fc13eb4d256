"""A data set of WebDataset tar shards: opened by its indexes, read sample by sample at a known offset.

The data contract: a sample is `<key>.flac` (or wav, ogg, opus, mp3) and `<key>.json` (`shard_index.META_FIELDS`) in a
plain tar of one split, `<split>-000000.tar`; beside it its index (`shard_index`); beside the shards `dataset.json`. Any
other folder of WebDataset tars with audio is read too, and indexed on first use.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mser_dist.errors import UserError
from mser_dist.shards import index as shard_index
from mser_dist.shards import node
from mser_dist.shards.columns import PLACE, Filter, Gathered, Table
from mser_dist.shards.reader import Ref, ShardReader, VanishedError
from mser_dist.shards.remote import RemoteCache
from mser_dist.shards.source import load_all, state_of


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as it lies in its shard: the audio file's bytes (not decoded) and its json."""

    key: str
    audio: bytes
    text: bytes
    where: str  # the shard and the key, for messages

    @property
    def meta(self) -> dict[str, Any]:
        """The json; empty where the sample has none."""
        return shard_index.parse_meta(self.text, self.where) if self.text else {}


class ShardSet:
    """The samples of one or more data sets, as columns: about 50 bytes a sample, and no Python object for one.

    `duration` float32 (n,) seconds; `source` int64 (n,), equal for parallel clips; `shard` (n,), number in `shards`;
    `coded[name]` a `Column` for each of `FIELDS`. `sound` int64 (n,), equal for identical audio and 0 where it is not
    known, of a set opened with it.
    """

    def __init__(self, table: Table, cache: RemoteCache | None) -> None:
        """Use `open`."""
        self.shards = table.shards
        self.reader = ShardReader(self.shards, cache)
        self.duration = table.arrays["duration"]
        self.source = table.arrays["source"]
        self.sound: NDArray[Any] | None = table.arrays.get("sound")
        self.peak: NDArray[Any] | None = table.arrays.get("peak")
        self.votes = table.votes  # by sample, of those that have them; None of a set opened without
        self.shard = table.arrays["shard"]
        self.coded = table.coded
        self._row = table.arrays["row"]  # of the shard's index
        # [5 × (n,)], as in Ref
        self._place = [table.arrays[name] for name in PLACE]
        self._keys = table.keys

    @classmethod
    def open(
        cls,
        paths: str | Path | Sequence[str | Path],
        *,
        split: str | Collection[str] | None = None,
        labels: Collection[str] | None = None,
        keep: Mapping[str, Any] | None = None,
        drop: Mapping[str, Any] | None = None,
        cache: RemoteCache | None = None,
        sound: bool = False,
        votes: bool = False,
    ) -> Self:
        """Open data sets (folders, URLs) or single tars by their indexes alone, in the order given.

        Args:
            split, labels: keep only these; None: all.
            keep, drop: field → values (one or a list) to keep, or to leave out: any of `FIELDS`, `key`, and `duration`
                as [shortest, longest] in seconds. Fields joined by a slash are taken together: {"corpus/speaker":
                ["emodb/03"]} is no other corpus' 03.
            cache: of remote sets.
            sound: take the hashes of the clips' samples and their peaks too, 10 bytes a clip, for `inspect`.
            votes: take the annotators' votes too.

        Raises UserError for a missing or truncated shard, a key that comes twice, a value that no sample has, or a
        filter that leaves nothing.
        """
        listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
        cache = cache or RemoteCache()
        chosen = Filter(split, labels, keep or {}, drop or {})

        def read() -> Table:
            gathered = Gathered(chosen, sound=sound, votes=votes)
            for number, path in enumerate(listed):
                for shard, index in load_all(path, cache):
                    gathered.add(number, shard, index)
            gathered.check(", ".join(map(str, listed)))
            return gathered.table()

        if votes:  # of test sets, which are small
            return cls(read(), cache)
        asked = [chosen.quiet, chosen.keep, chosen.drop, sound, str(cache.folder)]
        return cls(node.once([list(map(state_of, listed)), *asked], read), cache)

    def __len__(self) -> int:
        return len(self.duration)

    def column(self, name: str) -> NDArray[Any]:
        """(n,) object array of a coded field's values, so that `set.column("language") == "de"` is a mask."""
        return self.coded[name].values()

    def key(self, i: int) -> str:
        return self._keys.of(int(self.shard[i]))[int(self._row[i])]

    @property
    def keys(self) -> list[str]:
        return [self.key(i) for i in range(len(self))]

    def where(self, i: int) -> str:
        """Names sample i and its shard, for messages."""
        return f"{self.shards[self.shard[i]].name}: sample {self.key(i)}"

    def refs(self, indices: Iterable[int]) -> list[Ref]:
        return [Ref(int(i), int(self.shard[i]), *(int(part[i]) for part in self._place)) for i in indices]

    def read(self, i: int) -> Sample:
        """Sample i from its shard. UserError unless what lies there is, to the last bit, what was indexed."""
        try:
            audio, text = self.reader.read(self.refs([i])[0])
        except VanishedError:
            raise
        except UserError as error:
            raise UserError(f"{self.where(i)}: {error}") from None
        return Sample(self.key(i), audio, text, self.where(i))

    def content_keys(self) -> NDArray[np.uint64]:
        """(n,) numbers that clips of identical audio share; of a set that was not opened with `sound`, of one place.

        What `sound` does not know (a foreign tar's) is told by its shard and its checksum.
        """
        known = np.zeros(len(self), np.uint64) if self.sound is None else self.sound.astype(np.uint64)
        unknown = np.flatnonzero(known == 0)
        known[unknown] = self.place_keys(unknown)
        return known

    def place_keys(self, clips: NDArray[Any] | None = None) -> NDArray[np.uint64]:
        """(k,) numbers of clips (None: all) by their shard's bytes and their own checksum there."""
        which = np.arange(len(self)) if clips is None else clips
        at, crc = (self._place[PLACE.index(name)] for name in ("audio_at", "crc"))
        keys = np.zeros(len(which), np.uint64)
        for k, i in enumerate(which.tolist()):
            place = f"{self.shards[self.shard[i]].sha256} {at[i]} {crc[i]}"
            keys[k] = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "big")
        return keys

    def fingerprint(self) -> str:
        """A hash of which samples these are, with their content and order: equal on every machine."""
        digest = hashlib.sha256()
        for column in (*self._place, self.duration, self.source):
            digest.update(np.ascontiguousarray(column).astype(column.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()[:16]
