"""Whole trainings, tiny ones: number formats, ZeRO stages and offload against each other, and a resume bit for bit."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mser_dist.config.file import load_training
from mser_dist.errors import UserError
from mser_dist.ranks import distributed
from mser_dist.synth.write import write_set
from mser_dist.training.loop import train
from tests.gpu.registry import Check, Outcome, Result
from tests.tiny_runs import SMALL_SET, losses, stage1, stage2

PLAIN = ["tracking.enabled=false", "data.workers=1"]
BLIND = ["data.val_split=null", "train.val_every=0"]  # without a validation


def prepared(folder: Path) -> int:
    """In a folder with a small set in ``shards``, as all checks of a run share it. Collective; returns the ranks."""
    os.chdir(folder)
    if distributed.discover().is_main and not Path("shards/dataset.json").exists():
        write_set(folder / "shards", SMALL_SET)
    distributed.barrier()
    return distributed.discover().world_size


def trained(words: list[str], *more: str) -> dict[int, float]:
    """Train a run of `tiny_runs` on all ranks, and its losses by step. Collective."""
    _, preset, *rest = words
    train(load_training(preset, [*rest, *PLAIN, *more]))
    distributed.barrier()  # rank 0 writes the log
    # Each training has a store of its own, as with `mser_dist.train`: in one that another has used, ranks would read
    # what it decided. What serves that one goes on, for the process group is of it.
    distributed._store = None
    [out] = [word.partition("=")[2] for word in rest if word.startswith("out=")]
    return losses(Path(out))


def whole_stage1(ranks: int) -> None:
    """A stage 1 in ``runs/whole``, once for all checks. Collective."""
    trained(stage1("runs/whole", f"train.global_batch={8 * ranks}", "train.steps=2", *BLIND))


def deepspeed_json(name: str, **zero: Any) -> str:
    """Write a DeepSpeed JSON; its path."""
    path = Path(f"{name}.json").absolute()
    if distributed.discover().is_main:
        path.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    distributed.barrier()
    return str(path)


# ---- number formats


def formats(device: str, folder: Path) -> Result:
    """The losses of both stages by number format."""
    ranks = prepared(folder)
    dtypes = ("float32", "bfloat16", "float16") if device == "cuda" else ("float32", "bfloat16")
    found: dict[str, dict[int, float]] = {}
    for dtype in dtypes:
        batch, more = f"train.global_batch={8 * ranks}", [f"engine.dtype={dtype}", *BLIND]
        first = trained(stage1(f"runs/{dtype}-1", batch, *more, "train.steps=12"))
        rest = [f"stage1=runs/{dtype}-1", "llm.packing=rows", "train.steps=6"]
        found |= {
            f"{dtype} stage 1": first,
            f"{dtype} stage 2": trained(stage2(f"runs/{dtype}-2", batch, *more, *rest)),
        }
    return {"losses": {name: list(each.values()) for name, each in found.items()}, "ranks": ranks}


ROUNDINGS = 16  # in a row, of a pass through these networks of one or two layers: what they come to at worst adds up


def judge_formats(results: list[Result]) -> Outcome:
    """Of stage 1, whose weights are drawn alike, the first loss is float32's to so many roundings; both learn."""
    found = results[0]["losses"]
    exact = found["float32 stage 1"][0]
    apart, wrong = {}, []
    for name, each in found.items():
        dtype, stage = name.split(" ", 1)
        eps = float(torch.finfo(getattr(torch, dtype)).eps)
        if stage == "stage 1":
            apart[dtype] = abs(each[0] - exact) / exact
            wrong += [name] if not apart[dtype] <= ROUNDINGS * eps else []
        wrong += [f"{name} does not learn"] if not min(each) < each[0] else []
    said = ", ".join(f"{dtype} {value:.1e}" for dtype, value in apart.items() if dtype != "float32")
    line = f"{results[0]['ranks']} ranks: both stages train; first loss from float32's: {said}"
    return Outcome(not wrong, apart, line + (f"; wrong: {', '.join(wrong)}" if wrong else ""))


# ---- ZeRO


def zero(device: str, folder: Path) -> Result:
    """Losses of a stage 2 in float32 by ZeRO stage, and with a second copy of the weights in the node (hpZ)."""
    ranks = prepared(folder)
    whole_stage1(ranks)
    overlap = {"overlap_comm": device == "cuda"}
    configs = {f"ZeRO-{stage}": {"stage": stage, **overlap} for stage in (1, 2, 3)}
    small = {"stage3_param_persistence_threshold": 0}  # else these weights are too few to be cut
    configs["ZeRO-3"] |= small
    if ranks > 1 and ranks % 2 == 0:
        configs["hpZ"] = {"stage": 3, "zero_hpz_partition_size": 2, **overlap, **small}
    words = [f"train.global_batch={8 * ranks}", "train.steps=4", *BLIND]
    found = {
        name: trained(stage2(f"runs/{name}", *words, f"engine.deepspeed={deepspeed_json(name, **each)}"))
        for name, each in configs.items()
    }
    return {"losses": {name: list(each.values()) for name, each in found.items()}, "ranks": ranks}


# Of float32's 2⁻²⁴: sums of a thousand elements in another order differ by about its square root of them, and four
# steps of Adam carry that on.
SAME = 2.0**-24 * 32 * 4 * 8


def _apart(losses: dict[str, list[float]], exact: str) -> dict[str, float]:
    pairs = {name: zip(each, losses[exact], strict=True) for name, each in losses.items() if name != exact}
    return {name: max(abs(a - b) / abs(b) for a, b in each) for name, each in pairs.items()}


def judge_zero(results: list[Result]) -> Outcome:
    apart = _apart(results[0]["losses"], "ZeRO-1")
    said = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
    line = f"{results[0]['ranks']} ranks, four steps in float32: losses from ZeRO-1's by {said}"
    return Outcome(max(apart.values()) < SAME, apart, line)


SHIPPED = ("zero2_bf16", "zero3_bf16", "zero3_hpz8")
OFFLOAD = ("zero3_bf16", "zero3_offload")


def shipped(names: tuple[str, ...], device: str, folder: Path) -> Result:
    """Losses of a stage 2 in bfloat16 by DeepSpeed JSONs that come with the package."""
    ranks = prepared(folder)
    whole_stage1(ranks)
    words = [f"train.global_batch={8 * ranks}", "train.steps=4", "engine.dtype=bfloat16", *BLIND]
    fit = [name for name in names if ranks == 8 or "hpz8" not in name]
    found = {name: trained(stage2(f"runs/{name}", *words, f"engine.deepspeed={name}")) for name in fit}
    return {"losses": {name: list(each.values()) for name, each in found.items()}, "ranks": ranks}


def judge_shipped(results: list[Result]) -> Outcome:
    """Weights are float32 masters everywhere, and what differs is a weight that rounds the other way: one rounding."""
    first = next(iter(results[0]["losses"]))
    apart = _apart(results[0]["losses"], first)
    said = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
    line = f"{results[0]['ranks']} ranks, four steps in bfloat16: losses from {first}'s by {said}"
    return Outcome(max(apart.values()) <= torch.finfo(torch.bfloat16).eps, apart, line)


# ---- resume


def resume(device: str, folder: Path) -> Result:
    """Four steps of a stage 2 twice, and from the checkpoint behind the second step on; with deterministic kernels.

    Where torch has none for an operation, with those that it has: then it says which, and goes on.
    """
    os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
    ranks, missing = prepared(folder), ""
    whole_stage1(ranks)
    try:
        torch.use_deterministic_algorithms(True)
        runs = _three_runs(ranks, "runs/strict")
    except (
        RuntimeError,
        UserError,
    ) as error:  # of a step, or of the self-check; on all ranks, as they compute the same
        if "deterministic" not in str(error):
            raise
        missing = " ".join(str(error).split(" does not have")[0].split())[-80:]
        torch.use_deterministic_algorithms(True, warn_only=True)
        runs = _three_runs(ranks, "runs/lenient")
    finally:
        torch.use_deterministic_algorithms(False)
    rank = dist.get_rank()
    state = {name: _state(out / "checkpoints/step-000004", rank) for name, out in runs.items()}
    differs = {
        name: [key for key, value in state["once"].items() if not torch.equal(value, state[name][key])]
        for name in ("twice", "resumed")
    }
    found = {name: losses(out) for name, out in runs.items()}
    return {"losses": found, "differs": differs, "tensors": len(state["once"]), "missing": missing, "ranks": ranks}


def _three_runs(ranks: int, under: str) -> dict[str, Path]:
    """Their folders by name. Collective."""
    words = [f"train.global_batch={8 * ranks}", "train.steps=4", "train.save_every=2", "train.keep=9", *BLIND]
    words += ["engine.dtype=bfloat16"]
    out = {name: Path(under, name) for name in ("once", "twice", "resumed")}
    for name in ("once", "twice"):
        trained(stage2(str(out[name]), *words))
    if distributed.discover().is_main:
        kept = "checkpoints/step-000002"
        shutil.copytree(out["once"] / kept, out["resumed"] / kept)
        for owned in (out["resumed"], out["resumed"] / "checkpoints"):
            owned.chmod(0o700)  # what others could write is not trusted
        shutil.copy(out["once"] / "prompt.json", out["resumed"])
    distributed.barrier()
    trained(stage2(str(out["resumed"]), *words))
    return out


def _state(checkpoint: Path, rank: int) -> dict[str, torch.Tensor]:
    """This rank's part: weights, moments, and its random state."""
    files = sorted(checkpoint.glob(f"*{rank:05d}*.safetensors"))
    assert len(files) == 2, f"{checkpoint} has {files} of rank {rank}"
    return {f"{file.name[:4]} {key}": value for file in files for key, value in load_file(file).items()}


def judge_resume(results: list[Result]) -> Outcome:
    whole, first = results[0]["losses"]["once"], results[0]["losses"]["resumed"]
    same = all(first[step] == whole[step] for step in first) and len(first) == 2
    wrong = {name: [key for one in results for key in one["differs"][name]] for name in ("twice", "resumed")}
    tensors = sum(one["tensors"] for one in results)
    line = f"{results[0]['ranks']} ranks: "
    if same and not wrong["resumed"]:
        line += f"2 + 2 steps are 4 bit for bit, losses and {tensors} tensors of weights, moments and random states"
    else:
        line += f"2 + 2 steps are not 4: {len(wrong['resumed'])} of {tensors} tensors differ, such as "
        line += f"{(wrong['resumed'] or ['no one: the losses'])[0]}"
        line += "; neither is a second run of the same 4" if wrong["twice"] else "; a second run of the same 4 is"
    if results[0]["missing"]:
        line += f"; torch has no deterministic {results[0]['missing']}"
    return Outcome(same and not wrong["resumed"], {"tensors": tensors, "differ": len(wrong["resumed"])}, line)


CHECKS = [
    Check(
        "number formats",
        "both stages in float32, bfloat16, float16",
        formats,
        judge_formats,
        cpu=True,
        tests="tests/distributed/test_training.py",
        seconds=240,
    ),
    Check(
        "ZeRO stages",
        "a stage 2 under ZeRO-1, 2, 3 and hpZ",
        zero,
        judge_zero,
        cpu=True,
        tests="tests/distributed/test_engine_state.py",
        seconds=240,
    ),
    Check(
        "shipped JSONs",
        "ds_configs against each other, in bfloat16",
        partial(shipped, SHIPPED),
        judge_shipped,
        cpu=True,
        tests="tests/unit/test_engine_config.py",
        seconds=240,
    ),
    Check(
        "offload",
        "zero3_offload, with DeepSpeedCPUAdam, against zero3_bf16",
        partial(shipped, OFFLOAD),
        judge_shipped,
        cpu=False,
        tests="tests/distributed/test_engine_state.py",
        seconds=400,  # DeepSpeed compiles its Adam
    ),
    Check(
        "resume",
        "2 + 2 steps against 4, bit for bit",
        resume,
        judge_resume,
        cpu=True,
        tests="tests/distributed/test_training.py",
        seconds=240,
    ),
]
