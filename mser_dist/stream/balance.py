"""Balanced batches: the values of some fields (emotion, language …) in equal parts in every global batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.errors import UserError
from mser_dist.shards.columns import Column

_CHUNK = 2048  # steps worked on at once
_ROWS = 1 << 16  # clips looked up at once: temporaries of a few MB, not of 80 bytes a clip
_FIRST = 1000.0  # the first field's balance comes before that of all others


class Balance:
    """Draws global batches in which the values of `fields` are as even as the set allows.

    Samples are drawn as units: single ones, or `together` of one of `groups` (parallel clips), which agree in the first
    field and differ in the others where they can. A unit's type is what it adds to the counts of a batch. Each batch is
    filled with the type whose values are rarest in it so far, the first field's before the others'; ties are drawn. Of
    each type the units come in random order, and again from the first once all were used: in an epoch no clip of a type
    comes twice more often than another, and never twice in a batch.

    Raises `UserError` where the set has too few clips of some value to fill a batch of `global_batch`.
    """

    def __init__(
        self,
        fields: dict[str, Column],
        global_batch: int,
        groups: NDArray[Any] | None = None,
        together: int = 1,
    ) -> None:
        size = len(next(iter(fields.values())).codes)
        if size < global_batch:
            raise UserError(
                f"data.balance: a global batch of {global_batch} needs as many clips, and the set has {size}: "
                "lower train.global_batch"
            )
        for name, column in fields.items():
            share = global_batch // len(column.names)
            least = int(column.counts().argmin())
            if share == 0:
                raise UserError(
                    f"data.balance: a global batch of {global_batch} cannot hold all {len(column.names)} values of "
                    f"{name}: raise train.global_batch, or take {name} out of data.balance"
                )
            if column.counts()[least] < share:
                raise UserError(
                    f"data.balance: a global batch of {global_batch} needs {share} clips of {name} "
                    f"{column.names[least]!r}, and the set has {column.counts()[least]}: lower train.global_batch, or "
                    f"take {name} out of data.balance"
                )
        self.names = list(fields)
        self.first, *others = fields.values()
        self.others = others
        self.rest = np.zeros(len(self.first.codes), dtype=np.int64)  # (n,) the other fields' values as one number
        self.rest_count = 1
        for column in others:
            self.rest = self.rest * len(column.names) + column.codes
            self.rest_count *= len(column.names)
        self.groups = None
        if groups is not None and together > 1:
            # Only which are equal counts: numbered from 0, of 32 bits each.
            self.groups = np.unique(groups, return_inverse=True)[1].astype(np.int32)
        self.together = together if groups is not None else 1
        if len(self.first.names) * (self.rest_count + 1) ** self.together >= 2**62:
            raise UserError(f"data.balance over {', '.join(fields)} has too many combinations: name fewer fields")

    def draw(self, steps: int, global_batch: int, random: np.random.Generator) -> NDArray[np.int32]:
        """(steps · global_batch,) samples."""
        units = self._units(random)  # (units, together)
        keys = np.concatenate([self._keys(units[begin : begin + _ROWS]) for begin in range(0, len(units), _ROWS)])
        types = np.unique(keys)
        type_of = np.empty(len(keys), dtype=np.min_scalar_type(len(types)))
        for begin in range(0, len(keys), _ROWS):
            type_of[begin : begin + _ROWS] = np.searchsorted(types, keys[begin : begin + _ROWS])
        del keys
        stock = np.bincount(type_of)  # (types,)
        queue = np.argsort(type_of, kind="stable").astype(np.int32)  # units by type: their order is random already
        del type_of
        first = np.append(np.cumsum(stock) - stock, 0)  # where in the queue each type begins
        example = units[queue[first[:-1]]]  # (types, together): what a unit of the type is like
        parts = [
            self._choose(min(_CHUNK, steps - start), global_batch, example, stock, random)
            for start in range(0, steps, _CHUNK)
        ]
        slots = max(part.shape[1] for part in parts)
        # (steps, slots) types; len(types) stands where a batch was full before
        chosen = np.concatenate(
            [np.pad(part, ((0, 0), (0, slots - part.shape[1])), constant_values=len(types)) for part in parts]
        )
        flat = chosen.astype(np.min_scalar_type(len(types))).ravel()  # small integers are sorted by radix, at once
        del chosen
        by_type = np.argsort(flat, kind="stable").astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=len(types) + 1))])
        drawn = np.empty(len(flat), dtype=np.int32)
        stock = np.append(stock, 1)
        for begin in range(0, len(flat), _ROWS):
            slot = by_type[begin : begin + _ROWS]
            kind = flat[slot]
            nth = np.arange(begin, begin + len(slot)) - starts[kind]  # how often the type was drawn before
            drawn[slot] = queue[first[kind] + nth % stock[kind]]
        del by_type, queue
        samples = units[drawn]
        samples[flat == len(types)] = -1
        samples = samples.reshape(steps, -1)
        there = samples >= 0
        there &= np.cumsum(there, axis=1, dtype=np.int32) <= global_batch
        return samples[there]

    def _units(self, random: np.random.Generator) -> NDArray[np.int32]:
        """(units, together) samples in random order, -1 where a group had no more."""
        order = random.permutation(np.arange(len(self.rest), dtype=np.int32))
        if self.groups is None:
            return order[:, None]
        # Within a group, first one clip of each kind, then the second of each …: neighbours differ where they can.
        group = self.groups[order].astype(np.int64)
        group *= len(self.first.names)
        group += self.first.codes[order]
        kind = np.lexsort((self.rest[order], group)).astype(np.int32)  # stable, so still random among equals
        nth = np.empty(len(order), dtype=np.int32)
        nth[kind] = _position_in_run(group[kind] * self.rest_count + self.rest[order[kind]])
        del kind
        by_group = np.lexsort((nth, group)).astype(np.int32)
        del nth
        within = _position_in_run(group[by_group])
        del group
        within %= self.together
        unit = np.cumsum(within == 0, dtype=np.int32)
        unit -= 1
        units = np.full((int(unit[-1]) + 1, self.together), -1, dtype=np.int32)
        units[unit, within] = order[by_group]
        return random.permutation(units)

    def _keys(self, units: NDArray[np.int32]) -> NDArray[np.int64]:
        """(units,) equal for units of one type: of one value of the first field, and of the others' in any order."""
        rest = np.where(units >= 0, self.rest[units], self.rest_count)
        keys = self.first.codes[units[:, 0]].astype(np.int64)
        for column in np.sort(rest, axis=1).T:
            keys = keys * (self.rest_count + 1) + column
        return keys

    def _choose(
        self,
        steps: int,
        global_batch: int,
        example: NDArray[np.int32],
        stock: NDArray[np.int64],
        random: np.random.Generator,
    ) -> NDArray[np.int64]:
        """(steps, slots) types."""
        size = (example >= 0).sum(1)  # (types,) clips of a unit
        # What one more unit of type i does to the score of type j: the mean count, in the batch, of j's values.
        effect = np.zeros((len(size), len(size)), dtype=np.float32)
        for column, weight in ((self.first, _FIRST), *((other, 1.0) for other in self.others)):
            adds = _counts(column, example)  # (types, values)
            effect += weight * (adds @ adds.T) / size
        score = random.random((steps, len(size)), dtype=np.float32) * (0.5 / self.together)  # draws ties
        score += 0.5 * (size < self.together)  # a unit without all its parallel clips only where it helps the balance
        left = np.tile(np.minimum(stock, global_batch).astype(np.int32), (steps, 1))  # units that a batch has not yet
        room = np.full(steps, global_batch)
        rows = np.arange(steps)
        chosen = []
        while len(rows):
            scored = score[rows] if len(rows) < steps else score
            if room[rows].min() < size.max():
                tight = np.where(size <= room[rows, None], scored, np.inf)
                fits = np.isfinite(tight).any(1, keepdims=True)
                scored = np.where(fits, tight, scored)  # where nothing fits, a longer unit will be cut
            best = scored.argmin(1)
            slot = np.full(steps, len(size), dtype=np.int32)
            slot[rows] = best
            chosen.append(slot)
            if len(rows) == steps:
                score += effect[best]
            else:
                score[rows] += effect[best]
            left[rows, best] -= 1
            used_up = rows[left[rows, best] == 0]
            score[used_up, best[left[rows, best] == 0]] = np.inf
            room[rows] -= size[best]
            rows = rows[room[rows] > 0]
        return np.stack(chosen, axis=1)


def _counts(column: Column, example: NDArray[np.int32]) -> NDArray[np.float32]:
    """(types, values) how many clips of each value a unit has."""
    result = np.zeros((len(example), len(column.names)), dtype=np.float32)
    for place in example.T:
        there = np.flatnonzero(place >= 0)
        result[there, column.codes[place[there]]] += 1
    return result


def _position_in_run(values: NDArray[Any]) -> NDArray[np.int32]:
    """(n,) how many equal values stand directly before each."""
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    position = np.arange(len(values), dtype=np.int32)
    position -= np.repeat(starts.astype(np.int32), np.diff(np.r_[starts, len(values)]))
    return position


def fields_of(names: Sequence[str], coded: dict[str, Column]) -> dict[str, Column]:
    """The columns to balance. Raises `UserError` for a field that there is not."""
    for name in names:
        if name not in coded:
            raise UserError(f"data.balance names {name!r}, which is no field: use some of {', '.join(coded)}")
    return {name: coded[name] for name in names}
