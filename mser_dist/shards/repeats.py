"""Audio that is in sets more than once: across splits it is a leak, with different labels a contradiction."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.shards.shard_set import ShardSet

NAMED = 5  # recordings of a kind that are named to a person
LISTED = 1000  # that the JSON names
COPIES = 25  # of each, at most: every one is looked up in its shard's keys

KINDS = {
    "splits": "in more than one split (a leak)",
    "labels": "with different labels (a contradiction)",
    "speakers": "of different speakers",
    "others": "of one split, label and speaker",
}
"""What repeated audio can differ in, the most serious first."""


def describe(shards: ShardSet) -> dict[str, Any]:
    """What is there of audio that clips share, ready for JSON; `shards` is opened with `sound`.

    {unknown: clips whose hash is not known, recordings: of which there are several clips, clips: of these, splits,
    labels, speakers, others: {recordings, clips} of each of `KINDS`, where one that is both of two splits and of two
    labels counts for both, named: of the first `LISTED` recordings, the serious ones first, {kind: the most serious,
    count: clips, clips: the first `COPIES`, [{key, split, label, speaker}]}}. No speaker or label is none that differs.
    """
    assert shards.sound is not None
    known = np.flatnonzero(shards.sound)
    order = known[np.argsort(shards.sound[known], kind="stable")]  # (k,) clips, identical ones side by side
    sound = shards.sound[order]
    group = np.cumsum(np.concatenate([[0], sound[1:] != sound[:-1]])[: len(order)])  # (k,) from 0
    sizes = np.bincount(group)
    several = (sizes > 1)[group] if len(group) else np.zeros(0, dtype=bool)
    clips, group = order[several], np.unique(group[several], return_inverse=True)[1]
    sizes = np.bincount(group)  # (g,) clips of each repeated recording
    split, label, speaker, corpus = (shards.coded[name] for name in ("split", "label", "speaker", "corpus"))
    voice = corpus.codes[clips].astype(np.int64) * len(speaker.names) + speaker.codes[clips]
    differ = {
        "splits": _differ(group, len(sizes), split.codes[clips], _named(split.names)[split.codes[clips]]),
        "labels": _differ(group, len(sizes), label.codes[clips], _named(label.names)[label.codes[clips]]),
        "speakers": _differ(group, len(sizes), voice, _named(speaker.names)[speaker.codes[clips]]),
    }
    differ["others"] = ~(differ["splits"] | differ["labels"] | differ["speakers"])
    kind = np.argmax(np.stack(list(differ.values())), axis=0) if len(sizes) else sizes  # (g,) the first that holds
    starts = np.concatenate([[0], np.cumsum(sizes)])

    def facts(i: int) -> dict[str, Any]:
        named = {n: shards.coded[n].names[shards.coded[n].codes[i]] for n in ("split", "label", "speaker")}
        return {"key": shards.key(i), **named}

    named = [
        {"kind": list(KINDS)[kind[g]], "count": int(sizes[g]), "clips": [*map(facts, own[:COPIES].tolist())]}
        for g in np.lexsort((clips[starts[:-1]], kind))[:LISTED].tolist()
        for own in [clips[starts[g] : starts[g + 1]]]
    ]
    counts = {name: {"recordings": int(of.sum()), "clips": int(sizes[of].sum())} for name, of in differ.items()}
    unknown = len(shards) - len(known)
    return {"unknown": unknown, "recordings": len(sizes), "clips": len(clips), **counts, "named": named}


def _named(names: list[Any]) -> NDArray[np.bool_]:
    return np.array([bool(name) for name in names], dtype=bool)


def _differ(group: NDArray[np.int64], groups: int, codes: NDArray[Any], named: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(groups,) whether the named ones among a group's codes are several."""
    codes = codes.astype(np.int64)
    width = int(codes.max(initial=0)) + 1
    pairs = np.unique((group * width + codes)[named])
    return np.bincount(pairs // width, minlength=groups) > 1


def lines(report: dict[str, Any]) -> list[str]:
    """Warnings to print: how much audio is there more than once, the serious kinds first, and some of it by name."""
    said = []
    for kind, what in KINDS.items():
        if not report[kind]["recordings"]:
            continue
        recordings, clips = report[kind]["recordings"], report[kind]["clips"]
        said.append(f"warning: identical audio {what}: {recordings:,} ({clips:,} clips)")
        own = [one for one in report["named"] if one["kind"] == kind][:NAMED]
        said += [
            f"  {' = '.join(map(_clip, one['clips'][:NAMED]))}{' …' if one['count'] > NAMED else ''}" for one in own
        ]
        if own and recordings > len(own):
            said.append(f"  and {recordings - len(own):,} more")
    return said


def _clip(facts: dict[str, Any]) -> str:
    told = [str(facts[name]) for name in ("split", "label", "speaker") if facts[name]]
    return f"{facts['key']} ({', '.join(told)})" if told else str(facts["key"])
