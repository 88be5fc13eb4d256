"""Baselines: what the same features tell the usual classifiers, with the models' splits, labels, metrics and table."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mser_dist import config as cfg
from mser_dist.config.chosen import baseline_command, chosen
from mser_dist.config.file import to_yaml
from mser_dist.encoded.encode import encode_once
from mser_dist.encoded.measure import mean_pooled
from mser_dist.errors import Stopped, UserError
from mser_dist.evaluation import page, report, unseen
from mser_dist.evaluation.classifiers import CLASSIFIERS, Heard, fitted, majority, normalised, scores
from mser_dist.evaluation.test_sets import test_sets
from mser_dist.models import egemaps
from mser_dist.models.attention import choose
from mser_dist.models.encoders import build_encoder
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.progress import bar
from mser_dist.ranks import distributed, preempt
from mser_dist.runs import folder as run_folder
from mser_dist.runs.record import versions
from mser_dist.runs.tracking import COMMAND, tracked
from mser_dist.shards.ledger import Ledger, part_of
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.examples import Examples, open_evaluation_clips, open_training_clips
from mser_dist.stream.features import Features

ENCODER, EGEMAPS = "", "egemaps_"  # what the name of a system begins with, by what it hears
HEARD = tuple(CLASSIFIERS)  # with which the names of those begin that hear the encoder


def baseline(config: cfg.Baseline) -> dict[str, Any]:
    """Fit, evaluate, and return {"zero_shot": rows, "warnings": lines, …}; writes ``<out>/`` as `evaluate` does.

    One process. Raises `Stopped` when a signal came, and `UserError` for what a user can mend.
    """
    if distributed.discover().world_size > 1:
        raise UserError("mser baseline runs in one process: start it without a launcher")
    systems, told = _systems(config)
    trained, on = config.stage1, config.on
    shards = open_training_clips(trained.data)
    test = open_evaluation_clips(on.data, trained.data.labels)
    columns = _columns(trained.data.labels, on.data.labels)
    if untrained := [label for label, column in zip(on.data.labels, columns, strict=True) if column < 0]:
        told.append(f"no training clip has the label {', '.join(untrained)}: no baseline answers it")
    if trained.data.augment.on:
        told.append("data.augment has no effect: a baseline is fitted to the clips as they are")
    out = Path(config.out)
    run_folder.check_no_training(out)
    fitted_to = part_of(shards, out.resolve().name, None)
    ledgers = {ENCODER: Ledger((fitted_to,), trained.encoder.pretrained or ""), EGEMAPS: Ledger((fitted_to,), "")}
    unseen.require(on.require, {"the baselines": ledgers[ENCODER]}, test)
    run_folder.prepare_evaluation(out, to_yaml(config))
    tags = {"mser.stage": "baseline", COMMAND: baseline_command(config)}
    with preempt.listen() as flag, tracked(on.tracking, out, tags, chosen(config), main=True) as tracker:

        def go_on() -> None:
            if flag.number:
                raise Stopped(signal.Signals(flag.number).name, None)

        answers: dict[str, report.Answers] = {}
        if report.MAJORITY in systems:
            answers[report.MAJORITY] = _majority(config, shards, test, columns)
        for kind, make in ((ENCODER, lambda: _encoder(trained)), (EGEMAPS, egemaps.Egemaps)):
            if own := [kind + name for name in CLASSIFIERS if kind + name in systems]:
                answers |= _answers(own, make(), config, shards, test, columns, go_on)
        answers = {
            model: replace(given, ledger=ledgers[ENCODER if model.startswith(HEARD) else EGEMAPS])
            for model, given in answers.items()
        }
        if on.native_labels:
            answers = {model: report.of_native_labels(given, test) for model, given in answers.items()}
        title = f"of baselines fitted to {', '.join(trained.data.sets)}"
        result = report.conclude(tracker, title, answers, test, on.data.labels, told, versions=versions())
        assert tracker is not None
        page.publish(tracker, answers)
        tracker.datasets([*test_sets(out / "predictions.parquet", on.data.sets).values()])
        return result


def _systems(config: cfg.Baseline) -> tuple[list[str], list[str]]:
    """The names of the systems to fit, and what to tell of those that cannot be."""
    asked = [name for name in cfg.BASELINES if not config.only or any(cfg.is_called(name, own) for own in config.only)]
    if not any(name.startswith(EGEMAPS) for name in asked):
        return asked, []
    if egemaps.is_installed():
        print(f"eGeMAPS: {egemaps.LICENCE}", flush=True)
        return asked, []
    if any(name.startswith(EGEMAPS.strip("_")) for name in config.only):
        raise UserError(f"--only {','.join(config.only)}: openSMILE is not installed: {egemaps.INSTALL}")
    rest = [name for name in asked if not name.startswith(EGEMAPS)]
    return rest, [f"no eGeMAPS baselines: openSMILE is not installed: {egemaps.INSTALL} ({egemaps.LICENCE})"]


def _columns(trained: list[str], asked: list[str]) -> NDArray[np.int64]:
    """(K,) number of each label that is asked about among the trained ones, -1 of one that is not among them."""
    found = np.array([trained.index(label) if label in trained else -1 for label in asked])
    if (found < 0).all():
        raise UserError(
            f"on.data.labels ({', '.join(asked)}) and data.labels ({', '.join(trained)}) have no label in common: "
            "train on labels that are asked about"
        )
    return found


def _majority(config: cfg.Baseline, shards: ShardSet, test: ShardSet, columns: NDArray[np.int64]) -> report.Answers:
    """What one who knows the training labels answers without listening."""
    nothing = Features()
    clips, asked = _examples(config, shards, nothing), _asked(config, test, nothing)
    found = majority(clips.label, len(config.stage1.data.labels), len(asked))
    scores = _restricted(found, columns)
    return report.Answers(np.arange(len(asked)), asked.label, scores, _languages(shards), scale=1.0)


def _answers(
    systems: list[str],
    frozen: FrozenEncoder,
    config: cfg.Baseline,
    shards: ShardSet,
    test_shards: ShardSet,
    columns: NDArray[np.int64],
    go_on: Callable[[], None],
) -> dict[str, report.Answers]:
    """What the systems answer that hear the same features, inductive and adapted, by their names."""
    trained, features = config.stage1, frozen.encoder.features
    clips, asked = _examples(config, shards, features), _asked(config, test_shards, features)
    train = _hear(clips, frozen, config, trained.data, go_on)
    test = _hear(asked, frozen, config, config.on.data, go_on)
    ways = normalised(train, test, trained.encoder.normalize)
    label, numbers, heard = clips.label[train.numbers], test.numbers, _languages(shards)
    answers = {}
    for system in bar(systems, title="fit", unit="system", total=len(systems), leave=False):
        for x, x_test, statistics in ways:
            go_on()
            classifier = fitted(system.removeprefix(EGEMAPS), x, label, trained.seed)
            found = _restricted(scores(classifier, x_test, len(trained.data.labels)), columns)
            name = system if statistics is None else system + report.ADAPTED
            scale = 1.0 if hasattr(classifier, "predict_log_proba") else None  # an SVM's values are no logarithms
            answers[name] = report.Answers(numbers, asked.label[numbers], found, heard, statistics, scale=scale)
    return answers


def _encoder(trained: cfg.Stage1) -> FrozenEncoder:
    """The frozen encoder of a config, where and in the dtype that a training has it: they share its features."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, trained.engine.dtype)
    torch.manual_seed(trained.seed)  # one that is made on the spot is the same each time
    attention = choose(trained.engine.attention, dtype, device)
    return FrozenEncoder(build_encoder(trained.encoder, attention, dtype)).to(device, dtype)


def _hear(
    clips: Examples, frozen: FrozenEncoder, config: cfg.Baseline, data: cfg.DataConfig, go_on: Callable[[], None]
) -> Heard:
    """One vector of each clip, its mean over frames."""
    world = distributed.World()
    line = encode_once(clips, frozen, config.stage1.encoder, world, workers=data.workers, go_on=go_on)
    print(line, flush=True)
    numbers, x = mean_pooled(clips, frozen, workers=data.workers, go_on=go_on)
    return Heard(x, numbers, clips.shards)


def _examples(config: cfg.Baseline, shards: ShardSet, features: Features) -> Examples:
    """The clips to fit to."""
    data, seed = config.stage1.data, config.stage1.seed
    how: dict[str, Any] = {"shuffle_labels": data.shuffle_labels, "max_bad": data.max_bad}
    return Examples(shards, data.labels, features, data.max_seconds, seed, **how)


def _asked(config: cfg.Baseline, test: ShardSet, features: Features) -> Examples:
    """The clips to evaluate on."""
    data = config.on.data
    return Examples(test, data.labels, features, data.max_seconds, max_bad=data.max_bad)


def _languages(shards: ShardSet) -> list[str]:
    return [str(name) for name in shards.coded["language"].names]


def _restricted(found: NDArray[np.float32], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    """(n, K) scores of the labels that are asked about, out of all trained ones'; -inf of one that was not trained."""
    return np.where(columns < 0, np.float32(-np.inf), found[:, columns])
