"""Speaker-disjoint splits: no voice is heard both in training and in the test."""

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
    test_fraction: float = 0.2,
    seed: int = 0,
    test_speakers: Collection[str] = (),
    folds: int | None = None,
    fold: int = 0,
) -> list[Recording]:
    """The clips with `split` filled in: "train", "val" or "test", each speaker in one of them.

    A split that the source prescribes wins (for all clips or none). Otherwise the speakers of each corpus and language
    are divided by the fractions, at least one in every split that has a fraction, so that emotions and genders are as
    evenly spread as speakers allow; the same input and seed give the same splits. A speaker of several languages counts
    for the most frequent one.

    Args:
        val_fraction, test_fraction: of the speakers; 0 leaves a split out, test_fraction=1 makes all of them test.
            val_fraction=None is 0.1, or 0 where a corpus has too few speakers of a language for a val of its own.
        test_speakers: the test's speakers by name; validation is then drawn from the others.
        folds, fold: the test is part `fold` (from 0) of the speakers dealt into `folds` parts, for cross-validation.

    Raises UserError where the speakers do not suffice.
    """
    may_go_without = val_fraction is None  # nobody has asked for a val
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
        if may_go_without and 0 < len(rest) < 2 + (shares["test"] > 0):
            shares["val"] = 0.0
        if rest:
            result |= _divide(
                rest, {name: by_speaker[corpus, name] for name in rest}, shares, rng, f"{corpus} ({language})"
            )
        assigned |= {(corpus, speaker): split for speaker, split in result.items()}
    return [replace(clip, split=assigned[clip.corpus, clip.speaker]) for clip in clips]


def _divide(
    speakers: list[str],
    clips: dict[str, list[Recording]],
    shares: dict[str, float],
    rng: np.random.Generator,
    where: str,
) -> dict[str, str]:
    """Draw assignments of the speakers and keep the one whose splits are closest to the group's mix of emotions and
    genders.
    """
    total = len(speakers)
    sizes = {split: max(1, round(share * total)) for split, share in shares.items() if share > 0}
    need_train = sum(shares.values()) < 1 - 1e-9
    while sum(sizes.values()) + need_train > total and max(sizes.values()) > 1:  # rounding took training's last speaker
        sizes[max(sizes, key=lambda split: sizes[split])] -= 1
    if sum(sizes.values()) + need_train > total:
        raise UserError(
            f"{where}: {total} speakers do not make {len(sizes) + need_train} speaker-disjoint splits; "
            "give the source's own splits in a manifest, or --val-fraction 0, or --test-fraction 0 or 1"
        )
    sizes["train"] = total - sum(sizes.values())
    if not need_train:  # rounding must not leave a speaker over for a training set that was not asked for
        sizes[max(sizes, key=lambda split: shares.get(split, 0.0))] += sizes.pop("train")
    kinds = sorted({kind for own in clips.values() for clip in own for kind in _kinds(clip)})
    counts = np.zeros((total, len(kinds)))  # [speakers, kinds]
    for i, speaker in enumerate(speakers):
        for kind, count in Counter(kind for clip in clips[speaker] for kind in _kinds(clip)).items():
            counts[i, kinds.index(kind)] = count
    overall = counts.sum(0) / counts.sum()
    splits = np.repeat(np.array(list(sizes)), list(sizes.values()))  # [speakers], permuted in every draw

    def badness(order: np.ndarray) -> float:
        parts = [counts[order[splits == split]].sum(0) for split in sizes if sizes[split]]
        missing = sum(
            int((part[overall > 0] == 0).sum()) for part in parts
        )  # an emotion absent from a split weighs most
        return missing + sum(float(np.abs(part / part.sum() - overall).sum()) for part in parts)

    best = min((rng.permutation(total) for _ in range(DRAWS)), key=badness)
    return {speakers[i]: str(split) for i, split in zip(best, splits, strict=True)}


def _kinds(clip: Recording) -> tuple[str, str]:
    return f"label {clip.label}", f"gender {clip.gender}"


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:20]) + (" …" if len(listed) > 20 else "")
