"""How the columns of all ranks reach the rows of one: all at once, or block by block around a ring.

Both are used in the same way. Columns are `open`ed once; a `sweep` shows each of them to this rank, together with
accumulators that hold a value for each column, and leaves in their list those that come back; `sum_lse` and `home` put
together what the ranks have accumulated.
Sizes may differ from rank to rank, and be 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Gather = Literal["all_gather", "ring"]
# The names since torch 2.13, which warns of those before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# visit(first column, what is read of the columns, what is accumulated for them)
Visit = Callable[[int, Sequence[Tensor], Sequence[Tensor]], None]


def world(group: Any = None) -> tuple[int, int]:
    """(rank, size) in a process group; (0, 1) without one."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(group), dist.get_world_size(group)) if there else (0, 1)


def gather_numbers(numbers: Sequence[int], device: torch.device, group: Any = None) -> list[list[int]]:
    """Some integers of every rank, by rank."""
    _, ranks = world(group)
    if ranks == 1:
        return [list(numbers)]
    mine = torch.tensor(numbers, device=device)
    everything = mine.new_empty(ranks, len(numbers))
    _all_gather(everything.view(-1), mine, group=group)
    return everything.tolist()


def gather_rows(x: Tensor, sizes: Sequence[int], group: Any = None) -> Tensor:
    """(sizes[rank], …) on each rank → (sum(sizes), …) on every rank, in rank order. No gradient."""
    if len(sizes) == 1:
        return x
    most = max(sizes)
    padded = x.new_zeros(most, *x.shape[1:]) if len(x) < most else x.contiguous()
    if len(x) < most:
        padded[: len(x)] = x
    everything = x.new_empty(len(sizes) * most, *x.shape[1:])
    if most:
        _all_gather(everything, padded, group=group)
    if min(sizes) == most:
        return everything
    return torch.cat([everything[r * most : r * most + size] for r, size in enumerate(sizes)])


def all_reduce_sum(values: Tensor, group: Any = None) -> Tensor:
    """Summed over the ranks, in place."""
    if world(group)[1] > 1:
        dist.all_reduce(values, group=group)
    return values


def _own(sizes: Sequence[int], group: Any) -> slice:
    rank, _ = world(group)
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


@dataclass(frozen=True)
class AllGather:
    """Every rank holds all columns: one collective each way, N · D elements of memory."""

    sizes: list[int]  # columns of each rank
    group: Any = None

    def open(self, columns: Tensor) -> Tensor:
        return gather_rows(columns, self.sizes, self.group)

    @property
    def own(self) -> slice:
        """Where this rank's columns are among all."""
        return _own(self.sizes, self.group)

    @property
    def held(self) -> slice:
        """Which columns a rank holds between sweeps."""
        return slice(0, sum(self.sizes))

    @property
    def own_of_held(self) -> slice:
        return self.own

    def sweep(self, read: Sequence[Tensor], accumulate: list[Tensor], visit: Visit) -> None:
        visit(0, read, accumulate)

    def sum_lse(self, lse: Tensor) -> Tensor:
        """Log-sum-exps of the columns over this rank's rows → over all rows. (N,) or (N, k)"""
        if len(self.sizes) == 1:
            return lse
        most = lse.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        # Where no rank has seen a candidate all are -inf, and -inf - -inf would be NaN.
        total = torch.exp(lse - torch.where(most == -torch.inf, 0.0, most))
        dist.all_reduce(total, group=self.group)
        return most + total.log()

    def home(self, grad: Tensor) -> Tensor:
        """(N, D) this rank's part of the columns' gradients → (own, D) the sum over ranks of its own columns'."""
        if len(self.sizes) == 1:
            return grad
        rank, _ = world(self.group)
        most = max(self.sizes)
        if dist.get_backend(self.group) == "gloo":  # whose reduce-scatter copies all of its input first
            dist.all_reduce(grad, group=self.group)
            return grad[self.own].clone()
        if min(self.sizes) < most:
            parts = grad.split(self.sizes)
            grad = torch.cat([torch.nn.functional.pad(part, (0, 0, 0, most - len(part))) for part in parts])
        mine = grad.new_empty(most, *grad.shape[1:])
        _reduce_scatter(mine, grad, group=self.group)
        return mine[: self.sizes[rank]]


@dataclass(frozen=True)
class Ring:
    """Columns travel from rank to rank with their accumulators: N · D / W elements of memory, W - 1 exchanges more.

    What is only read is already on its way to the next rank while this one works on it.
    """

    sizes: list[int]
    group: Any = None

    def open(self, columns: Tensor) -> Tensor:
        return columns.contiguous()

    @property
    def own(self) -> slice:
        return _own(self.sizes, self.group)

    @property
    def held(self) -> slice:
        return self.own

    @property
    def own_of_held(self) -> slice:
        return slice(0, self.sizes[world(self.group)[0]])

    def sweep(self, read: Sequence[Tensor], accumulate: list[Tensor], visit: Visit) -> None:
        rank, ranks = world(self.group)
        for turn in range(ranks):
            block = (rank - turn) % ranks  # whose columns these are
            came_after = self.sizes[(block - 1) % ranks]
            following, under_way = self._pass_on(read, came_after) if turn + 1 < ranks else (list(read), [])
            visit(sum(self.sizes[:block]), read, accumulate)
            for work in under_way:
                work.wait()
            if ranks > 1:  # also after the last turn: then they come home
                sent = accumulate[:]
                accumulate[:], under_way = self._pass_on(sent, came_after)
                for work in under_way:
                    work.wait()
                del sent
            read = following

    def sum_lse(self, lse: Tensor) -> Tensor:
        return lse  # what travelled has met all rows

    def home(self, grad: Tensor) -> Tensor:
        return grad

    def _pass_on(self, tensors: Sequence[Tensor], arriving: int) -> tuple[list[Tensor], list[Any]]:
        """Start to send tensors to the next rank and to receive as many, of `arriving` columns, from the one before."""
        rank, ranks = world(self.group)
        to, source = (rank + 1) % ranks, (rank - 1) % ranks
        if self.group is not None:
            to, source = dist.get_global_rank(self.group, to), dist.get_global_rank(self.group, source)
        received = [t.new_empty(arriving, *t.shape[1:]) for t in tensors]
        operations = [dist.P2POp(dist.isend, t, to, self.group) for t in tensors if t.numel()]
        operations += [dist.P2POp(dist.irecv, t, source, self.group) for t in received if t.numel()]
        return received, dist.batch_isend_irecv(operations) if operations else []


EXCHANGES: dict[Gather, type[AllGather] | type[Ring]] = {"all_gather": AllGather, "ring": Ring}
