"""Runs in a real MLflow on sqlite, and what MLflow then has of them; a server that never answers."""

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import mlflow

from mser_dist import config as cfg
from mser_dist.runs.tracking import Tracker, run_id_of


class Silent:
    """A server that takes every connection and request, and never answers."""

    def __init__(self) -> None:
        self.heard = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            self._open.append(connection)
            if connection.recv(4) == b"stop":
                return
            self.heard.set()

    def stop(self) -> None:
        host, port = self._listener.getsockname()
        with socket.create_connection((host, port)) as connection:
            connection.sendall(b"stop")
        self._thread.join()
        for connection in [*self._open, self._listener]:
            connection.close()


def start(
    out: Path, params: dict[str, str] | None = None, tags: dict[str, str] | None = None, **options: Any
) -> Tracker:
    out.mkdir(exist_ok=True)
    # A new experiment for each: the artifact folder is kept in the experiment, and the database here is a copy.
    config = cfg.TrackingConfig(experiment=f"test-{out.parent.name}", **options)
    (out / "config.yaml").write_text(f"stage: 1\ntrain: {{lr: 0.1}}\ntracking: {{experiment: {config.experiment}}}\n")
    return Tracker(config, out, tags or {}, params or {})


def client_of(folder: Path) -> Any:
    """Of the store that the runs of a folder are in."""
    return mlflow.MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}")


def run_of(out: Path) -> Any:
    run_id = run_id_of(out)
    assert run_id
    return client_of(out.parent).get_run(run_id)


def history(out: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values, sorted: with duplicates, if there are any."""
    points = client_of(out.parent).get_metric_history(run_id_of(out), name)
    return sorted((point.step, point.value) for point in points)


def log_lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def files_of(folder: Path) -> dict[str, Path]:
    """The artifacts of the runs in a folder that `start` began; a server's store holds those of others too."""
    client = client_of(folder)
    experiment = client.get_experiment_by_name(f"test-{folder.name}")
    ids = {run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    there = (folder / "mlartifacts").rglob("*")
    return {path.name: path for path in there if path.is_file() and ids & {*path.parts}}
