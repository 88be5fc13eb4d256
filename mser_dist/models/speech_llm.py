"""The stage-2 model: speech tokens inside a chat prompt of a causal LLM that answers with the emotion word."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mser_dist.errors import UserError
from mser_dist.models.llm import base_of
from mser_dist.models.speech import SpeechModel

SPEECH = -200  # stands in `input_ids` where a speech token goes
IGNORE = -100  # stands in `labels` where there is no loss


class SpeechLLM(nn.Module):
    """Encoder → Q-Former → projector → embeddings in the prompt of the LLM.

    The LLM is called as a whole, whatever it does between embeddings and logits. `shares_cache` says whether the keys
    and values of a prompt may be read by many answers: not until `self_check` has found that they may.
    """

    def __init__(self, speech: SpeechModel, llm: PreTrainedModel) -> None:
        super().__init__()
        self.speech = speech
        self.llm = llm
        self.shares_cache = False
        causal_lm = base_of(llm)
        self._keeps_logits = "logits_to_keep" in inspect.signature(causal_lm.forward).parameters
        text = causal_lm.config.get_text_config()
        per_layer = getattr(text, "hidden_size_per_layer_input", 0)
        self._per_layer = causal_lm.get_decoder().get_per_layer_inputs if per_layer else None
        self._pad = getattr(text, "pad_token_id", None) or 0
        width = _embedding_width(llm)
        self.projector = nn.Sequential(nn.Linear(speech.width, width), nn.GELU(), nn.Linear(width, width))

    def embed_prompt(self, input_ids: Tensor, speech: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) ids with SPEECH where speech goes, speech and lengths of `SpeechModel` → (B, T, D) LLM inputs."""
        words = self.llm.get_input_embeddings()(input_ids.clamp(min=0))  # (B, T, D)
        tokens = self.projector(self.speech(speech, lengths).to(self.projector[0].weight.dtype))  # (B, Q, D)
        place = (input_ids == SPEECH).unsqueeze(-1)  # (B, T, 1)
        return words.masked_scatter(place, tokens.to(words.dtype))

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

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on the answers only, and its telemetry.

        batch: speech (B, n_mels, F) or (B, S), lengths (B,), input_ids, labels and attention_mask (B, T), padded on the
        right, and `normalizer`: answer tokens of the whole optimizer step over all ranks and micro-batches, divided by
        the number of losses that will be averaged. It makes the step's loss the mean over *tokens*, however they are
        spread.
        """
        inputs = self.embed_prompt(batch["input_ids"], batch["speech"], batch["lengths"])
        target = batch["labels"][:, 1:]
        at = (target != IGNORE).any(0).nonzero().squeeze(1)  # (n,): the places where some row has an answer
        target = target[:, at]
        wanted = target != IGNORE  # (B, n)
        logits, _ = self.logits(inputs, batch["input_ids"], at, attention_mask=batch["attention_mask"])
        logits = logits[wanted].float()  # (tokens, V)
        target = target[wanted]
        loss = nn.functional.cross_entropy(logits, target, reduction="sum") / batch["normalizer"]
        correct = (logits.argmax(-1) == target).sum() / batch["normalizer"]
        return loss, {"loss": loss.detach(), "token_accuracy": correct.detach()}

    @torch.no_grad()
    def score(self, speech: Tensor, lengths: Tensor, prompt: Tensor, answers: list[Tensor]) -> Tensor:
        """Log-likelihood of every answer after the prompt: (B, K), the sum over an answer's tokens, EOS included.

        speech (B, n_mels, F) or (B, S); lengths (B,); prompt (T,) ids with SPEECH in it; answers: K tensors of ids up
        to EOS.
        """
        inputs = self.embed_prompt(prompt.expand(len(speech), -1), speech, lengths)  # (B, T, D)
        score = self.score_shared if self.shares_cache else self.score_whole
        return score(inputs, prompt, answers)

    @torch.no_grad()
    def score_whole(self, inputs: Tensor, prompt: Tensor, answers: list[Tensor]) -> Tensor:
        """Scores (B, K) of answers behind embedded prompts (B, T, D), each by a forward pass over prompt and answer.

        prompt: (T,), the ids of all of them.
        """
        columns = []
        for answer in answers:
            rest = self.llm.get_input_embeddings()(answer[:-1]).expand(len(inputs), -1, -1)  # (B, L-1, D)
            at = torch.arange(inputs.shape[1] - 1, inputs.shape[1] + len(answer) - 1, device=inputs.device)
            ids = torch.cat([prompt, answer[:-1]]).expand(len(inputs), -1)
            log_p = self.logits(torch.cat([inputs, rest], 1), ids, at)[0].float().log_softmax(-1)  # (B, L, V)
            columns.append(log_p[:, torch.arange(len(answer)), answer].sum(1))
        return torch.stack(columns, 1)

    @torch.no_grad()
    def score_shared(self, inputs: Tensor, prompt: Tensor, answers: list[Tensor]) -> Tensor:
        """The same as `score_whole` in two passes: a prompt is read once, its keys and values serve all answers."""
        batch, count = len(inputs), len(answers)
        last = torch.tensor([inputs.shape[1] - 1], device=inputs.device)
        logits, seen = self.logits(inputs, prompt.expand(batch, -1), last, use_cache=True)
        first = logits[:, 0].float().log_softmax(-1)  # (B, V)
        longest = max(len(a) for a in answers)
        ids = torch.zeros(count, longest, dtype=torch.long, device=inputs.device)
        real = torch.zeros(count, longest, dtype=torch.bool, device=inputs.device)
        for row, answer in enumerate(answers):
            ids[row, : len(answer)] = answer
            real[row, : len(answer)] = True
        total = first[:, ids[:, 0]]  # (B, K)
        if longest > 1:
            cache = seen.past_key_values
            cache.batch_repeat_interleave(count)  # rows: clip 0 answer 0, clip 0 answer 1, …
            behind = ids[:, :-1].repeat(batch, 1)  # (B·K, L-1)
            rest = self.llm.get_input_embeddings()(behind)
            logits, _ = self.logits(rest, behind, past_key_values=cache, use_cache=True)
            log_p = logits.float().log_softmax(-1)  # (B·K, L-1, V)
            picked = log_p.gather(2, ids[:, 1:].repeat(batch, 1).unsqueeze(-1)).squeeze(-1)
            total = total + (picked * real[:, 1:].repeat(batch, 1)).sum(-1).view(batch, count)
        return total


def _embedding_width(llm: PreTrainedModel) -> int:
    """Width of the LLM's word embeddings, which is not that of its layers everywhere. ZeRO-3 hides a weight's shape."""
    embedding = llm.get_input_embeddings()
    width = getattr(embedding, "embedding_dim", None)
    if width is None:
        raise UserError(
            f"{type(base_of(llm)).__name__} has no plain table of word embeddings, and cannot be given speech"
        )
    return int(width)
