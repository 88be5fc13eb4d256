"""What is compared: a system is one model of one evaluation (stage2, svm, …), or a training by its validation.

Read from run folders, or from an MLflow experiment; there a run's folder is preferred, where it is still there.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from mser_dist import config as cfg
from mser_dist.config.chosen import WITHOUT_RESULT
from mser_dist.config.file import flatten, read_saved
from mser_dist.errors import UserError
from mser_dist.evaluation.metrics import score
from mser_dist.files import read_json
from mser_dist.runs.folder import UNSAID, written_by
from mser_dist.runs.record import run_id_of

Place = tuple[str, str]
"""Corpus and language."""

SEEDS = ("stage1.seed", "stage2.seed")
VALIDATION: Place = ("validation", "")  # of a training
# Of an evaluation, those that are not seen by its clips and labels.
_EVALUATION = ("dtype", "attention", "data.max_seconds")
_PROTOCOL = {"protocol.score": "sum", "protocol.instructions": "1"}  # and as evaluations without the keys were made


@dataclass(frozen=True, eq=False)
class Clips:
    """The n clips that were asked about, in the order of their keys, and the labels to choose from."""

    corpus: NDArray[np.str_]  # (n,), and so are the next four; "" is not named
    language: NDArray[np.str_]
    speaker: NDArray[np.str_]
    key: NDArray[np.str_]
    label: NDArray[np.str_]
    labels: tuple[str, ...]  # in the order of the alphabet
    native: bool  # only those labels competed for a clip that its corpus has
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        told = hashlib.sha256(repr((self.labels, self.native)).encode())
        for column in (self.corpus, self.language, self.key, self.label):
            told.update(("\x1f".join(column.tolist()) + "\x1e").encode("utf-8", "surrogatepass"))
        object.__setattr__(self, "digest", told.hexdigest())

    @property
    def reference(self) -> NDArray[np.int64]:
        """(n,) numbers of the clips' labels."""
        return np.searchsorted(np.array(self.labels), self.label)

    @property
    def names(self) -> list[tuple[str, ...]]:
        """What tells each clip from all others, its label among it: one that was labelled anew is another."""
        columns = (self.corpus, self.language, self.key, self.label)
        return [*zip(*(column.tolist() for column in columns), strict=True)]

    def at(self, place: Place) -> NDArray[np.bool_]:
        """(n,) which clips are of a corpus and language."""
        mine: NDArray[np.bool_] = (self.corpus == place[0]) & (self.language == place[1])
        return mine

    def some(self, mine: NDArray[np.bool_]) -> "Clips":
        """Those of the clips."""
        corpus, language, speaker, key, label = (
            column[mine] for column in (self.corpus, self.language, self.speaker, self.key, self.label)
        )
        return Clips(corpus, language, speaker, key, label, self.labels, self.native)


@dataclass(frozen=True, eq=False)
class System:
    """A model of an evaluation, or a training.

    run: the evaluation, to a person. params: dotted keys of the trainings behind it, from stage1. or stage2. on, and
    of how it was evaluated; None: not known. behind: the trainings. scores: ua, wa, macro_f1 and k of each place.
    seen: places whose language was heard in training. clips, predicted: None where predictions are lacking.
    """

    run: str
    model: str
    params: Mapping[str, str] | None
    behind: frozenset[str]
    scores: Mapping[Place, Mapping[str, float]]
    seen: frozenset[Place] = frozenset()
    clips: Clips | None = None
    predicted: NDArray[np.int16] | None = None  # (n,) numbers of the labels
    validated_on: str = ""  # of a training


@dataclass(frozen=True)
class Training:
    """A finished training. identity: its MLflow run, else its folder; behind: its own, and those it builds on."""

    identity: str
    name: str
    stage: int
    params: dict[str, str]
    behind: frozenset[str]
    validation: dict[str, float]

    def system(self) -> System | None:
        """The training by its validation; None where it has none."""
        if not self.validation:
            return None
        data = f"stage{self.stage}.data."
        own = {key.removeprefix(data): cell(value) for key, value in self.params.items() if key.startswith(data)}
        on = f"{own['val_split']} of {own['sets']}; labels {own['labels']}"
        for key, value in own.items():
            if key.startswith(("languages", "keep", "drop")) and value not in ("", "{}"):
                on += f"; {key} {value}"
        scores = {VALIDATION: self.validation}
        return System(self.name, f"stage{self.stage}", self.params, self.behind, scores, validated_on=on)


def cell(text: str | None) -> str:
    """A parameter's value to a person: of a list its items, of None nothing set."""
    if text is None:
        return ""
    listed = text.startswith("[") and text.endswith("]")
    return text[1:-1].replace("'", "") if listed else "null" if text == "None" else text


# ---- parameters


def trained_params(stage: int, flat: Mapping[str, str], version: str, first: Training | None) -> dict[str, str]:
    """The parameters of a training, each key behind ``stage1.`` or ``stage2.``; of the `first` stage's too.

    flat: its config as dotted keys, that of an earlier version without those that are new, and maybe with others.
    """
    defaults = _defaults(stage)
    whole = {key: value for key, value in flat.items() if key in defaults or _within(key, defaults)}
    for key, value in defaults.items():
        if key not in whole and not any(own.startswith(f"{key}.") for own in whole):
            whole[key] = value
    if stage == 2 and first is not None:
        del whole["stage1"]  # a path, which says less than what was trained there
    own = {key: value for key, value in whole.items() if key == "stage1" or not key.startswith(WITHOUT_RESULT)}
    named = {f"stage{stage}.{key}": value for key, value in own.items()} | {f"stage{stage}.version": version}
    return (first.params if first else {}) | named


@cache
def _defaults(stage: int) -> dict[str, str]:
    """What a training of a stage does whose config does not say."""
    return flatten(cfg.Stage1()) if stage == 1 else flatten(cfg.Stage2()) | UNSAID


def _within(key: str, defaults: Mapping[str, str]) -> bool:
    """Whether a key is within one whose value is a mapping of any keys."""
    parts = key.split(".")
    return any(".".join(parts[:i]) in defaults for i in range(1, len(parts)))


def evaluation_params(flat: Mapping[str, str], prefix: str = "") -> dict[str, str]:
    """How it was evaluated, beside the clips and labels: keys behind ``eval.``."""
    found = {f"eval.{key}": flat[f"{prefix}{key}"] for key in _EVALUATION if f"{prefix}{key}" in flat}
    return found | {f"eval.{key}": flat.get(f"{prefix}{key}", value) for key, value in _PROTOCOL.items()}


def baseline_params(flat: Mapping[str, str]) -> dict[str, str]:
    """Of a baseline: the clips that it was fitted to, and what heard them."""
    heard = ("stage1.data.", "stage1.encoder.", "stage1.seed", "stage1.engine.dtype")
    own = {key: value for key, value in flat.items() if key.startswith(heard)}
    fitted = {key: own[key] for key in own if not key.removeprefix("stage1.").startswith(WITHOUT_RESULT)}
    return fitted | evaluation_params(flat, "on.")


# ---- files


def read_config(folder: Path) -> dict[str, str]:
    """The config of a run folder as dotted keys. `UserError` if it cannot be read."""
    path = folder / "config.yaml"
    try:
        return read_saved(path)
    except (OSError, ValueError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): leave {folder} out") from error


class Reader:
    """Reads trainings and evaluations; `notes` are lines on what a reader of the comparison should know."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._trainings: dict[Path, Training | None] = {}
        self._clips: dict[str, Clips] = {}

    def training(self, folder: Path) -> Training | None:
        """The training in a folder; None where there is none, or it has not ended."""
        folder = folder.resolve()
        if folder not in self._trainings:
            self._trainings[folder] = self._read_training(folder)
        return self._trainings[folder]

    def _read_training(self, folder: Path) -> Training | None:
        if not all((folder / name).is_file() for name in ("config.yaml", "summary.json")):
            return None
        flat = read_config(folder)
        if flat.get("stage") not in ("1", "2"):
            return None
        stage = int(flat["stage"])
        first = None
        if stage == 2:
            first = self.training(linked(folder, 1) or Path(flat["stage1"]))
        identity = run_id_of(folder) or str(folder)
        params = trained_params(stage, flat, written_by(folder), first)
        behind = frozenset({identity}) | (first.behind if first else frozenset())
        validation = read_json(folder / "summary.json").get("validation") or {}
        return Training(identity, shown_path(folder), stage, params, behind, validation)

    def evaluation(
        self,
        name: str,
        file: Callable[[str], Path | None],
        known: Mapping[str, tuple[Mapping[str, str] | None, frozenset[str]]],
        native: bool,
        logged: Mapping[str, float] | None = None,
    ) -> list[System]:
        """The systems of an evaluation.

        file: gives one of its files by name, None where it lacks. known: params and trainings behind a model, by what
        the model's name begins with. logged: its metrics in MLflow, for where there is no file.
        """
        rows = _rows(file)
        predictions = self._predictions(name, file("predictions.parquet"), native)
        models = list(dict.fromkeys([*predictions, *(row["model"] for row in rows)]))
        systems = []
        for model in models:
            mine = [row for row in rows if row["model"] == model]
            for row in (row for row in mine if row.get("leaks")):
                line = f"{name}: {row['language']} of {row['corpus']} leaks: {row['leaks']}"
                self.notes += [line] if line not in self.notes else []
            seen = frozenset(_place(row) for row in mine if row.get("seen_language", True))
            params, behind = next((known[one] for one in known if model.startswith(one)), (None, frozenset()))
            if model in predictions:
                clips, predicted = predictions[model]
                scores = scores_of(clips, predicted)
                seen = seen if mine else frozenset(scores)  # without a report nothing is known to be unseen
                systems.append(System(name, model, params, behind, scores, seen, clips, predicted))
            else:
                reported = {_place(row): row for row in mine}
                systems.append(System(name, model, params, behind, reported, seen))
        if not systems and logged:
            systems = [*_logged(name, logged, known)]
        if not systems:
            self.notes.append(f"{name} is left out: it has neither predictions nor a report")
        elif not predictions:
            self.notes.append(f"{name} has no predictions that can be read: nothing of it is paired")
        return systems

    def _predictions(self, name: str, path: Path | None, native: bool) -> dict[str, tuple[Clips, NDArray[np.int16]]]:
        """The clips and answers of each model."""
        import pyarrow
        from pyarrow import compute, parquet

        if path is None:
            return {}
        columns = ("model", "corpus", "language", "speaker", "key", "label", "predicted")
        try:
            schema = parquet.read_schema(path).names
            table = parquet.read_table(path, columns=list(columns))
        except (OSError, ValueError, KeyError, pyarrow.ArrowException):  # cut, or of something else
            return {}
        if any(column not in table.column_names for column in columns):
            return {}
        asked = {column.removeprefix("score_") for column in schema if column.startswith("score_")}
        labels = tuple(sorted(asked | {*table["label"].to_pylist()} | {*table["predicted"].to_pylist()} - {None}))
        found = {}
        for model in table["model"].unique().to_pylist():
            own = table.filter(compute.equal(table["model"], model))
            own = own.sort_by([(column, "ascending") for column in ("corpus", "language", "key", "label")])
            texts = {one: np.array([value or "" for value in own[one].to_pylist()], dtype=np.str_) for one in columns}
            corpus, language, speaker, key, label = (texts[one] for one in columns[1:6])
            clips = Clips(corpus, language, speaker, key, label, labels, native)
            clips = self._clips.setdefault(clips.digest, clips)  # one copy of what many answered to
            found[model] = clips, np.searchsorted(np.array(labels), texts["predicted"]).astype(np.int16)
        return found


def _rows(file: Callable[[str], Path | None]) -> list[dict[str, Any]]:
    """The rows of an evaluation's report: as it wrote them, or as MLflow has them; of folds, over all of them."""
    for name, part in (("report.json", "zero_shot"), ("folds.json", "results")):
        if path := file(name):
            rows = read_json(path).get(part) or ()
            return [{"model": f"stage{row.get('stage')}"} | row for row in rows]  # 0.1.0 named the stage alone
    if path := file("zero_shot.json"):
        found = read_json(path)
        return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]
    return []


def _place(row: Mapping[str, Any]) -> Place:
    return row["corpus"] or "", row["language"] or ""


def scores_of(clips: Clips, predicted: NDArray[np.int16]) -> dict[Place, dict[str, float]]:
    """ua, wa, macro_f1, k and n of each place, from (n,) numbers of the predicted labels."""
    found = {}
    for place in sorted({*zip(clips.corpus.tolist(), clips.language.tolist(), strict=True)}):
        mine = clips.at(place)
        m = score(clips.reference[mine], predicted[mine].astype(np.int64), len(clips.labels))
        found[place] = {"ua": m.ua, "wa": m.wa, "macro_f1": m.macro_f1, "k": m.k, "n": m.n}
    return found


def _logged(
    name: str,
    metrics: Mapping[str, float],
    known: Mapping[str, tuple[Mapping[str, str] | None, frozenset[str]]],
) -> Iterable[System]:
    """Systems by the mean UAs that MLflow has of them, over unseen languages where it has that."""
    for model in dict.fromkeys(key.split("/")[1] for key in metrics if key.startswith("ua/") and key.count("/") == 2):
        which = next(one for one in ("unseen", "seen") if f"ua/{model}/{one}" in metrics)
        params, behind = next((known[one] for one in known if model.startswith(one)), (None, frozenset()))
        value = metrics[f"ua/{model}/{which}"]
        yield System(name, model, params, behind, {("logged", f"mean over {which} languages"): {"ua": value}})


def linked(folder: Path, stage: int) -> Path | None:
    """The run folder of the stage that a run builds on or evaluates, as it was when it did."""
    try:
        links = json.loads((folder / "mlflow.json").read_text(encoding="utf-8"))["links"]
        return Path(links[f"mser.stage{stage}_run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def shown_path(path: Path) -> str:
    """A path as a person would type it here."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def of_model(systems: Sequence[System], names: Sequence[str]) -> list[System]:
    """The systems whose model is named, with its variants: stage2 is stage2_adapted too."""
    known = sorted({one.model for one in systems})
    for name in names:
        if not any(f"{model}_".startswith(f"{name}_") for model in known):
            raise UserError(f"--model {name}: there is {', '.join(known)}")
    return [one for one in systems if any(f"{one.model}_".startswith(f"{name}_") for name in names)]
