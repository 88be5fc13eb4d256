"""What ranks that contrast together do besides their gradients: mistakes, bounds, bfloat16, whole steps of stage 1."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import zero
from torch import Tensor, nn

from mser_dist import config as cfg
from mser_dist import deepspeed_parts
from mser_dist.contrastive import Embedded, LogitScale, cached_backward, contrastive_loss
from mser_dist.models.aligner import Aligner
from mser_dist.models.attention import Attention
from mser_dist.models.speech import build_speech
from mser_dist.ranks.distributed import World
from mser_dist.training.engine import Engine
from tests.distributed.contrastive_towers import LABEL, RELATIVE, SOURCE, TEXT, D, N, Towers, Wrapped, inputs, loss_of
from tests.distributed.spawn import run, whole_state

pytestmark = pytest.mark.distributed


def mistakes(rank: int, ranks: int, folder: str) -> list[str]:
    """What ranks that do not fit each other are told."""
    x = nn.functional.normalize(torch.randn(3, 4 + rank), dim=-1)
    label, scale = torch.zeros(3, dtype=torch.long), torch.tensor(14.0)
    told = []
    for arguments in (
        {"x": x, "y": x, "labels": label},  # another width
        {"x": x[:, :4], "y": x[: 3 - rank, :4], "labels": label},  # rows that do not fit, on one rank
        {"x": x[:, :4], "y": x[:, :4], "labels": label, "loss": "sum" if rank else "supcon"},
        {"x": x[:, :4].to(torch.float64 if rank else torch.float32), "y": x[:, :4], "labels": label},
        {"x": x[:, :4], "y": x[:, :4], "labels": label.int() if rank else label},
        {"x": x[0, 0] if rank else x[:, :4], "y": x[:, :4], "labels": label},
        {"x": x[:, :4], "y": x[:, :4], "labels": label, "gather": "all_reduce" if rank else "ring"},
    ):
        with pytest.raises(ValueError) as caught:
            contrastive_loss(scale=scale, **arguments)
        told.append(str(caught.value))
    out = contrastive_loss(x[:, :4], x[:, :4], scale, labels=label, tile=1 + rank)  # other tiles are no mistake
    assert out.loss.isfinite()
    for gather in ("all_gather", "ring"):  # nobody has a clip: no loss, and nobody waits
        none = torch.zeros(0, 4, requires_grad=True)
        out = contrastive_loss(none, none, scale, labels=label[:0], gather=gather)
        out.loss.backward()
        assert float(out.loss.detach()) == float(out.rows) == 0
    one_that_fails(rank, ranks, folder)
    return told


def one_that_fails(rank: int, ranks: int, folder: str) -> None:
    """A rank whose second chunk fails leaves at once: it does not wait for the others to reduce what it has."""
    engine = Wrapped("zero2", rank, ranks, folder).engine
    assert engine is not None
    x, y = inputs()
    if rank:
        with pytest.raises(MemoryError), engine.one_reduction():
            embedded = engine.forward({"x": x, "y": y})
            engine.backward(embedded.rows[0].sum())
            raise MemoryError
        assert all(parameter.grad is None for parameter in engine.module.parameters())
    torch.distributed.barrier()


def test_ranks_that_do_not_fit_each_other_are_told_so(tmp_path: Path) -> None:
    first, second = run(mistakes, 2, 2, str(tmp_path))
    assert "4 wide here and 5 on rank 1" in first[0] and "5 wide here and 4 on rank 0" in second[0]
    assert "rank 1 called" in first[1] and "3 rows, but 2 of another argument" in second[1]
    assert "another contrastive loss" in first[2] and "another contrastive loss" in second[2]
    assert "another contrastive loss" in first[3] and "float64" in second[3]
    for theirs, says in zip(second[4:], ("torch.int64", "shapes () and", "gather='all_reduce'"), strict=True):
        assert says in theirs
    assert all("rank 1 called the contrastive loss with tensors that do not fit" in mine for mine in first[4:])


# ---- bounds


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = LogitScale(3, start=50.0, highest=100.0)

    def forward(self, sign: Tensor) -> Tensor:
        return sign * self.scale()[0].sum() + 0 * self.linear.weight.sum()


def bounded(rank: int, ranks: int, folder: str) -> dict[str, list[float]]:
    """By engine: log-scales in the masters and the model's own, after steps up, and after steps down."""
    result = {}
    dtypes: tuple[cfg.Dtype, ...] = ("float32", "bfloat16")
    for stage, dtype in ((stage, dtype) for stage in (1, 2, 3) for dtype in dtypes):
        path = Path(folder) / f"{stage}-{rank}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        train = cfg.TrainConfig(global_batch=ranks, lr=1.0, grad_clip=0.0, warmup=0.0)
        config = cfg.Stage1(train=train, engine=cfg.EngineConfig(deepspeed=str(path), dtype=dtype))
        engine = Engine(Scaled(), config, World(rank, ranks), total=1000, device="cpu")
        parameter = dict(engine.module.named_parameters())["scale.log_scale"]
        found = []
        for sign in (-1.0, 1.0):
            for _ in range(4):
                engine.backward(engine.forward(torch.tensor(sign)))  # type: ignore[arg-type]
                engine.step()
            parts = [p for group in deepspeed_parts.trained(engine._engine) for p in group if "scale" in p.name]
            masters = [float(v) for p in parts if p.count for v in p.view(p.owner)]
            with zero.GatheredParameters([parameter], enabled=stage == 3):
                own = parameter.float().tolist()
            found += [max(masters, default=math.nan), max(own)]
        result[f"{stage} {dtype}"] = found
    return result


def test_the_scale_is_bounded_in_the_masters_too(tmp_path: Path) -> None:
    ranks = run(bounded, 2, 2, str(tmp_path))
    highest = math.log(100.0)
    for part in ranks:
        for engine, (master_up, own_up, master_down, own_down) in part.items():
            rounding = 0.02 if "bfloat16" in engine else 1e-6
            if not math.isnan(master_up):  # where this rank has a part of it
                assert master_up == pytest.approx(highest, abs=1e-6), engine
                assert master_down < highest - 0.1, f"{engine}: it comes back"
            assert highest - 0.5 < own_up <= highest + rounding and own_down < highest - 0.1, engine
    for engine in ranks[0]:
        assert any(not math.isnan(part[engine][0]) for part in ranks), f"{engine}: no rank has a master"


# ---- caching in bfloat16


ROUNDED = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}


def bfloat16_steps(rank: int, ranks: int, folder: str) -> dict[str, list[float]]:
    """By engine: the norm of the gradient of one step, in one chunk and in three."""
    result = {}
    for stage, more in ((stage, more) for stage in (1, 2, 3) for more in ({}, ROUNDED)):
        norms = []
        for count in (1, 3):
            path = Path(folder) / f"bf16-{rank}.json"
            path.write_text(json.dumps({"zero_optimization": {"stage": stage}, **more}))
            train = cfg.TrainConfig(global_batch=N, lr=1e-3, grad_clip=0.0, warmup=0.0)
            config = cfg.Stage1(train=train, engine=cfg.EngineConfig(deepspeed=str(path), dtype="bfloat16"))
            engine = Engine(Towers(), config, World(rank, ranks), total=1000, device="cpu")
            mine = torch.arange(N).chunk(ranks)[rank]
            x, y = (part.bfloat16() for part in inputs())
            chunks = [{"x": x[part], "y": y[part]} for part in mine.chunk(count)]
            loss = loss_of("supcon", {"label": LABEL[mine], "text": TEXT[mine], "source": SOURCE[mine]}, {})
            with engine.one_reduction():
                cached_backward(chunks, engine.forward, loss, backward=engine.backward, no_sync=engine.no_sync)
            engine.step()
            norms.append(engine.grad_norm)
        result[f"{stage} {more}"] = norms
    return result


class Plain(nn.Module):
    """Its gradient is the batch, exactly; one parameter has fewer elements than there are ranks, one an odd number."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.ones(n)) for n in (1, 7, 64)])
        self.computed: set[torch.dtype] = set()  # dtypes of what the model computes with

    def forward(self, batch: Tensor) -> Tensor:
        self.computed |= {part.dtype for part in self.parts}
        return torch.stack([(part * batch).float().sum() for part in self.parts]).sum()


SMALL = 2.0**-9  # 1 + this is 1 in bfloat16
GRADIENTS = [[1.0, SMALL], [SMALL, SMALL / 2]]  # of each rank's two micro-batches


def bfloat16_sums(rank: int, folder: str) -> dict[str, tuple[list[Tensor], set[torch.dtype]]]:
    """By engine: the gradients of one step, each parameter's whole; the dtypes of weights in the model and in AdamW."""
    from deepspeed.utils import safe_get_full_grad

    result = {}
    for stage, more in ((stage, more) for stage in (1, 2, 3) for more in ({}, ROUNDED)):
        path = Path(folder) / f"sums-{rank}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}, **more}))
        for cached in (True, False):
            train = cfg.TrainConfig(global_batch=4, micro_batch=1, grad_clip=0.0)
            parts: Any = {"train": train, "engine": cfg.EngineConfig(deepspeed=str(path), dtype="bfloat16")}
            config = cfg.Stage1(**parts) if cached else cfg.Stage2(**parts)
            model = Plain()
            engine = Engine(model, config, World(rank, 2), total=10, device="cpu")
            with engine.one_reduction() if cached else nullcontext():
                for turn, gradient in enumerate(GRADIENTS[rank]):
                    with engine.no_sync() if cached and turn == 0 else nullcontext():
                        loss = engine.forward(torch.tensor(gradient, dtype=torch.bfloat16))  # type: ignore[arg-type]
                        engine.backward(loss / 2 if cached else loss)
                    if not cached and turn == 0:
                        engine.step()
            found = [safe_get_full_grad(p).clone() for p in engine.module.parameters()]
            masters = {p.owner.dtype for group in deepspeed_parts.trained(engine._engine) for p in group}
            result[f"{stage} {'cached' if cached else 'accumulated'} {more}"] = found, model.computed | masters
            engine.step()
    return result


def in_bfloat16(rank: int, ranks: int, folder: str) -> tuple[Any, Any]:
    return bfloat16_steps(rank, ranks, folder), bfloat16_sums(rank, folder)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = run(in_bfloat16, 2, 2, str(tmp_path_factory.mktemp("bf16")))
    return found


def test_caching_counts_each_gradient_once_in_bfloat16_too(halves: list[tuple[Any, Any]]) -> None:
    """Also where gradients are not added up before they are reduced."""
    for engine, (whole, chunked) in halves[0][0].items():
        assert chunked == pytest.approx(whole, rel=0.02), engine  # bfloat16 has 8 bits; an error would be of 3 or 2


def test_gradients_in_bfloat16_are_reduced_and_added_up_in_float32(halves: list[tuple[Any, Any]]) -> None:
    mean = torch.tensor(GRADIENTS).mean()
    for _, sums in halves:
        for engine, (gradients, dtypes) in sums.items():
            assert dtypes == {torch.bfloat16, torch.float32}, "the model computes in the one, AdamW steps in the other"
            for gradient in gradients:
                rounded = ROUNDED["communication_data_type"] in engine  # what a file of one's own says holds
                assert (gradient != mean).all() if rounded else (gradient == mean).all(), f"{engine}: {gradient}"


# ---- the model of stage 1, whole steps


def small_aligner() -> Aligner:
    torch.manual_seed(0)
    speech = build_speech(
        cfg.EncoderConfig(
            arch={"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
        ),
        cfg.QFormerConfig(queries=2, layers=1, width=16, heads=2, dropout=0.0),
        Attention("sdpa", "test"),
    )
    model = Aligner(speech, D, cfg.ContrastiveConfig(width=8, beta=0.5, tile=4))
    with torch.no_grad():  # fresh weights give nearly equal embeddings, whose gradients drown in rounding
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


def aligner_batch(part: slice) -> dict[str, Tensor]:
    _, text = inputs()
    g = torch.Generator().manual_seed(9)
    mel = torch.randn(N, 80, 40, generator=g) + 3 * torch.randn(N, 80, 1, generator=g)  # each clip its own spectrum
    lengths = torch.arange(N) + 20
    return {name: value[part] for name, value in (("speech", mel), ("lengths", lengths), ("text", text))}


def contrast(model: Aligner, part: slice) -> Callable[[Embedded], tuple[Tensor, Any]]:
    ids = {"label": LABEL[part], "source": SOURCE[part], "caption": TEXT[part]}
    return lambda embedded: model.contrast(embedded, ids, 1.0, 0.5)


def run_config(ranks: int) -> cfg.Stage1:
    # Plain SGD would show the gradient better, but Adam's own division is what the projects' 1/W errors hide behind:
    # three steps with clipping and a schedule show them, for clipping does not forgive a wrong norm.
    return cfg.Stage1(train=cfg.TrainConfig(global_batch=N, lr=1e-2, grad_clip=0.5, weight_decay=0.1, steps=3))


def zero3_steps(rank: int, ranks: int, chunks: int) -> dict[str, Tensor]:
    """Three real ZeRO-3 steps; rank 0 returns the gathered weights, and the norm of the last gradient."""
    model = small_aligner()
    engine = Engine(model, run_config(ranks), World(rank, ranks), total=3, device="cpu")
    part = slice(rank * N // ranks, (rank + 1) * N // ranks)
    size = N // ranks // chunks
    batches = [aligner_batch(slice(start, start + size)) for start in range(part.start, part.stop, size)]
    for _ in range(3):
        with engine.one_reduction():
            cached_backward(
                batches, engine.forward, contrast(model, part), backward=engine.backward, no_sync=engine.no_sync
            )
        engine.step()
    return whole_state(engine) | {"norm": torch.tensor(engine.grad_norm)}


def both_ways(rank: int, ranks: int) -> list[dict[str, Tensor]]:
    return [zero3_steps(rank, ranks, 1), zero3_steps(rank, ranks, 3)]


def plain_steps() -> dict[str, Tensor]:
    """The same three steps in one process without DeepSpeed."""
    from mser_dist.training.engine import schedule
    from mser_dist.training.groups import parameter_groups

    model, train = small_aligner(), run_config(1).train
    optimizer = torch.optim.AdamW(parameter_groups(model, train), lr=train.lr, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(train, 3))
    norm = torch.zeros(())
    whole = slice(0, N)
    for _ in range(3):
        optimizer.zero_grad()
        loss, _ = contrast(model, whole)(model(aligner_batch(whole)))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
        scheduler.step()
    return {name: value.detach() for name, value in model.state_dict().items()} | {"norm": norm}


def test_zero3_on_two_ranks_takes_the_steps_of_one_process() -> None:
    expected = plain_steps()
    for found in run(both_ways, 2, 2)[0]:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name.endswith("key.bias"):
                continue  # softmax ignores a shift of the keys: its gradient is rounding alone, which Adam scales up
            error = (found[name] - value).norm() / value.norm().clamp(min=1e-12)
            assert error < RELATIVE, f"{name} is off by {error:.1e}"
