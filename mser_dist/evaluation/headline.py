"""What an evaluation says of each training in few numbers, which the training's own run gets too."""

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mser_dist.errors import UserError
from mser_dist.evaluation.means import macro_ua
from mser_dist.evaluation.report import ADAPTED
from mser_dist.evaluation.test_sets import test_sets
from mser_dist.ranks import distributed
from mser_dist.runs import tested
from mser_dist.runs.names import Name
from mser_dist.runs.record import run_id_of
from mser_dist.runs.sync import say, sync
from mser_dist.runs.tracking import Tracker

UNSEEN = "unseen languages"  # the data set that the mean over them is of
Rows = Sequence[Mapping[str, Any]]


def headline(rows: Rows, model: str) -> dict[Name, float]:
    """The mean UAs of a model over unseen and over seen languages, as metrics: ``test/ua_unseen`` and its kin."""
    means = {f"test/ua_{name}": macro_ua(rows, model, seen) for name, seen in (("unseen", False), ("seen", True))}
    return {name: mean for name, mean in means.items() if mean == mean}


def of_training(rows: Rows, model: str) -> dict[Name, float]:
    """The same with the UA of each corpus and language, and that of features adapted to the clips."""
    found = headline(rows, model)
    found |= {("test", "ua", row["corpus"], row["language"]): row["ua"] for row in rows if row["model"] == model}
    adapted = headline(rows, f"{model}{ADAPTED}")
    return found | {f"{name}{ADAPTED}": value for name, value in adapted.items()}


def last_stage(rows: Rows) -> str | None:
    """The model that an evaluation is about: of the last stage, not adapted; None of baselines."""
    return max((row["model"] for row in rows if row["model"] in ("stage1", "stage2")), default=None)


def by_set(rows: Rows, model: str, sets: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The scores of a model on each data set, as its LoggedModel has them; last the mean over unseen languages."""
    scores = [
        {"metrics": {name: row[name] for name in ("ua", "wa", "macro_f1")}, **_about(sets, row)}
        for row in rows
        if row["model"] == model
    ]
    unseen = [row for row in rows if row["model"] == model and not row["seen_language"]]
    if unseen:
        digests = "".join(_about(sets, row)["digest"] for row in unseen)
        digest = hashlib.blake2b(digests.encode(), digest_size=8).hexdigest()
        scores.append({"metrics": {"ua": macro_ua(rows, model, False)}, "name": UNSEEN, "digest": digest})
    return scores


def _about(sets: Mapping[tuple[str, str], Mapping[str, Any]], row: Mapping[str, Any]) -> dict[str, str]:
    one = sets[row["corpus"] or "", row["language"] or ""]
    return {"name": one["name"], "digest": one["digest"]}


def tell(
    tracker: Tracker, trainings: Iterable[tuple[int, Path, int]], rows: Rows, folders: list[str], send: bool
) -> None:
    """Log the headline of an evaluation; keep in each training's folder what was found of it, and send that to the
    training's own run.

    trainings: stage, run folder and step of what was evaluated. folders: the sets that it was on. What cannot be
    written or sent is said: the evaluation has it all the same. An export that is in no run folder has none to tell.
    """
    if last := last_stage(rows):
        tracker.metrics(0, headline(rows, last))
    sets = test_sets(tracker.out / "predictions.parquet", folders)
    tracker.datasets([*sets.values()])
    for stage, folder, step in trainings:
        tracker.scored(folder, step, by_set(rows, f"stage{stage}", sets))
        if not (folder / "config.yaml").is_file():
            continue
        try:
            tested.note(folder, tracker.out, step, of_training(rows, f"stage{stage}"))
        except OSError as error:
            distributed.warn(f"{folder} cannot be written ({error.strerror}): its run does not get this evaluation")
            continue
        if send and run_id_of(folder) is not None:
            _send(folder)


def _send(run: Path, patience: float = 5.0) -> None:
    """Send what MLflow lacks of a run that has ended; where that fails it is said how it is done later."""
    deadline = time.monotonic() + patience
    while True:
        try:
            sync(run)
            return
        except UserError as error:
            if (
                "is in use" in str(error) and time.monotonic() < deadline
            ):  # another evaluation's numbers are on their way
                time.sleep(0.2)
                continue
            if "was deleted" in str(error):
                say(f"warning: MLflow lacks what was found of {run}: {error}, and `mser sync {run}` sends it then")
                return
            say(f"warning: MLflow does not have what was found of {run}: `mser sync {run}` sends it later ({error})")
            return
