"""Run folders as trainings and evaluations leave them, by the parts that write those, of answers that are made up."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mser_dist import config as cfg
from mser_dist.config.chosen import chosen
from mser_dist.config.file import load_baseline, load_evaluation, load_training, to_yaml
from mser_dist.evaluation import headline, page_map, report
from mser_dist.files import write_json
from mser_dist.runs import folder
from mser_dist.runs.record import versions
from mser_dist.runs.tracking import tracked
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.writer import DatasetWriter
from tests.unit.made_up_set import meta

LABELS = ["anger", "happy", "sad"]


def write_clips(out: Path, languages: Sequence[str] = ("el", "ru"), speakers: int = 5, each: int = 9) -> ShardSet:
    """A set without audio: of each language `speakers` with `each` clips, of all labels in turn."""
    with DatasetWriter(out, out.name, {}) as writer:
        for i in range(len(languages) * speakers * each):
            language, speaker = languages[i // (speakers * each)], i // each % speakers
            facts = {
                "language": language,
                "speaker": f"{language}{speaker}",
                "label": LABELS[i % 3],
                "corpus": "made-up",
            }
            writer.write("test", f"k{i:04d}", b"no audio", "flac", meta(i, **facts))
    return ShardSet.open(out)


def tracking(**more: Any) -> list[str]:
    """Words for a config: where it is tracked, if anywhere."""
    return [f"tracking.{key}={value}" for key, value in ({"enabled": False} | more).items()]


def train(out: Path, *words: str, stage: int = 1, ua: float | None = 0.5, steps: int = 1, **how: Any) -> Path:
    """A finished training, of which each step but the last has a loss that falls."""
    config = load_training(f"demo_stage{stage}", [f"out={out}", *tracking(**how), *words])
    folder.prepare(out, to_yaml(config))
    links = {"mser.stage1_run_id": Path(config.stage1)} if isinstance(config, cfg.Stage2) else {}
    validation = {} if ua is None else {"ua": ua, "wa": ua, "macro_f1": ua}
    params = chosen(config)
    with tracked(config.tracking, out, {"mser.stage": str(stage)}, params, True, links) as tracker:
        assert tracker is not None
        for step in range(1, steps):
            tracker.metrics(step, {"train/loss": 2.0 - (ua or 0) * (1 - 0.8**step), "train/lr": 1e-3 / step})
        tracker.metrics(steps, {f"val/{name}": value for name, value in validation.items()})
    write_json(out / "summary.json", {"stage": stage, "out": str(out), "validation": validation})
    return out


def answers(
    shards: ShardSet, right: float, seed: int = 0, labels: Sequence[str] = LABELS, heard: Sequence[str] = ("de",)
) -> report.Answers:
    """Answers to all clips, of which a share is right; speakers differ in how well they are named, for all alike."""
    random = np.random.default_rng(seed)
    reference = np.array([list(labels).index(label) for label in shards.column("label")])
    speaker = np.array(shards.column("speaker")).astype(str)
    names = np.unique(speaker)
    ease = np.random.default_rng(99).normal(0, 0.15, len(names))[np.searchsorted(names, speaker)]
    scores = random.random((len(reference), len(labels))).astype(np.float32)
    scores[np.arange(len(reference)), reference] += 2 * (
        random.random(len(reference)) < np.clip(right + ease, 0.05, 0.98)
    )
    return report.Answers(np.arange(len(reference)), reference, scores, heard)


def evaluate(
    out: Path,
    shards: ShardSet,
    given: Mapping[str, report.Answers],
    *words: str,
    labels: Sequence[str] = LABELS,
    stages: Mapping[int, Path | None] | None = None,
    **how: Any,
) -> Path:
    """A finished evaluation of trainings, by stage, with these answers of its models."""
    runs = {1: None, 2: None, **(stages or {})}
    named = [f"stage{stage}={'null' if run is None else run}" for stage, run in runs.items()]
    base = [f"out={out}", f"data.labels={[*labels]}", *named, *tracking(**how), *words]
    config = load_evaluation("demo_eval", base, runs=False)
    folder.prepare_evaluation(out, to_yaml(config))
    links = {f"mser.stage{stage}_run_id": run for stage, run in runs.items() if run is not None}
    with tracked(config.tracking, out, {"mser.stage": "eval"}, chosen(config), True, links) as tracker:
        assert tracker is not None
        result = report.conclude(tracker, "made up", given, shards, list(labels), versions=versions())
        page_map.keep_embeddings(given, out)
        trained = [(stage, run, 1) for stage, run in runs.items() if run is not None]
        headline.tell(tracker, trained, result["zero_shot"], ["made-up"], config.tracking.enabled)
    return out


def baseline(out: Path, shards: ShardSet, given: Mapping[str, report.Answers], *words: str, **how: Any) -> Path:
    """A finished baseline."""
    more = ["encoder.freeze=true", "encoder.arch={}", "encoder.pretrained=pypi:whisper-base"]
    on = [f"on.{word}" for word in tracking(**how)]
    config = load_baseline("demo_stage1", "demo_eval", [f"out={out}", *more, *on, *words])
    folder.prepare_evaluation(out, to_yaml(config))
    with tracked(config.on.tracking, out, {"mser.stage": "baseline"}, chosen(config), True) as tracker:
        report.conclude(tracker, "made up", given, shards, LABELS)
    return out
