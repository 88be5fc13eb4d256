"""The presets of 8B and 70B, built without memory: computing takes longer than communicating; and what a rank sends."""

import json
from typing import Any

import pytest
import torch
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mser_dist import config as cfg
from mser_dist.config.file import load_training
from mser_dist.models.packed import SPEECH
from mser_dist.models.speech import SpeechModel
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.models.whisper import SpeechEncoder
from mser_dist.training.budget import Budget, budget, sentence
from mser_dist.training.engine import resolve_json
from mser_dist.training.peaks import peak_of

ARCH = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}
PEAK = peak_of("NVIDIA H100 80GB HBM3", "bfloat16")


def model(kind: str, checkpointing: bool = False) -> SpeechLLM:
    """The preset's Whisper and Q-Former with a Llama of this size, of weights that take no memory."""
    with torch.device("meta"):
        whisper = WhisperEncoder(WhisperConfig(d_model=1280, encoder_layers=1, encoder_attention_heads=20))
        fields = {"num_attention_heads": 12, "intermediate_size": 3072, "encoder_hidden_size": 1280}
        shape = Blip2QFormerConfig(hidden_size=768, num_hidden_layers=4, cross_attention_frequency=1, **fields)
        speech = SpeechModel(SpeechEncoder(whisper), Blip2QFormerModel(shape), 32)
        speech.freeze_encoder()
        llm = LlamaForCausalLM(
            LlamaConfig(**ARCH[kind], num_key_value_heads=4 if kind == "tiny" else 8, vocab_size=128256)
        )
        if checkpointing:
            llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return SpeechLLM(speech, llm)


def step(model: SpeechLLM, clips: int, ds_json: dict[str, Any], world: int, node: int, accumulation: int = 1) -> Budget:
    prompts = [[1] * (32 + number) + [SPEECH] * 32 + [7] * 5 for number in range(4)]  # as many tokens as Llama's
    samples = sorted(((prompts[i % 4], [8, 8, 9]) for i in range(clips)), key=lambda sample: len(sample[0]))
    return budget(model, samples, 150, "prefix", accumulation, ds_json, world, node, torch.bfloat16)


@pytest.mark.parametrize("kind", ["8b", "70b"])
def test_the_presets_compute_for_longer_than_they_communicate(kind: str) -> None:
    config = load_training(f"whisper-large-v3_llama3-{kind}_stage2", [])
    assert isinstance(config, cfg.Stage2) and config.llm.packing == "prefix"
    micro, accumulation = cfg.batch_shape(config.train, 64)
    assert (micro, accumulation) == (64, 1)
    ds_json = resolve_json(config, 64)
    found = step(model(kind, config.llm.gradient_checkpointing), micro, ds_json, 64, 8)
    assert PEAK is not None
    computing, sending = found.seconds(PEAK)
    # As in ds_configs/README.md.
    expected = {"8b": (2694, 127.7, 0.17, 1.5), "70b": (2694, 1462, 1.5, 2.0)}[kind]
    assert (found.tokens, found.flops / 1e12, sending, computing / sending) == pytest.approx(expected, rel=0.04)
    assert "would pay" not in sentence(found, PEAK) and "2,694 LLM tokens a rank and step" in sentence(found, None)
    before = step(model("8b", True), 8, json.loads('{"zero_optimization": {"stage": 3}}'), 64, 8)
    assert "would pay" in sentence(before, PEAK)


def test_the_bytes_of_each_kind_of_sharding() -> None:
    tiny = model("tiny")
    weights = 2 * sum(p.numel() for p in tiny.parameters())

    def sent(zero: dict[str, Any], world: int = 16, node: int = 8, accumulation: int = 1) -> tuple[float, float]:
        found = step(tiny, 4, {"zero_optimization": zero, "communication_data_type": "fp32"}, world, node, accumulation)
        return found.across / weights, found.within / weights

    half, seven = (1 - 1 / 2) / 8, 1 - 1 / 8
    assert sent({"stage": 3}) == pytest.approx((4 * half, 0))
    assert sent({"stage": 3}, accumulation=3) == pytest.approx((12 * half, 0))
    assert sent({"stage": 3, "zero_hpz_partition_size": 8}) == pytest.approx((3 * half, seven))
    assert sent({"stage": 2}) == pytest.approx((3 * half, 0))
    assert sent({"stage": 2}, accumulation=3) == pytest.approx((7 * half, 0))
    assert sent({"stage": 1}, accumulation=3) == pytest.approx((3 * half, 0))
    assert sent({"stage": 3}, world=8) == pytest.approx((0, 4 * seven))
    assert sent({"stage": 3}, world=1) == (0, 0)
