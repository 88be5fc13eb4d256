"""The stage-2 model: speech tokens inside a chat prompt of a causal LLM that answers with the emotion word."""

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mser_dist.errors import UserError
from mser_dist.models.aligner import AlignHeads
from mser_dist.models.answer_loss import answer_loss, answers_right
from mser_dist.models.likelihood import Way
from mser_dist.models.llm import base_of
from mser_dist.models.packed import SPEECH, keep_apart
from mser_dist.models.speech import SpeechModel


class SpeechLLM(nn.Module):
    """Encoder → Q-Former → projector → embeddings in the prompt of the LLM.

    The LLM is called as a whole, whatever it does between embeddings and logits. `scores_by` says how answers are
    scored (`models/likelihood.py`): by whole passes until `self_check` has found a quicker way that is as right.
    """

    def __init__(self, speech: SpeechModel, llm: PreTrainedModel) -> None:
        super().__init__()
        self.speech = speech
        self.llm = llm
        self.scores_by: Way = "whole"
        self.label_smoothing = 0.0
        self.align: AlignHeads | None = None  # stage 1's, for its loss beside that of the answers
        self.align_weight = 0.0
        causal_lm = base_of(llm)
        self._keeps_logits = "logits_to_keep" in inspect.signature(causal_lm.forward).parameters
        text = causal_lm.config.get_text_config()
        per_layer = getattr(text, "hidden_size_per_layer_input", 0)
        self._per_layer = causal_lm.get_decoder().get_per_layer_inputs if per_layer else None
        self._pad = getattr(text, "pad_token_id", None) or 0
        width = _embedding_width(llm)
        self.projector = nn.Sequential(nn.Linear(speech.width, width), nn.GELU(), nn.Linear(width, width))

    @property
    def llm_config(self) -> PreTrainedConfig:
        """The config of the LLM, without an adapter around it."""
        return base_of(self.llm).config

    def embed(self, ids: Tensor) -> Tensor:
        """(…) ids of words → (…, D) LLM inputs."""
        words: Tensor = self.llm.get_input_embeddings()(ids)
        return words

    def embed_prompt(self, input_ids: Tensor, speech: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) ids with SPEECH where speech goes, speech and lengths of `SpeechModel` → (B, T, D) LLM inputs.

        Of a packed row (1, T) likewise: speech tokens go to the places of SPEECH in the order of the clips.
        """
        return self.embed_around(input_ids, self.speech(speech, lengths))

    def embed_around(self, input_ids: Tensor, tokens: Tensor) -> Tensor:
        """The same around the speech model's tokens (B, Q, width), or several times Q where the prompt has them so."""
        words = self.embed(input_ids.clamp(min=0))  # (B, T, D)
        first: Any = self.projector[0]
        projected = self.projector(tokens.to(first.weight.dtype))  # (B, Q, D)
        place = (input_ids == SPEECH).unsqueeze(-1)  # (B, T, 1)
        return words.masked_scatter(place, projected.to(words.dtype))

    def logits(self, inputs: Tensor, ids: Tensor, at: Tensor | None = None, **given: Any) -> tuple[Tensor, Any]:
        """The LLM's own logits behind (B, T, D) inputs: (B, T, V), or at the places `at` (n,) alone (B, n, V).

        ids: (B, T), the words that the inputs are, SPEECH among them. given: more arguments of the LLM's forward, e.g.
        attention_mask. The second value is all that it returned.
        """
        given = {"use_cache": False, **given}
        if (
            self._per_layer
        ):  # embeddings of the words that go to each layer; Gemma's own models give pads to what is none
            given["per_layer_inputs"] = self._per_layer(ids.masked_fill(ids == SPEECH, self._pad))
        if at is not None and self._keeps_logits:
            given["logits_to_keep"] = at
        out = base_of(self.llm)(inputs_embeds=inputs, **given)
        return (out.logits if at is None or self._keeps_logits else out.logits[:, at]), out

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on the answers only, and its telemetry.

        batch: speech (B, n_mels, F) or (B, S), lengths (B,), what `packed.batch_of` makes of prompts and answers,
        `normalizer`: answer tokens of the whole optimizer step over all ranks and micro-batches, divided by the number
        of losses that will be averaged, and, where tokens count differently, their `weights`, of which the normalizer
        is the sum then. It makes the step's loss the mean over *tokens*, however they are spread. With `align` heads
        also emotion and caption (B,), and text (B, text_width) of the captions: stage 1's loss of this micro-batch on
        all ranks is added, and the forward pass is collective.
        """
        tokens = self.speech(batch["speech"], batch["lengths"])  # (B, Q, width)
        inputs = self.embed_around(batch["input_ids"], tokens)
        at = batch["at"]
        target = batch["labels"][:, at + 1].flatten()
        apart = keep_apart(self.llm_config, batch, inputs.dtype)
        logits = self.logits(inputs, batch["input_ids"], at, **apart)[0].flatten(0, 1).float()  # (B · n, V)
        loss = answer_loss(logits, target, batch.get("weights"), self.label_smoothing) / batch["normalizer"]
        correct = answers_right(logits, target, batch.get("weights")) / batch["normalizer"]
        stats = {"token_accuracy": correct.detach()}
        if self.align is not None and "emotion" in batch:  # the self-check asks for the answers' loss alone
            ids = {"label": batch["emotion"], "caption": batch["caption"]}
            beside, said = self.align.contrast(self.align.embed(tokens, batch["text"]), ids, self.align_weight, 0.0)
            stats |= {"answer_loss": loss.detach(), "align_loss": said["emotion_loss"]}
            stats["align_accuracy"] = said["emotion_accuracy"]
            loss = loss + beside
        return loss, {"loss": loss.detach(), **stats}


def _embedding_width(llm: PreTrainedModel) -> int:
    """Width of the LLM's word embeddings, which is not that of its layers everywhere. ZeRO-3 hides a weight's shape."""
    embedding = llm.get_input_embeddings()
    width = getattr(embedding, "embedding_dim", None)
    if width is None:
        raise UserError(
            f"{type(base_of(llm)).__name__} has no plain table of word embeddings, and cannot be given speech"
        )
    return int(width)
