"""The systems of run folders, or of an MLflow experiment: which runs are compared, and which are left out, and why."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from mser_dist.errors import UserError
from mser_dist.evaluation.systems import (
    Reader,
    System,
    Training,
    baseline_params,
    evaluation_params,
    linked,
    read_config,
    shown_path,
    trained_params,
)
from mser_dist.runs.record import run_id_of
from mser_dist.runs.stored import Store, Stored
from mser_dist.tables import count

Known = dict[str, tuple[Mapping[str, str] | None, frozenset[str]]]


def of_folders(folders: Iterable[Path]) -> tuple[list[System], list[str]]:
    """The systems of run folders, and lines on what was left out. A folder that is no run stands for the runs in it.

    Trainings that an evaluation among them is of have no row of their own. `UserError` if nothing is left.
    """
    reader, runs = Reader(), dict[Path, Path]()
    for folder in folders:
        if not folder.exists():
            raise UserError(f"{folder}: there is no such run folder (was it deleted?): leave it out")
        below = [folder] if _kind(folder) else sorted(one for one in _folders(folder) if _kind(one))
        if not below:
            reader.notes.append(f"{folder} is left out: it is no run, and holds none")
        for one in below:
            runs.setdefault(one.resolve(), one)
    systems: list[System] = []
    trainings: list[Training] = []
    for folder in runs.values():
        kind = _kind(folder)
        if kind == "training":
            trainings += [found] if (found := reader.training(folder)) else []
        elif kind == "begun":
            reader.notes.append(f"{shown_path(folder)} is left out: it has not ended")
        else:
            systems += _evaluated(reader, folder, kind == "folds")
    return _with_trainings(reader, systems, trainings)


def _folders(folder: Path) -> list[Path]:
    return [one for one in folder.iterdir() if one.is_dir()] if folder.is_dir() else []


def _kind(folder: Path) -> str:
    """What run a folder holds: folds, evaluation, training, begun (one that has not ended), or "": none."""
    has = {name for name in ("folds.json", "report.json", "summary.json") if (folder / name).is_file()}
    if "folds.json" in has:
        return "folds"
    if not (folder / "config.yaml").is_file():
        return ""
    return "evaluation" if "report.json" in has else "training" if "summary.json" in has else "begun"


def _evaluated(reader: Reader, folder: Path, folds: bool) -> list[System]:
    """The systems of an evaluation, a baseline or a cross-validation in a folder."""
    name = shown_path(folder)
    if folds:
        known, native = _folds_known(reader, folder, read_config(folder / "folds")), False
    else:
        flat = read_config(folder)
        known = _baseline_known(flat) if "stage1.stage" in flat else _eval_known(reader, folder, flat)
        native = "True" in (flat.get("native_labels"), flat.get("on.native_labels"))
    return reader.evaluation(name, _at(folder), known, native)


def _at(folder: Path) -> Callable[[str], Path | None]:
    return lambda name: folder / name if (folder / name).is_file() else None


def _eval_known(reader: Reader, folder: Path, flat: Mapping[str, str]) -> Known:
    known: Known = {}
    for stage in (1, 2):
        if (named := flat.get(f"stage{stage}", "None")) == "None":
            continue
        place = linked(folder, stage) or Path(named)
        known[f"stage{stage}"] = _known_of(reader, shown_path(folder), reader.training(place), named, flat)
        again = place / "summary.json"
        if again.is_file() and again.stat().st_mtime > (folder / "report.json").stat().st_mtime:
            reader.notes.append(
                f"{named} ended after {shown_path(folder)} evaluated it: it may be another model by now"
            )
    return known


def _known_of(
    reader: Reader, name: str, training: Training | None, named: str, flat: Mapping[str, str]
) -> tuple[Mapping[str, str] | None, frozenset[str]]:
    """Params and trainings behind a model of an evaluation, which names its training so."""
    if training is None:
        reader.notes.append(f"the training {named} behind {name} is not there: its parameters are not known")
        return None, frozenset()
    return training.params | evaluation_params(flat), training.behind


def _baseline_known(flat: Mapping[str, str]) -> Known:
    params = baseline_params(flat)
    return {"": (params, frozenset({repr(sorted(params.items()))}))}  # the same parameters give the same baseline


def _folds_known(reader: Reader, folder: Path, base: Mapping[str, str]) -> Known:
    """All folds have the parameters that they share: those of the base and, of stage 2, of the first fold's."""
    own = frozenset({run_id_of(folder / "folds") or str(folder.resolve())})
    first = Training("", "", 1, trained_params(1, base, "", None), own, {})
    known: Known = {"stage1": (first.params, own)}
    if second := reader.training(folder / "fold01-stage2"):
        known["stage2"] = _of_first_fold(first, second.params), own
    return known


def _of_first_fold(first: Training, second: Mapping[str, str]) -> dict[str, str]:
    """Parameters of stage 2 over all folds: which speakers the first one left out is its own."""
    drop = {key.replace("stage1.", "stage2.", 1): value for key, value in first.params.items() if ".data.drop" in key}
    own = {key: value for key, value in second.items() if key.startswith("stage2.") and ".data.drop" not in key}
    return first.params | own | drop


def _with_trainings(
    reader: Reader, systems: list[System], trainings: Sequence[Training]
) -> tuple[list[System], list[str]]:
    evaluated = {one for system in systems for one in system.behind}
    behind = {one for training in trainings for one in training.behind - {training.identity}}
    alone = [one for one in trainings if one.identity not in evaluated | (behind if systems else set())]
    validated = {one.name: one.system() for one in alone}
    if silent := [name for name, system in validated.items() if system is None]:
        reader.notes.append(f"{_some(silent)} left out: neither evaluated nor validated")
    systems += [system for system in validated.values() if system is not None]
    if not systems:
        raise UserError(f"there is nothing to compare: {'; '.join(reader.notes[:3]) or 'no run was named'}")
    return systems, reader.notes


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more} {'is' if len(names) == 1 else 'are'}"


# ---- from MLflow


def of_experiment(store: Store, name: str) -> tuple[list[System], list[str]]:
    """`of_folders` of the runs of an experiment: evaluations, and trainings that none of them is of."""
    reader, runs = Reader(), store.experiment(name)
    mine = [run for run in runs if "mser.stage" in run.tags]
    if not mine:
        what = f"{count(len(runs), 'run')}, none of them of mser" if runs else "no run that is not deleted"
        raise UserError(f"the experiment {name!r} in MLflow at {store.uri} has {what}: name another one")
    if foreign := [run for run in runs if not any(tag.startswith("mser.") for tag in run.tags)]:
        reader.notes.append(f"{count(len(foreign), 'run')} of the experiment left out: not of mser")
    if unended := [_name(run) for run in mine if run.status != "FINISHED"]:
        reader.notes.append(f"{_some(unended)} left out: not FINISHED in MLflow")
    by_id = {run.run_id: run for run in mine}
    asked = {run.tags[tag] for run in mine for tag in _links(run)}
    by_id |= {run.run_id: run for run in store.runs(asked - by_id.keys())}
    trained = _Trained(reader, by_id, store)
    systems: list[System] = []
    trainings: list[Training] = []
    for run in mine:
        parent = by_id.get(run.tags.get("mlflow.parentRunId", ""))
        if run.status != "FINISHED" or (parent is not None and parent.tags.get("mser.stage") == "folds"):
            continue  # a fold is a part of its cross-validation
        if run.tags["mser.stage"] in ("1", "2"):
            trainings += [found] if (found := trained.of(run.run_id)) else []
        else:
            systems += _stored_systems(store, run, trained)
    return _with_trainings(reader, systems, trainings)


def _links(run: Stored) -> list[str]:
    """Tags of a run whose values are the ids of the trainings that it is of or builds on."""
    return [tag for tag in ("mser.stage1_run_id", "mser.stage2_run_id") if tag in run.tags]


class _Trained:
    """The trainings of an experiment, each by its run folder if that is still its own, else by what MLflow has."""

    def __init__(self, reader: Reader, runs: Mapping[str, Stored], store: Store) -> None:
        self.reader, self.runs, self.store = reader, runs, store
        self._found: dict[str, Training | None] = {}

    def of(self, run_id: str) -> Training | None:
        if run_id not in self._found:
            self._found[run_id] = self._of(self.runs[run_id]) if run_id in self.runs else None
        return self._found[run_id]

    def _of(self, run: Stored) -> Training | None:
        if run.tags.get("mser.stage") not in ("1", "2"):
            return None  # somebody's tag leads to a run that is no training
        folder = folder_of(run)
        if folder and (found := self.reader.training(folder)):
            return found
        stage = int(run.tags["mser.stage"])
        first = self.of(run.tags.get("mser.stage1_run_id", "")) if stage == 2 else None
        params = trained_params(stage, self.store.config(run), run.tags.get("mser.version", ""), first)
        behind = frozenset({run.run_id}) | (first.behind if first else frozenset())
        validation = {
            score: run.metrics[f"val/{score}"] for score in ("ua", "wa", "macro_f1") if f"val/{score}" in run.metrics
        }
        return Training(run.run_id, _name(run), stage, params, behind, validation)

    def stage2_of_folds(self, run_id: str) -> Training | None:
        """A training of stage 2 in one of the folds."""
        runs = (one for one in self.runs.values() if one.tags.get("mlflow.parentRunId") == run_id)
        return next((self.of(one.run_id) for one in runs if one.tags.get("mser.stage") == "2"), None)


def folder_of(run: Stored) -> Path | None:
    """The folder of a run, if it is there and still this run's."""
    folder = Path(run.tags.get("mser.out", ""))
    return folder if run_id_of(folder) == run.run_id else None


def _name(run: Stored) -> str:
    """A run's folder, there or not, as a person would type it here: names in MLflow are often the same."""
    return shown_path(Path(run.tags["mser.out"])) if "mser.out" in run.tags else run.name


def _stored_systems(store: Store, run: Stored, trained: _Trained) -> list[System]:
    reader, stage, folder = trained.reader, run.tags["mser.stage"], folder_of(run)
    if folder and stage == "folds" and (folder.parent / "folds.json").is_file():
        return _evaluated(reader, folder.parent, folds=True)
    own, flat = frozenset({run.run_id}), read_config(folder) if folder else store.config(run)
    if stage == "folds":
        first = Training("", "", 1, trained_params(1, flat, "", None), own, {})
        known: Known = {"stage1": (first.params, own)}
        if second := trained.stage2_of_folds(run.run_id):
            known["stage2"] = _of_first_fold(first, second.params), own
    elif stage == "baseline":
        known = _baseline_known(flat)
    else:
        known = {
            tag[5:11]: _known_of(reader, _name(run), trained.of(run.tags[tag]), f"run {run.tags[tag]}", flat)
            for tag in _links(run)
        }
    sent = ("predictions.parquet", "folds.json" if stage == "folds" else "zero_shot.json")  # what MLflow has of them

    def file(name: str) -> Path | None:
        here = _at(folder)(name) if folder else None
        return here or (store.file(run, name) if name in sent else None)

    native = "True" in (flat.get("native_labels"), flat.get("on.native_labels"))
    return reader.evaluation(_name(run), file, known, native, run.metrics)
