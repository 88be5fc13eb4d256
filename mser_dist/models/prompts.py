"""The language of both stages: emotion-aware captions, instructions, and the answer of each label."""

from typing import Any

# Words for the same feeling. Captions vary them, so that alignment is with the meaning and not with one string.
_WORDS = {
    "anger": ("angry", "furious", "irritated"),
    "disgust": ("disgusted", "repelled", "revolted"),
    "fear": ("afraid", "fearful", "scared"),
    "happy": ("happy", "joyful", "cheerful"),
    "neutral": ("neutral", "calm and unemotional", "matter-of-fact"),
    "sad": ("sad", "sorrowful", "downcast"),
    "surprise": ("surprised", "astonished", "amazed"),
}
_CAPTIONS = (
    "The speaker sounds {}.",
    "A person speaking in a tone that is {}.",
    "This voice is {}.",
    "Someone who feels {} is talking.",
    "The emotion in this voice: {}.",
    "An utterance by a speaker who is {}.",
)
_INSTRUCTIONS = (
    "What emotion does the speaker express? Choose from: {}.",
    "Listen to the voice and name the emotion. Options: {}.",
    "How does the speaker feel: {}?",
    "Classify the emotion of this speech as one of {}.",
)
SPEECH_MARK = "<|speech|>"


def captions(label: str) -> list[str]:
    """Every emotion-aware caption of a label; a label without words of its own (e.g. boredom) speaks for itself."""
    return [caption.format(word) for word in _WORDS.get(label, (label,)) for caption in _CAPTIONS]


def label_prompts(label: str) -> list[str]:
    """The sentences whose mean embedding stands for a label in zero-shot evaluation: its captions."""
    return captions(label)


def instructions(labels: list[str]) -> list[str]:
    """Every way to ask for one of `labels`; the first is the one that evaluation uses."""
    options = ", ".join(answer(label) for label in labels)
    return [instruction.format(options) for instruction in _INSTRUCTIONS]


def answer(label: str) -> str:
    """What the LLM is to say for a label."""
    return label


def split_prompt(tokenizer: Any, instruction: str) -> tuple[str, str]:
    """The chat text before and after the speech, up to where the answer starts.

    `tokenizer` is a transformers tokenizer; one without a chat template (a base LLM) gets a plain layout.
    """
    content = f"{SPEECH_MARK}\n{instruction}"
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    else:
        text = f"{tokenizer.bos_token or ''}Speech: {content}\nEmotion: "
    before, _, after = text.partition(SPEECH_MARK)
    return before, after


def prompt_ids(tokenizer: Any, instruction: str, queries: int, speech_id: int) -> list[int]:
    """Token ids of the prompt, with `queries` times `speech_id` where the speech tokens go."""
    before, after = split_prompt(tokenizer, instruction)
    head = tokenizer(before, add_special_tokens=False)["input_ids"]
    tail = tokenizer(after, add_special_tokens=False)["input_ids"]
    return [*head, *[speech_id] * queries, *tail]


def answer_ids(tokenizer: Any, label: str) -> list[int]:
    """Token ids of the answer, its end included."""
    return [*tokenizer(answer(label), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
