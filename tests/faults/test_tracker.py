"""MLflow servers that are killed or frozen, runs that are killed, and a training whose server is."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests

from mser_dist import config as cfg
from mser_dist.runs import tracking
from mser_dist.runs.sync import sync
from mser_dist.runs.tracking import Tracker, run_id_of
from mser_dist.synth.write import write_set
from tests.tiny_runs import SMALL_SET, TWO, losses, mser, stage1
from tests.tiny_runs import start as start_mser

pytestmark = pytest.mark.faults


class Server:
    """``mlflow server`` on 127.0.0.1 with a database and artifacts of its own, which outlive it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        words = ["--host", "127.0.0.1", "--port", self.uri.rpartition(":")[2], "--workers", "1"]
        words += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        words += ["--artifacts-destination", str(self.folder / "artifacts")]
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # seven processes that no one needs here
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words],
                env=env, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        while True:
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            try:
                requests.get(f"{self.uri}/health", timeout=5).raise_for_status()
                return
            except requests.RequestException:
                time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to all its processes."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def freeze(self, frozen: bool) -> None:
        """SIGSTOP: it takes connections, and never answers; or on again."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP if frozen else signal.SIGCONT)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """Of a store that nothing has to be started for."""
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "_EVERY", 0.1)
    monkeypatch.setattr(tracking, "_LONGEST_PAUSE", 1.0)


def start(out: Path, uri: str) -> Tracker:
    out.mkdir(exist_ok=True)
    (out / "config.yaml").write_text("stage: 1\n")
    return Tracker(cfg.TrackingConfig(experiment="test", uri=uri), out, {}, {"lr": "1"})


def steps_of(out: Path, uri: str, name: str = "loss") -> Counter[int]:
    """How often MLflow has each step of a metric."""
    client: Any = mlflow.MlflowClient(uri)
    run_id = run_id_of(out)
    return Counter(point.step for point in client.get_metric_history(run_id, name)) if run_id else Counter()


def wait_for(out: Path, uri: str, steps: int) -> None:
    while len(steps_of(out, uri)) < steps:
        time.sleep(0.1)


@pytest.mark.timeout(180)
def test_a_server_that_is_killed_frozen_and_started_again_has_every_step_once(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    server.start()
    tracker = start(out, server.uri)
    for step in range(50):
        tracker.metrics(step, {"loss": float(step)})
    wait_for(out, server.uri, 50)
    server.kill()
    for step in range(50, 100):
        tracker.metrics(step, {"loss": float(step)})
    (out / "notes.txt").write_text("written while the server was dead")
    tracker.artifact(out / "notes.txt")
    while "run goes on" not in capsys.readouterr().err:
        time.sleep(0.1)
    server.start()
    while "answers again" not in capsys.readouterr().err:
        time.sleep(0.1)
    assert steps_of(out, server.uri) == Counter(range(100))
    # Frozen, it hears of the next steps at the latest when it goes on: the client has sent them again by then.
    server.freeze(True)
    for step in range(100, 150):
        tracker.metrics(step, {"loss": float(step)})
    while "does not answer" not in capsys.readouterr().err:
        time.sleep(0.1)
    server.freeze(False)
    tracker.close("FINISHED")
    assert steps_of(out, server.uri) == Counter(range(150))
    client: Any = mlflow.MlflowClient(server.uri)
    assert len(client.search_runs(["1"])) == 1
    run = client.get_run(run_id_of(out))
    assert (run.info.status, run.data.params) == ("FINISHED", {"lr": "1"})
    assert [path.name for path in (server.folder / "artifacts").rglob("notes.txt")] == ["notes.txt"]


KILLED = """\
import os, signal, sys, time
from pathlib import Path
from mser_dist import config as cfg
from mser_dist.runs.tracking import Tracker
tracker = Tracker(cfg.TrackingConfig(experiment="test", uri=sys.argv[2]), Path(sys.argv[1]), {}, {"lr": "1"})
for step in range(1000):
    tracker.metrics(step, {"loss": float(step), "other": 0.5})
    time.sleep(0.01)
    if step == 700:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.timeout(180)
def test_a_killed_run_is_marked_and_its_next_start_goes_on_without_repeating_a_step(tmp_path: Path, uri: str) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("stage: 1\n")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), out, uri], env=env, timeout=120)
    assert done.returncode == -signal.SIGKILL
    client: Any = mlflow.MlflowClient(uri)
    run_id = run_id_of(out)
    assert client.get_run(run_id).info.status == "RUNNING" and len(steps_of(out, uri)) > 10
    assert "of 1402 numbers" in sync(out) and client.get_run(run_id).info.status == "KILLED"
    assert steps_of(out, uri) == steps_of(out, uri, "other") == Counter(range(701))

    tracker = start(out, uri)
    for step in range(600, 720):  # from the checkpoint of step 600
        tracker.metrics(step, {"loss": float(step), "other": 0.25})
    while client.get_run(run_id).info.status != "RUNNING":
        time.sleep(0.05)
    tracker.close("FINISHED")
    assert run_id_of(out) == run_id and client.get_run(run_id).info.status == "FINISHED"
    assert steps_of(out, uri) == steps_of(out, uri, "other") == Counter(range(720))
    assert len([row for row in tracker.rows() if "loss" in row]) == 720


@pytest.mark.distributed
@pytest.mark.drill("tracker-killed")
@pytest.mark.timeout(600)
def test_a_training_whose_server_is_killed_has_the_same_losses_and_is_synced_later(
    server: Server, tmp_path: Path
) -> None:
    write_set(tmp_path / "shards", SMALL_SET)
    words = ["data.val_split=null", "train.val_every=0", "train.steps=20", *TWO]
    mser(*stage1("runs/alone", *words, "tracking.enabled=false"), cwd=tmp_path)
    out = tmp_path / "runs/beside"
    server.start()
    process = start_mser(*stage1("runs/beside", *words, f"tracking.uri={server.uri}"), cwd=tmp_path)
    try:
        while not (run_id_of(out) and losses(out)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        server.kill()
        before = len(losses(out))
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert before < 20 and process.returncode == 0, said
    assert f"`mser sync {out.relative_to(tmp_path)}` sends them later" in said
    assert len(losses(out)) == 20 and losses(out) == losses(tmp_path / "runs/alone")
    server.start()
    client: Any = mlflow.MlflowClient(server.uri)
    assert client.get_run(run_id_of(out)).info.status == "RUNNING"
    assert "status FINISHED" in sync(out) and "0 of " in sync(out)
    assert client.get_run(run_id_of(out)).info.status == "FINISHED"
    assert steps_of(out, server.uri, "train/loss") == Counter(range(1, 21))
