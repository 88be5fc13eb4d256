"""What goes through a translation: a recording, and the words and speech that are made of it."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class NotMadeError(Exception):
    """Nothing was made of one recording, and why, in a few words that are counted: "silent", "no sentence in xx"."""


@dataclass(frozen=True)
class Source:
    """A recording that is carried into other languages; audio: (n,) float32, mono, 16 kHz."""

    id: str
    audio: np.ndarray
    text: str | None
    language: str
    emotion: str
    corpus: str
    speaker: str | None
    gender: str | None


@dataclass(frozen=True)
class Sentence:
    """A text in another language; checked: by a speaker of it, None where that is not known."""

    text: str
    checked: bool | None = None


class Text(Protocol):
    """Text in another language. about: name, version and settings, for the provenance."""

    about: dict[str, Any]

    def sentence(self, source: Source, language: str) -> Sentence:
        """Raises `NotMadeError` where there is none."""
        ...


class Speech(Protocol):
    """Speech in another language. about: as of `Text`."""

    about: dict[str, Any]

    def languages(self) -> set[str] | None:
        """Those it can speak, as ISO 639-1 codes; None: any."""
        ...

    def speak(self, source: Source, text: str, language: str) -> np.ndarray:
        """(n,) float32, mono, 16 kHz, the same for the same arguments. Raises `NotMadeError` where nothing is made."""
        ...
