"""The runs of an MLflow experiment, read in few queries: a page of them at a time, and never one by one."""

import difflib
import os
import tempfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mser_dist import config as cfg
from mser_dist.config.file import flatten, read_saved
from mser_dist.errors import UserError
from mser_dist.runs.page import experiment_page
from mser_dist.runs.record import CHOSEN, redact
from mser_dist.runs.sync import prepare_mlflow, trouble

HERE = "sqlite:///runs/mlflow.db"  # where runs in runs/ are tracked, unless told otherwise
_PAGE = 1000  # runs in one request
_IDS = 100  # run ids in one


@dataclass(frozen=True)
class Stored:
    """What MLflow has of a run; of a metric the last value."""

    run_id: str
    name: str
    status: str  # FINISHED, RUNNING, FAILED, KILLED
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    artifacts: str  # the URI of its files


class Store:
    """An MLflow store that is there already. Whatever is wrong with it is a `UserError` of one line."""

    def __init__(self, uri: str | None = None) -> None:
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or HERE
        self.uri = redact(uri)
        self._uri = uri
        if uri.startswith("sqlite:///"):  # which MLflow would make
            file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
            begins = b""
            with suppress(OSError), file.open("rb") as opened:
                begins = opened.read(16)
            if not begins.startswith(b"SQLite format 3"):
                what = "is no sqlite database" if file.exists() else "is not there"
                raise UserError(f"the MLflow store {self.uri} {what}: name that of the runs by --uri")
        prepare_mlflow(uri)
        from mlflow import MlflowClient

        self._client = self._asked(MlflowClient, uri)
        self._experiment_id: str | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def _asked(self, call: Any, *args: Any, **options: Any) -> Any:
        """What a call of MLflow returns."""
        try:
            return call(*args, **options)
        except Exception as error:  # of MLflow, a database's driver, or the network
            why = trouble(error)
            raise UserError(f"MLflow at {self.uri} {why}: mend it, or name another one with --uri") from error

    def _paged(self, call: Any, *args: Any, **options: Any) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self._asked(call, *args, max_results=_PAGE, page_token=token, **options)
            found += page
            token = page.token
            if not token:
                return found

    def experiment(self, name: str) -> list[Stored]:
        """The runs of an experiment, by its name or its id, that are not deleted, the newest first."""
        found = self._asked(self._client.get_experiment_by_name, name)
        if found is None:
            everything = self._paged(self._client.search_experiments)
            found = next((one for one in everything if one.experiment_id == name), None)
            if found is None:
                names = [one.name for one in everything]
                near = difflib.get_close_matches(name, names, 1) or names[:6]
                what = f"did you mean {near[0]!r}?" if len(near) == 1 else f"it has {', '.join(map(repr, near))}"
                raise UserError(f"MLflow at {self.uri} has no experiment {name!r}: {what}")
        if found.lifecycle_stage == "deleted":
            raise UserError(
                f"the experiment {name!r} in MLflow at {self.uri} was deleted: "
                f"`mlflow experiments restore -x {found.experiment_id}` brings it back"
            )
        self._experiment_id = found.experiment_id
        return [_stored(run) for run in self._paged(self._client.search_runs, [found.experiment_id])]

    def page(self) -> str | None:
        """The line that opens the page of the experiment that was asked for last."""
        return self._experiment_id and experiment_page(self.uri, self._experiment_id)

    def runs(self, ids: Collection[str]) -> list[Stored]:
        """Those of the runs with these ids, of any experiment, that are not deleted."""
        wanted = sorted(ids)
        if not wanted:
            return []
        experiments = [one.experiment_id for one in self._paged(self._client.search_experiments)]
        found: list[Any] = []
        for start in range(0, len(wanted), _IDS):
            listed = ", ".join(f"'{one}'" for one in wanted[start : start + _IDS])
            found += self._paged(self._client.search_runs, experiments, f"attributes.run_id IN ({listed})")
        return [_stored(run) for run in found]

    def config(self, run: Stored) -> dict[str, str]:
        """A run's config as dotted keys: its config.yaml, else its params, which are of what a person chose."""
        if CHOSEN not in run.tags:  # of an earlier version: they are all of it
            return run.params
        with suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
            if path := self.file(run, "config.yaml"):
                return read_saved(path)
        kinds: dict[str, Any] = {"2": cfg.Stage2, "eval": cfg.Evaluation, "baseline": cfg.Baseline}
        return flatten(kinds.get(run.tags.get("mser.stage", ""), cfg.Stage1)()) | run.params

    def file(self, run: Stored, name: str) -> Path | None:
        """A file of a run's artifacts, where it lies or brought here for as long as the store lives; None: not there.

        A request for each file that lies elsewhere.
        """
        place = run.artifacts.removeprefix("file://")
        if place.startswith("/"):
            path = Path(place) / name
            return path if path.is_file() else None
        from mlflow.artifacts import download_artifacts

        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="mser-compare-")
        target = Path(self._folder.name) / run.run_id
        target.mkdir(exist_ok=True)
        with suppress(Exception):  # not there, or the server does not give it: the caller says what is lacking
            return Path(download_artifacts(f"{run.artifacts}/{name}", dst_path=str(target), tracking_uri=self._uri))
        return None


def _stored(run: Any) -> Stored:
    data, info = run.data, run.info
    return Stored(
        run.info.run_id, info.run_name or info.run_id, info.status, data.tags, data.params, data.metrics,
        info.artifact_uri,
    )  # fmt: skip
