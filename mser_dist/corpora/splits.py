"""Speaker-disjoint splits: no voice is heard both in training and in the test. Shares are of clips."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from mser_dist.corpora.recording import Recording
from mser_dist.errors import UserError

DRAWS = 256  # candidate assignments compared a group; more gave no closer balance on EMO-DB


def split_by_speaker(
    clips: Sequence[Recording],
    *,
    val_fraction: float | None = 0.1,
    test_fraction: float | None = 0.2,
    seed: int = 0,
    test_speakers: Collection[str] = (),
    folds: int | None = None,
    fold: int = 0,
) -> list[Recording]:
    """The clips with `split` filled in: "train", "val" or "test", each speaker in one of them.

    A split that the source prescribes wins (for all clips or none). Otherwise the speakers of each corpus and language
    are divided so that the splits' shares of the clips, and their emotions and genders, are as near to what is asked as
    whole speakers allow; at least one speaker is in every split that has a fraction. The same input and seed give the
    same splits. A speaker of several languages counts for the most frequent one.

    Args:
        val_fraction, test_fraction: of the clips; 0 leaves a split out, test_fraction=1 makes all of them test. None is
            0.1 for val and 0.2 for test, or 0 where a corpus has too few speakers of a language: val goes first
            (`without` tells which).
        test_speakers: the test's speakers by name; validation is then drawn from the others.
        folds, fold: the test is part `fold` (from 0) of the speakers dealt into `folds` parts, for cross-validation.

    Raises UserError where the speakers do not suffice.
    """
    may_go_without = {"val": val_fraction is None, "test": test_fraction is None}  # nobody has asked for it
    if test_fraction is None:
        test_fraction = min(0.2, 1 - (val_fraction or 0.0))
    if val_fraction is None:
        val_fraction = min(0.1, max(0.0, 1 - test_fraction))
    if not (0 <= val_fraction < 1 and 0 <= test_fraction <= 1 and val_fraction + test_fraction <= 1):
        raise UserError(
            f"--val-fraction {val_fraction:g} (val_fraction={val_fraction}) and --test-fraction {test_fraction:g} "
            f"(test_fraction={test_fraction}): each is 0 to 1, their sum at most 1"
        )
    if folds is not None and (folds < 2 or not 0 <= fold < folds):
        raise UserError(f"--folds {folds}, --fold {fold}: give two folds or more, and a fold from 0 to folds - 1")
    if folds is not None and test_speakers:
        raise UserError("--folds and --test-speakers both choose the test's speakers; give one of them")
    given = sum(clip.split is not None for clip in clips)
    if given == len(clips):
        return list(clips)
    if given:
        raise UserError(
            f"{given} of {len(clips)} clips name a split; fill in the split column for all of them, or for none"
        )
    if unknown := set(test_speakers) - {clip.speaker for clip in clips}:
        raise UserError(
            f"--test-speakers: no clip of {min(unknown)!r}; there are {_some({clip.speaker for clip in clips})}"
        )

    by_speaker: dict[tuple[str, str], list[Recording]] = defaultdict(list)
    for clip in clips:
        by_speaker[clip.corpus, clip.speaker].append(clip)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (corpus, speaker), own in sorted(by_speaker.items()):
        languages = Counter(clip.language for clip in own)
        groups[corpus, max(sorted(languages), key=lambda name: languages[name])].append(speaker)

    assigned: dict[tuple[str, str], str] = {}
    for (corpus, language), speakers in sorted(groups.items()):
        rng = np.random.default_rng([seed, *f"{corpus}/{language}".encode()])
        test: list[str] = []
        if folds is not None:
            if folds > len(speakers):
                raise UserError(
                    f"--folds {folds}: {corpus} has {len(speakers)} speakers of {language}; give at most that many"
                )
            test = [speakers[i] for i in rng.permutation(len(speakers))[fold::folds]]
        elif test_speakers:
            test = [speaker for speaker in speakers if speaker in test_speakers]
        chosen_by_hand = folds is not None or bool(test_speakers)
        rest = [speaker for speaker in speakers if speaker not in test]
        shares = {"val": val_fraction, "test": 0.0 if chosen_by_hand else test_fraction}
        result = dict.fromkeys(test, "test")
        for split, free in may_go_without.items():
            if free and len(rest) < 1 + sum(share > 0 for share in shares.values()):
                shares[split] = 0.0
        if rest:
            result |= _divide(
                rest, {name: by_speaker[corpus, name] for name in rest}, shares, rng, f"{corpus} ({language})"
            )
        assigned |= {(corpus, speaker): split for speaker, split in result.items()}
    return [replace(clip, split=assigned[clip.corpus, clip.speaker]) for clip in clips]


def without(clips: Collection[Recording], splits: Collection[str] = ("val", "test")) -> dict[str, list[str]]:
    """Which corpora have no clip of some of the splits: "tess (en)" → ["val"], by the clips' `split`."""
    there: dict[str, set[str | None]] = defaultdict(set)
    for clip in clips:
        there[f"{clip.corpus} ({clip.language})"].add(clip.split)
    missing = {group: [split for split in splits if split not in own] for group, own in sorted(there.items())}
    return {group: names for group, names in missing.items() if names}


def _divide(
    speakers: list[str],
    clips: dict[str, list[Recording]],
    shares: dict[str, float],
    rng: np.random.Generator,
    where: str,
) -> dict[str, str]:
    """Draw assignments of the speakers and keep the one whose splits are closest to the shares of clips asked for, and
    to the group's mix of emotions and genders.
    """
    total = len(speakers)
    shares = {split: share for split, share in shares.items() if share > 0}
    if (rest := 1 - sum(shares.values())) > 1e-9:
        shares["train"] = rest
    if len(shares) > total:
        raise UserError(
            f"{where}: {total} speakers do not make {len(shares)} speaker-disjoint splits; "
            "give the source's own splits in a manifest, or --val-fraction 0, or --test-fraction 0 or 1"
        )
    kinds = sorted({kind for own in clips.values() for clip in own for kind in _kinds(clip)})
    number = {kind: i for i, kind in enumerate(kinds)}
    counts = np.zeros((total, len(kinds)))  # [speakers, kinds]
    for i, speaker in enumerate(speakers):
        for clip in clips[speaker]:
            for kind in _kinds(clip):
                counts[i, number[kind]] += 1
    size = np.array([len(clips[speaker]) for speaker in speakers], dtype=float)
    size /= size.sum()
    overall = counts.sum(0) / counts.sum()
    wanted = list(shares.values())

    def badness(order: np.ndarray, cuts: list[int]) -> float:
        result = 0.0
        for part, share in zip(np.split(order, cuts), wanted, strict=True):
            mix = counts[part].sum(0)
            result += int((mix == 0).sum())  # an emotion absent from a split weighs most
            result += float(np.abs(mix / mix.sum() - overall).sum())
            result += abs(float(size[part].sum()) - share) / share
        return result

    def draw() -> tuple[np.ndarray, list[int]]:
        order = rng.permutation(total)
        return order, _cuts(np.cumsum(size[order]), wanted)

    order, cuts = min((draw() for _ in range(DRAWS)), key=lambda drawn: badness(*drawn))
    parts = zip(shares, np.split(order, cuts), strict=True)
    return {speakers[i]: split for split, part in parts for i in part}


def _cuts(cumulated: np.ndarray, wanted: Sequence[float]) -> list[int]:
    """Where to cut speakers in a row, whose clips add up as given, so that each part is closest to its share, and none
    is empty.
    """
    cuts: list[int] = []
    for i, share in enumerate(wanted[:-1]):
        first = cuts[-1] if cuts else 0
        target = share + (cumulated[first - 1] if first else 0.0)
        last = len(cumulated) - (len(wanted) - 1 - i)  # a speaker for each part that is still to come
        cuts.append(first + 1 + int(np.argmin(np.abs(cumulated[first:last] - target))))
    return cuts


def _kinds(clip: Recording) -> tuple[str, str]:
    return f"label {clip.label}", f"gender {clip.gender}"


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:20]) + (" …" if len(listed) > 20 else "")
