"""What a plan says that ranks send is what two real ones send, to the byte."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mser_dist import config as cfg
from mser_dist import deepspeed_parts
from mser_dist.config.file import load_training
from mser_dist.planning import real, rehearsal, shapes
from mser_dist.planning.collectives import Log, Traffic
from mser_dist.ranks.distributed import discover
from mser_dist.training.engine import Engine
from tests import warm
from tests.distributed.spawn import run

pytestmark = pytest.mark.distributed
WORDS = ["data.workers=0", "tracking.enabled=false"]
# (preset, words, micro-batches): odd widths, so that parts are padded.
CASES: dict[str, tuple[str, list[str], int]] = {
    "zero3": (
        "demo_stage2",
        ["llm.arch={hidden_size: 36, intermediate_size: 50, num_hidden_layers: 2, num_attention_heads: 2}"],
        1,
    ),
    "zero3, three micro-batches": ("demo_stage2", [], 3),
    "zero2": ("demo_stage2", ["engine.deepspeed=zero2"], 2),
    "stage 1, zero3": ("demo_stage1", ["encoder.freeze=true"], 2),
}


@pytest.fixture
def imports_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal's process is a fork of one with the imports done. The bench's number begins with Python itself."""
    monkeypatch.setattr(rehearsal, "multiprocessing", SimpleNamespace(get_context=lambda _: warm.CONTEXT))


def config_of(case: str) -> tuple[cfg.Stage1 | cfg.Stage2, int]:
    preset, words, micro = CASES[case]
    return load_training(preset, [*WORDS, *words]), micro


def really(rank: int) -> dict[str, Any]:
    """By case: what this rank's steps said, and the elements that it holds."""
    os.environ.setdefault("LOCAL_RANK", str(rank))
    found = {}
    for case in CASES:
        config, micro = config_of(case)
        config = replace(config, train=replace(config.train, global_batch=2 * micro, micro_batch=1))
        model = shapes.build(config)
        engine = Engine(model, config, discover(), rehearsal.STEPS, "cpu")
        with Log() as log:
            rehearsal.steps(engine, model, rehearsal.batch(model), micro, log)
        own = sum(deepspeed_parts.own_numel(p) for p in engine.module.parameters())
        found[case] = ([(one.kind, one.ranks, one.calls, one.bytes) for one in log.said()], own)
    return found


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("imports_done")
def test_a_rehearsal_says_what_two_real_ranks_say() -> None:
    ranks = run(really, 2)
    for case in CASES:
        config, micro = config_of(case)
        planned = rehearsal.rehearse(config, 2, micro)
        for said, own in (rank[case] for rank in ranks):
            assert sorted(said) == sorted((one.kind, one.ranks, one.calls, one.bytes) for one in planned.said), case
            assert own == planned.trained + planned.frozen, case
            assert sum(one[3] for one in said) > 1000, "something was said at all"
        shorter = rehearsal.rehearse(config, 2, 2) if micro > 2 else None
        if shorter is not None:
            assert sorted(map(_key, shorter.step(micro))) == sorted(map(_key, planned.said)), (
                "each micro-batch adds as much"
            )


def _key(one: Traffic) -> tuple[str, int, int, int]:
    return one.kind, one.ranks, one.calls, one.bytes


def test_the_log_counts_whole_tensors() -> None:
    [first, second] = run(_talk, 2)
    assert first == second
    assert sorted(map(tuple, first)) == [
        ("all-gather", 2, 1, 24),
        ("all-reduce", 2, 1, 40),
        ("reduce-scatter", 2, 1, 24),
    ]


def _talk(rank: int) -> list[list[Any]]:
    gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
    scatter = getattr(torch.distributed, "reduce_scatter_single", None) or torch.distributed.reduce_scatter_tensor
    with Log() as log:
        torch.distributed.all_reduce(torch.ones(10))
        gather(torch.empty(6), torch.ones(3))
        scatter(torch.empty(3), torch.ones(6))
    return [[one.kind, one.ranks, one.calls, one.bytes] for one in log.said()]


@pytest.mark.timeout(600)
def test_the_benchs_number_is_of_real_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 as it is; and not where the rehearsal would say something else."""
    heard, planned = [], []

    def really(*arguments: Any) -> list[Traffic]:
        heard.append(real_said(*arguments))
        return heard[-1]

    def rehearsed(*arguments: Any) -> rehearsal.Rehearsed:
        planned.append(rehearse(*arguments))
        return planned[-1]

    real_said, rehearse = real.said, rehearsal.rehearse
    monkeypatch.setattr(real, "said", really)
    monkeypatch.setattr(rehearsal, "rehearse", rehearsed)
    assert real.bytes_error() == 0
    more = replace(planned[0], said=[replace(one, bytes=2 * one.bytes) for one in planned[0].said])
    monkeypatch.setattr(real, "said", lambda *_: heard[0])
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: more)
    assert real.bytes_error() == 1


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("imports_done")
def test_each_further_layer_adds_as_much(tmp_path: Path) -> None:
    """Of a deep LLM two shallow ones are rehearsed. Here DeepSpeed lets go of weights between forward and backward."""
    json_file = tmp_path / "small.json"
    small = {"stage": 3, "stage3_max_live_parameters": 60000, "stage3_max_reuse_distance": 60000}
    small |= {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 20000}
    json_file.write_text(json.dumps({"zero_optimization": small}), encoding="utf-8")
    config = load_training("demo_stage2", [*WORDS, f"engine.deepspeed={json_file}"])
    short, long, deep = (rehearsal.rehearse(config, 3, 1, None, None, layers) for layers in (4, 5, 9))
    assert rehearsal.deeper(short, long, 1, 4) == deep
    weights = 3 * 4 * (deep.trained + deep.frozen)
    assert {t.kind: t.bytes for t in deep.said}["all-gather"] > 1.5 * weights, "most are gathered twice"
