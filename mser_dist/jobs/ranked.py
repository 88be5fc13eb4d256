"""The runs of a sweep, ranked: by the mean UA over what is unseen in all that were evaluated, else by validation.

Everything is read from ``<out>/sweep/trials.json`` and the runs' own folders: the command that waits for a sweep, and
each of its jobs as it ends, can bring the table and the sweep's MLflow run up to date.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mser_dist.errors import UserError
from mser_dist.files import read_json, unlock_file, write_json, write_text
from mser_dist.runs import record as records
from mser_dist.runs import sync
from mser_dist.runs.folder import newer
from mser_dist.tables import Table, count

PLACE = "sweep"  # folder in `out` of the record of the whole
_SHOWN = {"ua_unseen": "unseen UA", "ua_seen": "seen UA", "ua": "validation UA", "wa": "WA", "macro_f1": "macroF1"}
_PATIENCE = 60.0  # seconds that a job waits for another one that brings the table up to date


@dataclass(frozen=True)
class Outcome:
    """What a trial came to. scores: by their names, none until it has ended; interval: 95 %, of the first score; rows:
    of its evaluation's report, those of the last stage.
    """

    name: str
    values: dict[str, str]
    out: Path
    evaluation: Path | None
    command: str
    scores: dict[str, float] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    failed: str = ""
    ended: bool = False  # a training without validation has no scores then either
    rows: Sequence[Mapping[str, Any]] = ()

    @property
    def score(self) -> float:
        """What it is ranked by; -inf where there is nothing."""
        value = next(iter(self.scores.values()), float("nan"))
        return value if value == value else float("-inf")


@dataclass(frozen=True)
class Ranking:
    """Outcomes, the best first; over: mean over the seeds of what differs in its seed alone, by a trial's name; notes:
    what the ranking is over, where that is not all.
    """

    outcomes: list[Outcome]
    over: dict[str, tuple[float, int]]
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Outcome | None:
        return self.outcomes[0] if self.outcomes and self.outcomes[0].score > float("-inf") else None

    @property
    def left(self) -> int:
        """Trials that have not ended."""
        return sum(not one.ended and not one.failed for one in self.outcomes)

    @property
    def failed(self) -> int:
        return sum(bool(one.failed) for one in self.outcomes)

    def table(self) -> Table:
        """A line a trial."""
        names = list(dict.fromkeys(name for one in self.outcomes for name in one.scores))
        seeds = any(number > 1 for _, number in self.over.values())
        between, why = any(one.interval for one in self.outcomes), any(one.failed for one in self.outcomes)
        head = ["", "run", *(_SHOWN.get(name, name) for name in names)]
        if between:
            head.insert(3, "95 %")
        head += ["mean over seeds"] if seeds else []
        align = "rl" + "r" * (len(head) - 2) + ("l" if why else "")
        head += ["failed"] if why else []
        rows = []
        for number, one in enumerate(self.outcomes, 1):
            cells = ["" if (value := one.scores.get(name)) is None else _figure(value) for name in names]
            if between:
                cells.insert(1, "{:.2f}–{:.2f}".format(*one.interval) if one.interval else "")
            mean = self.over.get(one.name)
            cells += [f"{mean[0]:.3f} of {mean[1]}" if mean else ""] if seeds else []
            rows.append([str(number) if one.ended else "", one.name, *cells, *([one.failed] if why else [])])
        return Table(head, [rows], align=align)

    def winner(self) -> list[str]:
        """Lines on what the ranking is over, and on the best: where it is, and the command that repeats it."""
        if (best := self.best) is None:
            return [*self.notes]
        where = f", evaluated in {best.evaluation}" if best.evaluation else ""
        return [*self.notes, f"best: {best.name}, in {best.out}{where}", f"  to repeat it: {best.command}"]


def outcome(trial: Mapping[str, Any], failed: str = "") -> Outcome:
    """What a trial of ``trials.json`` has come to by now. A result that it had when it was submitted to be done anew,
    and an evaluation of what the training was before, do not count.
    """
    evaluation = Path(trial["evaluation"]) if trial["evaluation"] else None
    out = Path(trial["out"])
    about = Outcome(trial["name"], trial["values"], out, evaluation, trial["command"], failed=failed)
    file = result_of(trial)
    if failed or not file.is_file() or file.stat().st_mtime_ns == trial.get("before"):
        return about
    if evaluation and not newer(file, out):
        return about
    result = read_json(file)
    if "zero_shot" not in result:
        return replace(about, ended=True, scores=_validation(result))
    from mser_dist.evaluation.headline import last_stage

    last = last_stage(result["zero_shot"]) or result["zero_shot"][0]["model"]
    rows = [row for row in result["zero_shot"] if row["model"] == last]
    found = _validation(read_json(out / "summary.json")) if evaluation else {}
    return replace(about, ended=True, rows=rows, scores={"ua": found["ua"]} if "ua" in found else {})


def result_of(trial: Mapping[str, Any]) -> Path:
    """The file that a trial of ``trials.json`` ends with."""
    if trial["evaluation"]:
        return Path(trial["evaluation"]) / "report.json"
    return Path(trial["out"]) / ("report.json" if trial["of_runs"] else "summary.json")


def _validation(summary: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a training's validation, which has a temperature besides."""
    return {name: value for name, value in (summary["validation"] or {}).items() if name in _SHOWN}


def in_common(outcomes: Sequence[Outcome]) -> tuple[list[Outcome], list[str]]:
    """Give the evaluated their mean UAs, over the corpora and languages that are unseen (or seen) in all of them: other
    means cannot be compared. One to which nothing is unseen has no such mean, and takes nothing from the others.
    Besides, lines on what is left out.
    """
    from mser_dist.evaluation.means import left_out, macro_interval, macro_ua

    evaluated = [one for one in outcomes if one.rows]
    notes = left_out(row for one in evaluated for row in one.rows)
    means: dict[str, dict[str, float]] = {one.name: {} for one in evaluated}
    between: dict[str, tuple[float, float] | None] = {}
    for name, seen in (("unseen", False), ("seen", True)):
        places = {one.name: _places(one, seen) for one in evaluated}
        if not (sets := [own for own in places.values() if own]):
            continue
        common, every = frozenset.intersection(*sets), frozenset.union(*sets)
        what = f"{_SHOWN[f'ua_{name}']}: the mean is over"
        if not common:
            notes.append(f"{what} nothing: no corpus and language is {name} in all runs that have ended")
        elif left := every - common:
            notes.append(f"{what} {_said(common)}, {name} in all runs that have any; left out: {_said(left)}")
        if not seen and (lack := [one for one, own in places.items() if not own]):
            notes.append(f"nothing is unseen to {', '.join(lack)}: ranked last")
        for one in evaluated:
            rows = [row for row in one.rows if (row["corpus"], row["language"]) in common & places[one.name]]
            mean = macro_ua(rows, rows[0]["model"], seen) if rows else float("nan")
            means[one.name][f"ua_{name}"] = mean
            if one.name not in between:
                between[one.name] = macro_interval(rows, rows[0]["model"], seen) if rows else None
    return [
        replace(one, scores=means[one.name] | one.scores, interval=between.get(one.name)) if one.rows else one
        for one in outcomes
    ], notes


def _places(one: Outcome, seen: bool) -> frozenset[tuple[Any, Any]]:
    from mser_dist.evaluation.means import rows_of_mean

    mine = rows_of_mean(one.rows, one.rows[0]["model"], seen)
    return frozenset((row["corpus"], row["language"]) for row in mine)


def _said(places: Iterable[tuple[Any, Any]]) -> str:
    return ", ".join(sorted(f"{language} of {corpus}" if corpus else str(language) for corpus, language in places))


def rank(outcomes: Sequence[Outcome]) -> Ranking:
    """The best first, by the mean over seeds where seeds are swept, then by its own; the ended before the others. Of
    evaluations by what is unseen in all that have ended (`in_common`).
    """
    outcomes, notes = in_common(outcomes)
    groups: dict[tuple[tuple[str, str], ...], list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(_but_seed(one), []).append(one)
    over: dict[str, tuple[float, int]] = {}
    for members in groups.values():
        known = [one.score for one in members if one.score > float("-inf")]
        mean = (float(np.mean(known)), len(known)) if known else None
        over |= {one.name: mean for one in members if mean and one.score > float("-inf")}
    ordered = sorted(
        outcomes, key=lambda one: (over.get(one.name, (one.score,))[0], one.score) if one.ended else (), reverse=True
    )
    return Ranking(ordered, over, notes)


def _figure(value: float) -> str:
    return f"{value:.3f}" if value == value else "–"


def _but_seed(one: Outcome) -> tuple[tuple[str, str], ...]:
    return tuple((key, value) for key, value in one.values.items() if key != "seed")


def settle(out: Path, failed: Mapping[str, str] | None = None) -> Ranking:
    """Rank the trials of the sweep in `out`, write the table there, and bring its MLflow run up to date.

    failed: why trials failed, by name. With the last trial the run gets a comparison, with its plot, and ends. A
    warning where MLflow fails, which `mser sync <out>/sweep` mends.
    """
    place = out / PLACE
    deadline = time.monotonic() + _PATIENCE
    while (handle := records.lock(place)) is None:
        if time.monotonic() > deadline:
            raise UserError(f"{place} is in use: another process ranks the sweep")
        time.sleep(0.2)
    try:
        planned = read_json(place / "trials.json")
        ranking = rank([outcome(trial, (failed or {}).get(trial["name"], "")) for trial in planned])
        text = "\n\n".join([str(ranking.table()), "\n".join(ranking.winner())])
        write_text(place / "table.txt", f"{text}\n")
        files = [place / "table.txt", *(_compared(out, ranking) if ranking.left == 0 else [])]
        _send(place, ranking, text, files)
    finally:
        unlock_file(handle)
    return ranking


def _compared(out: Path, ranking: Ranking) -> list[Path]:
    """Write the comparison of all that ended, drawn against the first key that was swept; the files."""
    from mser_dist.evaluation import compare_report, gathered
    from mser_dist.evaluation.compare import compare

    done = [one for one in ranking.outcomes if one.scores or one.rows]
    if len(done) < 2:
        return []
    try:
        systems, notes = gathered.of_folders([one.evaluation or one.out for one in done])
        stage = max(one.model[:6] for one in systems)
        mine = [one for one in systems if one.model == stage] or systems
        keys = [f"{stage}.{key}" for key in done[0].values if key != "seed"]
        by = next((key for key in keys if any(key in (one.params or {}) for one in mine)), None)
        found = compare(mine, by=by, notes=notes)
    except UserError as error:
        sync.say(f"warning: the runs of the sweep are not compared: {error}")
        return []
    command = f"mser compare {out}"
    compare_report.write(found, out / PLACE, command)
    return [out / PLACE / name for name in compare_report.FILES]


def _send(place: Path, ranking: Ranking, text: str, files: Sequence[Path]) -> None:
    """Bring the record of the sweep's MLflow run up to date, and MLflow."""
    if not (place / "mlflow.json").is_file():
        return  # tracking is off
    uri, record = stored(place)
    entry = {"path": "trials.table.json", "type": "table"}
    _write_table(place / entry["path"], ranking)
    for file in [place / entry["path"], *files]:
        record.add_artifact(place, file, None)
    done = len(ranking.outcomes) - ranking.left
    note = [f"{count(len(ranking.outcomes), 'run')}, {done} ended"]
    if best := ranking.best:  # first: MLflow folds a long description
        note[0] += f"; the best: {best.name} ({next(iter(best.scores))} {best.score:.3f})"
    note.append(f"```\n{text}\n```")
    how = record.tags.get("mser.command")
    note += [f"To repeat it, or to go on with what is left:\n\n```\n{how}\n```"] if how else []
    record.tags |= {"mlflow.note.content": "\n\n".join(note), "mlflow.loggedArtifacts": f"[{json.dumps(entry)}]"}
    if best:
        record.tags |= {"mser.best_trial": best.name, "mser.best_command": best.command}
        record.tags |= {f"mser.best.{key}": value for key, value in best.values.items()}
        record.links["mser.best_run_id"] = str(best.out.resolve())
        name, value = next(iter(best.scores.items()))
        line = {"step": done, "time": round(time.time(), 3), f"best/{name}": value}
        with (place / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(f"{json.dumps(line)}\n")
    status = "RUNNING" if ranking.left else "FAILED" if ranking.failed else "FINISHED"
    record.save(place, status=status, ended=None if ranking.left else records.now_ms())
    try:
        sync.prepare_mlflow(uri)
        sync.Sender(place, record, uri).send()
    except Exception as error:  # the tracker is never worth a result
        sync.say(f"warning: MLflow {sync.trouble(error)}: `mser sync {place}` sends the sweep's table later")


def stored(place: Path) -> tuple[str, records.Record]:
    """Where the record in a sweep's folder is tracked, and it."""
    from mser_dist import config as cfg

    there = read_json(place / "mlflow.json")
    tracking = cfg.TrackingConfig(experiment=there["experiment"], run_name=there["run_name"])
    uri = records.tracking_uri(tracking, place)
    uri = uri if records.redact(uri) == there["tracking_uri"] else str(there["tracking_uri"])
    return uri, records.Record.of(place, tracking, uri)


def _write_table(path: Path, ranking: Ranking) -> None:
    names = list(dict.fromkeys(name for one in ranking.outcomes for name in one.scores))
    keys = list(ranking.outcomes[0].values)
    data = [
        [one.name, *(one.values[key] for key in keys), *(_number(one, name) for name in names), one.command]
        for one in ranking.outcomes
    ]
    write_json(path, {"columns": ["run", *keys, *names, "command"], "data": data})


def _number(one: Outcome, name: str) -> float | None:
    value = one.scores.get(name, float("nan"))
    return value if value == value else None
