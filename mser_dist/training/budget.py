"""What a step of stage 2 computes and what it sends, before a step is taken: does the work pay for the traffic?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mser_dist import deepspeed_parts
from mser_dist.models.flops import Heard, StepCount, work_of
from mser_dist.models.packed import Packing, Sample, batch_of, is_flash
from mser_dist.models.speech_llm import SpeechLLM

# Assumed of a cluster, in bytes a second, one way: a GPU's share of its node's links to the other nodes (400 Gb/s
# InfiniBand, one card a GPU), and its link within the node (NVLink of an H100).
ACROSS, WITHIN = 50e9, 450e9
# Of the peak and of the links, the share that large jobs come to.
COMPUTING, SENDING = 0.5, 0.8


@dataclass(frozen=True)
class Budget:
    """Of a rank and step. across: bytes that come through its share of its node's links; within: through its own."""

    tokens: float
    flops: float
    across: float
    within: float

    def seconds(self, peak: float) -> tuple[float, float]:
        """Of computing, on a GPU of `peak` FLOP/s, and of communicating, by the rates assumed above."""
        return self.flops / (COMPUTING * peak), (self.across / ACROSS + self.within / WITHIN) / SENDING


def budget(
    model: SpeechLLM,
    samples: Sequence[Sample],
    frames: int,
    packing: Packing,
    accumulation: int,
    ds_json: dict[str, Any],
    world_size: int,
    node: int,
    dtype: torch.dtype,
) -> Budget:
    """Of a step of `accumulation` micro-batches of such samples.

    frames: of each clip, as the Q-Former hears it. node: ranks of a node. The features are taken to be kept.
    """
    batch = batch_of(samples, packing)
    needed, computed = work_of(batch, is_flash(model.llm_config))
    load = StepCount(model)(Heard(torch.full((len(samples),), frames), encoded=True), needed, computed)
    parameters = list(model.parameters())
    size = torch.empty((), dtype=dtype).itemsize
    weights = size * sum(map(deepspeed_parts.numel, parameters))
    trained = sum(deepspeed_parts.numel(p) for p in parameters if p.requires_grad)
    reduced = trained * {"fp32": 4, None: size}.get(ds_json.get("communication_data_type"), 2)
    zero = ds_json["zero_optimization"]
    everywhere, in_node = 0.0, 0.0  # bytes that all ranks gather or reduce, of all and of a node
    if zero["stage"] == 3:
        secondary = int(zero.get("zero_hpz_partition_size", 1))
        everywhere = accumulation * (weights * (2 if secondary == 1 else 1) + reduced)
        in_node = accumulation * weights * (secondary > 1)
    else:  # ZeRO-1 reduces at the end of a step alone
        everywhere = (accumulation if zero["stage"] == 2 else 1) * reduced + size * trained
    nodes = -(-world_size // node)
    inside = min(node, world_size)
    # Rings go through every rank: of what all ranks gather a node receives what it has not, by all its links.
    across = everywhere * (1 - 1 / nodes) / inside
    within = (in_node if nodes > 1 else in_node + everywhere) * (1 - 1 / inside)
    return Budget(accumulation * load.computed, accumulation * load.flops.hardware, across, within)


def sentence(found: Budget, peak: float | None) -> str:
    """For the person who starts a run: its tokens, and where the GPU's peak is known what they pay for."""
    text = f"about {found.tokens:,.0f} LLM tokens a rank and step"
    if peak is None or found.across + found.within == 0:
        return text
    computing, sending = found.seconds(peak)
    text += (
        f", {found.flops / 1e12:,.1f} TFLOP and {(found.across + found.within) / 1e9:,.1f} GB: compute : communication "
        f"about {computing / sending:.2g} ({computing:.2g} s at {COMPUTING:.0%} of the peak, {sending:.2g} s by 400 "
        "Gb/s a GPU between nodes and NVLink within)"
    )
    return text if computing > sending else f"{text}: more clips a rank (train.global_batch), or fewer ranks, would pay"
