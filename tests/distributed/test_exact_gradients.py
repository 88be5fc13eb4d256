"""W processes that each hold a part of the batch have the gradients of one process that holds all of it.

Every loss × wrapper × gradient caching × tiles × way of gathering, with batches that differ from rank to rank, held
against the loss written out for one process in double precision.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mser_dist.contrastive import contrastive_loss
from tests.contrastive_reference import CASES, ours, reference
from tests.distributed.contrastive_towers import (
    ACCURACY,
    LABEL,
    RELATIVE,
    SCALE,
    SOURCE,
    TEXT,
    N,
    Towers,
    Wrapped,
    inputs,
    loss_of,
    telemetry,
)
from tests.distributed.spawn import run

pytestmark = pytest.mark.distributed
SIZES = {1: [12], 2: [7, 5], 4: [5, 0, 3, 4]}  # samples of each rank, in a shuffled order
WRAPPERS = ("none", "none, scale at its bound", "ddp", "zero1", "zero2", "zero3")


def cases() -> Iterator[tuple[str, str, int, int, str]]:
    for wrapper in WRAPPERS:
        for case in CASES:
            for chunks in (1, 3):
                for tile in (0, 3):
                    for gather in ("all_gather", "ring"):
                        yield wrapper, case, chunks, tile, gather


def all_gradients(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """Every case's gradients on this rank, each the whole parameter's."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(ranks))
    mine = order.split(SIZES[ranks])[rank]
    x, y = inputs()
    ids = {"label": LABEL[mine], "text": TEXT[mine], "source": SOURCE[mine]}
    result = {}
    wrapped: dict[str, Wrapped] = {}
    for wrapper, case, count, tile, gather in cases():
        if wrapper not in wrapped:
            wrapped[wrapper] = Wrapped(wrapper, rank, ranks, folder)
        chunks = [{"x": x[part], "y": y[part]} for part in mine.tensor_split(count)]
        loss = loss_of(case, ids, {"tile": tile, "gather": gather})
        result[f"{wrapper} | {case} | {count} | {tile} | {gather}"] = wrapped[wrapper].gradients(chunks, loss)
    return result


def expected_gradients(case: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Gradients, loss and telemetry of the whole batch at once, in one process and in double precision."""
    model = Towers().double()
    x, y = inputs()
    (u, v), _ = model({"x": x.double(), "y": y.double()})
    scale = model.scale.log_scale.exp()[0]
    assert model.scale.bias is not None
    bias = model.scale.bias[0]
    value = reference(case, u, v, scale, bias, LABEL, TEXT, SOURCE)
    value.backward()
    grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    told = telemetry(ours(case, u, v, scale, bias, LABEL, TEXT, SOURCE)).detach()  # tested against formulae elsewhere
    return grads, value.detach(), told


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_loss_has_the_gradient_of_one_process(ranks: int, tmp_path: Path) -> None:
    parts = run(all_gradients, ranks, ranks, str(tmp_path))
    assert all(part.keys() == parts[0].keys() for part in parts)
    worst = 0.0
    for case in CASES:
        expected, value, telling = expected_gradients(case)
        outwards = expected["scale.log_scale"].clamp(max=0)  # a step up, which a scale at its upper bound cannot do
        # A gradient that is rounding alone has no relative error: it is measured against the largest of its case.
        largest = max(float(grad.norm()) for grad in expected.values())
        for key in (key for key in parts[0] if key.split(" | ")[1] == case):
            for part in parts:
                found, loss, told = part[key]
                assert abs(float(loss) - float(value)) < RELATIVE * abs(float(value)), key
                assert torch.equal(told, parts[0][key][2]), "telemetry is the same on every rank"
                wrong = (told.double() - telling).abs() > RELATIVE * (1 + telling.abs())
                if case == "infonce":
                    wrong[ACCURACY] = False  # of columns of one text, any may be the nearest
                assert not wrong.any(), f"{key}: {told} is not {telling}"
                for name, grad in expected.items():
                    if "bound" in key and name == "scale.log_scale":
                        grad = grad - outwards
                    size = float(grad.norm()) or largest
                    error = float((found[name].double() - grad).norm()) / size
                    worst = max(worst, error)
                    assert error < RELATIVE, f"{key}: {name} is off by {error:.1e}"
    print(f"worst relative error on {ranks} ranks: {worst:.1e}")


def on_a_part_of_the_ranks(rank: int) -> dict[str, list[Tensor]]:
    """Ranks 1 and 3 of four, by how they gather: the loss, and its gradients by their own rows and the scale."""
    group = torch.distributed.new_group([1, 3])
    result: dict[str, list[Tensor]] = {}
    if rank in (1, 3):
        mine = slice(0, 7) if rank == 1 else slice(7, N)
        for gather in ("all_gather", "ring"):
            leaves = [nn.functional.normalize(each, dim=-1)[mine].requires_grad_() for each in inputs()]
            leaves.append(torch.tensor(SCALE, requires_grad=True))
            out = contrastive_loss(*leaves, labels=LABEL[mine], tile=3, gather=gather, group=group)
            out.loss.backward()
            result[gather] = [out.loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    torch.distributed.barrier()
    return result


def test_a_group_of_some_ranks_is_a_world_of_its_own() -> None:
    x, y = (nn.functional.normalize(each.double(), dim=-1).requires_grad_() for each in inputs())
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    value = reference("supcon", x, y, scale, torch.zeros(()), LABEL, TEXT, SOURCE)
    value.backward()
    assert x.grad is not None and y.grad is not None and scale.grad is not None
    _, first, _, second = run(on_a_part_of_the_ranks, 4)
    for gather in first:
        for found, mine in ((first[gather], slice(0, 7)), (second[gather], slice(7, N))):
            expected = [value.detach(), 2 * x.grad[mine], 2 * y.grad[mine], scale.grad]  # 2: DDP takes the mean of two
            for a, b in zip(found, expected, strict=True):
                assert (a.double() - b).norm() < RELATIVE * b.norm()
    assert set(first) == {"all_gather", "ring"}
