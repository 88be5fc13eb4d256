"""The contrastive losses: which pairs are positives, and what each query counts, over the rows of all ranks."""

import zlib
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mser_dist.contrastive.exchange import EXCHANGES, Gather, gather_numbers, gather_rows, world
from mser_dist.contrastive.scores import Kind, Pairs, Scores

Loss = Literal["infonce", "supcon", "sum", "masked", "siglip"]
_KINDS: dict[Loss, Kind] = {"infonce": "mean", "supcon": "mean", "sum": "sum", "masked": "mean", "siglip": "sigmoid"}


@dataclass(frozen=True)
class ContrastiveOutput:
    """`loss` has the gradient; the others have none. All are of the whole batch, and equal on every rank."""

    loss: Tensor
    excess: Tensor  # loss minus its floor, the least value that these positives allow
    accuracy: Tensor  # share of the rows whose nearest column is a positive; of equally near ones any one decides
    positives: Tensor  # a row, in the mean
    alignment: Tensor  # mean squared distance of positives (arXiv 2005.10242), for embeddings of unit length
    false_negatives: Tensor  # share of the negatives that have the row's own label
    rows: Tensor  # that count: those with a positive

    def detached(self) -> dict[str, Tensor]:
        """All values by name, without gradient."""
        return {field.name: getattr(self, field.name).detach() for field in fields(self)}


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    loss: Loss = "supcon",
    labels: Tensor | None = None,
    texts: Tensor | None = None,
    bias: Tensor | None = None,
    symmetric: bool = True,
    gather: Gather = "all_gather",
    tile: int = 1024,
    group: Any = None,
) -> ContrastiveOutput:
    """Row i of x against all columns y of all ranks, and, where `symmetric`, the other way round.

    Args:
        x, y: (B, D), row i of both a pair, e.g. speech and its caption; of unit length as a rule. B may differ from
            rank to rank, and be 0. Computed in fp32 (float64 stays), also under autocast.
        scale: () 1/temperature, with or without gradient.
        loss: "infonce": the pair itself is the only positive (arXiv 1807.03748, and CLIP's loss).
            "supcon": all pairs of one label are, each row's mean over them outside the logarithm (2004.11362, eq. 2).
            "sum": the same inside the logarithm (MIL-NCE, 1912.06430).
            "masked": the pair itself is; others of its label are neither positive nor negative.
            "siglip": each pair by itself (2303.15343); all pairs of one label are positives. Needs `bias`.
        labels: (B,) int64 ids, which every loss but "infonce" needs; there they only tell the false negatives.
        texts: (B,) int64 ids of y: of several columns of one id only the first, over all ranks, is compared with.
            The pair itself is then the row and that column. Where positives go by label, the first of each label.
        bias: () of "siglip".
        symmetric: columns are queries too, half of the loss; "siglip" has no directions.
        gather: "all_gather" (fewer messages) or "ring" (memory that shrinks with the number of ranks).
        tile: scores are computed in blocks of so many rows and columns; 0: all at once.

    Raises `ValueError` on all ranks where tensors do not fit each other, here or between ranks; `TypeError` for what is
    no tensor.
    """
    _check_tensors(x=x, y=y, scale=scale, labels=labels, texts=texts, bias=bias)
    what = f"{loss} {symmetric} {labels is None} {texts is None}"
    problem = _problem(x, y, scale, bias, gather, tile, labels, texts)
    if loss not in get_args(Loss):
        problem = f"loss={loss!r}: use one of {', '.join(get_args(Loss))}"
    elif labels is None and loss != "infonce":
        problem = f"loss={loss!r} needs labels"
    elif (loss == "siglip") != (bias is not None):
        problem = "bias goes with loss='siglip', and only with it"
    sizes = _agree(x, gather, what, problem, group)
    own = torch.arange(len(x), device=x.device) + sum(sizes[: world(group)[0]])
    columns = [own] + [ids for ids in (labels, texts) if ids is not None]
    ids = gather_rows(torch.stack(columns, 1), sizes, group)  # (N, 1 to 3)
    instance, label, text = ids[:, 0], ids[:, 1] if labels is not None else None, ids[:, -1]
    kept = torch.ones(len(ids), dtype=torch.bool, device=x.device)  # (N,) the columns that take part
    by_instance = loss in ("infonce", "masked")
    if texts is not None:
        kept = _first_of_each(text[:, None] if by_instance else ids[:, 1:])
        y = y[kept[own]]
    if by_instance:
        positive = instance if texts is None else text
    else:
        assert label is not None
        positive = label
    rows = _Ids(sizes, positive, label if loss == "masked" else None, label)
    kept_ids = rows if texts is None else rows.those(kept)
    return _loss(
        _KINDS[loss],
        x,
        y,
        scale,
        bias,
        rows,
        kept_ids,
        itself=False,
        symmetric=symmetric,
        gather=gather,
        tile=tile,
        group=group,
    )


def parallel_loss(
    x: Tensor,
    sources: Tensor,
    labels: Tensor,
    scale: Tensor,
    *,
    gather: Gather = "all_gather",
    tile: int = 1024,
    group: Any = None,
) -> ContrastiveOutput:
    """The language-agnostic term: clips of one utterance in different languages attract each other.

    Positives of a clip are the other clips of its source; clips of the same label but another source are neither
    positive nor negative, for pushing them apart would undo the emotion term. Rows without a positive have no loss.

    x: (B, D) of unit length; sources, labels: (B,) int64 ids; the rest as in `contrastive_loss`.
    """
    _check_tensors(x=x, sources=sources, labels=labels, scale=scale)
    sizes = _agree(x, gather, "parallel", _problem(x, x, scale, None, gather, tile, sources, labels), group)
    ids = gather_rows(torch.stack([sources, labels], 1), sizes, group)  # (N, 2)
    source, label = ids.unbind(1)
    rows = _Ids(sizes, source, neutral=label, label=None)
    return _loss(
        "mean", x, x, scale, None, rows, rows, itself=True, symmetric=False, gather=gather, tile=tile, group=group
    )


@torch.no_grad()
def uniformity(x: Tensor, limit: int = 512) -> Tensor:
    """log of the mean of exp(-2 · squared distance) over pairs of rows (arXiv 2005.10242), of at most `limit` rows.

    x: (B, D) of unit length. 0 where all rows are one, near -4 where many are spread out; NaN for fewer than two.
    Of this rank alone, and in fp32.
    """
    x = x[:limit].float()
    with torch.autocast(x.device.type, enabled=False):
        squared = (2 - 2 * x @ x.T).clamp(min=0)  # (b, b)
    apart = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return squared[apart].mul(-2).exp().mean().log()


def _check_tensors(**given: Any) -> None:
    """Raise `TypeError` for a number or a list in a tensor's place: a fault of the code, so of all ranks at once."""
    ids = "a (rows,) tensor of int64 ids"
    for name, value in given.items():
        if not isinstance(value, Tensor) and not (value is None and name in ("labels", "texts", "bias")):
            fit = {
                "x": "a (rows, width) tensor of embeddings",
                "y": "a (rows, width) tensor of embeddings",
                "scale": "a tensor of one number, 1/temperature, such as torch.tensor(14.0, device=x.device)",
                "bias": "a tensor of one number, such as torch.tensor(-10.0, device=x.device)",
            }.get(name, ids)
            raise TypeError(f"{name} is {type(value).__name__} {value!r:.40}, and must be {fit}")


def _problem(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, gather: str, tile: int, *ids: Tensor | None
) -> str | None:
    """What is wrong with arguments; to be told on all ranks together, since one that raises alone leaves the rest."""
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        return f"embeddings of shapes {tuple(x.shape)} and {tuple(y.shape)}: both must be (rows, one width)"
    for each in (each for each in ids if each is not None):
        if each.dim() != 1 or each.dtype != torch.int64:
            return f"ids of shape {tuple(each.shape)} and {each.dtype}: they must be (rows,) of torch.int64"
    for each in (each for each in (y, *ids) if each is not None):
        if len(each) != len(x):
            return f"{len(x)} rows, but {len(each)} of another argument: row i of all of them is one pair"
    for each in (each for each in (y, scale, bias, *ids) if each is not None):
        if each.device != x.device:
            return f"embeddings on {x.device}, but another argument on {each.device}: move it there"
    if scale.numel() != 1 or (bias is not None and bias.numel() != 1):
        return "scale and bias must be one number each: a LogitScale gives as many as it has terms"
    if gather not in EXCHANGES:
        return f"gather={gather!r}: use one of {', '.join(EXCHANGES)}"
    return f"tile={tile}: use 0 or more" if tile < 0 else None


def _agree(x: Tensor, gather: str, what: str, problem: str | None, group: Any) -> list[int]:
    """The number of rows of each rank. Raises `ValueError` on every rank if one of them has a problem or differs."""
    rows, width = x.shape if x.dim() == 2 else (0, 0)
    what = f"{what} {gather} {'float64' if x.dtype == torch.float64 else 'float32'}"
    told = gather_numbers([rows, problem is not None, width, zlib.crc32(what.encode())], x.device, group)
    if problem:
        raise ValueError(problem)
    for rank, (_, failed, other_width, other_what) in enumerate(told):
        if failed:
            raise ValueError(f"rank {rank} called the contrastive loss with tensors that do not fit, see there")
        if other_width != width:
            raise ValueError(f"embeddings are {width} wide here and {other_width} on rank {rank}: they must be equal")
        if other_what != zlib.crc32(what.encode()):
            raise ValueError(f"rank {rank} called another contrastive loss than this one ({what})")
    return [size for size, *_ in told]


def _first_of_each(ids: Tensor) -> Tensor:
    """(N, k) ids → (N,) bool: the first row of each combination of ids."""
    kinds, inverse = torch.unique(ids, dim=0, return_inverse=True)
    place = torch.arange(len(ids), device=ids.device)
    first = place.new_full((len(kinds),), len(ids)).scatter_reduce_(0, inverse, place, "amin")
    kept = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    kept[first] = True
    return kept


class _Ids(NamedTuple):
    """What decides which pairs count: ids of all rows, or of all columns, of all ranks."""

    sizes: list[int]  # how many are of each rank
    positive: Tensor  # (n,) a pair of one id attracts
    neutral: Tensor | None  # (n,) of the pairs of one id only the positives take part
    label: Tensor | None  # (n,) by which false negatives are told

    def those(self, kept: Tensor) -> "_Ids":
        """Some of them, by a (n,) mask."""
        sizes = torch.stack([part.sum() for part in kept.split(self.sizes)]).tolist()  # one wait for the device, not W
        return _Ids(sizes, self.positive[kept], *(None if ids is None else ids[kept] for ids in self[2:]))


def _loss(
    kind: Kind,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_ids: _Ids,
    column_ids: _Ids,
    *,
    itself: bool,
    symmetric: bool,
    gather: Gather,
    tile: int,
    group: Any,
) -> ContrastiveOutput:
    """The loss of this rank's rows x and columns y, from the ids of all."""
    start = sum(row_ids.sizes[: world(group)[0]])
    own = slice(start, start + len(x))
    ids, both = torch.unique(torch.cat([row_ids.positive, column_ids.positive]), return_inverse=True)
    rows, columns = both.split([len(row_ids.positive), len(column_ids.positive)])
    # How many positives each query has. Everything here is of whole vectors of ids: every rank finds the same.
    of_row = torch.bincount(columns, minlength=len(ids))[rows] - int(itself)  # (M,)
    of_column = torch.bincount(rows, minlength=len(ids))[columns] - int(itself)  # (N,)
    count = (of_row > 0).sum()
    if kind == "sigmoid":
        row_weight = torch.full_like(of_row, 1.0, dtype=torch.float64) / max(len(of_row), 1)
        column_weight = torch.zeros_like(of_column, dtype=torch.float64)
    else:
        half = 0.5 if symmetric else 1.0
        row_weight = (of_row > 0).double() * half / count.clamp(min=1)
        column_weight = (of_column > 0).double() * half / (of_column > 0).sum().clamp(min=1)
    # A positive pair's weight in the linear part is the same for all pairs of a class, and so are the counts.
    of_class = torch.zeros(len(ids), dtype=torch.float64, device=x.device)
    of_class[columns] = column_weight / of_column.clamp(min=1) if symmetric else 0.0
    positive_weight = row_weight / of_row.clamp(min=1) + of_class[rows]  # (M,)
    pairs = Pairs(
        kind=kind,
        symmetric=symmetric and kind != "sigmoid",
        row_class=rows[own].int(),  # half the bytes to compare
        column_class=columns.int(),
        classes=len(ids),
        row_group=row_ids.neutral[own] if row_ids.neutral is not None else None,
        column_group=column_ids.neutral,
        itself=start if itself else None,
        row_weight=row_weight[own],
        column_weight=column_weight,
        positive_weight=positive_weight[own],
        positives=of_row[own],
        tile=tile,
        exchange=EXCHANGES[gather](column_ids.sizes, group),
    )
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        offset = torch.zeros((), device=x.device) if bias is None else bias
        value, sums = Scores.apply(
            x.to(dtype), y.to(dtype), scale.to(dtype).reshape(()), offset.to(dtype).reshape(()), pairs
        )
    floor = torch.zeros((), dtype=torch.float64, device=x.device)
    if kind == "mean":
        floor = (row_weight * of_row.clamp(min=1).log()).sum()
        if symmetric:
            floor = floor + (column_weight * of_column.clamp(min=1).log()).sum()
    among = count.clamp(min=1)
    return ContrastiveOutput(
        loss=value,
        excess=value.detach() - floor.to(dtype),
        accuracy=(sums[0] / among).to(dtype),
        positives=(of_row.clamp(min=0).sum() / among).to(dtype),
        alignment=((count > 0) * 2 - 2 * sums[1] / among).to(dtype),
        false_negatives=_false_negatives(rows, columns, row_ids, column_ids).to(dtype),
        rows=count.to(dtype),
    )


def _false_negatives(rows: Tensor, columns: Tensor, row_ids: _Ids, column_ids: _Ids) -> Tensor:
    """Share of the rows' negatives that have their own label; 0 where these are left out, or there are no labels."""
    if row_ids.label is None or column_ids.label is None or row_ids.neutral is not None or not len(rows):
        return torch.zeros((), device=rows.device)
    same = _count_in(row_ids.label, column_ids.label)  # (M,) columns of the row's label
    both = _count_in(torch.stack([rows, row_ids.label], 1), torch.stack([columns, column_ids.label], 1))
    positive = _count_in(rows, columns)
    return (same - both).sum() / (len(columns) - positive).sum().clamp(min=1)


def _count_in(queries: Tensor, among: Tensor) -> Tensor:
    """(M,) how often each query, a number or a row of numbers, is in `among`."""
    kinds, inverse = torch.unique(torch.cat([queries, among]), dim=0, return_inverse=True)
    return torch.bincount(inverse[len(queries) :], minlength=len(kinds))[inverse[: len(queries)]]
