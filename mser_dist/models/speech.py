"""The speech side of both stages: an encoder, and the Emotion Q-Former on top of it."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models.attention import Attention, supported_by
from mser_dist.models.encoders import Encoder, build_encoder, encoder_config, encoder_of


class SpeechModel(nn.Module):
    """Encoder → Emotion Q-Former: any clip becomes the same small number of emotion tokens."""

    def __init__(self, encoder: Encoder, qformer: Blip2QFormerModel, queries: int) -> None:
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

    def forward(self, speech: Tensor, lengths: Tensor) -> Tensor:
        """(B, n_mels, F) log-mel or (B, S) waveform, (B,) true frames or samples → (B, Q, width) emotion tokens."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
            features, mask = self.encoder(speech, lengths)
        tokens = self.qformer(
            query_embeds=self.queries.expand(len(speech), -1, -1),
            encoder_hidden_states=features,
            encoder_attention_mask=mask,
        )
        return tokens.last_hidden_state


def build_qformer(config: cfg.QFormerConfig, encoder_width: int, attention: Attention) -> Blip2QFormerModel:
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


def build_speech(encoder: cfg.EncoderConfig, qformer: cfg.QFormerConfig, attention: Attention) -> SpeechModel:
    """A fresh speech model for stage 1."""
    speech_encoder = build_encoder(encoder, attention)
    model = SpeechModel(speech_encoder, build_qformer(qformer, speech_encoder.width, attention), qformer.queries)
    if encoder.freeze:
        model.freeze_encoder()
    return model


def speech_from_card(card: dict[str, Any], attention: Attention) -> SpeechModel:
    """An empty speech model of the shape that `speech_card` described; its weights are loaded over it."""
    encoder = encoder_of(card["encoder"], card["features"]["normalize"], attention)
    encoder.pad_seconds = card["features"]["pad_seconds"]
    qformer_config = Blip2QFormerConfig.from_dict(
        {**card["qformer"], "attn_implementation": supported_by(Blip2QFormerModel, attention).kernel}
    )
    return SpeechModel(encoder, Blip2QFormerModel(qformer_config), card["queries"])


def speech_card(model: SpeechModel) -> dict[str, Any]:
    """The shape of a speech model as JSON."""
    return {
        "encoder": encoder_config(model.encoder).to_dict(),
        "features": asdict(model.encoder.features),
        "qformer": model.qformer.config.to_dict(),
        "queries": model.query_count,
    }
