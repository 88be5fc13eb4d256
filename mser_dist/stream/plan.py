"""Which samples make up which step: a pure function of (seed, epoch, step), so a resume needs only the position.

An epoch is one order of the set, cut into global batches; the last one is filled up from the epoch's start, so that
every sample is seen in every epoch and every rank has equally many steps. Ranks share out a global batch among
themselves: the same global batches at any world size. `weights` and `balance` decide the shares of a batch themselves:
there an epoch has as many samples as the set, drawn from each part without repeats until the part is used up.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mser_dist.errors import UserError
from mser_dist.stream import packing
from mser_dist.stream.balance import Balance

WINDOW = 8192  # samples at most that are packed together (batching=tokens), and hold the shares of `weights`

Indices = NDArray[np.int32]


class Position(NamedTuple):
    """A step of the training: batch number `batch` of epoch `epoch`."""

    epoch: int = 0
    batch: int = 0


START = Position()


@dataclass(frozen=True)
class Epoch:
    """The order of an epoch, (slots,) samples, cut at `starts` (packs + 1,)."""

    order: Indices
    starts: NDArray[np.int64] | None  # None: there are no packs
    steps: int


@dataclass(eq=False)
class Plan:
    """The order of samples in training.

    Args:
        size: samples of the set.
        global_batch: clips a step over all ranks; packs with batching="tokens".
        duration: (size,) seconds. Where given, the clips of a global batch are dealt to its micro-batches by length.
        groups: (size,) ids, e.g. of source utterances, of which `together` samples stay side by side.
        balance: fields in equal parts in every global batch.
        parts, weights: (size,) number of the set of each sample, and each set's share of every batch.
        batching: "shuffle"; "bucket": `bucket` global batches at a time are sorted by length before they are cut;
            "tokens": packs of any number of clips, whose longest of `tokens` (size,) times their number is at most
            `budget`; those of a step cost nearly the same.
        shards, shuffle_shards: (size,) shard of each sample; shuffle within so many random shards at a time.
        automatic: how many was not said by a config, but chosen for the set.
    """

    size: int
    global_batch: int
    seed: int
    duration: NDArray[Any] | None = None
    groups: NDArray[Any] | None = None
    together: int = 1
    balance: Balance | None = None
    parts: NDArray[Any] | None = None
    weights: Sequence[float] = ()
    batching: str = "shuffle"
    bucket: int = 16
    tokens: NDArray[Any] | None = None
    budget: int = 8192
    shards: NDArray[Any] | None = None
    shuffle_shards: int = 0
    automatic: bool = False
    _memo: tuple[int, Epoch] | None = field(default=None, init=False, repr=False)  # steps ask for an epoch repeatedly

    def steps(self, epoch: int = 0) -> int:
        """Steps of an epoch: the same in each, but for batching="tokens", where the packs differ a little."""
        if self.batching == "tokens":
            return self.epoch(epoch).steps
        return -(-self.size // self.global_batch)

    def walk(self, start: Position, count: int) -> Iterator[Position]:
        """The next `count` positions, `start` among them."""
        position = start
        for _ in range(count):
            yield position
            position = self.after(position)

    def after(self, position: Position) -> Position:
        """The position of the next step."""
        epoch, batch = position
        return Position(epoch, batch + 1) if batch + 1 < self.steps(epoch) else Position(epoch + 1, 0)

    def epoch(self, epoch: int) -> Epoch:
        if self._memo is None or self._memo[0] != epoch:
            self._memo = None  # so that two are never held at once
            self._memo = epoch, self._make(epoch)
        return self._memo[1]

    def batch(self, position: Position) -> Indices:
        """All samples of a step, over all ranks."""
        epoch = self.epoch(position.epoch)
        first = position.batch * self.global_batch
        if epoch.starts is None:
            return epoch.order[first : first + self.global_batch]
        return epoch.order[epoch.starts[first] : epoch.starts[first + self.global_batch]]

    def share(self, position: Position, rank: int, world_size: int, micro: int | None = None) -> list[Indices]:
        """A rank's micro-batches of a step: of `micro` clips (None: all in one), or a pack each.

        Clips of like length meet in the micro-batches that the ranks work on at the same time: little padding, and no
        rank waits for one that has the long clips.
        """
        epoch = self.epoch(position.epoch)
        if epoch.starts is not None:
            first = position.batch * self.global_batch
            packs = range(first + rank, first + self.global_batch, world_size)
            return [epoch.order[epoch.starts[i] : epoch.starts[i + 1]] for i in packs]
        batch = self.batch(position)
        if self.duration is not None:
            batch = batch[np.argsort(-self.duration[batch], kind="stable")]
        micro = micro or self.global_batch // world_size
        return list(batch.reshape(-1, micro)[rank::world_size])

    def _make(self, number: int) -> Epoch:
        random = np.random.default_rng([self.seed, number])
        steps = -(-self.size // self.global_batch)
        if self.balance is not None:
            return Epoch(self.balance.draw(steps, self.global_batch, random), None, steps)
        if self.weights:
            order = self._mixed(random)
        elif self.shuffle_shards:
            order = self._by_shards(random)
        else:
            order = random.permutation(np.arange(self.size, dtype=np.int32))
            if self.groups is not None and self.together > 1:
                order = _side_by_side(order, self.groups, self.together, self.global_batch, random)
        if self.batching == "tokens":
            return self._packed(order, random)
        order = np.resize(order, steps * self.global_batch)
        if self.batching == "bucket":
            order = self._by_length(order, random)
        return Epoch(order, None, steps)

    @property
    def _window(self) -> int:
        """At least two windows of equal size: which clips meet in a pack differs from epoch to epoch."""
        return -(-self.size // max(2, -(-self.size // WINDOW)))

    def _packed(self, order: Indices, random: np.random.Generator) -> Epoch:
        assert self.tokens is not None
        order, starts = packing.pack(order, self.tokens, self.budget, self._window)
        cost = self.tokens[order[starts[:-1]]].astype(np.int64) * np.diff(starts)
        span = 1.0 if self.shards is None else self.shuffle_shards / (int(self.shards.max()) + 1)
        packs = packing.into_steps(cost, starts[:-1] // self._window, self.global_batch, span, random)
        return Epoch(*packing.gather(order, starts, packs), len(packs) // self.global_batch)

    def _mixed(self, random: np.random.Generator) -> Indices:
        """Every batch holds the sets in their shares, rounded up or down by systematic sampling."""
        assert self.parts is not None
        bounds = np.cumsum(np.array(self.weights) / np.sum(self.weights))[:-1]

        def shares(count: int, rows: int) -> NDArray[np.uint8]:
            line = (np.arange(rows) + random.random((count, 1))) / rows  # [count, rows], 0 to 1
            return random.permuted(np.searchsorted(bounds, line, side="right").astype(np.uint8), axis=1).ravel()

        if self.batching == "tokens":  # whose last window is as short as it comes
            part = shares(self.size // self._window, self._window)
            if rest := self.size % self._window:
                part = np.concatenate([part, shares(1, rest)])
        else:
            part = shares(-(-self.size // self.global_batch), self.global_batch)
        order = np.empty(len(part), dtype=np.int32)
        for number in range(len(self.weights)):
            own, slots = np.flatnonzero(self.parts == number).astype(np.int32), np.flatnonzero(part == number)
            if len(slots) and not len(own):
                raise UserError(f"data.weights: no clip is left of data.sets[{number}]: drop that set and its weight")
            order[slots] = np.resize(random.permutation(own), len(slots))
        return order

    def _by_shards(self, random: np.random.Generator) -> Indices:
        assert self.shards is not None
        window = random.permutation(int(self.shards.max()) + 1) // self.shuffle_shards  # [shards]
        order = random.permutation(np.arange(self.size, dtype=np.int32))
        return order[np.argsort(window[self.shards[order]], kind="stable")]

    def _by_length(self, order: Indices, random: np.random.Generator) -> Indices:
        """Sort `bucket` batches' worth of samples by length, cut them into batches, and shuffle these."""
        assert self.duration is not None
        batches = order.reshape(-1, self.global_batch)
        full = len(batches) // self.bucket * self.bucket
        result = []
        for part in (batches[:full].reshape(-1, self.bucket * self.global_batch), batches[full:].reshape(1, -1)):
            if part.size:
                part = np.take_along_axis(part, np.argsort(self.duration[part], axis=1, kind="stable"), 1)
                cut = part.reshape(len(part), -1, self.global_batch)
                shuffled = random.permuted(np.tile(np.arange(cut.shape[1]), (len(cut), 1)), axis=1)
                result.append(np.take_along_axis(cut, shuffled[:, :, None], 1).ravel())
        return np.concatenate(result)


def _side_by_side(
    order: Indices, groups: NDArray[Any], together: int, batch: int, random: np.random.Generator
) -> Indices:
    """Cut each group into runs of `together` samples, keep the runs whole, and shuffle the runs.

    Shorter runs come last in their batch: a whole one then lies across two batches only where `batch` is no multiple.
    """
    by_group = order[np.argsort(groups[order], kind="stable")]  # shuffled within each group
    ids = groups[by_group]
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    del ids  # of 80 MB for ten million clips; what follows takes 32 bits a clip where it can
    within = np.arange(len(order), dtype=np.int32)
    within -= np.repeat(starts.astype(np.int32), np.diff(np.r_[starts, len(order)]))
    run = np.cumsum(within % together == 0, dtype=np.int32)  # run number of each position
    run -= 1
    del within
    size = np.bincount(run)
    whole_run = size == together
    rank_of_run = random.permutation(len(size)).astype(np.int32)
    shuffled = np.argsort(rank_of_run[run], kind="stable").astype(np.int32)
    whole = whole_run[run[shuffled]]
    del size, rank_of_run, run
    # Whole runs and the rest each spread evenly over the batches: how many samples of each fill the first k batches.
    ends = np.minimum(np.arange(1, -(-len(order) // batch) + 1) * batch, len(order))
    runs = -(-ends * int(whole.sum()) // (len(order) * together))  # rounded up: the last, short batch may hold none
    whole_ends = np.minimum(runs, ends // together) * together
    rest_ends = np.maximum.accumulate(ends - whole_ends)
    whole_ends[-1], rest_ends[-1] = len(order), len(order)
    of_batch = np.empty(len(order), dtype=np.int32)
    for part, part_ends in ((whole, whole_ends), (~whole, rest_ends)):
        of_batch[part] = np.searchsorted(part_ends, np.arange(int(part.sum())), side="right")
    return by_group[shuffled[np.lexsort((~whole, of_batch))]]
