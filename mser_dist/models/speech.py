"""The speech side of both stages: a Whisper encoder of any length, and the Emotion Q-Former on top of it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, WhisperConfig, WhisperModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models import sources
from mser_dist.models.attention import Attention, supported_by


class SpeechEncoder(nn.Module):
    """A Whisper encoder that takes clips as long as they are, where transformers' own insists on 30 s of padding.

    Positions are absolute, so the frames of a short clip see what they would see in a padded one, minus the padding.
    """

    def __init__(self, whisper: WhisperEncoder) -> None:
        super().__init__()
        self.whisper = whisper

    @property
    def width(self) -> int:
        return int(self.whisper.config.d_model)

    @property
    def n_mels(self) -> int:
        return int(self.whisper.config.num_mel_bins)

    @property
    def max_frames(self) -> int:
        """Longest log-mel that has positions, in frames of 10 ms."""
        return int(self.whisper.config.max_source_positions) * 2

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n_mels, F) log-mel and (B,) true frames → (B, T, width) features and (B, T) mask, T = ceil(F / 2)."""
        w = self.whisper
        if mel.shape[-1] > self.max_frames:
            raise UserError(
                f"a clip of {mel.shape[-1] / 100:.1f} s is longer than the encoder's {self.max_frames / 100:.0f} s: "
                f"set data.max_seconds={self.max_frames / 100:.0f} and split or drop longer clips"
            )
        frames = torch.arange(mel.shape[-1], device=mel.device)
        real = (frames[None, :] < lengths[:, None]).unsqueeze(1)  # (B, 1, F)
        mel = mel.to(w.conv1.weight.dtype)
        # Zeroed where conv2 would pad with zeros, so that a clip's features do not depend on its batch.
        x = nn.functional.gelu(w.conv1(mel)) * real
        x = nn.functional.gelu(w.conv2(x)).transpose(1, 2)  # (B, T, D)
        steps = torch.arange(x.shape[1], device=x.device)
        mask = steps[None, :] < ((lengths + 1) // 2)[:, None]  # (B, T)
        x = x + w.embed_positions(steps)
        x = nn.functional.dropout(x, p=w.dropout, training=self.training)
        bias = create_bidirectional_mask(config=w.config, inputs_embeds=x, attention_mask=mask)
        for layer in w.layers:
            x = layer(x, bias)
        return w.layer_norm(x), mask


class SpeechModel(nn.Module):
    """Encoder → Emotion Q-Former: any clip becomes the same small number of emotion tokens."""

    def __init__(self, encoder: SpeechEncoder, qformer: Blip2QFormerModel, queries: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.qformer = qformer
        self.queries = nn.Parameter(torch.randn(1, queries, qformer.config.hidden_size) * 0.02)
        self.query_count = queries  # `queries` itself has no shape while ZeRO-3 has it partitioned
        self.encoder_frozen = False

    @property
    def width(self) -> int:
        return int(self.qformer.config.hidden_size)

    def freeze_encoder(self) -> None:
        """Keep the encoder as it is: no gradients, and no dropout in its forward."""
        self.encoder.requires_grad_(False)
        self.encoder.eval()
        self.encoder_frozen = True

    def train(self, mode: bool = True) -> "SpeechModel":
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """(B, n_mels, F) log-mel and (B,) true frames → (B, Q, width) emotion tokens."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            features, mask = self.encoder(mel, lengths)
        tokens = self.qformer(
            query_embeds=self.queries.expand(len(mel), -1, -1),
            encoder_hidden_states=features,
            encoder_attention_mask=mask,
        )
        return tokens.last_hidden_state


def build_encoder(config: cfg.Encoder, attention: Attention) -> SpeechEncoder:
    """The encoder a run config asks for: pretrained, or from scratch with `arch`."""
    if config.pretrained is None:
        try:
            whisper = WhisperEncoder(_whisper_config(config.arch, attention))
        except Exception as error:  # transformers checks its configs with several kinds of error
            raise UserError(f"encoder.arch is not a valid WhisperConfig: {str(error).splitlines()[0]}") from error
    else:
        source = sources.resolve(config.pretrained)
        try:
            whisper = WhisperModel.from_pretrained(
                source.path, attn_implementation=attention.kernel, dtype=torch.float32
            ).encoder
        except (OSError, ValueError) as error:
            raise sources.explain(config.pretrained, error) from error
    return SpeechEncoder(whisper)


def _whisper_config(arch: dict[str, Any], attention: Attention) -> WhisperConfig:
    unknown = set(arch) - set(WhisperConfig().to_dict())
    if unknown:
        raise ValueError(f"unknown field {sorted(unknown)[0]}")
    # The decoder is never built; small numbers keep the config readable.
    return WhisperConfig(**{"decoder_layers": 0, **arch}, attn_implementation=attention.kernel)


def build_qformer(config: cfg.QFormer, encoder_width: int, attention: Attention) -> Blip2QFormerModel:
    """BLIP-2's Q-Former (arXiv 2301.12597) from transformers, cross-attending to the speech in every layer."""
    if config.width % config.heads:
        raise UserError(f"qformer.width={config.width} does not divide by qformer.heads={config.heads}")
    return Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            encoder_hidden_size=encoder_width,
            cross_attention_frequency=1,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            attn_implementation=supported_by(Blip2QFormerModel, attention).kernel,
        )
    )


def build_speech(encoder: cfg.Encoder, qformer: cfg.QFormer, attention: Attention) -> SpeechModel:
    """A fresh speech model for stage 1."""
    speech_encoder = build_encoder(encoder, attention)
    model = SpeechModel(speech_encoder, build_qformer(qformer, speech_encoder.width, attention), qformer.queries)
    if encoder.freeze:
        model.freeze_encoder()
    return model


def speech_from_card(card: dict[str, Any], attention: Attention) -> SpeechModel:
    """An empty speech model of the shape that `speech_card` described; its weights are loaded over it."""
    encoder_config = WhisperConfig.from_dict({**card["whisper"], "attn_implementation": attention.kernel})
    encoder = SpeechEncoder(WhisperEncoder(encoder_config))
    qformer_config = Blip2QFormerConfig.from_dict(
        {**card["qformer"], "attn_implementation": supported_by(Blip2QFormerModel, attention).kernel}
    )
    return SpeechModel(encoder, Blip2QFormerModel(qformer_config), card["queries"])


def speech_card(model: SpeechModel) -> dict[str, Any]:
    """The shape of a speech model as JSON."""
    return {
        "whisper": model.encoder.whisper.config.to_dict(),
        "qformer": model.qformer.config.to_dict(),
        "queries": model.query_count,
        "n_mels": model.encoder.n_mels,
    }
