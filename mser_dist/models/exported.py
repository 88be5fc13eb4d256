"""A finished run's model on disk: ``<run>/export``, in safetensors and Hugging Face format.

- ``export/card.json``: stage, labels, languages trained on, shapes, hashes, the temperature that validation fitted
  (`evaluation.calibration`; null where none could be); written last, so that it means "whole"
- ``export/speech.safetensors``: encoder + Q-Former, what stage 2 takes from stage 1
- ``export/statistics.safetensors``: of the features by corpus, where these are normalised
- ``export/heads.safetensors``: stage 1: projections and scales; stage 2: the projector
- ``export/llm/``: stage 2: the LLM and its tokenizer as `from_pretrained` reads them (LoRA: the adapter)
- ``export/ledger.safetensors``: what was heard in training (`shards.ledger`); older versions kept none
- ``export/README.md``: the card that people, and a model hub, read

What is larger than a shard is several files with an index (`weights`).
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import AutoTokenizer

from mser_dist import __version__, deepspeed_parts
from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.files import file_sha256
from mser_dist.models import pretrained
from mser_dist.models.aligner import Aligner, AlignHeads
from mser_dist.models.attention import Attention
from mser_dist.models.bases import Base
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.models.llm import build_llm, load_llm
from mser_dist.models.normalize import Statistics
from mser_dist.models.speech import SpeechModel, speech_card, speech_from_card
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.models.weights import read_part
from mser_dist.stream.features import Features

STATISTICS = "statistics.safetensors"
NO_HEADS = ("speech.", "llm.", "align.")  # the last help to train, and nothing else
FORMAT = 3  # of an export: raised where an older version could not read what this one writes
WHOLE_FORMAT = 2  # of one whose speech and heads are a file each


def find(run: str, stage: int, key: str = "") -> Path:
    """The export of a finished run, which the config names as `key` (default: stage1 or stage2).

    Raises `UserError` if it is missing, unfinished or of the other stage.
    """
    folder, named = Path(run), f"{key or f'stage{stage}'}={run}"
    if not folder.is_dir():
        raise UserError(f"{named}: there is no such run folder; run `mser train` for stage {stage} first")
    card_file = folder / "export" / "card.json"
    if not card_file.is_file():
        raise UserError(f"{named}: the run has no finished export (no {card_file}): let it train to its end")
    card = read_card(card_file.parent)
    if card["stage"] != stage:
        raise UserError(f"{named}: this is a run of stage {card['stage']}; name a run of stage {stage}")
    return card_file.parent


def read_card(export: Path) -> dict[str, Any]:
    """The card of an export."""
    try:
        card = json.loads((export / "card.json").read_text(encoding="utf-8"))
        _ = card["stage"], card["labels"], card["files"], card["speech"]
        format_of_card, version = int(card.get("format", 1)), card.get("version")  # 0.1.0 wrote no format: it is 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{export / 'card.json'} is not the card of an exported run ({error!r}): export again"
        ) from error
    if format_of_card > FORMAT:
        raise UserError(
            f"{export} was written by mser_dist {version}, and this is {__version__}, which cannot read it: use that "
            "version, or a later one"
        )
    return card


def base_of(export: Path, *beginnings: str) -> Base:
    """The files of an export that begin so, as what frozen parameters are loaded from. Loading it checks their sums."""
    files = read_card(export)["files"]
    return Base(str(export.parent), sums={name: sha for name, sha in files.items() if name.startswith(beginnings)})


def features_of(card: dict[str, Any]) -> Features:
    """What the encoder of an export is fed, by its card."""
    features = Features(**card["speech"]["features"])
    if features.pad_seconds is not None and int(card.get("format", 1)) < 2:
        raise UserError(
            f"the export of version {card.get('version')} was trained with encoder.pad_seconds, its Q-Former looking "
            "at the silence too, which it does no more: train it again"
        )
    return features


def check_files(export: Path, card: dict[str, Any]) -> None:
    """Raise `UserError` unless every file of an export is as its card says."""
    for name, digest in card["files"].items():
        path = export / name
        if not path.is_file() or file_sha256(path) != digest:
            state = "differs from the sum in card.json" if path.is_file() else "is missing"
            raise UserError(f"{path} {state}: the export is damaged; train or copy the run again")


def load_speech(export: Path, attention: Attention, *, mapped: bool = False) -> SpeechModel:
    """Encoder and Q-Former of an export of either stage; the encoder is a part of the model, frozen or not.

    mapped: the weights are the export's files, of which the system reads what is computed with and drops it again; as
    long as there is a model, they have to stay as they are.
    """
    card = read_card(export)
    check_files(export, card)
    features_of(card)
    with _without_weights(mapped):
        speech = speech_from_card(card["speech"], attention)
    _fill(speech, export, "speech", set(speech.state_dict()), mapped)
    if speech.normalize != "none":
        speech.statistics = Statistics.load(export / STATISTICS)
    return speech


def load_frozen(export: Path, attention: Attention) -> FrozenEncoder:
    """The encoder of an export of either stage alone, frozen."""
    speech = load_speech(export, attention)
    speech.freeze_encoder()
    assert speech.frozen is not None
    return speech.frozen


def load_aligner(
    export: Path, attention: Attention, dtype: torch.dtype = torch.float32, *, mapped: bool = False
) -> Aligner:
    """The whole stage-1 model (without its text tower, which `card["text"]` names). mapped: as of `load_speech`."""
    card = read_card(export)
    speech = load_speech(export, attention, mapped=mapped)
    with _without_weights(mapped):
        model = Aligner(speech, card["text_width"], cfg.ContrastiveConfig(**card["contrastive"]))
    return _ready(with_heads(model, export, mapped), card, dtype, mapped)


def load_speech_llm(
    export: Path,
    attention: Attention,
    dtype: torch.dtype = torch.float32,
    *,
    mapped: bool = False,
    zero3: dict[str, Any] | None = None,
) -> tuple[SpeechLLM, Any]:
    """The whole stage-2 model and its tokenizer.

    zero3: as of `pretrained.load`, for the LLM. mapped: as of `load_speech`; the base of adapters then stays in the
    dtype of its files, and a weight is cast when it is computed with. One from a GGUF file is dequantised whole all the
    same.
    """
    card = read_card(export)
    speech = load_speech(export, attention, mapped=mapped)
    folder = export / "llm"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").is_file():
        from peft import PeftModel, get_peft_model_state_dict

        named = cfg.LLMConfig(pretrained=card["llm"])
        base, _ = build_llm(named, card["labels"], attention, zero3, "auto" if mapped else dtype)
        llm = PeftModel.from_pretrained(base, str(folder))
        adapter = load_file(folder / "adapter_model.safetensors")
        pretrained.check_tensors(adapter, get_peft_model_state_dict(llm), str(folder / "adapter_model.safetensors"))
    else:
        llm = load_llm(folder, attention, dtype, zero3)
    with _without_weights(mapped):
        model = SpeechLLM(speech, llm)
    return _ready(with_heads(model, export, mapped), card, dtype, mapped), tokenizer


def with_heads(model: Any, export: Path, mapped: bool = False) -> Any:
    """A model with what an export holds of it beside speech model and LLM: the projector, say."""
    _fill(model, export, "heads", {name for name in model.state_dict() if not name.startswith(NO_HEADS)}, mapped)
    return model


def load_heads(export: Path) -> tuple[AlignHeads, dict[str, Any]]:
    """The heads of a stage-1 export alone, and its card, which names text tower and captions."""
    card = read_card(export)
    check_files(export, card)
    width = card["speech"]["qformer"]["hidden_size"]
    heads = AlignHeads(width, card["text_width"], cfg.ContrastiveConfig(**card["contrastive"]))
    return with_heads(heads, export), card


def _without_weights(mapped: bool) -> Any:
    """Around the making of a model whose weights will be mapped: else they would be drawn first."""
    return init_empty_weights(include_buffers=False) if mapped else nullcontext()


def _fill(model: nn.Module, export: Path, part: str, wanted: set[str], mapped: bool = False) -> None:
    """Load a part that holds just the tensors `wanted` of a model, each of its shape."""
    there: dict[str, Tensor] = {}
    for _, tensors in read_part(export, part):
        there |= tensors  # mapped, not read
    state = {name: tensor for name, tensor in model.state_dict().items() if name in wanted}
    pretrained.check_tensors(there, state, str(export / f"{part}.safetensors"))
    model.load_state_dict(there, strict=False, assign=mapped)


def _ready(model: Any, card: dict[str, Any], dtype: torch.dtype, mapped: bool) -> Any:
    """A model in `dtype` that is evaluated, its encoder frozen if it was in training."""
    (cast_in_use if mapped else cast)(model, dtype).eval()
    if card["speech"].get("frozen"):
        model.speech.freeze_encoder()
    return model


def cast(model: Any, dtype: torch.dtype) -> Any:
    """A model with its floating-point parameters in `dtype`, in place; buffers such as RoPE's frequencies stay fp32."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not deepspeed_parts.is_partitioned(parameter):  # which is in it already
            parameter.data = parameter.data.to(dtype)
    return model


class _Cast(nn.Module):
    """A parametrization: a weight in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def cast_in_use(model: Any, dtype: torch.dtype) -> Any:
    """The same for a model that is evaluated, one weight at a time, whenever something is computed with it."""
    for module in [*model.modules()]:
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if parameter.is_floating_point() and parameter.dtype != dtype:
                register_parametrization(module, name, _Cast(dtype), unsafe=True)  # which may change the dtype
    return model


def aligner_card(model: Aligner) -> dict[str, Any]:
    """Shape of a stage-1 model as JSON."""
    from dataclasses import asdict

    return {"speech": speech_card(model.speech), "contrastive": asdict(model.config)}


def speech_llm_card(model: SpeechLLM, name: str | None) -> dict[str, Any]:
    """Shape of a stage-2 model as JSON; `name` is of the LLM it came from."""
    return {"speech": speech_card(model.speech), "llm": name}
