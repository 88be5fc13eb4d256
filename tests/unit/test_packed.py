"""Packed rows are the same function as clip by clip: loss, gradients, scores; and how flash-attn is given them."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    modeling_flash_attention_utils,
)

from mser_dist.models.likelihood import Likelihoods
from mser_dist.models.packed import IGNORE, SPEECH, Packing, batch_of
from mser_dist.models.self_check import check_llm
from mser_dist.models.speech_llm import SpeechLLM
from tests.packed_llms import (
    ANSWERS,
    LLMS,
    PROMPTS,
    SAMPLES,
    clips,
    furthest,
    gradients,
    micro_batch,
    one_by_one,
    speech_llm,
)

ALL = list(range(len(SAMPLES)))
EXACT = 1e-5  # relative, fp32: another order of summation


def test_a_row_holds_each_instruction_once() -> None:
    row = batch_of(SAMPLES, "prefix")
    ids, labels, positions = (row[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
    starts = [prompt[: prompt.index(SPEECH)] for prompt in PROMPTS]
    own = [[*prompt[prompt.index(SPEECH) :], *answer] for prompt, answer in SAMPLES]
    assert ids == [*starts[0], *own[0], *own[1], *starts[1], *own[2], *starts[2], *own[3], *own[4], *own[5]]
    assert [i for i in labels if i != IGNORE] == [i for _, answer in SAMPLES for i in answer]
    assert positions[:7] == list(range(7)) and positions[7 : 7 + len(own[0])] == list(range(7, 7 + len(own[0])))
    assert positions[7 + len(own[0])] == 7, "the second clip goes on from its instruction"
    assert row["longest"] == max(len(prompt) + len(answer) for prompt, answer in SAMPLES)
    whole = batch_of(SAMPLES, "rows")
    assert whole["input_ids"][0].tolist() == [i for prompt, answer in SAMPLES for i in [*prompt, *answer]]
    assert whole["ends"].diff().tolist() == [len(prompt) + len(answer) for prompt, answer in SAMPLES]
    assert row["input_ids"].shape[1] < whole["input_ids"].shape[1] < batch_of(SAMPLES, "off")["input_ids"].numel()


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [(kind, "eager" if "gemma2" in kind else "sdpa") for kind in LLMS] + [("mistral, window 5", "eager")],
)
def test_loss_gradients_and_scores_are_those_of_each_clip_alone(kind: str, kernel: str) -> None:
    model = speech_llm(kind, kernel)
    loss, expected = one_by_one(model, ALL)
    packings: tuple[Packing, ...] = ("prefix", "rows", "off")
    for packing in packings:
        found, _ = model(micro_batch(packing, ALL))
        found.backward()
        assert float(found.detach()) == pytest.approx(loss, rel=EXACT), packing
        assert furthest(gradients(model), expected) < EXACT, packing
    checked = check_llm(model, PROMPTS, ANSWERS, "cpu", "prefix")
    assert (checked.packing, checked.not_packed) == ("prefix", "") and checked.difference < EXACT
    mel, lengths = clips()
    assert checked.scores_by == "tree", "one pass, a window that is smaller than the prompt's start or not"
    score = Likelihoods(model, PROMPTS, ANSWERS, "cpu")
    whole = Likelihoods(model, PROMPTS, ANSWERS, "cpu", "whole")(mel, lengths)
    for part in (slice(0, 4), slice(4, 6)):  # the second batch finds the start of the prompt read
        torch.testing.assert_close(score(mel[part], lengths[part]), whole[part], rtol=EXACT, atol=EXACT)


def mpt() -> Any:
    return MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=40, max_seq_len=64))


@pytest.mark.parametrize(
    ("llm", "says"),
    [
        (
            lambda: BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=2)),
            "not rows: ",
        ),
        (mpt, "not rows: "),
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2)),
            "type linear_attention",
        ),
        (
            lambda: GPTNeoForCausalLM(
                GPTNeoConfig(
                    vocab_size=40, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
                )
            ),
            "a table of 2048 places",
        ),
    ],
    ids=["bloom", "mpt", "mamba", "gpt_neo"],
)
def test_an_llm_that_cannot_be_packed_says_why(llm: Any, says: str) -> None:
    torch.manual_seed(0)
    speech = speech_llm("llama").speech
    built = llm()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    checked = check_llm(SpeechLLM(speech, built), PROMPTS, ANSWERS, "cpu", "prefix")
    assert checked.packing == "off" and says in checked.packed and "\n" not in checked.packed


def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **given: Any) -> Tensor:
    """flash-attn's varlen function by its documentation, in PyTorch: (tokens, heads, width) of sequences end to end."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and given["causal"]
    assert given["max_seqlen_q"] == given["max_seqlen_k"] == int(cu_seqlens_q.diff().max())
    parts = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        one, keys, values = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                one, keys, values, is_causal=True, scale=given["softmax_scale"], enable_gqa=True
            )[0].transpose(0, 1)
        )
    return torch.cat(parts)


def test_whole_samples_go_to_flash_attn_as_sequences_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own path to flash-attn 3, whose functions are written out for a CPU."""
    calls = []

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
    ) -> Tensor:
        calls.append(cu_seqlens_q.tolist())
        longest = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, softmax_scale=softmax_scale, **longest)

    module: Any = ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.flash_attn_func = module.flash_attn_with_kvcache = None  # not to be called
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    model = speech_llm("llama")
    loss, expected = one_by_one(model, ALL)
    model.llm.config._attn_implementation_internal = "flash_attention_3"  # without the search for a GPU
    batch = micro_batch("rows", ALL)
    found, _ = model(batch)
    found.backward()
    assert calls == [batch["ends"].tolist()] * 2, "one call a layer, for all samples"
    assert float(found.detach()) == pytest.approx(loss, rel=EXACT) and furthest(gradients(model), expected) < EXACT
    checked = check_llm(model, PROMPTS, ANSWERS, "cpu", "prefix")
    assert (checked.packing, checked.kernel) == ("prefix", "sdpa") and len(calls) == 2
    assert "attention by sdpa: flash_attention_3 takes no mask of blocks" in str(checked)
