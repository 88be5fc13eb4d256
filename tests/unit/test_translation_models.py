"""The backends of transformers, as small models with random weights; Whisper as it is; scorers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
import torch
from transformers import (
    GenerationConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    NllbTokenizer,
    SeamlessM4TFeatureExtractor,
    SeamlessM4TProcessor,
    SeamlessM4TTokenizer,
    SeamlessM4Tv2Config,
    SeamlessM4Tv2ForSpeechToSpeech,
    SeamlessM4Tv2ForTextToText,
    VitsConfig,
    VitsModel,
    VitsTokenizer,
)

from mser_dist.audio import SAMPLE_RATE
from mser_dist.errors import UserError
from mser_dist.models import sources
from mser_dist.synth.espeak import Espeak
from mser_dist.translation import languages
from mser_dist.translation.measures import character_error
from mser_dist.translation.parts import NotMadeError, Source
from mser_dist.translation.scorers import Export, Probe
from mser_dist.translation.speech_models import Seamless, Vits
from mser_dist.translation.text_model import TextModel
from mser_dist.translation.whisper import Whisper
from tests.unit import tiny_exports
from tests.unit.made_up_recordings import wave, write_set

needs_whisper = pytest.mark.skipif("pypi:whisper-base" not in sources.at_hand(), reason="whisper-base is not installed")
LETTERS = "abcdefghijklmnopqrstuvwxyz.▁"


def source(text: str | None = "the cat sleeps", language: str = "en", seed: int = 0) -> Source:
    return Source(f"clip{seed}", wave(seed), text, language, "anger", "made-up", "s", "female")


def nllb(folder: Path) -> Path:
    """An NLLB of two languages."""
    torch.manual_seed(0)
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *LETTERS])}
    tokenizer = NllbTokenizer(vocab=vocabulary, merges=[], extra_special_tokens=["eng_Latn", "fra_Latn", "<mask>"])
    sizes = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("ffn_dim", 32), ("attention_heads", 2))
    }
    ids: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    model = M2M100ForConditionalGeneration(
        M2M100Config(vocab_size=len(tokenizer), d_model=16, max_position_embeddings=64, init_std=1.0, **sizes, **ids)
    )
    model.generation_config.forced_eos_token_id = 2  # of random weights it does not come by itself
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_translation_model(tmp_path: Path) -> None:
    model = TextModel(str(nllb(tmp_path / "nllb")), beams=2, max_tokens=12, device="cpu")
    first = model.sentence(source(), "fr")
    assert first.text and first.checked is None and model.sentence(source(), "fr") == first
    said = set()
    for text in ("a dog sits", "it rains", "we walk", "no", "good night"):
        try:
            said.add(model.sentence(source(text), "fr").text)
        except NotMadeError as why:
            said.add(str(why))
    assert len(said) > 1, "it reads what it is given"
    assert "fra_Latn" not in first.text and model.about["type"] == "m2m_100" and model.about["beams"] == 2
    with pytest.raises(NotMadeError, match="does not know it"):
        model.sentence(source(), "it")
    with pytest.raises(NotMadeError, match="does not know el"):
        model.sentence(source(language="el-GR"), "fr")
    with pytest.raises(NotMadeError, match="no transcript"):
        model.sentence(source(None), "fr")
    assert model.languages() == {"en", "fr"}
    model._model.generation_config.forced_eos_token_id = None
    with pytest.raises(NotMadeError, match=r"longer than text\.max_tokens"):
        for text in ("a dog sits", "it rains", "we walk", "no", "good night"):
            model.sentence(source(text), "fr")


def vits(folder: Path, uroman: bool = False) -> Path:
    torch.manual_seed(0)
    config = VitsConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, flow_size=16,
        spectrogram_bins=9, upsample_initial_channel=16, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]], prior_encoder_num_flows=1,
        prior_encoder_num_wavenet_layers=1, posterior_encoder_num_wavenet_layers=1, duration_predictor_num_flows=1,
        depth_separable_num_layers=1, sampling_rate=24000,
    )  # fmt: skip
    VitsModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(["<pad>", "<unk>", *LETTERS])}))
    tokenizer = VitsTokenizer(str(folder / "vocab.json"), phonemize=False, is_uroman=uroman)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_voice_of_vits(tmp_path: Path) -> None:
    vits(tmp_path / "tts-fra")
    voice = Vits(str(tmp_path / "tts-{iso3}"), ["fr"], 0, "cpu")
    first = voice.speak(source(), "le chat dort", "fr")
    assert first.dtype == np.float32 and first.ndim == 1 and len(first) > 50 and np.isfinite(first).all()
    voice.speak(source(seed=1), "un autre", "fr")
    assert np.array_equal(voice.speak(source(), "le chat dort", "fr"), first), "whatever was said before"
    assert not np.array_equal(
        Vits(str(tmp_path / "tts-{iso3}"), ["fr"], 1, "cpu").speak(source(), "le chat dort", "fr")[:50], first[:50]
    )
    with pytest.raises(NotMadeError, match="no letter"):
        voice.speak(source(), "Η", "fr")
    with pytest.raises(UserError, match="tts-deu"):
        Vits(str(tmp_path / "tts-{iso3}"), ["fr", "de"], 0, "cpu")
    with pytest.raises(UserError, match="is one voice, for fr, de"):
        Vits(str(tmp_path / "tts-fra"), ["fr", "de"], 0, "cpu")
    with pytest.raises(UserError, match="romanised"):
        Vits(str(vits(tmp_path / "zho", uroman=True)), ["zh"], 0, "cpu")


def seamless(folder: Path) -> Path:
    torch.manual_seed(0)
    tokens = ["<pad>", "<unk>", "<s>", "</s>", *LETTERS]
    tokenizer = SeamlessM4TTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, extra_special_tokens=["__eng__", "__fra__"]
    )
    size = len(tokenizer)
    config = SeamlessM4Tv2Config(
        vocab_size=size, t2u_vocab_size=24, char_vocab_size=40, hidden_size=16, max_new_tokens=10,
        max_position_embeddings=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, initializer_range=0.5, speech_encoder_layers=1,
        speech_encoder_attention_heads=2, speech_encoder_intermediate_size=16, num_adapter_layers=1,
        t2u_encoder_layers=1, t2u_decoder_layers=1, t2u_encoder_ffn_dim=16, t2u_decoder_ffn_dim=16,
        t2u_encoder_attention_heads=2, t2u_decoder_attention_heads=2, t2u_max_position_embeddings=512,
        t2u_variance_predictor_embed_dim=16, t2u_variance_predictor_hidden_dim=16, unit_hifi_gan_vocab_size=24,
        unit_embed_dim=16, lang_embed_dim=8, spkr_embed_dim=8, vocoder_num_langs=3, vocoder_num_spkrs=2,
        upsample_initial_channel=16, upsample_rates=[4, 4], upsample_kernel_sizes=[8, 8], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]], pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3,
        t2u_pad_token_id=1, t2u_eos_token_id=2,
    )  # fmt: skip
    code = {"eng": size - 2, "fra": size - 1}
    generation = GenerationConfig(
        max_new_tokens=10, pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3,
        forced_eos_token_id=3,
    )  # fmt: skip
    lists: dict[str, Any] = {
        "text_decoder_lang_to_code_id": code,
        "t2u_lang_code_to_id": {"eng": 20, "fra": 21},
        "vocoder_lang_code_to_id": {"eng": 0, "fra": 1},
        "id_to_text": {str(i): "a" if i < 4 or i >= len(tokens) else tokens[i] for i in range(size)},
        "char_to_id": {letter: 4 + i for i, letter in enumerate(LETTERS)},
    }
    for name, value in lists.items():
        setattr(generation, name, value)
    model = SeamlessM4Tv2ForSpeechToSpeech(config)
    model.generation_config = generation
    model.save_pretrained(folder / "speech")
    SeamlessM4TProcessor(SeamlessM4TFeatureExtractor(), tokenizer).save_pretrained(folder / "speech")
    text = SeamlessM4Tv2ForTextToText(config)
    text.generation_config = generation
    text.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return folder


def test_seamless_from_text_and_from_speech(tmp_path: Path) -> None:
    seamless(tmp_path)
    model = TextModel(str(tmp_path / "text"), beams=1, max_tokens=10, device="cpu")
    assert model.sentence(source(), "fr").text == model.sentence(source(), "fr").text
    voice = Seamless(str(tmp_path / "speech"), ["fr"], 0, "cpu")
    assert voice.languages() == {"en", "fr"}
    first = voice.speak(source(), "", "fr")
    assert voice.said and first.dtype == np.float32 and first.ndim == 1 and len(first) and np.isfinite(first).all()
    voice.speak(source(seed=1), "", "fr")
    assert np.array_equal(voice.speak(source(), "", "fr"), first)
    with pytest.raises(UserError, match="is no SeamlessM4T-v2"):
        Seamless(str(nllb(tmp_path / "nllb")), ["fr"], 0, "cpu")
    with pytest.raises(UserError, match="is no VITS"):
        Vits(str(tmp_path / "nllb"), ["fr"], 0, "cpu")
    with pytest.raises(UserError, match="is a vits"):
        TextModel(str(vits(tmp_path / "vits")), 1, 8, "cpu")


def test_names_of_languages() -> None:
    assert languages.among("zh", {"zho_Hans", "zho_Hant"}) == "zho_Hans"
    assert languages.among("fr", {"fra_Latn"}) == "fra_Latn" and languages.among("fr", {"__fr__"}) == "__fr__"
    assert languages.among("fr", {"__fra__"}) == "__fra__" and languages.among("xx", {"fra"}) is None
    assert (languages.three("de"), languages.three("yue"), languages.three("zh-CN")) == ("deu", "yue", "cmn")


@needs_whisper
def test_whisper_writes_down_what_is_said() -> None:
    said = "The weather will be fine tomorrow, and we walk into the forest."
    samples, rate = Espeak().synthesize(said, "en", rate=150)
    heard = soxr.resample(samples.astype(np.float32) / 32768, rate, SAMPLE_RATE)
    whisper = Whisper("pypi:whisper-base")
    assert character_error(whisper.write(heard, "en"), said) < 0.2
    with pytest.raises(NotMadeError, match="does not know xx"):
        whisper.write(heard, "xx")


def test_a_trained_model_as_scorer(tmp_path: Path) -> None:
    scorer = Export(str(tiny_exports.stage2(tmp_path / "run")), ["anger", "sad"], "cpu")
    scores = scorer.score(wave(0))
    assert scores.keys() == {"anger", "sad"} and sum(scores.values()) == pytest.approx(1)
    [*parts] = scorer.about["trained_on"]["parts"]
    assert parts[0]["corpora"] == ["made-up"] and json.dumps(scorer.about)


@needs_whisper
def test_a_probe_as_scorer(tmp_path: Path) -> None:
    write_set(tmp_path / "set", {f"a{i}": "train" if i < 6 else "test" for i in range(8)})
    scorer = Probe([str(tmp_path / "set")])
    assert scorer.score(wave(0)).keys() == {"anger", "happy"}
    assert scorer.score(wave(0))["happy"] > 0.5 > scorer.score(wave(1))["happy"], "clips that it was fitted to"
    assert scorer.about["clips"] == 6 and scorer.about["trained_on"]["parts"][0]["clips"] == 6
    write_set(tmp_path / "one", {"a": "train"})
    with pytest.raises(UserError, match="no clips of two labels"):
        Probe([str(tmp_path / "one")])
