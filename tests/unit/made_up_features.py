"""Features of clips, made of their keys, and what several tests do with a store of them."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mser_dist.encoded.store import FeatureStore

ADDRESS = {"encoder": "ab" * 32, "layers": [2, 4], "stride": 1, "dtype": "float16"}
LAYERS, WIDTH = 2, 24


def features(key: int, dtype: torch.dtype = torch.float16, width: int = WIDTH) -> torch.Tensor:
    """A clip's features (T, L, D), every bit of them random: NaNs and negative zeros too. Key 0 has no frames."""
    shape = (key % 13, LAYERS, width * dtype.itemsize)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(key)).view(dtype)


def keys(*numbers: int) -> Any:
    return np.array(numbers, np.uint64)


def fill(store: FeatureStore, numbers: Any, limit: int = 64 << 20) -> None:
    with store.writer(limit) as writer:
        for key in numbers:
            writer.add(key, features(key, store.dtype, store.width))


def same(store: FeatureStore, numbers: Any) -> bool:
    """Whether the store has these clips' features, bit for bit."""
    located = store.locate(keys(*numbers))
    return not located.missing.any() and all(
        equal(store.read(located.place(i)), features(key, store.dtype, store.width)) for i, key in enumerate(numbers)
    )


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = [tensor.contiguous().view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and torch.equal(*bits)


def in_child(work: Callable[[], bool]) -> int:
    """The number of a forked process that exits with 0 if `work` is true."""
    child = os.fork()
    if child:
        return child
    try:
        os._exit(0 if work() else 1)
    except BaseException:
        traceback.print_exc()
        os._exit(2)
    raise AssertionError("unreachable")


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def shards(store: FeatureStore) -> list[Path]:
    return sorted(store.folder.glob("[0-9]*.features"))


def unfinished(store: FeatureStore) -> list[Path]:
    return list(store.folder.glob(".*"))
