"""Gradients over NCCL against gloo's and one process' in double precision; and what NCCL asks of tensors, on gloo."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mser_dist.contrastive import exchange
from tests.contrastive_reference import CASES, ours, reference
from tests.distributed.contrastive_towers import LABEL, RELATIVE, SCALE, SOURCE, TEXT, N, Wrapped, inputs, loss_of
from tests.distributed.test_exact_gradients import expected_gradients
from tests.gpu.registry import Check, Outcome, Result

BIAS = -2.0


def own_rows(rank: int, ranks: int) -> Tensor:
    """Which of the N samples a rank has, in a shuffled order: of three ranks and more the second has none."""
    parts = list(torch.randperm(N, generator=torch.Generator().manual_seed(ranks)).tensor_split(ranks))
    if ranks > 2:
        parts[0], parts[1] = torch.cat(parts[:2]), parts[1][:0]
    return parts[rank]


def leaves(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, y (N, D) of unit length, scale and bias, all of which want a gradient."""
    rows = [nn.functional.normalize(each.to(dtype), dim=-1) for each in inputs()]
    numbers = [torch.tensor(value, dtype=dtype) for value in (SCALE, BIAS)]
    return [each.to(device).requires_grad_() for each in (*rows, *numbers)]


def found(case: str, mine: Tensor, device: str, group: Any, **options: Any) -> list[Tensor]:
    """The loss of all ranks, and the gradients of this one's rows, of the scale and of the bias; on the CPU."""
    every = leaves(device)
    rows = [each[mine.to(device)].detach().requires_grad_() for each in every[:2]]
    ids = [each[mine].to(device) for each in (LABEL, TEXT, SOURCE)]
    out = ours(case, *rows, *every[2:], *ids, group=group, **options)
    out.loss.backward()
    wanted = [*rows, *every[2:]]
    grads = [each.grad if each.grad is not None else torch.zeros_like(each) for each in wanted]
    return [each.detach().double().cpu() for each in (out.loss, *grads)]


def expected(case: str, mine: Tensor, ranks: int) -> list[Tensor]:
    """The same of one process in double precision. Rows' gradients are times the ranks: DDP and ZeRO take a mean."""
    every = leaves("cpu", torch.float64)
    x, y, scale, bias = every
    loss = reference(case, x, y, scale, bias, LABEL, TEXT, SOURCE)
    loss.backward()
    grads = [each.grad if each.grad is not None else torch.zeros_like(each) for each in every]
    return [loss.detach(), *(ranks * each[mine] for each in grads[:2]), *grads[2:]]


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest relative difference; of what is rounding alone, relative to the largest of its case."""
    largest = max(float(each.norm()) for each in other)
    return max(float((a - b).norm()) / max(float(b.norm()), 1e-3 * largest) for a, b in zip(one, other, strict=True))


@contextmanager
def as_nccl(seen: dict[str, int]) -> Iterator[None]:
    """Exchanges take NCCL's branches, over gloo, and refuse what NCCL does: a tensor that is not contiguous.

    seen: how often each collective was used.
    """

    class Strict:
        def __getattr__(self, name: str) -> Any:
            return getattr(dist, name)

        def get_backend(self, group: Any = None) -> str:
            return "nccl"

        def all_reduce(self, tensor: Tensor, *more: Any, **named: Any) -> Any:
            return checked("all_reduce", dist.all_reduce, tensor, *more, **named)

        def P2POp(self, operation: Any, tensor: Tensor, *more: Any) -> Any:
            return checked("P2POp", partial(dist.P2POp, operation), tensor, *more)

    def checked(name: str, call: Any, *given: Any, **named: Any) -> Any:
        seen[name] = seen.get(name, 0) + 1
        for each in given:
            if isinstance(each, Tensor) and not each.is_contiguous():
                raise AssertionError(f"{name} of a tensor {tuple(each.shape)} with strides {each.stride()}")
        return call(*given, **named)

    names = ("dist", "_all_gather", "_reduce_scatter")
    before = {name: getattr(exchange, name) for name in names}
    replaced = {name: partial(checked, name.strip("_"), before[name]) for name in names[1:]} | {"dist": Strict()}
    for name, value in replaced.items():
        setattr(exchange, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(exchange, name, value)


def contrastive(device: str, folder: Path) -> Result:
    """Every loss by every exchange: over the backend of the device, over gloo, and on one process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    gloo = dist.new_group(backend="gloo") if device == "cuda" else None
    mine = own_rows(rank, ranks)
    worst, seen = {"gloo": 0.0, "double": 0.0}, dict[str, int]()
    for case in CASES:
        whole = expected(case, mine, ranks)
        for gather in ("all_gather", "ring"):
            for tile in (0, 3):
                options = {"gather": gather, "tile": tile}
                if device == "cuda":
                    here = found(case, mine, device, None, **options)
                else:
                    with as_nccl(seen):
                        here = found(case, mine, device, None, **options)
                there = found(case, mine, "cpu", gloo, **options)
                worst["gloo"] = max(worst["gloo"], apart(here, there))
                worst["double"] = max(worst["double"], apart(here, whole))
    return {**worst, "ranks": ranks, "backend": dist.get_backend(), "seen": seen}


def judge_contrastive(results: list[Result]) -> Outcome:
    gloo, double = (max(one[name] for one in results) for name in ("gloo", "double"))
    over = f"{results[0]['backend']}, {results[0]['ranks']} ranks"
    line = f"{over}: {len(CASES)} losses, gradients as gloo's to {gloo:.1e}, as in double precision to {double:.1e}"
    return Outcome(max(gloo, double) < RELATIVE, {"gloo": gloo, "double": double}, line)


WRAPPERS = ("ddp", "zero1", "zero2", "zero3")


def engines(device: str, folder: Path) -> Result:
    """The gradient of every parameter of two towers behind DDP and each ZeRO stage, in one chunk and in three."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = own_rows(rank, ranks)
    x, y = (each.to(device) for each in inputs())
    ids = {"label": LABEL[mine].to(device), "text": TEXT[mine].to(device), "source": SOURCE[mine].to(device)}
    worst: dict[str, float] = {}
    for kind in WRAPPERS:
        wrapped = Wrapped(kind, rank, ranks, str(folder), device)
        for case in ("supcon", "infonce, unique texts", "siglip", "parallel"):
            whole, _, _ = expected_gradients(case)
            for count in (1, 3):
                chunks = [{"x": x[part], "y": y[part]} for part in mine.to(device).tensor_split(count)]
                grads, _, _ = wrapped.gradients(chunks, loss_of(case, ids, {"tile": 3}))
                pairs = [(grads[name].double().cpu(), each) for name, each in whole.items()]
                difference = apart(*(list(side) for side in zip(*pairs, strict=True)))
                worst[kind] = max(worst.get(kind, 0.0), difference)
    return {"worst": worst, "ranks": ranks}


def judge_engines(results: list[Result]) -> Outcome:
    worst = {kind: max(one["worst"][kind] for one in results) for kind in WRAPPERS}
    said = ", ".join(f"{kind} {value:.1e}" for kind, value in worst.items())
    return Outcome(
        max(worst.values()) < RELATIVE, worst, f"{results[0]['ranks']} ranks, from one process in double: {said}"
    )


CHECKS = [
    Check("contrastive gradients", "each loss over NCCL against gloo", contrastive, judge_contrastive, cpu=True),
    Check(
        "engine gradients",
        "DDP and ZeRO-1/2/3 against one process",
        engines,
        judge_engines,
        cpu=True,
        tests="tests/distributed/test_exact_gradients.py",
    ),
]
