"""What an evaluation tells: rows per corpus and language, their table, every clip's prediction, plots; MLflow gets all.

Languages are never pooled: a mean over languages is the mean of their own UAs.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.evaluation.metrics import Metrics, score
from mser_dist.files import whole, write_text
from mser_dist.runs.names import Name
from mser_dist.runs.tracking import Tracker
from mser_dist.shards.shard_set import ShardSet
from mser_dist.tables import Table

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Answers:
    """What one stage answers to n clips of a set, out of K labels."""

    numbers: NDArray[np.int64]  # (n,) numbers of the clips in the set
    reference: NDArray[np.int64]  # (n,) numbers of their labels
    scores: NDArray[np.float32]  # (n, K)
    heard: Collection[str]  # the languages that the stage was trained on

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(n,) numbers of the labels that score best."""
        return self.scores.argmax(1)


@dataclass(frozen=True)
class Group:
    """A stage's clips of one language in one corpus."""

    stage: int
    corpus: str
    language: str
    seen: bool  # in training
    metrics: Metrics


def measure(answers: Mapping[int, Answers], shards: ShardSet) -> list[Group]:
    """Metrics of every stage, corpus and language; in a stage, those of the languages seen in training first."""
    groups = []
    for stage, given in answers.items():
        corpora, languages = (shards.column(name)[given.numbers] for name in ("corpus", "language"))
        pairs = set(zip(corpora, languages, strict=True))
        for unseen, corpus, language in sorted((one[1] not in given.heard, *one) for one in pairs):
            mine = (corpora == corpus) & (languages == language)
            found = score(given.reference[mine], given.predicted[mine], given.scores.shape[1])
            groups.append(Group(stage, corpus, language, not unseen, found))
    return groups


def as_row(group: Group) -> dict[str, Any]:
    """A line of the zero-shot table, ready for JSON."""
    m = group.metrics
    numbers = {"n": m.n, "k": m.k, "chance": m.chance, "ua": m.ua, "wa": m.wa, "macro_f1": m.macro_f1}
    what = {"stage": group.stage, "corpus": group.corpus, "language": group.language, "seen_language": group.seen}
    return what | numbers | {"constant": m.constant is not None}


def warnings(groups: Sequence[Group], labels: Sequence[str]) -> list[str]:
    """What a reader of the numbers should know, a line each: labels that do not count, answers that are constant."""
    said = []
    stages = sorted({group.stage for group in groups})
    first = [group for group in groups if group.stage == stages[0]]  # the other stages score the same clips
    lacking = [{labels[i] for i, own in enumerate(group.metrics.confusion) if not own.any()} for group in first]
    if nowhere := set.intersection(*lacking):
        named = ", ".join(sorted(nowhere))
        said.append(f"no clip has the label {named}: it can be answered, and counts for no UA and no chance")
    more = [(place(group), sorted(lacks - nowhere)) for group, lacks in zip(first, lacking, strict=True)]
    if some := [f"{where} ({', '.join(lacks)})" for where, lacks in more if lacks]:
        said.append(f"labels that no clip of a language has do not count there: {', '.join(some)}")
    for stage in stages:
        own = [group for group in groups if group.stage == stage]
        total = np.sum([group.metrics.confusion for group in own], axis=0)
        answered = np.flatnonzero(total.sum(0))
        if len(answered) == 1 < np.count_nonzero(total.sum(1)):
            what = f"answers {labels[answered[0]]!r} to all {total.sum()} clips"
            said.append(f"stage {stage} {what}: it does not tell them apart, and its numbers are those of chance")
        elif constant := [f"{place(g)} ({labels[g.metrics.constant]})" for g in own if g.metrics.constant is not None]:
            said.append(f"stage {stage} gives one answer to all clips of {', '.join(constant)}")
    return said


def place(group: Group) -> str:
    """Names a group's clips to a person."""
    return f"{group.language} of {group.corpus}"


def macro_ua(rows: Iterable[Mapping[str, Any]], stage: int, seen: bool) -> float:
    """Mean UA over the languages that were, or were not, seen in training; NaN if there is none."""
    values = [row["ua"] for row in rows if row["stage"] == stage and row["seen_language"] is seen]
    return float(np.mean(values)) if values else float("nan")


def zero_shot_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table that a person reads: a section a stage."""
    head = ["stage", "corpus", "language", "seen", "n", "chance", "UA", "WA", "macroF1"]
    sections = []
    for stage in sorted({row["stage"] for row in rows}):
        lines = []
        for row in (row for row in rows if row["stage"] == stage):
            what = [str(stage), row["corpus"], row["language"], "yes" if row["seen_language"] else "no"]
            numbers = [f"{row[name]:.3f}" for name in ("chance", "ua", "wa", "macro_f1")]
            lines.append([*what, str(row["n"]), *numbers])
        for seen, name in ((True, "seen languages"), (False, "unseen languages")):
            mean = macro_ua(rows, stage, seen)
            if mean == mean:
                lines.append([str(stage), f"mean UA over {name}", "", "", "", "", f"{mean:.3f}", "", ""])
        sections.append(lines)
    return Table(head, sections, align="rlllrrrrr")


def predictions(answers: Mapping[int, Answers], shards: ShardSet, labels: Sequence[str]) -> "pyarrow.Table":
    """A row for every stage and clip, for ``pandas.read_parquet``: the columns

    stage (int8), key, corpus, language, speaker (texts; null where the set names none), label, predicted, and for each
    label the float32 ``score_<label>``: stage 1's cosine, stage 2's log-likelihood. `predicted` scores best.
    """
    import pyarrow

    parts = []
    for stage, given in answers.items():
        columns: dict[str, Any] = {"stage": pyarrow.array([stage] * len(given.numbers), pyarrow.int8())}
        texts: dict[str, Iterable[Any]] = {"key": map(shards.key, given.numbers)}
        texts |= {name: shards.column(name)[given.numbers] for name in ("corpus", "language", "speaker", "label")}
        texts["predicted"] = (labels[choice] for choice in given.predicted)
        for name, values in texts.items():
            columns[name] = pyarrow.array([value or None for value in values], pyarrow.string())
        for i, label in enumerate(labels):
            columns[f"score_{label}"] = pyarrow.array(given.scores[:, i].astype(np.float32), pyarrow.float32())
        parts.append(pyarrow.table(columns))
    return pyarrow.concat_tables(parts)


def publish(
    tracker: Tracker, title: str, groups: Sequence[Group], predicted: "pyarrow.Table", labels: list[str]
) -> None:
    """Write the table, the predictions and the plots into the run folder, and log them."""
    from pyarrow import parquet

    rows = [as_row(group) for group in groups]
    table, out = "\n\n".join([str(zero_shot_table(rows)), *warnings(groups, labels)]), tracker.out
    write_text(out / "table.txt", table + "\n")
    with whole(out / "predictions.parquet") as staging:
        parquet.write_table(predicted, staging, compression="zstd")
    files = [out / "table.txt", out / "predictions.parquet", *_draw(groups, rows, labels, out)]
    numbers: dict[Name, float] = {("ua", f"stage{g.stage}", g.corpus, g.language): g.metrics.ua for g in groups}
    for stage in sorted({group.stage for group in groups}):
        for seen in (True, False):
            mean = macro_ua(rows, stage, seen)
            if mean == mean:
                numbers[f"ua/stage{stage}/{'seen' if seen else 'unseen'}"] = mean
    tracker.metrics(0, numbers)
    tracker.table(rows, "zero_shot.json")
    tracker.describe(f"{title}\n\n```\n{table}\n```")
    for path in files:
        tracker.artifact(path)


def _draw(groups: Sequence[Group], rows: list[dict[str, Any]], labels: list[str], out: Path) -> list[Path]:
    """The plots, as PNG files in `out`."""
    from mser_dist.runs import plots

    pictures = [out / "ua_by_language.png"]
    plots.ua_by_language(rows, pictures[0])
    for stage in sorted({group.stage for group in groups}):
        tables = {
            f"{group.language}, {'seen' if group.seen else 'unseen'} ({group.corpus})": group.metrics.confusion
            for group in groups
            if group.stage == stage
        }
        pictures.append(out / f"confusion_stage{stage}.png")
        plots.confusions(tables, labels, f"stage {stage}: confusion by language", pictures[-1])
    return pictures
