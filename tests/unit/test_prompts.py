import pytest
from transformers import PreTrainedTokenizerFast

from mser_dist.config import SIX_EMOTIONS
from mser_dist.models import chat, prompts
from mser_dist.models.small_llm import small_tokenizer

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
    assert prompts.label_prompts("sad") == captions["sad"]


def test_a_label_without_synonyms_speaks_for_itself() -> None:
    assert all("boredom" in caption for caption in prompts.captions("boredom"))


def test_instructions_name_every_option_in_order() -> None:
    for instruction in prompts.instructions(SIX_EMOTIONS):
        places = [instruction.index(label) for label in SIX_EMOTIONS]
        assert places == sorted(places)
    assert len(set(prompts.instructions(SIX_EMOTIONS))) >= 3


@pytest.mark.parametrize("kind", ["tokenizer", "base_tokenizer"])
def test_speech_tokens_lie_between_the_halves_of_the_prompt(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    instruction = prompts.instructions(SIX_EMOTIONS)[0]
    prompt = chat.render(tokenizer)
    ids = prompt.ids(tokenizer, instruction, queries=5, speech_id=SPEECH_ID)
    places = [i for i, number in enumerate(ids) if number == SPEECH_ID]
    assert places == list(range(places[0], places[0] + 5))
    before, after = tokenizer.decode(ids[: places[0]]), tokenizer.decode(ids[places[-1] + 1 :])
    assert (before, after) == (prompt.before, prompt.between + instruction + prompt.after)
    assert chat.SPEECH_MARK not in before + after
    assert instruction in after
    if kind == "tokenizer":
        assert before == "<|user|>" and after.endswith("<|end|><|assistant|>")
    else:
        assert before == "<|begin|>Speech: " and after.endswith("\nEmotion: ")
    assert ids.count(tokenizer.bos_token_id) == (kind == "base_tokenizer"), "the beginning is marked once at most"


def test_answers_end_and_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    answers = [chat.answer_ids(tokenizer, label) for label in ALL]
    for label, ids in zip(ALL, answers, strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == prompts.answer(label) == label
    assert len({tuple(ids) for ids in answers}) == len(ALL)
