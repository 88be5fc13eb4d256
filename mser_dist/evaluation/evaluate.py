"""Evaluation: each clip's labels scored by each stage; `report` makes numbers, a table and files of it."""

import itertools
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mser_dist import __version__
from mser_dist import config as cfg
from mser_dist.config.chosen import chosen, command
from mser_dist.config.file import flatten, to_yaml
from mser_dist.config.without_effect import Facts, unused_keys
from mser_dist.encoded.encode import encode_once
from mser_dist.encoded.measure import bind, describe, statistics_of
from mser_dist.errors import Stopped
from mser_dist.evaluation import page, protocols, report, unseen
from mser_dist.evaluation.asking import ask
from mser_dist.evaluation.headline import tell
from mser_dist.evaluation.parts import FOLDER, Parts, remove
from mser_dist.evaluation.predict import predict
from mser_dist.evaluation.scoring import AnswerScorer, PromptScorer
from mser_dist.models import chat, exported, zero3
from mser_dist.models.attention import Attention, choose
from mser_dist.models.chat import ChatPrompt
from mser_dist.models.heard import ledger_of
from mser_dist.models.self_check import check_llm, check_speech
from mser_dist.models.speech import SpeechModel
from mser_dist.models.text import TextTower
from mser_dist.ranks import distributed, preempt
from mser_dist.ranks.watchdog import Watchdog
from mser_dist.runs import folder as run_folder
from mser_dist.runs.record import versions
from mser_dist.runs.tracking import COMMAND, tracked
from mser_dist.shards.ledger import TRAINING, Ledger
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.examples import Examples, open_evaluation_clips

STOPPED = "between two batches; the same command goes on from there"
# Keys of a config that no score depends on.
_NO_SCORES = (
    "out",
    "stage1",
    "stage2",
    "tracking.",
    "data.workers",
    "data.cache",
    "encoder.",
    "native_labels",
    "require",
)


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
    ledgers = {stage: ledger_of(export) for stage, export in exports.items()}
    unseen.require(config.require, {f"stage {stage}": ledger for stage, ledger in ledgers.items()}, shards)
    out = Path(config.out)
    run_folder.check_no_training(out)
    if world.world_size > 1:
        distributed.init(world, 30.0, device)
    if world.is_main:
        for line in unused_keys(config, Facts(ranks=world.world_size)):
            distributed.warn(line)
        run_folder.prepare_evaluation(out, to_yaml(config))
    if world.world_size > 1:
        run_folder.seen_by_all(out)  # what a rank has scored, rank 0 reads there
    links = {f"mser.stage{stage}_run_id": export.parent for stage, export in exports.items()}
    tags = {"mser.stage": "eval", COMMAND: command(config, "eval", world.world_size)}
    watchdog = Watchdog(world, silence=120.0, stall=30 * 60.0)
    with (
        preempt.listen() as flag,
        watchdog.watch(),
        tracked(config.tracking, out, tags, chosen(config), world.is_main, links=links) as tracker,
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
            shared = config.zero3 and world.world_size > 1
            scorer = _scorer(stage, export, config, attention, dtype, device, shared)

            def before_each(title: str = title) -> Callable[[], None]:
                """For each pass: called before its forward passes."""
                batches = itertools.count()

                def look() -> None:
                    watchdog.tick(f"{title}, batch {next(batches)}")
                    if number := distributed.most([flag.number])[0]:
                        raise Stopped(signal.Signals(number).name, None, STOPPED)

                return look

            for adapted, line in _heard(clips, scorer.model.speech, config, world, before_each):
                if line not in said and world.is_main:
                    print(line, flush=True)
                said.append(line)
                name = f"stage{stage}{report.ADAPTED if adapted else ''}"
                parts = Parts(out / FOLDER / name, _made_of(config, card, clips, attention), world)
                found = predict(scorer, clips, config.batch, data.workers, world, device, title, parts, before_each())
                scale = scorer.scale()
                # The temperature is of the scores that a validation has.
                as_validated = stage == 1 or (config.protocol.score, config.protocol.instructions) == ("sum", 1)
                if found is None:
                    continue
                numbers, more = found
                if isinstance(scorer, AnswerScorer) and "generated" in more:
                    more["generated"] = np.array(scorer.texts(more["generated"]), dtype=object)
                given = report.Answers(
                    numbers,
                    clips.label[numbers],
                    more.pop("scores"),
                    card["languages"],
                    scorer.model.speech.statistics,
                    more,
                    ledgers[stage],
                    known=[
                        data.labels.index(label) for label in _trained(card, ledgers[stage]) if label in data.labels
                    ],
                    scale=scale,
                    temperature=card.get("temperature") if as_validated else None,
                )
                answers[name] = report.of_native_labels(given, shards) if config.native_labels else given
        result: dict[str, Any] | None = None
        if world.is_main:
            assert tracker is not None
            names = f"of {' and '.join(run for run in (config.stage1, config.stage2) if run)}"
            how: dict[str, Any] = {"attention": asdict(attention), "protocol": _protocol(config)}
            how["versions"] = versions()
            result = report.conclude(tracker, names, answers, shards, data.labels, **how)
            page.publish(tracker, answers)
            remove(out)
            trained = [
                (stage, export.parent, exported.read_card(export).get("step", 0)) for stage, export in exports.items()
            ]
            tell(tracker, trained, result["zero_shot"], data.sets, config.tracking.enabled)
        # within: who waits for the report is alive, listens to signals, and looks after rank 0
        agreed: dict[str, Any] = distributed.agree(result)
    return agreed


def _trained(card: dict[str, Any], ledger: Ledger) -> set[str]:
    """The labels that a model was trained on, by its stage 1 too."""
    return {*card["labels"], *(label for part in ledger.parts if part.use == TRAINING for label in part.labels)}


def _protocol(config: cfg.Evaluation) -> dict[str, Any]:
    """What the report says of how labels were scored. asked: not all is as by default."""
    how = {**asdict(config.protocol), "native_labels": config.native_labels, "definitions": protocols.DEFINITIONS}
    return {**how, "asked": config.protocol != cfg.ProtocolConfig()}


def _made_of(config: cfg.Evaluation, card: dict[str, Any], clips: Examples, attention: Attention) -> dict[str, Any]:
    """All that a model's scores of the clips depend on."""
    settings = {key: value for key, value in flatten(config).items() if not key.startswith(_NO_SCORES)}
    return {
        "version": __version__,
        "settings": settings,
        "card": card,
        "clips": clips.shards.fingerprint(),
        "attention": asdict(attention),
    }


def _heard(
    clips: Examples,
    speech: SpeechModel,
    config: cfg.Evaluation,
    world: distributed.World,
    before_each: Callable[[], Callable[[], None]],
) -> Iterator[tuple[bool, str]]:
    """Ways to normalise the clips' features, ready one after the other: whether it is adapted, and a line on it.

    One that is not normalised has one way; else first by the statistics of training, then by the clips' own, which
    know no labels. Collective.
    """
    frozen, workers = speech.frozen, config.data.workers
    line = "features: by an encoder that was trained"
    if frozen is not None:
        frozen.to("cuda" if torch.cuda.is_available() else "cpu")
        line = encode_once(clips, frozen, config.encoder, world, workers=workers, go_on=before_each())
    trained = speech.statistics
    if frozen is None or trained is None:
        yield False, line
        return
    bind(clips, trained)
    yield False, line
    # Speakers and not corpora, where training knows neither: a speaker is of a corpus.
    mode = "speaker" if trained.mode == "overall" else trained.mode
    speech.statistics = statistics_of(clips, frozen, mode, world, workers=workers, parent=trained, go_on=before_each())
    bind(clips, speech.statistics)
    yield True, f"adapted: {describe(speech.statistics)}, of this evaluation"


def _scorer(
    stage: int,
    export: Path,
    config: cfg.Evaluation,
    attention: Attention,
    dtype: torch.dtype,
    device: str,
    shared: bool,
) -> PromptScorer | AnswerScorer:
    """What scores the labels of clips with a stage's exported model; `shared`: its LLM is, out over the ranks."""
    labels = config.data.labels
    if stage == 1:
        aligner = exported.load_aligner(export, attention, dtype).to(device)
        check_speech(aligner.speech, device)
        card = exported.read_card(export)
        tower = TextTower(card["text"], device)
        return PromptScorer(aligner, tower, labels, card.get("captions"), each=True)
    model, tokenizer = exported.load_speech_llm(
        export, attention, dtype, zero3=zero3.settings(dtype) if shared else None
    )
    kept = exported.read_card(export).get("prompt")  # exports of 0.1.0 keep none
    prompt = ChatPrompt(**kept) if kept else chat.render(tokenizer, "speech_first")
    told = [zero3.share_out(model.llm, dtype)] if shared else []
    scorer = AnswerScorer(model.to(device), tokenizer, prompt, labels, config.protocol)
    checked = check_llm(model, scorer.prompts, scorer.answers, device)
    if distributed.discover().is_main:
        print(*told, checked, sep="\n", flush=True)
    return scorer
