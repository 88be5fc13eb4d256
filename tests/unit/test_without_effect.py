"""Every rule of the table can hold and can fail, in a config that is accepted."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mser_dist import config as cfg
from mser_dist.config.fields import key_table
from mser_dist.config.file import PRESETS, load_any, load_evaluation, load_training
from mser_dist.config.without_effect import RULES, Facts, unused_keys

FILES = {
    1: "stage: 1\ndata: {sets: [shards]}\n",
    2: "stage: 2\nstage1: runs/one\ndata: {sets: [shards]}\n",
    0: "stage1: runs/one\ndata: {sets: [shards]}\n",
}
PLAIN, WAVEFORM, NO_PAIRS = Facts(ranks=2, shards=9), Facts(log_mel=False), Facts(parallel_clips=False)
ALWAYS = {
    "out", "seed", "stage", "stage1", "stage2", "init_from", "batch", "dtype", "attention", "freeze_encoder",
    "freeze_qformer", "align", "text.pretrained", "train.global_batch", "train.micro_batch", "train.steps", "train.lr",
    "train.weight_decay", "train.groups", "train.betas", "train.warmup", "train.grad_clip", "train.log_every",
    "train.save_every", "train.save_minutes", "train.save_best", "train.keep", "train.background_save",
    "train.trust_checkpoints", "train.fork", "train.patience", "train.ema",
    "train.max_skipped", "data.sets", "data.split", "data.val_split",
    "data.languages", "data.labels", "data.keep", "data.drop", "data.max_seconds", "data.workers", "data.max_bad",
    "data.batching", "data.balance", "data.shuffle_labels", "encoder.arch", "encoder.freeze", "encoder.pad_seconds",
    "encoder.layers", "encoder.normalize", "encoder.stride", "native_labels", "require", "qformer.pool",
    "qformer.queries", "qformer.layers", "qformer.width", "qformer.heads",
    "contrastive.width", "contrastive.loss", "contrastive.alpha",
    "contrastive.temperature", "contrastive.max_scale", "llm.pretrained", "llm.arch", "llm.freeze",
    "llm.gradient_checkpointing", "llm.order", "llm.packing", "train.profile_steps", "text.captions",
    "llm.prompt.instructions", "llm.prompt.system", "llm.prompt.words", "llm.prompt.shuffle_options",
    "llm.prompt.transcript", "llm.prompt.draw",
}  # fmt: skip
SECTIONS = ("engine.", "tracking.", "llm.lora")  # whose keys have an effect where the section has; `mser sync` reads it


class Case(NamedTuple):
    key: str
    file: int
    says: str  # why it has no effect
    set: str  # words
    vain: str = ""  # more words, with which it has none
    good: str = ""  # and with which it has one
    in_vain: Facts = PLAIN
    at_work: Facts = PLAIN


CASES = [
    Case("data.cache_dir", 1, "remote", "data.cache_dir=a", "", "data.sets=[s3://a]"),
    Case("data.cache_gb", 0, "remote", "data.cache_gb=1", "", "data.sets=[s3://a]"),
    Case("data.weights", 1, "one set", "data.parallel=1", "data.weights=[2]", "data.weights=[2,1] data.sets=a,b"),
    Case("data.bucket", 2, "not bucket", "data.bucket=4", "", "data.batching=bucket"),
    Case("data.tokens", 2, "not tokens", "data.tokens=4 train.micro_batch=1", "", "data.batching=tokens"),
    Case("data.shuffle_shards", 2, "no more shards", "", "data.shuffle_shards=9", "data.shuffle_shards=8"),
    Case("data.parallel", 2, "stage 2", "", "data.parallel=3", "data.parallel=1"),
    Case("data.parallel", 1, "source_id", "data.parallel=3", in_vain=NO_PAIRS),
    Case("data.augment.probability", 1, "are off", "data.augment.probability=1", "", "data.augment.speed=0.1"),
    Case("data.augment.speed", 1, "probability", "data.augment.speed=0.1", "data.augment.probability=0"),
    Case("data.augment.gain_db", 1, "probability", "data.augment.gain_db=3", "data.augment.probability=0"),
    Case("data.augment.noise_snr_db", 1, "probability", "data.augment.noise_snr_db=5,9", "data.augment.probability=0"),
    Case("data.augment.variants", 1, "changes nothing", "data.augment.variants=3", "", "data.augment.speed=0.1"),
    Case("encoder.combine", 1, "one layer", "encoder.combine=concat", "encoder.layers=2", "encoder.layers=all"),
    Case("encoder.cache", 1, "is trained", "encoder.cache=off", "", "encoder.freeze=true"),
    Case("encoder.cache_dir", 0, "neither", "encoder.cache_dir=a", "encoder.cache=off", "encoder.cache=disk"),
    Case("encoder.cache_dir", 1, "is trained", "encoder.cache_dir=a", "", "encoder.freeze=true"),
    Case("encoder.cache_gb", 1, "is trained", "encoder.cache_gb=1", "", "encoder.freeze=true"),
    Case("encoder.cache_gb", 2, "neither", "encoder.cache_gb=1", "encoder.cache=memory", ""),
    Case("data.augment.time_masks", 2, "waveform", "data.augment.time_masks=1", in_vain=WAVEFORM),
    Case("data.augment.freq_masks", 2, "waveform", "data.augment.freq_masks=1", in_vain=WAVEFORM),
    Case("data.augment.time_width", 1, "time_masks", "data.augment.time_width=0.2", "", "data.augment.time_masks=1"),
    Case("data.augment.freq_width", 1, "freq_masks", "data.augment.freq_width=5", "", "data.augment.freq_masks=1"),
    Case("train.epochs", 1, "train.steps", "train.epochs=3", "train.steps=5"),
    Case("train.export", 2, "last step", "train.export=last", "data.val_split=null"),
    Case("train.class_weights", 1, "stage 2", "", "train.class_weights=balanced", "train.class_weights=none"),
    Case("train.label_smoothing", 1, "stage 2", "", "train.label_smoothing=0.1", "train.label_smoothing=0"),
    Case("train.decay", 1, "not wsd", "train.decay=0.3", "", "train.schedule=wsd"),
    Case("train.min_lr", 2, "peak", "train.min_lr=0", "train.schedule=constant"),
    Case("train.schedule", 2, "peak", "train.schedule=linear", "train.min_lr=1"),
    Case("protocol.score", 0, "stage2", "protocol.score=mean", "", "stage2=runs/two"),
    Case("protocol.instructions", 0, "stage2", "protocol.instructions=4", "", "stage2=runs/two"),
    Case("protocol.decode", 0, "stage2", "protocol.decode=constrained", "", "stage2=runs/two"),
    Case("train.val_every", 2, "validation", "train.val_every=5", "data.val_split=null"),
    Case("encoder.pretrained", 1, "init_from", "encoder.pretrained=a", "init_from=b"),
    Case("encoder.allow_missing", 1, "not set", "encoder.allow_missing=[a]", "", "encoder.pretrained=a"),
    Case("encoder.allow_missing", 1, "init_from", "encoder.allow_missing=[a] encoder.pretrained=a", "init_from=b"),
    Case("qformer.feature_dropout", 1, "init_from", "qformer.feature_dropout=0.5", "init_from=b"),
    Case("qformer.dropout", 1, "init_from", "qformer.dropout=0", "init_from=b"),
    Case("contrastive.symmetric", 1, "directions", "contrastive.symmetric=false", "contrastive.loss=siglip"),
    Case("contrastive.symmetric", 1, "alpha", "contrastive.symmetric=false", "contrastive.alpha=0"),
    Case("contrastive.unique_texts", 1, "alpha", "contrastive.unique_texts=true", "contrastive.alpha=0"),
    Case("contrastive.alpha_schedule", 1, "alpha", "contrastive.alpha_schedule=[[0,1]]", "contrastive.alpha=0"),
    Case("contrastive.bias", 1, "siglip", "contrastive.bias=-1", "", "contrastive.loss=siglip"),
    Case("contrastive.bias", 1, "alpha", "contrastive.bias=-1 contrastive.loss=siglip", "contrastive.alpha=0"),
    Case("contrastive.beta", 1, "source_id", "", "", "contrastive.beta=0", NO_PAIRS, NO_PAIRS),
    Case("contrastive.beta_schedule", 1, "beta", "contrastive.beta_schedule=[[0,1]]", "contrastive.beta=0"),
    Case("contrastive.beta_schedule", 1, "source_id", "contrastive.beta_schedule=[[0,1]]", in_vain=NO_PAIRS),
    Case("contrastive.gather", 1, "one rank", "contrastive.gather=ring", in_vain=Facts(ranks=1)),
    Case("contrastive.tile", 1, "one block", "", "contrastive.tile=64", "contrastive.tile=63"),
    Case("zero3", 0, "no stage 2", "zero3=true", "stage2=null", "stage2=a"),
    Case("zero3", 0, "one rank", "zero3=true stage2=a", in_vain=Facts(ranks=1)),
    Case("llm.allow_missing", 2, "not set", "llm.allow_missing=[a]", "", "llm.pretrained=b"),
]


def loaded(folder: Path, file: int, words: list[str]) -> Any:
    path = folder / "run.yaml"
    path.write_text(FILES[file])
    return (load_training if file else load_evaluation)(str(path), words)


@pytest.mark.parametrize("case", CASES, ids=[f"{case.key}, {case.says}" for case in CASES])
def test_a_key_is_told_where_it_has_no_effect_and_only_there(case: Case, tmp_path: Path) -> None:
    vain, good = (loaded(tmp_path, case.file, f"{case.set} {more}".split()) for more in (case.vain, case.good))
    [line] = [line for line in unused_keys(vain, case.in_vain) if line.startswith(f"{case.key}=")]
    assert "has no effect" in line and case.says in line.partition(": ")[2] and "\n" not in line
    assert not [line for line in unused_keys(good, case.at_work) if line.startswith(f"{case.key}=")]


def test_every_rule_has_a_case() -> None:
    for rule in RULES:
        cases = [case for case in CASES if case.key == rule.key and case.says in rule.otherwise]
        assert len(cases) == 1, f"{rule.key}, {rule.otherwise}: no case is of this rule, or several"
    assert len(RULES) == len(CASES)


def test_every_key_has_a_rule_or_always_an_effect() -> None:
    keys = {key for config in (cfg.Stage1, cfg.Stage2, cfg.Evaluation) for key, *_ in key_table(config)}
    listed = {rule.key for rule in RULES} | ALWAYS
    assert {key for key in keys if not key.startswith(SECTIONS)} == listed, "a new key: when does it have an effect?"
    assert not {rule.key for rule in RULES} & ALWAYS


@pytest.mark.parametrize("file", FILES)
def test_a_config_of_defaults_is_not_told_of(file: int, tmp_path: Path) -> None:
    assert unused_keys(loaded(tmp_path, file, []), PLAIN) == []


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_no_preset_sets_a_key_in_vain(name: str) -> None:
    assert unused_keys(load_any(name, []), Facts(parallel_clips="emodb" not in name)) == []
