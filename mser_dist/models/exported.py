"""A finished run's model on disk: ``<run>/export``, in safetensors and Hugging Face format.

- ``export/card.json``: stage, labels, languages trained on, shapes, hashes; written last, so that it means "whole"
- ``export/speech.safetensors``: encoder + Q-Former, what stage 2 takes from stage 1
- ``export/statistics.safetensors``: of the features by corpus, where these are normalised
- ``export/heads.safetensors``: stage 1: projections and scales; stage 2: the projector
- ``export/llm/``: stage 2: the LLM and its tokenizer as `from_pretrained` reads them (LoRA: the adapter)
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from mser_dist import __version__
from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.files import file_sha256, fsync_tree, write_json
from mser_dist.models import pretrained
from mser_dist.models.aligner import Aligner
from mser_dist.models.attention import Attention
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.models.llm import build_llm, load_llm
from mser_dist.models.normalize import Statistics
from mser_dist.models.speech import SpeechModel, speech_card, speech_from_card
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.stream.features import Features

STATISTICS = "statistics.safetensors"
FORMAT = 2  # of an export: raised where an older version could not read what this one writes


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


def features_of(card: dict[str, Any]) -> Features:
    """What the encoder of an export is fed, by its card."""
    features = Features(**card["speech"]["features"])
    if features.pad_seconds is not None and int(card.get("format", 1)) < 2:
        raise UserError(
            f"the export of version {card.get('version')} was trained with encoder.pad_seconds, its Q-Former looking "
            "at the silence too, which it does no more: train it again"
        )
    return features


def write(
    export: Path, model: nn.Module, state: dict[str, Tensor], card: dict[str, Any], tokenizer: Any = None
) -> None:
    """Publish an export at once: all files under a staging name, then one rename.

    `state` is the whole trained model's state by name, on the CPU; `model` gives shapes and LLM config, its own weights
    may be partitioned, and its frozen encoder, which is not in `state`.
    """
    speech: Any = model.speech
    frozen: FrozenEncoder | None = speech.frozen
    if frozen is not None:
        kept = {name: t.detach().cpu().contiguous() for name, t in frozen.encoder.state_dict().items()}
        state = {**state, **{f"speech.encoder.{name}": tensor for name, tensor in kept.items()}}
    staging = export.with_name(export.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        parts: dict[str, dict[str, Tensor]] = {"speech": {}, "heads": {}, "llm": {}}
        for name, tensor in state.items():
            head, _, rest = name.partition(".")
            if head in ("speech", "llm"):
                parts[head][rest] = tensor
            else:
                parts["heads"][name] = tensor
        if speech.statistics is not None:
            speech.statistics.without_speakers().save(staging / STATISTICS)
        for part in ("speech", "heads"):
            save_file(parts[part], staging / f"{part}.safetensors")
        if isinstance(model, SpeechLLM):
            _write_llm(staging / "llm", model.llm, parts["llm"])
            tokenizer.save_pretrained(staging / "llm")
        files = {str(p.relative_to(staging)): file_sha256(p) for p in sorted(staging.rglob("*")) if p.is_file()}
        write_json(staging / "card.json", {"format": FORMAT, "version": __version__, **card, "files": files})
        fsync_tree(staging)
        shutil.rmtree(export, ignore_errors=True)
        staging.rename(export)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"cannot write the export to {export}: {error}; free space and start again") from error


def _write_llm(folder: Path, llm: Any, state: dict[str, Tensor]) -> None:
    if hasattr(llm, "peft_config"):
        from peft import get_peft_model_state_dict

        folder.mkdir()
        llm.peft_config["default"].save_pretrained(str(folder))
        adapter = get_peft_model_state_dict(llm, state_dict=state)
        save_file({k: v.contiguous() for k, v in adapter.items()}, folder / "adapter_model.safetensors")
    else:
        llm.save_pretrained(folder, state_dict=state)


def _checked(export: Path, card: dict[str, Any]) -> None:
    for name, digest in card["files"].items():
        path = export / name
        if not path.is_file() or file_sha256(path) != digest:
            state = "differs from the sum in card.json" if path.is_file() else "is missing"
            raise UserError(f"{path} {state}: the export is damaged; train or copy the run again")


def load_speech(export: Path, attention: Attention) -> SpeechModel:
    """Encoder and Q-Former of an export of either stage; the encoder is a part of the model, frozen or not."""
    card = read_card(export)
    _checked(export, card)
    features_of(card)
    speech = speech_from_card(card["speech"], attention)
    _fill(speech, export / "speech.safetensors", set(speech.state_dict()))
    if speech.normalize != "none":
        speech.statistics = Statistics.load(export / STATISTICS)
    return speech


def load_frozen(export: Path, attention: Attention) -> FrozenEncoder:
    """The encoder of an export of either stage alone, frozen."""
    speech = load_speech(export, attention)
    speech.freeze_encoder()
    assert speech.frozen is not None
    return speech.frozen


def load_aligner(export: Path, attention: Attention, dtype: torch.dtype = torch.float32) -> Aligner:
    """The whole stage-1 model (without its text tower, which `card["text"]` names)."""
    card = read_card(export)
    model = Aligner(load_speech(export, attention), card["text_width"], cfg.ContrastiveConfig(**card["contrastive"]))
    return _ready(_with_heads(model, export), card, dtype)


def load_speech_llm(export: Path, attention: Attention, dtype: torch.dtype = torch.float32) -> tuple[SpeechLLM, Any]:
    """The whole stage-2 model and its tokenizer."""
    card = read_card(export)
    speech = load_speech(export, attention)
    folder = export / "llm"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").is_file():
        from peft import PeftModel, get_peft_model_state_dict

        base, _ = build_llm(cfg.LLMConfig(pretrained=card["llm"]), card["labels"], attention)
        llm = PeftModel.from_pretrained(base, str(folder))
        adapter = load_file(folder / "adapter_model.safetensors")
        pretrained.check_tensors(adapter, get_peft_model_state_dict(llm), str(folder / "adapter_model.safetensors"))
    else:
        llm = load_llm(folder, attention, dtype)
    model = _with_heads(SpeechLLM(speech, llm), export)
    return _ready(model, card, dtype), tokenizer


def _with_heads(model: Any, export: Path) -> Any:
    heads = {name for name in model.state_dict() if not name.startswith(("speech.", "llm."))}
    _fill(model, export / "heads.safetensors", heads)
    return model


def _fill(model: nn.Module, file: Path, wanted: set[str]) -> None:
    """Load a file that holds just the tensors `wanted` of a model, each of its shape."""
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}): train or copy the run again") from error
    pretrained.check_tensors(tensors, {name: t for name, t in model.state_dict().items() if name in wanted}, str(file))
    model.load_state_dict(tensors, strict=False)


def _ready(model: Any, card: dict[str, Any], dtype: torch.dtype) -> Any:
    """A model in `dtype` that is evaluated, its encoder frozen if it was in training."""
    cast(model, dtype).eval()
    if card["speech"].get("frozen"):
        model.speech.freeze_encoder()
    return model


def cast(model: Any, dtype: torch.dtype) -> Any:
    """A model with its floating-point parameters in `dtype`, in place; buffers such as RoPE's frequencies stay fp32."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def aligner_card(model: Aligner) -> dict[str, Any]:
    """Shape of a stage-1 model as JSON."""
    from dataclasses import asdict

    return {"speech": speech_card(model.speech), "contrastive": asdict(model.config)}


def speech_llm_card(model: SpeechLLM, name: str | None) -> dict[str, Any]:
    """Shape of a stage-2 model as JSON; `name` is of the LLM it came from."""
    return {"speech": speech_card(model.speech), "llm": name}
