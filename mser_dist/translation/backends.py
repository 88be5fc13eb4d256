"""The backends that a config chooses, loaded when they are asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mser_dist.config.translation_keys import TranslateConfig
from mser_dist.errors import UserError
from mser_dist.translation.parts import Speech, Text
from mser_dist.translation.sources import Recordings


class Transcriber(Protocol):
    """Writes down what is said. about: as of `Text`."""

    about: dict[str, Any]

    def write(self, wave: NDArray[np.float32], language: str) -> str:
        """Of [samples] at 16 kHz. Raises `NotMadeError` for a language that it does not know."""
        ...


class Scorer(Protocol):
    """Names the emotion of a clip. about: as of `Text`, and what it was trained on, as far as that is known."""

    about: dict[str, Any]

    def score(self, wave: NDArray[np.float32]) -> dict[str, float]:
        """Probabilities by label of [samples] at 16 kHz."""
        ...


@runtime_checkable
class OwnWords(Speech, Protocol):
    """Speech that goes from the recording to the other language by itself: no text is asked for."""

    said: str  # what it last said


class Backends(NamedTuple):
    """Each step's. text: None where the speech has words of its own."""

    transcriber: Callable[[], Transcriber] | None  # loaded when the first recording needs it
    text: Text | None
    speech: Speech
    checker: Transcriber | None
    scorer: Scorer | None


def build(config: TranslateConfig, recordings: Recordings, folder: Path) -> Backends:
    """folder: where processes share what they find of a set.

    Raises `UserError` for a backend that is not installed, a model that is none, a language that none speaks.
    """
    whispers: dict[str, Any] = {}

    def whisper(name: str) -> Any:
        if name not in whispers:
            from mser_dist.translation.whisper import Whisper

            whispers[name] = Whisper(name, config.device)
        return whispers[name]

    chosen, scorer = config.selection, None
    speech = _speech(config, recordings, folder)
    _check(config, "speech", speech.languages(), "voice")
    text = None if isinstance(speech, OwnWords) else _text(config)
    _check(config, "text", getattr(text, "languages", lambda: None)(), "sentence")
    if chosen.scorer or chosen.probe:
        from mser_dist.translation import scorers

        named = chosen.scorer
        scorer = scorers.Export(named, recordings.labels, config.device) if named else scorers.Probe(chosen.probe)
    checker = whisper(chosen.whisper) if chosen.whisper else None
    unknown = [name for name in config.to if checker is not None and not checker.knows(name)]
    if unknown and chosen.max_cer is not None and not chosen.all:
        raise UserError(
            f"selection.whisper does not know {', '.join(unknown)}, where max_cer could not select: leave it out of "
            "--to, or set selection.max_cer=null"
        )
    return Backends(
        transcriber=None if config.transcript.source == "text" else lambda: whisper(config.transcript.whisper),
        text=text,
        speech=speech,
        checker=checker,
        scorer=scorer,
    )


def _text(config: TranslateConfig) -> Text:
    asked = config.text
    if asked.backend == "table":
        from mser_dist.translation.table import Table

        return Table(Path(asked.table) if asked.table else None)
    from mser_dist.translation.text_model import TextModel

    return TextModel(str(asked.model), asked.beams, asked.max_tokens, config.device)


def _speech(config: TranslateConfig, recordings: Recordings, folder: Path) -> Speech:
    asked = config.speech
    if asked.backend == "command":
        from mser_dist.translation.command import Command

        return Command(str(asked.command), asked.timeout, asked.tries, config.seed)
    if asked.backend in ("transplant", "espeak"):
        from mser_dist.translation import transplant
        from mser_dist.translation.levels import Levels

        if asked.backend == "espeak":
            return transplant.Plain()
        if asked.level == "recording":
            return transplant.Transplant()
        return transplant.Transplant(Levels(recordings, folder).of)
    from mser_dist.translation import speech_models

    model = speech_models.Vits if asked.backend == "vits" else speech_models.Seamless
    return model(str(asked.model), config.to, config.seed, config.device)


def _check(config: TranslateConfig, section: str, known: set[str] | None, what: str) -> None:
    if known is None:
        return
    if lacking := [name for name in config.to if name not in known]:
        raise UserError(
            f"{section}.backend={getattr(config, section).backend} has no {what} in {', '.join(lacking)}: leave it out "
            f"of --to, or choose another backend; it has {', '.join(sorted(known))}"
        )
