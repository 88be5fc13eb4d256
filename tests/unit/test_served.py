"""A model that MLflow logs, registers and serves: a real server, and requests that are not meant well."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas
import pytest
import soundfile
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import mser_dist
from mser_dist.config import TrackingConfig
from mser_dist.errors import UserError
from mser_dist.prediction import mlflow_model, served
from mser_dist.prediction.locate import find_export
from mser_dist.prediction.served import Served
from mser_dist.runs.sync import sync
from mser_dist.runs.tracking import Tracker
from tests.tiny_runs import ROOT
from tests.unit import tiny_exports
from tests.unit.tiny_exports import LABELS, wave

DISTANCE = 1e-5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an export, and its model in MLflow's format: linked, and (``copied``) with the export in it."""
    run = tiny_exports.stage2(tmp_path_factory.mktemp("served") / "run")
    mlflow_model.save(run / "mlflow_model", run / "export", copy=False)
    mlflow_model.save(run / "copied", run / "export", copy=True)
    tiny_exports.recordings(run / "rec")
    return run


def text(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def silence(seconds: float, rate: int = 16000, channels: int = 1) -> str:
    """Hours of it are a few kilobytes."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros((round(seconds * rate), channels), np.int16), rate, format="FLAC")
    return base64.b64encode(file.getvalue()).decode()


def test_linked_or_copied_it_answers_as_the_model(run: Path, tmp_path: Path) -> None:
    wanted = mser_dist.load_model(run).predict(run / "rec/r0.wav")
    linked = sum(path.stat().st_size for path in (run / "mlflow_model").rglob("*"))
    assert linked < 60_000 < sum(path.stat().st_size for path in (run / "copied").rglob("*"))
    for folder in ("mlflow_model", "copied"):
        model = mlflow.pyfunc.load_model(str(run / folder))
        assert model.metadata.signature.params.params[0].default == LABELS
        clip = pandas.DataFrame({"audio": [text(run / "rec/r0.wav")]})
        [row] = model.predict(clip).to_dict("records")
        assert row["label"] == wanted.label and row["probabilities"] == pytest.approx(
            wanted.probabilities, abs=DISTANCE
        )
        [row] = model.predict(clip, params={"labels": ["furious", "calm"]}).to_dict("records")
        assert set(row["probabilities"]) == {"furious", "calm"}
        samples = soundfile.read(run / "rec/r0.wav")[0].tolist()
        [row] = model.predict(pandas.DataFrame({"array": [samples], "sampling_rate": [16000]})).to_dict("records")
        assert row["probabilities"] == pytest.approx(wanted.probabilities, abs=DISTANCE)
    pinned = (run / "mlflow_model/requirements.txt").read_text().splitlines()
    assert pinned == mlflow_model.requirements() and all("==" in line for line in pinned)
    other = tiny_exports.stage2(tmp_path / "other")
    mlflow_model.save(other / "mlflow_model", other / "export", copy=False)
    tiny_exports.stage2(other, temperature=2.0)
    with pytest.raises(MlflowException, match="which has since been replaced"):
        mlflow.pyfunc.load_model(str(other / "mlflow_model"))


def test_what_a_request_may_not(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.wav").write_bytes((run / "rec/r0.wav").read_bytes())
    (run / "rec/way_out.wav").symlink_to(tmp_path / "secret.wav")
    config = {"max_bytes": 300_000, "max_seconds": 20.0, "max_clips": 3, "max_labels": 4}
    closed = Served(mser_dist.load_model(run), config)
    opened = Served(closed.model, {**config, "allow_paths": [str(run / "rec")]})
    good = {"audio": text(run / "rec/r0.wav")}
    assert opened.predict([{"path": str(run / "rec/r0.wav")}]).to_dict("records")[0]["label"] in LABELS
    no_file = "this server opens no such file"
    for server, rows, says in (
        (closed, [{"path": str(run / "rec/r0.wav")}], no_file),
        (closed, [{"path": "/nowhere"}], no_file),
        (opened, [{"path": str(tmp_path / "secret.wav")}], no_file),
        (opened, [{"path": str(run / "rec/../export/card.json")}], no_file),
        (opened, [{"path": str(run / "rec/way_out.wav")}], no_file),
        (opened, [{"path": str(run / "rec")}], no_file),
        (opened, [{"path": "file:///etc/passwd"}], no_file),
        (opened, [{"path": "x\0y"}], no_file),
        (opened, [{"path": "/dev/zero"}], no_file),
        (opened, [{"audio": "/etc/passwd"}], "audio is no base64"),
        (opened, [{"audio": base64.b64encode(b"no audio").decode()}], "not readable as audio"),
        (opened, [{"audio": "A" * 500_000}], "more than 300000 bytes"),
        (opened, [{"audio": silence(3600)}], "3600.0 s of audio, the limit is 20 s"),
        (opened, [{"audio": silence(10, 96_000, channels=8)}], "8 channels at 96000 Hz"),
        (opened, [good, {}], "clip 1: give one of audio"),
        (opened, [{**good, "path": "x"}], "clip 0: give one of audio"),
        (opened, [{"array": [0.1] * 99}], "needs its sampling_rate"),
        (opened, [{"array": [0.1] * 99, "sampling_rate": -5}], "needs its sampling_rate"),
        (opened, [{"array": [0.1] * 99, "sampling_rate": 10**12}], "needs its sampling_rate"),
        (opened, [{"array": [0.1] * 99, "sampling_rate": 1}], "array is longer than 20 s"),
        (opened, [{"array": [float("nan")] * 99, "sampling_rate": 16000}], "NaN"),
        (opened, [{"array": ["a"], "sampling_rate": 16000}], "no list of numbers"),
        (opened, [{"array": [[0.1, 0.2]], "sampling_rate": 16000}], "of one channel"),
        (opened, [good] * 4, "4 clips in a request"),
        (opened, [], "0 clips in a request"),
    ):
        with pytest.raises(MlflowException, match=says) as raised:
            server.predict(rows)
        assert raised.value.get_http_status_code() == 400, "a request's fault, not the server's"
    for labels, says in (
        (["a"] * 5, "at most 4 labels"),
        (["a" * 101], "of 100 characters"),
        (["sad", "sad"], "twice"),
    ):
        with pytest.raises(MlflowException, match=says):
            opened.predict([good], {"labels": labels})
    monkeypatch.setenv(served.ALLOW_PATHS, f"/nowhere{os.pathsep}{run / 'rec'}")
    assert len(Served(closed.model, {}).predict([{"path": str(run / "rec/r1.flac")}])) == 1


@pytest.fixture(scope="module")
def registered(run: Path, prepared: Path) -> str:
    """The address of an MLflow in which the run has logged its model, as mser@best."""
    uri = f"sqlite:///{run.parent / 'mlflow.db'}"
    (run.parent / "mlflow.db").write_bytes(prepared.read_bytes())
    (run / "config.yaml").write_text(f"stage: 2\nout: {run}\ntracking: {{uri: '{uri}'}}\n")
    tracker = Tracker(TrackingConfig(uri=uri), run, {"mser.out": str(run)}, {})
    tracker.model(run / "mlflow_model", "mser@best")
    tracker.close("FINISHED")
    return uri


def test_a_run_logs_its_model_once(run: Path, registered: str) -> None:
    client = MlflowClient(registered)
    sync(run)  # a second time: nothing of the model is left to be sent
    record = json.loads((run / "mlflow.json").read_text())
    assert record["model"]["registered"]
    version = client.get_model_version_by_alias("mser", "best")
    assert version.run_id == record["run_id"] and str(version.version) == "1"
    [model] = client.search_logged_models([client.get_run(record["run_id"]).info.experiment_id])
    assert model.model_id == record["model"]["id"] and model.status == "READY"
    assert model.model_id in version.source
    assert client.get_run(record["run_id"]).outputs.model_outputs[0].model_id == model.model_id


def test_a_model_is_found_by_its_names_in_mlflow(
    run: Path, registered: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(registered)
    try:
        record = json.loads((run / "mlflow.json").read_text())
        for name in (
            "models:/mser@best",
            "models:/mser/1",
            f"models:/{record['model']['id']}",
            f"runs:/{record['run_id']}",
        ):
            assert find_export(name).resolve() == (run / "export").resolve()
        for name in ("models:/mser@worst", "models:/nobody@best", "runs:/0123"):
            with pytest.raises(UserError, match=f"{name} is not to be had from MLflow"):
                find_export(name)
    finally:
        mlflow.set_tracking_uri(before)


# ---- a server


@pytest.fixture
def server(run: Path, registered: str, tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["models", "serve", "-m", "models:/mser@best", "--env-manager", "local", "-p", str(port)]
    code = "import sys; from mlflow.cli import cli; sys.exit(cli(sys.argv[1:]))"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "MLFLOW_TRACKING_URI": registered, "PYTHONPATH": str(ROOT), "PATH": path}
    env |= {"MSER_ALLOW_PATHS": str(run / "rec"), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *words], env=env, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=5)
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def ask(address: str, body: dict[str, Any] | bytes) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/invocations", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_served_model_answers_and_gives_nothing_away(run: Path, server: str) -> None:
    model = mser_dist.load_model(run)
    wanted = model.predict(run / "rec/r0.wav", labels=["furious", "calm"])
    clip = {"audio": text(run / "rec/r0.wav")}
    code, answer = ask(server, {"dataframe_records": [clip], "params": {"labels": ["furious", "calm"]}})
    assert code == 200 and answer["predictions"][0]["label"] == wanted.label
    assert answer["predictions"][0]["probabilities"] == pytest.approx(wanted.probabilities, abs=DISTANCE)
    array = {"array": wave(0.5).tolist(), "sampling_rate": 16000}
    for rows in ([array], [{"path": str(run / "rec/r3.ogg")}, clip]):
        code, answer = ask(server, {"dataframe_records": rows})
        assert code == 200 and len(answer["predictions"]) == len(rows)
    hostile: list[tuple[list[dict[str, Any]], str]] = [
        ([{"path": "/etc/passwd"}], "opens no such file"),
        ([{"path": f"{run}/rec/../export/card.json"}], "opens no such file"),
        ([{"audio": silence(3600)}], "the limit is 600 s"),
        ([{"audio": "A" * 23_000_000}], "more than 16777216 bytes"),
        ([{"audio": "~"}], "no base64"),
        ([{}], "clip"),
        ([clip] * 65, "65 clips in a request"),
    ]
    for rows, says in hostile:
        code, answer = ask(server, {"dataframe_records": rows})
        assert code == 400 and says in answer["message"] and "Traceback" not in json.dumps(answer)
    assert ask(server, {"dataframe_records": [clip], "params": {"labels": ["sad"] * 65}})[0] == 400
    assert ask(server, b"{")[0] == 400
    assert ask(server, {"dataframe_records": [clip]})[0] == 200, "it is still there"
