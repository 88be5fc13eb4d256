"""The stage-1 model: speech and emotion-aware language in one space."""

import math

import torch
from torch import Tensor, nn

from mser_dist import config as cfg
from mser_dist.contrastive import parallel_speech_loss, speech_text_loss
from mser_dist.models.speech import SpeechModel


class Aligner(nn.Module):
    """Speech model and frozen text embeddings, each projected to a shared width and compared by cosine."""

    def __init__(self, speech: SpeechModel, text_width: int, config: cfg.Contrastive) -> None:
        super().__init__()
        self.speech = speech
        self.speech_head = nn.Linear(speech.width, config.width, bias=False)
        self.text_head = nn.Linear(text_width, config.width, bias=False)
        # One learned scale a term: they settle at different temperatures. log(1/T), as in CLIP (arXiv 2103.00020).
        start = math.log(1 / config.temperature)
        self.scales = nn.Parameter(torch.tensor([start, start]))
        self.config = config

    def embed_speech(self, speech: Tensor, lengths: Tensor) -> Tensor:
        """(B, n_mels, F) log-mel or (B, S) waveform, and (B,) true lengths → (B, D) of unit length."""
        tokens = self.speech(speech, lengths)  # (B, Q, width)
        return nn.functional.normalize(self.speech_head(tokens.mean(1)).float(), dim=-1)

    def embed_text(self, text: Tensor) -> Tensor:
        """(n, text_width) of the text tower → (n, D) of unit length."""
        return nn.functional.normalize(self.text_head(text.to(self.text_head.weight.dtype)).float(), dim=-1)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch and its telemetry.

        batch: speech (B, n_mels, F) or (B, S), lengths (B,), text (B, text_width), label (B,), source (B,).
        """
        config = self.config
        speech = self.embed_speech(batch["speech"], batch["lengths"])
        text = self.embed_text(batch["text"])
        scale, parallel_scale = self.scales.float().clamp(max=math.log(config.max_scale)).exp()
        emotion = speech_text_loss(speech, text, batch["label"], scale)
        loss = config.alpha * emotion.loss
        stats = {
            "emotion_loss": emotion.loss,
            "emotion_excess": emotion.excess,
            "emotion_accuracy": emotion.accuracy,
            "positives": emotion.positives,
            "scale": scale,
        }
        if config.beta:
            agnostic = parallel_speech_loss(speech, batch["source"], batch["label"], parallel_scale)
            loss = loss + config.beta * agnostic.loss
            stats |= {"agnostic_loss": agnostic.loss, "agnostic_excess": agnostic.excess}
        return loss, {"loss": loss.detach()} | {name: value.detach() for name, value in stats.items()}
