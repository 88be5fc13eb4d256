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
from mser_dist.config.fields import key_table
from mser_dist.config.file import find_config, load_any, read_yaml, split_word
from mser_dist.config.validate import meant
from mser_dist.errors import UserError
from mser_dist.files import unlock_file
from mser_dist.jobs import launch
from mser_dist.tables import Table, count

_UNFIT = re.compile(r"[^\w.+-]+")  # for a folder's name


@dataclass(frozen=True)
class Trial:
    """One combination."""

    name: str
    values: dict[str, str]
    config: launch.Config


def sweep(
    config: str,
    words: Sequence[str],
    *,
    parallel: int | None = None,
    after: launch.Job | str | None = None,
    cluster: str | None = None,
    folder: str | Path = "runs/jobs",
    **resources: Any,
) -> list[launch.Job]:
    """Submit every combination; the jobs, in the order of `trials`. At most `parallel` run at once.

    `words` are as for ``mser sweep``; the rest is as for `launch.submit`. Without SLURM, `parallel` is 1 by default,
    and the call returns when the last job has been started.
    """
    return submit_trials(
        trials(config, words),
        launch.Resources(**resources),
        parallel=parallel,
        after=after,
        cluster=cluster,
        folder=folder,
    )


def submit_trials(
    planned: Sequence[Trial], need: launch.Resources, *, cluster: str | None = None, **how: Any
) -> list[launch.Job]:
    """`sweep`, for trials that are already planned; `how` is as for `launch.start`."""
    cluster = cluster or launch.where()
    for trial in planned:
        launch.check(trial.config, need, cluster)  # before there is a parent run
    join(planned)
    return launch.start([trial.config for trial in planned], need, name="mser-sweep", cluster=cluster, **how)


def trials(config: str, words: Sequence[str]) -> list[Trial]:
    """Every combination of the values in `words`, each with its checked config, the last key changing fastest.

    A comma outside brackets and quotes separates values. For a key that is a list, whose values a comma separates
    anyway, it does so between bracketed lists only: ``data.sets=a,b`` is one value, ``data.sets=[a],[a,b]`` are two.
    """
    cls = _class_of(read_yaml(find_config(config)))
    kinds = {key: kind for key, kind, _, _ in key_table(cls)}
    options: dict[str, list[str]] = {}
    for word in words:
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
        found.append(Trial(name, values_swept, loaded))
    return found


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


def join(planned: Sequence[Trial]) -> None:
    """Make the trials children of one MLflow run that stands for the sweep; a warning where MLflow fails.

    Its record is the folder ``<out>/sweep``: the same sweep, submitted again, goes on with the same parent. The parent
    does nothing by itself, so it is FINISHED at once.
    """
    first = planned[0].config
    folder = Path(first.out).parent
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds a run: choose another folder for the sweep with out=…")
    if not first.tracking.enabled:
        return
    from mser_dist.runs import record as records
    from mser_dist.runs import sync as tracking_sync

    uri = records.tracking_uri(first.tracking, Path(first.out))
    place = folder / "sweep"
    launch.make_folder(place, "choose another one with out=…")
    record = records.Record.of(place, first.tracking, uri)
    swept = {key: ",".join(dict.fromkeys(trial.values[key] for trial in planned)) for key in planned[0].values}
    record.run_name, record.status, record.params = folder.name, "FINISHED", swept
    words = "  \n".join(f"{key}={values}" for key, values in swept.items())
    record.tags = {
        "mser.sweep": str(folder.resolve()),
        "mlflow.note.content": f"{count(len(planned), 'run')}:  \n{words}",
    }
    handle = records.lock(place)
    try:
        if handle is None:
            raise UserError(f"{folder}: another `mser sweep` is submitting it")
        record.ended = records.now_ms()
        tracking_sync.prepare_mlflow(uri)
        tracking_sync.Sender(place, record, uri).send()
    except UserError:
        raise
    except Exception as error:  # the tracker is never worth a training
        tracking_sync.say(f"warning: MLflow {tracking_sync.trouble(error)}: the runs of the sweep have no parent there")
        return
    finally:
        if handle is not None:
            unlock_file(handle)
    for trial in planned:
        trial.config.tracking.parent = record.run_id


def scores(result: dict[str, Any]) -> dict[str, float]:
    """What tells a run's result in a few numbers: a training's validation, or an evaluation's mean UAs."""
    if "zero_shot" not in result:
        return dict(result["validation"])
    from mser_dist.evaluation.report import macro_ua

    rows = result["zero_shot"]
    last = f"stage{max(row['stage'] for row in rows)}"
    return {"ua_unseen": macro_ua(rows, last, False), "ua_seen": macro_ua(rows, last, True)}


def results_table(planned: Sequence[Trial], results: "Sequence[dict[str, Any] | UserError]") -> Table:
    """A line for each run: its values and scores, or why it failed."""
    numbers = [{} if isinstance(result, UserError) else scores(result) for result in results]
    columns = list(dict.fromkeys(name for row in numbers for name in row))
    failures = [str(result) if isinstance(result, UserError) else "" for result in results]
    why = [[failure] if any(failures) else [] for failure in failures]
    rows = [
        [trial.name, *(f"{row[name]:.3f}" if name in row else "" for name in columns), *failure]
        for trial, row, failure in zip(planned, numbers, why, strict=True)
    ]
    head = ["run", *columns, *(["failed"] if any(failures) else [])]
    return Table(head, [rows], align=f"l{'r' * len(columns)}{'l' if any(failures) else ''}")
