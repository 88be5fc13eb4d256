"""Zero-shot evaluation: each clip's labels scored, metrics per corpus and language, a table, plots and predictions.

Languages are never pooled: a mean over languages is the mean of their own UAs.
"""

import json
import re
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mser_dist import __version__
from mser_dist import config as cfg
from mser_dist.config.file import flatten, to_yaml
from mser_dist.errors import Stopped, UserError
from mser_dist.evaluation.metrics import Metrics, score
from mser_dist.evaluation.scoring import AnswerScorer, PromptScorer
from mser_dist.files import write_json, write_text
from mser_dist.models import exported
from mser_dist.models.attention import Attention, choose
from mser_dist.models.text import TextTower
from mser_dist.progress import bar
from mser_dist.ranks import distributed, preempt
from mser_dist.ranks.watchdog import Watchdog
from mser_dist.runs import folder as run_folder
from mser_dist.runs import plots
from mser_dist.runs.record import status_of
from mser_dist.runs.tracking import Tracker, tracked
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream import steps
from mser_dist.stream.examples import Examples, open_clips, pad_speech
from mser_dist.stream.loader import Collate


def predict(
    scorer: Any,
    clips: Examples,
    batch: int,
    collate: Collate,
    workers: int,
    world: distributed.World,
    device: str,
    title: str,
    leave: bool = True,
    go_on: Callable[[], bool] = lambda: True,
) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """Score every clip once, shared out over the ranks: (n,) clip numbers in order and (n, K) scores, on every rank.

    Collective when there is a process group: all ranks run equally many forward passes. `go_on` is asked before each;
    None where it said no, which it must do on all ranks.
    """
    rounds, batches = steps.one_pass(clips, batch, world.rank, world.world_size, collate, workers)
    found: dict[int, NDArray[np.float32]] = {}
    for indices, inputs in bar(
        batches, title=title, unit="batch", total=rounds, disable=not world.is_main, leave=leave
    ):
        if not go_on():
            return None
        tensors = {key: inputs[key].to(device) for key in ("speech", "lengths")}
        found.update(zip(indices.tolist(), scorer(tensors).float().cpu().numpy(), strict=True))
    found.pop(-1, None)  # what is no clip
    everything: dict[int, NDArray[np.float32]] = {}
    for part in distributed.gather(found):
        everything |= part
    lost = sorted(set(range(len(clips))) - everything.keys())
    if len(lost) > clips.max_bad or not everything:
        raise UserError(
            f"{len(lost)} clips could not be read on all ranks together, more than data.max_bad={clips.max_bad}: "
            f"the first is {clips.shards.where(lost[0])}; mser verify lists all of them"
        )
    numbers = np.array(sorted(everything))
    return numbers, np.stack([everything[i] for i in numbers])


def validate(
    stage: Any,
    clips: Examples,
    batch: int,
    workers: int,
    world: distributed.World,
    device: str,
    go_on: Callable[[], bool],
) -> dict[str, float] | None:
    """UA, WA and macro-F1 on the validation split; None where `go_on` ended it. Collective."""
    stage.model.eval()
    found = predict(stage.scorer(), clips, batch, stage.collate, workers, world, device, "validate", False, go_on)
    stage.model.train()
    if found is None:
        return None
    numbers, scores = found
    result = score(clips.label[numbers], scores.argmax(1), scores.shape[1])
    return {"ua": result.ua, "wa": result.wa, "macro_f1": result.macro_f1}


def evaluate(config: cfg.Evaluation) -> dict[str, Any]:
    """Evaluate finished runs and return {"zero_shot": rows, …}; writes ``<out>/``: the table, predictions and plots.

    Collective. Raises `Stopped` between two batches when a signal came to any rank.
    """
    distributed.check_gpus()
    world = distributed.discover()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = choose(config.attention, getattr(torch, config.dtype), device)
    runs: dict[int, str] = {stage: run for stage, run in ((1, config.stage1), (2, config.stage2)) if run}
    exports = {stage: exported.find(run, stage) for stage, run in runs.items()}
    shards = open_clips(config.data, config.data.split)
    out = Path(config.out)
    if (out / "checkpoints").exists() or (out / "summary.json").exists():
        raise UserError(f"out={out} is the folder of a training run: name another one for the evaluation")
    if world.world_size > 1:
        distributed.init(world, 30.0, device)
    if world.is_main:  # one that was stopped begins anew in its MLflow run; one that has ended is followed by another
        run_folder.prepare(out, to_yaml(config), anew=status_of(out) in ("FINISHED", "FAILED"))
    links = {f"mser.stage{stage}_run_id": Path(run) for stage, run in runs.items()}
    tags = {"mser.stage": "eval"}
    watchdog = Watchdog(world, silence=120.0, stall=30 * 60.0)
    with (
        preempt.listen() as flag,
        watchdog.watch(),
        tracked(config.tracking, out, tags, flatten(config), world.is_main, links=links) as tracker,
    ):
        rows, tables, predictions = _score_all(config, exports, shards, world, attention, device, watchdog, flag)
        report: dict[str, Any] = {"version": __version__, "zero_shot": rows, "attention": asdict(attention)}
        if tracker:
            _publish(config, tracker, rows, tables, predictions)
            report |= {"mlflow_run_id": tracker.run_id, "tracking_uri": tracker.uri}
            write_json(out / "report.json", report)
        distributed.barrier()  # within: who waits for the report is alive, listens to signals, and looks after rank 0
    return report


def _score_all(
    config: cfg.Evaluation,
    exports: dict[int, Path],
    shards: ShardSet,
    world: distributed.World,
    attention: Attention,
    device: str,
    watchdog: Watchdog,
    flag: preempt.Flag,
) -> tuple[list[dict[str, Any]], dict[int, dict[str, NDArray[np.int64]]], list[dict[str, Any]]]:
    """Every stage's rows of the table, confusions by language, and predictions. Collective."""
    data, dtype = config.data, getattr(torch, config.dtype)
    rows: list[dict[str, Any]] = []
    tables: dict[int, dict[str, NDArray[np.int64]]] = {}
    predictions: list[dict[str, Any]] = []
    for stage, export in exports.items():
        card = exported.read_card(export)
        scorer: PromptScorer | AnswerScorer
        if stage == 1:
            aligner = exported.load_aligner(export, attention, dtype).to(device)
            scorer = PromptScorer(aligner, TextTower(card["text"], device), data.labels)
        else:
            model, tokenizer = exported.load_speech_llm(export, attention, dtype)
            scorer = AnswerScorer(model.to(device), tokenizer, data.labels)
        clips = Examples(shards, data.labels, exported.features_of(card), data.max_seconds, max_bad=data.max_bad)
        title = f"evaluate stage {stage}"

        def go_on(title: str = title) -> bool:
            watchdog.tick(title)
            if number := distributed.most([flag.number])[0]:
                raise Stopped(signal.Signals(number).name, None)
            return True

        found = predict(scorer, clips, config.batch, pad_speech, data.workers, world, device, title, go_on=go_on)
        assert found is not None
        numbers, scores = found
        best = scores.argmax(1)
        tables[stage] = {}
        languages, corpora, labels = (shards.column(name)[numbers] for name in ("language", "corpus", "label"))
        pairs = set(zip(corpora, languages, strict=True))
        groups = {(language not in card["languages"], corpus, language) for corpus, language in pairs}
        for unseen, corpus, language in sorted(groups):
            mine = (corpora == corpus) & (languages == language)
            result = score(clips.label[numbers[mine]], best[mine], len(data.labels))
            rows.append(_row(stage, corpus, language, not unseen, result))
            tables[stage][f"{language}, {'unseen' if unseen else 'seen'} ({corpus})"] = result.confusion
        predictions += [
            {
                "stage": stage,
                "key": shards.key(i),
                "language": language,
                "label": label,
                "predicted": data.labels[choice],
                "scores": dict(zip(data.labels, map(float, line.round(4)), strict=True)),
            }
            for i, language, label, choice, line in zip(numbers, languages, labels, best.tolist(), scores, strict=True)
        ]
    return rows, tables, predictions


def _row(stage: int, corpus: str, language: str, seen: bool, s: Metrics) -> dict[str, Any]:
    numbers = {"n": s.n, "k": s.k, "chance": s.chance, "ua": s.ua, "wa": s.wa, "macro_f1": s.macro_f1}
    return {"stage": stage, "corpus": corpus, "language": language, "seen_language": seen, **numbers}


def macro_ua(rows: list[dict[str, Any]], stage: int, seen: bool) -> float:
    """Mean UA over the languages that were, or were not, seen in training; NaN if there is none."""
    values = [row["ua"] for row in rows if row["stage"] == stage and row["seen_language"] is seen]
    return float(np.mean(values)) if values else float("nan")


def format_table(rows: list[dict[str, Any]]) -> str:
    """The table a person reads in the terminal."""

    def line(stage: object, corpus: str, language: str, seen: str, *numbers: str) -> str:
        n, chance, ua, wa, f1 = numbers
        return f"{stage:>5}  {corpus[:14]:<14} {language:<9} {seen:<5} {n:>5} {chance:>7} {ua:>7} {wa:>7} {f1:>8}"

    head = line("stage", "corpus", "language", "seen", "n", "chance", "UA", "WA", "macroF1")
    lines = [head, "─" * len(head)]
    for stage in sorted({row["stage"] for row in rows}):
        for row in (r for r in rows if r["stage"] == stage):
            numbers = [f"{row[name]:.3f}" for name in ("chance", "ua", "wa", "macro_f1")]
            seen = "yes" if row["seen_language"] else "no"
            lines.append(line(stage, row["corpus"], row["language"], seen, str(row["n"]), *numbers))
        for was_seen, name in ((True, "seen languages"), (False, "unseen languages")):
            mean = macro_ua(rows, stage, was_seen)
            if mean == mean:
                lines.append(f"{stage:>5}  {'mean UA over ' + name:<44} {mean:>9.3f}")
        lines.append("─" * len(head))
    return "\n".join(lines)


def _publish(
    config: cfg.Evaluation,
    tracker: Tracker,
    rows: list[dict[str, Any]],
    tables: dict[int, dict[str, NDArray[np.int64]]],
    predictions: list[dict[str, Any]],
) -> None:
    """Write the table, predictions and plots of an evaluation and log them."""
    out = tracker.out
    table = format_table(rows)
    write_text(out / "table.txt", table + "\n")
    write_text(out / "predictions.jsonl", "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions))
    pictures = [out / "ua_by_language.png"]
    plots.ua_by_language(rows, pictures[0])
    for stage, confusion in tables.items():
        pictures.append(out / f"confusion_stage{stage}.png")
        plots.confusions(confusion, config.data.labels, f"stage {stage}: confusion by language", pictures[-1])
    # MLflow takes no other characters in a metric's name, and a corpus may be named in any script.
    numbers = {
        re.sub(r"[^\w./ :-]", "_", f"ua/stage{r['stage']}/{r['corpus']}/{r['language']}", flags=re.ASCII): r["ua"]
        for r in rows
    }
    for stage in tables:
        for seen in (True, False):
            mean = macro_ua(rows, stage, seen)
            if mean == mean:
                numbers[f"ua/stage{stage}/{'seen' if seen else 'unseen'}"] = mean
    tracker.metrics(0, numbers)
    tracker.table(rows, "zero_shot.json")
    tracker.describe(f"Zero-shot evaluation of {config.stage1} and {config.stage2}\n\n```\n{table}\n```")
    for path in (out / "table.txt", out / "predictions.jsonl", *pictures):
        tracker.artifact(path)
