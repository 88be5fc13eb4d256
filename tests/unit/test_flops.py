"""The analytic count of operations, against PyTorch's count of those that a forward and backward pass really makes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from mser_dist import config as cfg
from mser_dist.models.aligner import Aligner
from mser_dist.models.attention import Attention
from mser_dist.models.flops import Heard, StepCount, work_of
from mser_dist.models.lora import with_lora
from mser_dist.models.packed import SPEECH, Packing, batch_of
from mser_dist.models.speech import SpeechModel, build_speech
from mser_dist.models.speech_llm import SpeechLLM

WHISPER = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 80}
WAVE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 1, "attention_dropout": 0.0,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 60, "pad_token_id": 0,
}  # fmt: skip
QUERIES = 3


def speech(kernel: str, arch: dict[str, Any], **more: Any) -> SpeechModel:
    torch.manual_seed(0)
    encoder = {name: more.pop(name) for name in ("layers", "freeze", "stride", "combine") if name in more}
    qformer = cfg.QFormerConfig(queries=QUERIES, layers=2, width=16, heads=2, dropout=0.0, **more)
    return build_speech(cfg.EncoderConfig(arch=arch, **encoder), qformer, Attention(kernel, "test"))


def text(kind: str, kernel: str) -> PreTrainedModel:
    fields: dict[str, Any] = {**TEXT, "head_dim": 8} if kind in ("gemma", "gemma2", "qwen3") else TEXT
    if kind == "gpt2":
        fields = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    config = AutoConfig.for_model(kind, **fields)
    config._attn_implementation = kernel
    return AutoModelForCausalLM.from_config(config, attn_implementation=kernel)


def measured(run: Callable[[], torch.Tensor]) -> int:
    """Operations of a forward and backward pass, as torch counts them."""
    here = torch.ops.aten  # the CPU's own kernel has no formula there; it computes the same products
    forward, backward = (
        here._scaled_dot_product_flash_attention_for_cpu,
        here._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    formulas = {
        forward: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run().backward()
    return counter.get_total_flops()


def heard(model: SpeechModel, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """Noise in the shape of what a speech model is fed."""
    size = int(lengths.max())
    if model.frozen is not None:
        return {"speech": torch.randn(len(lengths), size, len(model.layers), 16), "lengths": lengths}
    features = model.any_encoder.features.n_mels
    shape = (len(lengths), features, size) if features else (len(lengths), size)
    return {"speech": torch.randn(*shape), "lengths": lengths}


# torch counts the weight gradient of a grouped convolution, as wav2vec's positions are, as if it were not grouped.
WAVES: list[tuple[dict[str, Any], list[int], dict[str, Any]]] = [
    ({**WAVE, "model_type": kind}, [4000, 6201], {}) for kind in ("wav2vec2", "wavlm")
]
HEARD: list[tuple[dict[str, Any], list[int], dict[str, Any]]] = [
    *WAVES,
    (WHISPER, [40, 61, 33], {}),
    (WHISPER, [40, 61, 33], {"freeze": True, "pool": True}),
    (WHISPER, [40, 61, 33], {"layers": [0, 2], "stride": 2}),
    (WHISPER, [40, 61], {"layers": [0, 1], "freeze": True, "combine": "concat"}),
]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("arch, lengths, more", HEARD)
def test_the_operations_of_a_speech_model(
    kernel: str, arch: dict[str, Any], lengths: list[int], more: dict[str, Any]
) -> None:
    model = Aligner(speech(kernel, arch, **more), 24, cfg.ContrastiveConfig(width=8)).train()
    batch = heard(model.speech, torch.tensor(lengths))
    texts = torch.randn(len(lengths), 24)

    def loss() -> torch.Tensor:
        rows = model({**batch, "text": texts}).rows
        return sum(row.sum() for row in rows)

    load = StepCount(model)(Heard(batch["lengths"], model.speech.frozen is not None))
    found = measured(loss)
    assert load.flops.hardware == pytest.approx(found, rel=0.01 if arch.get("model_type") == "wavlm" else 0)
    assert 0 < load.flops.model < load.flops.hardware
    assert load.tokens < load.computed


@pytest.mark.parametrize(
    "kind, kernel, trained, checkpointing, packing",
    [
        *[
            (kind, "sdpa", "all", c, "prefix" if c else "off")
            for kind in ("llama", "gemma", "qwen2", "qwen3", "gpt2")
            for c in (False, True)
        ],
        *[
            ("llama", "eager", trained, c, "rows" if c else "prefix")
            for trained in ("lora", "projector", "lora alone")
            for c in (False, True)
        ],
        ("gemma2", "eager", "all", True, "off"),
        ("mistral", "eager", "lora", True, "prefix"),
    ],
)
def test_the_operations_of_a_speech_llm(
    kind: str, kernel: str, trained: str, checkpointing: bool, packing: Packing
) -> None:
    model = SpeechLLM(speech(kernel, WHISPER, freeze=True), llm(kind, kernel, checkpointing, trained)).train()
    if trained == "lora alone":
        model.speech.requires_grad_(False)
        model.projector.requires_grad_(False)
    batch: dict[str, Any] = {**heard(model.speech, torch.tensor([40, 33])), "normalizer": torch.tensor(1.0)}
    prompts = [[5, 9, SPEECH, SPEECH, SPEECH, 6], [5, 9, SPEECH, SPEECH, SPEECH, 6]]
    batch |= batch_of(list(zip(prompts, [[7, 8, 2], [9, 2]], strict=True)), packing)
    needed, computed = work_of(batch, flash=False)
    expected: Any = {
        "off": ((17, 45 + 36, 5), (18, 2 * 81, 6)),
        "rows": ((17, 45 + 36, 5), (17, 17**2, 5)),
        "prefix": ((15, 45 + 36 - 3, 5), (15, 15**2, 5)),
    }[packing]
    assert (needed, computed) == expected
    count = StepCount(model)(Heard(batch["lengths"], encoded=True), needed, computed)
    found = measured(lambda: model(batch)[0])
    # Which of the first layer's adapters gradients flow into is not looked at.
    assert count.flops.hardware == pytest.approx(found, rel=0.03 if trained == "lora alone" else 0)
    assert count.flops.model < count.flops.hardware and (count.tokens, count.computed) == (
        needed.tokens,
        computed.tokens,
    )


def llm(kind: str, kernel: str, checkpointing: bool, trained: str) -> Any:
    model = text(kind, kernel)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if trained == "projector":
        model.requires_grad_(False)
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    return with_lora(model, cfg.LoraConfig(rank=2, targets=targets)) if "lora" in trained else model
