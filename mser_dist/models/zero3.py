"""An LLM that is only asked, with its weights shared out over the ranks: for one that no GPU holds alone."""

from typing import Any

import torch

from mser_dist import deepspeed_module, deepspeed_parts
from mser_dist.models.llm import base_of


def settings(dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed config: ZeRO-3 without an optimizer."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # which nothing reads
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


def share_out(llm: Any, dtype: torch.dtype) -> str:
    """Keep a part of each weight on each rank, and gather a layer's when it is computed with. Collective.

    What `models.pretrained` has shared out while it loaded stays as it is: no rank held all of it at any time.
    Returns a line on it.
    """
    llm.requires_grad_(False)
    deepspeed_module.module().initialize(model=llm, config=settings(dtype), dist_init_required=False)
    parameters = [*base_of(llm).parameters()]
    whole = sum(map(deepspeed_parts.numel, parameters))
    here = sum(map(deepspeed_parts.own_numel, parameters))
    return f"llm: {whole:,} parameters, {here:,} of them on this rank (ZeRO-3)"
