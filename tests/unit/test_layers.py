"""Which hidden states of an encoder are used, over which frames, and what a frozen one gives."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import HubertConfig, HubertModel, Wav2Vec2Config, Wav2Vec2Model, WavLMConfig, WavLMModel
from transformers.models.whisper.modeling_whisper import WhisperConfig, WhisperEncoder

from mser_dist import config as cfg
from mser_dist.config.validate import check_values
from mser_dist.errors import UserError
from mser_dist.models.attention import Attention
from mser_dist.models.encoder import Encoder
from mser_dist.models.encoders import build_encoder
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.models.speech import build_speech, speech_card, speech_from_card
from mser_dist.models.waveform import WaveformEncoder, switch_off
from mser_dist.models.whisper import SpeechEncoder

SDPA = Attention("sdpa", "for the test")
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
CONVOLUTIONS = {"conv_dim": [8, 8], "conv_kernel": [20, 9], "conv_stride": [10, 8], "num_conv_pos_embeddings": 8}
WHISPER = {"d_model": 16, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_layers": 0}
QFORMER = cfg.QFormerConfig(queries=3, layers=1, width=16, heads=2, dropout=0.0)
KINDS = ["whisper", "wav2vec2", "wav2vec2-stable", "hubert", "wavlm", "wavlm-stable"]


def library(kind: str) -> Any:
    """An encoder of transformers with random weights, final norm and all far from their start."""
    torch.manual_seed(0)
    if kind == "whisper":
        model: Any = WhisperEncoder(WhisperConfig(**WHISPER, attn_implementation="sdpa"))
    else:
        name, _, stable = kind.partition("-")
        config_class, model_class = {
            "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
            "hubert": (HubertConfig, HubertModel),
            "wavlm": (WavLMConfig, WavLMModel),
        }[name]
        norm = "layer" if stable else "group"
        config = config_class(**SIZES, **CONVOLUTIONS, do_stable_layer_norm=bool(stable), feat_extract_norm=norm)
        switch_off(config)
        model = model_class(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def wrapped(model: Any) -> Encoder:
    return SpeechEncoder(model) if isinstance(model, WhisperEncoder) else WaveformEncoder(model, normalize=False)


def noise(samples: int) -> NDArray[np.float32]:
    return np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)


def inputs(kind: str) -> tuple[Tensor, Tensor]:
    if kind == "whisper":
        return torch.randn(1, 80, 3000), torch.tensor([3000])
    return torch.randn(1, 2000), torch.tensor([2000])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [[0], [1], [2], [3], [0, 2], [0, 1, 2, 3]], ids=str)
def test_the_hidden_states_are_those_of_transformers(kind: str, layers: list[int]) -> None:
    speech, lengths = inputs(kind)
    given = library(kind)(speech, output_hidden_states=True)
    reference = (*given.hidden_states[:3], given.last_hidden_state)  # which not every class has among the others
    ours = wrapped(library(kind))
    ours.use(layers, 3)
    x, mask = ours(speech, lengths)
    assert x.shape[2] == len(layers) and mask.all()
    for place, number in enumerate(layers):
        torch.testing.assert_close(x[:, :, place], reference[number], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_above_the_highest_used_are_gone(kind: str) -> None:
    ours = wrapped(library(kind))
    before = sum(p.numel() for p in ours.parameters())
    ours.use([1], 3)
    whole: Any = ours
    model = whole.whisper if kind == "whisper" else whole.model.encoder
    assert len(model.layers) == 1 and sum(p.numel() for p in ours.parameters()) < before
    ours(*inputs(kind))[0].sum().backward()
    without = [n for n, p in ours.named_parameters() if p.requires_grad and p.grad is None]
    assert without in ([], ["model.masked_spec_embed"]), "all that is left is used, and can be trained"


@pytest.mark.parametrize("layers", [4, [1, 9], [7]], ids=str)
def test_a_layer_that_is_not_there_is_named(layers: Any) -> None:
    config = cfg.EncoderConfig(arch={**WHISPER, "decoder_layers": 0}, layers=layers)
    check_values(config)
    with pytest.raises(UserError, match=r"encoder.layers names \d, and the encoder has 3 layers: use numbers from 0"):
        build_encoder(config, SDPA)


@pytest.mark.parametrize(
    ("given", "read"),
    [("last", "last"), ("all", "all"), ("3", [3]), (3, [3]), ("2,3", [2, 3]), ([0, 2], [0, 2])],
    ids=str,
)
def test_layers_are_read_from_yaml_and_from_the_command_line(given: Any, read: Any) -> None:
    config = cfg.EncoderConfig(layers=given)
    check_values(config)
    assert config.layers == read


@pytest.mark.parametrize("wrong", ["first", [2, 1], [1, 1], [], [-1], True, None], ids=str)
def test_layers_that_mean_nothing_are_refused(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"^encoder.layers "):
        check_values(cfg.Stage1(encoder=cfg.EncoderConfig(layers=wrong)))


@torch.no_grad()
@pytest.mark.parametrize("arch", [WHISPER, {"model_type": "wavlm", **SIZES, **CONVOLUTIONS}], ids=["whisper", "wavlm"])
def test_layers_are_mixed_by_a_softmax_that_is_learned_and_kept(arch: dict[str, Any]) -> None:
    torch.manual_seed(0)
    speech = build_speech(cfg.EncoderConfig(arch=arch, layers=[1, 2], stride=2), QFORMER, SDPA).eval()
    given = inputs("whisper" if arch is WHISPER else "wavlm")
    features, mask = speech.any_encoder(*given)
    assert speech.layer_mix is not None
    speech.layer_mix.data = torch.tensor([0.3, -0.2])
    share = torch.tensor([0.3, -0.2]).softmax(0)
    mixed = share[0] * features[:, :, 0] + share[1] * features[:, :, 1]
    own = speech.qformer(
        query_embeds=speech.queries, encoder_hidden_states=mixed, encoder_attention_mask=mask
    ).last_hidden_state
    torch.testing.assert_close(speech(*given), own, rtol=0, atol=1e-6)
    again = speech_from_card(speech_card(speech), SDPA).eval()
    again.load_state_dict(speech.state_dict())
    torch.testing.assert_close(again(*given), speech(*given), rtol=0, atol=0)
    with torch.enable_grad():
        speech(*given)[..., 0].sum().backward()  # not of all: a layer norm keeps their sum
    assert speech.layer_mix.grad is not None and speech.layer_mix.grad.abs().sum() > 0


@torch.no_grad()
def test_layers_side_by_side_are_one_wide_feature() -> None:
    torch.manual_seed(0)
    qformer = cfg.QFormerConfig(queries=3, layers=1, width=16, heads=2, dropout=0.0, pool=True)
    speech = build_speech(cfg.EncoderConfig(arch=WHISPER, layers=[1, 2], combine="concat"), qformer, SDPA).eval()
    assert speech.layer_mix is None and speech.qformer.config.encoder_hidden_size == 32
    again = speech_from_card(speech_card(speech), SDPA).eval()
    again.load_state_dict(speech.state_dict())
    given = inputs("whisper")
    torch.testing.assert_close(again(*given), speech(*given), rtol=0, atol=0)
    before = speech(*given)
    assert speech.pool is not None
    speech.pool.weight[:, 16:] = 0  # the second layer is heard too
    assert not torch.equal(speech(*given), before)


@torch.no_grad()
def test_the_mean_of_a_clips_own_frames_is_added_to_each_token() -> None:
    torch.manual_seed(0)
    qformer = cfg.QFormerConfig(queries=3, layers=1, width=16, heads=2, dropout=0.0, pool=True)
    speech = build_speech(cfg.EncoderConfig(arch=WHISPER, freeze=True), qformer, SDPA).eval()
    features, lengths = torch.randn(2, 9, 1, 16), torch.tensor([9, 4])
    together = speech(features, lengths)
    pool, speech.pool = speech.pool, None
    assert pool is not None
    without = speech(features, lengths)
    for row, n in enumerate(lengths.tolist()):
        mean = pool(features[row, :n, 0].mean(0))
        torch.testing.assert_close(together[row], without[row] + mean, rtol=0, atol=1e-6)


@torch.no_grad()
def test_dropped_features_are_those_of_a_whole_clip_in_training_alone() -> None:
    torch.manual_seed(0)
    qformer = cfg.QFormerConfig(queries=3, layers=1, width=16, heads=2, dropout=0.0, feature_dropout=0.5)
    speech = build_speech(cfg.EncoderConfig(arch=WHISPER, freeze=True), qformer, SDPA)
    heard: list[Tensor] = []
    speech.qformer.register_forward_pre_hook(
        lambda _, __, given: heard.append(given["encoder_hidden_states"]), with_kwargs=True
    )
    features, lengths = torch.ones(4, 9, 1, 16), torch.tensor([9] * 4)
    speech.eval()(features, lengths)
    speech.train()(features, lengths)
    assert (heard[0] == 1).all()
    assert set(heard[1].unique().tolist()) == {0, 2}, "what is left counts as much more"
    assert (heard[1] == heard[1][:, :1]).all() and not (heard[1] == heard[1][:1]).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["whisper", "wav2vec2-stable"])
def test_padding_is_attended_to_and_not_given_on(kind: str) -> None:
    ours, seconds = wrapped(library(kind)), 1.0
    wave = noise(6400)  # 0.4 s
    ours.pad_seconds = seconds
    padded, own = torch.from_numpy(ours.features(wave))[None], torch.tensor([ours.features.own(len(wave))])
    x, mask = ours(padded, own)
    ours.pad_seconds = None
    as_if_its_own, _ = ours(padded, torch.tensor([padded.shape[-1]]))
    alone, _ = ours(torch.from_numpy(ours.features(wave))[None], own)
    assert x.shape == alone.shape and mask.all(), "a clip's frames are its own"
    torch.testing.assert_close(x, as_if_its_own[:, : x.shape[1]], rtol=0, atol=1e-6)
    assert (x - alone).abs().max() > 1e-3, "the encoder has seen the silence"


@torch.no_grad()
@pytest.mark.parametrize("pad_seconds", [None, 0.5])
@pytest.mark.parametrize("stride", [1, 3, 1000])
@pytest.mark.parametrize("kind", ["whisper", "hubert"])
def test_a_stride_averages_frames_of_the_clip_alone(kind: str, stride: int, pad_seconds: float | None) -> None:
    whole, ours = wrapped(library(kind)), wrapped(library(kind))
    whole.pad_seconds = ours.pad_seconds = pad_seconds
    ours.stride = stride
    waves = [noise(size) for size in (6400, 16000, 4000)]
    fed = [torch.from_numpy(ours.features(wave)) for wave in waves]
    batch = torch.zeros(3, *fed[0].shape[:-1], max(f.shape[-1] for f in fed))
    for row, f in enumerate(fed):
        batch[row, ..., : f.shape[-1]] = f
    lengths = torch.tensor([ours.features.own(len(wave)) for wave in waves])
    x, mask = ours(batch, lengths)
    frames, frame_mask = whole(batch, lengths)
    for row in range(3):
        expected = torch.stack([part.mean(0) for part in frames[row, frame_mask[row]].split(stride)])
        torch.testing.assert_close(x[row, mask[row]], expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pad_seconds", [None, 0.5])
@pytest.mark.parametrize("kind", ["whisper", "wavlm", "wav2vec2-stable"])
def test_a_frozen_encoder_gives_the_same_bits_in_any_batch(kind: str, pad_seconds: float | None) -> None:
    encoder = wrapped(library(kind))
    encoder.pad_seconds = pad_seconds
    frozen = FrozenEncoder(encoder)
    waves = [noise(size) for size in (6400, 16000, 4000)]
    fed = [torch.from_numpy(encoder.features(wave)) for wave in waves]
    lengths = torch.tensor([encoder.features.own(len(wave)) for wave in waves])
    batch = torch.zeros(3, *fed[0].shape[:-1], max(f.shape[-1] for f in fed))
    for row, f in enumerate(fed):
        batch[row, ..., : f.shape[-1]] = f
    together = frozen(batch, lengths)
    for row in range(3):
        [alone] = frozen(fed[row][None], lengths[row : row + 1])
        torch.testing.assert_close(together[row], alone, rtol=0, atol=0)


def test_the_hash_of_an_encoder_is_of_weights_layers_and_padding() -> None:
    def frozen(**changes: Any) -> str:
        torch.manual_seed(0)
        speech = build_speech(cfg.EncoderConfig(arch=WHISPER, freeze=True, **changes), QFORMER, SDPA)
        assert speech.frozen is not None
        again = speech_from_card(speech_card(speech), SDPA)
        again.any_encoder.load_state_dict(speech.frozen.encoder.state_dict())
        again.freeze_encoder()
        assert again.frozen is not None and again.frozen.sha256() == speech.frozen.sha256(), "an export's is the same"
        return speech.frozen.sha256()

    assert frozen() == frozen(cache="off")
    changes: list[dict[str, Any]] = [{}, {"layers": [2]}, {"layers": "all"}, {"stride": 2}, {"pad_seconds": 2.0}]
    assert len({frozen(**change) for change in changes}) == len(changes)
    torch.manual_seed(1)
    other = build_speech(cfg.EncoderConfig(arch=WHISPER, freeze=True), QFORMER, SDPA).frozen
    assert other is not None and other.sha256() != frozen()
