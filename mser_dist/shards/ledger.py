"""The ledger of a run: which clips, speakers and sentences were heard in its training, and in those it builds on.

Made of the columns of an opened set, without reading a shard; 8 bytes a hash, in one file of safetensors, which the run
folder and the export keep. A ledger is of whole sets: also a clip that a short training never came to may not be called
unheard. It holds names of corpora, languages and labels, and hashes of all else.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mser_dist.errors import UserError
from mser_dist.files import whole
from mser_dist.shards.shard_set import ShardSet

FILE = "ledger.safetensors"
VERSION = 1
TRAINING, VALIDATION = "training", "validation"  # uses of a set: to learn from, or to choose the checkpoint by
UNNAMED = ("", "und", "None")  # languages that are none
_HASHES = ("clips", "speakers", "texts")


def _none() -> NDArray[np.uint64]:
    return np.zeros(0, np.uint64)


@dataclass(frozen=True)
class Part:
    """What one training heard of one set.

    stage: 1, 2, or None: a classifier fitted by `mser baseline`. known: False of a run that has kept no ledger; then
    corpora, languages and labels are those of its card, and the rest is empty. The hashes are sorted, each once:
    `clips` of the decoded samples (`ShardSet.content_keys`), of which `unhashed` are known by their place in a shard
    alone; `speakers` of corpus and name, which `unnamed` clips lack; `texts` of corpus and source_id, equal for
    sentences that are spoken again, or translated.
    """

    run: str
    stage: int | None
    use: str
    languages: list[str]
    corpora: list[str]
    labels: list[str]
    known: bool = True
    counts: list[tuple[str, str, str, int]] = field(default_factory=list)  # corpus, language, label, clips
    unhashed: int = 0
    unnamed: int = 0
    clips: NDArray[np.uint64] = field(default_factory=_none)
    speakers: NDArray[np.uint64] = field(default_factory=_none)
    texts: NDArray[np.uint64] = field(default_factory=_none)

    @property
    def total(self) -> int:
        """Clips, copies counted."""
        return sum(number for *_, number in self.counts)

    @property
    def name(self) -> str:
        """To a person."""
        what = f"stage {self.stage}" if self.stage else "the baseline"
        return f"{what} ({self.run})" if self.use == TRAINING else f"{what} ({self.run}), validation"

    def facts(self) -> dict[str, Any]:
        """All but the hashes, as JSON."""
        names = ("run", "stage", "use", "known", "languages", "corpora", "labels", "counts", "unhashed", "unnamed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Ledger:
    """The parts of a run, its own first, then of those it builds on; `encoder` is the pretrained one's name.

    Where it is "" there was none, and where it is None nobody knows.
    """

    parts: tuple[Part, ...]
    encoder: str | None = None

    def with_those_of(self, others: Iterable["Ledger"]) -> "Ledger":
        """This run's parts, and behind them the others', each once."""
        every = {_digest(part): part for one in (self, *others) for part in one.parts}
        return Ledger(tuple(every.values()), self.encoder)

    def summary(self) -> dict[str, Any]:
        """What a report tells of it, as JSON: no hash, but how many there are."""
        sizes = [{"clips": part.total, "speakers": len(part.speakers), "texts": len(part.texts)} for part in self.parts]
        return {
            "encoder": self.encoder,
            "parts": [part.facts() | size for part, size in zip(self.parts, sizes, strict=True)],
        }

    def save(self, path: Path) -> None:
        """Write it at once; arrays that two parts share, as a stage 2 and its stage 1 may, are there once."""
        arrays: dict[str, NDArray[np.uint64]] = {}
        listed = []
        for part in self.parts:
            names = {name: _sum(getattr(part, name)) for name in _HASHES}
            arrays |= {names[name]: getattr(part, name) for name in _HASHES}
            listed.append(part.facts() | {"arrays": names})
        about = {"version": VERSION, "encoder": self.encoder, "parts": listed}
        with whole(path) as staging:
            save_file(arrays, staging, metadata={"ledger": json.dumps(about, ensure_ascii=False)})

    @classmethod
    def kept(cls, path: Path) -> Self | None:
        """`load`, or None where there is no such file."""
        return cls.load(path) if path.is_file() else None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises `UserError` for a file that is not there, damaged, or of a later version."""
        try:
            with safe_open(path, "numpy") as file:
                about = json.loads(file.metadata()["ledger"])
                if about["version"] > VERSION:
                    raise UserError(f"{path} was written by a later version of mser_dist: use that one")
                return cls(tuple(_part(file, facts) for facts in about["parts"]), about["encoder"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({' '.join(str(error).split())}): copy it again, or export the run again; without "
                "it nobody knows which clips were trained on"
            ) from error


def _part(file: Any, facts: dict[str, Any]) -> Part:
    arrays = {name: file.get_tensor(key) for name, key in facts.pop("arrays").items()}
    for name in _HASHES:
        if arrays[name].dtype != np.uint64 or arrays[name].ndim != 1 or (arrays[name][1:] <= arrays[name][:-1]).any():
            raise ValueError(f"its {name} are no hashes")
    counts = [(str(a), str(b), str(c), int(n)) for a, b, c, n in facts.pop("counts")]
    return Part(**facts, counts=counts, **arrays)


def _sum(values: NDArray[np.uint64]) -> str:
    return hashlib.blake2b(values.astype("<u8").tobytes(), digest_size=8).hexdigest()


def _digest(part: Part) -> str:
    return json.dumps([part.facts(), *(_sum(getattr(part, name)) for name in _HASHES)])


def part_of(shards: ShardSet, run: str, stage: int | None, use: str = TRAINING) -> Part:
    """What a training hears, or is chosen by, that opened this set. About a second for a million clips."""
    corpus, language, label = (shards.coded[name] for name in ("corpus", "language", "label"))
    places, numbers = unique_rows([corpus.codes, language.codes, label.codes])
    counts = [
        (str(corpus.names[c]), str(language.names[la]), str(label.names[e]), int(n))
        for (c, la, e), n in zip(places.tolist(), np.bincount(numbers).tolist(), strict=True)
    ]
    voices, named = speakers_of(shards)
    unhashed = len(shards) if shards.sound is None else int((shards.sound == 0).sum())
    return Part(
        run,
        stage,
        use,
        languages=sorted({str(name) for name in language.names}),
        corpora=sorted({str(name) for name in corpus.names}),
        labels=sorted({str(name) for name in label.names}),
        counts=counts,
        unhashed=unhashed,
        unnamed=int((~named).sum()),
        clips=_each_once(shards.content_keys()),
        speakers=_each_once(voices[named]),
        texts=_each_once(shards.source.astype(np.uint64)),
    )


def _each_once(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sorted, each once. numpy 2.4's `unique` takes 30 times as long for numbers that are nearly all different."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]]


def speakers_of(shards: ShardSet) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """(n,) hashes of the clips' speakers, each of whom is one of a corpus, in all languages; (n,) whether named."""
    corpus, speaker = shards.coded["corpus"], shards.coded["speaker"]
    pairs, numbers = unique_rows([corpus.codes, speaker.codes])
    names = [(corpus.names[c], speaker.names[s]) for c, s in pairs.tolist()]
    hashes = np.array([_voice(f"{one}/{name}") for one, name in names], np.uint64)
    return hashes[numbers], np.array([bool(name) for _, name in names])[numbers]


def _voice(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def unique_rows(columns: list[NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """((k, columns) distinct rows, sorted; (n,) the number of each row): by one number a row, as sorting rows is slow.

    The columns are codes from 0 on, of so few values that the product of their ranges fits an int64.
    """
    widths = [int(column.max(initial=0)) + 1 for column in columns]
    whole_number = np.zeros(len(columns[0]), np.int64)
    for column, width in zip(columns, widths, strict=True):
        whole_number = whole_number * width + column
    distinct, numbers = np.unique(whole_number, return_inverse=True)
    rows = []
    for width in reversed(widths):
        rows.append(distinct % width)
        distinct = distinct // width
    return np.stack(rows[::-1], axis=1), numbers.reshape(-1)


def primary(language: str | None) -> str:
    """A code's language alone: pt-BR and pt are the same to a listener."""
    return str(language or "").split("-")[0].lower()
