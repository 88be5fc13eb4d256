"""What a run folder knows of its MLflow run: ``log.jsonl`` has the numbers, ``mlflow.json`` (`Record`) all else."""

import json
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mser_dist import __version__
from mser_dist import config as cfg
from mser_dist.files import lock_file, write_json
from mser_dist.runs.names import plain

NOT_NUMBERS = frozenset({"step", "seconds", "time"})  # of a line of log.jsonl: when, not what
HEADLINE = "test/ua_unseen"  # the metric that MLflow's pages show first, unless somebody has chosen another one
CHOSEN = "mser.chosen_params"  # the tag of a run whose params are those that a person chose, and not all
_TAG_LENGTH = 8000  # characters; MLflow refuses longer ones


def tracking_uri(config: cfg.TrackingConfig, out: Path) -> str:
    """The config's URI, else MLFLOW_TRACKING_URI, else a sqlite file: the run's own as far as it is there, else the
    workspace's."""
    if named := config.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return named
    before = _noted(out, "tracking_uri") or ""
    if (file := sqlite_file(before)) is not None and file.is_file():
        return before
    return f"sqlite:///{workspace(out) / 'mlflow.db'}"


def workspace(out: Path) -> Path:
    """The nearest folder called ``runs`` that a run folder is in, else the one that it is in."""
    parents = out.resolve().parents
    return next((folder for folder in parents if folder.name == "runs"), parents[0])


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite store; None where the store is another."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).resolve() if uri.startswith("sqlite:///") else None


def redact(text: str) -> str:
    """`text` without the user names and passwords of the URIs in it."""
    text = re.sub(r"//[^/\s]*@", "//", text)
    return re.sub(r"(?i)([?&;](?:password|passwd|pwd|token|secret)=)[^&;\s]*", r"\1…", text)


def run_id_of(run: str | Path) -> str | None:
    """The MLflow run id of a run folder, or None where it has none (yet)."""
    return _noted(run, "run_id")


def status_of(run: str | Path) -> str | None:
    """RUNNING, FINISHED, FAILED or KILLED, as the run folder knows it, or None where it has no record."""
    return _noted(run, "status")


def _noted(run: str | Path, what: str) -> str | None:
    try:
        found = json.loads((Path(run) / "mlflow.json").read_text(encoding="utf-8"))[what]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def versions() -> dict[str, str]:
    """Of what numbers may depend on."""
    libraries = {name: version(name) for name in ("torch", "transformers", "numpy", "scikit-learn")}
    return {"python": sys.version.split()[0], "mser_dist": __version__} | libraries


def now_ms() -> int:
    """The time as MLflow counts it: milliseconds since 1970."""
    return int(time.time() * 1000)


def numbers_of(line: bytes, started: int) -> Iterator[tuple[str, int, int, float]]:
    """Name, step, time (ms since 1970) and value of each number in a line of log.jsonl; nothing of a damaged line."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        row = json.loads(line)
        step = int(row["step"])
        # Lines of earlier versions have no time, only the seconds since the start.
        moment = int(1000 * row["time"]) if "time" in row else started + int(1000 * row.get("seconds", 0))
        for name, value in row.items():
            if name not in NOT_NUMBERS and isinstance(value, (int, float)):
                yield name, step, moment, float(value)


def lock(run: Path) -> int | None:
    """Take the run folder for sending, so that only one process does; None if another one has it."""
    return lock_file(run / "log.jsonl")


@dataclass
class Record:
    """``mlflow.json``: all of an MLflow run but its numbers. Times in milliseconds since 1970; no passwords."""

    tracking_uri: str
    experiment: str
    run_name: str
    experiment_id: str | None = None
    run_id: str | None = None
    # Also a tag of the MLflow run: a request to create it that timed out may have been heard.
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    status: str = "RUNNING"
    started: int = field(default_factory=now_ms)
    ended: int | None = None
    tags: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)  # tags whose value is the run id of another run folder
    params: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)  # path in MLflow → file, folder, sent
    images: dict[str, dict[str, Any]] = field(default_factory=dict)  # file in the run folder → key, step, time, sent
    datasets: list[dict[str, Any]] = field(default_factory=list)  # name, digest, source, context, clips
    scored: dict[str, dict[str, Any]] = field(default_factory=dict)  # run folder of a model → its scores by data set
    model: dict[str, Any] | None = None  # folder in the run folder, register (name@alias or None), id, registered

    def __post_init__(self) -> None:
        self._lock = threading.RLock()  # the trainer's thread and the sender's both change and save it

    @classmethod
    def of(cls, run: Path, config: cfg.TrackingConfig, uri: str) -> "Record":
        """The record of a run folder, or a new one; on another server than before, the run is to be sent anew."""
        name = config.run_name or run.resolve().name
        values: dict[str, Any] = {"tracking_uri": redact(uri), "experiment": config.experiment, "run_name": name}
        with suppress(OSError, ValueError, AttributeError):
            text = (run / "mlflow.json").read_text(encoding="utf-8")
            known = {f.name for f in fields(cls)}
            values |= {name: value for name, value in json.loads(text).items() if name in known}
        record = cls(**values)
        if record.tracking_uri != redact(uri):
            record.tracking_uri = redact(uri)
            record.forget_run()
        return record

    def forget_run(self) -> None:
        """Nothing is sent yet."""
        with self._lock:
            self.run_id = self.experiment_id = None
            for entry in [*self.artifacts.values(), *self.images.values()]:
                entry["sent"] = False
            if self.model is not None:
                self.model |= {"id": None, "registered": False}
            for entry in self.scored.values():
                entry["sent"] = False

    def save(self, run: Path, **changes: Any) -> None:
        """Set fields, and replace ``mlflow.json``."""
        with self._lock:
            for name, value in changes.items():
                setattr(self, name, value)
            write_json(run / "mlflow.json", asdict(self))

    def add_params(self, params: dict[str, str]) -> None:
        """Note params without passwords. MLflow cannot change one: what the first start said stays."""
        noted = dict(zip(plain(params), map(redact, params.values()), strict=True))
        with self._lock:
            self.params = noted | self.params

    def add_artifact(self, run: Path, file: Path, folder: str | None) -> None:
        """Note a file to be sent, again if it was; files of the run folder by their relative path."""
        file, run = file.resolve(), run.resolve()
        name = f"{folder}/{file.name}" if folder else file.name
        place = file.relative_to(run) if file.is_relative_to(run) else file
        with self._lock:
            self.artifacts[name] = {"file": str(place), "folder": folder, "sent": False}

    def all_tags(self) -> dict[str, str]:
        """The tags, with links to those runs that have an id by now."""
        linked = {name: run_id_of(run) or "" for name, run in self.links.items()}
        return {name: value[:_TAG_LENGTH] for name, value in {**self.tags, **linked}.items() if value}
