"""Instructions, label words, transcripts and captions that a config words itself."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.evaluation.asking import ask
from mser_dist.evaluation.scoring import AnswerScorer
from mser_dist.models import chat, prompts
from mser_dist.models.chat import ChatPrompt
from mser_dist.models.small_llm import small_llama, small_tokenizer
from mser_dist.models.speech_llm import SpeechLLM
from mser_dist.models.wording import LONGEST, captions_of, transcript_of
from mser_dist.shards.shard_set import ShardSet
from mser_dist.stream.examples import Examples
from mser_dist.stream.features import Features
from mser_dist.stream.loader import Example
from mser_dist.training.collate import InstructCollate
from tests.unit.test_models import SDPA, clips, small_speech

LABELS = ["anger", "happy", "sad"]
GERMAN = {"anger": "Wut", "happy": "Freude", "sad": "Trauer"}
TOKENIZER = small_tokenizer(LABELS)


def prompt(**keys: Any) -> ChatPrompt:
    llm = cfg.LLMConfig(prompt=cfg.PromptConfig(**keys))
    made = chat.worded(TOKENIZER, llm, LABELS)
    return ChatPrompt(**json.loads(json.dumps(asdict(made))))  # as runs and exports keep it


def example(number: int, wording: int = 0, text: str = "") -> Example:
    speech = np.zeros((80, 10), np.float32)
    return Example(speech, 10, number % 3, number, number, np.random.default_rng(number), wording, text)


def asked(made: ChatPrompt, examples: list[Example], draw: Literal["batch", "clip"] = "clip") -> list[str]:
    """Prompts and answers as text, in the order of the clips' numbers."""
    collate = InstructCollate(TOKENIZER, made, LABELS, 2, draw)
    batch = collate(examples)
    texts = [TOKENIZER.decode([i for i in row.tolist() if i >= 0]) for row in batch["input_ids"]]
    return [text for _, text in sorted(zip(batch["index"], texts, strict=True))]


def test_a_config_that_says_nothing_asks_as_ever() -> None:
    made = prompt()
    assert made == chat.render(TOKENIZER, "instruction_first") and made.wordings == [("", "")]
    texts = asked(made, [example(number) for number in range(8)])
    for number, text in enumerate(texts):
        drawn = int(np.random.default_rng(number).integers(4))
        assert prompts.instructions(LABELS)[drawn] in text and f"{LABELS[number % 3]}<|end|>" in text


def test_a_micro_batch_is_asked_one_thing_and_each_another() -> None:
    drawn = set()
    for first in range(12):
        texts = asked(prompt(), [example(number) for number in range(first, first + 6)], "batch")
        [question] = {text.partition("<|end|>")[0] for text in texts}
        drawn.add(question)
    assert len(drawn) == len(prompts.INSTRUCTIONS)


def test_words_and_instructions_of_a_language_or_corpus(tmp_path: Path) -> None:
    lines = tmp_path / "de.txt"
    lines.write_text("Welche Emotion: {}?\n\nWas hörst du: {}?\n", encoding="utf-8")
    made = prompt(
        instructions={"de": str(lines), "emovo": ["Quale di {}?"]},
        words={"sad": "sorrow", "de": GERMAN, "emodb": {"anger": "Zorn"}},
        system="You listen.",
    )
    assert made.questions == prompts.INSTRUCTIONS and "You listen." in made.before
    assert made.words_for(LABELS, made.wording("resd", "ru")) == ["anger", "happy", "sorrow"]
    assert made.words_for(LABELS, made.wording("emodb", "de")) == ["Zorn", "happy", "sorrow"], "a corpus comes first"
    assert made.instructions(LABELS, made.wording("emodb", "de"))[1] == "Was hörst du: Zorn, happy, sorrow?"
    german = made.wording("m5ser", "de")
    [text] = asked(made, [example(4, german)])
    assert "Wut, Freude, Trauer?" in text and "Freude<|end|>" in text.rpartition("Trauer")[2]
    assert len(set(made.wordings)) == len(made.wordings) == 9


def test_options_are_shuffled_for_each_clip_by_its_own_draw() -> None:
    made = prompt(shuffle_options=True, instructions=["Which of {}?"])
    texts = [asked(made, [example(number) for number in range(12)]) for _ in range(2)]
    assert texts[0] == texts[1] and len({text.partition("?")[0] for text in texts[0]}) > 2
    assert all(sorted(t.partition("Which of ")[2].partition("?")[0].split(", ")) == LABELS for t in texts[0])


@pytest.mark.parametrize("order", ["instruction_first", "speech_first"])
def test_a_transcript_stands_behind_speech_and_instruction(order: chat.Order) -> None:
    llm = cfg.LLMConfig(order=order, prompt=cfg.PromptConfig(transcript=True))
    made = chat.worded(TOKENIZER, llm, LABELS)
    said, silent = asked(made, [example(0, text="leave me alone"), example(3)])
    assert 'Transcript: "leave me alone"<|end|><|assistant|>' in said and "Transcript" not in silent
    assert asked(prompt(), [example(0, text="leave me alone")]) == asked(prompt(), [example(0)]), "nobody asked for it"
    head, _ = made.around(TOKENIZER, "Name it.", "leave me alone")
    assert order == "speech_first" or head == made.around(TOKENIZER, "Name it.")[0], "what clips share stays as it is"
    assert (
        transcript_of(b'{"text": " a\\n<|end|> b"}') == "a |end| b"
        and len(transcript_of(b'{"text": "' + b"a" * 999 + b'"}')) == LONGEST
    )
    assert transcript_of(b"") == transcript_of(b'{"text": 3}') == transcript_of(b"{") == ""


@pytest.mark.parametrize("transcript", [False, True])
def test_each_clip_is_scored_in_its_own_wording(transcript: bool) -> None:
    made = prompt(words={"de": GERMAN}, transcript=transcript)
    torch.manual_seed(1)
    speech = small_speech()
    llm = small_llama(
        {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}, TOKENIZER, SDPA
    )
    model = SpeechLLM(speech, llm).eval()
    mel, lengths = clips()
    text = ["so", "", "ach"] if transcript else [""] * 3
    batch: dict[str, Any] = {"speech": mel, "lengths": lengths, "wording": [1, 0, 1], "text": text}
    scores = AnswerScorer(model, TOKENIZER, made, LABELS)(batch)["scores"]
    for row, wording in enumerate(batch["wording"]):
        alone = {"speech": mel[row : row + 1], "lengths": lengths[row : row + 1], "text": text[row : row + 1]}
        words = ChatPrompt(made.before, made.between, made.after, order=made.order, transcript=transcript)
        named = GERMAN.values() if wording else LABELS
        expected = AnswerScorer(model, TOKENIZER, words, list(named))(alone)["scores"]
        assert torch.allclose(scores[row], expected[0], atol=1e-4)
    default = AnswerScorer(model, TOKENIZER, made, LABELS)({**batch, "wording": [0, 0, 0]})["scores"]
    assert not torch.allclose(scores, default)


def test_clips_are_given_their_wording_and_languages_without_words_are_told(tiny_set: Path) -> None:
    examples = Examples(ShardSet.open([str(tiny_set)], split="train"), cfg.SIX_EMOTIONS, Features())
    [line] = ask(examples, prompt(words={"de": GERMAN}, transcript=True))
    assert "has none for en:" in line
    languages = examples.shards.column("language")
    assert set(languages) == {"de", "en"} and examples.wording is not None
    assert examples.wording.tolist() == [int(language == "de") for language in languages]
    number = int(np.flatnonzero(examples.wording)[0])
    clip = examples.get(number, 0)
    assert clip.wording == 1 and clip.text == " ".join(str(examples.shards.read(number).meta["text"]).split())
    assert ask(examples, prompt()) == []


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"instructions": ["What is it?"]}, r"instructions: 'What is it\?' is to be one line with one \{\}"),
        ({"instructions": {"de": ["{} {}"]}}, r"instructions\.de: '\{\} \{\}' is to be"),
        ({"instructions": {"de": []}}, r"instructions\.de has no instruction"),
        ({"instructions": "/no/such.txt"}, r"instructions=/no/such\.txt: .*No such file"),
        ({"words": {"angr": "Wut"}}, r"words has a word for 'angr', which is no label: did you mean anger\?"),
        ({"words": {"de": {"anger": "sad"}}}, r"words\.de: the word 'sad' stands for several labels"),
    ],
)
def test_wordings_that_cannot_be_are_named(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        prompt(**keys)
    assert "\n" not in str(caught.value)


def test_words_that_begin_one_another_and_a_template_without_a_system_turn() -> None:
    made = prompt(words={"de": {"anger": "Wut", "sad": "Wut<|end|>"}})
    with pytest.raises(UserError, match="the label 'Wut' is the beginning of"):
        InstructCollate(TOKENIZER, made, LABELS, 2)
    plain = small_tokenizer(LABELS)
    plain.chat_template = "<|user|>{{ messages[-1]['content'] }}<|end|><|assistant|>"
    with pytest.raises(UserError, match=r"llm\.prompt\.system: the chat template .* does not show a system turn"):
        chat.render(plain, "instruction_first", "You listen.")


def test_captions_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "captions.yaml"
    file.write_text("anger: [Furious speech., A shout of rage.]\n")
    text = cfg.TextConfig(captions=str(file))
    found = captions_of(text, LABELS)
    assert found["anger"] == ["Furious speech.", "A shout of rage."] and found["sad"] == prompts.captions("sad")
    for content, says in (
        ("- a", "map each label to a list"),
        ("anger: rage", "map each label to a list"),
        ("rage: [a]", "'rage', which is no label"),
        ("anger: [a]\nsad: [a]", "'a' stands there twice"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=says):
            captions_of(text, LABELS)
    with pytest.raises(UserError, match="No such file"):
        captions_of(cfg.TextConfig(captions=str(tmp_path / "none.yaml")), LABELS)
