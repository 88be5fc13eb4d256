"""Zero-shot evaluation: each clip's labels scored by each stage; `report` makes numbers, a table and files of it."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mser_dist import config as cfg
from mser_dist.config.file import flatten, to_yaml
from mser_dist.config.without_effect import Facts, unused_keys
from mser_dist.encoded.encode import encode_once
from mser_dist.encoded.measure import bind, describe, statistics_of
from mser_dist.errors import Stopped, UserError
from mser_dist.evaluation import report
from mser_dist.evaluation.asking import ask
from mser_dist.evaluation.metrics import score
from mser_dist.evaluation.scoring import AnswerScorer, PromptScorer
from mser_dist.models import chat, exported
from mser_dist.models.attention import Attention, choose
from mser_dist.models.chat import ChatPrompt
from mser_dist.models.self_check import check_llm, check_speech
from mser_dist.models.speech import SpeechModel
from mser_dist.models.text import TextTower
from mser_dist.progress import bar
from mser_dist.ranks import distributed, preempt
from mser_dist.ranks.watchdog import Watchdog
from mser_dist.runs import folder as run_folder
from mser_dist.runs.tracking import tracked
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream import steps
from mser_dist.stream.examples import Examples, open_evaluation_clips, pad_speech
from mser_dist.stream.loader import Collate
from mser_dist.tables import count


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
        prepared = scorer.model.speech.prepared(clips.grouped(inputs), device)
        found.update(zip(indices.tolist(), scorer(prepared).float().cpu().numpy(), strict=True))
    found.pop(-1, None)  # what is no clip
    everything: dict[int, NDArray[np.float32]] = {}
    for part in distributed.gather(found):
        everything |= part
    lost = sorted(set(range(len(clips))) - everything.keys())
    if len(lost) > clips.max_bad or not everything:
        raise UserError(
            f"{count(len(lost), 'clip')} could not be read on all ranks together, "
            f"more than data.max_bad={clips.max_bad}: "
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
    found = predict(stage.scorer(), clips, batch, pad_speech, workers, world, device, "validate", False, go_on)
    stage.model.train()
    if found is None:
        return None
    numbers, scores = found
    result = score(clips.label[numbers], scores.argmax(1), scores.shape[1])
    return {"ua": result.ua, "wa": result.wa, "macro_f1": result.macro_f1}


def exports_of(config: cfg.Evaluation) -> dict[int, Path]:
    """The exported model of each stage that is evaluated."""
    runs = ((1, config.stage1), (2, config.stage2))
    return {stage: exported.find(run, stage) for stage, run in runs if run}


def open_shards(config: cfg.Evaluation, exports: dict[int, Path]) -> ShardSet:
    """The clips to evaluate on."""
    trained = {label for export in exports.values() for label in exported.read_card(export)["labels"]}
    return open_evaluation_clips(config.data, trained)


def clips_of(config: cfg.Evaluation, shards: ShardSet, card: dict[str, Any]) -> Examples:
    """The clips as the encoder of an export, by its card, is fed them."""
    data = config.data
    return Examples(shards, data.labels, exported.features_of(card), data.max_seconds, max_bad=data.max_bad)


def evaluate(config: cfg.Evaluation) -> dict[str, Any]:
    """Evaluate finished runs and return {"zero_shot": rows, "warnings": lines, …}; writes ``<out>/``: the table,
    predictions and plots.

    Collective. Raises `Stopped` between two batches when a signal came to any rank.
    """
    distributed.check_gpus()
    world = distributed.discover()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data, dtype = config.data, getattr(torch, config.dtype)
    attention = choose(config.attention, dtype, device)
    exports = exports_of(config)
    shards = open_shards(config, exports)
    out = Path(config.out)
    run_folder.check_no_training(out)
    if world.world_size > 1:
        distributed.init(world, 30.0, device)
    if world.is_main:
        for line in unused_keys(config, Facts()):
            distributed.warn(line)
        run_folder.prepare_evaluation(out, to_yaml(config))
    links = {f"mser.stage{stage}_run_id": export.parent for stage, export in exports.items()}
    tags = {"mser.stage": "eval"}
    watchdog = Watchdog(world, silence=120.0, stall=30 * 60.0)
    with (
        preempt.listen() as flag,
        watchdog.watch(),
        tracked(config.tracking, out, tags, flatten(config), world.is_main, links=links) as tracker,
    ):
        answers: dict[str, report.Answers] = {}
        said: list[str] = []
        for stage, export in exports.items():
            title, card = f"evaluate stage {stage}", exported.read_card(export)
            clips = clips_of(config, shards, card)
            if stage == 2 and card.get("prompt"):
                without = ask(clips, ChatPrompt(**card["prompt"]))
                for line in without if world.is_main else ():
                    distributed.warn(line)
            scorer = _scorer(stage, export, data.labels, attention, dtype, device)

            def go_on(title: str = title) -> bool:
                watchdog.tick(title)
                if number := distributed.most([flag.number])[0]:
                    raise Stopped(signal.Signals(number).name, None)
                return True

            for adapted, line in _heard(clips, scorer.model.speech, config, world, go_on):
                if line not in said and world.is_main:
                    print(line, flush=True)
                said.append(line)
                found = predict(
                    scorer, clips, config.batch, pad_speech, data.workers, world, device, title, go_on=go_on
                )
                assert found is not None
                numbers, scores = found
                given = report.Answers(
                    numbers, clips.label[numbers], scores, card["languages"], statistics=scorer.model.speech.statistics
                )
                name = f"stage{stage}{report.ADAPTED if adapted else ''}"
                answers[name] = report.of_native_labels(given, shards) if config.native_labels else given
        names = f"Zero-shot evaluation of {config.stage1} and {config.stage2}"
        result = report.conclude(tracker, names, answers, shards, data.labels, attention=asdict(attention))
        distributed.barrier()  # within: who waits for the report is alive, listens to signals, and looks after rank 0
    return result


def _heard(
    clips: Examples, speech: SpeechModel, config: cfg.Evaluation, world: distributed.World, go_on: Callable[[], object]
) -> Iterator[tuple[bool, str]]:
    """Ways to normalise the clips' features, ready one after the other: whether it is adapted, and a line on it.

    One that is not normalised has one way; else first by the statistics of training, then by the clips' own, which
    know no labels. Collective.
    """
    frozen, workers = speech.frozen, config.data.workers
    line = "features: by an encoder that was trained"
    if frozen is not None:
        frozen.to("cuda" if torch.cuda.is_available() else "cpu")
        line = encode_once(clips, frozen, config.encoder, world, workers=workers, go_on=go_on)
    trained = speech.statistics
    if frozen is None or trained is None:
        yield False, line
        return
    bind(clips, trained)
    yield False, line
    # Speakers and not corpora, where training knows neither: a speaker is of a corpus.
    mode = "speaker" if trained.mode == "overall" else trained.mode
    speech.statistics = statistics_of(clips, frozen, mode, world, workers=workers, parent=trained, go_on=go_on)
    bind(clips, speech.statistics)
    yield True, f"adapted: {describe(speech.statistics)}, of this evaluation"


def _scorer(
    stage: int, export: Path, labels: list[str], attention: Attention, dtype: torch.dtype, device: str
) -> PromptScorer | AnswerScorer:
    """What scores the labels of clips with a stage's exported model."""
    if stage == 1:
        aligner = exported.load_aligner(export, attention, dtype).to(device)
        check_speech(aligner.speech, device)
        card = exported.read_card(export)
        return PromptScorer(aligner, TextTower(card["text"], device), labels, card.get("captions"))
    model, tokenizer = exported.load_speech_llm(export, attention, dtype)
    kept = exported.read_card(export).get("prompt")  # exports of 0.1.0 keep none
    prompt = ChatPrompt(**kept) if kept else chat.render(tokenizer, "speech_first")
    scorer = AnswerScorer(model.to(device), tokenizer, prompt, labels)
    checked = check_llm(model, [scorer.prompt], scorer.answers, device)
    if distributed.discover().is_main:
        print(checked, flush=True)
    return scorer
