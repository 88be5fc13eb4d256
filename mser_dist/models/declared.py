"""What well-known pretrained encoders were trained on: as their publishers declare it, which nobody here can check."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Declared:
    """languages: ISO 639-1; None: many, which nobody has listed here. emotions: whether its labels were of emotions."""

    what: str
    languages: frozenset[str] | None
    emotions: bool = False


_ENGLISH = frozenset({"en"})
_SCRATCH = Declared("no speech: it was made from scratch", frozenset())
_LIBRI = Declared("untranscribed LibriSpeech", _ENGLISH)
_WAVLM = Declared("untranscribed Libri-Light, GigaSpeech and VoxPopuli", _ENGLISH)
_XLSR, _XLS_R = (Declared(f"untranscribed speech in {n} languages", None) for n in (53, 128))
# By publisher and the model's whole name: what somebody has trained further has another one. From papers and cards.
_KNOWN = {
    ("microsoft", "wavlm-base"): _LIBRI,
    ("microsoft", "wavlm-base-plus"): _WAVLM,
    ("microsoft", "wavlm-large"): _WAVLM,
    ("facebook", "hubert-base-ls960"): _LIBRI,
    ("facebook", "hubert-large-ll60k"): Declared("untranscribed Libri-Light", _ENGLISH),
    ("facebook", "wav2vec2-base"): _LIBRI,
    ("facebook", "wav2vec2-base-960h"): Declared("LibriSpeech", _ENGLISH),
    ("facebook", "wav2vec2-large-xlsr-53"): _XLSR,
    **{("facebook", f"wav2vec2-xls-r-{size}"): _XLS_R for size in ("300m", "1b", "2b")},
    ("audeering", "wav2vec2-large-robust-12-ft-emotion-msp-dim"): Declared(
        "English speech, and MSP-Podcast with labels of emotion", _ENGLISH, emotions=True
    ),
}


@cache
def _whisper() -> dict[str, Declared]:
    """OpenAI's Whisper models by name."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    third = frozenset(LANGUAGES) | {"jv"}  # it says jw
    web = "transcribed speech of the web, without emotions"
    found = {f"whisper-{size}.en": Declared(web, _ENGLISH) for size in ("tiny", "base", "small", "medium")}
    for size in ("tiny", "base", "small", "medium", "large", "large-v1", "large-v2"):
        found[f"whisper-{size}"] = Declared(web, third - {"yue"})  # Cantonese came with the third version
    return found | {f"whisper-{size}": Declared(web, third) for size in ("large-v3", "large-v3-turbo")}


def declared(name: str | None) -> Declared | None:
    """What is declared of `encoder.pretrained`; None where that is nothing, or the name is unknown (None).

    "" is an encoder from scratch. A local folder, or a package, is taken for the model whose name it has.
    """
    if not name:
        return None if name is None else _SCRATCH
    owner, _, model = name.removeprefix("pypi:").rpartition("/")
    if Path(name).expanduser().is_dir():
        owner, model = "", Path(name).expanduser().resolve().name
    if owner in ("", "openai") and model in _whisper():
        return _whisper()[model]
    return next((found for (by, known), found in _KNOWN.items() if owner in ("", by) and model == known), None)
