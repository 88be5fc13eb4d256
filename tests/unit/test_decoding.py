"""Answers behind several prompts, and by greedy decoding: as the LLM's own forward and generate have them."""

from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mser_dist.models.decoding import bare, generate, greedy_ranks
from mser_dist.models.likelihood import Likelihoods, Way
from mser_dist.models.packed import SPEECH
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.models.token_tree import TokenTree
from tests.packed_llms import PROMPTS, clips, speech_llm

SPEECH_FIRST = [
    [1, 5, SPEECH, SPEECH, 6, 11, 12, 7, 8],
    [1, 5, SPEECH, SPEECH, 6, 13, 7, 8],
    [1, 5, SPEECH, SPEECH, 6, 11, 14, 15, 7, 8],
]
# Two of them part at their third token, two at their second.
ANSWERS = [[20, 21, 22, 2], [20, 21, 23, 2], [20, 24, 2], [25, 2], [26, 27, 28, 2]]
MANY = 40  # clips: enough that each answer comes first somewhere


def many(model: SpeechLLM) -> Tensor:
    """(40, Q, width) emotion tokens, far from each other."""
    return torch.randn(MANY, 2, model.speech.width, generator=torch.Generator().manual_seed(3)) * 3


def test_a_tree_holds_what_texts_begin_with_alike_once() -> None:
    tree = TokenTree([[*prompt, *answer[:-1]] for prompt in SPEECH_FIRST for answer in ANSWERS])
    assert tree.shared == 2 and tree.ids[:2].tolist() == [1, 5], "what stands before the speech"
    assert (tree.ids == SPEECH).sum() == 2, "a clip is read once, for all prompts"
    behind = 2 + 1 + (4 + 3 + 5 - 1) + 3 * 9  # speech, 6, the prompts (two begin with 11), behind each the answers
    assert len(tree.ids) == 2 + behind
    texts = iter(tree.paths)
    for prompt in SPEECH_FIRST:
        for answer in ANSWERS:
            path = next(texts)
            assert tree.ids[path].tolist() == [*prompt, *answer[:-1]]
            assert tree.depth[path].tolist() == list(range(len(path)))
            assert all(one < other for one, other in pairwise(path)), "a causal row: each behind what it follows"
            assert tree.visible[path[-1]].nonzero().squeeze(1).tolist() == path
    first = TokenTree([[*prompt, *ANSWERS[0]] for prompt in PROMPTS])
    assert (first.ids == SPEECH).sum() == 2 * len(PROMPTS), "behind each instruction anew"
    assert SPEECH not in first.ids[: first.shared] and (first.ids[: first.shared] == 9).sum() == 1


@torch.no_grad()
@pytest.mark.parametrize("prompts", [PROMPTS, SPEECH_FIRST, PROMPTS[:1]])
@pytest.mark.parametrize("kind", ["llama", "gemma3, window 5 in one layer"])
def test_every_way_gives_the_plain_forwards_log_probabilities(kind: str, prompts: list[list[int]]) -> None:
    model = speech_llm(kind).eval()
    mel, lengths = clips(3)
    tokens = model.speech(mel, lengths)
    expected = torch.zeros(3, len(prompts), len(ANSWERS), 4)
    for row in range(3):
        for p, prompt in enumerate(prompts):
            for k, answer in enumerate(ANSWERS):
                ids = torch.tensor([[*prompt, *answer]])
                log_p = (
                    model.llm(inputs_embeds=model.embed_around(ids, tokens[row : row + 1])).logits[0].log_softmax(-1)
                )
                for place, token in enumerate(answer):
                    expected[row, p, k, place] = log_p[len(prompt) - 1 + place, token]
    for way in get_args(Way):
        score = Likelihoods(model, prompts, ANSWERS, "cpu", way)
        torch.testing.assert_close(score(mel[:2], lengths[:2]), expected[:2], rtol=0, atol=1e-5)
        torch.testing.assert_close(score(mel, lengths), expected, rtol=0, atol=1e-5)  # the shared part is kept by now


@torch.no_grad()
@pytest.mark.parametrize("allowed", [[0, 1, 2, 3, 4], [1, 2, 4]])
def test_constrained_decoding_is_transformers_own(allowed: list[int]) -> None:
    model = speech_llm("llama").eval()
    tokens = many(model)
    log_p = Likelihoods(model, PROMPTS[:1], ANSWERS, "cpu", "tree").of(tokens)[:, 0]
    ranks = greedy_ranks(log_p, ANSWERS)
    assert (ranks.sort(1).values == torch.arange(5)).all(), "an order of all answers"
    inputs = model.embed_around(torch.tensor(PROMPTS[:1]).expand(MANY, -1), tokens)

    def next_tokens(_: int, said: Tensor) -> list[int]:
        rest = [ANSWERS[k][len(said) :] for k in allowed if ANSWERS[k][: len(said)] == said.tolist()]
        return sorted({ids[0] for ids in rest if ids}) or [2]

    said = model.llm.generate(
        inputs_embeds=inputs,
        attention_mask=torch.ones(inputs.shape[:2]),
        prefix_allowed_tokens_fn=next_tokens,
        do_sample=False,
        max_new_tokens=4,
        pad_token_id=0,
    )
    theirs = [ANSWERS.index([i for i in row.tolist() if i]) for row in said]
    ours = [allowed[int(row[allowed].argmax())] for row in ranks]
    assert ours == theirs and len(set(ours)) > 2
    assert ours != log_p.sum(-1)[:, allowed].argmax(1).tolist(), "the likeliest answer is not always the greedy one"


@torch.no_grad()
@pytest.mark.parametrize("way", get_args(Way))
def test_free_generation_is_transformers_own(way: Way) -> None:
    model = speech_llm("llama").eval()
    model.scores_by = way
    tokens = many(model)
    model.llm.lm_head.weight[2] *= 3  # so that some answers end soon, and others not at all
    ours = generate(model, PROMPTS[0], tokens, 6, 2)
    inputs = model.embed_around(torch.tensor(PROMPTS[:1]).expand(MANY, -1), tokens)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": 2, "pad_token_id": 2}
    theirs = model.llm.generate(inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2]), **settings)
    assert ours.shape == (MANY, 6) and torch.equal(ours[:, : theirs.shape[1]], theirs)
    ends = (ours == 2).any(1)
    assert ends.any() and not ends.all()


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        (" Anger.", "anger"),
        ("**ANGER**", "anger"),
        ("ＡＮＧＥＲ", "anger"),
        ("very  sad!", "very sad"),
        ("…", ""),
        ("", ""),
    ],
)
def test_what_counts_as_the_same_word(said: str, compared: str) -> None:
    assert bare(said) == compared
