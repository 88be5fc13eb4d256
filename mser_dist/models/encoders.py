"""The speech encoder that a run config or the card of an export names, by transformers' `model_type`."""

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, Wav2Vec2FeatureExtractor, WhisperConfig, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mser_dist import config as cfg
from mser_dist.audio import SAMPLE_RATE
from mser_dist.errors import UserError
from mser_dist.models import pretrained, sources, waveform
from mser_dist.models.attention import Attention, supported_by
from mser_dist.models.encoder import Encoder
from mser_dist.models.waveform import WaveformEncoder
from mser_dist.models.whisper import SpeechEncoder

TYPES = ("whisper", *waveform.MODELS)


def build_encoder(config: cfg.EncoderConfig, attention: Attention, dtype: torch.dtype = torch.float32) -> Encoder:
    """The encoder a run config asks for: pretrained, or from scratch with `arch`; with its layers, stride and padding.

    dtype: of a pretrained one. Raises `UserError` for weights or an `arch` that are none, or layers that are not there.
    """
    encoder = _whole(config, attention, dtype)
    depth = encoder.depth
    chosen = {"last": [depth], "all": list(range(depth + 1))}
    encoder.use(chosen[config.layers] if isinstance(config.layers, str) else config.layers, depth)
    encoder.stride, encoder.pad_seconds = config.stride, config.pad_seconds
    longest = getattr(encoder, "max_frames", None)  # Whisper's; the others have none
    if longest and (config.pad_seconds or 0) * 100 > longest:
        raise UserError(f"encoder.pad_seconds={config.pad_seconds}: the encoder takes {longest / 100:g} s at most")
    return encoder


def _whole(config: cfg.EncoderConfig, attention: Attention, dtype: torch.dtype) -> Encoder:
    if config.pretrained is not None:
        return _pretrained(config, attention, dtype)
    arch = {"model_type": "whisper", **config.arch}
    try:
        return _from_scratch(arch, attention)
    except UserError:
        raise
    except Exception as error:  # transformers checks its configs with several kinds of error, over several lines
        raise UserError(
            f"encoder.arch does not describe a {arch['model_type']} encoder: {' '.join(str(error).split())[:200]}"
        ) from error


def encoder_of(fields: dict[str, Any], normalize: bool, attention: Attention) -> Encoder:
    """An encoder with random weights, by all the fields of its transformers config."""
    if fields["model_type"] == "whisper":
        whisper_config = WhisperConfig.from_dict({**fields, "attn_implementation": attention.kernel})
        return SpeechEncoder(WhisperEncoder(whisper_config))
    model_class = waveform.MODELS[fields["model_type"]]
    kernel = supported_by(model_class, attention).kernel
    model_config = model_class.config_class.from_dict({**fields, "attn_implementation": kernel})
    return WaveformEncoder(model_class(model_config), normalize)


def encoder_config(encoder: Any) -> PreTrainedConfig:
    """The transformers config of an encoder."""
    config: PreTrainedConfig = encoder.whisper.config if isinstance(encoder, SpeechEncoder) else encoder.model.config
    return config


def _from_scratch(arch: dict[str, Any], attention: Attention) -> Encoder:
    if arch["model_type"] not in TYPES:
        raise UserError(f"encoder.arch.model_type={arch['model_type']}: use one of {', '.join(TYPES)}")
    config = AutoConfig.for_model(arch["model_type"])
    unknown = set(arch) - set(config.to_dict())
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]}")
    if arch["model_type"] == "whisper":
        # The decoder is never built; small numbers keep the config readable.
        return encoder_of({"decoder_layers": 0, **arch}, normalize=False, attention=attention)
    config = type(config).from_dict(arch)
    waveform.switch_off(config)
    for name in waveform.SWITCHED_OFF.keys() & arch.keys():
        if arch[name] != getattr(config, name):
            raise ValueError(f"{name} is always {getattr(config, name)} here: remove it")
    return encoder_of(config.to_dict(), normalize=True, attention=attention)


def _pretrained(config: cfg.EncoderConfig, attention: Attention, dtype: torch.dtype) -> Encoder:
    name = config.pretrained
    assert name is not None
    source = sources.resolve(name)
    found = pretrained.read_config("encoder", name, source)
    if found.model_type not in TYPES:
        raise UserError(
            f"encoder.pretrained={name} is a model of type {found.model_type}: name one of {', '.join(TYPES)}"
        )
    model_class, unused = WhisperModel, ["decoder.*", "proj_out.*"]
    if found.model_type != "whisper":
        model_class, unused = waveform.MODELS[found.model_type], ["*masked_spec_embed", "*adapter.*"]
        attention = supported_by(model_class, attention)
        waveform.switch_off(found)
    model = pretrained.load(
        model_class,
        "encoder",
        name,
        source,
        allow_missing=config.allow_missing,
        unused=unused,
        config=found,
        attn_implementation=attention.kernel,
        dtype=dtype,
    )
    if found.model_type == "whisper":
        return SpeechEncoder(model.encoder)
    return WaveformEncoder(model, _normalized(name, source.path))


def _normalized(name: str, path: str) -> bool:
    """Whether a checkpoint was trained on waveforms of zero mean and unit variance: a guess would cost accuracy."""
    try:
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"encoder.pretrained={name} has no preprocessor_config.json, which tells whether the waveform is "
            "normalised (do_normalize): copy it from where the model was published"
        ) from error
    if extractor.sampling_rate != SAMPLE_RATE:
        raise UserError(
            f"encoder.pretrained={name} is a model for {extractor.sampling_rate} Hz: name one for {SAMPLE_RATE} Hz"
        )
    return bool(extractor.do_normalize)
