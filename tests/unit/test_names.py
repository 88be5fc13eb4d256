"""Names of metrics and parameters: what MLflow takes and its plots can read, and no two for one."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name, _validate_param_name

from mser_dist import config as cfg
from mser_dist.config.file import PRESETS, flatten, load_any
from mser_dist.runs.names import LENGTH, plain
from mser_dist.runs.tracking import tracked

PART = st.text(max_size=12) | st.sampled_from(["a-b", "a_b", "A_B", "a/b", "..", ".", "", "é", "e\u0301", "x" * 300])


@given(st.lists(st.tuples(PART, PART), unique=True) | st.lists(PART, unique=True))
def test_mlflow_takes_every_name_and_no_two_are_one(names: list[str | tuple[str, ...]]) -> None:
    shown = plain(names)
    assert len({name.casefold() for name in shown}) == len(names)
    for name in shown:
        _validate_metric_name(name)
        _validate_param_name(name)
        assert "-" not in name and len(name) <= LENGTH <= MAX_ENTITY_KEY_LENGTH
    assert plain(shown) == shown


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("train/loss", "train/loss"),
        (("ua", "stage1", "m5ser-espeak", "zh-CN"), "ua/stage1/m5ser_espeak/zh_CN"),
        (("ua", "stage1", "Дуся", "ru"), "ua/stage1/Дуся/ru"),
        (("ua", "stage1", "a/b", ".."), "ua/stage1/a_b/_"),
        ("/a//b/", "_/a/_/b/_"),
    ],
)
def test_a_name_stays_what_it_can(name: str | tuple[str, ...], shown: str) -> None:
    assert plain([name]) == [shown]


def test_only_those_that_would_be_one_are_told_apart() -> None:
    one, two, third = plain(["a-b", "a_b", "c-d"])
    assert one != two and one.startswith("a_b_") and two.startswith("a_b_") and third == "c_d"
    assert plain(["c-d", "a_b", "a-b"]) == [third, two, one], "the order does not matter"


def test_the_log_and_the_params_have_plain_names(tmp_path: Path) -> None:
    with tracked(cfg.TrackingConfig(enabled=False), tmp_path, {}, {"data.keep.m5ser-espeak": "zh-CN"}, True) as tracker:
        assert tracker is not None
        tracker.metrics(0, {("ua", "Дуся", "ru"): 0.5, ("ua", "Реса", "ru"): 0.25, ("ua", "a-b", "zh-CN"): 0.125})
    (line,) = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line).items() >= {"ua/Дуся/ru": 0.5, "ua/Реса/ru": 0.25, "ua/a_b/zh_CN": 0.125}.items()
    record = json.loads((tmp_path / "mlflow.json").read_text(encoding="utf-8"))
    assert record["params"] == {"data.keep.m5ser_espeak": "zh-CN"}


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_a_configs_keys_are_plain_names_as_they_are(preset: str) -> None:
    words = ["stage1=x"] if "stage2" in preset else []
    names = list(flatten(load_any(preset, words)))
    assert plain(names) == names
