"""Packs of clips by what they cost: a pack is padded to its longest clip, so it costs longest · count, not the sum."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.errors import UserError

ROUNDS = 32  # steps whose packs are shared out among them by cost
LOWEST = 0.05  # of these packs, so many are too cheap to stand together: each step gets its part of them
_CHUNK = 256  # windows worked on at once: bounds the memory


def pack(
    order: NDArray[np.int32], tokens: NDArray[Any], budget: int, window: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Sort each `window` of consecutive samples by length, longest first, and cut it into packs within the budget.

    A window makes as few packs as it can, and then the cheapest of such: the last one is no crumb.

    Args:
        order: (n,) samples.
        tokens: (size,) length of every sample of the set, 1 or more.
        budget: padded tokens a pack at most.

    Returns:
        (n,) samples, pack after pack, the longest of each first; (packs + 1,) where each pack starts.

    Raises `UserError` for a sample longer than a pack.
    """
    if len(order) and int(tokens[order].max()) > budget:
        raise UserError(f"data.tokens={budget}: the longest clip has {tokens[order].max()} tokens; give at least that")
    full = len(order) // window * window
    parts = [*np.split(order[:full].reshape(-1, window), range(_CHUNK, full // window, _CHUNK)), order[full:][None]]
    packed, first = zip(*(_pack_windows(part, tokens, budget) for part in parts if part.size), strict=True)
    return np.concatenate(packed), np.append(np.flatnonzero(np.concatenate(first)), len(order))


def _pack_windows(
    samples: NDArray[np.int32], tokens: NDArray[Any], budget: int
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """(windows, m) samples → all of them, pack after pack; which of these is the first of its pack."""
    lengths = tokens[samples].astype(np.int32)  # (windows, m)
    longest_first = np.argsort(-lengths, axis=1, kind="stable")
    samples, lengths = (np.take_along_axis(a, longest_first, 1) for a in (samples, lengths))
    low, high = lengths[:, 0].copy(), np.full(len(lengths), budget, dtype=np.int32)
    fewest = _cut(lengths, high).sum(1)  # (windows,) packs
    while (low < high).any():  # the lowest bound on a pack's cost with which there are no more of them
        middle = low + (high - low) // 2
        enough = _cut(lengths, middle).sum(1) <= fewest
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    return samples.ravel(), _cut(lengths, high).ravel()


def _cut(lengths: NDArray[np.int32], bound: NDArray[np.int32]) -> NDArray[np.bool_]:
    """(windows, m) sorted lengths, (windows,) a pack's cost at most → (windows, m) where a pack starts."""
    first = np.zeros(lengths.shape, dtype=bool)
    rows, at = np.arange(len(lengths)), np.zeros(len(lengths), dtype=np.int64)
    while len(rows):
        first[rows, at] = True
        at += bound[rows] // lengths[rows, at]
        inside = at < lengths.shape[1]
        rows, at = rows[inside], at[inside]
    return first


def into_steps(
    cost: NDArray[np.int64], window: NDArray[np.int64], per_step: int, span: float, random: np.random.Generator
) -> NDArray[np.int64]:
    """Shuffle packs so that those of a step cost nearly the same: no rank waits long for another.

    Packs are shuffled within their window, and shared out by cost among as many steps as `ROUNDS`, which are shuffled
    then. The last step is filled up with the first packs.

    Args:
        cost, window: (packs,) cost of each pack, and number of the window it is of, ascending.
        span: share of the packs among which one may move.

    Returns:
        (steps · per_step,) numbers of packs; in a step, the dearest first.
    """
    packs = np.lexsort((random.random(len(cost)), window))
    packs = np.resize(packs, -(-len(packs) // per_step) * per_step)
    together = max(1, min(ROUNDS, int(span * len(packs)) // per_step)) * per_step
    lowest = round(LOWEST * per_step)
    result = []
    for start in range(0, len(packs), together):
        part = packs[start : start + together]
        part = part[np.argsort(-cost[part], kind="stable")]
        steps = len(part) // per_step
        most, rest = np.split(part, [steps * (per_step - lowest)])
        rows = np.concatenate([most.reshape(steps, -1), rest.reshape(lowest, steps).T], axis=1)
        result.append(random.permutation(rows).ravel())
    return np.concatenate(result)


def gather(
    order: NDArray[np.int32], starts: NDArray[np.int64], packs: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The packs of these numbers: their samples, one pack after another, and (len(packs) + 1,) where each starts."""
    ends = np.cumsum(np.diff(starts)[packs])
    moved = np.concatenate([[0], ends])
    source = np.repeat((starts[packs] - moved[:-1]).astype(np.int32), np.diff(moved))
    source += np.arange(len(source), dtype=np.int32)
    return order[source], moved
