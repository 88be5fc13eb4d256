"""Small LLMs of several families with speech in front, and a micro-batch that asks them several things."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mser_dist import config as cfg
from mser_dist.models.attention import Attention
from mser_dist.models.packed import SPEECH, Packing, Sample, batch_of
from mser_dist.models.speech import build_speech
from mser_dist.models.speech_llm import SpeechLLM

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
# A window of 5 is smaller than any prompt, and than the start that clips share; one of 60 is larger than any sample.
LLMS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "qwen3, window 5 in one layer": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, **BOTH, use_sliding_window=True, sliding_window=5)
    ),
    "gemma2, window 60": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **BOTH, sliding_window=60)),
    "gemma2, window 5 in one layer": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **BOTH, sliding_window=5)),
    "gemma3, window 5 in one layer": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **BOTH, sliding_window=5)),
    "mistral, window 60": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=60)),
    "mistral, window 5": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
}
PROMPTS = [
    [1, 5, 9, 11, 12, 13, 6, SPEECH, SPEECH, 7, 8],
    [1, 5, 9, 14, 6, SPEECH, SPEECH, 7, 8],
    [1, 5, 9, 11, 12, 13, 15, 16, 17, 6, SPEECH, SPEECH, 7, 8],
]
ANSWERS = [[20, 2], [21, 22, 23, 2], [24, 25, 2]]
SAMPLES: list[Sample] = [
    (PROMPTS[prompt], ANSWERS[answer]) for prompt, answer in [(0, 0), (0, 1), (1, 2), (2, 1), (2, 0), (2, 2)]
]


def speech_llm(kind: str, kernel: str = "sdpa") -> SpeechLLM:
    """An LLM of `LLMS` with a tiny encoder and Q-Former, without dropout, its answers far from uniform."""
    torch.manual_seed(0)
    arch = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 80}
    qformer = cfg.QFormerConfig(queries=2, layers=1, width=16, heads=2, dropout=0.0)
    speech = build_speech(cfg.EncoderConfig(arch=arch), qformer, Attention("sdpa", "test"))
    llm = LLMS[kind]()
    llm.set_attn_implementation(kernel)
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return SpeechLLM(speech, llm)


def clips(count: int = len(SAMPLES)) -> tuple[Tensor, Tensor]:
    """(count, 80, 40) log-mels of several lengths, and the lengths."""
    mel = torch.randn(count, 80, 40, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([40, 21, 33, 40, 12, 28])[:count]
    for row, length in enumerate(lengths):
        mel[row, :, length:] = 0
    return mel, lengths


def micro_batch(packing: Packing, chosen: list[int]) -> dict[str, Any]:
    """The samples of these numbers with their clips."""
    mel, lengths = clips()
    batch = batch_of([SAMPLES[i] for i in chosen], packing)
    return {"speech": mel[chosen], "lengths": lengths[chosen], **batch, "normalizer": 1.0}


def one_by_one(model: SpeechLLM, chosen: list[int]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of samples, each read alone, without padding; those of the model are cleared."""
    total = 0.0
    for i in chosen:
        batch = micro_batch("off", [i])
        size = int(batch["lengths"])
        loss, _ = model({**batch, "speech": batch["speech"][..., :size]})
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def gradients(model: SpeechLLM) -> dict[str, Tensor]:
    """The gradient of every parameter; cleared then."""
    found = {
        name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()
    }
    model.zero_grad()
    return found


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a gradient; of one that is rounding alone, by the largest of them all."""
    assert found.keys() == expected.keys()
    largest = max(float(grad.norm()) for grad in expected.values())
    sizes = {name: max(float(grad.norm()), 1e-3 * largest) for name, grad in expected.items()}
    return max(float((found[name] - grad).norm()) / sizes[name] for name, grad in expected.items())
