import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mser_dist.config import SIX_EMOTIONS, LLMConfig
from mser_dist.config.file import load_training, to_yaml
from mser_dist.errors import UserError
from mser_dist.models import chat, prompts
from mser_dist.models.small_llm import small_tokenizer
from mser_dist.runs.folder import finished
from mser_dist.training.collate import kept_prompt

SPEECH_ID = -1
ALL = [*SIX_EMOTIONS, "surprise", "boredom"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_tokenizer(SIX_EMOTIONS)


@pytest.fixture(scope="module")
def base_tokenizer() -> PreTrainedTokenizerFast:
    """That of a base LLM: no chat template."""
    plain = small_tokenizer(SIX_EMOTIONS)
    plain.chat_template = None
    return plain


def test_captions_are_many_and_tell_the_labels_apart() -> None:
    captions = {label: prompts.captions(label) for label in ALL}
    everything = [caption for many in captions.values() for caption in many]
    assert len(set(everything)) == len(everything), "a caption would fit two labels"
    assert all(len(captions[label]) >= 12 for label in SIX_EMOTIONS)
    assert all("{" not in caption for caption in everything)


def test_a_label_without_synonyms_speaks_for_itself() -> None:
    assert all("boredom" in caption for caption in prompts.captions("boredom"))


def test_instructions_name_every_option_in_order() -> None:
    for instruction in prompts.instructions(SIX_EMOTIONS):
        places = [instruction.index(label) for label in SIX_EMOTIONS]
        assert places == sorted(places)
    assert len(set(prompts.instructions(SIX_EMOTIONS))) >= 3


@pytest.mark.parametrize("order", ["instruction_first", "speech_first"])
@pytest.mark.parametrize("kind", ["tokenizer", "base_tokenizer"])
def test_speech_tokens_lie_between_the_halves_of_the_prompt(
    kind: str, order: chat.Order, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    instruction = prompts.instructions(SIX_EMOTIONS)[0]
    prompt = chat.render(tokenizer, order)
    ids = prompt.ids(tokenizer, instruction, queries=5, speech_id=SPEECH_ID)
    places = [i for i, number in enumerate(ids) if number == SPEECH_ID]
    assert places == list(range(places[0], places[0] + 5))
    before, after = tokenizer.decode(ids[: places[0]]), tokenizer.decode(ids[places[-1] + 1 :])
    assert prompt.around(tokenizer, instruction) == (ids[: places[0]], ids[places[-1] + 1 :])
    assert chat.SPEECH_MARK not in before + after
    if order == "instruction_first":
        assert (before, after) == (prompt.before + instruction + prompt.between, prompt.after)
        shared = [prompt.around(tokenizer, instruction)[0] for _ in range(2)]
        assert shared[0] == shared[1] == ids[: places[0]], "to the last token"
    else:
        assert (before, after) == (prompt.before, prompt.between + instruction + prompt.after)
    if kind == "tokenizer":
        assert before.startswith("<|user|>") and after.endswith("<|end|><|assistant|>")
    else:
        assert before.startswith("<|begin|>") and before.endswith("Speech: ") and after.endswith("\nEmotion: ")
    assert ids.count(tokenizer.bos_token_id) == (kind == "base_tokenizer"), "the beginning is marked once at most"


def test_answers_end_and_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    answers = [chat.answer_ids(tokenizer, label) for label in ALL]
    for label, ids in zip(ALL, answers, strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == label
    assert len({tuple(ids) for ids in answers}) == len(ALL)


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = small_tokenizer(SIX_EMOTIONS)
    tokenizer.chat_template = template
    return tokenizer


_TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>CONTENT<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    "content",
    [
        "{{ m['content'] }}",
        "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}",
        "{{ m['content'] | e }}",
        "{{ m['content'] | trim | replace('<|', '') | replace('|>', '') }}",
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ raise_exception('text only') }}{% endif %}",
        "{% if m['content'] is string %}{{ raise_exception('parts only') }}{% endif %}{{ m['content'][0]['text'] }}",
    ],
)
def test_a_template_may_want_parts_escape_or_strip(content: str) -> None:
    tokenizer = with_template(_TURNS.replace("CONTENT", content))
    assert chat.render(tokenizer, "speech_first") == chat.ChatPrompt("<|user|>", "\n", "<|end|><|assistant|>")
    prompt = chat.render(tokenizer, "instruction_first")
    assert prompt == chat.ChatPrompt("<|user|>", "\n", "<|end|><|assistant|>", order="instruction_first")
    instruction = prompt.instructions(SIX_EMOTIONS)[0]
    ids = prompt.ids(tokenizer, instruction, queries=2, speech_id=SPEECH_ID)
    assert tokenizer.decode([i for i in ids if i >= 0]) == f"<|user|>{instruction}\n<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("<|user|>{{ messages[0]['role'] }}<|end|>", r"does not show speech and instruction once each, but 0 and 0"),
        (_TURNS.replace("CONTENT", "{{ m['content'] }}{{ m['content'] }}"), "but 2 and 2 times and"),
        (_TURNS.replace("CONTENT", "{{ m['content'] | lower }}"), "does not show speech"),
        (_TURNS.replace("CONTENT", "{{ m['content'] | replace('e', 'E') }}"), "does not show speech|changes the text"),
        (
            _TURNS.replace("CONTENT", "{{ m['content'] | replace('express', '') }}"),
            "changes the text of an instruction",
        ),
        ("{{ messages[0]['content'] }}", "does not end the user's turn"),
        ("{{ raise_exception('a system message is missing') }}", "cannot be rendered: a system message is missing"),
        ("{% for m in messages %}", "cannot be rendered: "),
    ],
)
def test_a_template_that_loses_something_is_named(template: str, says: str) -> None:
    with pytest.raises(UserError, match=f"the chat template of .* {says}|the chat template of .*{says}") as caught:
        chat.render(with_template(template), "instruction_first")
    assert "\n" not in str(caught.value)


def test_a_template_with_a_date_is_rendered_once() -> None:
    tokenizer = with_template("It is {{ strftime_now('%d %b %Y') }}.\n{{ messages[0]['content'] }}<|assistant|>")
    kept = asdict(chat.render(tokenizer, "speech_first"))
    del kept["order"]  # as runs of 0.2.0 keep it
    assert re.fullmatch(r"It is \d\d \w+ \d{4}\.\n", kept["before"])
    kept["before"] = "It is 01 Jan 2026.\n"  # the day on which a run began
    back = chat.ChatPrompt(**json.loads(json.dumps(kept)))
    ids = back.ids(tokenizer, "Name it.", 1, SPEECH_ID)
    assert tokenizer.decode(ids[: ids.index(SPEECH_ID)]) == "It is 01 Jan 2026.\n"
    assert back.instructions(["sad"]) == prompts.instructions(["sad"])


def test_answers_that_a_tokenizer_cannot_say_or_end() -> None:
    tokenizer = small_tokenizer(SIX_EMOTIONS)
    with pytest.raises(UserError, match=r"the label 'happy' is the beginning of 'happy<\|end\|>'"):
        chat.answers(tokenizer, ["sad", "happy<|end|>", "happy"])
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"has no end token.*set eos_token"):
        chat.answer_ids(tokenizer, "happy")
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"happy": 0, "[UNK]": 1, "</s>": 2}, "[UNK]")),
        unk_token="[UNK]",
        eos_token="</s>",
    )
    assert chat.answer_ids(words, "happy") == [0, 2]
    with pytest.raises(UserError, match=r"makes '\[UNK\]' of the label 'злость'"):
        chat.answers(words, ["happy", "злость"])


def test_a_tokenizer_that_cuts_and_pads_does_neither_here() -> None:
    tokenizer = small_tokenizer(SIX_EMOTIONS)
    plain = (
        chat.answers(tokenizer, ALL),
        chat.render(tokenizer, "instruction_first").ids(tokenizer, "Name it.", 1, SPEECH_ID),
    )
    tokenizer.backend_tokenizer.enable_truncation(1)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    assert plain == (
        chat.answers(tokenizer, ALL),
        chat.render(tokenizer, "instruction_first").ids(tokenizer, "Name it.", 1, SPEECH_ID),
    )


def test_a_run_keeps_the_prompt_that_it_began_with(tmp_path: Path) -> None:
    first, later = (with_template(f"It is {day}.\n{_TURNS}".replace("CONTENT", "{{ m['content'] }}")) for day in (1, 2))
    llama, another = LLMConfig(pretrained="llama"), LLMConfig(pretrained="another", order="speech_first")
    began = kept_prompt(tmp_path, llama, first, ALL)
    assert began.before == "It is 1.\n<|user|>" and began.order == "instruction_first"
    assert kept_prompt(tmp_path, llama, later, ALL) == began
    assert kept_prompt(tmp_path, another, later, ALL) == chat.render(later, "speech_first")
    for damaged in (
        "{",
        '{"llm": "llama", "prompt": {"before": "", "between": "", "after": "", "order": "backwards"}}',
    ):
        (tmp_path / "prompt.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(UserError, match=r"prompt\.json is damaged"):
            kept_prompt(tmp_path, llama, later, ALL)


def test_a_run_of_before_that_is_not_finished_goes_on_as_it_began(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000005").mkdir(parents=True)
    before = ["llm.order=speech_first", "llm.packing=off", "llm.prompt.draw=clip"]
    began = load_training("demo_stage2", [f"out={run}", *before])
    text = to_yaml(began)
    assert text.count("order:") == text.count("packing:") == 1
    for section in (r"  prompt:\n(    .*\n)+", r"  (order|packing): .*\n"):
        text, found = re.subn(rf"(?m)^{section}", "", text)
        assert found
    (run / "config.yaml").write_text(text, encoding="utf-8")
    assert finished(run, began) is None
    with pytest.raises(UserError, match=r"speech_first, now instruction_first, .*=off, now prefix, .*draw=clip,"):
        finished(run, load_training("demo_stage2", [f"out={run}"]))
