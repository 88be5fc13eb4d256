"""Pretrained folders whose weights are not all there: every kind of model, every kind of damage, one line each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models.attention import Attention, choose
from mser_dist.models.encoders import build_encoder
from mser_dist.models.llm import build_llm
from mser_dist.models.small_llm import small_tokenizer
from mser_dist.models.text import TextTower

SIZES: dict[str, Any] = {
    "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
TEXT = {**SIZES, "vocab_size": 600}
AUTO = choose("auto", torch.float32, "cpu")


def whisper_config() -> WhisperConfig:
    return WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=10, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip


def wav2vec2_config() -> Wav2Vec2Config:
    return Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, conv_dim=[8] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, vocab_size=12,
    )  # fmt: skip


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    small_tokenizer(["a"]).save_pretrained(folder)
    if model.config.model_type == "wav2vec2":
        Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def load_llm(folder: Path, **keys: Any) -> Any:
    return build_llm(cfg.LLMConfig(pretrained=str(folder), **keys), ["a"], AUTO)[0]


def load_encoder(folder: Path, **keys: Any) -> Any:
    return build_encoder(cfg.EncoderConfig(pretrained=str(folder), **keys), AUTO)


def load_text(folder: Path) -> Any:
    return TextTower(str(folder), "cpu")


MODELS: dict[str, tuple[Callable[[], Any], Callable[..., Any], str]] = {  # and a tensor that is used
    "llm": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), load_llm, "model.layers.1.mlp.up_proj.weight"),
    "whisper": (lambda: WhisperModel(whisper_config()), load_encoder, "encoder.layers.1.fc1.weight"),
    "wav2vec2": (lambda: Wav2Vec2Model(wav2vec2_config()), load_encoder, "encoder.layers.0.attention.q_proj.weight"),
    "text": (lambda: BertModel(BertConfig(**TEXT)), load_text, "encoder.layer.1.output.dense.weight"),
}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", MODELS)
def test_weights_that_are_not_all_there_are_named(kind: str, tmp_path: Path) -> None:
    make, load, tensor = MODELS[kind]
    torch.manual_seed(0)
    saved(make(), tmp_path)
    load(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    damages: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
        rf"1 tensor is missing \({tensor}\)": lambda w: {k: v for k, v in w.items() if k != tensor},
        "missing.*have no place": lambda w: {f"backbone.{k}": v for k, v in w.items()},
        r"shape \(.*is \[3, 3\] and not": lambda w: {**w, tensor: torch.zeros(3, 3)},
        r"no place \(extra\.weight\)": lambda w: {**w, "extra.weight": torch.zeros(2)},
    }
    for says, change in damages.items():
        save_file(change(dict(whole)), tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=says) as caught:
            load(tmp_path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
        if kind == "llm":  # found before ZeRO-3 partitions it, whose own loading tells less
            with pytest.raises(UserError, match=says):
                build_llm(cfg.LLMConfig(pretrained=str(tmp_path)), ["a"], AUTO, {"zero_optimization": {"stage": 3}})
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (data[:-100], data[: len(data) // 2], data[:4], b"", b"\x00" * 100, b"<html>not found</html>" * 20):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
            load(tmp_path)
    (tmp_path / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"a Git LFS pointer.*git lfs pull"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["llm", "whisper", "wav2vec2"])
def test_weights_that_are_meant_to_be_new(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, load, tensor = MODELS[kind]
    saved(make(), tmp_path)
    rewrite(tmp_path, lambda w: {k: v for k, v in w.items() if k != tensor})
    load(tmp_path, allow_missing=["*" + tensor.split(".", 1)[1]])
    assert tensor in capsys.readouterr().err
    with pytest.raises(UserError, match="missing"):
        load(tmp_path, allow_missing=["lm_head.*"])


def test_parts_that_are_not_used_may_be_there_or_not(tmp_path: Path) -> None:
    load_encoder(saved(WhisperForConditionalGeneration(whisper_config()), tmp_path / "whisper"))
    rewrite(tmp_path / "whisper", lambda w: {k: v for k, v in w.items() if not k.startswith("model.decoder")})
    load_encoder(tmp_path / "whisper")
    load_encoder(saved(Wav2Vec2ForCTC(wav2vec2_config()), tmp_path / "ctc"))
    load_text(saved(BertForMaskedLM(BertConfig(**TEXT)), tmp_path / "bert"))  # a head, and no pooler
    tied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    load_llm(saved(tied, tmp_path / "tied"))
    assert "lm_head.weight" not in load_file(tmp_path / "tied/model.safetensors")


def test_other_kinds_of_model_are_refused_by_what_fits(tmp_path: Path) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 28, "patch_size": 14}
    t5 = {"vocab_size": 600, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    gemma3 = Gemma3Config(
        text_config={**small, "vocab_size": 600, "num_key_value_heads": 1, "head_dim": 16},
        vision_config=vision,
        mm_tokens_per_image=4,
    )
    clip = CLIPConfig(text_config={**small, "vocab_size": 600}, vision_config=vision)
    fits = "a decoder-only causal LM of text fits"
    for load, model, says in (
        (load_llm, T5ForConditionalGeneration(T5Config(**t5)), rf"type t5, an encoder-decoder: {fits}"),
        (load_llm, Gemma3ForConditionalGeneration(gemma3), rf"gemma3, which sees or hears by parts of its own: {fits}"),
        (load_llm, CLIPModel(clip), rf"clip, which transformers knows as no causal LM: {fits}"),
        (load_llm, WhisperModel(whisper_config()), rf"whisper, an encoder-decoder: {fits}"),
        (load_text, T5EncoderModel(T5Config(**t5)), "type t5: name an encoder of text alone"),
        (load_text, CLIPModel(clip), "type clip: name an encoder of text alone"),
        (load_encoder, T5EncoderModel(T5Config(**t5)), "type t5: name one of whisper, wav2vec2"),
    ):
        folder = saved(model, tmp_path / f"{load.__name__}-{type(model).__name__}")
        with pytest.raises(UserError, match=says):
            load(folder)


def test_a_text_model_without_a_pad_token_pads_what_is_masked(tmp_path: Path) -> None:
    saved(GPT2Model(GPT2Config(vocab_size=600, n_embd=32, n_layer=1, n_head=2)), tmp_path)
    tokenizer = small_tokenizer(["a"])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    tower = load_text(tmp_path)
    torch.testing.assert_close(
        tower.embed(["happy", "so very happy indeed"])[0], load_text(tmp_path).embed(["happy"])[0], rtol=0, atol=1e-5
    )
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no pad token: set pad_token"):
        load_text(tmp_path)


def test_attention_is_what_the_class_has(tmp_path: Path) -> None:
    gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=16))
    folder = saved(gemma, tmp_path)
    assert load_llm(folder).config._attn_implementation == "eager"
    named = Attention("sdpa", "asked for", named=True)
    with pytest.raises(UserError, match=r"engine\.attention=sdpa: Gemma2ForCausalLM has no other.*attention=eager"):
        build_llm(cfg.LLMConfig(pretrained=str(folder)), ["a"], named)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    saved(LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 100})), tmp_path)
    with pytest.raises(UserError, match=r"its tokenizer has \d+ tokens, and the model 100"):
        load_llm(tmp_path)
