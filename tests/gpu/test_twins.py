"""The GPU suite without a GPU: what its checks compute, what judges them, and what runs them."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mser_dist.contrastive import exchange
from tests.distributed.spawn import run as on_ranks
from tests.gpu import broken, faults, gradients, kernels, registry, runner, speed, trainings
from tests.gpu.registry import Check, Machine, Result

CPU = Machine.of("cpu")
H100 = Machine("cuda", 1, "NVIDIA H100 80GB HBM3", (9, 0), 79.1)
ROOT = Path(__file__).parents[2]


# ---- what a check needs


def test_without_a_gpu_each_check_says_so(tmp_path: Path) -> None:
    reasons = {check.missing(Machine("cuda", 0, "cpu", (0, 0), 0.0), tmp_path) for check in registry.checks().values()}
    assert len(reasons) == 1 and reasons.pop().startswith("no GPU")


def test_a_check_says_what_it_lacks(tmp_path: Path) -> None:
    checks = registry.checks()
    assert checks["killed rank"].missing(H100, tmp_path) == "needs 2 GPUs, there is 1"
    small = Machine("cuda", 2, "T4", (7, 5), 15.0)
    assert checks["killed rank"].missing(small, tmp_path) == ""
    assert checks["stage 2 1B"].missing(small, tmp_path) == "needs 38 GiB of GPU memory, there are 15"
    flash = [name for name in checks if "flash" in name]
    assert len(flash) == 4
    for name in flash:
        module = checks[name].module
        assert checks[name].missing(H100, tmp_path) in ("", f"{module} is not installed")
    here = Check("x", "", dict, faults.judge_workers, cpu=False, module="torch", capability=(9, 0), only_major=True)  # type: ignore[arg-type]
    assert here.missing(small, tmp_path) == "needs compute capability 9.x, this GPU has 7.5"
    blackwell = Machine("cuda", 1, "B200", (10, 0), 178.0)
    assert here.missing(blackwell, tmp_path) == "needs compute capability 9.x, this GPU has 10.0"
    assert here.missing(H100, tmp_path) == ""
    assert "B of disk" in Check("x", "", dict, faults.judge_workers, cpu=False, disk=1e9).missing(H100, tmp_path)  # type: ignore[arg-type]


def test_what_the_suite_leaves_to_other_tests_is_there(tmp_path: Path) -> None:
    for check in registry.checks().values():
        assert check.cpu or check.tests, f"{check.name}: nothing of it is ever run on a CPU"
        for file in filter(None, check.tests.split(", ")):
            assert (ROOT / file).is_file(), f"{check.name} names {file}"
    own = [check.name for check in registry.checks().values() if not check.tests]
    assert own == ["contrastive gradients", "attention sdpa"], "these have their twins below"


# ---- what runs them


def row(name: str, folder: Path, seconds: float | None = None) -> dict[str, Any]:
    [check] = [check for check in broken.CHECKS if check.name == name]
    return runner.run(check, CPU, folder, seconds)


@pytest.mark.distributed
def test_a_check_that_breaks_stops_no_other(tmp_path: Path, no_child_left: None) -> None:
    found = row("crashes", tmp_path)
    assert (found["status"], found["value"]) == ("FAILED", None)
    assert found["line"] == "rank 0 ended with exit code 1: ValueError: what broke"
    assert row("dies", tmp_path)["line"].startswith("rank 0 was ended by SIGKILL")
    assert row("cannot", tmp_path)["status"] == "skipped"
    began = time.monotonic()
    found = row("hangs", tmp_path)
    assert found["status"] == "FAILED" and "was not done after 15 s" in found["line"] and time.monotonic() - began < 40
    assert "broken.py" in found["line"] and "in hangs" in found["line"], "it says where it stood"
    child = int((tmp_path / "child").read_text())
    with suppress(psutil.NoSuchProcess):
        for _ in range(100):  # it is signalled, and ends a moment later
            if psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.1)
        else:
            pytest.fail("what a check started outlives it")
    works = row("works", tmp_path)
    assert (works["status"], works["value"], works["line"]) == ("ok", 2, "both were there")
    late = [row("works", tmp_path, seconds) for seconds in (0.0, 0.1)]
    assert [one["status"] for one in late] == ["skipped"] * 2 and all(
        "time of all checks" in one["line"] for one in late
    )


# ---- what they compute


def contrasted(rank: int, folder: str) -> Result:
    return gradients.contrastive("cpu", Path(folder))


@pytest.mark.distributed
def test_nccls_branches_over_gloo(tmp_path: Path) -> None:
    """With a refusal of what NCCL refuses; the gradients are gloo's, and those of one process in double precision."""
    results = on_ranks(contrasted, 2, str(tmp_path))
    found = gradients.judge_contrastive(results)
    assert found.ok, found.line
    assert {"all_gather", "reduce_scatter", "all_reduce", "P2POp"} <= results[0]["seen"].keys()
    assert not gradients.judge_contrastive([results[0], results[1] | {"double": 1e-3}]).ok


def test_what_nccl_refuses_is_refused() -> None:
    seen: dict[str, int] = {}
    with gradients.as_nccl(seen), pytest.raises(AssertionError, match=r"all_reduce of a tensor .* strides \(1, 3\)"):
        exchange.dist.all_reduce(torch.ones(2, 3).T)
    assert exchange.dist is torch.distributed and seen == {"all_reduce": 1}


def test_sdpa_against_attention_written_out(tmp_path: Path) -> None:
    result = kernels.compare("sdpa", "cpu", tmp_path)
    found = kernels.judge([result])
    assert found.ok, found.line
    assert len(result["apart"]) == 1 + 2 * 3
    result["apart"]["encoder bfloat16"][0] *= 20  # a kernel that is wrong
    assert not kernels.judge([result]).ok


# ---- what judges them


def test_formats_that_differ_by_more_than_rounding_fail() -> None:
    good = {f"{dtype} stage {n}": [4.0, 3.9] for dtype in ("float32", "bfloat16", "float16") for n in (1, 2)}
    good["bfloat16 stage 1"] = [4.0 + 4 * 15 * 2**-7, 3.0]
    assert trainings.judge_formats([{"losses": good, "ranks": 1}]).ok
    off = {**good, "float16 stage 1": [4.0 + 4 * 17 * 2**-10, 3.9]}
    assert "wrong: float16 stage 1" in trainings.judge_formats([{"losses": off, "ranks": 1}]).line
    flat = {**good, "float16 stage 2": [4.0, float("nan")]}
    found = trainings.judge_formats([{"losses": flat, "ranks": 1}])
    assert not found.ok and "float16 stage 2 does not learn" in found.line


def test_stages_that_part_fail() -> None:
    losses = {"ZeRO-1": [4.0, 3.0], "ZeRO-2": [4.0, 3.0], "ZeRO-3": [4.0, 3.0 * (1 + 1e-3)]}
    assert not trainings.judge_zero([{"losses": losses, "ranks": 2}]).ok
    half = {"zero2_bf16": [4.0, 3.0], "zero3_offload": [4.0, 3.0 * (1 + 2**-6)]}
    assert not trainings.judge_shipped([{"losses": half, "ranks": 1}]).ok
    assert trainings.judge_shipped([{"losses": half | {"zero3_offload": [4.0, 3.01]}, "ranks": 1}]).ok


def test_a_resume_that_differs_says_whether_a_repeat_does() -> None:
    losses = {"once": {"1": 4.0, "2": 3.0, "3": 2.0, "4": 1.0}, "resumed": {"3": 2.0, "4": 1.0}}
    same: Result = {"losses": losses, "differs": {"twice": [], "resumed": []}, "tensors": 9, "missing": "", "ranks": 1}
    assert trainings.judge_resume([same]).ok
    both = same | {"differs": {"twice": ["rank a"], "resumed": ["rank a"]}, "missing": "cumsum_cuda"}
    found = trainings.judge_resume([both])
    assert not found.ok and "neither is a second run" in found.line and "cumsum_cuda" in found.line
    late = same | {"losses": losses | {"resumed": {"3": 2.5, "4": 1.0}}}
    assert not trainings.judge_resume([late]).ok
    anew = same | {"losses": losses | {"resumed": losses["once"]}}
    assert not trainings.judge_resume([anew]).ok, "it began anew: nothing was resumed"


def test_memory_far_from_the_plan_fails() -> None:
    found: Result = {"peak_memory_gib": 10.0, "planned_gib": 9.0, "ranks": 1, "device": "cuda", "mfu": 0.4}
    found |= {"tflops": 100.0, "tokens_per_second": 5.0, "time_data": 0.001}
    near = speed.judge([found])
    assert near.ok and "MFU 40.0 %" in near.line and "planned 9.00 (+11 %)" in near.line
    assert not speed.judge([found | {"planned_gib": 7.0}]).ok and not speed.judge([found | {"planned_gib": 14.0}]).ok


def test_ranks_that_outlive_a_killed_one_fail() -> None:
    found: Result = {"codes": [70, -9], "seconds": 12.0, "said": ["rank 1 on h: no sign of life"], "peer_seconds": 10.0}
    assert faults.judge_killed([found]).ok
    assert not faults.judge_killed([found | {"said": []}]).ok
    assert not faults.judge_killed([found | {"codes": [0, -9]}]).ok
    assert not faults.judge_killed([found | {"codes": [-9, -9]}]).ok


def test_a_demo_at_chance_fails() -> None:
    found: Result = {"ua": [0.8, 0.7], "chance": 1 / 6, "seconds": 100.0, "by_step": {"stage1": 50.0}, "ranks": 1}
    assert speed.judge_demo([found]).ok and not speed.judge_demo([found | {"ua": [0.2, 0.3]}]).ok
