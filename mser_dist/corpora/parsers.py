"""Corpora of recorded emotional speech: one parser each, from files as their publishers name them to clips.

Letter codes do not carry over from one corpus to another, so each parser has its own table. Licences are the user's to
check.
"""

import filecmp
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mser_dist.corpora.manifest import parse_manifest
from mser_dist.corpora.recording import Recording, safe_id
from mser_dist.errors import UserError
from mser_dist.shards.emotions import to_label


@dataclass(frozen=True, slots=True)
class _Named:
    """What a file name tells."""

    emotion: str
    speaker: str
    gender: str | None = None
    text: str | None = None
    id: str | None = None  # where the file's own name is only unique within its folder


def _by_name(
    src: Path, corpus: str, language: str, naming: str, read: Callable[[Path], _Named | None]
) -> Iterator[Recording]:
    """Clips of a folder whose file names carry the labels. read: None for a file that is not to be used, ValueError or
    KeyError for a name that does not follow `naming`, which is quoted in the error."""
    if not os.path.isdir(src):  # noqa: PTH112  (Path.is_dir raises for a name that is too long)
        raise UserError(f"{src}: no such folder; give the folder of the {corpus} recordings")
    files = sorted(path for path in _files(src) if path.suffix.lower() == ".wav" and not path.name.startswith("."))
    if not files:
        raise UserError(f"{src}: no .wav in it or below; give the folder of the {corpus} recordings")
    found: dict[str, list[tuple[Path, _Named]]] = {}
    for path in files:
        try:
            named = read(path)
        except (ValueError, KeyError):
            raise UserError(
                f"{path}: not a file name of {corpus} ({naming}); move it away or use mser pack manifest"
            ) from None
        if named is None:
            continue
        found.setdefault(safe_id(f"{corpus}_{named.id or path.stem}"), []).append((path, named))
    _check_copies({name: [path for path, _ in places] for name, places in found.items()})
    for name, [(path, named), *_] in found.items():
        label = to_label(named.emotion)
        yield Recording(
            path, named.emotion, label, language, named.speaker, corpus, name, name, named.gender, named.text
        )


def _files(folder: Path) -> Iterator[Path]:
    """Every file of a folder and those below, linked ones too; a folder that several links lead to is visited once."""
    visited: set[tuple[int, int]] = set()
    for here, below, names in os.walk(folder, followlinks=True):
        status = Path(here).stat()
        if (status.st_dev, status.st_ino) in visited:
            below.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        below.sort()
        yield from (Path(here, name) for name in names)


def _check_copies(places: dict[str, list[Path]]) -> None:
    """Say how many recordings are there several times, byte for byte; `UserError` where they differ."""
    several = {name: paths for name, paths in places.items() if len(paths) > 1}
    others = {name: [path for path in paths[1:] if not _same(paths[0], path)] for name, paths in several.items()}
    if differing := [(several[name][0], paths[0]) for name, paths in others.items() if paths]:
        first = "; ".join(f"{one} is also at {other}" for one, other in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"recordings of one name and other content: {len(differing)} ({len(several)} names are there more than "
            f"once): {first}{more}; keep one of each, or name them by mser pack manifest"
        )
    if several:
        one, other = next(iter(several.values()))[:2]
        print(
            f"mser: recordings that are there more than once, byte for byte: {len(several)}; each is taken once "
            f"({one}, and not {other})",
            file=sys.stderr,
        )


def _same(one: Path, other: Path) -> bool:
    """Whether two files are a recording and its copy; two empty ones are none."""
    try:
        return one.stat().st_size > 0 and filecmp.cmp(one, other, shallow=False)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); mend or remove this file") from None


def _match(pattern: str, path: Path) -> re.Match[str]:
    match = re.fullmatch(pattern, path.stem)
    if match is None:
        raise ValueError(path.stem)
    return match


EMODB_EMOTIONS = {
    "W": "anger",
    "L": "boredom",
    "E": "disgust",
    "A": "fear",
    "F": "happiness",
    "T": "sadness",
    "N": "neutral",
}
EMODB_TEXTS = {
    "a01": "Der Lappen liegt auf dem Eisschrank.",
    "a02": "Das will sie am Mittwoch abgeben.",
    "a04": "Heute abend könnte ich es ihm sagen.",
    "a05": "Das schwarze Stück Papier befindet sich da oben neben dem Holzstück.",
    "a07": "In sieben Stunden wird es soweit sein.",
    "b01": "Was sind denn das für Tüten, die da unter dem Tisch stehen?",
    "b02": "Sie haben es gerade hochgetragen und jetzt gehen sie wieder runter.",
    "b03": "An den Wochenenden bin ich jetzt immer nach Hause gefahren und habe Agnes besucht.",
    "b09": "Ich will das eben wegbringen und dann mit Karl was trinken gehen.",
    "b10": "Die wird auf dem Platz sein, wo wir sie immer hinlegen.",
}
_EMODB_MALE = frozenset({"03", "10", "11", "12", "15"})


def parse_emodb(src: Path) -> Iterator[Recording]:
    """EMO-DB, German, 535 clips, 10 speakers: speaker, text, emotion, take, as in `03a01Fa.wav`.
    http://emodb.bilderbar.info
    """

    def read(path: Path) -> _Named:
        speaker, text, emotion = _match(r"(\d\d)([ab]\d\d)([A-Z])[a-z]?", path).groups()
        gender = "male" if speaker in _EMODB_MALE else "female"
        return _Named(EMODB_EMOTIONS[emotion], speaker, gender, EMODB_TEXTS.get(text))

    naming = "speaker 03, text a01, emotion of W L E A F T N, take: 03a01Fa.wav"
    return _by_name(src, "emodb", "de", naming, read)


def parse_ravdess(src: Path) -> Iterator[Recording]:
    """RAVDESS, English, 1440 speech clips, 24 actors: `03-01-05-01-02-01-12.wav`; songs (channel 02) are left out."""
    emotions = ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"]
    texts = {"01": "Kids are talking by the door.", "02": "Dogs are sitting by the door."}

    def read(path: Path) -> _Named | None:
        _, channel, emotion, _, statement, _, actor = _match(r"-".join([r"(\d\d)"] * 7), path).groups()
        if not 1 <= int(emotion) <= 8:
            raise ValueError(emotion)
        gender = "male" if int(actor) % 2 else "female"
        return None if channel == "02" else _Named(emotions[int(emotion) - 1], actor, gender, texts[statement])

    return _by_name(src, "ravdess", "en", "seven numbers: 03-01-05-01-02-01-12.wav", read)


def parse_cremad(src: Path) -> Iterator[Recording]:
    """CREMA-D, English, 7442 clips, 91 speakers: `1001_DFA_ANG_XX.wav`; the one silent clip is left out."""
    emotions = {"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}

    def read(path: Path) -> _Named | None:
        speaker, emotion = _match(r"(\d{4})_[A-Z]{3}_([A-Z]{3})_[A-Z]{1,2}", path).groups()
        return None if path.stem == "1076_MTI_SAD_XX" else _Named(emotions[emotion], speaker)

    return _by_name(src, "cremad", "en", "speaker_sentence_EMO_level: 1001_DFA_ANG_XX.wav", read)


def parse_aesdd(src: Path) -> Iterator[Recording]:
    """AESDD, Greek, 604 clips: emotion letter, utterance, (speaker), as in `a03 (3).wav`; the damaged `s05 (3)` is
    left out.
    """
    emotions = {"a": "anger", "d": "disgust", "f": "fear", "h": "happiness", "s": "sadness"}

    def read(path: Path) -> _Named | None:
        emotion, utterance, speaker = _match(r"([a-z])(\d+) ?\((\d+)\)[a-z]?", path).groups()
        if (emotion, int(utterance), int(speaker)) == ("s", 5, 3):
            return None
        return _Named(emotions[emotion], str(int(speaker)))  # "(01)" and "(1)" are one speaker

    return _by_name(src, "aesdd", "el", "emotion of a d f h s, utterance, (speaker): a03 (3).wav", read)


def parse_shemo(src: Path) -> Iterator[Recording]:
    """ShEMO, Persian, 3000 clips, 87 speakers: `M36S02.wav` = speaker M36, emotion S, number 02."""
    emotions = {"A": "anger", "N": "neutral", "S": "sadness", "W": "surprise", "H": "happiness", "F": "fear"}

    def read(path: Path) -> _Named:
        speaker, emotion = _match(r"([MF]\d\d)([A-Z])\d+", path).groups()
        return _Named(emotions[emotion], speaker, "male" if speaker[0] == "M" else "female")

    return _by_name(src, "shemo", "fa", "speaker M36, emotion of A N S W H F, number: M36S02.wav", read)


def parse_emovo(src: Path) -> Iterator[Recording]:
    """EMOVO, Italian, 588 clips, 6 speakers: `gio-f2-b2.wav` = emotion, speaker, sentence."""
    emotions = {
        "dis": "disgust",
        "gio": "joy",
        "neu": "neutral",
        "pau": "fear",
        "rab": "anger",
        "sor": "surprise",
        "tri": "sadness",
    }

    def read(path: Path) -> _Named:
        emotion, speaker = _match(r"([a-z]{3})-([fm]\d)-\w+", path).groups()
        return _Named(emotions[emotion], speaker, "male" if speaker[0] == "m" else "female")

    return _by_name(src, "emovo", "it", "emotion-speaker-sentence: gio-f2-b2.wav", read)


def parse_cafe(src: Path) -> Iterator[Recording]:
    """CaFE, Canadian French, 936 clips, 12 speakers: `12-P-2-5.wav` = speaker, emotion, intensity, sentence."""
    emotions = {
        "C": "anger",
        "D": "disgust",
        "J": "happiness",
        "N": "neutral",
        "P": "fear",
        "S": "surprise",
        "T": "sadness",
    }

    def read(path: Path) -> _Named:
        speaker, emotion = _match(r"(\d\d)-([A-Z])-\d-\d", path).groups()
        return _Named(emotions[emotion], speaker)

    return _by_name(src, "cafe", "fr", "speaker-emotion-intensity-sentence: 12-P-2-5.wav", read)


def parse_tess(src: Path) -> Iterator[Recording]:
    """TESS, English, 2800 clips, 2 women: `OAF_lid_fear.wav` = speaker, word, emotion (`ps`: pleasant surprise)."""
    emotions = {name: name for name in ("angry", "disgust", "fear", "happy", "neutral", "sad")} | {"ps": "surprise"}

    def read(path: Path) -> _Named:
        speaker, word, emotion = _match(r"([OY]A)F?_([a-z]+)_([a-z]+)", path).groups()
        return _Named(emotions[emotion.lower()], f"{speaker}F", "female", f"Say the word {word}.")

    return _by_name(src, "tess", "en", "speaker_word_emotion: OAF_lid_fear.wav", read)


def parse_savee(src: Path) -> Iterator[Recording]:
    """SAVEE, English, 480 clips, 4 men: `DC/a01.wav` or `DC_a01.wav`; `sa` and `su` are tried before the single
    letters.
    """
    emotions = {
        "sa": "sadness",
        "su": "surprise",
        "a": "anger",
        "d": "disgust",
        "f": "fear",
        "h": "happiness",
        "n": "neutral",
    }

    def read(path: Path) -> _Named:
        speaker, emotion = _match(r"(?:([A-Z]{2})_)?(sa|su|[a-z])\d\d", path).groups()
        speaker = speaker or path.parent.name
        return _Named(emotions[emotion], speaker, "male", id=f"{speaker}_{path.stem[-4:].split('_')[-1]}")

    return _by_name(src, "savee", "en", "speaker folder, emotion, number: DC/a01.wav or DC_a01.wav", read)


CORPORA: dict[str, Callable[[Path], Iterable[Recording]]] = {
    "emodb": parse_emodb,
    "manifest": parse_manifest,
    "aesdd": parse_aesdd,
    "cafe": parse_cafe,
    "cremad": parse_cremad,
    "emovo": parse_emovo,
    "ravdess": parse_ravdess,
    "savee": parse_savee,
    "shemo": parse_shemo,
    "tess": parse_tess,
}
"""The corpora that `mser pack` knows, by the name it takes."""
