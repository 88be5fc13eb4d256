"""The stage-2 model: speech tokens inside a chat prompt of a causal LLM that answers with the emotion word."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mser_dist.models.speech import SpeechModel

SPEECH = -200  # stands in `input_ids` where a speech token goes
IGNORE = -100  # stands in `labels` where there is no loss


class SpeechLLM(nn.Module):
    """Encoder → Q-Former → projector → embeddings in the prompt of the LLM."""

    def __init__(self, speech: SpeechModel, llm: PreTrainedModel) -> None:
        super().__init__()
        self.speech = speech
        self.llm = llm
        width = llm.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(speech.width, width), nn.GELU(), nn.Linear(width, width))

    def embed_prompt(self, input_ids: Tensor, speech: Tensor, lengths: Tensor) -> Tensor:
        """(B, T) ids with SPEECH where speech goes, speech and lengths of `SpeechModel` → (B, T, D) LLM inputs."""
        words = self.llm.get_input_embeddings()(input_ids.clamp(min=0))  # (B, T, D)
        tokens = self.projector(self.speech(speech, lengths).to(self.projector[0].weight.dtype))  # (B, Q, D)
        place = (input_ids == SPEECH).unsqueeze(-1)  # (B, T, 1)
        return words.masked_scatter(place, tokens.to(words.dtype))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss on the answers only, and its telemetry.

        batch: speech (B, n_mels, F) or (B, S), lengths (B,), input_ids, labels and attention_mask (B, T), padded on the
        right, and `normalizer`: answer tokens of the whole optimizer step over all ranks and micro-batches, divided by
        the number of losses that will be averaged. It makes the step's loss the mean over *tokens*, however they are
        spread.
        """
        inputs = self.embed_prompt(batch["input_ids"], batch["speech"], batch["lengths"])
        hidden = self.backbone(inputs_embeds=inputs, attention_mask=batch["attention_mask"]).last_hidden_state
        target = batch["labels"][:, 1:]
        wanted = target != IGNORE  # (B, T-1)
        logits = self.lm_head(hidden[:, :-1][wanted]).float()  # (n, V): only where there is an answer
        target = target[wanted]
        loss = nn.functional.cross_entropy(logits, target, reduction="sum") / batch["normalizer"]
        correct = (logits.argmax(-1) == target).sum() / batch["normalizer"]
        return loss, {"loss": loss.detach(), "token_accuracy": correct.detach()}

    @property
    def backbone(self) -> nn.Module:
        """The LLM without its output layer; inside a LoRA wrapper the adapted layers are the same modules."""
        return self._causal_lm.get_decoder()

    @property
    def lm_head(self) -> nn.Module:
        return self._causal_lm.get_output_embeddings()

    @property
    def _causal_lm(self) -> PreTrainedModel:
        base = getattr(self.llm, "get_base_model", None)
        return base() if base else self.llm

    @torch.no_grad()
    def score(self, speech: Tensor, lengths: Tensor, prompt: Tensor, answers: list[Tensor]) -> Tensor:
        """Log-likelihood of every answer after the prompt: (B, K), the sum over an answer's tokens, EOS included.

        speech (B, n_mels, F) or (B, S); lengths (B,); prompt (T,) ids with SPEECH in it; answers: K tensors of ids up
        to EOS. The prompt is read once a clip; its keys and values are shared by the K answers.
        """
        batch, count = len(speech), len(answers)
        inputs = self.embed_prompt(prompt.expand(batch, -1), speech, lengths)
        seen = self.backbone(inputs_embeds=inputs, use_cache=True)
        first = self.lm_head(seen.last_hidden_state[:, -1]).float().log_softmax(-1)  # (B, V)
        longest = max(len(a) for a in answers)
        ids = torch.zeros(count, longest, dtype=torch.long, device=speech.device)
        real = torch.zeros(count, longest, dtype=torch.bool, device=speech.device)
        for row, answer in enumerate(answers):
            ids[row, : len(answer)] = answer
            real[row, : len(answer)] = True
        total = first[:, ids[:, 0]]  # (B, K)
        if longest > 1:
            cache = seen.past_key_values
            cache.batch_repeat_interleave(count)  # rows: clip 0 answer 0, clip 0 answer 1, …
            rest = self.llm.get_input_embeddings()(ids[:, :-1].repeat(batch, 1))
            hidden = self.backbone(inputs_embeds=rest, past_key_values=cache, use_cache=True).last_hidden_state
            log_p = self.lm_head(hidden).float().log_softmax(-1)  # (B·K, L-1, V)
            picked = log_p.gather(2, ids[:, 1:].repeat(batch, 1).unsqueeze(-1)).squeeze(-1)
            total = total + (picked * real[:, 1:].repeat(batch, 1)).sum(-1).view(batch, count)
        return total
