"""The language of both stages: emotion-aware captions, instructions, and the answer of each label."""

from collections.abc import Sequence

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
INSTRUCTIONS = (
    "What emotion does the speaker express? Choose from: {}.",
    "Listen to the voice and name the emotion. Options: {}.",
    "How does the speaker feel: {}?",
    "Classify the emotion of this speech as one of {}.",
)


def captions(label: str) -> list[str]:
    """Every emotion-aware caption of a label; a label without words of its own (e.g. boredom) speaks for itself."""
    return [caption.format(word) for word in _WORDS.get(label, (label,)) for caption in _CAPTIONS]


def instructions(words: Sequence[str], questions: Sequence[str] = INSTRUCTIONS) -> list[str]:
    """Every way to ask for one of the labels, which are called by `words`; evaluation uses the first."""
    return [question.replace("{}", ", ".join(words)) for question in questions]
