"""The losses on one process, against their formulae written out, and the parts around them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mser_dist import contrastive
from mser_dist.contrastive import (
    ContrastiveOutput,
    Embedded,
    LogitScale,
    bounds,
    cached_backward,
    contrastive_loss,
    parallel_loss,
    uniformity,
)
from tests.contrastive_reference import CASES, ours, reference

N, D = 10, 8
LABEL = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 3, 1])
TEXT = torch.tensor([0, 10, 20, 1, 10, 21, 0, 2, 30, 11])
SOURCE = torch.tensor([0, 1, 0, 1, 2, 3, 3, 3, 4, 5])


def unit(seed: int, rows: int = N, width: int = D) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(rows, width, generator=g, dtype=torch.float64), dim=-1)


def gradients(loss: Any, case: str, label: Tensor, text: Tensor, source: Tensor, scale: float = 14.0) -> list[Tensor]:
    """Loss, and its gradients by both embeddings, scale and bias; zeros where it does not depend on one."""
    leaves = [unit(0, len(label)), unit(1, len(label)), torch.tensor(scale).double(), torch.tensor(-2.0).double()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = loss(case, *leaves, label, text, source)
    value = out.loss if isinstance(out, ContrastiveOutput) else out
    value.backward()
    return [value.detach(), *(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves)]


@pytest.mark.parametrize("gather", ["all_gather", "ring"])
@pytest.mark.parametrize("tile", [0, 1, 3, 64])
@pytest.mark.parametrize("case", CASES)
def test_every_loss_is_its_formula(case: str, tile: int, gather: str) -> None:
    expected = gradients(reference, case, LABEL, TEXT, SOURCE)
    found = gradients(lambda *a: ours(*a, tile=tile, gather=gather), case, LABEL, TEXT, SOURCE)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@given(data=st.data(), n=st.integers(1, 12), tile=st.integers(0, 5), case=st.sampled_from(sorted(CASES)))
def test_every_loss_is_its_formula_for_any_ids(data: Any, n: int, tile: int, case: str) -> None:
    ids = [torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))) for _ in range(3)]
    label, part, source = ids
    text = 10 * label + part  # captions of one text are of one label
    expected = gradients(reference, case, label, text, source)
    found = gradients(lambda *a: ours(*a, tile=tile), case, label, text, source)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_with_unique_labels_supcon_is_clips_loss() -> None:
    x, y, target = unit(0), unit(1), torch.arange(N)
    logits = 14.0 * x @ y.T
    clip = (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2
    scale = torch.tensor(14.0)
    for loss in ("supcon", "sum", "masked", "infonce"):
        torch.testing.assert_close(contrastive_loss(x, y, scale, loss=loss, labels=target).loss, clip)


CORNERS = torch.eye(D)[torch.arange(N) % 2]  # two classes, as far apart as they go


@pytest.mark.parametrize(("loss", "floor"), [("supcon", math.log(N / 2)), ("sum", 0.0), ("masked", 0.0)])
def test_the_floor_is_reached_when_the_classes_are_apart(loss: Any, floor: float) -> None:
    out = contrastive_loss(CORNERS, CORNERS, torch.tensor(100.0), loss=loss, labels=torch.arange(N) % 2)
    assert float(out.loss) == pytest.approx(floor, abs=1e-5)
    assert float(out.excess) == pytest.approx(0.0, abs=1e-5)
    assert float(out.alignment) == pytest.approx(0.0, abs=1e-5)
    assert float(out.rows) == N


def test_plain_infonce_cannot_go_below_the_log_of_the_class_size() -> None:
    """The floor of anchors of one emotion that push each other away; unique texts take it away in one direction."""
    label = torch.arange(N) % 2
    plain = contrastive_loss(CORNERS, CORNERS, torch.tensor(100.0), loss="infonce", labels=label)
    assert float(plain.loss) == pytest.approx(math.log(N / 2), abs=1e-5)
    assert float(plain.false_negatives) == pytest.approx((N / 2 - 1) / (N - 1))
    unique = contrastive_loss(
        CORNERS, CORNERS, torch.tensor(100.0), loss="infonce", labels=label, texts=label, symmetric=False
    )
    assert float(unique.loss) == pytest.approx(0.0, abs=1e-5) and float(unique.false_negatives) == 0


def test_a_text_under_two_labels_stays_a_positive_of_both() -> None:
    """Where positives go by label; a pair that is its own positive keeps the one column."""
    label, text = torch.tensor([0, 1, 1]), torch.tensor([7, 7, 8])
    both = contrastive_loss(unit(0, 3), unit(1, 3), torch.tensor(14.0), labels=label, texts=text)
    assert float(both.rows) == 3 and float(both.positives) == pytest.approx(5 / 3)
    one = contrastive_loss(unit(0, 3), unit(1, 3), torch.tensor(14.0), loss="infonce", texts=text)
    assert float(one.rows) == 3 and float(one.positives) == 1


def test_telemetry() -> None:
    x, y = unit(0), unit(1)
    out = contrastive_loss(x, y, torch.tensor(14.0), labels=LABEL, tile=3)
    nearest = (x @ y.T).argmax(1)
    assert float(out.accuracy) == pytest.approx(float((LABEL[nearest] == LABEL).double().mean()))
    assert float(out.positives) == pytest.approx(float((LABEL[:, None] == LABEL).sum() / N))
    distance = (x[:, None] - y[None]).square().sum(-1)
    same = LABEL[:, None] == LABEL[None]
    aligned = ((distance * same).sum(1) / same.sum(1)).mean()
    assert float(out.alignment) == pytest.approx(float(aligned))
    assert float(out.false_negatives) == 0
    apart = torch.cdist(x, x).square()[~torch.eye(N, dtype=torch.bool)]
    assert float(uniformity(x)) == pytest.approx(float(apart.mul(-2).exp().mean().log()), rel=1e-5)
    assert not any(value.requires_grad for name, value in vars(out).items() if name != "loss")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("one_class", [True, False])
def test_identical_embeddings_at_scale_100_stay_finite(case: str, one_class: bool) -> None:
    x = (torch.ones(N, D) / math.sqrt(D)).requires_grad_()
    label = torch.zeros(N, dtype=torch.long) if one_class else torch.arange(N)
    scale = torch.tensor(100.0, requires_grad=True)
    out = ours(case, x, x, scale, torch.tensor(-2.0), label, label, torch.arange(N) // 2, tile=4)
    out.loss.backward()
    assert out.loss.isfinite() and x.grad is not None and x.grad.isfinite().all()


def test_opposite_embeddings_at_scale_100_stay_finite() -> None:
    x = (torch.ones(N, D) / math.sqrt(D)).requires_grad_()
    out = contrastive_loss(x, -x, torch.tensor(100.0), labels=LABEL)
    out.loss.backward()
    assert out.loss.isfinite() and x.grad is not None and x.grad.isfinite().all()


def test_without_parallel_clips_the_term_is_zero_with_a_zero_gradient() -> None:
    x = unit(3).requires_grad_()
    out = parallel_loss(x, torch.arange(N), torch.zeros(N, dtype=torch.long), torch.tensor(14.0))
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0 and float(out.rows) == 0 and float(out.alignment) == 0
    assert x.grad is not None and not x.grad.any()


def test_an_empty_batch_is_no_loss() -> None:
    none = torch.zeros(0, D, requires_grad=True)
    out = contrastive_loss(none, none, torch.tensor(14.0), labels=torch.zeros(0, dtype=torch.long))
    out.loss.backward()
    assert float(out.loss.detach()) == 0.0


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_a_number_reaches_the_loss(case: str) -> None:
    x = unit(0)
    x[3] = torch.nan
    out = ours(case, x, unit(1), torch.tensor(14.0), torch.tensor(-2.0), LABEL, TEXT, torch.arange(N) // 2)
    assert out.loss.isnan()


def test_autocast_leaves_the_loss_in_fp32() -> None:
    x, y = unit(0).float(), unit(1).float()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = contrastive_loss(leaf, y, torch.tensor(100.0), labels=LABEL)
        out.loss.backward()
    plain = x.clone().requires_grad_()
    exact = contrastive_loss(plain, y, torch.tensor(100.0), labels=LABEL)
    exact.loss.backward()
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, exact.loss) and leaf.grad is not None and torch.equal(leaf.grad, plain.grad)  # type: ignore[arg-type]


def saved_elements(n: int, tile: int) -> int:
    """What a loss of `n` rows keeps for its backward pass besides its inputs."""
    x, y = unit(0, n), unit(1, n).requires_grad_()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = contrastive_loss(x, y, torch.tensor(14.0), loss="infonce", tile=tile)
    for value in vars(out.loss.grad_fn.pairs).values():  # type: ignore[union-attr]
        if isinstance(value, Tensor):
            pack(value)
    return sum(saved.values())


def test_what_is_kept_grows_with_the_rows_and_not_with_their_square() -> None:
    assert saved_elements(128, 16) < 2.1 * saved_elements(64, 16) < 64 * 64 * 2.1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"y": unit(1, N, D + 1)}, r"shapes \(10, 8\) and \(10, 9\): both must be \(rows, one width\)"),
        ({"y": unit(1, N - 1)}, "10 rows, but 9 of another argument"),
        ({"labels": LABEL[:-1]}, "10 rows, but 9 of another argument"),
        ({"labels": None}, "needs labels"),
        ({"loss": "siglip"}, "bias goes with"),
        ({"bias": torch.zeros(())}, "bias goes with"),
        ({"loss": "clip"}, "use one of infonce, supcon, sum, masked, siglip"),
        ({"labels": LABEL.float()}, r"ids of shape \(10,\) and torch.float32: they must be \(rows,\) of torch.int64"),
        ({"labels": LABEL[:, None]}, r"ids of shape \(10, 1\)"),
        ({"labels": LABEL.to("meta")}, "embeddings on cpu, but another argument on meta"),
        ({"scale": torch.ones(2)}, "one number each"),
        ({"gather": "all_reduce"}, "use one of all_gather, ring"),
        ({"tile": -1}, "use 0 or more"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"x": unit(0), "y": unit(1), "scale": torch.tensor(14.0), "labels": LABEL}
    with pytest.raises(ValueError, match=says):
        contrastive_loss(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scale": 14.0}, r"scale is float 14.0, and must be a tensor of one number, 1/temperature, .*torch.tensor\("),
        ({"bias": -10}, "bias is int -10, and must be a tensor of one number"),
        ({"x": [[1.0, 0.0]]}, r"x is list .*, and must be a \(rows, width\) tensor of embeddings"),
        ({"y": None}, "y is NoneType None, and must be"),
        ({"labels": [0, 1]}, r"labels is list \[0, 1\], and must be a \(rows,\) tensor of int64 ids"),
        ({"texts": LABEL.numpy()}, "texts is ndarray"),
    ],
)
def test_what_is_no_tensor_is_refused(change: dict[str, Any], says: str) -> None:
    arguments: dict[str, Any] = {"x": unit(0), "y": unit(1), "scale": torch.tensor(14.0), "labels": LABEL}
    with pytest.raises(TypeError, match=says):
        contrastive_loss(**(arguments | change))
    if "scale" in change:
        with pytest.raises(TypeError, match=says):
            contrastive.parallel_loss(unit(0), LABEL, LABEL, **change)


def test_the_example_in_the_docstring_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert contrastive.__doc__
    code = "\n".join(line[4:] for line in contrastive.__doc__.splitlines() if line.startswith("    "))
    exec(code, {})
    assert float(capsys.readouterr().out) >= 0


# ---- the scale


def test_the_scale_is_bounded_and_comes_back() -> None:
    scale = LogitScale(2, start=14.0, highest=100.0)
    assert scale()[0].tolist() == pytest.approx([14.0, 14.0])
    with torch.no_grad():
        scale.log_scale.copy_(torch.tensor([9.0, 9.0]))  # what bfloat16 or momentum may leave above the bound
    values, _ = scale()
    assert values.tolist() == pytest.approx([100.0, 100.0])
    (values * torch.tensor([1.0, -1.0])).sum().backward()
    assert scale.log_scale.grad is not None
    inwards, outwards = scale.log_scale.grad.tolist()
    assert inwards > 0 and outwards == 0, "a step down is allowed, a step further up is not"
    assert list(bounds(nn.ModuleDict({"s": scale}))) == [("s.log_scale", 0.0, math.log(100.0))]


# ---- gradient caching


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.x = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, D))
        self.y = nn.Linear(6, D)
        self.scale = LogitScale(1, 14.0, 100.0)
        self.passes = 0

    def forward(self, chunk: tuple[Tensor, Tensor]) -> Embedded:
        self.passes += len(chunk[0])
        x, y = (nn.functional.normalize(t(c), dim=-1) for t, c in zip((self.x, self.y), chunk, strict=True))
        return Embedded((x, y), self.scale()[:1])


def contrast(embedded: Embedded) -> tuple[Tensor, Tensor]:
    x, y = embedded.rows
    out = contrastive_loss(x, y, embedded.shared[0][0], labels=LABEL)
    return out.loss, out.accuracy


def test_cached_gradients_are_those_of_one_pass_dropout_included() -> None:
    model = Towers()
    data = torch.randn(2, N, 6)
    chunks = [(data[0, a:b], data[1, a:b]) for a, b in ((0, 3), (3, 3), (3, 8), (8, 10))]  # one of them empty
    torch.manual_seed(1)
    loss, accuracy = cached_backward(chunks, model, contrast)
    after = torch.get_rng_state()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert model.passes == N + 8, "the last chunk goes through once"

    model.zero_grad()
    torch.manual_seed(1)
    parts = [model(chunk) for chunk in chunks]
    whole, same_accuracy = contrast(
        Embedded(tuple(torch.cat(rows) for rows in zip(*(p.rows for p in parts), strict=True)), parts[0].shared)
    )
    whole.backward()
    assert torch.equal(loss, whole.detach()) and torch.equal(accuracy, same_accuracy)
    assert torch.equal(after, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-8)


def test_a_small_gradient_of_a_float16_embedding_reaches_the_tower() -> None:
    """Where backward scales the loss: the cache must not have lost it before."""
    tower = nn.Linear(6, 4)
    data = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))

    def backward(loss: Tensor) -> None:
        (loss * 2**16).backward()

    cached_backward(
        data.split(4),
        lambda chunk: Embedded((tower(chunk).half(),)),
        lambda embedded: (1e-9 * embedded.rows[0].square().sum(), None),
        backward=backward,
    )
    found = tower.weight.grad
    loss = 2**16 * 1e-9 * tower(data).square().sum()
    [expected] = torch.autograd.grad(loss, [tower.weight])
    assert found is not None
    assert (found - expected).norm() < 2**-10 * expected.norm()  # float16 rounds by 2**-11, twice


def test_caching_without_chunks_is_refused() -> None:
    with pytest.raises(ValueError, match="no chunks"):
        cached_backward([], Towers(), contrast)
