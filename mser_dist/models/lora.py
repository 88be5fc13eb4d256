"""LoRA adapters (arXiv 2106.09685) by peft, in every layer that a config asks for."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mser_dist import config as cfg
from mser_dist import deepspeed_parts
from mser_dist.errors import UserError


def with_lora(model: PreTrainedModel, lora: cfg.LoraConfig) -> Any:
    """The model with adapters in its linear layers that `lora.targets` name, all else frozen.

    Raises `UserError` for a target that is in no layer of the LLM, or, unless `lora.allow_partial`, in some alone.
    """
    from peft import LoraConfig, get_peft_model

    if "all-linear" in lora.targets:
        if len(lora.targets) > 1:
            raise UserError("llm.lora.targets: all-linear stands alone, for it takes all the others in")
        targets: str | list[str] = "all-linear"
    else:
        targets = lora.targets
        _check_targets(model, lora)
    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.rslora,
            use_dora=lora.dora,
            target_modules=targets,
            task_type="CAUSAL_LM",
        ),
    )
    return wrapped


def merged(model: Any) -> Any:
    """The LLM itself, its adapters added to its weights; those that ZeRO-3 has partitioned are gathered by layer."""
    from deepspeed import zero
    from peft.tuners.lora import LoraLayer

    for layer in [part for part in model.modules() if isinstance(part, LoraLayer)]:
        parameters = list(layer.parameters())
        partitioned = [p for p in parameters if deepspeed_parts.is_partitioned(p)]
        with zero.GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned)), torch.no_grad():
            layer.merge()
    return model.unload()


def adapted(model: nn.Module) -> dict[str, int]:
    """How many layers have an adapter, by their own name, e.g. {"q_proj": 32}."""
    return dict(Counter(name.split(".")[-1] for name, part in model.named_modules() if hasattr(part, "lora_A")))


def _check_targets(model: PreTrainedModel, lora: cfg.LoraConfig) -> None:
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    layers = {layer for name in linear if (layer := _layer(name)) is not None}
    for target in lora.targets:
        matched = [name for name in linear if name == target or name.endswith(f".{target}")]
        there = ", ".join(dict.fromkeys(name.split(".")[-1] for name in linear if _layer(name) is not None))
        if not matched:
            raise UserError(
                f"llm.lora.targets: {target} matches no linear layer of the LLM ({type(model).__name__}): name some of "
                f"{there}, or [all-linear]"
            )
        within = {layer for name in matched if (layer := _layer(name)) is not None}
        if within and within != layers and not lora.allow_partial:
            raise UserError(
                f"llm.lora.targets: {target} is in {len(within)} of the LLM's {len(layers)} layers: name some of "
                f"{there} that each layer has, or [all-linear], or set llm.lora.allow_partial=true"
            )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's


def _layer(name: str) -> str | None:
    """The number of the layer that a module stands in, with the path before it: "model.layers.3"."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: place + 1])
    return None
