"""An exponential average of the weights, kept by each rank of what it steps, as one more state of the optimizer.

So a checkpoint holds it, and another number of ranks reads it, as it does the moments. It is of the float32 masters.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mser_dist import deepspeed_parts
from mser_dist.state.engine_state import AVERAGE


@torch.no_grad()
def update(engine: Any, decay: float) -> None:
    """After a step that changed the weights. In the first steps the average forgets faster: n / (n + 9) at the n-th."""
    counts = deepspeed_parts.counters(engine)
    done = counts["global_steps"] - counts["skipped_steps"]
    keep = min(decay, done / (done + 9))
    for owner, state in _held(engine):
        if AVERAGE in state:
            state[AVERAGE].lerp_(owner, 1 - keep)
        else:
            state[AVERAGE] = owner.detach().clone()


def swap(engine: Any) -> None:
    """The masters and their average change places, and the model follows: a second time, all is as before. Collective.

    Nothing may be stepped or saved in between.
    """
    with deepspeed_parts.rewriting(engine):
        for owner, state in _held(engine):
            if AVERAGE in state:
                kept = owner.detach().clone()
                owner.copy_(state[AVERAGE])
                state[AVERAGE].copy_(kept)


def drop(engine: Any) -> None:
    """Forget an average that a fork does not go on with."""
    for state in deepspeed_parts.optimizer(engine).state.values():
        state.pop(AVERAGE, None)


def _held(engine: Any) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """What this rank steps, with its optimizer's state; nothing of it before the first step."""
    states = deepspeed_parts.optimizer(engine).state
    owners = {id(part.owner): part.owner for group in deepspeed_parts.trained(engine) for part in group}
    for owner in owners.values():
        if states.get(owner):
            yield owner, states[owner]
