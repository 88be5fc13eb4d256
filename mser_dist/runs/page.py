"""The line that ends a command: how to open what MLflow has of it in a browser."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from mser_dist.runs.record import HEADLINE, redact, sqlite_file

_KIND = "workflowType=machine_learning"  # else MLflow shows a new visitor its pages for chat applications
_HERE = "http://127.0.0.1:5000"  # where `mlflow ui` serves, unless told otherwise


def page(run: Path) -> str | None:
    """A line on the page of a run folder's run; None where MLflow has not got it, of which its tracker has told."""
    known = _known(run)
    return None if known is None else _line(known[0], f"experiments/{known[1]}/runs/{known[2]}?{_KIND}")


def pages(runs: Iterable[Path]) -> str | None:
    """A line on the page that compares run folders' runs; None unless one store has two of them at least."""
    found = [known for run in runs if (known := _known(run))]
    if len(found) < 2 or len({uri for uri, _, _ in found}) > 1:
        return None
    ids, experiments = [one[2] for one in found], sorted({one[1] for one in found})
    listed = [quote(json.dumps(some, separators=(",", ":"))) for some in (ids, experiments)]
    return _line(found[0][0], f"compare-runs?runs={listed[0]}&experiments={listed[1]}&{_KIND}")


def experiment_page(uri: str, experiment_id: str, only: str = "") -> str:
    """A line on the charts of an experiment's runs, the best first; `only`: those that MLflow finds by this filter."""
    best = quote(f"metrics.`{HEADLINE}`", safe="")  # sorted so, MLflow does not hide the runs of a sweep in its own
    words = [_KIND, "compareRunsMode=CHART", f"orderByKey={best}", "orderByAsc=false"]
    words += [f"searchFilter={quote(only, safe='')}"] if only else []
    return _line(redact(uri), f"experiments/{experiment_id}/runs?{'&'.join(words)}")


def sweep_page(sweep: Path, stage: int | None) -> str | None:
    """A line on the charts of a sweep's trainings of a stage (None: evaluations), whose record is in that folder."""
    if (known := _known(sweep)) is None:
        return None
    only = f"tags.`mlflow.parentRunId` = '{known[2]}' and tags.`mser.stage` = '{stage or 'eval'}'"
    return experiment_page(known[0], known[1], only)


def _known(run: Path) -> tuple[str, str, str] | None:
    """Where MLflow has a run: its URI without passwords, the ids of experiment and run."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((run / "mlflow.json").read_text(encoding="utf-8"))
        place = record["tracking_uri"], record["experiment_id"], record["run_id"]
        if all(isinstance(part, str) for part in place):
            return place
    return None


def _line(uri: str, place: str) -> str:
    if uri.startswith("http"):
        return f"MLflow: {uri.rstrip('/')}/#/{place}"
    if (file := sqlite_file(uri)) is not None and file.is_relative_to(Path.cwd()):
        uri = f"sqlite:///{file.relative_to(Path.cwd())}"
    program = Path(sys.executable).with_name("mlflow")
    found = shutil.which("mlflow")
    name = "mlflow" if found and os.path.realpath(found) == os.path.realpath(program) else str(program)
    return f"MLflow: {shlex.join([name, 'ui', '--backend-store-uri', uri])}, then {_HERE}/#/{place}"
