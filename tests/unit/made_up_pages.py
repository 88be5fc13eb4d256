"""Evaluations with a page to be made of: hostile names, two trainings behind, and clips that can be heard."""

import html.parser
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

from mser_dist import audio
from mser_dist.evaluation import page, report
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.writer import DatasetWriter
from tests.unit import made_up_runs as made
from tests.unit import tiny_exports
from tests.unit.made_up_set import meta

LABELS = ["<b>anger</b>", "خشم", "sad & so"]
CORPUS = 'm<script>alert("x")</script>'
_VOID = {"meta", "br", "img", "link", "hr", "input"}


class Parsed(html.parser.HTMLParser):
    """A page: whether its tags nest, its attributes, its headings, and the text of each title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids |= {str(value) for name, value in attrs if name == "id"}
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "title":
            self.titles.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids |= {str(value) for name, value in attrs if name == "id"}

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "title":
            self.titles[-1] += data


def write_clips(out: Path, each: int = 12) -> ShardSet:
    """Clips with sound: two languages, one of them of a corpus with a hostile name, two speakers each."""
    with DatasetWriter(out, out.name, {}) as writer:
        for i in range(2 * each):
            facts: dict[str, Any] = {"language": ["de", "el"][i // each], "corpus": ["c", CORPUS][i // each]}
            facts |= {"speaker": f"<i>{i % 2}</i>", "label": LABELS[i % 3], "duration": 0.5}
            writer.write("test", f"k{i:02d}", audio.encode(sound(i), 16000), "flac", meta(i, **facts))
    return ShardSet.open(out)


def sound(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(-3000, 3000, 8000).astype(np.int16)


def answers(shards: ShardSet, right: float, seed: int, embedded: bool = False) -> report.Answers:
    given = made.answers(shards, right, seed, LABELS)
    if not embedded:
        return given
    vectors = np.random.default_rng(seed).normal(size=(len(shards), 8)) * 0.1
    vectors[np.arange(len(shards)), given.reference] += 1
    return replace(given, more={"embedding": vectors.astype(np.float32)})


def evaluate(out: Path, shards: ShardSet, given: Mapping[str, report.Answers], **how: Any) -> Path:
    sets = f"data.sets=[{json.dumps(str(Path(shards.shards[0].name).parent))}]"
    return made.evaluate(out, shards, given, sets, labels=LABELS, **how)


def evaluated(folder: Path, shards: ShardSet) -> Path:
    """An evaluation of two exported trainings."""
    runs = {1: tiny_exports.stage1(folder / "one"), 2: tiny_exports.stage2(folder / "two")}
    for stage, run in runs.items():
        made.train(run, *(["stage1=" + str(runs[1])] if stage == 2 else []), stage=stage)
    given = {"stage1": answers(shards, 0.8, 0, embedded=True), "stage2": answers(shards, 0.5, 1)}
    return evaluate(folder / "eval", shards, given, stages=runs)


def text_of(folder: Path, *baselines: Path, **how: Any) -> str:
    out, _ = page.write(folder, baselines, **how)
    return out.read_text(encoding="utf-8")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "report.json").read_text(encoding="utf-8"))["zero_shot"]
    return rows


def predicted(folder: Path, model: str) -> list[dict[str, Any]]:
    table = parquet.read_table(folder / "predictions.parquet").to_pylist()
    return [row for row in table if row["model"] == model]
