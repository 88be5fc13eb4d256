"""Cross-validation by speaker, planned: which speakers each fold tests, and the configs of what it runs.

A fold is trained on the speakers of all others and tested on its own, so that every clip is tested once, by a model
that has not heard its voice. A speaker is one of a corpus: of several languages it is one voice, as for `mser pack`.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from mser_dist import config as cfg
from mser_dist.config.data_keys import DataConfig
from mser_dist.config.file import find_config, load_training, read_yaml
from mser_dist.config.model_keys import CacheConfig
from mser_dist.errors import UserError
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.examples import open_training_clips
from mser_dist.tables import count

DEFAULT = 10  # folds, where there are so many speakers
STAGE2 = "stage2."  # begins the words that are for stage 2 alone
_SHARED = ("data.", "engine.", "tracking.", "seed=")  # begin the words that are for both stages


@dataclass(frozen=True)
class Training:
    """A training of a fold: ``mser train WORDS``, and the config that this loads."""

    words: list[str]
    config: cfg.Stage1 | cfg.Stage2


@dataclass(frozen=True)
class Fold:
    """The speakers that one fold tests, as a person names them; `clips` is how many clips they have."""

    number: int  # from 1
    speakers: list[str]
    clips: int
    trainings: list[Training]
    evaluation: cfg.Evaluation


@dataclass(frozen=True)
class Plan:
    """A whole cross-validation. `base` is the config that all folds share; `warnings` are lines for a person."""

    base: cfg.Stage1
    folds: list[Fold]
    warnings: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        return Path(self.base.out)

    @property
    def clips(self) -> int:
        return sum(fold.clips for fold in self.folds)


def plan(config: str, words: Sequence[str], *, stage2: str | None = None, folds: int | None = None) -> Plan:
    """The folds of ``mser folds CONFIG WORDS``, with checked configs. Reads the sets' indexes, and writes nothing.

    Raises UserError where the speakers do not make the folds: too few, clips without one, a label that no other fold
    trains on; and for configs that cannot be.
    """
    defaults = ["data.split=all", "data.val_split=null"]
    if not any(word.startswith("data.val_split=") for word in words):
        defaults.append("train.val_every=0")  # of a preset: it would be told that it has no effect
    words1 = [*defaults, *(word for word in words if not word.startswith(STAGE2))]
    base = load_training(config, words1)
    if not isinstance(base, cfg.Stage1):
        raise UserError(
            f"{config} is a config of stage 2: folds begin with stage 1, which must not hear a fold's speakers either: "
            f"give a config of stage 1 first, and this one by --stage2 {config}"
        )
    if stage2 is not None and read_yaml(find_config(stage2)).get("stage") != 2:
        raise UserError(
            f"--stage2 {stage2} is no config of stage 2: it sets no `stage: 2` (`mser config` lists presets)"
        )
    own2 = [word.removeprefix(STAGE2) for word in words if word.startswith(STAGE2)]
    if own2 and stage2 is None:
        raise UserError(
            f"{STAGE2}{own2[0]} is a word for stage 2, and there is none: name its config by --stage2 CONFIG"
        )
    words2 = [*defaults, *(word for word in words if word.startswith(_SHARED)), *own2]
    shards = open_training_clips(base.data)
    name, speakers = speakers_of(shards)
    parts = cut(*_counted(shards, speakers), folds)
    labels = shards.column("label")
    in_fold = [np.isin(speakers, part) for part in parts]
    found = []
    for number, (part, mine) in enumerate(zip(parts, in_fold, strict=True), 1):
        if unlearned := sorted(set(labels) - set(labels[~mine])):
            raise UserError(
                f"only speakers of fold {number} ({', '.join(part)}) have clips of {unlearned[0]!r}, and its training "
                "would have none: give another number of --folds, or leave the label out of data.labels"
            )
        found.append(_fold(number, part, int(mine.sum()), name, base, (config, words1), (stage2, words2)))
    lacks = [
        f"fold {fold.number} has no clip of {', '.join(missing)}: its UA is the mean over its other labels"
        for fold, mine in zip(found, in_fold, strict=True)
        if (missing := [label for label in base.data.labels if label in set(labels) - set(labels[mine])])
    ]
    return Plan(base, found, lacks)


def speakers_of(shards: ShardSet) -> tuple[str, Any]:
    """(field to filter speakers by, (n,) its values of the clips): the name alone where no two corpora share one."""
    corpora, names = shards.column("corpus"), shards.column("speaker")
    if nameless := np.flatnonzero([not name for name in names]).tolist():
        raise UserError(
            f"{shards.where(nameless[0])}: {count(len(nameless), 'clip')} of {len(names)} without a speaker, and folds "
            "are by speaker: pack the set with its speakers' names, or leave these clips out by data.drop"
        )
    pairs = set(zip(corpora, names, strict=True))
    if len({name for _, name in pairs}) == len(pairs):
        return "speaker", names.astype(str)
    return "corpus/speaker", np.array([f"{corpus}/{name}" for corpus, name in zip(corpora, names, strict=True)])


def _counted(shards: ShardSet, speakers: Any) -> tuple[dict[str, int], dict[str, str]]:
    """Clips of each speaker, and its group: the corpus, and the language that it speaks most."""
    places = [" ".join(map(str, pair)) for pair in zip(shards.column("corpus"), shards.column("language"), strict=True)]
    spoken: dict[str, Counter[str]] = {}
    for speaker, place in zip(speakers.tolist(), places, strict=True):
        spoken.setdefault(speaker, Counter())[place] += 1
    groups = {speaker: max(sorted(of), key=lambda place: of[place]) for speaker, of in spoken.items()}
    return {speaker: of.total() for speaker, of in spoken.items()}, groups


def cut(clips: Mapping[str, int], groups: Mapping[str, str], folds: int | None = None) -> list[list[str]]:
    """Deal speakers into folds of about as many clips, of each group and of all; the same input gives the same folds.

    clips, groups: of each speaker. folds: None is `DEFAULT`, or the number of speakers where there are fewer. The
    largest speakers are dealt first, each to the fold that has the fewest clips of its group, then of all.
    """
    if len(clips) < 2:
        raise UserError(
            f"all clips are of one speaker ({', '.join(clips)}): folds by speaker need two or more: name another set "
            "by data.sets, or check data.keep and data.drop"
        )
    number = min(DEFAULT, len(clips)) if folds is None else folds
    if number < 2:
        raise UserError(f"--folds {number}: give two folds or more")
    if number > len(clips):
        raise UserError(
            f"--folds {number}: there are {len(clips)} speakers, each whole in a fold; give at most that many"
        )
    parts: list[list[str]] = [[] for _ in range(number)]
    total = [0] * number
    for group in sorted(set(groups.values())):
        own = [0] * number
        for speaker in sorted((one for one in clips if groups[one] == group), key=lambda one: (-clips[one], one)):
            least = min(range(number), key=lambda part: (own[part], total[part]))
            parts[least].append(speaker)
            own[least] += clips[speaker]
            total[least] += clips[speaker]
    return sorted(sorted(part) for part in parts)


def _fold(
    number: int,
    speakers: list[str],
    clips: int,
    name: str,
    base: cfg.Stage1,
    first: tuple[str, list[str]],
    second: tuple[str | None, list[str]],
) -> Fold:
    """A fold's configs; `name` is the field that its speakers are filtered by."""
    data, out = base.data, Path(base.out)
    drop = {**data.drop, name: [*_listed(data.drop.get(name)), *speakers]}

    def training(stage: int, config: str, words: list[str], more: dict[str, Any]) -> Training:
        title = f"fold{number:02d}-stage{stage}"
        own = {"out": str(out / title), "tracking.run_name": title, "data.drop": drop, **more}
        words = [*words, *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in own.items())]
        return Training([config, *words], load_training(config, words))

    trainings = [training(1, *first, {})]
    if second[0] is not None:
        # Whatever its file says: a stage 2 that read other clips could hear the fold's speakers.
        names = ("sets", "split", "languages", "labels", "keep")
        more = {f"data.{key}": getattr(data, key) for key in names} | {"stage1": trainings[0].config.out}
        trainings.append(training(2, second[0], second[1], more))
    own = {one.name: getattr(data, one.name) for one in fields(DataConfig)}
    evaluation = cfg.Evaluation(
        out=str(out / f"fold{number:02d}-eval"),
        stage1=trainings[0].config.out,
        stage2=trainings[1].config.out if len(trainings) > 1 else None,
        data=DataConfig(**own | {"keep": {**data.keep, name: speakers}}),
        encoder=CacheConfig(**{one.name: getattr(base.encoder, one.name) for one in fields(CacheConfig)}),
        dtype=base.engine.dtype,
        attention=base.engine.attention,
        tracking=cfg.TrackingConfig(**asdict(base.tracking) | {"run_name": f"fold{number:02d}-eval"}),
    )
    evaluation.check()
    return Fold(number, speakers, clips, trainings, evaluation)


def _listed(values: Any) -> list[Any]:
    """A filter's values, of which one may stand for itself."""
    if values is None:
        return []
    return list(values) if isinstance(values, (list, tuple)) else [values]
