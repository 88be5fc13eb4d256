"""When a run has nothing more to gain, and which of its steps is exported."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mser_dist.ranks import distributed
from mser_dist.state.checkpoint import step_of
from mser_dist.state.fork import load_step

if TYPE_CHECKING:
    from mser_dist.training.loop import RunState
    from mser_dist.training.setup import Run


def stalled_for(notes: Mapping[int, Mapping[str, float]], step: int) -> int:
    """Validations up to a step since the best one, which came first; notes: each validation by step."""
    done = {at: found["ua"] for at, found in notes.items() if at <= step}
    best = min((at for at in done if done[at] == max(done.values())), default=0)
    return sum(at > best for at in done)


def out_of_patience(run: "Run", state: "RunState") -> bool:
    """Whether the run ends behind this step, as `train.patience` has it. Collective where a validation is behind it."""
    patience = run.config.train.patience
    if not patience or state.validated != state.step or state.step == 0:
        return False
    over = stalled_for(run.checkpoints.notes, state.step) >= patience
    return bool(distributed.agree(over))  # as rank 0 has it: others may see an older file of validations


def settle(run: "Run", state: "RunState") -> dict[str, Any]:
    """Behind the last step: the engine gets the weights that are exported. What the summary says of it. Collective."""
    notes = run.checkpoints.notes
    kept = [step for step in map(step_of, run.checkpoints.published()) if step in notes]
    best = distributed.agree(max(kept, key=lambda step: (notes[step]["ua"], step), default=None))
    ended: dict[str, Any] = {"steps": state.step, "exported_step": state.step, "stopped_early": state.step < run.total}
    if best is None:
        run.engine.use_average()
        return ended
    found = distributed.agree(notes.get(best))
    if run.config.train.export == "best" and best != state.step:
        run.watchdog.tick("loading the best step")
        load_step(run.setup.out, best, run.engine, run.world)
        ended |= {"exported_step": best, "validation": found}
    run.engine.use_average()
    return ended | {"best_step": best, "best_ua": found["ua"]}
