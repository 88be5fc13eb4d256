"""Both stages on two ranks under ZeRO-3: with a frozen encoder's features kept, each number is as without."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mser_dist.config.file import load_evaluation, load_training
from mser_dist.encoded import layout, place
from tests.distributed.spawn import run
from tests.tiny_runs import LLM, stage1, stage2

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

CACHES = ("off", "disk", "memory")
# Two variants of each clip: what is heard is drawn anew in every epoch.
AUGMENT = "data.augment={speed: 0.1, time_masks: 1, variants: 2}"
QUIET = ["tracking.enabled=false", "train.val_every=2", "train.save_best=false"]


def kept(folder: Path) -> tuple[int, int, int]:
    """(features, different ones, processes that wrote them) in a folder of features."""
    keys: list[int] = []
    writers = set()
    for file in folder.rglob("*.features"):
        head = file.read_bytes()[: layout.HEAD]
        form = json.loads(head.removeprefix(layout.MAGIC))
        keys += layout.read_table(file, head, form["layers"] * form["width"] * 4)["key"].tolist()
        writers.add(file.stem.split("-")[-2])
    return len(keys), len(np.unique(keys)), len(writers)


def train_all(rank: int, folder: str) -> list[Any]:
    """Each stage and an evaluation, with each cache; what is kept behind each of these on the disk."""
    import os

    from mser_dist.evaluation.evaluate import evaluate
    from mser_dist.ranks import distributed
    from mser_dist.training.loop import train

    os.chdir(folder)
    counts: list[Any] = []
    in_memory = 0

    def count() -> None:
        distributed.barrier()
        counts.append(kept(Path("features")))

    for cache in CACHES:
        words = [*QUIET, f"encoder.cache={cache}", "encoder.cache_dir=features", AUGMENT]
        frozen = ["encoder.freeze=true", "encoder.layers=all", "encoder.stride=2", "encoder.normalize=speaker"]
        train(load_training(*_split(stage1(f"runs/one-{cache}", "train.steps=8", *frozen, *words))))
        count()
        frozen = [LLM, "stage1=runs/one-off", "freeze_encoder=true", "train.micro_batch=2"]
        train(load_training(*_split(stage2(f"runs/two-{cache}", *frozen, *words))))
        count()
        words = ["data.sets=shards", "data.workers=1", "batch=5", "tracking.enabled=false", "stage1=runs/one-off"]
        words += ["stage2=runs/two-off", f"encoder.cache={cache}", "encoder.cache_dir=features"]
        evaluate(load_evaluation("demo_eval", [*words, f"out=runs/eval-{cache}"]))
        count()
        in_memory += len(list(place.RAM.glob(f"{place.IN_RAM}*-{os.getpid()}-*")))
    distributed.barrier()
    place.give_back()
    return [counts, in_memory, len(list(place.RAM.glob(f"{place.IN_RAM}*-{os.getpid()}-*")))]


def _split(words: list[str]) -> tuple[str, list[str]]:
    verb, config, *rest = words
    assert verb == "train"
    return config, rest


def numbers(log: Path) -> list[dict[str, float]]:
    """What a log says of the training and the validation, without times."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    measured = re.compile(r"(time|seconds|per_second|data_wait|tflops|memory_gib|mfu|hfu|time_\w+)$")
    return [{name: value for name, value in row.items() if not measured.search(name)} for row in rows]


def test_a_training_is_the_same_with_and_without_features_that_are_kept(tiny_set: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_set, tmp_path / "shards")
    [counts, in_memory, left], [_, none, _] = run(train_all, 2, str(tmp_path))
    for name in ("one", "two"):
        off, disk, memory = (numbers(tmp_path / f"runs/{name}-{cache}/log.jsonl") for cache in CACHES)
        assert sum("train/loss" in row for row in off) >= 3 and any("val/ua" in row for row in off)
        assert off == disk == memory
    off, disk, memory = (json.loads((tmp_path / f"runs/eval-{cache}/report.json").read_text()) for cache in CACHES)
    assert off["zero_shot"] == disk["zero_shot"] == memory["zero_shot"]
    rows = {(row["model"], row["language"]): row["adapted_on"] for row in off["zero_shot"]}
    assert {model for model, _ in rows} == {"stage1", "stage1_adapted", "stage2", "stage2_adapted"}
    assert all(on == (6 if model.endswith("adapted") else None) for (model, _), on in rows.items())
    # Of 48 clips and 12 of the validation; the evaluation has 18 of its own, which both of its stages hear alike.
    first = 2 * 48 + 12
    found = [tuple(own) for own in counts]
    assert found[:3] == [(0, 0, 0)] * 3
    assert found[3:] == [(first, first, 2), (first, first, 2), *[(first + 18, first + 18, 2)] * 4]
    assert in_memory == 6 and none == left == 0, "two for each run, made by the node's first rank, gone at the end"
