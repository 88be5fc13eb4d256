"""How long a step takes: the time of its products and that of its traffic, of which the shorter mostly hides.

    T = (C^q + M^q)^(1/q)                          C: computing, M: communicating
    C = micro · (F / (peak · e(GPU) · s) + launch · layers)
    s = 1 / ((1 + width₀ / width) (1 + tokens₀ / tokens))      small products leave a GPU waiting
    F = tokens · (6P + attention · 6 · layers · width · length) · (1 + recompute)
    M = max(across / (a · link), within / (w · NVLink)) + latency · (nodes - 1) · messages

The constants are in constants.json beside this file; `tools/fit_plan.py` fits them on published figures and writes it.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("constants.json")


@dataclass(frozen=True)
class Constants:
    """h100, a100: share of the peak that large products reach. width, tokens: where half of it is lost, in units of
    1,024. launch: seconds a layer and micro-batch. attention: what an operation of causal attention takes, in those of
    a linear layer. recompute: what activation checkpointing adds, as a share. within, across: share of a link's bytes a
    second that come through. overlap: q. latency: seconds a message and node.
    """

    h100: float
    a100: float
    width: float
    tokens: float
    launch: float
    attention: float
    recompute: float
    within: float
    across: float
    overlap: float
    latency: float


@dataclass(frozen=True)
class StepWork:
    """What a rank does in a step.

    linear, attention: operations of a micro-batch, forward and backward, without what is computed again. recomputed:
    share of them that is. width, layers, tokens: of the largest network, and of a micro-batch. micro: micro-batches.
    across, within: bytes through this GPU's share of the links between nodes, and inside. messages: collectives.
    """

    linear: float
    attention: float
    recomputed: float
    width: float
    layers: float
    tokens: float
    micro: int
    across: float
    within: float
    messages: float


@dataclass(frozen=True)
class Machine:
    """peak: FLOP/s. like: of the fit's GPUs. across, within: bytes a second. nodes: of the job."""

    peak: float
    like: str
    across: float
    within: float
    nodes: int


@dataclass(frozen=True)
class Seconds:
    """Of a step: computing, communicating, and both together."""

    compute: float
    communicate: float
    step: float


def seconds(work: StepWork, machine: Machine, constants: Constants) -> Seconds:
    """See the head of this file."""
    c = constants
    share = getattr(c, machine.like) / (1 + c.width * 1024 / work.width) / (1 + c.tokens * 1024 / work.tokens)
    flops = (work.linear + c.attention * work.attention) * (1 + c.recompute * work.recomputed)
    compute = work.micro * (flops / (machine.peak * share) + c.launch * work.layers)
    sending = max(work.across / (c.across * machine.across), work.within / (c.within * machine.within))
    sending += c.latency * (machine.nodes - 1) * work.messages
    return Seconds(
        compute, sending, math.hypot(compute, sending) if c.overlap == 2 else _norm(compute, sending, c.overlap)
    )


def _norm(one: float, other: float, power: float) -> float:
    largest = max(one, other)
    return largest * ((one / largest) ** power + (other / largest) ** power) ** (1 / power)


@cache
def shipped() -> tuple[Constants, tuple[float, float]]:
    """The constants, and the interval: between which factors of the planned time 80 % of the held-out figures lie."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    return Constants(**found["constants"]), (found["interval"][0], found["interval"][1])


def as_json(constants: Constants) -> dict[str, float]:
    return asdict(constants)


NAMES = tuple(field.name for field in fields(Constants))
