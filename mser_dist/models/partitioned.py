"""A pretrained model that each rank of ZeRO-3 reads its own part of: nobody reads, holds or sends a whole copy.

transformers has rank 0 read all weights and hand each on whole. Here a rank reads from the safetensors files what its
parts cover, so that N ranks read the files once between them, in the engine's dtype.
"""

import copy
import ctypes
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change

from mser_dist import deepspeed_module, deepspeed_parts

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


def load(
    model_class: Any, outline: PreTrainedModel, folder: Path, zero3: dict[str, Any], **options: Any
) -> PreTrainedModel | None:
    """The model of an outline with its weights, each rank holding its part. Collective.

    Args:
        model_class: has `from_config`.
        outline: on the meta device, as `from_pretrained` gave it: every weight is known to be in the files, of its
            shape, but for those that are tied.
        folder: with these files.
        zero3: the resolved DeepSpeed config, which says the dtype.
        options: of `from_config`.

    None for weights that no slice of a file holds as the model has them: files other than safetensors, and checkpoints
    whose tensors transformers converts.
    """
    files = _files(folder)
    tied = getattr(outline, "all_tied_weights_keys", None) or {}
    if not files or not _as_they_are(outline, files) or not files.keys() >= outline.state_dict().keys() - tied.keys():
        return None
    dtype = torch.bfloat16 if zero3.get("bf16", {}).get("enabled") else torch.float32
    dtype = torch.float16 if zero3.get("fp16", {}).get("enabled") else dtype
    init = deepspeed_module.module().zero.Init
    with _pages_of_their_own(), no_init_weights(), prevent_arange_dtype_change(), init(config_dict_or_path=zero3):
        model: PreTrainedModel = model_class.from_config(copy.deepcopy(outline.config), dtype=dtype, **options)
    model.tie_weights()
    if outline.can_generate():
        model.generation_config = outline.generation_config
    tensors: dict[Path, dict[str, Tensor]] = {}
    for name, tensor in [*model.named_parameters(), *_persistent(model)]:  # a tied one once, by its first name
        name = name if name in files else next(alias for alias, source in tied.items() if source == name)
        tensors.setdefault(files[name], {})[name] = tensor
    for file, wanted in tensors.items():
        with safe_open(file, "pt") as opened:
            for name, tensor in wanted.items():
                _fill(tensor, opened.get_slice(name))
    return model.eval()


@contextmanager
def _pages_of_their_own() -> Iterator[None]:
    """A tensor of 1 MiB and more gives its memory back as it goes.

    Else glibc keeps it between the parts that stay: on a CPU up to 0.3 of a model's size. What is set afterwards is
    what glibc itself comes to where large tensors are freed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    if mallopt is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:  # then a person has chosen
        yield
        return
    mallopt(_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 2**25)
        mallopt(_TRIM_THRESHOLD, 2**26)


def _fill(tensor: Tensor, stored: Any) -> None:
    """Copy what this rank holds of a tensor from its place in a file, row by row of its first dimension."""
    shape = stored.get_shape()
    if not deepspeed_parts.is_partitioned(tensor):
        with torch.no_grad():
            tensor.copy_(stored[...])
        return
    row = math.prod(shape[1:])

    def read(start: int, count: int) -> Tensor:
        first, last = start // row, -(-(start + count) // row)
        return stored[first:last].reshape(-1)[start - first * row :][:count]

    deepspeed_parts.fill(tensor, read)


def _files(folder: Path) -> dict[str, Path]:
    """Which safetensors file has which tensor."""
    found: dict[str, Path] = {}
    index = folder / "model.safetensors.index.json"
    several = sorted(folder.glob("model-*-of-*.safetensors")) if index.is_file() else [folder / "model.safetensors"]
    for file in several:
        if file.is_file():
            with safe_open(file, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
    return found


def _as_they_are(outline: PreTrainedModel, files: Mapping[str, Path]) -> bool:
    """Whether transformers would take each tensor by its own name, as it is."""
    mapping = get_model_conversion_mapping(outline)
    if not all(isinstance(step, WeightRenaming | WeightConverter) for step in mapping):
        return False
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    return all(rename_source_key(name, renamings, converters) == (name, None) for name in files)


def _persistent(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    kept = model.state_dict().keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]
