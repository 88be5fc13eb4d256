"""``mser folds``: cross-validation by speaker: every fold trained and evaluated, then all of them pooled."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mser_dist import __version__, tables
from mser_dist import config as cfg
from mser_dist.cli.jobs import say_page
from mser_dist.config.chosen import chosen
from mser_dist.config.file import to_yaml
from mser_dist.errors import Stopped, UserError
from mser_dist.files import lock_file, read_json, unlock_file, whole, write_json, write_text
from mser_dist.jobs import local_ranks
from mser_dist.jobs.folds import Fold, Plan, Training, plan
from mser_dist.ranks import distributed, preempt
from mser_dist.ranks.session import session
from mser_dist.runs import folder
from mser_dist.runs.record import status_of

# Exit codes of a training that somebody has stopped: with a save, or in the seconds before it listens.
_STOPPED = (preempt.SAVED, 128 + signal.SIGINT, 128 + signal.SIGTERM)
_RECORD = "folds"  # folder in `out` of what MLflow gets


@dataclass(frozen=True)
class Left:
    """What of a fold is not done yet."""

    fold: Fold
    trainings: list[Training]
    evaluation: bool


def folds(
    config: str, words: Sequence[str], *, stage2: str | None = None, number: int | None = None, nproc: int = 1
) -> dict[str, Any]:
    """Do what is left of the folds, print the table, and return the report (also ``<out>/folds.json``).

    Writes besides ``<out>/``: table.txt, predictions.parquet, confusion_*.png, and the run folders of every fold.
    Raises `UserError` for what a user can mend, and `Stopped` where a signal ended it: the same call goes on there.
    """
    if nproc < 1:
        raise UserError(f"--nproc must be 1 or more, not {nproc}")
    if (ranks := distributed.discover().world_size) > 1:
        raise UserError(f"mser folds starts its own processes, and is one of {ranks} here: start it once, with --nproc")
    planned = plan(config, words, stage2=stage2, folds=number)
    for fold in planned.folds:
        for training in fold.trainings:
            cfg.batch_shape(training.config.train, nproc)
    if (planned.out / "config.yaml").exists():
        raise UserError(f"{planned.out} holds a run: choose another folder for the folds with out=…")
    left = [_left(fold) for fold in planned.folds]
    for line in planned.warnings:
        distributed.warn(line)
    done = planned.out / "folds.json"
    if any(one.trainings or one.evaluation for one in left) or not done.is_file():
        with _claimed(planned.out), preempt.listen() as flag:
            _work(planned, left, nproc, flag, {"folds": str(len(left)), "stage2": str(stage2)})
    report: dict[str, Any] = read_json(done)
    _show(planned)
    return report


def _left(fold: Fold) -> Left:
    """Raises `UserError` where a run folder holds another config's run."""
    trainings = [t for t in fold.trainings if folder.finished(Path(t.config.out), t.config) is None]
    return Left(
        fold,
        trainings,
        bool(trainings) or not folder.evaluated(fold.evaluation, [Path(one.config.out) for one in fold.trainings]),
    )


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Hold the folder for the block."""
    place = out / _RECORD
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"cannot write to the folder {out}: {error.strerror}: choose another with out=…") from error
    handle = lock_file(place / ".lock")
    if handle is None:
        raise UserError(f"another `mser folds` is at work in {out}: wait for it to end, or choose another out=…")
    try:
        yield
    finally:
        unlock_file(handle)


def _work(planned: Plan, left: Sequence[Left], nproc: int, flag: preempt.Flag, facts: dict[str, str]) -> None:
    """Train and evaluate what is left, as children of one MLflow run, and pool all folds."""
    from mser_dist.runs.tracking import tracked

    place = planned.out / _RECORD
    folder.prepare(place, to_yaml(planned.base), anew=status_of(place) == "FINISHED")
    tracking = cfg.TrackingConfig(
        experiment=planned.base.tracking.experiment,
        uri=planned.base.tracking.uri,
        run_name=planned.out.resolve().name,
        enabled=planned.base.tracking.enabled,
        parent=planned.base.tracking.parent,
    )
    with tracked(tracking, place, {"mser.stage": "folds"}, chosen(planned.base) | facts, True) as tracker:
        assert tracker is not None
        for one in left:
            _fold(one, len(left), nproc, flag, str(place.resolve()))
        _pool(planned, tracker)


def _fold(left: Left, of: int, nproc: int, flag: preempt.Flag, parent: str) -> None:
    fold = left.fold
    named = f"fold {fold.number}/{of}"
    stopped = Stopped(f"fold {fold.number} of {of}", None, "before its end; the same command goes on from there")
    steps = [f"train stage {training.config.stage}" for training in left.trainings]
    if not (steps or left.evaluation):
        print(f"▶ {named}: done before", flush=True)
    for training, step in zip(left.trainings, steps, strict=True):
        if flag.number:
            raise stopped
        _say(f"{named}: {step} without {_names(fold)}")
        words = [*training.words, f"tracking.parent={parent}"]
        code = local_ranks.local(nproc, ["train", *words])
        if code in _STOPPED:
            raise stopped
        if code == 2:
            sys.exit(code)  # the rank has said why
        if code:
            raise UserError(
                f"{named}: `mser train` ended with code {code} (see above); `mser folds` again goes on there"
            )
    if left.evaluation:
        if flag.number:
            raise stopped
        _say(f"{named}: evaluate on {tables.count(fold.clips, 'clip')} of {_names(fold)}")
        fold.evaluation.tracking.parent = parent
        try:
            _evaluate(fold.evaluation)
        except Stopped:
            raise stopped from None


def _say(title: str) -> None:
    print(f"\n▶ {title}", flush=True)


def _names(fold: Fold) -> str:
    shown = ", ".join(fold.speakers[:6])
    return f"{'speaker' if len(fold.speakers) == 1 else 'speakers'} {shown}{' …' if len(fold.speakers) > 6 else ''}"


def _evaluate(config: cfg.Evaluation) -> None:
    """In this process, which has loaded torch since the first fold; the next training gets all of its GPU's memory."""
    with session():
        import torch

        from mser_dist.evaluation.evaluate import evaluate
        from mser_dist.evaluation.report import zero_shot_table

        report = evaluate(config)
        tables.show(zero_shot_table(report["zero_shot"]))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _pool(planned: Plan, tracker: Any) -> None:
    """Write the files of the whole, and log them."""
    from pyarrow import parquet

    from mser_dist.evaluation import pooled
    from mser_dist.evaluation.summary import shown
    from mser_dist.runs import plots

    out, labels = planned.out, planned.base.data.labels
    predictions = pooled.read({fold.number: Path(fold.evaluation.out) for fold in planned.folds})
    results = pooled.pool(predictions, labels)
    table = pooled.table(results, {fold.number: fold.speakers for fold in planned.folds})
    with whole(out / "predictions.parquet") as staging:
        parquet.write_table(predictions, staging, compression="zstd")
    warnings = [*planned.warnings, *_leaks(planned)]
    text = "\n\n".join([str(table), *warnings])
    write_text(out / "table.txt", text + "\n")
    files = [out / "table.txt", out / "predictions.parquet"]
    for model in dict.fromkeys(one.model for one in results):
        own = {f"{one.language} of {one.corpus}": one.overall.confusion for one in results if one.model == model}
        files.append(out / f"confusion_{model}.png")
        plots.confusions(own, labels, f"{shown(model)}: confusion over all folds", files[-1])
    for step, numbers in pooled.metrics_of(results):
        tracker.metrics(step, numbers)
    tracker.describe(f"{tables.count(len(planned.folds), 'fold')} by speaker\n\n```\n{text}\n```")
    report = {
        "version": __version__,
        "labels": labels,
        "clips": planned.clips,
        "folds": [
            {"fold": fold.number, "speakers": fold.speakers, "n": fold.clips, "out": fold.evaluation.out}
            for fold in planned.folds
        ],
        "results": pooled.as_rows(results),
        "warnings": warnings,
        "mlflow_run_id": tracker.run_id,
        "tracking_uri": tracker.uri,
    }
    write_json(out / "folds.json", report)
    for path in [*files, out / "folds.json"]:
        tracker.artifact(path)


def _leaks(planned: Plan) -> list[str]:
    """What the ledgers say of a fold's clips: a model that training starts from may have heard them."""
    from mser_dist.evaluation.unseen import leak_lines

    reports = {fold.number: read_json(Path(fold.evaluation.out) / "report.json") for fold in planned.folds}
    return [f"fold {fold}: {line}" for fold, report in reports.items() for line in leak_lines(report["zero_shot"])]


def _show(planned: Plan) -> None:
    from mser_dist.evaluation import pooled

    predictions = pooled.read({fold.number: Path(fold.evaluation.out) for fold in planned.folds})
    results = pooled.pool(predictions, planned.base.data.labels)
    print()
    tables.show(pooled.table(results, {fold.number: fold.speakers for fold in planned.folds}))
    print(f"table, predictions, plots and the folds' run folders: {planned.out}", flush=True)
    say_page(planned.out / _RECORD)
