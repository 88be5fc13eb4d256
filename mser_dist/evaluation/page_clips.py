"""The clips that a report's page names: the most certain mistakes, and with `--audio` their sound."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from mser_dist import audio
from mser_dist import config as cfg
from mser_dist.config.validate import build
from mser_dist.errors import UserError
from mser_dist.evaluation.evaluated import Answered, Evaluated
from mser_dist.shards.shard_set import Sample, ShardSet

PAIRS, EACH = 12, 2  # pairs of label and answer of a model, and clips of each
SECONDS = 15.0  # of a clip that are to be heard
BYTES = 6_000_000  # of all clips in a page, as they are written there


@dataclass(frozen=True)
class Mistake:
    """A clip with the wrong answer. margin: how much better the answer scored than the label; probability: of the
    answer, where it is known."""

    key: str
    corpus: str
    language: str
    speaker: str
    label: str
    predicted: str
    margin: float
    probability: float | None

    @property
    def place(self) -> tuple[str, str, str]:
        return self.corpus, self.language, self.key


@dataclass(frozen=True)
class Pair:
    """A label that is taken for another, in `count` clips; those of which the model is surest."""

    label: str
    predicted: str
    count: int
    worst: list[Mistake]


def worst(given: Answered, labels: Sequence[str]) -> list[Pair]:
    """The pairs that are confused most often, in each the clips whose wrong answer is the most certain."""
    number = {label: i for i, label in enumerate(labels)}
    wrong = np.flatnonzero((given.label != given.predicted) & np.isin(given.label, labels))
    if not len(wrong):
        return []
    rows = {kind: np.array([number[one] for one in getattr(given, kind)[wrong]]) for kind in ("label", "predicted")}
    margin = given.scores[wrong, rows["predicted"]] - given.scores[wrong, rows["label"]]
    sure = margin if given.probability is None else given.probability[wrong, rows["predicted"]]
    pairs: dict[tuple[str, str], list[int]] = {}
    for at in np.argsort(-sure, kind="stable"):
        pairs.setdefault((str(given.label[wrong[at]]), str(given.predicted[wrong[at]])), []).append(int(at))
    found = []
    for (label, predicted), own in sorted(pairs.items(), key=lambda item: -len(item[1]))[:PAIRS]:
        clips = []
        for at in own[:EACH]:
            i = wrong[at]
            key, corpus, language, speaker = (
                str(column[i]) for column in (given.key, given.corpus, given.language, given.speaker)
            )
            sureness = None if given.probability is None else float(sure[at])
            clips.append(Mistake(key, corpus, language, speaker, label, predicted, float(margin[at]), sureness))
        found.append(Pair(label, predicted, len(own), clips))
    return found


def sounds(evaluated: Evaluated, mistakes: Sequence[Mistake]) -> tuple[dict[tuple[str, str, str], str], list[str]]:
    """The clips as data URIs, by `Mistake.place`, and lines on those that are not at hand.

    Each is FLAC of 16 kHz, its first `SECONDS`; those that come first, until `BYTES` are full.
    """
    wanted = list(dict.fromkeys(one.place for one in mistakes))
    try:
        shards = _open(evaluated)
    except UserError as error:
        return {}, [f"no clip can be heard: {error}"]
    names = (shards.column("corpus"), shards.column("language"))
    where = {
        (str(corpus or ""), str(language or ""), shards.key(i)): i
        for i, (corpus, language) in enumerate(zip(*names, strict=True))
    }
    found: dict[tuple[str, str, str], str] = {}
    notes, absent, used = [], 0, 0
    for place in wanted:
        if place not in where:
            absent += 1
            continue
        try:
            uri = _flac(shards.read(where[place]))
        except UserError as error:
            notes.append(f"a clip cannot be heard: {error}")
            continue
        if used + len(uri) > BYTES:
            notes.append(
                f"the clips that can be heard are {len(found)} of {len(wanted)}: a page has {BYTES / 1e6:g} MB for them"
            )
            break
        used += len(uri)
        found[place] = uri
    if absent:
        notes.append(f"{absent} of {len(wanted)} clips are not in the sets any more, and cannot be heard")
    return found, notes


def _open(evaluated: Evaluated) -> ShardSet:
    """The clips that were evaluated, as the sets have them now."""
    from mser_dist.stream.examples import open_clips  # and torch with it

    tree = evaluated.tree["on"]["data"] if evaluated.kind == "baseline" else evaluated.tree["data"]
    known = {name: value for name, value in tree.items() if name in {one.name for one in fields(cfg.DataConfig)}}
    data = build(cfg.DataConfig, known, lambda key: "config.yaml")
    return open_clips(data, data.split)


def _flac(sample: Sample) -> str:
    wave = audio.decode(sample.audio, sample.where, scale=True)[: int(SECONDS * audio.SAMPLE_RATE)]
    sound = audio.encode(audio.to_pcm16(wave), audio.SAMPLE_RATE)
    return "data:audio/flac;base64," + base64.b64encode(sound).decode("ascii")
