"""The stage-1 model: speech and emotion-aware language in one space."""

from torch import Tensor, nn

from mser_dist import config as cfg
from mser_dist import contrastive
from mser_dist.contrastive import Embedded, LogitScale
from mser_dist.models.speech import SpeechModel


class AlignHeads(nn.Module):
    """Speech tokens and frozen text embeddings, each projected to a shared width and compared by cosine."""

    def __init__(self, width: int, text_width: int, config: cfg.ContrastiveConfig) -> None:
        super().__init__()
        self.speech_head = nn.Linear(width, config.width, bias=False)
        self.text_head = nn.Linear(text_width, config.width, bias=False)
        # One learned scale a term: they settle at different temperatures.
        bias = config.bias if config.loss == "siglip" else None
        self.scale = LogitScale(2, start=1 / config.temperature, highest=config.max_scale, bias=bias)
        self.config = config

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """(B, Q, width) of the speech model → (B, D) of unit length."""
        return nn.functional.normalize(self.speech_head(tokens.mean(1)).float(), dim=-1)

    def embed_text(self, text: Tensor) -> Tensor:
        """(n, text_width) of the text tower → (n, D) of unit length."""
        return nn.functional.normalize(self.text_head(text.to(self.text_head.weight.dtype)).float(), dim=-1)

    def embed(self, tokens: Tensor, text: Tensor) -> Embedded:
        """A micro-batch's speech and text, (B, D) each, and the scales and biases of both terms."""
        scales, biases = self.scale()
        rows = (self.embed_tokens(tokens), self.embed_text(text))
        return Embedded(rows, (scales,) if biases is None else (scales, biases))

    def contrast(
        self, embedded: Embedded, ids: dict[str, Tensor], alpha: float, beta: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The stage-1 loss of all this rank's embeddings, and telemetry. Collective.

        ids: label, source and caption, (B,) each; alpha, beta: the terms' weights at this step.
        """
        config = self.config
        speech, text = embedded.rows
        scales, *biases = embedded.shared
        emotion = contrastive.contrastive_loss(
            speech,
            text,
            scales[0],
            loss=config.loss,
            labels=ids["label"],
            texts=ids["caption"] if config.unique_texts else None,
            bias=biases[0][0] if biases else None,
            symmetric=config.symmetric,
            gather=config.gather,
            tile=config.tile,
        )
        stats = {f"emotion_{name}": value for name, value in emotion.detached().items()}
        stats["batch"] = stats.pop("emotion_rows")
        stats["emotion_scale"] = scales[0].detach()
        stats["uniformity"] = contrastive.uniformity(speech)
        loss = alpha * emotion.loss
        if config.beta:
            agnostic = contrastive.parallel_loss(
                speech,
                ids["source"],
                ids["label"],
                scales[1],
                gather=config.gather,
                tile=config.tile,
            )
            loss = loss + beta * agnostic.loss
            found = agnostic.detached()
            stats |= {f"agnostic_{name}": found[name] for name in ("loss", "excess", "accuracy", "alignment", "rows")}
            stats["agnostic_scale"] = scales[1].detach()
        return loss, {"loss": loss.detach()} | stats


class Aligner(AlignHeads):
    """The speech model with these heads."""

    def __init__(self, speech: SpeechModel, text_width: int, config: cfg.ContrastiveConfig) -> None:
        super().__init__(speech.width, text_width, config)
        self.speech = speech

    def embed_speech(self, speech: Tensor, lengths: Tensor) -> Tensor:
        """(B, n_mels, F) log-mel or (B, S) waveform, and (B,) true lengths → (B, D) of unit length."""
        return self.embed_tokens(self.speech(speech, lengths))

    def forward(self, batch: dict[str, Tensor]) -> Embedded:
        """A micro-batch's speech and text, (B, D) each, and the scales and biases of both terms.

        batch: speech (B, n_mels, F) or (B, S), lengths (B,), text (B, text_width).
        """
        return self.embed(self.speech(batch["speech"], batch["lengths"]), batch["text"])
