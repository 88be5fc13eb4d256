"""A checkpoint of another run, from which a new one begins. That one's folder is left alone: it may be running."""

from pathlib import Path
from typing import Any

from mser_dist.errors import UserError
from mser_dist.ranks import distributed
from mser_dist.state.checkpoint import Check, Engine, load, read_notes, step_of
from mser_dist.state.seal import folder_fault, whole_fault


def run_of(fork: str) -> Path:
    """The run folder in ``RUN@STEP``, ``RUN@best`` or ``RUN``."""
    return Path(_parts(fork)[0])


def find(fork: str) -> Path:
    """The checkpoint that a fork names: of a step, of the best validation, or the newest.

    Raises `UserError` that names the kept steps.
    """
    run, wanted = _parts(fork)
    if not Path(run).is_dir():
        raise UserError(f"train.fork={fork}: there is no run folder {run}")
    kept = {step_of(p): p for p in (Path(run) / "checkpoints").glob("step-*") if p.name[5:].isdecimal()}
    if not kept:
        raise UserError(f"train.fork={fork}: the run has kept no checkpoint")
    listed = ", ".join(map(str, sorted(kept)))
    if wanted == "":
        return kept[max(kept)]
    if wanted == "best":
        notes = {
            step: found["ua"] for step, found in read_notes(Path(run) / "validations.json").items() if step in kept
        }
        if not notes:
            raise UserError(f"train.fork={fork}: no kept step was validated; name one of {listed}")
        return kept[max(notes, key=lambda step: (notes[step], step))]
    if int(wanted) not in kept:
        raise UserError(f"train.fork={fork}: the run has kept no step {int(wanted)}: name one of {listed}")
    return kept[int(wanted)]


def load_fork(
    fork: str, engine: Engine, world: distributed.World, trust: bool = False, check: Check | None = None
) -> dict[str, Any]:
    """Put the checkpoint that a fork names into an engine, whose own groups and learning rates stay. Collective.

    Returns its state. Raises `UserError` where it is not whole, is of another model, or, without `trust`, others could
    have written it.
    """
    folder = Path(distributed.agree(str(find(fork)) if world.is_main else ""))
    _check_whole(folder, world, trust, f"train.fork={fork}")
    return load(folder, engine, world, fork=True, check=check)


def load_step(run: Path, step: int, engine: Engine, world: distributed.World) -> None:
    """Put an earlier step of a run into its own engine. Collective. Raises `UserError` where it is not whole."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    _check_whole(folder, world, True, f"train.export=best, step {step}")
    load(folder, engine, world)


def _check_whole(folder: Path, world: distributed.World, trust: bool, named: str) -> None:
    """Raise `UserError`, on every rank, for a checkpoint that is damaged or, without `trust`, others could write."""
    found = folder_fault(folder) if world.is_main and not trust else None
    if found := distributed.agree(found):
        raise UserError(f"{named}: {found}: make sure of what is in it, then set train.trust_checkpoints=true")
    if fault := whole_fault(folder, world.rank, world.world_size):
        raise UserError(f"{named}: {fault}")


def _parts(fork: str) -> tuple[str, str]:
    """(run folder, step, "best" or nothing): a folder's own name may hold an @."""
    run, at, step = fork.rpartition("@")
    return (run, step) if at and (step.isdecimal() or step == "best") else (fork, "")
