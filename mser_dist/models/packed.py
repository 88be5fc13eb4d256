"""A micro-batch of prompts and answers as an LLM reads it: padded rows, or one row without padding.

- off: a row for each sample, padded on the right to the longest.
- rows: whole samples one after the other; positions restart at each, by which transformers keeps them apart.
- prefix: the text before the speech once for all samples that share it, and behind it what is each sample's own; a
  sample's tokens see that prefix and themselves, and their positions go on from it. A causal LLM computes the same.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

Packing = Literal["prefix", "rows", "off"]
Sample = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt, with SPEECH where speech goes; and of its answer

SPEECH = -200  # stands in `input_ids` where a speech token goes
IGNORE = -100  # stands in `labels` where there is no loss


def prefix_of(prompt: Sequence[int]) -> Sequence[int]:
    """What a prompt says before its first speech token."""
    return prompt[: prompt.index(SPEECH)]


def batch_of(samples: Sequence[Sample], packing: Packing, pad: int = 0) -> dict[str, Any]:
    """The samples in their order, which is that of their speech; those that share a prefix are to be neighbours.

    Returns `input_ids` and `labels`, (B, T) or packed (1, T), `at`, the places whose next token is an answer's in some
    row, and `attention_mask` (B, T), or what keeps the samples of a packed row apart: see `keep_apart`.
    """
    if packing == "off":
        return _padded(samples, pad)
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    own: list[int] = []  # the segment that a token is in: a prefix, or what is a sample's own
    seen: list[int] = []  # the other segment that it sees: its prefix
    ends = [0]
    groups = groupby(samples, lambda sample: prefix_of(sample[0]) if packing == "prefix" else None)
    for shared, group in groups:
        prefix = list(shared or ())
        root = len(ends) - 1
        if prefix:
            ids += prefix
            labels += [IGNORE] * len(prefix)
            positions += range(len(prefix))
            own += [root] * len(prefix)
            seen += [root] * len(prefix)
            ends.append(len(ids))
        for prompt, answer in group:
            rest = prompt[len(prefix) :]
            size = len(rest) + len(answer)
            ids += [*rest, *answer]
            labels += [*[IGNORE] * len(rest), *answer]
            positions += range(len(prefix), len(prefix) + size)
            own += [len(ends) - 1] * size
            seen += [root if prefix else len(ends) - 1] * size
            ends.append(len(ids))
    row: dict[str, Any] = {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
        "at": (torch.tensor(labels[1:]) != IGNORE).nonzero().squeeze(1),
        "longest": max(positions) + 1,
    }
    if packing == "prefix":
        return {**row, "segments": torch.tensor([own, seen])}
    return {**row, "ends": torch.tensor(ends, dtype=torch.int32)}


def _padded(samples: Sequence[Sample], pad: int) -> dict[str, Any]:
    width = max(len(prompt) + len(answer) for prompt, answer in samples)
    ids = torch.full((len(samples), width), pad)  # (B, T)
    labels = torch.full((len(samples), width), IGNORE)
    mask = torch.zeros(len(samples), width, dtype=torch.long)
    for i, (prompt, answer) in enumerate(samples):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor([*prompt, *answer])
        labels[i, len(prompt) : end] = torch.tensor(answer)
        mask[i, :end] = 1
    at = (labels[:, 1:] != IGNORE).any(0).nonzero().squeeze(1)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "at": at}


def keep_apart(config: PreTrainedConfig, batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of an LLM's forward that keep the samples of a batch apart; `dtype` is that of its inputs."""
    if "attention_mask" in batch:
        return {"attention_mask": batch["attention_mask"]}
    positions = batch["position_ids"]
    if "segments" in batch:
        own, seen = batch["segments"]
        return {
            "position_ids": positions,
            "attention_mask": block_masks(config, own, seen, positions[0], batch["longest"], dtype),
        }
    if not is_flash(config):  # which sees by the positions, and by no mask being given, that the row is packed
        return {"position_ids": positions, "attention_mask": None}
    ends, longest = batch["ends"], batch["longest"]
    varlen = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return {"position_ids": positions, "attention_mask": None, **varlen}


def block_masks(
    config: PreTrainedConfig, own: Tensor, seen: Tensor, positions: Tensor, longest: int, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """The mask of a row of segments, (1, 1, T, T), as an LLM of this config takes it.

    own, seen, positions (T,): the segment of each token, the other one that it sees, and its place in its sample, of
    which the longest has `longest` tokens.
    """
    order = torch.arange(len(own), device=own.device)
    visible = (order[:, None] >= order) & ((own[:, None] == own) | (seen[:, None] == own))
    return masks_of(config, visible, positions, longest, dtype)


def masks_of(
    config: PreTrainedConfig, visible: Tensor, positions: Tensor, longest: int, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """(Q, K) of what each of the last Q of K tokens sees, as an LLM of this config takes it, (1, 1, Q, K).

    positions (K,): their places, of which there are `longest`. Where that is more than the sliding window of some
    layers alone, the result is a mask for each type of layer.
    """
    window, kinds = sliding_window(config)
    if window is None or longest <= window:
        return _as_taken(config, visible, dtype)
    near = visible & (positions[len(positions) - len(visible) :, None] - positions < window)
    if len(kinds) < 2:
        return _as_taken(config, near, dtype)
    return {kind: _as_taken(config, near if "sliding" in kind else visible, dtype) for kind in kinds}


def sliding_window(config: PreTrainedConfig) -> tuple[int | None, list[str]]:
    """How many tokens an LLM's sliding layers see, None without such layers; and the types of layers, if it says."""
    text = config.get_text_config()
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    if kinds and not any("sliding" in kind for kind in kinds):
        return None, kinds
    return getattr(text, "sliding_window", None), kinds


def is_flash(config: PreTrainedConfig) -> bool:
    """Whether the LLM computes attention by a flash-attn kernel, which takes no mask of blocks."""
    return "flash" in str(config.get_text_config()._attn_implementation)


def _as_taken(config: PreTrainedConfig, visible: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, 1, Q, K): which places are seen, or, where attention is written out (eager), what is added to its scores."""
    mask = visible[None, None]
    if config.get_text_config()._attn_implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
