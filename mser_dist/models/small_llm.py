"""A small Llama made on the spot, with a tokenizer of its own: for tests, the demo, and work without a hub."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mser_dist.errors import UserError
from mser_dist.models import prompts
from mser_dist.models.attention import Attention

_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def small_llama(arch: dict[str, Any], tokenizer: PreTrainedTokenizerBase, attention: Attention) -> LlamaForCausalLM:
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
    core.train_from_iterator([*prompts.instructions(labels), *labels], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = _CHAT
    return tokenizer
