"""What a GPU could do by its name, the times of a step, and which steps are traced."""

import json
import time
from pathlib import Path

import pytest
import torch

from mser_dist import config as cfg
from mser_dist.config.file import load_training
from mser_dist.config.validate import check_values
from mser_dist.errors import UserError
from mser_dist.training.peaks import peak, peak_of
from mser_dist.training.timing import Timer, Trace


@pytest.mark.parametrize(
    "name, dtype, tflops",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H200", "float16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA A10G", "bfloat16", 70),
        ("NVIDIA L40S", "bfloat16", 362.1),
        ("NVIDIA L4", "bfloat16", 121),
        ("Tesla V100-SXM2-32GB", "float16", 125),
        ("Tesla V100-PCIE-16GB", "float16", 112),
        ("Tesla V100-SXM2-32GB", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("AMD Instinct MI250X", "bfloat16", 191.5),
        ("AMD Instinct MI300X", "float32", 163.4),
        ("NVIDIA A100 80GB PCIe MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA GeForce GTX 1080", "float32", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, dtype: str, tflops: float | None) -> None:
    assert peak_of(name, dtype) == (tflops and pytest.approx(tflops * 1e12))


def test_tf32_the_key_and_a_cpu() -> None:
    assert peak_of("NVIDIA A100-SXM4-80GB", "float32", tf32=True) == 156e12
    assert peak_of("Tesla V100-SXM2-32GB", "float32", tf32=True) == 15.7e12, "it has none"
    assert peak("cpu", "float32", None) is None and peak("cpu", "float32", 2.5) == 2.5e12


def test_a_timer_adds_up_its_parts_and_begins_anew() -> None:
    timer = Timer(cuda=False)
    for _ in range(2):
        with timer.part("forward"):
            time.sleep(0.01)
    with timer.part("step"):
        pass
    found = timer.read()
    assert found["forward"] >= 0.02 > found["step"] >= 0 and timer.read() == {}


def test_the_steps_that_are_asked_for_are_traced(tmp_path: Path) -> None:
    timer, none, trace = Timer(cuda=False), Trace([], tmp_path), Trace([2, 9], tmp_path / "profile")
    for step in range(1, 4):
        for each in (none, trace):
            each.before(step)
        with timer.part(f"forward {step}"):
            torch.ones(4, 4) @ torch.ones(4, 4)
        for each in (none, trace):
            each.after(step)
    trace.write(3)  # the run is stopped before step 9
    [path] = [found for found in tmp_path.rglob("*") if found.is_file()]
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert path == tmp_path / "profile/steps_2-3.json"
    assert {"mser forward 2", "mser forward 3"} <= names and "mser forward 1" not in names


def test_steps_to_trace_are_written_in_several_ways(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("stage: 1\ndata: {sets: [shards]}\n")
    for word, steps in {"10-12": [10, 12], "[10,12]": [10, 12], "7": [7, 7], "[]": []}.items():
        assert load_training(str(file), [f"train.profile_steps={word}"]).train.profile_steps == steps
    for word in ("12-10", "a", "[1,2,3]", "0-3"):
        with pytest.raises(UserError, match=r"train\.profile_steps"):
            load_training(str(file), [f"train.profile_steps={word}"])
    config = cfg.TrainConfig(profile_steps=[1, 2])
    check_values(config)
    assert config.profile_steps == [1, 2]
