"""What an LLM answers by greedy decoding: of the labels alone, or in its own words."""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mser_dist.ranks import distributed

if TYPE_CHECKING:
    from mser_dist.models.speech_llm import SpeechLLM


def greedy_ranks(log_p: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
    """(B, K): how many of the others each answer is preferred to by greedy decoding over the trie of the answers.

    log_p (B, K, L): of each answer's tokens, as `Likelihoods` has them. Two answers part where their tokens first
    differ, and there the likelier token goes on, whatever follows. So the largest of all, or of any choice of the
    answers, is the one that greedy decoding gives which may say these alone.
    """
    count = len(answers)
    part = torch.zeros(count, count, dtype=torch.long)  # the place where two answers first differ
    for one, ids in enumerate(answers):
        for other, others in enumerate(answers):
            if one != other:
                part[one, other] = next(i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b)
    part = part.to(log_p.device).expand(len(log_p), -1, -1)  # (B, K, K)
    mine = log_p.gather(2, part)  # of an answer's token where it parts from the other
    return (mine > mine.transpose(1, 2)).sum(-1).to(torch.float32)


@torch.no_grad()
def generate(model: "SpeechLLM", prompt: Sequence[int], tokens: Tensor, most: int, end: int) -> Tensor:
    """(B, most) ids of the likeliest next token, again and again, up to `end`, which fills the rest.

    prompt: token ids with SPEECH in it. tokens (B, Q, width): of the speech model. Collective: all ranks make as many
    forward passes, until each clip of all of them has come to its end.
    """
    batch, device = len(tokens), tokens.device
    ids = torch.tensor(prompt, device=device).expand(batch, -1)
    inputs = model.embed_around(ids, tokens)  # (B, T, D)
    found = torch.full((batch, most), end, device=device)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    cached, seen = model.scores_by != "whole", None
    for place in range(most):
        given: dict[str, Any] = {"past_key_values": seen, "use_cache": True} if cached else {}
        last = torch.tensor([inputs.shape[1] - 1], device=device)
        logits, out = model.logits(inputs, ids, last, **given)
        following = logits[:, 0].argmax(-1).masked_fill(done, end)  # (B,)
        found[:, place] = following
        done = done | (following == end)
        if not distributed.most([int(not done.all())])[0]:
            break
        new_ids, new_inputs = following[:, None], model.embed(following[:, None])
        if cached:
            seen, ids, inputs = out.past_key_values, new_ids, new_inputs
        else:
            ids, inputs = torch.cat([ids, new_ids], 1), torch.cat([inputs, new_inputs], 1)
    return found


def bare(text: str) -> str:
    """A text to compare: width and case folded, what is no letter, mark or digit taken off both ends."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    said = [place for place, char in enumerate(folded) if unicodedata.category(char)[0] in "LMN"]
    return " ".join(folded[said[0] : said[-1] + 1].split()) if said else ""
