"""Where a run goes on: at its own newest checkpoint, perhaps of a shorter run, or at another run's."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.runs import folder
from mser_dist.state import fork
from mser_dist.state.checkpoint import Check, step_of
from mser_dist.stream.plan import START
from mser_dist.training import stages
from mser_dist.training.engine import Engine

if TYPE_CHECKING:
    from mser_dist.training.setup import Setup


def check_length(config: cfg.Stage1 | cfg.Stage2, total: int) -> None:
    """Raise `UserError` where a run, or the one that it is a fork of, has done more steps than it is to have."""
    out, source = Path(config.out), config.train.fork
    if done := folder.steps_done(out):
        if total < done:
            raise UserError(f"{out} has done {done} steps, and is to have {total}: set train.steps={done} or more")
    elif source:
        done = step_of(fork.find(source))
        if total <= done:
            raise UserError(
                f"train.fork={source} begins behind step {done}, and the run is to have {total} in all: set "
                f"train.steps to more than {done}"
            )


def lengthened(setup: "Setup", stage: stages.Align | stages.Instruct, resumed: dict[str, Any]) -> list[str]:
    """What to tell of a run that is longer than when it was saved."""
    before = int(resumed.get("total", 0)) or setup.total
    if before == setup.total:
        return []
    if stage.model.speech.normalize != "none" and before * setup.config.train.global_batch < len(setup.shards):
        raise UserError(
            f"{setup.out} has statistics (encoder.normalize) of the clips that its {before} steps read, less than one "
            f"pass over the set: it cannot be lengthened; set train.steps={before}, or train anew with another out="
        )
    return [
        f"the run was of {before} steps, and is of {setup.total} now: the learning rate goes on as train.schedule has "
        "it in a run of that length"
    ]


def forked(setup: "Setup", engine: Engine, order: dict[str, Any], check: Check) -> tuple[dict[str, Any], str]:
    """The state that a fork begins with, and what to tell of it. Collective."""
    train = setup.config.train
    assert train.fork is not None
    state = fork.load_fork(train.fork, engine, setup.world, train.trust_checkpoints, check)
    there, step = state["order"], int(state["step"])
    if there.get("frozen_encoder") != order.get("frozen_encoder"):
        raise UserError(f"train.fork={train.fork}: its frozen encoder is another one than this run's")
    # Validations are the other run's, of checkpoints that are not here.
    state |= {"order": order, "validation": {}, "validated": 0, "best_ua": -1.0}
    where = f"a fork of step {step} of {fork.run_of(train.fork)}"
    if there != order:  # its position counts in another order of clips
        state |= {"position": list(START), "bad": []}
        return state, f"{where}, with clips or batches of its own, which it reads from the first one on"
    return state, f"{where}, at its place in the order of the clips"
