"""`mser inspect`: what is in data sets, by the columns of their indexes alone; no audio is read."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.shards import repeats
from mser_dist.shards.columns import Column
from mser_dist.shards.metadata import SPLITS
from mser_dist.shards.shard_set import ShardSet
from mser_dist.tables import Table, count

NO_LABEL = "no label"
UNKNOWN = "unknown"
WIDTH = 120  # of a table of labels, in characters
NAMED = 5  # speakers that the table names; the JSON has all


def describe(shards: ShardSet) -> dict[str, Any]:
    """The numbers of a set, ready for JSON.

    {all, splits, languages, corpora: {name: {clips, hours, speakers, seconds: {min, median, mean, p95, max}, labels:
    {label: clips}}}, sample_rates, genders, kinds (recorded or synthetic), unlabelled: {native emotion: clips that have
    no label}, parallel: {utterances: those in two languages or more, clips: of these}, speakerless: clips that name no
    speaker, shared_speakers: in more than one split, [{corpus, speaker, clips: {split: clips}}], identical: audio that
    is there more than once (`repeats.describe`), full_scale: `full_scale`, both None for a set that was opened without
    `sound`}.

    A speaker is one of a corpus: equal names in two corpora are two people.
    """
    coded = shards.coded
    voices = _voices(shards)
    splits = _groups(shards, voices, coded["split"])
    return {
        "all": _groups(shards, voices, Column(np.zeros(len(shards), dtype=np.uint8), ["all"]))["all"],
        "splits": {name: splits[name] for name in sorted(splits, key=_split_order)},
        "languages": _groups(shards, voices, coded["language"]),
        "corpora": _groups(shards, voices, coded["corpus"]),
        "sample_rates": _counts(coded["sample_rate"]),
        "genders": _counts(coded["gender"]),
        "kinds": {
            ("synthetic" if name == "True" else "recorded"): n for name, n in _counts(coded["synthetic"]).items()
        },
        "unlabelled": _unlabelled(shards),
        "parallel": _parallel(shards),
        "speakerless": int((voices.codes < 0).sum()),
        "shared_speakers": _shared(voices, coded["split"]),
        "identical": None if shards.sound is None else repeats.describe(shards),
        "full_scale": None if shards.peak is None else full_scale(shards),
    }


def full_scale(shards: ShardSet) -> dict[str, Any]:
    """{clips: that touch full scale, as clipped recordings do; beyond: those of them that a codec or resampling took
    beyond it, which `mser pack` clips; decibels: the most of these, 0.0 for none; unknown: clips whose peak no index
    has}; `shards` is opened with `sound`.
    """
    assert shards.peak is not None
    most = max(int(shards.peak.max(initial=0)), 32768)
    return {
        "clips": int((shards.peak >= 32767).sum()),
        "beyond": int((shards.peak > 32768).sum()),
        "decibels": round(20 * math.log10(most / 32768), 2),
        "unknown": int((shards.peak == 0).sum()),
    }


@dataclass(frozen=True)
class _Voices:
    """Speakers told apart by corpus."""

    codes: NDArray[np.int64]  # (n,) number in `names`, -1 where no speaker is named
    names: list[tuple[str, str]]  # (corpus, speaker)


def _voices(shards: ShardSet) -> _Voices:
    corpus, speaker = shards.coded["corpus"], shards.coded["speaker"]
    pairs = corpus.codes.astype(np.int64) * len(speaker.names) + speaker.codes  # (n,)
    found, codes = np.unique(pairs, return_inverse=True)
    names = [(corpus.names[pair // len(speaker.names)], speaker.names[pair % len(speaker.names)]) for pair in found]
    number = np.cumsum([bool(name) for _, name in names]) - 1  # without the nameless
    number[[not name for _, name in names]] = -1
    return _Voices(number[codes], [pair for pair in names if pair[1]])


def _groups(shards: ShardSet, voices: _Voices, column: Column) -> dict[str, dict[str, Any]]:
    """What `describe` tells of each value of a column."""
    label = shards.coded["label"]
    labels = [NO_LABEL if name is None else name for name in label.names]
    by_label = _cross(column, label)  # (values, labels)
    known = voices.codes >= 0
    heard = np.zeros((len(column.names), len(voices.names)), dtype=bool)
    heard[column.codes[known], voices.codes[known]] = True
    result = {}
    for i, name in enumerate(column.names):
        duration = shards.duration[column.codes == i]
        median, p95 = np.percentile(duration, (50, 95))
        facts = {"min": duration.min(), "median": median, "mean": duration.mean(dtype=np.float64), "p95": p95}
        result[str(name) or UNKNOWN] = {
            "clips": len(duration),
            "hours": round(float(duration.sum(dtype=np.float64)) / 3600, 4),
            "speakers": int(heard[i].sum()),
            "seconds": {fact: round(float(value), 3) for fact, value in (facts | {"max": duration.max()}).items()},
            "labels": dict(zip(labels, by_label[i].tolist(), strict=True)),
        }
    return result


def _cross(rows: Column, columns: Column) -> NDArray[np.int64]:
    """(len(rows.names), len(columns.names)) samples that have both values."""
    pairs = rows.codes.astype(np.int64) * len(columns.names) + columns.codes
    shape = len(rows.names), len(columns.names)
    return np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)


def _counts(column: Column) -> dict[str, int]:
    names = [UNKNOWN if name in (None, "", 0) and name is not False else str(name) for name in column.names]
    return dict(zip(names, column.counts().tolist(), strict=True))


def _unlabelled(shards: ShardSet) -> dict[str, int]:
    label, emotion = shards.coded["label"], shards.coded["emotion"]
    counts = _cross(label, emotion)[label.names.index(None)] if None in label.names else []
    return {name or UNKNOWN: int(n) for name, n in zip(emotion.names, counts, strict=False) if n}


def _parallel(shards: ShardSet) -> dict[str, int]:
    order = np.argsort(shards.source)
    starts = np.flatnonzero(np.diff(shards.source[order], prepend=-1))  # a source is not negative
    language = shards.coded["language"].codes[order]
    several = np.minimum.reduceat(language, starts) != np.maximum.reduceat(language, starts)  # (utterances,)
    sizes = np.diff(starts, append=len(order))
    return {"utterances": int(several.sum()), "clips": int(sizes[several].sum())}


def _shared(voices: _Voices, split: Column) -> list[dict[str, Any]]:
    known = voices.codes >= 0
    clips = _cross(Column(voices.codes[known], voices.names), Column(split.codes[known], split.names))
    return [
        {
            "corpus": voices.names[i][0],
            "speaker": voices.names[i][1],
            "clips": {str(split.names[j]) or UNKNOWN: int(clips[i, j]) for j in np.flatnonzero(clips[i])},
        }
        for i in np.flatnonzero((clips > 0).sum(1) > 1)
    ]


def _split_order(name: str) -> tuple[int, str]:
    return SPLITS.index(name) if name in SPLITS else len(SPLITS), name


def report_parts(report: dict[str, Any]) -> list[Table | str]:
    """The numbers of `describe` to read: tables, then a list of facts, then warnings if there are any."""
    parts: list[Table | str] = []
    for title, group in (("split", "splits"), ("language", "languages"), ("corpus", "corpora")):
        rows = report[group] | ({"all": report["all"]} if len(report[group]) > 1 else {})
        cells = [
            [name, _int(row["clips"]), f"{row['hours']:,.2f}", _int(row["speakers"])]
            + [f"{value:.2f}" for value in row["seconds"].values()]
            for name, row in rows.items()
        ]
        head = [title, "clips", "hours", "speakers", "min s", "median", "mean", "p95", "max s"]
        parts.append(Table(head, [cells]))
        if group != "corpora":
            parts.append(_label_table(title, {name: row["labels"] for name, row in rows.items()}))
    return [*parts, *_facts(report)]


def _label_table(title: str, rows: dict[str, dict[str, int]]) -> Table:
    """Clips of each label in each row; the rarest labels share a column where `WIDTH` does not suffice."""
    totals = {label: sum(row[label] for row in rows.values()) for label in next(iter(rows.values()))}
    for kept in range(len(totals), -1, -1):
        often = sorted(totals, key=lambda label: -totals[label])[:kept]
        shown = sorted((label for label in totals if label in often), key=lambda label: label == NO_LABEL)
        rest = [count(len(totals) - kept, "other")] if kept < len(totals) else []
        cells = [
            [name, *(_int(row[label]) for label in shown)]
            + [_int(sum(n for label, n in row.items() if label not in shown)) for _ in rest]
            for name, row in rows.items()
        ]
        table = Table([title, *shown, *rest], [cells])
        if table.width <= WIDTH:
            break
    return table


def _facts(report: dict[str, Any]) -> list[str]:
    def listed(counts: dict[str, int], unit: str = "") -> str:
        often = sorted(counts.items(), key=lambda item: -item[1])
        more = [f"{len(often) - NAMED} more"] if len(often) > NAMED else []
        return ", ".join([*(f"{name}{unit}: {_int(n)}" for name, n in often[:NAMED]), *more])

    parallel, shared = report["parallel"], report["shared_speakers"]
    lines = [
        f"sample rate    {listed(report['sample_rates'], ' Hz')}",
        f"gender         {listed(report['genders'])}",
        f"kind           {listed(report['kinds'])}",
        f"parallel       {_int(parallel['utterances'])} utterances in two languages or more, "
        f"{_int(parallel['clips'])} clips of them",
    ]
    if report["unlabelled"]:
        lines.append(f"without label  {listed(report['unlabelled'])}")
    if loud := report["full_scale"]:
        beyond = f", {_int(loud['beyond'])} go beyond by up to {loud['decibels']:.2f} dB" if loud["beyond"] else ""
        unknown = f"; not known of {_int(loud['unknown'])} (mser verify looks)" if loud["unknown"] else ""
        lines.append(f"full scale     touched by {count(loud['clips'], 'clip')}{beyond}{unknown}")
    warnings = []
    if identical := report["identical"]:
        if identical["unknown"]:
            unknown = f"not known of {_int(identical['unknown'])} clips, whose index has no hash of their samples"
            lines.append(f"identical      {unknown} (mser verify looks)")
        elif not identical["recordings"]:
            lines.append("identical      no audio is there twice")
        warnings = repeats.lines(identical)
    if report["speakerless"]:
        warnings.append(f"warning: clips that name no speaker: {_int(report['speakerless'])}")
    if shared:
        warnings.append(f"warning: speakers in more than one split: {_int(len(shared))}")
        for voice in shared[:NAMED]:
            warnings.append(f"  {voice['speaker']} of {voice['corpus']}: {listed(voice['clips'])}")
        if len(shared) > NAMED:
            warnings.append(f"  and {_int(len(shared) - NAMED)} more (--json FILE lists all)")
    elif len(report["splits"]) > 1:
        lines.append("speakers       none is in more than one split")
    return ["\n".join(part) for part in (lines, warnings) if part]


def _int(value: int) -> str:
    return f"{value:,}"


def draw(shards: ShardSet, folder: Path) -> None:
    """The plots of a set, as PNG files in `folder`, which is made."""
    from mser_dist.runs import plots

    folder.mkdir(parents=True, exist_ok=True)
    label, split, language = (shards.coded[name] for name in ("label", "split", "language"))
    last = sorted(range(len(label.names)), key=lambda i: label.names[i] is None)
    labels = [label.names[i] or NO_LABEL for i in last]
    order = sorted(range(len(split.names)), key=lambda i: _split_order(split.names[i]))
    splits = [split.names[i] or UNKNOWN for i in order]
    plots.durations(dict(zip(splits, (shards.duration[split.codes == i] for i in order), strict=True)),
                    folder / "durations.png")  # fmt: skip
    plots.counts(_cross(language, label)[:, last], language.names, labels, folder / "languages.png")
    plots.label_shares(_cross(split, label)[order][:, last], splits, labels, folder / "labels.png")
    voices = _voices(shards)
    known = voices.codes >= 0
    clips = _cross(Column(split.codes[known], split.names), Column(voices.codes[known], voices.names))
    plots.speakers(dict(zip(splits, clips[order], strict=True)), folder / "speakers.png")
    plots.sample_rates(_counts(shards.coded["sample_rate"]), folder / "sample_rates.png")
