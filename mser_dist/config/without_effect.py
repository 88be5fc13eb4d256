"""Keys that a run would not look at: set by somebody who expects something of them, they are told when it starts.

What contradicts itself is refused in the `check` methods; here stands what runs as well without the key.
"""

from collections.abc import Callable
from dataclasses import MISSING
from functools import reduce
from typing import Any, NamedTuple

from mser_dist.config.fields import keys_of


class Facts(NamedTuple):
    """What else than the config decides."""

    ranks: int = 1
    shards: int = 1  # of the training split
    parallel_clips: bool = True  # some clips share a source_id
    log_mel: bool = True  # what the encoder is fed, and not the waveform


class Rule(NamedTuple):
    key: str
    works: Callable[[Any, Facts], bool]  # (config, facts): whether the key has an effect
    otherwise: str  # why it has none
    by_default: bool = False  # told also where the key has its default


def _waveform_changes(config: Any, facts: Facts) -> bool:
    augment = config.data.augment
    return bool(augment.speed or augment.gain_db or augment.noise_snr_db)


def _applied(config: Any, facts: Facts) -> bool:
    return bool(config.data.augment.probability)


def _emotion_term(config: Any, facts: Facts) -> bool:
    return bool(config.contrastive.alpha)


def _columns(config: Any, facts: Facts) -> float:
    """Columns that a row is compared with at a time."""
    return config.train.global_batch / (facts.ranks if config.contrastive.gather == "ring" else 1)


def _frozen(config: Any, facts: Facts) -> bool:
    """Whether the encoder is; one that is evaluated may be."""
    return bool(getattr(config, "freeze_encoder", getattr(config.encoder, "freeze", True)))


def _on_disk(config: Any, facts: Facts) -> bool:
    return config.encoder.cache in ("auto", "disk")


_LOCAL = "no set of data.sets is remote"
_NEVER = "data.augment.probability is 0"
_NO_EMOTION_TERM = "contrastive.alpha is 0"
_NO_PARALLEL = "no two clips of the set share a source_id"
_TRAINED = "the encoder is trained, so that its features change"
_ONE_LAYER = "encoder.layers names one layer"
_NO_DISK = "encoder.cache is neither auto nor disk"
_STAGE_2 = "the loss of stage 2 alone knows it"
_NO_LLM = "stage2 is not set, and only an LLM is asked"
_INIT = "init_from brings the encoder and the Q-Former"
RULES = (
    Rule("data.cache_dir", lambda c, f: any("://" in name for name in c.data.sets), _LOCAL),
    Rule("data.cache_gb", lambda c, f: any("://" in name for name in c.data.sets), _LOCAL),
    Rule("data.weights", lambda c, f: len(c.data.sets) > 1, "one set has the whole of each batch"),
    Rule("data.bucket", lambda c, f: c.data.batching == "bucket", "data.batching is not bucket"),
    Rule("data.tokens", lambda c, f: c.data.batching == "tokens", "data.batching is not tokens"),
    Rule("data.shuffle_shards", lambda c, f: c.data.shuffle_shards < f.shards, "the set has no more shards than that"),
    Rule("data.parallel", lambda c, f: c.data.parallel == 1 or c.stage == 1, "stage 2 keeps no clips together"),
    Rule("data.parallel", lambda c, f: c.data.parallel == 1 or c.stage == 2 or f.parallel_clips, _NO_PARALLEL),
    Rule("data.augment.probability", _waveform_changes, "speed, gain_db and noise_snr_db are off"),
    Rule("data.augment.speed", _applied, _NEVER),
    Rule("data.augment.gain_db", _applied, _NEVER),
    Rule("data.augment.noise_snr_db", _applied, _NEVER),
    Rule("data.augment.variants", lambda c, f: c.data.augment.on, "data.augment changes nothing"),
    Rule("data.augment.time_masks", lambda c, f: f.log_mel, "the encoder hears the waveform"),
    Rule("data.augment.freq_masks", lambda c, f: f.log_mel, "the encoder hears the waveform"),
    Rule("data.augment.time_width", lambda c, f: c.data.augment.time_masks > 0, "data.augment.time_masks is 0"),
    Rule("data.augment.freq_width", lambda c, f: c.data.augment.freq_masks > 0, "data.augment.freq_masks is 0"),
    Rule("train.epochs", lambda c, f: c.train.steps is None, "train.steps says how long the training is"),
    Rule("train.decay", lambda c, f: c.train.schedule == "wsd", "train.schedule is not wsd"),
    Rule("train.min_lr", lambda c, f: c.train.schedule != "constant", "train.schedule=constant stays at the peak"),
    Rule("train.schedule", lambda c, f: c.train.min_lr < 1, "with train.min_lr=1 the learning rate stays at its peak"),
    Rule("train.val_every", lambda c, f: c.data.val_split is not None, "data.val_split=null: there is no validation"),
    Rule("train.export", lambda c, f: c.data.val_split is not None, "data.val_split=null: the last step is exported"),
    Rule("train.class_weights", lambda c, f: c.stage == 2, _STAGE_2),
    Rule("train.label_smoothing", lambda c, f: c.stage == 2, _STAGE_2),
    Rule("encoder.cache", _frozen, _TRAINED),
    Rule("encoder.cache_dir", _frozen, _TRAINED),
    Rule("encoder.cache_dir", _on_disk, _NO_DISK),
    Rule("encoder.cache_gb", _frozen, _TRAINED),
    Rule("encoder.cache_gb", _on_disk, _NO_DISK),
    Rule("encoder.combine", lambda c, f: c.encoder.layers != "last" and len(c.encoder.layers) > 1, _ONE_LAYER),
    Rule("encoder.pretrained", lambda c, f: c.init_from is None, _INIT),
    Rule("encoder.allow_missing", lambda c, f: c.encoder.pretrained is not None, "encoder.pretrained is not set"),
    Rule("encoder.allow_missing", lambda c, f: c.init_from is None, _INIT),
    Rule("qformer.dropout", lambda c, f: c.init_from is None, _INIT),
    Rule("qformer.feature_dropout", lambda c, f: c.init_from is None, _INIT),
    Rule("contrastive.symmetric", lambda c, f: c.contrastive.loss != "siglip", "siglip has no directions"),
    Rule("contrastive.symmetric", _emotion_term, _NO_EMOTION_TERM),
    Rule("contrastive.unique_texts", _emotion_term, _NO_EMOTION_TERM),
    Rule("contrastive.alpha_schedule", _emotion_term, _NO_EMOTION_TERM),
    Rule("contrastive.bias", lambda c, f: c.contrastive.loss == "siglip", "contrastive.loss is not siglip"),
    Rule("contrastive.bias", _emotion_term, _NO_EMOTION_TERM),
    Rule("contrastive.beta", lambda c, f: c.contrastive.beta == 0 or f.parallel_clips, _NO_PARALLEL, by_default=True),
    Rule("contrastive.beta_schedule", lambda c, f: c.contrastive.beta > 0, "contrastive.beta is 0"),
    Rule("contrastive.beta_schedule", lambda c, f: f.parallel_clips, _NO_PARALLEL),
    Rule("contrastive.gather", lambda c, f: f.ranks > 1, "there is one rank"),
    Rule("contrastive.tile", lambda c, f: c.contrastive.tile < _columns(c, f), "a batch fits one block"),
    Rule("zero3", lambda c, f: bool(c.stage2), "no stage 2 is evaluated"),
    Rule("zero3", lambda c, f: f.ranks > 1, "there is one rank"),
    Rule("protocol.score", lambda c, f: c.stage2 is not None, _NO_LLM),
    Rule("protocol.instructions", lambda c, f: c.stage2 is not None, _NO_LLM),
    Rule("protocol.decode", lambda c, f: c.stage2 is not None, _NO_LLM),
    Rule("llm.allow_missing", lambda c, f: c.llm.pretrained is not None, "llm.pretrained is not set"),
)


def unused_keys(config: Any, facts: Facts) -> list[str]:
    """A sentence for each key of a checked config that is set away from its default and changes nothing."""
    fields = keys_of(type(config))
    found: dict[str, str] = {}  # of several reasons the first
    for rule in RULES:
        if rule.key in fields and rule.key not in found:
            field, value = fields[rule.key], reduce(getattr, rule.key.split("."), config)
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if (rule.by_default or value != default) and not rule.works(config, facts):
                found[rule.key] = f"{rule.key}={value} has no effect: {rule.otherwise}"
    return list(found.values())
