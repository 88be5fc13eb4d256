"""One job for each combination of values: ``mser sweep CONFIG train.lr=1e-4,3e-4 seed=0,1`` starts four.

Each is a run folder of its own in the folder `out`, and a child of one MLflow run that stands for the sweep.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mser_dist import config as cfg
from mser_dist.config.chosen import command as said_command
from mser_dist.config.fields import key_table
from mser_dist.config.file import find_config, load_any, load_evaluation, read_yaml, split_word
from mser_dist.config.validate import meant
from mser_dist.errors import UserError
from mser_dist.files import unlock_file, write_json
from mser_dist.jobs import launch, ranked
from mser_dist.runs import folder as run_folder
from mser_dist.runs.record import redact
from mser_dist.tables import count

_EVAL = "eval."  # begins the words that are for the evaluation
_UNFIT = re.compile(r"[^\w.+-]+")  # for a folder's name


@dataclass(frozen=True)
class Trial:
    """One combination."""

    name: str
    values: dict[str, str]
    config: launch.Config
    evaluation: cfg.Evaluation | None = None  # behind the training


def sweep(
    config: str,
    words: Sequence[str],
    *,
    evaluate: str | None = None,
    parallel: int | None = None,
    after: launch.Job | str | None = None,
    cluster: str | None = None,
    folder: str | Path = "runs/jobs",
    **resources: Any,
) -> list[launch.Job]:
    """Submit every combination; the jobs, in the order of `trials`. At most `parallel` run at once.

    `words` and `evaluate` are as for ``mser sweep``; the rest is as for `launch.submit`. Without SLURM, `parallel` is 1
    by default, and the call returns when the last job has been started. `ranked.settle` tells what came of it.
    """
    return submit_trials(
        trials(config, words, evaluate),
        launch.Resources(**resources),
        parallel=parallel,
        after=after,
        cluster=cluster,
        folder=folder,
    )


def submit_trials(
    planned: Sequence[Trial],
    need: launch.Resources,
    *,
    left: Sequence[Trial] | None = None,
    cluster: str | None = None,
    command: str = "",
    **how: Any,
) -> list[launch.Job]:
    """`sweep`, for trials that are already planned, of which those that are `left` (None: all) are submitted.

    command: that which asked for the sweep. `how` is as for `launch.start`.
    """
    cluster, left = cluster or launch.where(), planned if left is None else left
    for trial in planned:
        launch.check(trial.config, need, cluster)  # before there is a parent run
    check_evaluation(planned)
    join(planned, need.world_size, command)
    out = Path(planned[0].config.out).parent
    then, configs = [trial.evaluation for trial in left], [trial.config for trial in left]
    return launch.start(configs, need, name="mser-sweep", cluster=cluster, then=then, sweep=out, **how)


def is_done(trial: Trial) -> bool:
    """Whether there is nothing left to do of a trial, by its folders."""
    config = trial.config
    if isinstance(config, cfg.Evaluation):
        return run_folder.evaluated(config, [])
    if run_folder.finished(Path(config.out), config) is None:
        return False
    return trial.evaluation is None or run_folder.evaluated(trial.evaluation, [Path(config.out)])


def trials(config: str, words: Sequence[str], evaluate: str | None = None) -> list[Trial]:
    """Every combination of the values in `words`, each with its checked config, the last key changing fastest.

    evaluate: the config of an evaluation behind each training; words that begin with ``eval.`` are for it, without it.

    A comma outside brackets and quotes separates values. For a key that is a list, whose values a comma separates
    anyway, it does so between bracketed lists only: ``data.sets=a,b`` is one value, ``data.sets=[a],[a,b]`` are two.
    """
    cls = _class_of(read_yaml(find_config(config)))
    kinds = {key: kind for key, kind, _, _ in key_table(cls)}
    options: dict[str, list[str]] = {}
    theirs = [word.removeprefix(_EVAL) for word in words if word.startswith(_EVAL)]
    if evaluate is None and theirs:
        raise UserError(f"{_EVAL}{theirs[0]} is for an evaluation of each run, and there is none: add --evaluate EVAL")
    if evaluate is not None and cls is cfg.Evaluation:
        raise UserError(f"--evaluate {evaluate} is for a sweep of trainings, and {config} is an evaluation itself")
    for word in (word for word in words if not word.startswith(_EVAL)):
        key, text = split_word(word)
        key = _full(key, kinds, cls)
        if key in options:
            raise UserError(f"{key} is given twice: give all its values in one word, {key}=A,B")
        options[key] = _values(word, text, kinds.get(key, ""))
    swept = [key for key, values in options.items() if len(values) > 1]
    if not swept:
        raise UserError("nothing to sweep: give a key several values, e.g. train.lr=1e-4,3e-4 (one run: mser submit)")
    for key in ("out", "stage"):
        if key in swept:
            raise UserError(f"{key} cannot be swept: out is the folder of the sweep, and each stage has its config")
    found: list[Trial] = []
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        loaded = load_any(config, [f"{key}={value}" for key, value in chosen.items()])
        values_swept = {key: chosen[key] for key in swept}
        name = _folder_name(values_swept)
        if any(name == other.name for other in found):
            raise UserError(f"two runs of the sweep would be {loaded.out}/{name}: is a value given twice?")
        loaded.out = str(Path(loaded.out) / name)
        loaded.tracking.run_name = name
        found.append(Trial(name, values_swept, loaded, _evaluation(evaluate, theirs, loaded) if evaluate else None))
    return found


def check_evaluation(planned: Sequence[Trial]) -> None:
    """Raise `UserError` where the clips to evaluate on cannot be: that shows now, and not behind the first training."""
    first = planned[0]
    if first.evaluation is not None:
        from mser_dist.stream.examples import open_evaluation_clips

        open_evaluation_clips(first.evaluation.data, first.config.data.labels)


def _evaluation(name: str, words: Sequence[str], trained: launch.Config) -> cfg.Evaluation:
    """What evaluates a training, in a folder beside its own, which is tracked where it is."""
    keys = {word.partition("=")[0] for word in words}
    assert not isinstance(trained, cfg.Evaluation)
    if given := keys & {"out", f"stage{trained.stage}"}:
        raise UserError(f"{_EVAL}{min(given)} is what the sweep sets for each run: leave it out")
    other = f"stage{3 - trained.stage}"
    own = [f"stage{trained.stage}={trained.out}", *([] if other in keys else [f"{other}=null"])]
    loaded = load_evaluation(name, [*words, *own, f"out={trained.out}-eval"])
    tracking = trained.tracking
    if "tracking.experiment" not in keys:
        loaded.tracking.experiment = tracking.experiment
    loaded.tracking.uri, loaded.tracking.enabled = tracking.uri, tracking.enabled
    loaded.tracking.run_name = f"{tracking.run_name}-eval"
    return loaded


def _class_of(tree: dict[str, Any]) -> type:
    if "stage" not in tree:
        return cfg.Evaluation
    return cfg.Stage2 if tree["stage"] == 2 else cfg.Stage1


def _full(key: str, kinds: dict[str, str], cls: type) -> str:
    """The whole key, where its last part alone is given: ``lr`` for ``train.lr``."""
    if key in kinds or "." in key:
        return key
    ending = [full for full in kinds if full.endswith(f".{key}")]
    if len(ending) > 1:
        raise UserError(f"{key} may be {' or '.join(ending)}: write it in full")
    if not ending and not any(full.startswith(f"{key}.") for full in kinds):
        raise UserError(f"unknown key {key}: {meant(cls, [key])}")
    return ending[0] if ending else key


def _values(word: str, text: str, kind: str) -> list[str]:
    """The values of one word."""
    parts, depth, quote, start = [], 0, "", 0
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not text[start:at].strip():  # within a word it is an apostrophe
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    parts = [part.strip() for part in [*parts, text[start:]]]
    if kind.startswith("list") and not all(part.startswith("[") for part in parts):
        return [text]
    if len(parts) > 1 and not all(parts):
        raise UserError(
            f"{word!r}: a value between the commas is missing (null stands for none; no space behind a comma)"
        )
    return parts


def _folder_name(values: dict[str, str]) -> str:
    """``lr=1e-4_seed=0``: no comma, which would be a sweep over two folders in the words of a stage 2."""
    short = [key.split(".")[-1] for key in values]
    names = [last if short.count(last) == 1 else key for key, last in zip(values, short, strict=True)]
    plain = (_UNFIT.sub("-", value).strip("-") for value in values.values())
    return "_".join(f"{name}={value}" for name, value in zip(names, plain, strict=True))


def join(planned: Sequence[Trial], ranks: int = 1, command: str = "") -> None:
    """Make the trials children of one MLflow run that stands for the sweep; a warning where MLflow fails.

    Its record is the folder ``<out>/sweep``: the same sweep, submitted again, goes on with the same parent. It runs
    until `ranked.settle` has seen the last trial end.
    """
    first = planned[0].config
    folder = Path(first.out).parent
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds a run: choose another folder for the sweep with out=…")
    place = folder / ranked.PLACE
    launch.make_folder(place, "choose another one with out=…")
    write_json(place / "trials.json", [_noted(trial, ranks) for trial in planned])
    if not first.tracking.enabled:
        return
    from mser_dist.runs import record as records
    from mser_dist.runs import sync as tracking_sync

    tracking = cfg.TrackingConfig(experiment=first.tracking.experiment, run_name=folder.name)
    uri = records.tracking_uri(first.tracking, place)
    record = records.Record.of(place, tracking, uri)
    swept = {key: ",".join(dict.fromkeys(trial.values[key] for trial in planned)) for key in planned[0].values}
    record.run_name, record.status, record.ended, record.params = folder.name, "RUNNING", None, swept
    words = "  \n".join(f"{key}={values}" for key, values in swept.items())
    record.tags |= {"mser.sweep": str(folder.resolve()), "mser.out": str(place.resolve())}
    record.tags |= {"mser.command": records.redact(command)} if command else {}
    record.tags["mlflow.note.content"] = f"{count(len(planned), 'run')}:  \n{words}"
    handle = records.lock(place)
    try:
        if handle is None:
            raise UserError(f"{folder}: another `mser sweep` is submitting it")
        for trial in planned:
            trial.config.tracking.parent = str(place.resolve())
            if trial.evaluation is not None:
                trial.evaluation.tracking.parent = trial.config.tracking.parent
        tracking_sync.prepare_mlflow(uri)
        tracking_sync.Sender(place, record, uri).send()
    except UserError:
        raise
    except Exception as error:  # the tracker is never worth a training
        what = "the runs of the sweep have no parent there until it answers"
        tracking_sync.say(f"warning: MLflow {tracking_sync.trouble(error)}: {what}")
    finally:
        if handle is not None:
            unlock_file(handle)


def _noted(trial: Trial, ranks: int) -> dict[str, Any]:
    """What `ranked.settle` has to know of a trial."""
    of_runs = isinstance(trial.config, cfg.Evaluation)
    noted: dict[str, Any] = {
        "name": trial.name,
        "values": trial.values,
        "out": trial.config.out,
        "of_runs": of_runs,
        "evaluation": trial.evaluation.out if trial.evaluation else None,
        "command": redact(said_command(trial.config, "eval" if of_runs else "train", ranks)),
    }
    # A result that is to be done anew is told from the new one by the time of its file.
    stale = (result := ranked.result_of(noted)).is_file() and not is_done(trial)
    return noted | {"before": result.stat().st_mtime_ns if stale else None}
