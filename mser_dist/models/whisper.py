"""Whisper's encoder (arXiv 2212.04356) for log-mels of any length."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mser_dist.errors import UserError
from mser_dist.models.encoder import Encoder
from mser_dist.stream.features import Features


class SpeechEncoder(Encoder):
    """A Whisper encoder that takes clips as long as they are, where transformers' own insists on 30 s of padding.

    Positions are absolute, so the frames of a short clip see what they would see in a padded one, minus the padding.
    """

    def __init__(self, whisper: WhisperEncoder) -> None:
        super().__init__(len(whisper.layers))
        self.whisper: Any = whisper

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

    def cut(self, highest: int) -> None:
        del self.whisper.layers[highest:]
        self.whisper.config.encoder_layers = highest
        if highest < self.depth:
            self.whisper.layer_norm = nn.Identity()

    def frames(self, lengths: Tensor) -> Tensor:
        return (lengths + 1) // 2

    def hidden(self, speech: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, n_mels, F) log-mel and (B,) own frames → (B, T, width) of each used layer, T = ceil(F / 2); own steps."""
        w = self.whisper
        if speech.shape[-1] > self.max_frames:
            raise UserError(
                f"a clip of {speech.shape[-1] / 100:.1f} s is longer than the encoder's {self.max_frames / 100:.0f} s: "
                f"set data.max_seconds={self.max_frames / 100:.0f} and split or drop longer clips"
            )
        fed = self.fed(lengths)
        frames = torch.arange(speech.shape[-1], device=speech.device)
        real = (frames[None, :] < fed[:, None]).unsqueeze(1)  # (B, 1, F)
        mel = speech.to(w.conv1.weight.dtype)
        # Zeroed where conv2 would pad with zeros, so that a clip's features do not depend on its batch.
        x = nn.functional.gelu(w.conv1(mel)) * real
        x = nn.functional.gelu(w.conv2(x)).transpose(1, 2)  # (B, T, D)
        steps = torch.arange(x.shape[1], device=x.device)
        mask = steps[None, :] < self.frames(fed)[:, None]  # (B, T)
        x = x + w.embed_positions(steps)
        x = nn.functional.dropout(x, p=w.dropout, training=self.training)
        bias = create_bidirectional_mask(config=w.config, inputs_embeds=x, attention_mask=mask)
        states = [x]
        for layer in w.layers:
            states.append(layer(states[-1], bias))
        if max(self.layers) == self.depth:
            states[-1] = w.layer_norm(states[-1])
        return [states[number] for number in self.layers], self.frames(lengths)
