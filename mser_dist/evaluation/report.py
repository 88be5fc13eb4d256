"""What an evaluation tells: rows per corpus and language, their table, every clip's prediction, plots; MLflow gets all.

Languages are never pooled: a mean over languages is the mean of their own UAs.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mser_dist import __version__
from mser_dist.evaluation import protocols, summary, unseen
from mser_dist.evaluation.bootstrap import clusters_of, draw_ua
from mser_dist.evaluation.calibration import probabilities
from mser_dist.evaluation.details import Clips, details
from mser_dist.evaluation.means import left_out, macro_interval, macro_ua, means
from mser_dist.evaluation.metrics import Metrics, score
from mser_dist.evaluation.retrieval import across_languages
from mser_dist.evaluation.summary import between, shown
from mser_dist.files import whole, write_json, write_text
from mser_dist.ranks import distributed
from mser_dist.runs.names import Name
from mser_dist.runs.tracking import Tracker
from mser_dist.shards.ledger import Ledger, primary
from mser_dist.shards.shard_set import ShardSet
from mser_dist.tables import Table

if TYPE_CHECKING:
    import pyarrow

    from mser_dist.models.normalize import Statistics

ADAPTED = "_adapted"  # ends the name of a model that was
MAJORITY = "majority"  # the baseline that gives one answer to all clips, as is meant


@dataclass(frozen=True)
class Answers:
    """What a model answers to n clips of a set, out of K labels."""

    numbers: NDArray[np.int64]  # (n,) numbers of the clips in the set
    reference: NDArray[np.int64]  # (n,) numbers of their labels
    scores: NDArray[np.float32]  # (n, K)
    heard: Collection[str]  # the languages that it was trained on
    statistics: "Statistics | None" = None  # that the clips' features were normalised by
    more: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # what else the model tells of the clips: (n, …)
    ledger: Ledger | None = None  # of what it was trained on; None: not asked for
    known: Collection[int] | None = None  # numbers of the labels that it was trained on
    scale: float | None = None  # that makes scores log-probabilities up to a constant; None: they are no such thing
    temperature: float | None = None  # that they are divided by then (`calibration`); None: none was fitted

    @property
    def predicted(self) -> NDArray[np.int64]:
        """(n,) numbers of the labels that score best."""
        return self.scores.argmax(1)


@dataclass(frozen=True)
class Group:
    """A model's clips of one language in one corpus.

    model: stage1, stage2, or a baseline's name; ``…_adapted`` where features are normalised by statistics of the clips
    themselves, without their labels: of `adapted_on` clips. interval: of the UA, at 95 %, over its `speakers`; over
    its clips where they are None: not named, or one alone; None where there is one clip. found: what training heard
    of them.
    """

    model: str
    corpus: str
    language: str
    seen: bool  # in training
    metrics: Metrics
    adapted_on: int | None = None
    interval: tuple[float, float] | None = None
    speakers: int | None = None
    found: unseen.Found | None = None
    protocols: Mapping[str, Any] = field(default_factory=dict)  # as of `protocols.row`
    details: Mapping[str, Any] = field(default_factory=dict)  # as of `details.details`

    @property
    def stage(self) -> int | None:
        """The stage that a model is of; None: a baseline."""
        return int(self.model[5]) if self.model.startswith("stage") else None


def of_native_labels(given: Answers, shards: ShardSet) -> Answers:
    """The same answers, -inf for labels that no clip of the same corpus and language has.

    It is told which emotions a corpus has, not which clip has which.
    """
    from mser_dist.models.normalize import corpora_of  # with torch, which those who only read reports do without

    _, group = np.unique(np.array(corpora_of(shards))[given.numbers], return_inverse=True)
    has = np.zeros((group.max() + 1, given.scores.shape[1]), dtype=bool)
    has[group, given.reference] = True
    scores = np.where(has[group], given.scores, -np.inf).astype(given.scores.dtype)
    return replace(given, scores=scores, more=protocols.masked(given.more, has[group]))


def measure(answers: Mapping[str, Answers], shards: ShardSet, labels: Sequence[str]) -> list[Group]:
    """Metrics of every model, corpus and language; of a model, those of the languages seen in training first."""
    groups = []
    speaker, gender, label = (shards.column(name) for name in ("speaker", "gender", "label"))
    known: dict[int, unseen.Unseen] = {}  # by ledger: several models may have one
    for model, given in answers.items():
        heard = set(map(primary, given.heard))
        corpora, languages = (shards.column(name)[given.numbers] for name in ("corpus", "language"))
        pairs = set(zip(corpora, languages, strict=True))
        for is_new, corpus, language in sorted((primary(one[1]) not in heard, *one) for one in pairs):
            mine = (corpora == corpus) & (languages == language)
            found = score(given.reference[mine], given.predicted[mine], given.scores.shape[1])
            adapted_on = None
            if model.endswith(ADAPTED):
                assert given.statistics is not None
                adapted_on = given.statistics.clips[f"{corpus} {language}"]
            own = given.numbers[mine]
            about = _interval(given, mine, speaker[own])
            told = None
            if given.ledger is not None:
                if id(given.ledger) not in known:
                    known[id(given.ledger)] = unseen.Unseen(given.ledger, shards)
                told = known[id(given.ledger)].of(corpus, language, sorted({*map(str, label[own])}), own)
            votes = [(shards.votes or {}).get(number) for number in own.tolist()]
            clips = Clips(speaker[own], gender[own], shards.duration[own], votes)
            scored = given.reference[mine], given.scores[mine], given.scale, given.temperature
            more = details(labels, *scored, clips)
            groups.append(Group(model, corpus, language, not is_new, found, adapted_on, *about, told, details=more))
    return groups


def _interval(
    given: Answers, mine: NDArray[np.bool_], speaker: NDArray[Any]
) -> tuple[tuple[float, float] | None, int | None]:
    """The UA's 95 % interval over the clips `mine`, whose speakers are given, and over how many speakers it is."""
    cluster, by_speaker = clusters_of(speaker)
    if len(cluster) < 2:
        return None, None
    drawn = draw_ua(given.reference[mine], given.predicted[mine], cluster, given.scores.shape[1])
    return drawn.interval(), drawn.clusters if by_speaker else None


def as_row(group: Group) -> dict[str, Any]:
    """A line of the zero-shot table, ready for JSON."""
    m = group.metrics
    numbers = {"n": m.n, "k": m.k, "chance": m.chance, "ua": m.ua, "wa": m.wa, "macro_f1": m.macro_f1}
    what: dict[str, Any] = {"model": group.model, "stage": group.stage, "adapted_on": group.adapted_on}
    what |= {"corpus": group.corpus, "language": group.language, "seen_language": group.seen}
    low, high = group.interval or (None, None)
    what |= {"ua_low": low, "ua_high": high, "speakers": group.speakers}
    what |= numbers | {"constant": m.constant is not None, **group.details}
    what |= group.found.as_row() if group.found else {}
    return {**what, **group.protocols}


def warnings(groups: Sequence[Group], labels: Sequence[str]) -> list[str]:
    """What a reader of the numbers should know, a line each: labels that do not count, answers that are constant."""
    said = []
    models = list(dict.fromkeys(group.model for group in groups))
    first = [group for group in groups if group.model == models[0]]  # the others score the same clips
    lacking = [{labels[i] for i, own in enumerate(group.metrics.confusion) if not own.any()} for group in first]
    if nowhere := set.intersection(*lacking):
        named = ", ".join(sorted(nowhere))
        said.append(f"no clip has the label {named}: it can be answered, and counts for no UA and no chance")
    more = [(place(group), sorted(lacks - nowhere)) for group, lacks in zip(first, lacking, strict=True)]
    if some := [f"{where} ({', '.join(lacks)})" for where, lacks in more if lacks]:
        said.append(f"labels that no clip of a language has do not count there: {', '.join(some)}")
    if alone := [place(group) for group in first if group.interval and group.speakers is None]:
        said.append(f"no two speakers are named in {', '.join(alone)}: the interval there is of these voices alone")
    for model in (model for model in models if model != MAJORITY):
        own = [group for group in groups if group.model == model]
        total = np.sum([group.metrics.confusion for group in own], axis=0)
        answered = np.flatnonzero(total.sum(0))
        if len(answered) == 1 < np.count_nonzero(total.sum(1)):
            what = f"answers {labels[answered[0]]!r} to all {total.sum()} clips"
            said.append(f"{shown(model)} {what}: it does not tell them apart, and its numbers are those of chance")
        elif constant := [f"{place(g)} ({labels[g.metrics.constant]})" for g in own if g.metrics.constant is not None]:
            said.append(f"{shown(model)} gives one answer to all clips of {', '.join(constant)}")
    return [*unseen.leak_lines(map(_told, groups)), *said]


def _told(group: Group) -> dict[str, Any]:
    """The part of a row that its ledger makes."""
    of = {"corpus": group.corpus, "language": group.language}
    return of | (group.found.as_row() if group.found else {})


def place(group: Group) -> str:
    """Names a group's clips to a person."""
    return place_name(group.corpus, group.language)


def place_name(corpus: str, language: str) -> str:
    """Names a corpus's clips of a language to a person."""
    return f"{language} of {corpus}"


def retrieval(answers: Mapping[str, Answers], shards: ShardSet) -> list[dict[str, Any]]:
    """How well clips find those of other languages, of the models that have embeddings (`across_languages`)."""
    language, found = shards.column("language"), []
    named = zip(shards.column("corpus"), shards.column("speaker"), strict=True)  # a speaker is one of a corpus
    speaker = np.array([f"{corpus}/{name}" if name else "" for corpus, name in named])
    for model, given in answers.items():
        if (embedding := given.more.get("embedding")) is not None:
            own = given.numbers
            of_clips = given.reference, language[own], shards.source[own], speaker[own]
            found += [{"model": model, **row} for row in across_languages(embedding, *of_clips)]
    return found


def zero_shot_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table that a person reads: a section a model. What was adapted says to how many clips, without labels.

    Where ledgers are known, a column says what is zero-shot; of older reports, whether training heard the language.
    """
    adapted = any(row["adapted_on"] is not None for row in rows)
    known = any("zero_shot" in row for row in rows)
    head = ["model", "corpus", "language", "zero-shot" if known else "seen", *(["adapted"] if adapted else [])]
    head += ["n", "chance", "UA", "95 %", "WA", "macroF1"]
    sections = []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = []
        for row in (row for row in rows if row["model"] == model):
            what = [shown(model), row["corpus"], row["language"]]
            what.append(unseen.shown(row) if known else "yes" if row["seen_language"] else "no")
            what += ["" if row["adapted_on"] is None else str(row["adapted_on"])] if adapted else []
            chance, ua, *others = (f"{row[name]:.3f}" for name in ("chance", "ua", "wa", "macro_f1"))
            lines.append([*what, str(row["n"]), chance, ua, between(row["ua_low"], row["ua_high"]), *others])
        for seen, name in ((True, "seen languages"), (False, "unseen languages")):
            mean = macro_ua(rows, model, seen)
            if mean == mean:
                blank = ["", unseen.together(rows, model, seen) if known else "", "", ""] + [""] * adapted
                interval = between(*(macro_interval(rows, model, seen) or (None, None)))
                lines.append([shown(model), f"mean over {name}", *blank, f"{mean:.3f}", interval, "", ""])
        sections.append(lines)
    return Table(head, sections, align="llll" + "r" * (len(head) - 4))


def predictions(answers: Mapping[str, Answers], shards: ShardSet, labels: Sequence[str]) -> "pyarrow.Table":
    """A row for every model and clip, for ``pandas.read_parquet``: the columns

    model (stage1, stage1_adapted …), key, corpus, language, speaker (null where the set names none), gender (the same),
    label, predicted, duration in seconds, and for each label the float32 ``score_<label>``: stage 1's cosine, stage 2's
    log-likelihood, a baseline's log-probability or decision value. `predicted` scores best. ``probability_<label>``:
    calibrated if the model is; null where scores tell of none. ``generated`` where free answers were asked for.
    """
    import pyarrow

    parts = []
    for model, given in answers.items():
        columns: dict[str, Any] = {}
        texts: dict[str, Iterable[Any]] = {"model": [model] * len(given.numbers)}
        texts["key"] = map(shards.key, given.numbers)
        texts |= {
            name: shards.column(name)[given.numbers] for name in ("corpus", "language", "speaker", "gender", "label")
        }
        texts["predicted"] = (labels[choice] for choice in given.predicted)
        for name, values in texts.items():
            columns[name] = pyarrow.array([value or None for value in values], pyarrow.string())
        columns["duration"] = pyarrow.array(shards.duration[given.numbers], pyarrow.float32())
        known = None
        if given.scale is not None:
            known = probabilities(given.scores, given.scale, given.temperature or 1.0).astype(np.float32)
        for i, label in enumerate(labels):
            columns[f"score_{label}"] = pyarrow.array(given.scores[:, i].astype(np.float32), pyarrow.float32())
        for i, label in enumerate(labels):
            column = pyarrow.nulls(len(given.numbers), pyarrow.float32()) if known is None else known[:, i]
            columns[f"probability_{label}"] = pyarrow.array(column, pyarrow.float32())
        if any("generated" in each.more for each in answers.values()):
            said = given.more.get("generated", [None] * len(given.numbers))
            columns["generated"] = pyarrow.array(list(said), pyarrow.string())
        parts.append(pyarrow.table(columns))
    return pyarrow.concat_tables(parts)


def publish(
    tracker: Tracker,
    title: str,
    groups: Sequence[Group],
    predicted: "pyarrow.Table",
    labels: list[str],
    told: Sequence[str] = (),
    protocol: bool = False,
    found: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the table, the predictions and the plots into the run folder, and log them. `told`: below the table.
    protocol: others are asked for, and have a table and metrics. found: as of `retrieval`."""
    from pyarrow import parquet

    rows = [as_row(group) for group in groups]
    below = protocols.tables(rows, protocol) if all("protocols" in row for row in rows) else []
    parts = [zero_shot_table(rows), *below, *told, *warnings(groups, labels), *left_out(rows), *unseen.notes(rows)]
    table, out = "\n\n".join(map(str, [*parts, *summary.below(rows, found)])), tracker.out
    write_text(out / "table.txt", table + "\n")
    with whole(out / "predictions.parquet") as staging:
        parquet.write_table(predicted, staging, compression="zstd")
    files = [out / "table.txt", out / "predictions.parquet", *_draw(groups, rows, labels, out)]
    numbers: dict[Name, float] = {("ua", g.model, g.corpus, g.language): g.metrics.ua for g in groups}
    for g in groups:
        ends = zip(("ua_low", "ua_high"), g.interval or (), strict=False)
        numbers |= {(name, g.model, g.corpus, g.language): end for name, end in ends}
    for model in dict.fromkeys(group.model for group in groups):
        for seen in (True, False):
            mean = macro_ua(rows, model, seen)
            if mean == mean:
                numbers[f"ua/{model}/{'seen' if seen else 'unseen'}"] = mean
    numbers |= protocols.numbers(rows, protocol)
    tracker.metrics(0, numbers | summary.numbers(rows, found))
    tracker.table(summary.flat(rows), "zero_shot.json")
    tracker.describe(f"{unseen.kind(rows)} {title}\n\n```\n{table}\n```")
    for path in files:
        tracker.artifact(path)
        if path.stem.startswith("confusion_"):
            tracker.image(path, path.stem, 0)


def conclude(
    tracker: Tracker | None,
    title: str,
    answers: Mapping[str, Answers],
    shards: ShardSet,
    labels: list[str],
    told: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """The report on all answers, {"zero_shot": rows, "warnings": lines, …, **more}; on rank 0, which has the tracker,
    its warnings are said, and all is written and logged. `title` says of what the evaluation is; `told` are warnings of
    which the answers know nothing.
    """
    groups, found = protocols.told(measure(answers, shards, labels), answers, shards), retrieval(answers, shards)
    rows = [*map(as_row, groups)]
    said = [*told, *warnings(groups, labels), *left_out(rows)]
    result: dict[str, Any] = {"version": __version__, "labels": labels, "zero_shot": rows, "means": means(rows)}
    result |= {"retrieval": found, "warnings": said} | more
    if ledgers := {model: given.ledger.summary() for model, given in answers.items() if given.ledger is not None}:
        result["ledger"] = {"models": ledgers, "notes": unseen.notes(rows)}
    if tracker:
        for line in said:
            distributed.warn(line)
        asked = bool(more.get("protocol", {}).get("asked"))
        publish(tracker, title, groups, predictions(answers, shards, labels), labels, told, asked, found)
        result |= {"mlflow_run_id": tracker.run_id, "tracking_uri": tracker.uri}
        write_json(tracker.out / "report.json", result)
    return result


def _draw(groups: Sequence[Group], rows: list[dict[str, Any]], labels: list[str], out: Path) -> list[Path]:
    """The plots, as PNG files in `out`."""
    from mser_dist.runs import plots

    pictures = [out / "ua_by_language.png"]
    plots.ua_by_language(rows, pictures[0])
    for model in dict.fromkeys(group.model for group in groups):
        tables = {
            f"{group.language}, {'seen' if group.seen else 'unseen'} ({group.corpus})": group.metrics.confusion
            for group in groups
            if group.model == model
        }
        pictures.append(out / f"confusion_{model}.png")
        plots.confusions(tables, labels, f"{shown(model)}: confusion by language", pictures[-1])
        own = [row for row in rows if row["model"] == model and "reliability" in row]
        if own:
            pictures.append(out / f"reliability_{model}.png")
            plots.reliability(own, f"{shown(model)}: as sure as it is right?", pictures[-1])
    return pictures
