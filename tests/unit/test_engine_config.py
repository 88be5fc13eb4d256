import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.training.engine import find_json, resolve_json, schedule

DS_CONFIGS = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


def run_config(deepspeed: str, dtype: cfg.Dtype = "float32", **train: Any) -> cfg.Stage2:
    values = {"global_batch": 48, "micro_batch": 8, "grad_clip": 0.5}
    return cfg.Stage2(
        train=cfg.TrainConfig(**(values | train)), engine=cfg.EngineConfig(deepspeed=deepspeed, dtype=dtype)
    )


def written(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "ds.json"
    if isinstance(content, dict):
        content = {"zero_optimization": {"stage": 3}, **content}
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_work_with_a_fitting_config(path: Path) -> None:
    plain = json.loads(path.read_text())
    dtypes: list[cfg.Dtype] = ["float32", "bfloat16", "float16"]
    if plain.get("bf16", {}).get("enabled"):
        dtypes = ["bfloat16"]
    world = plain["zero_optimization"].get("zero_hpz_partition_size", 2)
    for dtype in dtypes:
        resolved = resolve_json(run_config(path.stem, dtype, global_batch=24 * world), world)
        assert resolved["train_batch_size"] == 24 * world
        assert resolved["train_micro_batch_size_per_gpu"] == 8
        assert resolved["gradient_accumulation_steps"] == 3
        assert resolved["gradient_clipping"] == 0.5
        assert (resolved["bf16"]["enabled"], resolved["fp16"]["enabled"]) == (dtype == "bfloat16", dtype == "float16")
        assert resolved["zero_optimization"] == plain["zero_optimization"], "the rest of the file stands as it is"
    assert json.loads(path.read_text()) == plain


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_are_valid_deepspeed(path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = json.loads(path.read_text())["zero_optimization"]
    assert zero.keys() <= {name for f, i in DeepSpeedZeroConfig.model_fields.items() for name in (f, i.alias)}
    assert DeepSpeedZeroConfig(**zero).stage == zero["stage"]


def test_there_are_shipped_files() -> None:
    assert {"cpu", "zero2", "zero2_bf16", "zero3_bf16", "zero3_hpz8", "zero3_offload"} == {
        path.stem for path in DS_CONFIGS
    }


def test_a_second_copy_of_the_weights_is_of_whole_nodes() -> None:
    with pytest.raises(UserError, match=r"zero_hpz_partition_size=8 does not divide the 12 ranks"):
        resolve_json(run_config("zero3_hpz8", "bfloat16", global_batch=96), world_size=12)


def test_files_are_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_json("cpu") == find_json("cpu.json") == DS_CONFIGS[0]
    mine = written(tmp_path, {})
    assert find_json(mine) == Path(mine)
    monkeypatch.chdir(tmp_path)
    assert find_json("ds.json") == Path("ds.json")
    with pytest.raises(
        UserError,
        match=r"engine\.deepspeed=zero4: no such file.*cpu, zero2, zero2_bf16, zero3_bf16, zero3_hpz8, zero3_offload",
    ):
        find_json("zero4")


FITTING = {
    "train_batch_size": 48,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.5,
    "bf16": {"enabled": "auto"},
}


def test_the_same_said_twice_or_auto_is_no_contradiction(tmp_path: Path) -> None:
    resolved = resolve_json(run_config(written(tmp_path, FITTING)), 2)
    assert resolved["gradient_accumulation_steps"] == 3
    assert resolved["bf16"] == {"enabled": False}


def test_bfloat16_reduces_and_adds_up_gradients_in_float32_unless_a_file_says_otherwise(tmp_path: Path) -> None:
    assert not {"communication_data_type", "data_types"} & resolve_json(run_config("zero2"), 2).keys()
    for path in DS_CONFIGS:
        resolved = resolve_json(run_config(path.stem, "bfloat16", global_batch=192), 8)
        assert resolved["communication_data_type"] == resolved["data_types"]["grad_accum_dtype"] == "fp32"
    own = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}
    assert own.items() <= resolve_json(run_config(written(tmp_path, own), "bfloat16"), 2).items()


@pytest.mark.parametrize(
    ("content", "dtype", "says"),
    [
        (
            {"train_batch_size": 64},
            "float32",
            "train_batch_size=64 contradicts train.global_batch=48: remove train_batch",
        ),
        ({"train_micro_batch_size_per_gpu": 4}, "float32", "contradicts train.micro_batch=8"),
        ({"gradient_accumulation_steps": 1}, "float32", "gradient_accumulation_steps=1 contradicts .*=3"),
        ({"gradient_clipping": 1.0}, "float32", r"gradient_clipping=1\.0 contradicts train\.grad_clip=0\.5"),
        (
            {"bf16": {"enabled": True}},
            "float32",
            "bf16.enabled=true contradicts .*: set engine.dtype=bfloat16 or remove",
        ),
        (
            {"bf16": {"enabled": False}},
            "bfloat16",
            "bf16.enabled=false contradicts .*: change engine.dtype or remove bf16",
        ),
        ({"fp16": {"enabled": True}}, "bfloat16", "fp16.enabled=true contradicts engine.dtype=bfloat16"),
        ({"optimizer": {"type": "Adam"}}, "float32", r"remove the section 'optimizer'.*train\.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, "float32", r"remove the section 'scheduler'.*train\.warmup"),
        ({"bf16": True}, "bfloat16", "is a JSON object whose"),
        ({"data_types": "fp32"}, "bfloat16", "is a JSON object whose"),
        ([1], "float32", "is a JSON object"),
        ("{", "float32", "not valid JSON"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, content: Any, dtype: cfg.Dtype, says: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=says) as caught:
        resolve_json(run_config(path, dtype), 2)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_stage_1_caches_gradients_and_deepspeed_accumulates_none() -> None:
    config = cfg.Stage1(train=cfg.TrainConfig(global_batch=48, micro_batch=8), engine=cfg.EngineConfig(deepspeed="cpu"))
    resolved = resolve_json(config, 2)
    assert (resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"]) == (24, 1)


def test_a_world_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.global_batch=48 does not divide by the world size 5"):
        resolve_json(run_config("cpu"), 5)


# ---- schedule


@pytest.mark.parametrize("name", get_args(cfg.Schedule))
@given(
    total=st.integers(1, 500),
    warmup=st.floats(0, 1, allow_subnormal=False),
    decay=st.floats(0, 1, allow_subnormal=False),
    floor=st.floats(0, 1, allow_subnormal=False),
)
def test_a_schedule_rises_then_falls_to_its_floor(
    name: cfg.Schedule, total: int, warmup: float, decay: float, floor: float
) -> None:
    share = schedule(cfg.TrainConfig(schedule=name, warmup=warmup, decay=decay, min_lr=floor), total)
    values = [share(step) for step in range(total + 1)]
    warm = max(1, round(warmup * total))
    assert all(0 < value <= 1 for value in values[:-1]), "no step is taken with a learning rate of 0"
    assert values[:warm] == sorted(values[:warm])
    assert values[warm - 1] == 1
    assert all(a >= b - 1e-12 for a, b in zip(values[warm:], values[warm + 1 :], strict=False))
    end = 1.0 if name == "constant" else floor
    if warm < total:
        assert values[-1] == pytest.approx(end)
    assert share(total + 50) == pytest.approx(end), "a step too many does not let it rise again"


def test_the_schedules_by_hand() -> None:
    def at(name: cfg.Schedule, *steps: int) -> list[float]:
        share = schedule(cfg.TrainConfig(schedule=name, warmup=0.1, min_lr=0.2, decay=0.2), 99)
        return [share(step) for step in steps]

    for name in ("cosine", "linear", "constant"):
        assert at(name, 0, 4, 9) == pytest.approx([0.1, 0.5, 1.0]), name
    assert at("wsd", 0, 4, 9) == pytest.approx([0.2 + 0.8 * 0.1, 0.2 + 0.8 * 0.5, 1.0]), "it rises from the floor"
    half, third = 0.2 + 0.8 * 0.5, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 3))
    assert at("cosine", 54, 39, 99) == pytest.approx([half, third, 0.2])
    assert at("linear", 54, 39, 99) == pytest.approx([half, 0.2 + 0.8 * 2 / 3, 0.2])
    assert at("wsd", 78, 79, 89, 99) == pytest.approx([1.0, 1.0, half, 0.2])
    assert at("constant", 54, 99) == [1.0, 1.0]
