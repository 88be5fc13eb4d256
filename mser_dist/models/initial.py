"""What a stage 2 begins with: the speech model of its stage 1, or what another stage 2, or an adapter, brings."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models import bases, exported, pretrained, sources
from mser_dist.models.attention import Attention
from mser_dist.models.bases import Base
from mser_dist.models.llm import build_llm
from mser_dist.models.lora import merged
from mser_dist.models.speech_llm import SpeechLLM

_ADAPTER, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Initial:
    """speech: the export that encoder and Q-Former come from. run: that of another stage 2, for all else."""

    speech: Path
    run: Path | None = None
    adapter: Path | None = None  # a folder of peft's, in the run's export or of its own


def find(config: cfg.Stage2) -> Initial:
    """What a config's `stage1` and `init_from` name. Raises `UserError` if it is not there, or not whole."""
    stage1 = exported.find(config.stage1, stage=1)
    if config.init_from is None:
        return Initial(stage1)
    folder = Path(config.init_from)
    if (folder / _ADAPTER).is_file():
        if config.llm.lora is None:
            raise UserError(f"init_from={folder} is a folder of adapters: set llm.lora, or name the run that made them")
        return Initial(stage1, adapter=folder)
    run = exported.find(config.init_from, 2, "init_from")
    return Initial(run, run, run / "llm" if (run / "llm" / _ADAPTER).is_file() else None)


def build(
    config: cfg.Stage2, begin: Initial, attention: Attention, ds_json: dict[str, Any]
) -> tuple[SpeechLLM, Any, str | None]:
    """The model with all that it begins with, its tokenizer, and where the LLM's own weights come from.

    Adapters that `init_from` brings go on as adapters with `llm.lora`, and are merged into the LLM without. Raises
    `UserError` for an LLM, adapters or labels that do not fit.
    """
    speech = exported.load_speech(begin.speech, attention)
    llm_config, name = config.llm, config.llm.pretrained
    card = exported.read_card(begin.run) if begin.run else None
    if card is not None:
        _check_run(config, card)
        if begin.adapter is None:  # the whole LLM is in the export, and is the base of new adapters
            folder = str((begin.speech / "llm").resolve())
            llm_config, name = replace(llm_config, pretrained=folder, arch={}), folder if llm_config.lora else name
    lora = llm_config.lora
    if begin.adapter:
        there = _read_adapter(begin.adapter)
        if lora is None:
            lora = _lora_of(there)
        _check_adapter(config, there, begin, lora)
    freeze = llm_config.freeze and lora is None
    llm_config = replace(llm_config, lora=lora, freeze=freeze)
    # What is trained in bfloat16 is loaded so, but for what adapters are added to: that sum is rounded once.
    dtype = torch.float32 if begin.adapter and config.llm.lora is None else getattr(torch, config.engine.dtype)
    llm, tokenizer = build_llm(llm_config, config.data.labels, attention, ds_json, dtype)
    if begin.adapter:
        _fill_adapter(llm, begin.adapter)
        if config.llm.lora is None:
            llm = merged(llm).requires_grad_(not config.llm.freeze)
    model = SpeechLLM(speech, llm)
    if begin.run:
        exported.with_heads(model, begin.run)
    return model, tokenizer, name


def bases_of(config: cfg.Stage2, begin: Initial) -> dict[str, Base]:
    """Where weights come from that every start loads, by the beginnings of parameters' names."""
    found = {"speech.": exported.base_of(begin.speech, "speech.safetensors")}
    if begin.run and begin.adapter is None:
        found["llm."] = exported.base_of(begin.run, "llm/")
    elif config.llm.pretrained and not config.llm.allow_missing:
        merged_in = [begin.adapter / _WEIGHTS] if begin.adapter and config.llm.lora is None else []
        files = bases.files_of(sources.resolve(config.llm.pretrained))
        found["llm."] = Base(config.llm.pretrained, [*files, *merged_in])
    return found


def trained_on(begin: Initial) -> dict[str, Any]:
    """The base that the adapters of another run were trained on, as `bases.digests` has it; nothing without any."""
    if begin.run is None or begin.adapter is None:
        return {}
    there = exported.read_card(begin.run).get("bases", {})
    return {"llm.": there["llm."]} if "llm." in there else {}


def _check_run(config: cfg.Stage2, card: dict[str, Any]) -> None:
    brought, wanted = card["llm"], config.llm.pretrained
    if brought != wanted:
        raise UserError(
            f"llm.pretrained={wanted}, but init_from={config.init_from} was trained with llm.pretrained={brought}: "
            f"set llm.pretrained={'null' if brought is None else brought}"
        )
    if brought is None and (strange := sorted(set(config.data.labels) - set(card["labels"]))):
        raise UserError(
            f"the LLM of init_from={config.init_from} was made on the spot, and has no words for {', '.join(strange)}: "
            f"set data.labels to some of {', '.join(card['labels'])}"
        )


def _read_adapter(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))
        if found["peft_type"] == "LORA" and isinstance(found["r"], int) and isinstance(found["lora_alpha"], int):
            return dict(found)
        raise ValueError(f"peft_type {found['peft_type']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / _ADAPTER} is not peft's of a LoRA adapter ({error!r}): copy it again") from error


def _lora_of(there: dict[str, Any]) -> cfg.LoraConfig:
    """The section that makes such adapters."""
    targets = there["target_modules"]
    listed = [targets] if isinstance(targets, str) else sorted(targets)
    how = {"rslora": bool(there.get("use_rslora")), "dora": bool(there.get("use_dora"))}
    return cfg.LoraConfig(rank=there["r"], alpha=there["lora_alpha"], targets=listed, allow_partial=True, **how)


def _check_adapter(config: cfg.Stage2, there: dict[str, Any], begin: Initial, lora: cfg.LoraConfig) -> None:
    """Raise `UserError` for adapters of another base, or of another kind than the config makes."""
    brought = _lora_of(there)
    for key in ("rank", "alpha", "rslora", "dora"):
        wanted, found = (str(getattr(section, key)).lower() for section in (lora, brought))
        if wanted != found:
            raise UserError(
                f"llm.lora.{key}={wanted}, but init_from={config.init_from} brings {found}: set llm.lora.{key}={found}"
            )
    base, name = there.get("base_model_name_or_path"), config.llm.pretrained
    if begin.run or not base or name is None:  # a run's was compared by its card
        return
    names = {name, sources.resolve(name).path}
    if base not in names and Path(base).name.lower() not in {Path(name).name.lower() for name in names}:
        raise UserError(
            f"init_from={config.init_from} has adapters of {base}, and llm.pretrained={name} is another model: set "
            f"llm.pretrained={base}, or, where it is the same, its name as base_model_name_or_path in {_ADAPTER}"
        )


def _fill_adapter(llm: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    file = folder / _WEIGHTS
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): copy the adapter again, in safetensors") from error
    pretrained.check_tensors(tensors, get_peft_model_state_dict(llm), str(file))
    set_peft_model_state_dict(llm, tensors)
