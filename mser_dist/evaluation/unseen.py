"""What a model's training had heard of the clips that it is asked about, and whether that may be called zero-shot.

A row is zero-shot where no training behind the model had its language, or one of its clips or speakers, and the records
say so of every clip; not where they are silent. Trainings are those of both stages with all they build on, and the sets
that checkpoints were chosen by. What the pretrained encoder heard is as declared, not derived, and counts where it was
trained on labels of emotion.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.errors import UserError
from mser_dist.models.declared import declared
from mser_dist.shards.ledger import TRAINING, UNNAMED, VALIDATION, Ledger, Part, primary, speakers_of
from mser_dist.shards.shard_set import ShardSet
from mser_dist.tables import count

REQUIRED = {
    "zero_shot": "zero-shot",
    "unseen_corpus": "of a corpus never trained on",
    "unseen_speakers": "of speakers never trained on",
}
"""What `require` can ask of every row, to a person."""


@dataclass(frozen=True)
class Found:
    """What is said of a row.

    unseen: by stage, as in report.json. leaks: the clips and speakers that it shares with training. unknown: where the
    records are silent. why_not: all that keeps it from being zero-shot, these two among it; None where nothing does.
    """

    unseen: dict[str, dict[str, Any]]
    leaks: str | None
    unknown: str | None
    why_not: str | None

    def as_row(self) -> dict[str, Any]:
        return {
            "unseen": self.unseen,
            "zero_shot": self.why_not is None,
            "leaks": self.leaks,
            "unknown": self.unknown,
            "why_not_zero_shot": self.why_not,
        }


@dataclass(frozen=True)
class _Hits:
    """What a part has of the n clips of a set."""

    part: Part
    clip: NDArray[np.bool_]  # (n,)
    speaker: NDArray[np.bool_]  # (n,)
    text: NDArray[np.bool_]  # (n,)


@dataclass
class Unseen:
    """The clips of a set against a model's ledger."""

    ledger: Ledger
    shards: ShardSet
    _hits: list[_Hits] = field(default_factory=list)

    def __post_init__(self) -> None:
        shards = self.shards
        self._hashed = np.zeros(len(shards), bool) if shards.sound is None else shards.sound != 0
        self._voice, self._named = speakers_of(shards)
        keys = shards.content_keys()
        for part in self.ledger.parts:
            clip = _among(keys, part.clips)
            if part.unhashed and self._hashed.any():  # heard before `mser verify` hashed them
                clip |= _among(shards.place_keys(), part.clips)
            text = _among(shards.source.astype(np.uint64), part.texts)
            self._hits.append(_Hits(part, clip, _among(self._voice, part.speakers) & self._named, text))

    def of(self, corpus: str | None, language: str | None, labels: Sequence[str], numbers: NDArray[np.int64]) -> Found:
        """Of the clips `numbers`, all of one corpus and language, that have these labels."""
        unseen, reasons, leaks, silent = {}, [], [], []
        named, voices = self._named[numbers], np.unique(self._voice[numbers][self._named[numbers]])
        stages = dict.fromkeys(part.stage for part in self.ledger.parts)
        for stage in sorted(stages, key=lambda one: one or 0):
            own = [hits for hits in self._hits if hits.part.stage == stage]
            said = _Row(own, str(corpus), str(language), labels, numbers, self._voice[numbers])
            untold = self._untold(own, str(corpus), numbers, named)
            name = f"stage {stage}" if stage else "the baseline"
            unseen[f"stage{stage}" if stage else "baseline"] = {
                "known": not untold,
                "language": said.language,
                "corpus": said.corpus,
                "labels": said.labels,
                "speakers": len(voices),
                "speakers_shared": said.speakers,
                "clips_shared": said.clips,
                "texts_shared": said.texts,
                "unknown": untold,
            }
            if said.language is False:
                how = "was trained on" if said.trained else "has a checkpoint that was chosen by"
                reasons.append(f"{name} {how} its language")
            if said.shared:
                leaks.append(f"{name} heard {said.shared.format(voices=len(voices), clips=len(numbers))}")
            silent += [f"{name}: {line}" for line in untold]
        if primary(language) in map(str.lower, UNNAMED):
            silent.append("its language is not named")
        if not self.ledger.parts:
            silent.append("its ledger is empty")
        encoder, why = self._encoder(language, labels)
        unseen["encoder"] = encoder
        reasons += [*leaks, *([why] if why else [])]
        return Found(unseen, *("; ".join(said) or None for said in (leaks, silent, [*reasons, *silent])))

    def _untold(
        self, own: Sequence[_Hits], corpus: str, numbers: NDArray[np.int64], named: NDArray[np.bool_]
    ) -> list[str]:
        """What the records do not say, and how to mend it."""
        lines = []
        for hits in own:
            part = hits.part
            if not part.known:
                lines.append(f"{part.run} has kept no ledger, as older versions: train it again to know")
                continue
            if part.unhashed:
                lines.append(
                    f"{count(part.unhashed, 'clip')} of its {part.use} had no hash (mser verify, then train again)"
                )
            if corpus in part.corpora and (part.unnamed or not named.all()):
                lines.append(f"clips of {corpus} without a speaker's name")
        unhashed = numbers[~self._hashed[numbers]]
        if missing := int((~np.any([hits.clip[unhashed] for hits in own], axis=0)).sum()):
            lines.append(f"{count(missing, 'clip')} of the test without a hash (mser verify, or pack it again)")
        return list(dict.fromkeys(lines))

    def _encoder(self, language: str | None, labels: Sequence[str]) -> tuple[dict[str, Any], str | None]:
        """What is declared of the pretrained encoder, and why a row is not zero-shot for it."""
        found = declared(self.ledger.encoder)
        said: dict[str, Any] = {"name": self.ledger.encoder, "declared": found.what if found else None}
        said |= {"language": None, "corpus": None, "labels": None, "speakers_shared": None, "clips_shared": None}
        if found is None:
            return said, None
        if found.languages is not None:
            said["language"] = primary(language) not in found.languages
        if not found.emotions:
            said["labels"] = [*labels]
        nothing = found.languages is not None and not found.languages
        said |= {"corpus": True, "speakers_shared": 0, "clips_shared": 0} if nothing else {}
        labelled = found.emotions and said["language"] is not True
        return said, f"{self.ledger.encoder} was trained on emotions in its language" if labelled else None


class _Row:
    """What parts have of a row: None where nobody knows."""

    def __init__(
        self,
        own: Sequence[_Hits],
        corpus: str,
        language: str,
        labels: Sequence[str],
        numbers: NDArray[np.int64],
        voice: NDArray[np.uint64],
    ) -> None:
        parts = [hits.part for hits in own]
        known = all(part.known for part in parts)
        silent = not all(part.known or part.languages for part in parts)  # not even a card
        languages = {primary(name) for part in parts for name in part.languages}
        had = {label for part in parts for label in part.labels}
        self.language = None if silent else primary(language) not in languages
        self.trained = any(primary(language) in map(primary, part.languages) for part in parts if part.use == TRAINING)
        self.corpus = None if silent else corpus not in {name for part in parts for name in part.corpora}
        self.labels = None if silent else [label for label in labels if label not in had]
        clip, speaker, text = (
            np.any([getattr(hits, name)[numbers] for hits in own], axis=0) for name in ("clip", "speaker", "text")
        )
        speakers, clips = len(np.unique(voice[speaker])), int(clip.sum())
        # A speaker is one of a corpus, so that a card which does not name the corpus has told.
        self.speakers = speakers if known or self.corpus else None
        self.clips = clips if known else None
        self.texts = int(text.sum()) if known else None
        told = [f"{clips} of its {{clips}} clips"] if clips else []
        told += [f"{speakers} of its {{voices}} speakers"] if speakers else []
        uses = {hits.part.use for hits in own if hits.clip[numbers].any() or hits.speaker[numbers].any()}
        self.shared = " and ".join(told) + (" in validation alone" if uses == {VALIDATION} else "")


def _among(values: NDArray[np.uint64], ordered: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """(n,) whether each value is among sorted ones, of which there may be many more."""
    if not len(ordered):
        return np.zeros(len(values), bool)
    at = np.searchsorted(ordered, values)
    found: NDArray[np.bool_] = ordered[np.minimum(at, len(ordered) - 1)] == values
    return found


def places(shards: ShardSet, numbers: NDArray[np.int64] | None = None) -> Iterable[tuple[str, str, NDArray[np.int64]]]:
    """Corpus, language and the numbers of the clips of each row of a report."""
    every = np.arange(len(shards)) if numbers is None else numbers
    corpora, languages = (shards.column(name)[every] for name in ("corpus", "language"))
    for corpus, language in sorted({*zip(corpora, languages, strict=True)}, key=str):
        yield corpus, language, every[(corpora == corpus) & (languages == language)]


def require(asked: str | None, ledgers: Mapping[str, Ledger], shards: ShardSet) -> None:
    """Raise `UserError`, before anything is scored, for the first row that is not what a config asks of all rows.

    ledgers: of each model, by its name to a person.
    """
    if asked is None:
        return
    label = shards.column("label")
    for model, ledger in ledgers.items():
        unseen = Unseen(ledger, shards)
        for corpus, language, numbers in places(shards):
            found = unseen.of(corpus, language, sorted({*map(str, label[numbers])}), numbers)
            if why := _refusal(asked, found):
                raise UserError(
                    f"require={asked}: for {model}, {language} of {corpus} is not known to be {REQUIRED[asked]}: "
                    f"{why}: leave it out by data.languages or data.drop, or set require=null"
                )


def _refusal(asked: str, found: Found) -> str | None:
    if asked == "zero_shot":
        return found.why_not
    key = {"unseen_corpus": "corpus", "unseen_speakers": "speakers_shared"}[asked]
    for stage, said in found.unseen.items():
        if stage == "encoder":
            continue
        name = stage.replace("stage", "stage ")
        if asked == "unseen_corpus" and said[key] is not True:
            return f"{name} was trained on that corpus" if said[key] is False else "; ".join(said["unknown"])
        if asked == "unseen_speakers" and said[key] != 0:
            return f"{name} heard {said[key]} of them" if said[key] else "; ".join(said["unknown"])
        unnamed = [line for line in said["unknown"] if "speaker" in line]
        if asked == "unseen_speakers" and unnamed:
            return unnamed[0]
        if said["clips_shared"]:  # under the name of another corpus
            return f"{name} heard {count(said['clips_shared'], 'clip')} of it"
    return None


def shown(row: Mapping[str, Any]) -> str:
    """The cell of a table."""
    if "zero_shot" not in row:  # of an older version
        return "unknown"
    if row["zero_shot"]:
        return "yes"
    if row.get("leaks"):
        return "leaks"
    return "unknown" if row.get("unknown") and row["unknown"] == row.get("why_not_zero_shot") else "no"


def together(rows: Iterable[Mapping[str, Any]], model: str, seen: bool) -> str:
    """The cell of a mean over a model's languages that were, or were not, seen in training."""
    cells = {shown(row) for row in rows if row["model"] == model and row["seen_language"] is seen}
    return cells.pop() if len(cells) == 1 else "in part"


def leak_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What makes a row's number wrong, or not to be judged: a line each, below the table."""
    leaks: dict[str, dict[str, None]] = {}  # of a place, what each stage heard
    unknown: dict[str, dict[str, None]] = {}  # of a reason, the places
    places: dict[str, None] = {}
    for row in (row for row in rows if "unseen" in row):
        where = f"{row['language']} of {row['corpus']}"
        places[where] = None
        if row["leaks"]:
            leaks.setdefault(where, {}).update(dict.fromkeys(row["leaks"].split("; ")))
        for reason in (row["unknown"] or "").split("; "):
            if reason:
                unknown.setdefault(reason, {})[where] = None
    said = [f"leaks: {where}: {'; '.join(heard)}" for where, heard in leaks.items()]
    for reason, of in unknown.items():
        what = f" of {', '.join(of)}" if len(of) < len(places) else ""
        said.append(f"which clips and speakers{what} were trained on is not known: {reason}")
    return said


def notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the column says, and what is declared of the pretrained encoders: a line each."""
    rows = [row for row in rows if "unseen" in row]
    heard: dict[tuple[str, str], dict[str, dict[str, None]]] = {}
    for row in rows:
        encoder = row["unseen"]["encoder"]
        how = {True: "not heard", False: "heard", None: "perhaps heard"}[encoder["language"]]
        key = (encoder["name"] or "", encoder["declared"] or "")
        if encoder["name"] != "":
            heard.setdefault(key, {}).setdefault(how, {})[str(row["language"])] = None
    lines = ["zero-shot: no training behind the model had the language, a clip or a speaker of the row"] if rows else []
    for (name, what), of in heard.items():
        told = "; ".join(f"{how}: {', '.join(names)}" for how, names in of.items())
        whose = f"the pretrained encoder {name}".strip()
        lines.append(f"{whose}, as declared: {what}; {told}" if what else f"{whose}: nobody has declared what it heard")
    return lines


def kind(rows: Sequence[Mapping[str, Any]]) -> str:
    """What an evaluation may be called."""
    told = [row for row in rows if "unseen" in row]
    if told and all(row["zero_shot"] for row in told):
        return "Zero-shot evaluation"
    which = sorted({str(row["language"]) for row in told if row["zero_shot"]})
    never = sorted({str(row["language"]) for row in told if not row["zero_shot"]} - {*which})
    if not which:
        known = "known to be " if any(shown(row) == "unknown" for row in told) else ""
        return f"Evaluation, none of it {known}zero-shot" if told else "Evaluation"
    return f"Evaluation, zero-shot in {', '.join(which)}" + (f" and not in {', '.join(never)}" if never else "")
