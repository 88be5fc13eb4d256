"""Checkpoints that are whole or not there: copy → write → hash → seal → publish → prune.

A checkpoint is ``<run>/checkpoints/step-000123``: each rank's slices of the training state (`engine_state`), its random
state, ``state.json``, ``manifest.json`` (which file holds what), and ``seal.json`` with the size and SHA-256 of every
file. Training waits only for the copy to
memory; a thread of each rank writes, syncs and hashes that rank's files under a ``.partial`` name. When all ranks have
said so between two steps, rank 0 seals and publishes by one rename, and only then are older ones pruned.
Nothing in a checkpoint is a pickle.
"""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from mser_dist import __version__
from mser_dist.errors import PassingError, UserError
from mser_dist.files import file_sha256, fsync_tree, shows, write_json
from mser_dist.ranks import distributed
from mser_dist.state import engine_state, manifest
from mser_dist.state.random_state import random_state, set_random_state
from mser_dist.state.seal import Sealed, folder_fault, whole_fault

FORMAT = 3  # of state.json and the ranks' files: raised where an older version could not read what this one writes
_READ = (2, FORMAT)  # formats that can be read: 2 held frozen weights too
_LATE = 30.0  # seconds that a shared file system may take to show another node's files
_FULL = re.compile(r"no space left|disk quota|os error (28|122)\b", re.IGNORECASE)


Check = Callable[[dict[str, Any]], None]


class Engine(Protocol):
    """What a checkpoint needs of an engine; `training.engine.Engine` has it."""

    def collect(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]: ...

    def restore(self, folder: Path, fork: bool = False) -> None: ...


class Checkpoints:
    """The checkpoints of one run. Every method but `published` is collective.

    `keep` newest ones are kept, and the one with the best validation UA. With `background`, `save` returns when the
    state is copied to memory; call `settle` between steps, and `finish` before the process ends.
    """

    def __init__(self, run: Path, world: distributed.World, keep: int, background: bool = True) -> None:
        self.folder = run / "checkpoints"
        self.world = world
        self.keep = max(1, keep)
        self.background = background
        self.seconds = 0.0  # how long the last save took until it was durable
        self._notes_file = run / "validations.json"
        self._notes: dict[int, dict[str, float]] = read_notes(self._notes_file)
        self._pruned_with: dict[int, dict[str, float]] | None = None  # the notes of the last pruning
        self._damaged: set[str] = set()  # by the last `choose`: they must not be kept instead of whole ones
        self._buffers: dict[str, torch.Tensor] = {}
        self._writing: _Background | None = None
        self._publishing: _Background | None = None
        self._state: dict[str, Any] = {}
        self._description: dict[str, Any] = {}  # of this rank's part of the save under way
        self._began = 0.0

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save(self, step: int, engine: Engine, state: dict[str, Any]) -> None:
        """Save the training state after `step` optimizer steps; `state` is JSON. A save under way is finished first."""
        self._join()
        self._began = time.monotonic()
        self._state = {
            "format": FORMAT,
            "version": __version__,
            "world_size": self.world.world_size,
            **state,
            "step": step,
        }
        staging = self._staging()
        tensors, description = engine.collect()
        self._description = description
        self._copy(tensors)
        random = random_state()
        failure = None
        if self.world.is_main:
            try:
                _fresh(staging)
            except OSError as error:
                failure = str(error)
        if failure := distributed.agree(failure):
            raise self._cannot(failure)
        rank, buffers = self.world.rank, {name: self._buffers[name] for name in tensors}
        self._writing = _Background(lambda: write_part(staging, rank, buffers, description, random))
        if not self.background:
            self._join()

    def settle(self, ready: bool) -> None:
        """Publish the save under way if `ready`: every rank's `written` is true, as the ranks have agreed."""
        if ready and self._writing:
            self._seal()

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write, or cannot write it."""
        return self._writing is None or self._writing.done

    @property
    def failed(self) -> bool:
        """Whether this rank already knows that `finish` will fail."""
        return any(task and task.done and task.error for task in (self._writing, self._publishing))

    def finish(self) -> None:
        """Wait until the save under way is durable and published. Raises `UserError` if it cannot be."""
        self._join()
        if self.world.is_main and self._pruned_with not in (None, self._notes):  # the last one was validated since
            self._prune_softly()

    def _join(self) -> None:
        if self._writing:
            self._seal()
        if self._publishing:
            self._publishing.join()
        failure = self._publishing.error if self._publishing else None
        self._publishing = None
        if failure := distributed.first(failure):
            raise self._cannot(failure)

    def _seal(self) -> None:
        """Collect what the ranks have written; rank 0 publishes it in a thread, as pruning may take long."""
        assert self._writing is not None
        self._writing.join()
        task, self._writing = self._writing, None
        failure = f"rank {self.world.rank}: {task.error}" if task.error else None
        if failure := distributed.first(failure):
            raise self._cannot(failure)
        parts = distributed.store().to_main(task.result)  # rank 0 alone has to know of all files
        if parts is None:
            return
        files = {name: (size, digest) for part, _ in parts for name, (size, digest) in part.items()}
        where = manifest.combine(self._description, [layout for _, layout in parts])
        staging, state = self._staging(), self._state

        def publish_and_prune() -> None:
            publish(staging, files, state, where)
            self.seconds = time.monotonic() - self._began
            self._damaged.discard(staging.with_suffix("").name)
            self._prune_softly()

        if self._publishing:
            self._publishing.join()
        self._publishing = _Background(publish_and_prune)

    def _cannot(self, failure: str) -> UserError:
        """A full disk is the user's to mend; any other failure may pass, and the job may be started again."""
        if self.world.is_main:
            shutil.rmtree(self._staging(), ignore_errors=True)
        try:
            free = f"{shutil.disk_usage(self.folder.parent).free / 2**30:.1f} GiB free"
        except OSError:  # the run folder has been removed meanwhile
            free = f"there is no {self.folder.parent} any more"
        what = f"cannot write the checkpoint {self._staging().with_suffix('')} ({failure}; {free})"
        again = "start the same command again; earlier checkpoints are untouched"
        if _FULL.search(failure):
            return UserError(f"{what}: free space and {again}")
        return PassingError(f"{what}: {again}")

    def _staging(self) -> Path:
        return self.folder / f"step-{self._state['step']:06d}.partial"

    def _copy(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy to CPU buffers that are kept from save to save: making them anew would cost more than the copy."""
        for name, tensor in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                pinned = tensor.is_cuda
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[name].copy_(tensor, non_blocking=tensor.is_cuda)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _prune_softly(self) -> None:
        try:
            self._prune()
        except OSError as error:  # a file that something else has open, say: the new checkpoint is there
            distributed.warn(f"an old checkpoint could not be removed ({error})")

    def _prune(self) -> None:
        found = [folder for folder in self.published() if folder.name not in self._damaged]
        notes = self._notes
        best = max(found, key=lambda p: (notes.get(step_of(p), {}).get("ua", -1.0), step_of(p)), default=None)
        kept = {*found[-self.keep :], *([best] if best and step_of(best) in notes else [])}
        self._pruned_with = notes
        for old in found:
            if old not in kept:
                prune(old)

    def published(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        found = {step_of(p): p for p in self.folder.glob("step-*") if p.name[5:].isdecimal() and p.is_dir()}
        return [found[step] for step in sorted(found)]  # by number: step-1000000 comes after step-999999

    # ---- which is the best -------------------------------------------------------------------------------------------

    def note(self, step: int, validation: dict[str, float]) -> None:
        """The validation of a step, saved or not: the checkpoint with the highest "ua" is kept.

        Apart from the checkpoint, which is sealed before its step is validated.
        """
        self._notes = {**self._notes, step: validation}
        if self.world.is_main:
            try:
                write_json(self._notes_file, self._notes)
            except OSError as error:  # a resume then validates this step again
                distributed.warn(f"{self._notes_file} could not be written ({error})")

    @property
    def notes(self) -> dict[int, dict[str, float]]:
        """All that `note` was told, by step."""
        return self._notes

    def noted(self, step: int) -> dict[str, float] | None:
        """What `note` was told of a step, by this start or an earlier one. Collective."""
        found: dict[str, float] | None = distributed.agree(self._notes.get(step) if self.world.is_main else None)
        return found

    # ---- loading -----------------------------------------------------------------------------------------------------

    def resume(self, engine: Engine, trust: bool = False, check: Check | None = None) -> dict[str, Any] | None:
        """Load the newest checkpoint whose seal holds and return its state, or None in a fresh run.

        check: raises where its state says that it must not be loaded.
        Another number of processes may have written it: then each rank's random state is left as it is. Raises
        `UserError` where checkpoints are there and none is whole, or, without `trust`, others could have written them.
        """
        folder = self.choose(trust)
        return load(folder, engine, self.world, check=check) if folder else None

    def choose(self, trust: bool = False) -> Path | None:
        """The newest checkpoint whose seal holds, or None where there is no checkpoint."""
        listed, problem = distributed.agree(self._look(trust) if self.world.is_main else None)
        if problem:
            raise UserError(problem)
        found = [self.folder / name for name in listed]
        broken: list[str] = []
        for folder in reversed(found):
            if fault := whole_fault(folder, self.world.rank, self.world.world_size):
                broken.append(fault)
                continue
            if broken and self.world.is_main:
                distributed.warn(f"falling back to {folder}: {'; '.join(broken)}")
            self._damaged = {damaged.name for damaged in found[found.index(folder) + 1 :]}
            return folder
        if broken:
            raise UserError(
                f"no checkpoint in {self.folder} is whole ({'; '.join(broken)}): move the folder away to start anew"
            )
        return None

    def _look(self, trust: bool) -> tuple[list[str], str | None]:
        """(names of published checkpoints, what forbids to use them). What was left half-written is removed."""
        found = self.published()
        if found and not trust and (faults := [f for f in map(folder_fault, (self.folder, *found)) if f]):
            return [], f"{faults[0]}: make sure of what is in it, then set train.trust_checkpoints=true"
        partial = list(self.folder.glob("step-*.partial"))
        others = [p.name for p in self.folder.glob("*") if p not in partial and not p.name.startswith(".")]
        if others and not found:
            return [], f"{self.folder} holds {others[0]} and no checkpoint: move it away to start anew"
        for staging in partial:
            why = "" if found else "; no checkpoint was finished, so the run starts from step 0"
            distributed.warn(f"removing {staging.name}, half written or half removed{why}")
            shutil.rmtree(staging, ignore_errors=True)
        return [folder.name for folder in found], None


def load(
    folder: Path, engine: Engine, world: distributed.World, fork: bool = False, check: Check | None = None
) -> dict[str, Any]:
    """Put a checkpoint, whose seal was checked, into an engine; its state. `fork`: it is of another run. Collective."""
    state: dict[str, Any] = distributed.agree(
        json.loads((folder / "state.json").read_text(encoding="utf-8")) if world.is_main else None
    )
    if state.get("format") not in _READ:
        raise UserError(
            f"{folder} was written by mser_dist {state.get('version', '0.1.0')}, and this is "
            f"{__version__}, which cannot read it: go on with that version, or train anew with another out="
        )
    if check:
        check(state)
    engine.restore(folder, fork)
    if state["world_size"] == world.world_size:
        set_random_state(load_file(folder / f"random-{world.rank:05d}.safetensors"))
    return state


class _Background:
    """A call in a thread, with its result or the first line of its error."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: str | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.result = call()
        except Exception as error:  # whatever it is, it must not look like a checkpoint
            self.error = (str(error).splitlines() or [type(error).__name__])[0]

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()


def write_part(
    staging: Path,
    rank: int,
    tensors: dict[str, torch.Tensor],
    description: dict[str, Any],
    random: dict[str, torch.Tensor],
) -> tuple[Sealed, dict[str, Any]]:
    """Write one rank's files; their sizes and hashes, and what is where in them (`manifest.layout`)."""
    _make(staging)  # another node may not see rank 0's folder yet
    part, state = manifest.rank_file(staging, rank), staging / f"random-{rank:05d}.safetensors"
    engine_state.write(part, tensors, description)
    save_file(random, state)
    for path in (part, state):
        fsync_tree(path)
    sealed = {path.name: (path.stat().st_size, file_sha256(path)) for path in (part, state)}
    return sealed, manifest.layout(description)


def publish(staging: Path, files: Sealed, state: dict[str, Any], where: manifest.Manifest) -> None:
    """Seal what all ranks have written and give it its name. Raises `OSError` where a file is not to be seen here.

    One look at each file: the seal is a promise of rank 0 for all of them, and a thread makes it.
    """
    deadline = time.monotonic() + _LATE
    for name, (size, _) in files.items():
        if not shows(staging / name, deadline - time.monotonic(), size):
            raise OSError(f"{name} is not to be seen by rank 0: out= must be on a file system that all nodes share")
    seal(staging, files, state, where)
    final = staging.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)
    fsync_tree(final.parent, below=False)


def seal(staging: Path, files: Sealed, state: dict[str, Any], where: manifest.Manifest) -> None:
    """Write ``state.json``, the manifest and ``seal.json``: the checkpoint counts as whole, once it is renamed."""
    for name, value in (("state.json", state), (manifest.FILE, where)):
        write_json(staging / name, value, compact=name == manifest.FILE)
        files = files | {name: ((staging / name).stat().st_size, file_sha256(staging / name))}
    write_json(staging / "seal.json", files)
    fsync_tree(staging, below=False)


def prune(folder: Path) -> None:
    """Remove an old checkpoint: first its name, so that a kill half-way leaves nothing that looks whole."""
    doomed = folder.with_suffix(".partial")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name[5:])


def read_notes(file: Path) -> dict[int, dict[str, float]]:
    """The validation of each step that was validated, by ``validations.json`` of a run folder."""
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        return {int(step): {str(k): float(v) for k, v in found.items()} for step, found in plain.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # none yet, or damaged: what it said is in log.jsonl, and the validations to come are noted anew


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _make(folder)


def _make(folder: Path) -> None:
    for one in (folder.parent, folder):  # not by `parents`, which would take the umask's mode
        one.mkdir(mode=0o700, exist_ok=True)
