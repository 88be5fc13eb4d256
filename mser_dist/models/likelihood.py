"""How likely an LLM finds each of K answers behind each of P prompts with a clip in it, for batch after batch.

Three ways with one result; `models/self_check.py` finds out which of them an LLM can take:

- tree: the keys and values of what stands before the speech, of all prompts, are kept for all batches; one pass reads
  behind them the clip, the rest of each prompt and all answers side by side. What prompts or answers begin with alike
  is read once: with the speech before the instructions, the speech too.
- cache: two passes a batch and prompt: the prompt, whose keys and values serve all answers.
- whole: a pass over prompt and answer for each of both.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from mser_dist.models.packed import SPEECH, masks_of
from mser_dist.models.token_tree import TokenTree

if TYPE_CHECKING:
    from mser_dist.models.speech_llm import SpeechLLM

Way = Literal["tree", "cache", "whole"]


class Likelihoods:
    """Log-probabilities of the tokens of answers, while the weights stay as they are.

    prompts: P lists of token ids with SPEECH in them. answers: K lists of token ids up to EOS. way: by default what was
    found for `model` (`scores_by`).
    """

    def __init__(
        self,
        model: "SpeechLLM",
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        device: str | torch.device,
        way: Way | None = None,
    ) -> None:
        self.model = model
        self.way: Way = way or model.scores_by
        self.prompts = [torch.tensor(prompt, device=device) for prompt in prompts]
        self.answers = [torch.tensor(answer, device=device) for answer in answers]
        self.longest = max(map(len, answers))
        # Nothing is asked of what follows an end, so that it is not read.
        self.tree = TokenTree([[*prompt, *answer[:-1]] for prompt in prompts for answer in answers]).to(device)
        self._asked = self._places(device)
        self._kept: Any = None  # keys and values of what stands before the speech, of one row

    @torch.no_grad()
    def __call__(self, speech: Tensor, lengths: Tensor) -> Tensor:
        """(B, P, K, L) of what `SpeechModel` takes: of each answer's tokens, its end included; 0 behind the end."""
        return self.of(self.model.speech(speech, lengths))

    @torch.no_grad()
    def of(self, tokens: Tensor) -> Tensor:
        """The same of the speech model's tokens (B, Q, width)."""
        return {"tree": self._tree, "cache": self._cache, "whole": self._whole}[self.way](tokens)

    def _whole(self, tokens: Tensor) -> Tensor:
        batch = len(tokens)
        found = tokens.new_zeros((batch, len(self.prompts), len(self.answers), self.longest), dtype=torch.float32)
        for p, prompt in enumerate(self.prompts):
            inputs = self.model.embed_around(prompt.expand(batch, -1), tokens)  # (B, T, D)
            for k, answer in enumerate(self.answers):
                rest = self.model.embed(answer[:-1]).expand(batch, -1, -1)  # (B, L-1, D)
                at = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1, device=inputs.device)
                ids = torch.cat([prompt, answer[:-1]]).expand(batch, -1)
                logits, _ = self.model.logits(torch.cat([inputs, rest], 1), ids, at)  # (B, L, V)
                found[:, p, k, : len(answer)] = _picked(logits, torch.arange(len(answer)), answer)
        return found

    def _cache(self, tokens: Tensor) -> Tensor:
        batch, count, device = len(tokens), len(self.answers), tokens.device
        ids = torch.zeros(count, self.longest, dtype=torch.long, device=device)
        real = torch.zeros(count, self.longest, dtype=torch.bool, device=device)
        for row, answer in enumerate(self.answers):
            ids[row, : len(answer)] = answer
            real[row, : len(answer)] = True
        found = []
        for prompt in self.prompts:
            inputs = self.model.embed_around(prompt.expand(batch, -1), tokens)
            last = torch.tensor([len(prompt) - 1], device=device)
            logits, seen = self.model.logits(inputs, prompt.expand(batch, -1), last, use_cache=True)
            parts = [logits[:, 0].float().log_softmax(-1)[:, ids[:, 0]].unsqueeze(-1)]  # (B, K, 1)
            if self.longest > 1:
                cache = seen.past_key_values
                cache.batch_repeat_interleave(count)  # rows: clip 0 answer 0, clip 0 answer 1, …
                behind = ids[:, :-1].repeat(batch, 1)  # (B·K, L-1)
                logits, _ = self.model.logits(self.model.embed(behind), behind, past_key_values=cache, use_cache=True)
                log_p = logits.float().log_softmax(-1)  # (B·K, L-1, V)
                picked = log_p.gather(2, ids[:, 1:].repeat(batch, 1).unsqueeze(-1)).squeeze(-1)
                parts.append(picked.view(batch, count, -1))
            found.append(torch.cat(parts, 2).masked_fill(~real, 0.0))
        return torch.stack(found, 1)

    def _places(self, device: str | torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where the tree is asked: tokens (n,) whose logits are wanted, counted from the first that is not shared, and
        of each answer's token (m,) its place in (P, K, L), the one of those tokens that it follows, and its id."""
        cells, follows, ids = [], [], []
        paths = iter(self.tree.paths)
        for p, prompt in enumerate(self.prompts):
            for k, answer in enumerate(self.answers):
                path = next(paths)
                for place, token in enumerate(answer.tolist()):
                    cells.append((p * len(self.answers) + k) * self.longest + place)
                    follows.append(path[len(prompt) - 1 + place] - self.tree.shared)
                    ids.append(token)
        at, which = torch.tensor(follows).unique(return_inverse=True)
        return at.to(device), torch.tensor(cells, device=device), which.to(device), torch.tensor(ids, device=device)

    def _tree(self, tokens: Tensor) -> Tensor:
        batch, tree = len(tokens), self.tree
        own = tree.ids[tree.shared :]  # the speech, once or for each prompt, and what stands behind it
        copies = int((own == SPEECH).sum()) // tokens.shape[1]
        inputs = self.model.embed_around(own.expand(batch, -1), tokens.repeat(1, copies, 1))
        given = self._seen(slice(tree.shared, None), inputs.dtype)
        given["position_ids"] = given["position_ids"].expand(batch, -1)
        if tree.shared:
            if self._kept is None:
                self._kept = self._read_shared()
            cache = copy.deepcopy(self._kept)  # what it is given is added to it
            cache.batch_repeat_interleave(batch)
            given |= {"past_key_values": cache, "use_cache": True}
        at, cells, which, ids = self._asked
        logits, _ = self.model.logits(inputs, own.expand(batch, -1), at, **given)  # (B, n, V)
        shape = len(self.prompts), len(self.answers), self.longest
        found = logits.new_zeros((batch, shape[0] * shape[1] * shape[2]), dtype=torch.float32)
        found[:, cells] = _picked(logits, which, ids)
        return found.view(batch, *shape)

    def _seen(self, part: slice, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments of an LLM's forward that say where a part of the tree stands, and what it sees."""
        tree = self.tree
        visible, depth = tree.visible[part, : part.stop], tree.depth[: part.stop]
        mask = masks_of(self.model.llm_config, visible, depth, tree.height, dtype)
        return {"position_ids": tree.depth[part][None], "attention_mask": mask}

    def _read_shared(self) -> Any:
        shared = self.tree.ids[: self.tree.shared]
        inputs = self.model.embed(shared)[None]
        # Made here: one that is made by a config with a sliding window forgets what is outside of it, counted in
        # tokens of the tree.
        cache = DynamicCache()
        given = self._seen(slice(0, len(shared)), inputs.dtype)
        last = torch.tensor([len(shared) - 1], device=shared.device)
        self.model.logits(inputs, shared[None], last, past_key_values=cache, use_cache=True, **given)
        return cache


def _picked(logits: Tensor, which: Tensor, ids: Tensor) -> Tensor:
    """(B, m) log-probabilities of tokens `ids` (m,) by the logits (B, n, V) of the places `which` (m,)."""
    # Place by place: as 32-bit numbers all of them would be most of the memory of a pass.
    norms = torch.stack([logits[:, place].float().logsumexp(-1) for place in range(logits.shape[1])], 1)  # (B, n)
    return logits[:, which, ids].float() - norms[:, which]
