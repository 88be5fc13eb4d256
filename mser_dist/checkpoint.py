"""Checkpoints that are whole or not there: stage → barrier → fsync → seal → publish → prune.

A checkpoint is ``<run>/checkpoints/step-000123``: DeepSpeed's files, each rank's random state, ``state.json``, and
``seal.json`` with the size and SHA-256 of every file. All is written under a ``.partial`` name, then published by one
rename.
DeepSpeed's own ``latest`` pointer is not used: it may appear before another rank's shard.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mser_dist import distributed
from mser_dist.engine import Engine
from mser_dist.errors import UserError
from mser_dist.files import file_sha256, fsync_tree, write_json


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run: Path, world: distributed.World, keep: int) -> None:
        self.folder = run / "checkpoints"
        self.world = world
        self.keep = max(1, keep)

    def save(self, step: int, engine: Engine, state: dict[str, Any]) -> None:
        """Publish the training state after `step` optimizer steps; `state` is JSON. Collective."""
        name = f"step-{step:06d}"
        staging = self.folder / f"{name}.partial"

        def write() -> None:
            engine.save(staging / "engine")
            save_file(_random_state(), staging / f"random-{self.world.rank:05d}.safetensors")

        state = {"step": step, "world_size": self.world.world_size, **state}
        failures = self._together(lambda: _fresh(staging), self.world.is_main)
        failures = failures or self._together(write)
        failures = failures or self._together(lambda: self._publish(staging, name, state), self.world.is_main)
        if failures:
            if self.world.is_main:
                shutil.rmtree(staging, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free / 2**30
            raise UserError(
                f"cannot write the checkpoint {self.folder / name} ({failures[0]}; {free:.1f} GiB free): "
                "free space and start the same command again; earlier checkpoints are untouched"
            )

    def _together(self, work: Callable[[], None], mine: bool = True) -> list[str]:
        """Do a part of a save where it is `mine`; every rank learns what failed on any. Collective."""
        failure = None
        try:
            if mine:
                work()
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has a name in every library
            failure = f"rank {self.world.rank}: {str(error).splitlines()[0]}"
        return [f for f in distributed.gather(failure) if f]

    def _publish(self, staging: Path, name: str, state: dict[str, Any]) -> None:
        write_json(staging / "state.json", state)
        files = {
            str(path.relative_to(staging)): [path.stat().st_size, file_sha256(path)]
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
        write_json(staging / "seal.json", files)
        fsync_tree(staging)
        final = self.folder / name
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        fsync_tree(final)
        for old in self.published()[: -self.keep]:
            shutil.rmtree(old)

    def published(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        found = {int(p.name[5:]): p for p in self.folder.glob("step-*") if p.name[5:].isdecimal() and p.is_dir()}
        return [found[step] for step in sorted(found)]  # by number: step-1000000 comes after step-999999

    def resume(self, engine: Engine) -> dict[str, Any] | None:
        """Load the newest checkpoint whose seal holds and return its state, or None in a fresh run. Collective."""
        choice, problem = distributed.agree(self._choose() if self.world.is_main else (None, None))
        if problem:
            raise UserError(problem)
        if choice is None:
            return None
        folder = Path(choice)
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["world_size"] != self.world.world_size:
            raise UserError(
                f"{folder} was written by {state['world_size']} processes and there are {self.world.world_size}: "
                f"resume with {state['world_size']} processes, or start a new run folder with out=…"
            )
        engine.load(folder / "engine")
        _set_random_state(load_file(folder / f"random-{self.world.rank:05d}.safetensors"))
        return state

    def _choose(self) -> tuple[str | None, str | None]:
        """(newest whole checkpoint, error). Rank 0 alone decides."""
        found = self.published()
        broken: list[str] = []
        for folder in reversed(found):
            fault = seal_fault(folder)
            if fault is None:
                if broken:
                    warnings.warn(f"falling back to {folder}: {'; '.join(broken)}", stacklevel=2)
                return str(folder), None
            broken.append(fault)
        if broken:
            return (
                None,
                f"no checkpoint in {self.folder} is whole ({'; '.join(broken)}): move the folder away to start anew",
            )
        return None, None


def seal_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as its seal says."""
    try:
        sealed = json.loads((folder / "seal.json").read_text(encoding="utf-8"))
        files = [(name, size, digest) for name, (size, digest) in sealed.items()]
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{folder.name} has no readable seal.json"
    for name, size, digest in files:
        path = folder / name
        if not path.is_file():
            return f"{folder.name}/{name} is missing"
        if path.stat().st_size != size or file_sha256(path) != digest:
            return f"{folder.name}/{name} differs from its seal"
    return None


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
