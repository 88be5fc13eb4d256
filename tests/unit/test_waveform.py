"""wav2vec-style encoders: a clip's features are its own, as transformers computes them for the clip alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HubertConfig, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2Model

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models.attention import Attention
from mser_dist.models.encoders import build_encoder
from mser_dist.models.waveform import MODELS, WaveformEncoder
from mser_dist.stream.features import Features

SDPA = Attention("sdpa", "test")
ARCH: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
KINDS = [(kind, norm) for kind in MODELS for norm in ("group", "layer")]
ENCODERS: dict[tuple[str, str], WaveformEncoder] = {}


def encoder(kind: str = "wav2vec2", norm: str = "layer") -> WaveformEncoder:
    if (kind, norm) not in ENCODERS:
        torch.manual_seed(0)
        built = build_encoder(cfg.EncoderConfig(arch={"model_type": kind, "feat_extract_norm": norm, **ARCH}), SDPA)
        assert isinstance(built, WaveformEncoder)
        ENCODERS[kind, norm] = built.eval()
    return ENCODERS[kind, norm]


def waves(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S) noise, zeros behind each clip's own samples, and (B,) samples."""
    speech = torch.randn(len(lengths), max(lengths), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(lengths):
        speech[row, length:] = 0
    return speech, torch.tensor(lengths)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "norm"), KINDS)
@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 9000), min_size=2, max_size=4))
def test_a_clip_does_not_depend_on_its_batch(kind: str, norm: str, lengths: list[int]) -> None:
    model, (speech, n) = encoder(kind, norm), waves(lengths)
    together, mask = model(speech, n)
    for row, length in enumerate(lengths):
        alone, whole = model(speech[row : row + 1, :length], n[row : row + 1])
        assert whole.all() and whole.shape[1] == mask[row].sum() == max(1, (length - 80) // 320)
        torch.testing.assert_close(together[row][mask[row]], alone[0], rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "norm"), KINDS)
def test_a_clip_has_the_features_that_transformers_gives_it_alone(kind: str, norm: str) -> None:
    model, (speech, n) = encoder(kind, norm), waves([8000, 4321, 400])
    own = MODELS[kind](model.model.config).eval()
    own.load_state_dict(model.model.state_dict())
    together, mask = model(speech, n)
    for row, length in enumerate(n.tolist()):
        expected = own(speech[row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(together[row, mask[row], 0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_every_weight_is_trained_and_nothing_is_masked_or_skipped(kind: str) -> None:
    torch.manual_seed(0)
    dropouts = {f"{name}_dropout": 0.0 for name in ("hidden", "activation", "attention")}
    trained = build_encoder(cfg.EncoderConfig(arch={"model_type": kind, **ARCH, **dropouts}), SDPA).train()
    inputs = waves([6000, 5000])
    first, mask = trained(*inputs)
    torch.testing.assert_close(first[mask], trained(*inputs)[0][mask], rtol=0, atol=0)
    (first[mask] ** 3).sum().backward()
    assert [name for name, p in trained.named_parameters() if p.grad is None] == []


def checkpoint(folder: Path, **extractor: Any) -> Wav2Vec2ForCTC:
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(Wav2Vec2Model.config_class(**ARCH)).eval()  # with masking and LayerDrop, as published
    model.save_pretrained(folder)
    if extractor:
        Wav2Vec2FeatureExtractor(**extractor).save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("normalize", [True, False])
def test_a_checkpoint_is_fed_as_its_own_feature_extractor_would(normalize: bool, tmp_path: Path) -> None:
    own = checkpoint(tmp_path, do_normalize=normalize)
    model = build_encoder(cfg.EncoderConfig(pretrained=str(tmp_path)), SDPA).eval()
    assert model.features == Features(n_mels=None, normalize=normalize)
    wave = np.random.default_rng(0).normal(0.3, 0.1, 5000).astype(np.float32)
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    expected = own.wav2vec2(**extractor(wave, sampling_rate=16000, return_tensors="pt")).last_hidden_state
    found, _ = model(torch.from_numpy(model.features(wave))[None], torch.tensor([5000]))
    torch.testing.assert_close(found[:, :, 0], expected, rtol=0, atol=1e-5)


def test_a_checkpoint_that_does_not_say_how_it_is_fed_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"no preprocessor_config.json.*do_normalize"):
        build_encoder(cfg.EncoderConfig(pretrained=str(tmp_path)), SDPA)
    Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="8000 Hz"):
        build_encoder(cfg.EncoderConfig(pretrained=str(tmp_path)), SDPA)


def test_another_kind_of_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="type bert: name one of whisper, wav2vec2, hubert, wavlm"):
        build_encoder(cfg.EncoderConfig(pretrained=str(tmp_path)), SDPA)
    HubertConfig(conv_pos_batch_norm=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="conv_pos_batch_norm"):
        build_encoder(cfg.EncoderConfig(pretrained=str(tmp_path)), SDPA)


@pytest.mark.parametrize(
    ("arch", "named"),
    [
        ({"model_type": "bert"}, "model_type=bert"),
        ({"model_type": "hubert", "hidden_siz": 16}, "hidden_siz"),
        ({"model_type": "wav2vec2", "layerdrop": 0.1}, "layerdrop is always 0.0"),
        ({"model_type": "wavlm", "conv_dim": [8]}, "convolutional layers is incorrect"),
        ({"hidden_size": 16}, "whisper encoder: unknown field hidden_size"),
    ],
)
def test_a_mistake_in_arch_is_named(arch: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        build_encoder(cfg.EncoderConfig(arch=arch), SDPA)
    assert "\n" not in str(error.value)
