"""A run's folder: taken for one config, and given back to it alone."""

import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mser_dist import __version__
from mser_dist import config as cfg
from mser_dist.config.file import flatten, read_yaml
from mser_dist.errors import UserError
from mser_dist.files import file_sha256, lock_file, read_json, unlock_file, write_text
from mser_dist.ranks import distributed
from mser_dist.runs.record import status_of

# Keys that may change between two starts of a run: they do not touch what is learned.
_FREE = ("data.workers", "data.max_bad", "data.cache_", "tracking.", "engine.timeout_minutes", "engine.peer_seconds")
_FREE_TELEMETRY = ("engine.peak_tflops", "train.profile_steps")
_FREE_TRAIN = ("train.log_every", "train.val_every", "train.save_", "train.keep", "train.background_save")
_FREE_SAFETY = ("train.trust_", "train.max_skipped")
_ENDS = ("train.patience", "train.export")  # when it ends, and what of it is exported then
_LENGTH = ("train.steps", "train.epochs")  # the first of them that is set; a run can be lengthened
# What a run of stage 2 did whose config has no such key yet; of other keys that are new it did what is the default.
UNSAID = {"llm.order": "speech_first", "llm.packing": "off", "llm.prompt.draw": "clip"}
# Chosen where it is None: what comes of it is compared where a checkpoint is read, whoever chose it.
_FORMER = ("data.shuffle_shards",)

# What a start writes, and what an evaluation leaves of one.
_OF_A_START = ("log.jsonl", "mlflow.json", "validations.json", "prompt.json", "ledger.safetensors", "tested.jsonl")
_OF_AN_EVALUATION = ("report.json", "predictions.parquet", "report.html", "table.txt")


def _has_checkpoint(out: Path) -> bool:
    return any((out / "checkpoints").glob("step-*"))


def finished(out: Path, config: cfg.Common) -> dict[str, Any] | None:
    """The summary of a run that has ended already, or None: also where it is to be longer now, or to end otherwise.

    Raises `UserError` if the folder holds another config's run, or a longer one.
    """
    saved, summary = out / "config.yaml", out / "summary.json"
    if not saved.is_file() or not (summary.is_file() or _has_checkpoint(out)):
        return None  # nothing to lose
    old, new = flatten(read_yaml(saved)), flatten(config)
    kind: Any = type(config)
    old = {key: value for key, value in (flatten(kind()) | UNSAID).items() if key in new} | old
    free = _FREE + _FREE_TRAIN + _FREE_SAFETY + _FREE_TELEMETRY + _LENGTH + _ENDS
    keys = [key for key in sorted(old.keys() | new.keys()) if not key.startswith(free)]
    changed = [key for key in keys if old.get(key) != new.get(key)]
    changed = [key for key in changed if key not in _FORMER or "None" not in (old.get(key), new.get(key))]
    if changed:
        differ = ", ".join(f"{key}={old.get(key)}, now {new.get(key)}" for key in changed[:8])
        more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
        version = written_by(out)
        other = f", written by mser_dist {version} (this is {__version__})" if version != __version__ else ""
        raise UserError(
            f"{out} holds a run with another config ({differ}{more}){other}: choose another run folder, or delete it"
        )
    before, now = _length(old), _length(new)
    if before[0] == now[0] and now[1] < before[1]:
        key = before[0]
        raise UserError(
            f"{out} holds a run of {key}={before[1]:g}, and {key}={now[1]:g} is shorter: a run can only be lengthened; "
            "choose another run folder"
        )
    ends = [key for key in _ENDS if old.get(key, new.get(key)) != new.get(key)]  # older versions wrote none of them
    return read_json(summary) if summary.is_file() and before == now and not ends else None


def evaluated(config: cfg.Evaluation, trainings: Iterable[Path]) -> bool:
    """Whether an evaluation is in its folder, of this config, and of these trainings as they are now."""
    report, saved = (Path(config.out) / name for name in ("report.json", "config.yaml"))
    if not (report.is_file() and saved.is_file()):
        return False
    old, new = ({k: v for k, v in flatten(of).items() if not k.startswith("tracking.")}
                for of in (read_yaml(saved), config))  # fmt: skip
    return old == new and all(newer(report, run) for run in trainings)


def newer(report: Path, training: Path) -> bool:
    """Whether an evaluation is of a training as it is now: it has ended, and not after its evaluation."""
    summary = training / "summary.json"
    return summary.is_file() and summary.stat().st_mtime <= report.stat().st_mtime


def _length(flat: dict[str, str]) -> tuple[str, float]:
    """The key that says how long a run is, and its value."""
    key = next(key for key in _LENGTH if flat.get(key, "None") != "None")
    return key, float(flat[key])


def steps_done(out: Path) -> int:
    """Of the newest checkpoint in a run folder; 0 where there is none."""
    names = [path.name[5:] for path in (out / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def written_by(out: Path) -> str:
    """The version that started a run, by the first line of its config.yaml, which 0.1.0 did not write."""
    with (out / "config.yaml").open(encoding="utf-8") as file:
        found = re.match(r"# mser_dist (\S+)", file.readline())
    return found[1] if found else "0.1.0"


def prepare(out: Path, config_text: str, anew: bool = False) -> None:
    """Make the folder; `UserError` if it cannot be written.

    A start of another config that left no checkpoint is forgotten, with its log and its MLflow run id; with `anew`, so
    is any start.
    """
    _check_no_set(out)
    config_text = f"# mser_dist {__version__}\n{config_text}"
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        saved = out / "config.yaml"
        same = saved.is_file() and saved.read_text(encoding="utf-8") == config_text
        if anew or not (same or _has_checkpoint(out)):
            for name in _OF_A_START:
                (out / name).unlink(missing_ok=True)
        if not same:
            (out / "summary.json").unlink(missing_ok=True)  # of a run that is to be longer now: it is not over
            write_text(saved, config_text)
    except OSError as error:
        raise UserError(f"cannot write to the folder {out}: {error.strerror}: choose another with out=…") from error


def check_no_training(out: Path) -> None:
    """Raise `UserError` for the folder of a training, in which an evaluation is to write."""
    if (out / "checkpoints").exists() or (out / "summary.json").exists():
        raise UserError(f"out={out} is the folder of a training run: name another one for the evaluation")


def prepare_evaluation(out: Path, config_text: str) -> None:
    """`prepare`: one that was stopped goes on in its MLflow run; one that has ended is followed by another.

    Results that lie there go before the config does: they would look like those of an evaluation that never ended.
    """
    _check_no_set(out)
    try:
        for name in _OF_AN_EVALUATION:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to the folder {out}: {error.strerror}: choose another with out=…") from error
    prepare(out, config_text, anew=status_of(out) in ("FINISHED", "FAILED"))


def _check_no_set(out: Path) -> None:
    """Raise `UserError` for a set of shards: a run's lock in it would look like that of a `mser pack` that died."""
    if (out / "dataset.json").exists():
        raise UserError(f"{out} holds a set of shards: choose another folder for the run with out=…")


@contextmanager
def forgotten_if_refused(out: Path) -> Iterator[None]:
    """Around a start: a folder that is new, and that a mistake of the user leaves with nothing in it, is removed."""
    new = not out.exists()
    try:
        yield
    except UserError:
        if new and out.is_dir() and {path.name for path in out.iterdir()} <= {".lock", "config.yaml"}:
            shutil.rmtree(out, ignore_errors=True)
        raise


@contextmanager
def claimed(out: Path, patience: float) -> Iterator[None]:
    """Hold the run folder for the block: two trainings in it would prune each other's checkpoints.

    Waits `patience` seconds for a start that is just ending. `UserError` then; but a lock of an earlier start of this
    SLURM job is that of a dead node, which some network file systems keep, and is passed over.
    """
    _check_no_set(out)
    job, start = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    lock = out / ".lock"
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        deadline = time.monotonic() + patience
        while (handle := lock_file(lock)) is None:
            holder = lock.read_text(encoding="utf-8")
            if time.monotonic() > deadline:
                before = re.match(r"job (\S+), start (\d+) ", holder)
                if job and before and before[1] == job and int(before[2]) < start:
                    distributed.warn(f"{lock} is still held by {holder}, an earlier start of this job: going on")
                    break
                raise UserError(
                    f"another process is training in {out} ({holder}): wait for it to end, or choose another out=…"
                )
            time.sleep(0.5)
        if handle is not None:
            os.truncate(handle, 0)
            os.write(
                handle, f"job {job or 'none'}, start {start} on {socket.gethostname()}, process {os.getpid()}".encode()
            )
    except OSError as error:
        raise UserError(f"cannot write to the folder {out}: {error.strerror}: choose another with out=…") from error
    try:
        yield
    finally:
        if handle is not None:
            unlock_file(handle)


def seen_by_all(out: Path, patience: float = 30.0) -> None:
    """Check that every rank sees the config that rank 0 has just written; collective, `UserError` on all if not.

    A file system that nodes share may be a moment late. On one that they do not share, no checkpoint would be whole.
    """
    wanted = distributed.agree(_digest(out / "config.yaml"))
    deadline = time.monotonic() + patience
    while (seen := _digest(out / "config.yaml") == wanted) is False and time.monotonic() < deadline:
        time.sleep(0.5)
    if blind := distributed.first(None if seen else socket.gethostname()):
        raise UserError(
            f"{blind} does not see the run folder {out} of rank 0: set out= to an absolute path on a file system "
            "that all nodes share"
        )


def _digest(path: Path) -> str | None:
    return file_sha256(path) if path.is_file() else None
