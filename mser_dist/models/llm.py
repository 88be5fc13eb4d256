"""The causal LLM of stage 2: pretrained, or a small Llama made on the spot with a tokenizer of its own."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.integrations import HfDeepSpeedConfig

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models import prompts, sources
from mser_dist.models.attention import Attention

_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_llm(
    config: cfg.LLMConfig, labels: list[str], attention: Attention, ds_json: dict[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a run config; `labels` shape the vocabulary of a tokenizer made on the spot.

    With the resolved DeepSpeed config of a ZeRO-3 run, pretrained weights are partitioned as they load: no rank ever
    holds a whole copy.
    """
    if config.pretrained is None:
        tokenizer = small_tokenizer(labels)
        model: PreTrainedModel = _small_llama(config.arch, tokenizer, attention)
    else:
        source = sources.resolve(config.pretrained)
        # transformers looks for a living HfDeepSpeedConfig; GGUF weights are dequantised whole, so they cannot use it.
        zero3 = (ds_json or {}).get("zero_optimization", {}).get("stage") == 3 and not source.gguf_file
        partition = HfDeepSpeedConfig(ds_json) if zero3 else None
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.path, gguf_file=source.gguf_file)
            model = AutoModelForCausalLM.from_pretrained(
                source.path, gguf_file=source.gguf_file, attn_implementation=attention.kernel, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise sources.explain(config.pretrained, error) from error
        finally:
            del partition
        if source.gguf_file:
            model = _dequantised(model, attention)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if config.freeze:
        model.requires_grad_(False)
    if config.lora:
        model = _with_lora(model, config.lora)
    return model, tokenizer


def _dequantised(model: PreTrainedModel, attention: Attention) -> PreTrainedModel:
    """The same weights in a model that does not call itself quantised, which transformers would refuse to save."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, attn_implementation=attention.kernel, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    return plain


def _with_lora(model: PreTrainedModel, lora: cfg.LoraConfig) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model

    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=lora.targets,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise UserError(f"llm.lora.targets={lora.targets} match no layer of the LLM: {error}") from error


def _small_llama(arch: dict[str, Any], tokenizer: PreTrainedTokenizerBase, attention: Attention) -> LlamaForCausalLM:
    unknown = set(arch) - set(LlamaConfig().to_dict())
    if unknown:
        raise UserError(f"llm.arch has an unknown field {sorted(unknown)[0]}: it takes the fields of LlamaConfig")
    try:
        config = LlamaConfig(
            **arch,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation=attention.kernel,
        )
        return LlamaForCausalLM(config)
    except Exception as error:  # transformers checks its configs with several kinds of error
        raise UserError(f"llm.arch is not a valid LlamaConfig: {str(error).splitlines()[0]}") from error


def small_tokenizer(labels: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the instructions and answers, so that a small model has a small vocabulary."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*prompts.instructions(labels), *map(prompts.answer, labels)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = _CHAT
    return tokenizer


def load_llm(folder: Path, attention: Attention, dtype: torch.dtype) -> PreTrainedModel:
    """An LLM from a folder in Hugging Face format."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention.kernel, dtype=dtype)
