"""The loss over all pairs of rows and columns, tile by tile, with a backward pass of its own.

Each score is computed once for both directions, and once more in the backward pass; none is kept. See README.md for
the formulae that the names here stand for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mser_dist.contrastive.exchange import AllGather, Ring, all_reduce_sum

Kind = Literal["mean", "sum", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Which pairs attract, repel or are left out, and what each counts. B rows here, N columns in the world."""

    kind: Kind
    symmetric: bool  # columns are queries too
    row_class: Tensor  # (B,) int32: a pair of one class is a positive
    column_class: Tensor  # (N,) int32
    classes: int  # how many there are: they are numbered from 0
    row_group: Tensor | None  # (B,) int64: of the pairs of one group only the positives take part; not for "sigmoid"
    column_group: Tensor | None  # (N,) int64
    itself: (
        int | None
    )  # the column that is row 0 itself, row 1 being the next …: such pairs take no part; None: none is
    row_weight: Tensor  # (B,) of each row's loss in the total
    column_weight: Tensor  # (N,) of each column's, where symmetric
    positive_weight: Tensor  # (B,) kind "mean": of each positive pair of a row's class, over both directions
    positives: Tensor  # (B,) of each row
    tile: int
    exchange: AllGather | Ring


def tiles(length: int, tile: int) -> Iterator[slice]:
    """Slices of `tile` that cover a length; 0: one for all."""
    step = tile or max(length, 1)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


class Scores(torch.autograd.Function):
    """(x, y, scale, bias) → the loss over all ranks' pairs (), and sums over all rows: (hits, cosine of positives).

    x: (B, D), y: this rank's columns (b, D), scale and bias: () tensors; bias is read by kind "sigmoid" alone.
    The gradients of x and y are those of the loss times the number of ranks, those of scale and bias are whole on every
    rank: exact after the mean that DDP and ZeRO take. Collective, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            rows = _Rows(x, scale, bias, pairs)
            exchange = pairs.exchange
            columns = exchange.open(y)
            accumulated = [x.new_full((len(columns),), -torch.inf) for _ in range(rows.column_sums)]
            exchange.sweep([columns], accumulated, rows.look)
            column_lse = [exchange.sum_lse(lse) for lse in accumulated]
            totals = all_reduce_sum(rows.totals(y, column_lse), exchange.group)
            ctx.save_for_backward(x, y, columns, scale, bias, rows.class_sums, *rows.lse, *column_lse)
            ctx.pairs, ctx.ranks = pairs, len(exchange.sizes)
            sums = totals[1:].clone()
            ctx.mark_non_differentiable(sums)
            ctx.set_materialize_grads(False)
            return totals[0].to(x.dtype), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        x, y, columns, scale, bias, class_sums, *lse = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        with torch.autocast(x.device.type, enabled=False):
            rows = _Rows(x, scale, bias, pairs)
            rows.class_sums = class_sums
            exchange = pairs.exchange
            row_lse, column_lse = lse[: len(rows.lse)], lse[len(rows.lse) :]
            rows.differentiate(row_lse)
            shifts = [_shift(each, pairs.column_weight[exchange.held]) for each in column_lse]
            gathered = [torch.zeros_like(columns)]
            exchange.sweep([columns, *shifts], gathered, rows.differentiate_block)
            y_grad = exchange.home(gathered.pop())
            x_grad = rows.finish(y, y_grad)  # not yet times the scale
            # Whole on every rank: a bound asks for its sign, which a rank's own part may not have.
            parts = torch.stack([rows.dot(lambda here: x_grad[here]).sum(), rows.bias_grad.double()])
            scale_grad, bias_grad = (all_reduce_sum(parts, exchange.group) * grad).to(x.dtype).unbind()
            factor = grad * ctx.ranks
            return x_grad.mul_(scale * factor), y_grad.mul_(factor), scale_grad, bias_grad, None


def _shift(lse: Tensor, weight: Tensor) -> Tensor:
    """What to subtract from a score so that its exponential is the softmax times the query's weight."""
    return torch.where(weight > 0, lse - weight.log().to(lse.dtype), torch.inf)


class _Rows:
    """This rank's rows on their way past all columns."""

    def __init__(self, x: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs) -> None:
        self.x, self.scale, self.bias, self.pairs = x, scale, bias, pairs
        self.pull = pairs.positive_weight.to(x.dtype)  # (B,)
        self.scaled = x * scale  # (B, D)
        kinds = {"mean": 1, "sum": 2, "sigmoid": 0}[pairs.kind]  # log-sum-exps: over candidates, over positives
        self.lse = [x.new_full((len(x),), -torch.inf) for _ in range(kinds)]
        self.column_sums = kinds if pairs.symmetric else 0
        self.pair_loss = torch.zeros((), dtype=torch.float64, device=x.device)
        self.best = x.new_full((len(x),), -torch.inf)  # (B,) the largest score so far, and whether it is a positive's
        self.hit = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        # Classes that have a row here; all others share the last line, which is never read.
        classes, self.line = torch.unique(pairs.row_class, return_inverse=True)
        lookup = torch.full((pairs.classes,), len(classes), device=x.device)
        lookup[classes] = torch.arange(len(classes), device=x.device)
        self.column_line = lookup[pairs.column_class]  # (N,)
        self.class_sums = x.new_zeros(len(classes) + 1, x.shape[1])
        self.bias_grad = x.new_zeros(())

    def _each(self, start: int, columns: Tensor, work: Callable[[slice, slice, slice, Tensor], None]) -> None:
        """Call ``work(rows, columns of the block, columns of all, scores)`` for every tile of a block."""
        for there in tiles(len(columns), self.pairs.tile):
            everywhere = slice(start + there.start, start + there.stop)
            across = columns[there].T
            for here in tiles(len(self.x), self.pairs.tile):
                scores = self.scaled[here] @ across  # (tile, tile)
                self._leave_out(scores, here, everywhere)
                work(here, there, everywhere, scores)

    def _positive(self, here: slice, everywhere: slice) -> Tensor:
        return self.pairs.row_class[here, None] == self.pairs.column_class[everywhere]

    def _sign(self, here: slice, everywhere: slice) -> Tensor:
        """(tile, tile) -1 for positives, 1 for the others: of the signed logits each pair's loss is softplus."""
        return 1 - 2 * self._positive(here, everywhere).to(self.x.dtype)

    def _leave_out(self, scores: Tensor, here: slice, everywhere: slice) -> None:
        pairs = self.pairs
        if pairs.row_group is not None:
            assert pairs.column_group is not None
            neutral = pairs.row_group[here, None] == pairs.column_group[everywhere]
            scores.masked_fill_(neutral & ~self._positive(here, everywhere), -torch.inf)
        if pairs.itself is not None:
            diagonal = pairs.itself + here.start - everywhere.start
            if -scores.shape[0] < diagonal < scores.shape[1]:
                scores.diagonal(diagonal).fill_(-torch.inf)

    # Forward.

    def look(self, start: int, read: Sequence[Tensor], column_lse: Sequence[Tensor]) -> None:
        [columns] = read
        for there in tiles(len(columns), self.pairs.tile):
            lines = self.column_line[start + there.start : start + there.stop]
            self.class_sums.index_add_(0, lines, columns[there])

        def work(here: slice, there: slice, everywhere: slice, scores: Tensor) -> None:
            self._see_best(scores, here, everywhere)
            if self.pairs.kind == "sigmoid":
                signed = (scores + self.bias).mul_(self._sign(here, everywhere))
                each = torch.nn.functional.softplus(signed).sum(1)  # (tile,)
                self.pair_loss += (each.double() * self.pairs.row_weight[here]).sum()
                return
            _add_lse(self.lse[0][here], scores, 1)
            if self.column_sums:
                _add_lse(column_lse[0][there], scores, 0)
            if self.pairs.kind == "sum":
                scores.masked_fill_(~self._positive(here, everywhere), -torch.inf)
                _add_lse(self.lse[1][here], scores, 1)
                if self.column_sums:
                    _add_lse(column_lse[1][there], scores, 0)

        self._each(start, columns, work)

    def _see_best(self, scores: Tensor, here: slice, everywhere: slice) -> None:
        value, place = scores.max(1)
        better = value > self.best[here]
        is_positive = self.pairs.column_class[everywhere][place] == self.pairs.row_class[here]
        self.hit[here] = torch.where(better, is_positive, self.hit[here])
        self.best[here] = torch.maximum(value, self.best[here])

    def _positive_sums(self, y: Tensor, here: slice) -> Tensor:
        """(tile, D) the sum of each row's positive columns."""
        sums = self.class_sums[self.line[here]]
        return sums - y[here] if self.pairs.itself is not None else sums

    def dot(self, others: Callable[[slice], Tensor]) -> Tensor:
        """(B,) each row's product with another, of which `others` gives some; so no other (B, D) is ever held."""
        parts = [(self.x[here] * others(here)).sum(1).double() for here in tiles(len(self.x), self.pairs.tile)]
        return torch.cat(parts) if parts else self.x.new_zeros(0, dtype=torch.float64)

    def totals(self, y: Tensor, column_lse: Sequence[Tensor]) -> Tensor:
        """(3,) this rank's parts of: the loss, hits, the sum over rows of their positives' mean cosine."""
        pairs = self.pairs
        cosines = self.dot(lambda here: self._positive_sums(y, here))  # (B,) summed over each row's positives
        loss = self.pair_loss + _weighted(self.lse[:1], pairs.row_weight)
        if column_lse:
            own_weight = pairs.column_weight[pairs.exchange.own]
            own_lse = [lse[pairs.exchange.own_of_held] for lse in column_lse]
            loss = loss + _weighted(own_lse[:1], own_weight)
        if pairs.kind == "mean":
            loss = loss - (cosines * pairs.positive_weight).sum() * self.scale
        if pairs.kind == "sum":
            loss = loss - _weighted(self.lse[1:], pairs.row_weight)
            if column_lse:
                loss = loss - _weighted(own_lse[1:], own_weight)
        hits = (self.hit & (pairs.positives > 0)).sum().double()
        return torch.stack([loss, hits, (cosines / pairs.positives.clamp(min=1)).sum()])

    # Backward.

    def differentiate(self, row_lse: Sequence[Tensor]) -> None:
        """Begin the backward pass."""
        pairs = self.pairs
        self.shifts = [_shift(lse, pairs.row_weight) for lse in row_lse]
        self.x_grad = torch.zeros_like(self.x)
        self.pulled = torch.zeros_like(self.class_sums)  # (classes + 1, D) what a class's positive columns get
        if pairs.kind == "mean":
            for here in tiles(len(self.x), pairs.tile):
                self.pulled.index_add_(0, self.line[here], self.scaled[here] * self.pull[here, None])

    def differentiate_block(self, start: int, read: Sequence[Tensor], accumulated: Sequence[Tensor]) -> None:
        columns, *column_shifts = read
        [columns_grad] = accumulated
        pairs = self.pairs

        def work(here: slice, there: slice, everywhere: slice, scores: Tensor) -> None:
            if pairs.kind == "sigmoid":
                sign = self._sign(here, everywhere)
                slope = (scores + self.bias).mul_(sign).sigmoid_().mul_(sign)
                slope *= pairs.row_weight[here, None].to(slope.dtype)
                self.bias_grad += slope.sum()
            else:
                slope = (scores - self.shifts[0][here, None]).exp_()  # (tile, tile) ∂loss/∂score
                if column_shifts:
                    slope += (scores - column_shifts[0][there]).exp_()
            if pairs.kind == "sum":
                scores.masked_fill_(~self._positive(here, everywhere), -torch.inf)
                slope -= (scores - self.shifts[1][here, None]).exp_()
                if column_shifts:
                    slope -= (scores - column_shifts[1][there]).exp_()
            self.x_grad[here].addmm_(slope, columns[there])
            columns_grad[there].addmm_(slope.T, self.scaled[here])

        self._each(start, columns, work)
        if pairs.kind == "mean":
            for there in tiles(len(columns), pairs.tile):
                columns_grad[there] -= self.pulled[self.column_line[start + there.start : start + there.stop]]

    def finish(self, y: Tensor, y_grad: Tensor) -> Tensor:
        """(B, D) the gradient of the scaled rows. Puts right what `y_grad` has of the rows' pairs with themselves."""
        pairs = self.pairs
        for here in tiles(len(self.x), pairs.tile) if pairs.kind == "mean" else ():
            self.x_grad[here].addcmul_(self.pull[here, None], self._positive_sums(y, here), value=-1)
            if pairs.itself is not None:
                y_grad[here].addcmul_(self.pull[here, None], self.scaled[here])
        return self.x_grad


def _add_lse(total: Tensor, scores: Tensor, dim: int) -> None:
    torch.logaddexp(total, scores.logsumexp(dim), out=total)


def _weighted(values: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Σ weight · value in double precision; values of weight 0 may be infinite."""
    zero = torch.zeros((), dtype=torch.float64, device=weight.device)
    for value in values:
        zero = zero + (torch.where(weight > 0, value.double(), 0.0) * weight).sum()
    return zero
