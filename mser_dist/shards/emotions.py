"""Emotion names: the common label set, and how the words of the corpora map to it.

The common set is the one most corpora share, so that a model trained on one can be asked about another. A word outside
it (calm, boredom, enthusiasm …) keeps its own name and is never merged into a neighbour: that would change the task
unseen.
"""

import re
import unicodedata
from collections.abc import Mapping

COMMON = ("anger", "disgust", "fear", "happy", "neutral", "sad", "surprise")

_COMMON_WORDS = {
    "anger": "anger angry angriness ang rage irritated zorn wut wütend ärger colère rabbia arrabbiato enojo enfado ira "
    "raiva boosheid woede sint ilska sinne vrede viha hněv złość gniew гнев злость злой öfke kızgın "
    "kızgınlık sinirli θυμός خشم عصبانیت غضب غصہ غصے ناراض রাগ রাগান্বিত ቁጣ ንዴት 분노 화남 怒り 愤怒 憤怒 生气 生氣 怒",
    "disgust": "disgust disgusted dis disgusting ekel dégoût disgusto asco repugnancia nojo walging avsky avsmak inho "
    "wstręt obrzydzenie odraza отвращение iğrenme tiksinti αηδία انزجار تنفر نفرت کراہت ঘৃণা ጥላቻ 혐오 嫌悪 厌恶 厭惡",
    "fear": "fear fearful afraid scared fea anxiety/fear angst furcht peur paura miedo temor medo strach lęk rädsla "
    "pelko страх korku korkmuş φόβος ترس خوف ভয় ভয় ፍርሃት 공포 두려움 恐れ 恐怖 恐惧 恐懼 害怕",
    "happy": "happy happiness joy joyful hap happy/joy positive pleased freude fröhlich glücklich joie heureux gioia "
    "gio felicità alegría felicidad feliz alegria blijdschap glädje ilo radość szczęście радость счастье mutlu "
    "mutluluk χαρά شادی خوشحالی خوشی خوش سعادة আনন্দ সুখ ደስታ 행복 기쁨 喜び 高兴 高興 快乐 快樂 开心 開心 喜悦",
    "neutral": "neutral neutrality neu neutre neutrale neutro neutralny neutralność neutraal neutraali neutralität "
    "нейтрально нейтральный нейтральная nötr ουδέτερο ουδέτερος خنثی عادی محايد নিরপেক্ষ ገለልተኛ 중립 무감정 平常 中性 "
    "中立",
    "sad": "sad sadness trauer traurig traurigkeit tristesse triste tristezza tristeza droefheid verdriet sorg suru "
    "smutek smutny грусть печаль грустный üzgün üzüntü λύπη غم اندوه حزن اداسی اداس দুঃখ বিষাদ বিষণ্ণ ሀዘን ሐዘን 슬픔 "
    "悲しみ 悲伤 悲傷 难过 難過 伤心 傷心",
    "surprise": "surprise surprised sur pleasant_surprise pleasant_surprised überraschung überrascht surpris sorpresa "
    "sorpreso surpresa verrassing zaskoczenie zdziwienie удивление şaşkın şaşkınlık şaşırma έκπληξη تعجب شگفتی حیرت "
    "বিস্ময় বিস্ময় আশ্চর্য አስደናቂ 놀람 驚き 惊讶 驚訝 惊奇 吃惊",
}
_OWN_WORDS = {
    "amusement": "amusement amused",
    "anxiety": "anxiety anxious",
    "apology": "apology apologetic",
    "assertiveness": "assertiveness assertive",
    "boredom": "boredom bored langeweile",
    "calm": "calm calmness sakin спокойствие",
    "concern": "concern concerned",
    "contempt": "contempt contemptuous",
    "encouragement": "encouragement encouraging",
    "enthusiasm": "enthusiasm enthusiastic энтузиазм",
    "excitement": "excitement excited exc",
    "frustration": "frustration frustrated fru",
    "sleepiness": "sleepiness sleepy",
}
LABELS = (*COMMON, *_OWN_WORDS)
"""Every label that `to_label` gives."""

# What annotators write when they could not name one emotion: such clips carry no label and are dropped, and counted.
UNLABELLED = frozenset({"", "other", "oth", "unknown", "xxx", "none", "no_agreement", "undefined"})
_NO_MARK = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ı": "i", "æ": "ae", "œ": "oe", "ß": "ss"})
_GERMANIC = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "å": "aa", "ø": "oe", "æ": "ae", "ß": "ss"})


def to_label(native: str, words: Mapping[str, str | None] | None = None) -> str | None:
    """The class a clip is trained on: the common label, or the own name of an emotion outside the common set
    ("boredom"). Upper and lower case, accents (Złość, zlosc), Ärger or Aerger, spaces and underscores do not matter.

    words: more words and their labels (None: not labelled), by `normal`; they win over those that are known here.

    None where annotators named no emotion (`UNLABELLED`). Raises KeyError for a word that is not known at all, so that
    a misspelling never becomes a class of its own.
    """
    word = normal(native)
    if words and word in words:
        return words[word]
    if word in UNLABELLED:
        return None
    return _LABEL_OF.get(word) or _LABEL_OF[_plain(word)]


def normal(native: str) -> str:
    """A word as it is looked up: case and the way an accent is encoded do not count, nor what stands between words."""
    return re.sub(r"[\s_-]+", "_", unicodedata.normalize("NFC", native.strip().casefold()))


def _plain(word: str) -> str:
    """Without accents; ł, ø, ı … as the letter that they are typed as."""
    split = unicodedata.normalize("NFD", word.translate(_NO_MARK))
    return unicodedata.normalize("NFC", "".join(letter for letter in split if not unicodedata.combining(letter)))


def _spellings(word: str) -> set[str]:
    word = normal(word)
    return {word, _plain(word), _plain(word.translate(_GERMANIC))}


_LABEL_OF = {
    spelling: label
    for label, words in (_COMMON_WORDS | _OWN_WORDS).items()
    for word in words.split()
    for spelling in _spellings(word)
}
