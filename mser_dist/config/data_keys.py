"""Keys that say which clips a run reads, and how they are batched and changed."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mser_dist.config.fields import (
    Bool,
    Float,
    List,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    must,
    opt,
)
from mser_dist.errors import UserError

SIX_EMOTIONS = ["anger", "disgust", "fear", "happy", "neutral", "sad"]


def _are_labels(labels: list[str]) -> bool:
    return len(set(labels)) == len(labels) >= 2


def _is_range(bounds: list[float]) -> bool:
    return not bounds or (len(bounds) == 2 and bounds[0] <= bounds[1])


def _splits(value: Any) -> Any:
    """`a,b` on the command line is a list; a list of one is that one, so that both are the same config."""
    listed = value.split(",") if isinstance(value, str) and "," in value else value
    return listed[0] if isinstance(listed, list) and len(listed) == 1 else listed


def _are_splits(value: str | list[str]) -> bool:
    return isinstance(value, str) or (len(set(value)) == len(value) >= 2 and ALL not in value)


ALL = "all"  # of the splits
Splits = Annotated[
    str | list[str], BeforeValidator(_splits), must("must be a split, all, or different splits", _are_splits)
]


@dataclass(kw_only=True)
class DataConfig(Section):
    """Which clips of which sets."""

    sets: List[str] = opt(
        [], "folders of shards, as `mser pack` or `mser synth` wrote them, or URLs (s3://, hf://, http://)"
    )
    split: Splits = opt("test", "split to evaluate on, a list of them, or all")
    languages: List[str] = opt([], "keep only these languages; empty: all")
    labels: Annotated[List[str], must("must be two or more different labels", _are_labels)] = opt(
        SIX_EMOTIONS, "the emotions to tell apart, in order; clips of other labels are dropped"
    )
    keep: dict[str, Any] = opt({}, "keep only clips with these values, e.g. {corpus: [emodb], duration: [0.5, 20]}")
    drop: dict[str, Any] = opt(
        {}, "leave out clips with one of these values, e.g. {speaker: ['03', '08']} or {corpus/speaker: [emodb/03]}"
    )
    max_seconds: PositiveFloat = opt(
        30.0, "a longer clip is an error that names it (drop it by keep={duration: [0, 30]})"
    )
    workers: NonNegativeInt = opt(2, "decoding processes per rank; 0: decode in the main process")
    max_bad: NonNegativeInt = opt(0, "damaged clips that are replaced by others, and named, before the run stops")
    cache_dir: str | None = opt(None, "local copies of remote shards; null: MSER_CACHE, else ~/.cache/mser_dist/shards")
    cache_gb: PositiveFloat = opt(100.0, "bound on cache_dir; the shards used longest ago make room")

    def check(self) -> None:
        """Raise `UserError` on values that no set of clips can have."""
        if self.languages and "language" in self.keep:
            raise UserError("data.languages and data.keep.language both say which languages to keep: keep one of them")
        if not self.sets:
            raise UserError("data.sets is empty: name at least one folder of shards (see `mser pack --help`)")


@dataclass(kw_only=True)
class AugmentConfig(Section):
    """Random changes of the training clips, seeded by (run, epoch, batch, clip): a resume repeats them."""

    probability: Share = opt(0.5, "of each of speed, gain and noise, clip by clip")
    speed: Annotated[Float, Field(ge=0, le=0.5)] = opt(
        0.0, "faster or slower by a factor within 1 ± this, e.g. 0.1 (moves the pitch too); 0: off"
    )
    gain_db: NonNegativeFloat = opt(0.0, "louder or softer by up to this many dB; 0: off")
    noise_snr_db: Annotated[List[Float], must("is [lowest, highest] in dB", _is_range)] = opt(
        [], "white noise at a ratio drawn from [lowest, highest] dB; []: off"
    )
    variants: NonNegativeInt = opt(
        0, "so many changed versions of each clip, which are the same in every run and epoch; 0: new ones each time"
    )
    time_masks: NonNegativeInt = opt(
        0, "SpecAugment (arXiv 1904.08779): stretches of frames set to the clip's mean; log-mel only"
    )
    time_width: Annotated[Float, Field(gt=0, le=1)] = opt(0.1, "longest stretch, as a share of the clip")
    freq_masks: NonNegativeInt = opt(0, "SpecAugment: bands of mel bins set to the clip's mean; log-mel only")
    freq_width: NonNegativeInt = opt(10, "widest band, in mel bins")

    @property
    def on(self) -> bool:
        return bool(self.speed or self.gain_db or self.noise_snr_db or self.time_masks or self.freq_masks)


@dataclass(kw_only=True)
class TrainingDataConfig(DataConfig):
    split: Splits = opt("train", "split to train on, a list of them, or all")
    val_split: Splits | None = opt("val", "split, or splits, for validation during training; null: none")
    weights: List[PositiveFloat] = opt(
        [], "shares of `sets` in every batch, in their order, e.g. [2, 1]; []: by their sizes"
    )
    batching: Literal["shuffle", "bucket", "tokens"] = opt(
        "shuffle", "shuffle | bucket (clips of like length together) | tokens (packs of `tokens`)"
    )
    bucket: PositiveInt = opt(16, "batching=bucket: so many global batches are sorted by length together")
    tokens: PositiveInt = opt(
        8192,
        "batching=tokens: a micro-batch's encoder steps (20 ms) with its padding, at most; global_batch counts packs",
    )
    shuffle_shards: NonNegativeInt | None = opt(
        None,
        "shuffle within so many shards at a time; 0: all; null: 64 of a remote set, or of more than 128 shards, where "
        "nothing else decides the order",
    )
    balance: List[str] | None = opt(
        None,
        "fields that every global batch holds in equal parts, e.g. [label, language]; []: none; null: those two in "
        "stage 1 where the loss knows labels and the set can fill such batches, else none",
    )
    parallel: PositiveInt = opt(
        2, "stage 1: so many clips of one source_id stay side by side in a batch (1: plain shuffle)"
    )
    shuffle_labels: Bool = opt(False, "control: training labels dealt out at random; accuracy must fall to chance")
    augment: AugmentConfig = opt(AugmentConfig, "random changes of the clips")

    def check(self) -> None:
        super().check()
        held_out = {self.val_split} if isinstance(self.val_split, str) else set(self.val_split or ())
        if held_out and (self.split == ALL or (isinstance(self.split, list) and held_out & set(self.split))):
            raise UserError(
                f"data.split={self.split} trains on the clips that data.val_split={self.val_split} validates on: set "
                "data.val_split=null, or leave them out of data.split"
            )
        if self.weights and len(self.weights) != len(self.sets):
            raise UserError(
                f"data.weights has {len(self.weights)} numbers for {len(self.sets)} data.sets: one above 0 for each"
            )
        if self.weights and self.balance:
            raise UserError("data.weights and data.balance both decide the shares of a batch: keep one of them")
        if self.balance and self.batching != "shuffle":
            raise UserError(f"data.balance needs data.batching=shuffle, not {self.batching}")
        if self.weights and self.batching == "bucket":
            raise UserError("data.weights cannot hold with data.batching=bucket, which sorts clips over many batches")
        if self.shuffle_shards and (self.balance or self.weights):
            raise UserError("data.shuffle_shards reads shard after shard, so it goes with neither balance nor weights")
