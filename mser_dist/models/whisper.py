"""Whisper's encoder (arXiv 2212.04356) for log-mels of any length."""

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mser_dist.errors import UserError
from mser_dist.stream.features import Features


class SpeechEncoder(nn.Module):
    """A Whisper encoder that takes clips as long as they are, where transformers' own insists on 30 s of padding.

    Positions are absolute, so the frames of a short clip see what they would see in a padded one, minus the padding.
    """

    def __init__(self, whisper: WhisperEncoder) -> None:
        super().__init__()
        self.whisper = whisper
        self.pad_seconds: float | None = None

    @property
    def width(self) -> int:
        return int(self.whisper.config.d_model)

    @property
    def features(self) -> Features:
        return Features(n_mels=int(self.whisper.config.num_mel_bins), pad_seconds=self.pad_seconds)

    @property
    def max_frames(self) -> int:
        """Longest log-mel that has positions, in frames of 10 ms."""
        return int(self.whisper.config.max_source_positions) * 2

    def forward(self, speech: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n_mels, F) log-mel and (B,) true frames → (B, T, width) features and (B, T) mask, T = ceil(F / 2)."""
        w = self.whisper
        if speech.shape[-1] > self.max_frames:
            raise UserError(
                f"a clip of {speech.shape[-1] / 100:.1f} s is longer than the encoder's {self.max_frames / 100:.0f} s: "
                f"set data.max_seconds={self.max_frames / 100:.0f} and split or drop longer clips"
            )
        frames = torch.arange(speech.shape[-1], device=speech.device)
        real = (frames[None, :] < lengths[:, None]).unsqueeze(1)  # (B, 1, F)
        mel = speech.to(w.conv1.weight.dtype)
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
