"""The networks of a config without their weights: built by the code that trains them, on a device without storage."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mser_dist import config as cfg
from mser_dist.config import file
from mser_dist.errors import UserError
from mser_dist.models import exported, llm
from mser_dist.models.aligner import Aligner
from mser_dist.models.attention import Attention
from mser_dist.models.lora import with_lora
from mser_dist.models.small_llm import small_llama, small_tokenizer
from mser_dist.models.speech import SpeechModel, build_speech, speech_from_card
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.training.groups import assign

_KNOWN: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
ATTENTION = Attention("sdpa", "planned", named=True)
_TEXT_WIDTH = 384  # of all-MiniLM-L6-v2, the default text tower


def build(
    config: cfg.Stage1 | cfg.Stage2, llm_shape: str | None = None, stage1: str | None = None, layers: int | None = None
) -> Aligner | SpeechLLM:
    """The model that a config trains, with what is frozen in it; call it where tensors take no memory.

    llm_shape: of shapes.json, or a folder with a config.json, in place of `llm.pretrained`. stage1: config of stage 1
    that a stage 2 builds on, where that has not run. layers: of the LLM, in place of its own. Raises `UserError` for
    shapes that nobody knows.
    """
    if isinstance(config, cfg.Stage1):
        model: Aligner | SpeechLLM = Aligner(_fresh_speech(config), _text_width(config.text), config.contrastive)
    else:
        speech = _speech_of_stage1(config, stage1)
        if config.freeze_encoder:
            speech.freeze_encoder()
        if config.freeze_qformer:
            speech.qformer.requires_grad_(False)
            speech.queries.requires_grad_(False)
        model = SpeechLLM(speech, _llm(config, llm_shape, layers))
    assign(model, config.train.groups)
    model.train()
    return model


def _fresh_speech(config: cfg.Stage1) -> SpeechModel:
    if config.init_from and (Path(config.init_from) / "export").is_dir():
        speech = speech_from_card(
            exported.read_card(exported.find(config.init_from, 1, "init_from"))["speech"], ATTENTION
        )
        if config.encoder.freeze:
            speech.freeze_encoder()
        return speech
    encoder = config.encoder
    if encoder.pretrained is not None:
        arch = _encoder_shape(encoder.pretrained)
        encoder = replace(encoder, pretrained=None, arch=arch)
    return build_speech(encoder, config.qformer, ATTENTION)


def _encoder_shape(name: str) -> dict[str, Any]:
    there = _read_config(name)
    if there is not None:
        wanted = AutoConfig.for_model(there["model_type"]).to_dict() if "model_type" in there else {}
        own = {
            key: value
            for key, value in there.items()
            if key in wanted and not key.startswith(("_", "decoder", "torch"))
        }
        return {**own, "model_type": there.get("model_type", "whisper")}
    last = Path(name).name.lower().removeprefix("pypi:").removeprefix("faster-")
    if last not in _KNOWN["encoders"]:
        known = ", ".join(_KNOWN["encoders"])
        raise UserError(
            f"encoder.pretrained={name}: its shape is not known here: put its config.json into a folder and name that "
            f"as encoder.pretrained, or plan with one of {known}"
        )
    return dict(_KNOWN["encoders"][last])


def _read_config(name: str) -> dict[str, Any] | None:
    """The config.json of a model that is at hand as a folder; None where it is not."""
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): copy it again") from error


def _speech_of_stage1(config: cfg.Stage2, named: str | None) -> SpeechModel:
    """Of the finished run, else of a config: the one that is named, the run's own, or a preset that writes there."""
    if named is None and (Path(config.stage1) / "export" / "card.json").is_file():
        return speech_from_card(exported.read_card(exported.find(config.stage1, 1))["speech"], ATTENTION)
    known = [named] if named else _writers(config.stage1)
    for name in known:
        first = file.load_training(name, [])
        if isinstance(first, cfg.Stage1):
            return build_speech_thawed(first)
    raise UserError(
        f"stage1={config.stage1} has not run, and no preset writes it: name its config with --stage1 CONFIG"
    )


def build_speech_thawed(first: cfg.Stage1) -> SpeechModel:
    """As an export brings it: what stage 1 has frozen, stage 2 freezes or not by its own config."""
    return _fresh_speech(replace(first, encoder=replace(first.encoder, freeze=False, normalize="none")))


def _writers(out: str) -> list[str]:
    own = Path(out) / "config.yaml"
    if own.is_file():
        return [str(own)]
    found = []
    for path in sorted((Path(file.__file__).parent / "presets").glob("*.yaml")):
        tree = file.read_yaml(path)
        if tree.get("stage") == 1 and str(tree.get("out")) == out:
            found.append(str(path))
    return found


def _text_width(text: cfg.TextConfig) -> int:
    there = _read_config(text.pretrained)
    return int(there["hidden_size"]) if there and "hidden_size" in there else _TEXT_WIDTH


def _llm(config: cfg.Stage2, shape: str | None, layers: int | None) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names in transformers, which peft calls too
        return _built(config, shape, layers)


def _built(config: cfg.Stage2, shape: str | None, layers: int | None) -> PreTrainedModel:
    wanted = config.llm
    shorter = {} if layers is None else {"num_hidden_layers": layers}
    if wanted.pretrained is None and shape is None:
        model: PreTrainedModel = small_llama(wanted.arch | shorter, small_tokenizer(config.data.labels), ATTENTION)
    else:
        fields = llm_shape(shape or str(wanted.pretrained)) | shorter
        model_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        llm.check_kind(model_config, shape or str(wanted.pretrained))
        model = AutoModelForCausalLM.from_config(model_config, attn_implementation=ATTENTION.kernel)
    model.config.use_cache = False
    if wanted.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if wanted.freeze:
        model.requires_grad_(False)
    return with_lora(model, wanted.lora) if wanted.lora else model


def llm_shape(name: str) -> dict[str, Any]:
    """The fields of an LLM's config: of a folder with a config.json, or known by its name."""
    there = _read_config(name)
    if there is None and name.startswith("pypi:"):
        name = name.removeprefix("pypi:")
    if there is not None:
        return {
            key: value
            for key, value in there.items()
            if not key.startswith(("_", "torch", "architectures", "transformers"))
        }
    last = Path(name).name.lower()
    for known, fields in _KNOWN["llms"].items():
        if last == known or last in fields["names"]:
            return {key: value for key, value in fields.items() if key != "names"}
    raise UserError(
        f"the shape of the LLM {name} is not known here: name a folder with its config.json, or a known one, as "
        f"--llm-shape: {', '.join(_KNOWN['llms'])}"
    )


def names() -> Sequence[str]:
    """The LLMs whose shapes are known."""
    return tuple(_KNOWN["llms"])


def on_meta(
    config: cfg.Stage1 | cfg.Stage2, llm_shape: str | None = None, stage1: str | None = None
) -> Aligner | SpeechLLM:
    """`build`, with tensors that have a shape alone."""
    with torch.device("meta"):
        return build(config, llm_shape, stage1)
