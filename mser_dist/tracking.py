"""One record of a run: a JSONL log in the run folder, always, and MLflow, which may fail without harm.

Rank 0 only. The MLflow run id is kept in ``<run>/mlflow.json``: a resumed training continues the same MLflow run.
"""

import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mser_dist import __version__
from mser_dist import config as cfg
from mser_dist.files import write_json

# A dead server must not hold up a training: MLflow's own defaults retry for minutes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


def tracking_uri(config: cfg.Tracking, out: Path) -> str:
    """The config's URI, else MLFLOW_TRACKING_URI, else a sqlite file beside the run folder."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out.resolve().parent / 'mlflow.db'}"


def run_id_of(run: str | Path) -> str | None:
    """The MLflow run id of a run folder, or None where it was not tracked."""
    try:
        return json.loads((Path(run) / "mlflow.json").read_text(encoding="utf-8"))["run_id"]
    except (OSError, ValueError, KeyError):
        return None


class Tracker:
    """Logs of one run. Every MLflow call is guarded: the first failure is a warning and switches MLflow off."""

    def __init__(self, config: cfg.Tracking, out: Path, tags: dict[str, str], params: dict[str, str]) -> None:
        self.out = out
        uri = tracking_uri(config, out)
        self.uri = re.sub(r"//[^/@]*@", "//", uri)  # what is written down and printed holds no password
        self.run_id: str | None = None
        self._started = time.monotonic()
        log = out / "log.jsonl"
        cut = log.is_file() and not log.read_bytes().endswith(b"\n")
        self._log = log.open("a", encoding="utf-8")
        if cut:  # a kill in the middle of a line: the next one begins afresh
            self._log.write("\n")
        self._alive = config.enabled
        self._guard(lambda: self._start(config, uri, tags, params))

    def _start(self, config: cfg.Tracking, uri: str, tags: dict[str, str], params: dict[str, str]) -> None:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        import mlflow

        mlflow.set_tracking_uri(uri)
        if mlflow.get_experiment_by_name(config.experiment) is None:
            place = None
            if self.uri.startswith("sqlite:"):
                place = (self.out.resolve().parent / "mlartifacts").as_uri()
            # The kind decides which of MLflow's pages open: without it, those for LLM agents.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            mlflow.create_experiment(config.experiment, artifact_location=place, tags=kind)
        mlflow.set_experiment(config.experiment)
        mlflow.set_system_metrics_sampling_interval(5)
        known = run_id_of(self.out)
        run = mlflow.start_run(
            run_id=known, run_name=config.run_name or self.out.name, tags=tags, log_system_metrics=True
        )
        self.run_id = run.info.run_id
        if known is None:
            write_json(self.out / "mlflow.json", {"run_id": self.run_id, "tracking_uri": self.uri})
            mlflow.log_params({key: value[:6000] for key, value in params.items()})

    def _guard(self, call: Callable[[], Any]) -> None:
        if not self._alive:
            return
        try:
            call()
        except Exception as error:  # whatever the tracker's server does, training goes on
            self._alive = False
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            warnings.warn(f"MLflow at {self.uri} failed and is switched off for this run: {reason}", stacklevel=3)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Log numbers at a step."""
        line = {"step": step, "seconds": round(time.monotonic() - self._started, 3), **values}
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()

        def send() -> None:
            import mlflow

            mlflow.log_metrics(values, step=step, synchronous=False)

        self._guard(send)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Attach a file to the run."""

        def send() -> None:
            import mlflow

            mlflow.log_artifact(str(path), folder)

        self._guard(send)

    def table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Attach a table, which MLflow's pages show and compare."""

        def send() -> None:
            import mlflow

            columns = {key: [row[key] for row in rows] for key in rows[0]}
            mlflow.log_table(columns, name)

        self._guard(send)

    def describe(self, markdown: str) -> None:
        """The text on the run's overview page."""

        def send() -> None:
            import mlflow

            mlflow.set_tag("mlflow.note.content", markdown)

        self._guard(send)

    def rows(self) -> list[dict[str, float]]:
        """Every logged line so far, those of earlier starts of the run included, in the order of steps.

        A start that went on from a checkpoint logs some steps again: the last line of a step's numbers counts. A line
        cut by a kill or a full disk is left out.
        """
        last: dict[tuple[Any, ...], dict[str, float]] = {}
        for line in (self.out / "log.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                last[row["step"], *sorted(row.keys() - {"step", "seconds"})] = row
        return sorted(last.values(), key=lambda row: row["step"])

    def close(self, status: str) -> None:
        """End the MLflow run as FINISHED, FAILED or KILLED."""
        self._log.close()

        def end() -> None:
            import mlflow

            mlflow.flush_async_logging()
            mlflow.end_run(status)

        self._alive = self.run_id is not None  # tried also after a failure: the run should not stay open for ever
        self._guard(end)


@contextmanager
def tracked(
    config: cfg.Tracking, out: Path, tags: dict[str, str], params: dict[str, str], main: bool
) -> Iterator[Tracker | None]:
    """The tracker of a run on rank 0, None elsewhere; ends the MLflow run with the status that the block ends with."""
    if not main:
        yield None
        return
    tracker = Tracker(config, out, {"mser.version": __version__, "mser.out": str(out.resolve()), **tags}, params)
    tracker.artifact(out / "config.yaml")
    try:
        yield tracker
    except KeyboardInterrupt:
        tracker.close("KILLED")
        raise
    except BaseException:
        tracker.close("FAILED")
        raise
    tracker.close("FINISHED")
