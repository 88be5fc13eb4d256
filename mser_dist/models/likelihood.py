"""How likely an LLM finds each of K answers behind a prompt with a clip in it, for batch after batch.

Three ways with one result; `models/self_check.py` finds out which of them an LLM can take:

- tree: the keys and values of what stands before the speech are kept for all batches, and one pass reads the clip, the
  rest of the prompt and all answers side by side, of which none sees another.
- cache: two passes a batch: the prompt, whose keys and values serve all answers.
- whole: a pass over prompt and answer for each answer.
"""

import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mser_dist.models.packed import block_masks, prefix_of

if TYPE_CHECKING:
    from mser_dist.models.speech_llm import SpeechLLM

Way = Literal["tree", "cache", "whole"]


class Likelihoods:
    """Log-likelihoods of answers, while the weights stay as they are.

    prompt: token ids with SPEECH in it. answers: K lists of token ids up to EOS. way: by default what was found for
    `model` (`scores_by`).
    """

    def __init__(
        self,
        model: "SpeechLLM",
        prompt: list[int],
        answers: list[list[int]],
        device: str | torch.device,
        way: Way | None = None,
    ) -> None:
        self.model = model
        self.way: Way = way or model.scores_by
        self.prompt = torch.tensor(prompt, device=device)
        self.answers = [torch.tensor(answer, device=device) for answer in answers]
        self.before = len(prefix_of(prompt))
        self._prefix: Any = None  # keys and values of the prompt before the speech, of one row

    @torch.no_grad()
    def __call__(self, speech: Tensor, lengths: Tensor) -> Tensor:
        """(B, K) of what `SpeechModel` takes: each the sum over an answer's tokens, its end included."""
        return {"tree": self._tree, "cache": self._cache, "whole": self._whole}[self.way](speech, lengths)

    def _embedded(self, prompt: Tensor, speech: Tensor, lengths: Tensor) -> Tensor:
        return self.model.embed_prompt(prompt.expand(len(speech), -1), speech, lengths)

    def _whole(self, speech: Tensor, lengths: Tensor) -> Tensor:
        inputs = self._embedded(self.prompt, speech, lengths)  # (B, T, D)
        columns = []
        for answer in self.answers:
            rest = self.model.embed(answer[:-1]).expand(len(inputs), -1, -1)  # (B, L-1, D)
            at = torch.arange(inputs.shape[1] - 1, inputs.shape[1] + len(answer) - 1, device=inputs.device)
            ids = torch.cat([self.prompt, answer[:-1]]).expand(len(inputs), -1)
            log_p = self.model.logits(torch.cat([inputs, rest], 1), ids, at)[0].float().log_softmax(-1)  # (B, L, V)
            columns.append(log_p[:, torch.arange(len(answer)), answer].sum(1))
        return torch.stack(columns, 1)

    def _cache(self, speech: Tensor, lengths: Tensor) -> Tensor:
        inputs = self._embedded(self.prompt, speech, lengths)
        batch, count = len(inputs), len(self.answers)
        last = torch.tensor([inputs.shape[1] - 1], device=inputs.device)
        logits, seen = self.model.logits(inputs, self.prompt.expand(batch, -1), last, use_cache=True)
        first = logits[:, 0].float().log_softmax(-1)  # (B, V)
        longest = max(len(a) for a in self.answers)
        ids = torch.zeros(count, longest, dtype=torch.long, device=inputs.device)
        real = torch.zeros(count, longest, dtype=torch.bool, device=inputs.device)
        for row, answer in enumerate(self.answers):
            ids[row, : len(answer)] = answer
            real[row, : len(answer)] = True
        total = first[:, ids[:, 0]]  # (B, K)
        if longest > 1:
            cache = seen.past_key_values
            cache.batch_repeat_interleave(count)  # rows: clip 0 answer 0, clip 0 answer 1, …
            behind = ids[:, :-1].repeat(batch, 1)  # (B·K, L-1)
            logits, _ = self.model.logits(self.model.embed(behind), behind, past_key_values=cache, use_cache=True)
            log_p = logits.float().log_softmax(-1)  # (B·K, L-1, V)
            picked = log_p.gather(2, ids[:, 1:].repeat(batch, 1).unsqueeze(-1)).squeeze(-1)
            total = total + (picked * real[:, 1:].repeat(batch, 1)).sum(-1).view(batch, count)
        return total

    def _tree(self, speech: Tensor, lengths: Tensor) -> Tensor:
        batch, device = len(speech), speech.device
        trunk = self.prompt[self.before :]  # the speech and what stands behind it
        behind = torch.cat([answer[:-1] for answer in self.answers])  # (M,): nothing is asked of what follows an end
        size, branches = len(self.prompt), [len(answer) - 1 for answer in self.answers]
        own = [0] * size + [number for number, length in enumerate(branches, 1) for _ in range(length)]
        places = [*range(size), *(size + place for length in branches for place in range(length))]
        segments, positions = torch.tensor(own, device=device), torch.tensor(places, device=device)
        inputs = torch.cat([self._embedded(trunk, speech, lengths), self.model.embed(behind).expand(batch, -1, -1)], 1)
        mask = block_masks(
            self.model.llm_config,
            segments,
            torch.zeros_like(segments),
            positions,
            size + max(branches),
            inputs.dtype,
            self.before,
        )
        given: dict[str, Any] = {"position_ids": positions[self.before :].expand(batch, -1), "attention_mask": mask}
        if self.before:
            if self._prefix is None:
                self._prefix = self._read_prefix()
            cache = copy.deepcopy(self._prefix)  # what it is given is added to it
            cache.batch_repeat_interleave(batch)
            given |= {"past_key_values": cache, "use_cache": True}
        last = len(trunk) - 1
        at = torch.arange(last, inputs.shape[1], device=device)  # (1 + M,): the end of the prompt, and the answers
        ids = torch.cat([trunk, behind]).expand(batch, -1)
        log_p = self.model.logits(inputs, ids, at, **given)[0].float().log_softmax(-1)  # (B, 1 + M, V)
        columns, start = [], 1
        for answer in self.answers:
            rest = log_p[:, torch.arange(start, start + len(answer) - 1), answer[1:]]
            columns.append(log_p[:, 0, answer[0]] + rest.sum(1))
            start += len(answer) - 1
        return torch.stack(columns, 1)

    def _read_prefix(self) -> Any:
        prefix = self.prompt[: self.before]
        last = torch.tensor([self.before - 1], device=prefix.device)
        _, out = self.model.logits(self.model.embed(prefix)[None], prefix[None], last, use_cache=True)
        return out.past_key_values
