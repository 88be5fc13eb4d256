"""The speech side of both stages: an encoder, and the Emotion Q-Former on top of it."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models.attention import Attention, supported_by
from mser_dist.models.encoder import Encoder
from mser_dist.models.encoders import build_encoder, encoder_config, encoder_of
from mser_dist.models.frozen import FrozenEncoder
from mser_dist.models.normalize import Statistics


class SpeechModel(nn.Module):
    """Encoder → Emotion Q-Former: any clip becomes the same small number of emotion tokens.

    An encoder that is trained is a part of the model. A frozen one is not: the model is then given the features that
    it made of the clips, by `prepared` here or once for all (`encoded`).
    """

    def __init__(
        self,
        encoder: Encoder,
        qformer: Blip2QFormerModel,
        queries: int,
        *,
        concat: bool = False,
        pool: bool = False,
        feature_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder: Encoder | None = encoder
        self.frozen: FrozenEncoder | None = None
        self.qformer = qformer
        self.queries = nn.Parameter(torch.randn(1, queries, qformer.config.hidden_size) * 0.02)
        self.query_count = queries  # `queries` itself has no shape while ZeRO-3 has it partitioned
        # What a mean over time says of emotion is much, and a Q-Former of few clips is long in finding it.
        self.pool = nn.Linear(qformer.config.encoder_hidden_size, self.width) if pool else None
        self.feature_dropout = feature_dropout
        self.layers = encoder.layers
        # SUPERB's way (arXiv 2105.01051): a softmax over the layers says how much of each is heard.
        self.concat = concat
        several = len(self.layers) > 1 and not concat
        self.layer_mix = nn.Parameter(torch.zeros(len(self.layers))) if several else None
        self.normalize = "none"  # corpus or speaker: `statistics` are wanted
        self.statistics: Statistics | None = None  # by which the features are normalised
        self._shares: Tensor | None = None  # of the last forward pass: between two, ZeRO-3 has the mix in parts

    @property
    def width(self) -> int:
        return int(self.qformer.config.hidden_size)

    @property
    def any_encoder(self) -> Encoder:
        """The encoder, trained or frozen."""
        if self.frozen is not None:
            return self.frozen.encoder
        assert self.encoder is not None
        return self.encoder

    def freeze_encoder(self) -> None:
        """Take the encoder out of what is trained: no gradients, no dropout, and the model is fed its features."""
        if self.frozen is None:
            self.frozen = FrozenEncoder(self.any_encoder)
            self.encoder = None

    def layer_shares(self) -> dict[str, Tensor]:
        """How much of each layer is heard, by the last forward pass; for telemetry. Empty where one alone is used."""
        if self._shares is None:
            return {}
        return {f"layer_share_{n}": share for n, share in zip(self.layers, self._shares, strict=True)}

    def prepared(self, batch: dict[str, Any], device: str) -> dict[str, Any]:
        """A batch of clips (`pad_speech`) as this model takes it, its tensors on `device`: features if it is frozen."""
        if self.frozen is not None and not batch.get("encoded"):
            clips = self.frozen(batch["speech"], batch["lengths"])  # B × (T_i, L, D)
            lengths = torch.tensor([len(clip) for clip in clips])
            batch = {**batch, "speech": pad_sequence(clips, batch_first=True), "lengths": lengths, "encoded": True}
        if self.statistics is not None and "group" in batch:
            batch = {**batch, "speech": self.statistics.apply(_moved(batch["speech"], device), batch["group"])}
        return {k: _moved(v, device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def forward(self, speech: Tensor, lengths: Tensor) -> Tensor:
        """Clips → (B, Q, width) emotion tokens.

        Of an encoder that is trained (B, n_mels, F) log-mel or (B, S) waveform, and (B,) own frames or samples; of a
        frozen one its features (B, T, L, D) of L layers, and (B,) frames.
        """
        if self.encoder is not None:
            features, mask = self.encoder(speech, lengths)  # (B, T, L, D), (B, T)
        else:
            features, mask = speech, torch.arange(speech.shape[1], device=speech.device) < lengths[:, None]
        if self.training and self.feature_dropout:
            kept = torch.rand(len(features), 1, *features.shape[2:], device=features.device) >= self.feature_dropout
            features = features * kept / (1 - self.feature_dropout)
        if self.layer_mix is None:
            heard = features.flatten(2)  # (B, T, L · D)
        else:
            shares = self.layer_mix.float().softmax(0)  # (L,)
            heard = torch.einsum("btld,l->btd", features, shares.to(features.dtype))
            self._shares = shares.detach()
        tokens = self.qformer(
            query_embeds=self.queries.expand(len(speech), -1, -1),
            encoder_hidden_states=heard,
            encoder_attention_mask=mask,
        )
        emotion: Tensor = tokens.last_hidden_state
        if self.pool is None:
            return emotion
        real = mask.unsqueeze(-1).to(heard.dtype)  # (B, T, 1)
        return emotion + self.pool((heard * real).sum(1) / real.sum(1)).unsqueeze(1)


def _moved(tensor: Tensor, device: str) -> Tensor:
    """On the device, in the dtype that it has. From pinned memory, so that nobody waits for a copy to a GPU."""
    if tensor.device.type == "cpu" and device.startswith("cuda"):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


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


def build_speech(
    encoder: cfg.EncoderConfig, qformer: cfg.QFormerConfig, attention: Attention, dtype: torch.dtype = torch.float32
) -> SpeechModel:
    """A fresh speech model for stage 1; dtype: of a pretrained encoder."""
    speech_encoder = build_encoder(encoder, attention, dtype)
    concat = encoder.combine == "concat"
    width = speech_encoder.width * (len(speech_encoder.layers) if concat else 1)
    model = SpeechModel(
        speech_encoder,
        build_qformer(qformer, width, attention),
        qformer.queries,
        concat=concat,
        pool=qformer.pool,
        feature_dropout=qformer.feature_dropout,
    )
    if encoder.freeze:
        model.freeze_encoder()
    model.normalize = encoder.normalize
    return model


def speech_from_card(card: dict[str, Any], attention: Attention) -> SpeechModel:
    """An empty speech model of the shape that `speech_card` described; its weights are loaded over it."""
    encoder = encoder_of(card["encoder"], card["features"]["normalize"], attention)
    used = card.get("layers", {"numbers": [encoder.depth], "depth": encoder.depth, "stride": 1})  # before 0.3.0
    encoder.use(used["numbers"], used["depth"])
    encoder.stride, encoder.pad_seconds = used["stride"], card["features"]["pad_seconds"]
    qformer_config = Blip2QFormerConfig.from_dict(
        {**card["qformer"], "attn_implementation": supported_by(Blip2QFormerModel, attention).kernel}
    )
    more = {name: card[name] for name in ("concat", "pool", "feature_dropout") if name in card}  # from 0.3.0 on
    model = SpeechModel(encoder, Blip2QFormerModel(qformer_config), card["queries"], **more)
    model.normalize = card.get("normalize", "none")
    return model


def speech_card(model: SpeechModel) -> dict[str, Any]:
    """The shape of a speech model as JSON."""
    encoder = model.any_encoder
    return {
        "encoder": encoder_config(encoder).to_dict(),
        "features": asdict(encoder.features),
        "layers": {"numbers": list(encoder.layers), "depth": encoder.depth, "stride": encoder.stride},
        "frozen": model.frozen is not None,
        "normalize": model.normalize,
        "qformer": model.qformer.config.to_dict(),
        "queries": model.query_count,
        "concat": model.concat,
        "pool": model.pool is not None,
        "feature_dropout": model.feature_dropout,
    }
