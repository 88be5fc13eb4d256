"""The check before step 1: what it finds in models that are wrong, each in one way, and what it leaves as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models.attention import Attention
from mser_dist.models.exported import cast
from mser_dist.models.likelihood import Likelihoods
from mser_dist.models.packed import SPEECH
from mser_dist.models.self_check import Checked, check_llm, check_speech
from mser_dist.models.speech import SpeechModel, build_speech
from mser_dist.models.speech_llm import SpeechLLM

PROMPTS = [[1, 5, SPEECH, SPEECH, 6, 7], [1, 5, 9, SPEECH, SPEECH, 6, 8, 7]]
ANSWERS = [[7, 2], [8, 9, 10, 2], [11, 2]]
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0,
}  # fmt: skip


def speech() -> SpeechModel:
    torch.manual_seed(0)
    arch = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 80}
    qformer = cfg.QFormerConfig(queries=2, layers=1, width=16, heads=2, dropout=0.1)
    return build_speech(cfg.EncoderConfig(arch=arch), qformer, Attention("sdpa", "test"))


def llama(kind: type[LlamaForCausalLM] = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    return sharpened(kind(LlamaConfig(**SIZES)))


def sharpened(llm: Any) -> Any:
    """With larger weights than an initialisation's, whose answers hardly depend on anything."""
    with torch.no_grad():
        for parameter in llm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return llm


def check(llm: Any) -> Checked:
    return check_llm(SpeechLLM(speech(), llm), PROMPTS, ANSWERS, "cpu")


def test_a_plain_model_is_right_and_left_as_it_was() -> None:
    model = SpeechLLM(speech(), llama()).train()
    model.llm.model.layers[0].eval()
    modes, random = [part.training for part in model.modules()], torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checked = check_llm(model, PROMPTS, ANSWERS, "cpu")
    assert checked.shares_cache and checked.difference < 1e-5
    assert [part.training for part in model.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_in_bfloat16_differs_by_rounding_alone() -> None:
    model = cast(SpeechLLM(speech(), llama()), torch.bfloat16)
    assert check_llm(model, PROMPTS, ANSWERS, "cpu").difference < 0.5
    model.llm.model.forward = scaled(model.llm.model.forward)
    with pytest.raises(UserError, match="cannot be used here"):
        check_llm(model, PROMPTS, ANSWERS, "cpu")


def scaled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass whose output depends on the number of rows: what a batch does to its members."""

    def wrong(*args: Any, **given: Any) -> Any:
        out = forward(*args, **given)
        out.last_hidden_state = out.last_hidden_state * (1.5 if len(out.last_hidden_state) > 1 else 1)
        return out

    return wrong


class MixesRows(LlamaForCausalLM):
    """Gives a clip the audio of the other one of its batch."""

    def forward(self, *args: Any, inputs_embeds: Tensor | None = None, **given: Any) -> CausalLMOutputWithPast:
        rows = None if inputs_embeds is None else inputs_embeds.flip(0)
        return super().forward(*args, inputs_embeds=rows, **given)


class Deaf(LlamaForCausalLM):
    """Attends to nothing before the last two places."""

    def forward(self, *args: Any, inputs_embeds: Tensor | None = None, **given: Any) -> CausalLMOutputWithPast:
        words = None
        if inputs_embeds is not None:
            words = inputs_embeds.clone()
            words[:, :4] = 1.0
        return super().forward(*args, inputs_embeds=words, **given)


class ScalesIds(LlamaForCausalLM):
    """Treats embedded words in another way than words by number."""

    def forward(self, input_ids: Tensor | None = None, **given: Any) -> CausalLMOutputWithPast:
        if input_ids is not None:
            given["inputs_embeds"] = 3 * self.get_input_embeddings()(input_ids)
        return super().forward(**given)


class BadCache(LlamaForCausalLM):
    """Forgets the prompt where it reads from a cache."""

    def forward(self, *args: Any, past_key_values: Any = None, **given: Any) -> CausalLMOutputWithPast:
        if past_key_values is not None:
            for layer in past_key_values.layers:
                layer.values = layer.values * 0
        return super().forward(*args, past_key_values=past_key_values, **given)


class IgnoresMask(LlamaForCausalLM):
    """Pads on the right are harmless to a causal model, unless it counts places from the end."""

    def forward(self, *args: Any, **given: Any) -> CausalLMOutputWithPast:
        mask = given.get("attention_mask")
        out = super().forward(*args, **given)
        if mask is not None:
            out.logits = out.logits.roll(1, 1)
        return out


class NotANumber(LlamaForCausalLM):
    def forward(self, *args: Any, **given: Any) -> CausalLMOutputWithPast:
        out = super().forward(*args, **given)
        out.logits = out.logits * float("nan")
        return out


class TakesNoEmbeddings(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, **given: Any) -> CausalLMOutputWithPast:
        return super().forward(input_ids=input_ids, **given)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (MixesRows, "MixesRows cannot be used here: the (loss|scores) of a"),
        (Deaf, "embeddings are others|says the same whatever stands where the speech does"),
        (ScalesIds, "words given as embeddings are others"),
        (IgnoresMask, "the loss of a padded batch is not that of its clips"),
        (NotANumber, "logits that are not finite"),
        (TakesNoEmbeddings, "TakesNoEmbeddings cannot be given a prompt with speech .*input_ids"),
    ],
)
def test_a_model_that_is_wrong_is_refused_by_name(kind: type[LlamaForCausalLM], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check(llama(kind))
    assert kind.__name__ in str(caught.value) and "\n" not in str(caught.value)


def test_one_that_is_not_causal_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match=r"BertLMHeadModel cannot be used here.*not causal"):
        check(BertLMHeadModel(BertConfig(**SIZES, is_decoder=False)))


def test_a_cache_that_forgets_or_cannot_be_shared_is_not_used() -> None:
    model = SpeechLLM(speech(), llama(BadCache))
    checked = check_llm(model, PROMPTS, ANSWERS, "cpu")
    assert not checked.shares_cache and model.scores_by == "whole"
    assert checked.not_scored.count("it differs by") == 2, "neither in one pass nor in two"
    hybrid = Lfm2ForCausalLM(Lfm2Config(**SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"]))
    model = SpeechLLM(speech(), sharpened(hybrid)).eval()
    checked = check_llm(model, PROMPTS, ANSWERS, "cpu", "prefix")
    assert not checked.shares_cache and "whole forward passes" in str(checked)
    assert checked.packing == "off" and "its layers of type conv go on from clip to clip" in checked.packed
    mel, lengths = torch.randn(2, 80, 50), torch.tensor([50, 50])
    score = Likelihoods(model, PROMPTS[:1], ANSWERS, "cpu")
    scores, alone = score(mel, lengths), score(mel[1:], lengths[1:])
    assert scores.shape == (2, 1, 3, 4)
    torch.testing.assert_close(scores[1:], alone, rtol=0, atol=1e-4)


def test_a_clip_that_depends_on_its_batch_is_found() -> None:
    model = speech()
    check_speech(model, "cpu")
    whisper: Any = model.any_encoder.whisper
    layer = whisper.conv2

    class OverTheBatch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = layer(x)
            return y - y.mean((0, 2), keepdim=True)

    whisper.conv2 = OverTheBatch()
    with pytest.raises(UserError, match="makes of a clip depends on the other clips of its batch"):
        check_speech(model, "cpu")
