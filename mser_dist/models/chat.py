"""The prompt of stage 2 as an LLM's chat template renders it, and the answers behind it, as token ids.

A template is code: it may drop what it is given, and print today's date. So it is run once, at the start of a training,
and the text around speech and instruction is kept, with the run and with its export.
"""

import unicodedata
from dataclasses import dataclass
from typing import Any

from mser_dist.errors import UserError
from mser_dist.models import prompts

# They stand for speech and instruction while a template is rendered: of letters alone, which templates leave as they
# are, where they escape quotes or strip what looks like a special token.
SPEECH_MARK = "SpeechStandsHere"
_INSTRUCTION_MARK = "InstructionStandsHere"


@dataclass(frozen=True)
class ChatPrompt:
    """The text of a prompt: before the speech, between speech and instruction, and up to where the answer starts.

    questions: the instructions, with {} for the options; the first is the one that evaluation uses.
    """

    before: str
    between: str
    after: str
    questions: tuple[str, ...] = prompts.INSTRUCTIONS

    def __post_init__(self) -> None:
        object.__setattr__(self, "questions", tuple(self.questions))  # from JSON, a list

    def instructions(self, labels: list[str]) -> list[str]:
        """Every way to ask for one of `labels`."""
        return prompts.instructions(labels, self.questions)

    def ids(self, tokenizer: Any, instruction: str, queries: int, speech_id: int) -> list[int]:
        """Token ids of the prompt, with `queries` times `speech_id` where the speech tokens go."""
        head = _ids(tokenizer, self.before)
        tail = _ids(tokenizer, self.between + instruction + self.after)
        return [*head, *[speech_id] * queries, *tail]


def render(tokenizer: Any) -> ChatPrompt:
    """The prompt by the chat template of a transformers tokenizer; one without (a base LLM) gets a plain layout.

    Raises `UserError` for a template that does not show speech and instruction once each, as they were given.
    """
    if not tokenizer.chat_template:
        return ChatPrompt(f"{tokenizer.bos_token or ''}Speech: ", "\n", "\nEmotion: ")
    found = []
    for as_parts in (False, True):  # templates of models that see or hear take content as a list of parts
        text = _rendered(tokenizer, f"{SPEECH_MARK}\n{_INSTRUCTION_MARK}", as_parts)
        found.append((text.count(SPEECH_MARK), text.count(_INSTRUCTION_MARK)))
        if found[-1] != (1, 1):
            continue
        before, _, rest = text.partition(SPEECH_MARK)
        between, _, after = rest.partition(_INSTRUCTION_MARK)
        if not after.strip():
            raise UserError(
                f"the chat template of {_name(tokenizer)} does not end the user's turn: its output stops behind the "
                "instruction; mend the template, or remove it for a plain prompt"
            )
        prompt = ChatPrompt(before, between, after)
        [question] = prompts.instructions(["calm"], prompt.questions[:1])
        if _rendered(tokenizer, f"{SPEECH_MARK}\n{question}", as_parts) != (
            f"{before}{SPEECH_MARK}{between}{question}{after}"
        ):
            raise UserError(f"the chat template of {_name(tokenizer)} changes the text of an instruction: mend it")
        return prompt
    shown = " and ".join(f"{speech} and {instruction} times" for speech, instruction in found)
    raise UserError(
        f"the chat template of {_name(tokenizer)} does not show speech and instruction once each, but {shown} (content "
        "given as text, and as parts): mend the template, or remove it for a plain prompt"
    )


def _rendered(tokenizer: Any, content: str, as_parts: bool) -> str:
    given = [{"type": "text", "text": content}] if as_parts else content
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": given}], tokenize=False, add_generation_prompt=True
            )
        )
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
    text = prompts.answer(label)
    ids = _ids(tokenizer, text)
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if not ids or _plain(back) != _plain(text):
        raise UserError(
            f"the tokenizer of {_name(tokenizer)} makes {back.strip()!r} of the label {text!r}: name it in words that "
            "the tokenizer knows, or take another LLM"
        )
    return [*ids, tokenizer.eos_token_id]


def answers(tokenizer: Any, labels: list[str]) -> list[list[int]]:
    """`answer_ids` of every label. Raises `UserError` where one is the beginning of another: both would fit a text."""
    found = [answer_ids(tokenizer, label) for label in labels]
    for label, ids in zip(labels, found, strict=True):
        for other, longer in zip(labels, found, strict=True):
            if label != other and longer[: len(ids)] == ids:
                raise UserError(
                    f"to the tokenizer of {_name(tokenizer)}, the label {label!r} is the beginning of {other!r}: "
                    "rename one of them"
                )
    return found


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"])


def _plain(text: str) -> str:
    """Text as tokenizers may change it without loss: width, case and spaces at the ends."""
    return unicodedata.normalize("NFKC", text).casefold().strip()
