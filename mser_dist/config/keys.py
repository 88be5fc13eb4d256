"""The typed configuration of a run: what can be set, its default, and what it means.

One class per command: :class:`Stage1` and :class:`Stage2` for ``mser train``; those of what is trained already are in
``evaluation_keys.py``.
Precedence: the defaults here < the YAML file < ``key=value`` on the command line (see ``file.py``). What one key may be
is its type, which pydantic holds it to; rules between keys are the ``check`` methods.
Nothing here imports torch, so that a config typo answers at once.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mser_dist.config.data_keys import TrainingDataConfig
from mser_dist.config.fields import (
    Bool,
    Float,
    Int,
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
from mser_dist.config.model_keys import (
    CacheConfig,
    ContrastiveConfig,
    EncoderConfig,
    LLMConfig,
    QFormerConfig,
    TextConfig,
)
from mser_dist.config.validate import check_values
from mser_dist.errors import UserError

Dtype = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
Kernel = Literal[
    "auto",
    "flash_attention_2",
    "flash_attention_3",
    "kernels-community/flash-attn2",  # of the hub, by the `kernels` package
    "kernels-community/vllm-flash-attn3",
    "sdpa",
    "eager",
]


def _are_betas(betas: list[float]) -> bool:
    return len(betas) == 2 and all(0 <= beta < 1 for beta in betas)


def _is_pattern(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return bool(pattern)


@dataclass(kw_only=True)
class GroupConfig(Section):
    """How the parameters are trained whose name a pattern is found in. A key that is null is train's."""

    match: Annotated[str, must("must be a regular expression", _is_pattern)] = opt(
        "", "regular expression that is searched in a parameter's name"
    )
    lr: PositiveFloat | None = opt(None, "peak learning rate")
    weight_decay: NonNegativeFloat | None = opt(None, "weight decay, of biases and norms too")
    freeze: Bool = opt(False, "do not train them")


def _span(value: Any) -> Any:
    """`10-12` is [10, 12], and `10` is [10, 10]."""
    if isinstance(value, str) and re.fullmatch(r"\d+(-\d+)?", value):
        value = [int(number) for number in value.split("-")]
    ends = value if isinstance(value, list) else [value]
    return 2 * ends if len(ends) == 1 else ends


def _is_span(ends: list[int]) -> bool:
    return not ends or (len(ends) == 2 and ends[0] <= ends[1])


Span = Annotated[
    list[PositiveInt], BeforeValidator(_span), must("is a first and a last step, e.g. 10-12, or []", _is_span)
]


@dataclass(kw_only=True)
class TrainConfig(Section):
    global_batch: PositiveInt = opt(
        64, "clips per optimizer step, over all ranks; the numbers mean the same on any cluster"
    )
    micro_batch: PositiveInt | None = opt(
        None,
        "clips per rank and forward pass at most, as memory allows; null: global_batch / world size. Stage 1 contrasts "
        "the whole global batch all the same (gradient caching)",
    )
    epochs: PositiveFloat = opt(10.0, "passes over the training split (ignored when `steps` is set)")
    steps: PositiveInt | None = opt(None, "optimizer steps")
    lr: PositiveFloat = opt(1e-3, "peak learning rate (AdamW)")
    weight_decay: NonNegativeFloat = opt(
        0.01, "AdamW weight decay; not on biases, norms, embeddings of queries and scales"
    )
    groups: List[GroupConfig] = opt(
        [],
        "settings of their own for some parameters, by name: [{match: regex, lr, weight_decay, freeze}], e.g. "
        "[{match: '^llm', lr: 1e-5}, {match: embed_tokens, freeze: true}]",
    )
    betas: Annotated[List[Float], must("must be two numbers from 0 to below 1", _are_betas)] = opt(
        [0.9, 0.98], "AdamW betas"
    )
    schedule: Schedule = opt(
        "cosine",
        "learning rate behind the warm-up: cosine or linear down to min_lr, constant, or wsd (warm-up, stable, decay)",
    )
    warmup: Share = opt(0.05, "share of the steps with a linearly rising learning rate")
    decay: Share = opt(0.2, "schedule=wsd: share of the steps, the last ones, in which it falls to min_lr")
    min_lr: Share = opt(0.05, "where the schedule ends, as a share of the peak; constant stays at the peak")
    grad_clip: NonNegativeFloat = opt(1.0, "clip the global gradient norm; 0: off")
    log_every: PositiveInt = opt(5, "steps between logged points")
    val_every: NonNegativeInt = opt(0, "steps between validations; 0: only at the end")
    save_every: NonNegativeInt = opt(
        0, "steps between checkpoints, besides the end, a stop, save_minutes and save_best; 0: off"
    )
    save_minutes: NonNegativeFloat = opt(0.0, "minutes between checkpoints, besides save_every; 0: off")
    save_best: Bool = opt(True, "save also where the validation UA is the best so far, so that it can be kept")
    keep: PositiveInt = opt(2, "newest checkpoints kept; the one with the best validation UA is kept besides")
    background_save: Bool = opt(True, "write checkpoints while training goes on; takes memory for a copy of the state")
    fork: str | None = opt(
        None,
        "RUN@STEP, RUN@best or RUN (its newest): a new run begins with weights, optimizer and position of a checkpoint "
        "of another one; steps and epochs count from that one's first step",
    )
    class_weights: Literal["none", "balanced"] | dict[str, PositiveFloat] = opt(
        "none",
        "stage 2: weights of the clips' answer tokens in the loss by label: none | balanced (a rare label counts as "
        "much as a frequent one) | {label: weight}, 1 for those not named",
    )
    label_smoothing: Annotated[Float, Field(ge=0, lt=1)] = opt(
        0.0, "stage 2: share of a token's probability that is wanted of the whole vocabulary, in equal parts; 0: off"
    )
    ema: Annotated[Float, Field(ge=0, lt=1)] = opt(
        0.0, "validate and export an exponential average of the weights with this decay, e.g. 0.999; 0: off"
    )
    patience: NonNegativeInt = opt(0, "validations in a row without a better UA, before the run ends by itself; 0: off")
    export: Literal["best", "last"] = opt(
        "best", "the step whose weights are exported: best (of the validated ones that are kept) | last"
    )
    trust_checkpoints: Bool = opt(False, "resume also from a folder that others own or may write to")
    profile_steps: Span = opt([], "first and last step of a torch profiler's trace of rank 0, e.g. 10-12; []: none")
    max_skipped: NonNegativeInt = opt(
        10, "steps in a row with a loss or gradient that is not finite, before the run ends"
    )


@dataclass(kw_only=True)
class EngineConfig(Section):
    deepspeed: str = opt("cpu", "DeepSpeed JSON: a path, or a name in ds_configs/")
    dtype: Dtype = opt("float32", "number format that the models compute in")
    attention: Kernel = opt("auto", "attention kernel; auto: the fastest that runs here")
    peak_tflops: PositiveFloat | None = opt(
        None, "dense TFLOP/s of a GPU in this dtype, for MFU and HFU; null: by its name, where it is known"
    )
    timeout_minutes: PositiveFloat = opt(30.0, "a collective that takes longer ends the job: a peer is stuck")
    peer_seconds: PositiveFloat = opt(
        120.0, "a rank without a sign of life for so long is dead or frozen: the job ends"
    )


@dataclass(kw_only=True)
class TrackingConfig(Section):
    experiment: str = opt("mser", "MLflow experiment")
    uri: str | None = opt(
        None,
        "MLflow tracking URI; null: MLFLOW_TRACKING_URI, else mlflow.db in the folder `runs` above the run folder, or "
        "beside the run folder",
    )
    run_name: str | None = opt(None, "name of the MLflow run; null: the run folder's name")
    enabled: Bool = opt(True, "log to MLflow; the JSONL log in the run folder is always written")
    parent: str | None = opt(
        None, "MLflow run that this one is a part of, e.g. a sweep's (`mser sweep` sets it): its id or run folder"
    )
    model: Literal["link", "copy", "off"] = opt(
        "link",
        "what MLflow gets of a trained model, for `mlflow models serve` and models:/name@alias: where its export is "
        "(link), the export itself (copy), or nothing",
    )
    register: str | None = opt(
        None, "register the trained model in MLflow, as NAME or NAME@ALIAS; the alias then is of this run's"
    )

    def check(self) -> None:
        if self.register is not None:
            if not re.fullmatch(r"[^@/:]+(@[^@/:]+)?", self.register):
                raise UserError(f"tracking.register={self.register}: give it as NAME or NAME@ALIAS, without / and :")
            if self.model == "off":
                raise UserError("tracking.register needs a model to register: set tracking.model to link or copy")
        if self.uri and re.search(r"//[^/]*:[^/]*@|(?i:[?&;](?:password|passwd|pwd|token|secret)=)", self.uri):
            raise UserError(
                "tracking.uri holds a password, and config.yaml keeps every key: leave it out, and export "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI for a database"
            )


@dataclass(kw_only=True)
class Common(Section):
    """What both stages share. A run is one folder."""

    stage: Int
    out: str = opt("runs/run", "run folder: config, log, checkpoints, exported model")
    seed: NonNegativeInt = opt(0, "seed of initialisation, order, captions and dropout")
    data: TrainingDataConfig = opt(TrainingDataConfig, "what to train on")
    train: TrainConfig = opt(TrainConfig, "batch, length, optimizer")
    engine: EngineConfig = opt(EngineConfig, "DeepSpeed, dtype, attention kernel")
    tracking: TrackingConfig = opt(TrackingConfig, "MLflow")

    def check(self) -> None:
        """Raise `UserError` on wrong and on contradictory values, before anything heavy is imported."""
        check_values(self)
        self.data.check()
        if self.data.batching == "tokens" and (self.stage == 1 or self.train.micro_batch != 1):
            raise UserError(
                "data.batching=tokens makes each pack, of any number of clips, a micro-batch: it is for stage 2, with "
                "train.micro_batch=1 and train.global_batch in packs"
            )
        train = self.train
        if train.schedule == "wsd" and train.warmup + train.decay > 1:
            raise UserError(
                f"train.warmup={train.warmup:g} and train.decay={train.decay:g} are more than all steps together: "
                "lower one of them"
            )
        if train.patience and not (train.val_every and self.data.val_split):
            raise UserError(
                f"train.patience={train.patience} counts validations: set train.val_every and data.val_split"
            )
        named = train.class_weights if isinstance(train.class_weights, dict) else {}
        if strange := sorted(set(named) - set(self.data.labels)):
            raise UserError(
                f"train.class_weights names {strange[0]}, which is none of data.labels ({', '.join(self.data.labels)})"
            )
        self.tracking.check()


def _can_be_kept(encoder: CacheConfig, frozen: bool, key: str) -> None:
    if encoder.cache in ("disk", "memory") and not frozen:
        raise UserError(
            f"encoder.cache={encoder.cache} keeps the features of an encoder, and this one is trained, so that they "
            f"change: set {key}=true, or encoder.cache=auto"
        )


@dataclass(kw_only=True)
class Stage1(Common):
    """Align a speech encoder with emotion-aware language by contrastive learning over all ranks."""

    stage: Int = opt(1, "1: align")
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
        _can_be_kept(self.encoder, self.encoder.freeze, "encoder.freeze")
        if self.encoder.normalize != "none" and not self.encoder.freeze:
            raise UserError(
                f"encoder.normalize={self.encoder.normalize} is by statistics of a frozen encoder's features: set "
                "encoder.freeze=true"
            )
        if self.encoder.pretrained and self.encoder.arch:
            raise UserError("encoder.pretrained and encoder.arch are both set: keep one of them")


@dataclass(kw_only=True)
class Stage2(Common):
    """Teach a whole LLM to name the emotion from the speech tokens of a stage-1 model."""

    stage: Int = opt(2, "2: instruct")
    stage1: str = opt("", "run folder of the stage 1 to build on")
    init_from: str | None = opt(
        None,
        "run folder of another stage 2 to start from, its speech model, projector and LLM or adapters; or a folder of "
        "peft's adapters, with llm.lora",
    )
    freeze_encoder: Bool = opt(True, "do not train the speech encoder")
    encoder: CacheConfig = opt(CacheConfig, "where the features of stage 1's encoder are kept; all else it brings")
    freeze_qformer: Bool = opt(False, "do not train the Q-Former")
    align: NonNegativeFloat = opt(
        0.0, "weight of stage 1's loss, of each micro-batch over all ranks, beside that of the answers; 0: without"
    )
    llm: LLMConfig = opt(LLMConfig, "the LLM")

    def check(self) -> None:
        super().check()
        _can_be_kept(self.encoder, self.freeze_encoder, "freeze_encoder")
        if not self.stage1:
            raise UserError(
                "stage1 is not set: name the run folder of a finished stage 1, e.g. stage1=runs/demo/stage1"
            )
        if self.align and self.freeze_encoder and self.freeze_qformer:
            raise UserError(
                f"align={self.align:g} trains what hears, and freeze_encoder and freeze_qformer leave nothing of it to "
                "train: set freeze_qformer=false, or align=0"
            )
        if self.llm.pretrained and self.llm.arch:
            raise UserError("llm.pretrained and llm.arch are both set: keep one of them")
        if self.llm.lora and not self.llm.pretrained:
            raise UserError("llm.lora needs llm.pretrained: an LLM made on the spot has nothing to adapt")
        if self.llm.allow_missing and self.llm.lora:
            raise UserError("llm.allow_missing and llm.lora are both set: LoRA neither trains nor exports new weights")
        if self.llm.freeze and self.llm.lora:
            raise UserError("llm.freeze and llm.lora are both set: LoRA trains adapters, so drop llm.freeze")


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
