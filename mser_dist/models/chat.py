"""The prompt of stage 2 as an LLM's chat template renders it, and the answers behind it, as token ids.

A template is code: it may drop what it is given, and print today's date. So it is run once, at the start of a training,
and the text around speech and instruction is kept, with the run and with its export.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, get_args

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.models import prompts, wording

# They stand for speech and instruction while a template is rendered: of letters alone, which templates leave as they
# are, where they escape quotes or strip what looks like a special token.
SPEECH_MARK = "SpeechStandsHere"
_INSTRUCTION_MARK = "InstructionStandsHere"

Order = Literal["instruction_first", "speech_first"]


@dataclass(frozen=True)
class ChatPrompt:
    """The text of a prompt: before, between and behind its speech and its instruction, up to where the answer starts.

    questions: the instructions, with {} for the options; the first is the one that evaluation uses. order: which of
    the two comes first; runs and exports that keep no order have the speech first. own_questions: those of a language
    or corpus that has its own. words: what labels are called, by language or corpus, "" for the others. transcript: it
    stands behind both.
    """

    before: str
    between: str
    after: str
    questions: tuple[str, ...] = prompts.INSTRUCTIONS
    order: Order = "speech_first"
    own_questions: dict[str, list[str]] = field(default_factory=dict)
    words: dict[str, dict[str, str]] = field(default_factory=dict)
    shuffle_options: bool = False
    transcript: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "questions", tuple(self.questions))  # from JSON, a list
        if self.order not in get_args(Order):
            raise ValueError(f"a prompt's order is one of {', '.join(get_args(Order))}, not {self.order!r}")

    @property
    def wordings(self) -> list[tuple[str, str]]:
        """Every pair of a key of `words` and one of `own_questions`. A clip's wording is its number, 0 the default."""
        words, questions = (
            [wording.EVERY, *sorted(set(given) - {wording.EVERY})] for given in (self.words, self.own_questions)
        )
        return list(product(words, questions))

    def wording(self, corpus: str, language: str) -> int:
        """The wording of a clip of this corpus and language."""
        pair = (wording.of_clip(self.words, corpus, language), wording.of_clip(self.own_questions, corpus, language))
        return self.wordings.index(pair)

    def words_for(self, labels: Sequence[str], number: int = 0) -> list[str]:
        """What labels are called in a wording: a label without a word there is called as everywhere."""
        everywhere, own = (self.words.get(key, {}) for key in (wording.EVERY, self.wordings[number][0]))
        return [own.get(label, everywhere.get(label, label)) for label in labels]

    def questions_for(self, number: int = 0) -> Sequence[str]:
        """The instructions of a wording, with {} for the options."""
        return self.own_questions.get(self.wordings[number][1], self.questions)

    def instructions(self, labels: list[str], number: int = 0) -> list[str]:
        """Every way to ask for one of `labels` in a wording."""
        return prompts.instructions(self.words_for(labels, number), self.questions_for(number))

    def around(self, tokenizer: Any, instruction: str, transcript: str = "") -> tuple[list[int], list[int]]:
        """Token ids before the speech tokens, and behind them up to where the answer starts.

        Each is made by itself, so that clips which are asked the same share the first to the last token.
        """
        said = f'\nTranscript: "{transcript}"' if self.transcript and transcript else ""
        if self.order == "instruction_first":
            return _ids(tokenizer, self.before + instruction + self.between), _ids(tokenizer, said + self.after)
        return _ids(tokenizer, self.before), _ids(tokenizer, self.between + instruction + said + self.after)

    def ids(self, tokenizer: Any, instruction: str, queries: int, speech_id: int, transcript: str = "") -> list[int]:
        """Token ids of the prompt, with `queries` times `speech_id` where the speech tokens go."""
        head, tail = self.around(tokenizer, instruction, transcript)
        return [*head, *[speech_id] * queries, *tail]


def worded(tokenizer: Any, config: cfg.LLMConfig, labels: Sequence[str]) -> ChatPrompt:
    """The prompt that a config asks for. Raises `UserError` for wordings that cannot be, and as `render` does."""
    own = config.prompt
    questions = wording.questions_of(own)
    every = questions.pop(wording.EVERY)
    words = wording.words_of(own, labels) if own.words else {}
    prompt = render(
        tokenizer, config.order, own.system, [*every, *(text for texts in questions.values() for text in texts)]
    )
    return replace(
        prompt,
        questions=tuple(every),
        own_questions=questions,
        words=words,
        shuffle_options=own.shuffle_options,
        transcript=own.transcript,
    )


def render(
    tokenizer: Any, order: Order, system: str | None = None, questions: Sequence[str] = prompts.INSTRUCTIONS
) -> ChatPrompt:
    """The prompt by the chat template of a transformers tokenizer; one without (a base LLM) gets a plain layout.

    Raises `UserError` for a template that does not show speech and instruction once each, as they were given.
    """
    instruction_first = order == "instruction_first"
    if not tokenizer.chat_template:
        start = (tokenizer.bos_token or "") + (f"{system}\n" if system else "")
        plain = (start, "\nSpeech: ") if instruction_first else (f"{start}Speech: ", "\n")
        return ChatPrompt(*plain, "\nEmotion: ", order=order)
    first, second = (_INSTRUCTION_MARK, SPEECH_MARK) if instruction_first else (SPEECH_MARK, _INSTRUCTION_MARK)
    found = []
    for as_parts in (False, True):  # templates of models that see or hear take content as a list of parts
        text = _rendered(tokenizer, f"{first}\n{second}", as_parts, system)
        found.append((text.count(SPEECH_MARK), text.count(_INSTRUCTION_MARK)))
        if found[-1] != (1, 1):
            continue
        if system and text.count(system) != 1:
            raise UserError(
                f"llm.prompt.system: the chat template of {_name(tokenizer)} does not show a system turn as it is "
                "given: leave it out, or say it in llm.prompt.instructions"
            )
        before, _, rest = text.partition(first)
        between, _, after = rest.partition(second)
        if not after.strip():
            raise UserError(
                f"the chat template of {_name(tokenizer)} does not end the user's turn: its output stops behind the "
                "content; mend the template, or remove it for a plain prompt"
            )
        prompt = ChatPrompt(before, between, after, order=order)
        for question in prompts.instructions(["calm"], questions):
            given, shown = (
                text.replace(_INSTRUCTION_MARK, question)
                for text in (f"{first}\n{second}", before + first + between + second + after)
            )
            if _rendered(tokenizer, given, as_parts, system) != shown:
                raise UserError(f"the chat template of {_name(tokenizer)} changes the text of an instruction: mend it")
        return prompt
    shown = " and ".join(f"{speech} and {instruction} times" for speech, instruction in found)
    raise UserError(
        f"the chat template of {_name(tokenizer)} does not show speech and instruction once each, but {shown} (content "
        "given as text, and as parts): mend the template, or remove it for a plain prompt"
    )


def _rendered(tokenizer: Any, content: str, as_parts: bool, system: str | None) -> str:
    turns = [("system", system), ("user", content)] if system else [("user", content)]
    given = [{"role": role, "content": [{"type": "text", "text": text}] if as_parts else text} for role, text in turns]
    try:
        return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        if as_parts:
            raise UserError(
                f"the chat template of {_name(tokenizer)} cannot be rendered: {' '.join(str(error).split())[:200]}: "
                "mend it, or remove it for a plain prompt"
            ) from error
        return ""  # a template that takes parts alone may break on a text


def _name(tokenizer: Any) -> str:
    return tokenizer.name_or_path or "this LLM"


def answer_ids(tokenizer: Any, label: str) -> list[int]:
    """Token ids of the answer, its end included. Raises `UserError` for a tokenizer that cannot say it, or end it."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {_name(tokenizer)} has no end token, by which the LLM is to end its answer: "
            "set eos_token in its tokenizer_config.json"
        )
    ids = _ids(tokenizer, label)
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if not ids or _plain(back) != _plain(label):
        raise UserError(
            f"the tokenizer of {_name(tokenizer)} makes {back.strip()!r} of the label {label!r}: name it in words that "
            "the tokenizer knows, or take another LLM"
        )
    return [*ids, tokenizer.eos_token_id]


def answers(tokenizer: Any, labels: list[str]) -> list[list[int]]:
    """`answer_ids` of every label. Raises `UserError` where one is the beginning of another: both would fit a text."""
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"two labels are called {twice[0]!r} in the prompt: leave one of them out of data.labels")
    found = [answer_ids(tokenizer, label) for label in labels]
    for label, ids in zip(labels, found, strict=True):
        for other, longer in zip(labels, found, strict=True):
            if label != other and longer[: len(ids)] == ids:
                raise UserError(
                    f"to the tokenizer of {_name(tokenizer)}, the label {label!r} is the beginning of {other!r}: "
                    "rename one of them"
                )
    return found


def check_length(llm: Any, longest: int) -> None:
    """Raise `UserError` if the LLM of a config has fewer positions than its longest prompt and answer have tokens."""
    positions = getattr(llm.get_text_config(), "max_position_embeddings", None) or longest
    if longest > positions:
        raise UserError(
            f"prompt and answer have up to {longest} tokens, and the LLM {positions} positions: name fewer labels, "
            "or take another LLM"
        )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"])


def _plain(text: str) -> str:
    """Text as tokenizers may change it without loss: width, case and spaces at the ends."""
    return unicodedata.normalize("NFKC", text).casefold().strip()
