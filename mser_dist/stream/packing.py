"""Packs of clips: nearly full, and nearly equally full, so that no rank waits for another."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.errors import UserError

_CHUNK = 256  # windows worked on at once: their loads stay in the processor's cache


def pack(
    order: NDArray[np.int32], tokens: NDArray[Any], budget: int, window: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Share out each `window` of consecutive samples among as few packs as hold them with equal loads.

    The longest sample first, each to the emptiest pack (LPT: Graham 1969, https://doi.org/10.1137/0117039); where the
    fewest possible packs overflow by that rule, there is one pack more.

    Args:
        order: (n,) samples.
        tokens: (size,) length of every sample of the set.
        budget: tokens a pack at most.

    Returns:
        (n,) samples, pack after pack; (packs + 1,) where each pack starts.

    Raises `UserError` for a sample longer than a pack.
    """
    if len(order) and int(tokens[order].max()) > budget:
        raise UserError(f"data.tokens={budget}: the longest clip has {tokens[order].max()} tokens; give at least that")
    full = len(order) // window * window
    parts = [*np.split(order[:full].reshape(-1, window), range(_CHUNK, full // window, _CHUNK)), order[full:][None]]
    packed, sizes = zip(*(_pack_windows(part, tokens, budget) for part in parts if part.size), strict=True)
    return np.concatenate(packed), np.concatenate([[0], np.cumsum(np.concatenate(sizes))])


def _pack_windows(
    samples: NDArray[np.int32], tokens: NDArray[Any], budget: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(windows, m) samples → all of them, pack after pack, and the packs' numbers of samples."""
    lengths = tokens[samples].astype(np.int32)  # (windows, m)
    longest_first = np.argsort(-lengths, axis=1, kind="stable")
    samples, lengths = (np.take_along_axis(a, longest_first, 1) for a in (samples, lengths))
    packs = -(-lengths.sum(1) // budget)  # (windows,) the fewest that can hold a window
    place = np.empty(samples.shape, dtype=np.int32)  # pack of each sample in its window
    open_windows = np.arange(len(samples))
    while len(open_windows):
        place[open_windows], fullest = _emptiest_first(lengths[open_windows], packs[open_windows])
        open_windows = open_windows[fullest > budget]
        packs[open_windows] += 1
    place += (np.cumsum(packs) - packs)[:, None].astype(np.int32)  # numbered over all windows
    flat = place.ravel()
    by_pack = np.argsort(flat, kind="stable")
    return samples.ravel()[by_pack], np.bincount(flat, minlength=int(packs.sum())).astype(np.int64)


def _emptiest_first(lengths: NDArray[np.int32], packs: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """((windows, m) pack of each sample, (windows,) load of the fullest pack), samples taken in their order."""
    loads = np.where(np.arange(packs.max()) < packs[:, None], 0, np.iinfo(np.int32).max // 2).astype(np.int32)
    place = np.empty(lengths.shape, dtype=np.int64)
    rows = np.arange(len(lengths))
    for column in range(lengths.shape[1]):
        emptiest = loads.argmin(1)
        place[:, column] = emptiest
        loads[rows, emptiest] += lengths[:, column]
    return place, np.where(np.arange(packs.max()) < packs[:, None], loads, 0).max(1)
