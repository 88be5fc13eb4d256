"""One record of a run: a JSONL log in the run folder, always, and MLflow, which may be slow, dead or absent.

Rank 0 only. Every call writes to the run folder and returns; one thread reads it there and talks to MLflow, so that a
server can hold up that thread alone. What it has not sent by the end, ``mser sync RUN`` sends later, and so does the
next start of the run, which continues the same MLflow run.
"""

import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mser_dist import __version__
from mser_dist import config as cfg
from mser_dist.errors import Stopped
from mser_dist.files import unlock_file, write_json
from mser_dist.runs.names import plain
from mser_dist.runs.record import CHOSEN, NOT_NUMBERS, Record, lock, now_ms, redact, tracking_uri
from mser_dist.runs.record import run_id_of as run_id_of  # callers have it from here
from mser_dist.runs.sync import Sender, prepare_mlflow, refused, say, trouble
from mser_dist.tables import count

_PARENT = "mlflow.parentRunId"
COMMAND = "mser.command"  # the tag with the command that repeats a run

# All in seconds.
_EVERY = 2.0  # between two sendings
_LONGEST_PAUSE = 60.0  # between two attempts while MLflow fails
_SAMPLE_EVERY = 10.0  # between two readings of the machine's load
_FIRST_ANSWER = 10.0  # that `Tracker.run_id` waits
# That the end of a run waits for MLflow. A job that is stopped has little time to live, a failed one has peers waiting.
PATIENCE = {"FINISHED": 20.0, "FAILED": 5.0, "KILLED": 5.0}


class Tracker:
    """The log of one run, and the thread that sends it."""

    def __init__(
        self,
        config: cfg.TrackingConfig,
        out: Path,
        tags: dict[str, str],
        params: dict[str, str],
        links: dict[str, Path] | None = None,
    ) -> None:
        self.out = out
        uri = tracking_uri(config, out)
        self._record = record = Record.of(out, config, uri)
        self.uri = record.tracking_uri  # what is written down and printed holds no password
        self._opened = time.monotonic()
        log = out / "log.jsonl"
        cut = log.is_file() and not (log.read_bytes() or b"\n").endswith(b"\n")  # empty where no step was done
        self._log = log.open("a", encoding="utf-8")
        if cut:  # a kill in the middle of a line: the next one begins afresh
            self._log.write("\n")
        self._first_byte = log.stat().st_size
        if (parent := config.parent) and Path(parent).is_dir():  # MLflow may not have told its id yet
            links = {**(links or {}), _PARENT: Path(parent)}
        elif parent:
            tags = {**tags, _PARENT: parent}
        tags = {name: redact(value) if name == COMMAND else value for name, value in tags.items()}
        if COMMAND in tags:
            tags = {"mlflow.note.content": _note("", tags), **tags}
        record.tags |= tags
        record.links |= {name: str(run.resolve()) for name, run in (links or {}).items()}
        record.add_params(params)
        record.save(out, status="RUNNING", ended=None)

        self._held = lock(out)
        self._sender = Sender(out, record, uri)
        self._answered, self._closing, self._given_up = threading.Event(), threading.Event(), threading.Event()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None
        if config.enabled:
            try:
                # Here and not in the thread: data workers are forked while it runs, and one forked in the middle of
                # another thread's import can wait for it for ever.
                prepare_mlflow(uri)
                self._machine = _Machine()
                self._thread = threading.Thread(target=self._deliver, name="mser-mlflow", daemon=True)
                self._thread.start()
            except Exception as error:  # whatever the tracker does, training goes on
                say(f"warning: MLflow at {self.uri} {trouble(error)}; log.jsonl has every number")

    @property
    def run_id(self) -> str | None:
        """The MLflow run id, None if there is none yet. Waits for MLflow's first answer, but not long."""
        if self._thread is not None and self._record.run_id is None:
            self._answered.wait(_FIRST_ANSWER)
        return self._record.run_id

    def metrics(self, step: int, values: Mapping[Any, float]) -> None:
        """Log numbers at a step; each has a `names.Name`, written as MLflow's plots can read (`names.plain`)."""
        seconds = round(time.monotonic() - self._opened, 3)
        line = {
            "step": step,
            "seconds": seconds,
            "time": round(time.time(), 3),
            **dict(zip(plain(values), values.values(), strict=True)),
        }
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Attach a file to the run. It is sent from where it is: it should stay there."""
        if not path.is_file():
            say(f"warning: no file {path}: MLflow does not get it")
            return
        self._record.add_artifact(self.out, path, folder)
        self._record.save(self.out)

    def image(self, path: Path, key: str, step: int) -> None:
        """Give the run a picture of the run folder that MLflow shows among its charts, by steps."""
        entry = {"key": key, "step": step, "time": now_ms(), "sent": False}
        self._record.save(self.out, images=self._record.images | {str(path.relative_to(self.out)): entry})

    def model(self, folder: Path, register: str | None) -> None:
        """Give the run a model in MLflow's format, a folder of the run folder; register: ``name@alias``."""
        self._record.save(
            self.out, model={"folder": folder.name, "register": register, "id": None, "registered": False}
        )

    def datasets(self, sets: list[dict[str, Any]]) -> None:
        """The sets of clips that the run reads, each with name, digest, source (paths), context (training, validation
        or test) and how many clips."""
        self._record.save(self.out, datasets=sets)

    def scored(self, training: Path, step: int, scores: list[dict[str, Any]]) -> None:
        """What this evaluation found of the model of a training, as MLflow's models have it: of each data set its
        name, digest, and metrics."""
        about = {"step": step, "scores": scores, "time": now_ms(), "sent": False}
        self._record.save(self.out, scored=self._record.scored | {str(training.resolve()): about})

    def table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Write a table into the run folder and attach it; MLflow's pages show and compare it."""
        # What MlflowClient.log_table uploads; that call would append the rows again at every sending.
        columns = list(rows[0])
        data = [[_json_value(row[column]) for column in columns] for row in rows]
        write_json(self.out / name, {"columns": columns, "data": data})
        tables = json.loads(self._record.tags.get("mlflow.loggedArtifacts", "[]"))
        if (entry := {"path": name, "type": "table"}) not in tables:
            tables.append(entry)
        self._tag("mlflow.loggedArtifacts", json.dumps(tables))
        self.artifact(self.out / name)

    def describe(self, markdown: str) -> None:
        """The text on the run's overview page; how to repeat the run is added."""
        self._tag("mlflow.note.content", _note(markdown, self._record.tags))

    def _tag(self, name: str, value: str) -> None:
        self._record.save(self.out, tags={**self._record.tags, name: value})

    def rows(self) -> list[dict[str, float]]:
        """Every logged line so far, those of earlier starts of the run included, in the order of steps.

        A start that went on from a checkpoint logs some steps again: the last line of a step's numbers counts. A line
        cut by a kill or a full disk is left out.
        """
        last: dict[tuple[Any, ...], dict[str, float]] = {}
        for line in (self.out / "log.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError, KeyError, AttributeError):
                row = json.loads(line)
                row.pop("time", None)
                last[row["step"], *sorted(row.keys() - NOT_NUMBERS)] = row
        return sorted(last.values(), key=lambda row: row["step"])

    def close(self, status: str) -> None:
        """End the MLflow run as FINISHED, FAILED or KILLED, within about `PATIENCE`. The first call counts."""
        if self._log.closed:  # a watchdog ends the run from another thread
            return
        self._log.close()
        with suppress(OSError):  # a full disk must not hide the error that ended the run
            self._record.save(self.out, status=status, ended=now_ms())
        if self._thread is None:
            if self._held is not None:
                unlock_file(self._held)
            return
        self._closing.set()
        patience = PATIENCE[status]
        self._thread.join(min(2.0, patience))
        if self._thread.is_alive():
            say(f"sending the rest to MLflow at {self.uri}, for {patience:.0f} s at most")
            self._thread.join(max(0.0, patience - 2.0))
        self._given_up.set()
        self._thread.join(1.0)  # unless it is in the middle of a request, it is at its end now, and gives the lock back
        if self._thread.is_alive() or self._failure:
            with (self.out / "log.jsonl").open("rb") as log:
                log.seek(max(self._first_byte, self._sender.done_to))
                lines = sum(1 for _ in log)
            unsent = f"{count(lines, 'line')} of log.jsonl {'is' if lines == 1 else 'are'}"
            what = unsent if lines else "files, tags or the status are"
            why = trouble(self._failure) if self._failure else "is slow"
            say(f"warning: MLflow at {self.uri} {why}: {what} not sent; `mser sync {self.out}` sends them later")

    def _deliver(self) -> None:
        """The thread: send, pause, until the run is closed and all is sent; after a failure, try again."""
        pause, sample = _EVERY, 0.0
        while not self._given_up.is_set():
            closing = self._closing.is_set()  # read before sending: all that was logged by then goes along
            try:
                self._held = lock(self.out) if self._held is None else self._held
                if self._held is None:
                    raise RuntimeError("another process is sending this run")
                self._sender.connect()
                self._answered.set()
                self._sender.send()
                if not closing and time.monotonic() >= sample:
                    sample = time.monotonic() + _SAMPLE_EVERY
                    # Seconds of wall-clock time as the step: they go on through every start of the run.
                    self._sender.send_live(self._machine.read(), (now_ms() - self._record.started) // 1000)
                if self._failure and not closing:
                    say(f"MLflow at {self.uri} answers again")
                self._failure, pause = None, _EVERY
                if closing:
                    break
            except Exception as error:
                first, self._failure = self._failure is None, error
                self._answered.set()
                if closing and refused(error):
                    break
                if first and not closing:
                    say(f"warning: MLflow at {self.uri} {trouble(error)}; the run goes on, and it is tried again")
                pause = min(2 * pause, _LONGEST_PAUSE)
            if closing:
                self._given_up.wait(1.0)
            else:
                self._closing.wait(pause)
        if self._held is not None:
            unlock_file(self._held)


class _Machine:
    """The load of this machine, by the names under which MLflow's pages know it."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
        from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

        self._monitors: list[Any] = []
        for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor, ROCMMonitor):
            with suppress(Exception):  # no such device, or no library for it
                monitor = kind()
                monitor.collect_metrics()  # the CPU's load is counted from one reading to the next
                monitor.clear_metrics()
                self._monitors.append(monitor)

    def read(self) -> dict[str, float]:
        """The numbers of this moment."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            with suppress(Exception):
                monitor.collect_metrics()
                values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
        return values


def _note(text: str, tags: Mapping[str, str]) -> str:
    """Markdown on a run: a text, and the command that repeats it, from its tags."""
    command = tags.get(COMMAND)
    how = f"To repeat it (another `out` makes another run), from {Path.cwd()}:\n\n```\n{command}\n```"
    return "\n\n".join([*([text] if text else []), *([how] if command else [])])


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def tracked(
    config: cfg.TrackingConfig,
    out: Path,
    tags: dict[str, str],
    params: dict[str, str],
    main: bool,
    links: dict[str, Path] | None = None,
) -> Iterator[Tracker | None]:
    """The tracker of a run on rank 0, None elsewhere; ends the MLflow run with the status that the block ends with.

    links: tags whose value is the MLflow run id of another run folder, looked up when it is there to be sent.
    """
    if not main:
        yield None
        return
    tags = {"mser.version": __version__, "mser.out": str(out.resolve()), CHOSEN: "true", **tags}
    tracker = Tracker(config, out, tags, params, links)
    if (out / "config.yaml").is_file():
        tracker.artifact(out / "config.yaml")
    try:
        yield tracker
    except (KeyboardInterrupt, Stopped):
        tracker.close("KILLED")
        raise
    except BaseException:
        tracker.close("FAILED")
        raise
    tracker.close("FINISHED")
