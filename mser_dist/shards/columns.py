"""The columns of a `ShardSet`, gathered shard by shard from their indexes, and the filters on them."""

import difflib
import zlib
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.errors import UserError
from mser_dist.shards import index as shard_index
from mser_dist.shards.reader import Shard
from mser_dist.shards.votes import Votes

FIELDS = (*shard_index.CODED, "split", "set")
"""The coded columns. `set` is the number of the data set among those opened together."""

PLACE = ("audio_at", "audio_size", "json_at", "json_size", "crc")
"""The columns of a `Ref`."""


@dataclass(frozen=True)
class Column:
    """A field of few values: `names[codes[i]]` is sample i's. `names` are sorted, None first."""

    codes: NDArray[Any]  # (n,), of the smallest fitting unsigned type
    names: list[Any]

    def values(self) -> NDArray[Any]:
        """(n,) object array."""
        return np.array(self.names, dtype=object)[self.codes]

    def counts(self) -> NDArray[np.int64]:
        """(len(names),) samples of each value."""
        return np.bincount(self.codes, minlength=len(self.names))


class Keys:
    """The keys of each shard, compressed: they are only read to name a sample to a person."""

    def __init__(self) -> None:
        self._packed: Sequence[Any] = []  # of bytes, or what is like them
        self._recent: OrderedDict[int, list[str]] = OrderedDict()

    @classmethod
    def of_packed(cls, blob: NDArray[np.uint8], starts: NDArray[np.int64]) -> "Keys":
        """What `packed` gave; the blob may be mapped."""
        keys = cls()
        keys._packed = _Cut(blob, starts)
        return keys

    def packed(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """(all shards' keys as they are compressed, one behind the other; (shards + 1,) where each begins)."""
        starts = np.cumsum([0, *map(len, self._packed)], dtype=np.int64)
        return np.frombuffer(b"".join(self._packed), dtype=np.uint8), starts

    def add(self, keys: list[str]) -> None:
        assert isinstance(self._packed, list)
        self._packed.append(zlib.compress("\n".join(keys).encode("utf-8", "surrogateescape"), 1))

    def of(self, shard: int) -> list[str]:
        if shard not in self._recent:
            text = zlib.decompress(self._packed[shard]).decode("utf-8", "surrogateescape")
            self._recent[shard] = text.split("\n")
            if len(self._recent) > 16:
                self._recent.popitem(last=False)
        return self._recent[shard]


class _Cut(Sequence[Any]):
    """Stretches of an array, as a sequence."""

    def __init__(self, blob: NDArray[np.uint8], starts: NDArray[np.int64]) -> None:
        self._blob, self._starts = blob, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: Any) -> Any:
        return self._blob[int(self._starts[number]) : int(self._starts[number + 1])].data


@dataclass(frozen=True)
class Table:
    """The columns of a `ShardSet`."""

    shards: list[Shard]
    arrays: dict[str, NDArray[Any]]  # "duration", "source", "shard", "row", those of `PLACE`; maybe "sound", "peak"
    coded: dict[str, Column]
    keys: Keys
    votes: dict[int, Votes] | None


class Filter:
    """Which samples of a shard to keep."""

    def __init__(
        self,
        split: str | Collection[str] | None,
        labels: Collection[str] | None,
        keep: Mapping[str, Any],
        drop: Mapping[str, Any],
    ) -> None:
        fields = (*FIELDS[:-1], "key", "duration")
        for name in (*keep, *drop):
            if name not in fields and not ("/" in name and set(name.split("/")) <= set(shard_index.CODED)):
                near = difflib.get_close_matches(name, fields, 1)
                hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(fields)}"
                raise UserError(f"there is no field {name!r} to filter by: {hint}")
        self.keep, self.drop = ({n: _wanted(n, v) for n, v in given.items()} for given in (keep, drop))
        # Asked for by the protocol, not by name: a label or split that one set lacks is no typo.
        self.quiet: dict[str, Any] = {}
        if split is not None:
            self.quiet["split"] = {split} if isinstance(split, str) else set(split)
        if labels is not None:
            self.quiet["label"] = set(labels)

    def mask(self, columns: Mapping[str, Any], split: str, count: int) -> NDArray[np.bool_]:
        """(count,) of a shard's samples."""
        result = np.ones(count, dtype=bool)
        for asked, wants in ((self.quiet, True), (self.keep, True), (self.drop, False)):
            for name, wanted in asked.items():
                result &= _has(name, wanted, columns, split) == wants
        return result


def _wanted(name: str, values: Any) -> Any:
    if name != "duration":
        return {str(value) for value in (values if isinstance(values, (list, tuple, set, frozenset)) else [values])}
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError):
        raise UserError(f"a filter by duration is [shortest, longest] in seconds, not {values!r}") from None
    return low, high


def _has(name: str, wanted: Any, columns: Mapping[str, Any], split: str) -> NDArray[np.bool_] | bool:
    if name == "split":
        return split in wanted
    if name == "duration":
        duration = np.array(columns["duration"])
        return (wanted[0] <= duration) & (duration <= wanted[1])
    if "/" in name:
        names, codes = _joined(name, columns)
        return np.array([value in wanted for value in names], dtype=bool)[codes]
    if name == "key":
        return np.fromiter((key in wanted for key in columns["key"]), bool, len(columns["key"]))
    matches = np.array([str(value) in wanted for value in columns[name]["names"]], dtype=bool)
    return matches[np.array(columns[name]["codes"], dtype=np.int64)]


def _joined(name: str, columns: Mapping[str, Any]) -> tuple[list[str], NDArray[np.int64]]:
    """The values of several fields taken together, "corpus/speaker", and (count,) the number of each sample's."""
    parts = [columns[part] for part in name.split("/")]
    codes = np.array([part["codes"] for part in parts], dtype=np.int64)
    found, of = np.unique(codes, axis=1, return_inverse=True) if codes.size else (codes, codes[0])
    names = ["/".join(str(part["names"][i]) for part, i in zip(parts, one, strict=True)) for one in found.T]
    return names, of.reshape(-1)


class Gathered:
    """The columns of many shards on their way into a `ShardSet`; `sound` with `peak`, and `votes`, only where they are
    asked for."""

    def __init__(self, keep: Filter, *, sound: bool = False, votes: bool = False) -> None:
        self.shards: list[Shard] = []
        self.keys = Keys()
        self.sound = sound
        self.votes: dict[int, Votes] | None = {} if votes else None  # by sample, of those that have them
        self._filter = keep
        self._parts: dict[str, list[NDArray[Any]]] = {}
        self._numbers: dict[str, dict[Any, int]] = {name: {} for name in FIELDS}  # value → code
        self._hashes: list[NDArray[np.int64]] = []  # of each shard's keys
        self.sets: list[int] = []  # of each shard
        self._found: dict[str, set[str]] = {}  # keys asked for; values of fields taken together
        self._count = 0

    def add(self, number: int, shard: Shard, index: Mapping[str, Any]) -> None:
        columns, count, split = index["columns"], index["count"], index["split"]
        mask = self._filter.mask(columns, split, count)
        for asked in (self._filter.keep, self._filter.drop):
            if "key" in asked:
                self._found.setdefault("key", set()).update(asked["key"].intersection(columns["key"]))
            for name in (name for name in asked if "/" in name):
                self._found.setdefault(name, set()).update(_joined(name, columns)[0])
        constant = {"split": {"names": [split], "codes": [0] * count}, "set": {"names": [number], "codes": [0] * count}}
        for name in FIELDS:
            given = constant.get(name) or columns[name]
            numbers = self._numbers[name]
            codes = np.array([numbers.setdefault(value, len(numbers)) for value in given["names"]], dtype=np.int64)
            self._put(name, codes[np.array(given["codes"], dtype=np.int64)][mask] if count else codes[:0])
        for name in (*PLACE, "source", *(["sound", "peak"] if self.sound else [])):
            self._put(name, np.array(columns[name], dtype=np.int64)[mask])
        if self.votes is not None and "votes" in columns:
            given = (columns["votes"][row] for row in np.flatnonzero(mask))
            self.votes |= {i: one for i, one in enumerate(given, self._count) if one}
        self._put("duration", np.array(columns["duration"], dtype=np.float64)[mask])
        self._put("row", np.flatnonzero(mask))
        self._put("shard", np.full(int(mask.sum()), len(self.shards)))
        self._hashes.append(np.fromiter(map(hash, columns["key"]), np.int64, count))
        self.sets.append(number)
        self.keys.add(columns["key"])
        self.shards.append(shard)
        self._count += int(mask.sum())

    def _put(self, name: str, values: NDArray[Any]) -> None:
        self._parts.setdefault(name, []).append(_narrow(values))

    def table(self) -> Table:
        """All of it as columns, no longer held here."""
        names = ("source", "shard", "row", *PLACE, *(["sound", "peak"] if self.sound else []))
        arrays = {"duration": self._take("duration").astype(np.float32), **{name: self._take(name) for name in names}}
        return Table(self.shards, arrays, {name: self._take_coded(name) for name in FIELDS}, self.keys, self.votes)

    def _take(self, name: str) -> NDArray[Any]:
        return np.concatenate(self._parts.pop(name))

    def _take_coded(self, name: str) -> Column:
        """A column whose names are those that occur, sorted."""
        codes, names = self._take(name), list(self._numbers[name])
        there = np.flatnonzero(np.bincount(codes, minlength=len(names)))
        order = sorted(there.tolist(), key=lambda code: (names[code] is not None, names[code]))
        new = np.zeros(len(names), dtype=np.int64)
        new[order] = np.arange(len(order))
        return Column(_narrow(new[codes]), [names[code] for code in order])

    def check(self, paths: str) -> None:
        """Raise `UserError` for a key that comes twice, a filter's value that never occurs, or nothing left."""
        self._check_keys()
        if not self.shards or not sum(map(len, self._hashes)):
            raise UserError(f"{paths}: no sample is left, the set is empty")
        for asked in (self._filter.keep, self._filter.drop):
            for name, wanted in asked.items():
                there = self._found[name] if name in self._found else set(map(str, self._numbers.get(name, wanted)))
                if name != "duration" and (absent := sorted(wanted - there)):
                    near = difflib.get_close_matches(absent[0], there, 1)
                    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(there)[:20])}"
                    raise UserError(f"{paths}: no sample has {name} {absent[0]!r}: {hint}")
        if not self._count:
            everything = [*self._filter.quiet.items(), *self._filter.keep.items()]
            asked_for = [
                f"{n} {list(v) if n == 'duration' else sorted(v)}"
                + (f" of {sorted(map(str, self._numbers[n]))}" if n in self._numbers else "")
                for n, v in everything
            ] + [f"without {n} {sorted(map(str, v))}" for n, v in self._filter.drop.items()]
            raise UserError(f"{paths}: no sample is left by the filter: {'; '.join(asked_for)}")

    def _check_keys(self) -> None:
        """No shard twice, and no key twice in a set; two sets may use the same keys."""
        names = [shard.name for shard in self.shards]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"{twice[0]}: the same shard is named twice; open it once")
        for number in set(self.sets):
            shards = [i for i, of in enumerate(self.sets) if of == number]
            hashes = np.sort(np.concatenate([self._hashes[i] for i in shards]))
            for value in hashes[1:][hashes[1:] == hashes[:-1]].tolist():  # equal keys or, almost never, unequal ones
                self._check_key(value, shards)

    def _check_key(self, value: int, shards: list[int]) -> None:
        first: dict[str, int] = {}
        for number in shards:
            for key in self.keys.of(number) if value in self._hashes[number] else ():
                if hash(key) == value and key in first:
                    earlier, here = self.shards[first[key]].name, self.shards[number].name
                    what = "comes twice" if first[key] == number else f"is also in {earlier}"
                    raise UserError(f"{here}: the key {key!r} {what}; every sample of a set needs its own")
                if hash(key) == value:
                    first[key] = number


def _narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Integers in the smallest unsigned type that holds them; other types as they are."""
    if values.dtype.kind not in "iu" or not len(values):
        return values.astype(np.uint8) if values.dtype.kind in "iu" else values
    return values.astype(np.min_scalar_type(int(values.max())))
