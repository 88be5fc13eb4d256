"""What the folder of an evaluation or a baseline holds, read for its page: report, answers, the runs behind it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.config.file import flatten, read_yaml
from mser_dist.errors import UserError
from mser_dist.evaluation.metrics import ua
from mser_dist.evaluation.systems import linked
from mser_dist.runs.folder import written_by
from mser_dist.runs.record import status_of

# Of a row, where the version that wrote it had no such field.
_UNSAID = {
    **{"adapted_on": None, "ua_low": None, "ua_high": None, "speakers": None, "constant": False, "stage": None},
    **{"seen_language": True, "wa": float("nan"), "macro_f1": float("nan")},
}
_TEXTS = ("key", "corpus", "language", "speaker", "label", "predicted")


@dataclass(frozen=True, eq=False)
class Answered:
    """A model's answers to n clips, out of K labels, in the order of the file.

    Texts are (n,) and "" where the set does not name it; probability: None where the file has none.
    """

    key: NDArray[np.str_]
    corpus: NDArray[np.str_]
    language: NDArray[np.str_]
    speaker: NDArray[np.str_]
    label: NDArray[np.str_]
    predicted: NDArray[np.str_]
    scores: NDArray[np.float32]  # (n, K)
    probability: NDArray[np.float32] | None  # (n, K)

    def at(self, corpus: str, language: str) -> NDArray[np.bool_]:
        """(n,) which clips are of a corpus and language."""
        mine: NDArray[np.bool_] = (self.corpus == corpus) & (self.language == language)
        return mine


@dataclass(frozen=True)
class Behind:
    """A training behind an evaluation, at `place`, which its config names so. card, summary, config: empty where its
    files are gone or cannot be read."""

    stage: int
    named: str
    place: Path
    card: dict[str, Any]
    summary: dict[str, Any]
    config: dict[str, str]
    status: dict[str, Any]  # mlflow.json


@dataclass(frozen=True, eq=False)
class Evaluated:
    """All that a page tells of an evaluation. notes: what a reader should know of what is not there."""

    folder: Path
    kind: str  # evaluation or baseline
    report: dict[str, Any]
    rows: list[dict[str, Any]]
    labels: list[str]
    answers: dict[str, Answered]
    config: dict[str, str]
    tree: dict[str, Any]  # the same, as it stands in the file
    behind: list[Behind]
    status: dict[str, Any]
    version: str
    embeddings: dict[str, NDArray[np.float16]]  # (n, D) beside a model's answers
    notes: list[str] = field(default_factory=list)

    @property
    def data(self) -> str:
        """What its keys about clips begin with."""
        return "on.data." if self.kind == "baseline" else "data."

    @property
    def models(self) -> list[str]:
        """In the order of the rows."""
        return list(dict.fromkeys(row["model"] for row in self.rows))


def read(folder: Path) -> Evaluated:
    """Read the folder of an evaluation or a baseline.

    `UserError` where there is none, it has not ended, or its report is damaged. What else is damaged or gone is noted.
    """
    _check(folder)
    report = _report(folder / "report.json")
    rows = [_row(folder, row) for row in report["zero_shot"]]
    try:
        tree = read_yaml(folder / "config.yaml")
        config = flatten(tree)
    except (OSError, UserError, AttributeError) as error:
        raise UserError(
            f"{folder / 'config.yaml'} cannot be read ({' '.join(str(error).split())}): evaluate again"
        ) from error
    notes: list[str] = []
    answers, scored = _answers(folder / "predictions.parquet", notes)
    labels = report.get("labels") or scored
    answers = _of_this_report(answers, rows, labels, notes)
    kind = "baseline" if "stage1.stage" in config else "evaluation"
    behind = [*_behind(folder, config, notes)] if kind == "evaluation" else []
    vectors = dict(_embeddings(folder, answers, notes))
    status = _json(folder / "mlflow.json")
    version = report.get("version") or written_by(folder)
    return Evaluated(folder, kind, report, rows, labels, answers, config, tree, behind, status, version, vectors, notes)


def _check(folder: Path) -> None:
    """`UserError` for a folder that holds no evaluation that has ended."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder (was it deleted?): name that of an evaluation")
    if (folder / "folds.json").is_file():
        raise UserError(f"{folder} is a cross-validation: name the evaluation of a fold, e.g. {folder / 'fold01-eval'}")
    if (folder / "report.json").is_file() and (folder / "config.yaml").is_file():
        return
    if (folder / "summary.json").is_file() or (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} is the folder of a training: evaluate it with `mser eval`, and name that folder")
    if (folder / "eval" / "report.json").is_file():
        raise UserError(f"{folder} is no evaluation; did you mean {folder / 'eval'}?")
    if (folder / "config.yaml").is_file():
        running = status_of(folder) == "RUNNING"
        how = "it is still running, or was killed" if running else "it has not ended"
        raise UserError(f"{folder} has no report.json: {how}; give its command again and let it end")
    raise UserError(
        f"{folder} is no evaluation: it has no report.json; name the out= of `mser eval` or `mser baseline`"
    )


def _report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = report["zero_shot"]
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise KeyError("zero_shot")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no report that can be read ({error!r}): evaluate again") from error
    return dict(report)


def _row(folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with all that every version writes; 0.1.0 named the stage alone."""
    row = {"model": f"stage{row.get('stage')}"} | _UNSAID | dict(row)
    if not all(isinstance(row.get(name), int | float) for name in ("ua", "n", "k")) or "language" not in row:
        raise UserError(f"{folder / 'report.json'} has a row without ua, n, k or language: evaluate again")
    return {"chance": 1 / row["k"], "corpus": None} | row


def _answers(path: Path, notes: list[str]) -> tuple[dict[str, Answered], list[str]]:
    """The answers of each model, and the labels that they score."""
    import pyarrow
    from pyarrow import compute, parquet

    if not path.is_file():
        notes.append("predictions.parquet is not there: no confusion matrices, and no clips")
        return {}, []
    try:
        table = parquet.read_table(path)
        if lacking := [name for name in ("model", *_TEXTS) if name not in table.column_names]:
            raise ValueError(f"no column {', '.join(lacking)}")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        what = " ".join(str(error).split())
        notes.append(f"predictions.parquet cannot be read ({what}): no confusion matrices, and no clips")
        return {}, []
    labels = [name.removeprefix("score_") for name in table.column_names if name.startswith("score_")]
    found = {}
    for model in table["model"].unique().to_pylist():
        own = table.filter(compute.equal(table["model"], model))
        texts = {name: np.array([value or "" for value in own[name].to_pylist()], dtype=np.str_) for name in _TEXTS}
        scores = _matrix(own, "score_", labels)
        probable = all(f"probability_{label}" in own.column_names for label in labels)
        chances = _matrix(own, "probability_", labels) if probable else None
        if chances is not None and not np.isfinite(chances).all():
            chances = None  # of a model that has none
        found[model] = Answered(**texts, scores=scores, probability=chances)
    return found, labels


def _matrix(table: Any, prefix: str, labels: list[str]) -> NDArray[np.float32]:
    """(n, K) of the labels' columns; NaN of null."""
    columns = [table[prefix + label].to_numpy().astype(np.float32) for label in labels]
    return np.stack(columns, 1) if columns else np.zeros((len(table), 0), np.float32)


def _of_this_report(
    answers: dict[str, Answered], rows: list[dict[str, Any]], labels: list[str], notes: list[str]
) -> dict[str, Answered]:
    """The answers, unless they are not those that the report is of."""
    for row in rows:
        if row["model"] in answers:
            given = answers[row["model"]]
            mine = given.at(row["corpus"] or "", row["language"] or "")
            table = confusion(given, mine, labels)
            if table is None or int(mine.sum()) != row["n"] or abs(float(ua(table)) - row["ua"]) > 1e-9:
                notes.append(
                    "predictions.parquet is of another evaluation than report.json: no confusion matrices, and no clips"
                )
                return {}
    return answers


def confusion(given: Answered, mine: NDArray[np.bool_], labels: list[str]) -> NDArray[np.int64] | None:
    """(K, K) counts of the clips `mine`, label by answer; None where one is none of the labels, or there is no clip."""
    number = {label: i for i, label in enumerate(labels)}
    table = np.zeros((len(labels), len(labels)), np.int64)
    for label, predicted in zip(given.label[mine].tolist(), given.predicted[mine].tolist(), strict=True):
        if label not in number or predicted not in number:
            return None
        table[number[label], number[predicted]] += 1
    return table if table.any() else None


def _behind(folder: Path, config: Mapping[str, str], notes: list[str]) -> Iterator[Behind]:
    """The trainings that an evaluation names, and the stage 1 that its stage 2 was built on where it names another."""
    ended = (folder / "report.json").stat().st_mtime
    found = {
        stage: _training(folder, stage, config) for stage in (1, 2) if config.get(f"stage{stage}", "None") != "None"
    }
    for one in found.values():
        card = one.place / "export" / "card.json"
        if not one.card:
            gone = "is not there any more: what it was trained on is not known"
            notes.append(f"the export of stage {one.stage}, {one.named}, {gone}")
        elif card.stat().st_mtime > ended:
            notes.append(f"{one.named} was exported after this evaluation: it may be another model by now")
    if 2 in found and found[2].config.get("stage1"):
        built_on = _training(found[2].place, 1, found[2].config)
        if 1 not in found or built_on.place.resolve() != found[1].place.resolve():
            yield built_on
    yield from found.values()


def _training(folder: Path, stage: int, config: Mapping[str, str]) -> Behind:
    """The training of a stage that a run folder's config names."""
    named = config[f"stage{stage}"]
    place = linked(folder, stage) or Path(named)
    try:
        flat = flatten(read_yaml(place / "config.yaml"))
    except (OSError, UserError, AttributeError):
        flat = {}
    card, summary, status = (_json(place / name) for name in ("export/card.json", "summary.json", "mlflow.json"))
    return Behind(stage, named, place, card, summary, flat, status)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _embeddings(
    folder: Path, answers: Mapping[str, Answered], notes: list[str]
) -> Iterator[tuple[str, NDArray[np.float16]]]:
    """Each model's embeddings where they are there, one for each of its answers."""
    for model, given in answers.items():
        path = folder / f"embeddings_{model}.npy"
        if not path.is_file():
            continue
        try:
            found = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            notes.append(f"{path.name} cannot be read ({' '.join(str(error).split())}): no map of it")
            continue
        if found.ndim != 2 or len(found) != len(given.key):
            notes.append(f"{path.name} is of other clips than predictions.parquet: no map of it")
        elif not np.isfinite(found).all():
            notes.append(f"{path.name} has numbers that are not finite: no map of it")
        else:
            yield model, found
