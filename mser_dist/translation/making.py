"""A recording into other languages: what it says, those words in the language, spoken, and measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist import audio
from mser_dist.audio import SAMPLE_RATE
from mser_dist.shards import index as shard_index
from mser_dist.translation.backends import Backends, OwnWords
from mser_dist.translation.made import Made
from mser_dist.translation.measures import character_error, clipped, level
from mser_dist.translation.parts import NotMadeError, Sentence, Source
from mser_dist.translation.sources import Recordings


class Maker:
    """Makes the clips of one recording after the other; each depends on its recording and the config alone."""

    def __init__(self, recordings: Recordings, backends: Backends) -> None:
        self._recordings, self._backends = recordings, backends

    def of(self, clip: int) -> Iterator[Made]:
        """A recording (its number in the set) in each of its languages."""
        known = self._recordings.facts(clip)
        languages = self._recordings.languages_of(clip)
        rows = {
            name: known | {"language": name, "source": self._recordings.shards.key(clip), "from": known["language"]}
            for name in languages
        }
        try:
            source, meta, sha256 = self._recordings.read(clip)
            source, how = self._with_text(source)
        except NotMadeError as why:
            yield from (Made(self._recordings.key(clip, name), rows[name], str(why)) for name in languages)
            return
        origin: dict[str, Any] = {
            "source": source.id,
            "source_sha256": sha256,
            "source_language": source.language,
            "source_text": source.text,
            "transcript": how,
        }
        for name in languages:
            key = self._recordings.key(clip, name)
            try:
                sentence = self._backends.text.sentence(source, name) if self._backends.text else Sentence("")
                wave = _sound(self._backends.speech.speak(source, sentence.text, name))
                if isinstance(self._backends.speech, OwnWords):
                    sentence = Sentence(self._backends.speech.said)
            except NotMadeError as why:
                yield Made(key, rows[name], str(why))
                continue
            yield self._made(key, rows[name], meta, origin, sentence, wave)

    def _with_text(self, source: Source) -> tuple[Source, str | dict[str, Any]]:
        """The recording with what it says, and how that is known."""
        asked = self._recordings.config.transcript.source
        if (source.text and asked != "whisper") or self._backends.text is None:
            return source, "text"
        if self._backends.transcriber is None:
            raise NotMadeError("no transcript")
        transcriber = self._backends.transcriber()
        text = transcriber.write(source.audio, source.language)
        if not text:
            raise NotMadeError("no transcript")
        return replace(source, text=text), transcriber.about

    def _made(
        self,
        key: str,
        facts: dict[str, Any],
        meta: dict[str, Any],
        origin: dict[str, Any],
        sentence: Sentence,
        wave: NDArray[np.float32],
    ) -> Made:
        pcm = audio.to_pcm16(wave)
        heard = (pcm / 32768).astype(np.float32)  # what a reader of the set hears
        measures = self._measures(heard, sentence.text, facts["language"])
        written = {
            **{name: facts[name] for name in ("label", "language", "gender", "corpus")},
            "emotion": facts["emotion"] or facts["label"],
            "speaker": facts["speaker"] or "unknown",
            "text": sentence.text,
            "source_id": str(meta.get("source_id") or origin["source"]),
            "synthetic": True,
            "duration": len(pcm) / SAMPLE_RATE,
            "sample_rate": SAMPLE_RATE,
            "translation": {
                **origin,
                "checked": sentence.checked,
                "text": self._backends.text.about if self._backends.text else None,
                "speech": self._backends.speech.about,
                "whisper": self._backends.checker.about if self._backends.checker else None,
                "scorer": self._backends.scorer.about if self._backends.scorer else None,
                "measures": measures,
            },
        }
        data = audio.encode(pcm, SAMPLE_RATE, "flac")
        return Made(key, facts, "", measures, written, shard_index.sound(pcm), audio.peak(wave), data)

    def _measures(self, wave: NDArray[np.float32], text: str, language: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "seconds": round(len(wave) / SAMPLE_RATE, 4),
            "level": round(level(wave), 2),
            "clipped": round(clipped(wave), 5),
        }
        if self._backends.checker is not None:
            try:
                found["said"] = self._backends.checker.write(wave, language)
                found["cer"] = round(character_error(found["said"], text), 4)
            except NotMadeError:
                found["said"] = found["cer"] = None  # a language that it does not know
        if self._backends.scorer is not None:
            scores = self._backends.scorer.score(wave)
            found["scores"] = {name: round(float(score), 4) for name, score in scores.items()}
        return found


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes in one thread: with another number of them sums come out another way, and so would clips."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sound(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a backend made, if it is a sound."""
    wave = np.asarray(wave, np.float32).reshape(-1)
    if not len(wave):
        raise NotMadeError("the voice made nothing")
    if not np.isfinite(wave).all():
        raise NotMadeError("the voice made no finite sound")
    if not wave.any():
        raise NotMadeError("the voice made silence")
    return wave
