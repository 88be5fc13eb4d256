"""Emotion names: the common label set, and how the words of the corpora map to it.

The common set is the one most corpora share, so that a model trained on one can be asked about another. A word outside
it (calm, boredom, enthusiasm …) keeps its own name and is never merged into a neighbour: that would change the task
unseen.
"""

COMMON = ("anger", "disgust", "fear", "happy", "neutral", "sad", "surprise")

_COMMON_WORDS = {
    "anger": "anger angry angriness ang rage wut ärger colère rabbia enojo enfado ira гнев злость θυμός خشم 愤怒 生气",
    "disgust": "disgust disgusted dis ekel dégoût disgusto asco отвращение αηδία انزجار 厌恶",
    "fear": "fear fearful afraid scared fea angst peur paura miedo страх φόβος ترس 恐惧 害怕",
    "happy": "happy happiness joy joyful hap happy/joy positive freude joie gioia gio alegría felicidad радость "
    "счастье χαρά شادی 高兴 快乐 开心",
    "neutral": "neutral neutrality neu neutre neutrale neutro нейтрально нейтральный ουδέτερο خنثی 中性 中立",
    "sad": "sad sadness trauer tristesse tristezza tristeza грусть печаль λύπη غم 悲伤 难过",
    "surprise": "surprise surprised sur überraschung sorpresa удивление έκπληξη تعجب 惊讶",
}
_OWN_WORDS = {
    "amusement": "amusement amused",
    "boredom": "boredom bored langeweile",
    "calm": "calm calmness",
    "contempt": "contempt contemptuous",
    "enthusiasm": "enthusiasm enthusiastic энтузиазм",
    "excitement": "excitement excited exc",
    "frustration": "frustration frustrated fru",
    "sleepiness": "sleepiness sleepy",
}
LABELS = (*COMMON, *_OWN_WORDS)
"""Every label that `to_label` gives."""

_TO_COMMON = {word: label for label, words in _COMMON_WORDS.items() for word in words.split()}
_TO_OWN = {word: label for label, words in _OWN_WORDS.items() for word in words.split()}
# What annotators write when they could not name one emotion: such clips carry no label and are dropped, and counted.
UNLABELLED = frozenset({"", "other", "oth", "unknown", "xxx", "none", "no agreement", "no_agreement", "undefined"})


def to_label(native: str) -> str | None:
    """The class a clip is trained on: the common label, or the own name of an emotion outside the common set
    ("boredom").

    None where annotators named no emotion (`UNLABELLED`). Raises KeyError for a word that is not known at all, so that
    a misspelling never becomes a class of its own.
    """
    word = _normal(native)
    if word in UNLABELLED:
        return None
    return _TO_COMMON.get(word) or _TO_OWN[word]


def _normal(native: str) -> str:
    return native.strip().casefold()
