"""The exponential average of the weights: what it is, that it is kept, and that it leaves the training as it was."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mser_dist import config as cfg
from mser_dist.ranks import distributed
from mser_dist.ranks.distributed import World
from mser_dist.state import engine_state
from mser_dist.training.engine import Engine
from tests.distributed.spawn import run, whole_state

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.two(torch.tanh(self.one(batch["x"]))).float().square().mean()


def made(stage: str, ranks: int, dtype: cfg.Dtype, total: int = 4) -> Engine:
    train = cfg.TrainConfig(global_batch=4, lr=0.1, ema=0.6, schedule="constant")
    config = cfg.Stage1(train=train, engine=cfg.EngineConfig(deepspeed=stage, dtype=dtype))
    return Engine(Model(), config, World(distributed.discover().rank, ranks), total, "cpu")


def steps(engine: Engine, numbers: range) -> list[dict[str, Tensor]]:
    """The whole weights behind each step, on rank 0."""
    found = []
    for number in numbers:
        x = torch.randn(2, 5, generator=torch.Generator().manual_seed(number))
        engine.backward(engine.forward({"x": x.to(next(engine.module.parameters()).dtype)}))
        engine.step()
        found.append(whole_state(engine))
    return found


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def check(rank: int, ranks: int, folder: str) -> list[bool]:
    holds = []
    cases: list[tuple[str, cfg.Dtype]] = [("cpu", "float32"), ("zero2", "float32"), ("cpu", "bfloat16")]
    for stage, dtype in cases:
        engine = made(stage, ranks, dtype)
        weights = steps(engine, range(3))
        with engine.averaged():
            average = whole_state(engine)
        holds.append(same(whole_state(engine), weights[-1]))  # and back again
        if rank == 0 and dtype == "float32":
            for name, found in average.items():
                expected = weights[0][name]
                for done, state in enumerate(weights[1:], 2):
                    keep = min(0.6, done / (done + 9))
                    expected = keep * expected + (1 - keep) * state[name]
                torch.testing.assert_close(found, expected)
        # From a checkpoint it goes on as if it had never stopped, averages and weights.
        place = Path(folder) / f"{stage}-{dtype}"
        place.mkdir(exist_ok=True)
        tensors, description = engine.collect()
        engine_state.write(
            place / f"rank-{rank:05d}.safetensors", {n: t.clone() for n, t in tensors.items()}, description
        )
        distributed.barrier()
        again = made(stage, ranks, dtype)
        again.restore(place)
        holds.append(same(steps(engine, range(3, 5))[-1], steps(again, range(3, 5))[-1]))
        engine.use_average()
        again.use_average()
        holds.append(same(whole_state(engine), whole_state(again)))
    return holds


def test_the_average_is_right_kept_and_leaves_no_trace(tmp_path: Path) -> None:
    for holds in run(check, 2, 2, str(tmp_path)):
        assert holds == [True] * 9
