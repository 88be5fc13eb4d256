"""The causal LLM of stage 2: pretrained, or a small one made on the spot."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models import pretrained, sources
from mser_dist.models.attention import Attention, for_class
from mser_dist.models.lora import with_lora
from mser_dist.models.small_llm import small_llama, small_tokenizer

_FITTING = "a decoder-only causal LM of text fits, such as Llama, Qwen, Mistral, Gemma, Phi, OLMo or SmolLM"


def build_llm(
    config: cfg.LLMConfig,
    labels: list[str],
    attention: Attention,
    ds_json: dict[str, Any] | None = None,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a run config; `labels` shape the vocabulary of a tokenizer made on the spot.

    With the resolved DeepSpeed config of a ZeRO-3 run, pretrained weights are partitioned as they load: no rank ever
    holds a whole copy. dtype: of a pretrained one; auto: that of its files. Raises `UserError` for a model of another
    kind, and for one whose weights are not all there.
    """
    if config.pretrained is None:
        tokenizer = small_tokenizer(labels)
        model: PreTrainedModel = small_llama(config.arch, tokenizer, attention)
    else:
        source = sources.resolve(config.pretrained)
        model_config = pretrained.read_config("llm", config.pretrained, source)
        attention = for_class(check_kind(model_config, config.pretrained), attention)
        partitioned = (ds_json or {}).get("zero_optimization", {}).get("stage") == 3
        with pretrained.explained(config.pretrained, source.path):
            tokenizer = AutoTokenizer.from_pretrained(source.path, gguf_file=source.gguf_file)
        model = pretrained.load(
            AutoModelForCausalLM,
            "llm",
            config.pretrained,
            source,
            allow_missing=config.allow_missing,
            zero3=ds_json if partitioned and not source.gguf_file else None,  # GGUF is dequantised whole
            attn_implementation=attention.kernel,
            dtype=torch.float32 if source.gguf_file else dtype,
        )
        if source.gguf_file:
            model = _dequantised(model, attention)
        if len(tokenizer) > model_config.get_text_config().vocab_size:
            raise UserError(
                f"llm.pretrained={config.pretrained}: its tokenizer has {len(tokenizer)} tokens, and the model "
                f"{model_config.get_text_config().vocab_size}: they are of two models; copy the tokenizer again"
            )
    model.config.use_cache = False
    if config.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        except (ValueError, NotImplementedError) as error:
            raise UserError(
                f"{type(model).__name__} has no gradient checkpointing in transformers: set "
                "llm.gradient_checkpointing=false"
            ) from error
    if config.freeze:
        model.requires_grad_(False)
    if config.lora:
        model = with_lora(model, config.lora)
    return model, tokenizer


def check_kind(config: PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    """The class of a pretrained LLM. Raises `UserError` for a kind of model that no prompt can be given to."""
    what = f"llm.pretrained={name} is a model of type {config.model_type}"
    if config.is_encoder_decoder:
        raise UserError(f"{what}, an encoder-decoder: {_FITTING}")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise UserError(f"{what}, which transformers knows as no causal LM: {_FITTING}")
    senses = [part for part in config.sub_configs if part.startswith(("vision", "audio", "image", "speech", "vq"))]
    if senses or "ConditionalGeneration" in model_class.__name__:
        raise UserError(
            f"{what}, which sees or hears by parts of its own: {_FITTING}, or the text part of this one alone"
        )
    return model_class


def base_of(llm: Any) -> PreTrainedModel:
    """The causal LM itself; inside a LoRA wrapper the adapted layers are the same modules."""
    base = getattr(llm, "get_base_model", None)
    return base() if base else llm


def _dequantised(model: PreTrainedModel, attention: Attention) -> PreTrainedModel:
    """The same weights in a model that does not call itself quantised, which transformers would refuse to save."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, attn_implementation=attention.kernel, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    return plain


def load_llm(
    folder: Path, attention: Attention, dtype: torch.dtype, zero3: dict[str, Any] | None = None
) -> PreTrainedModel:
    """An LLM from a folder in Hugging Face format that an export holds; zero3: as of `pretrained.load`."""
    source = sources.Source(str(folder))
    attention = for_class(check_kind(pretrained.read_config("llm", str(folder), source), str(folder)), attention)
    return pretrained.load(
        AutoModelForCausalLM, "llm", str(folder), source, zero3=zero3, attn_implementation=attention.kernel, dtype=dtype
    )
