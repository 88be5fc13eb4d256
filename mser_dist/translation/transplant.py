"""Speech in another language with the prosody of a recording: eSpeak's words, all else from the recording (WORLD)."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, uniform_filter1d

from mser_dist.audio import SAMPLE_RATE
from mser_dist.synth.espeak import Espeak
from mser_dist.translation import envelope
from mser_dist.translation.parts import NotMadeError, Source
from mser_dist.translation.world import BINS, FRAME, Floats, Frames, analyse, synthesise

_VOICES = {"male": "m1", "female": "f1"}  # eSpeak's variants: of seven pairs the one that is understood best
_LOW_VOICE = 165.0  # Hz: below it a speaker of unknown gender gets the male voice
_ESPEAK_LANGUAGE = {"zh": "cmn"}  # the others have their own code
_RATE = 175  # words a minute, eSpeak's own
_VOLUME = 50  # per cent: eSpeak overloads above
_CARRIER = {"rate": _RATE, "voices": "+".join(_VOICES.values())}

_SILENT = 1e-4  # full scale 1: the peak of a recording with nothing in it
_FULL, _CLIPPED = 0.99, 0.005  # a recording with such a share of its samples at full scale is no speaker's prosody
_LEAST_VOICED = 0.1  # seconds
_SPEECH = {"recording": 32.0, "carrier": 45.0}  # dB below the loudest frame: fainter is a pause; eSpeak has no noise
_PAUSE = 20  # frames: a shorter silence is a stop consonant
_UNVOICED = 0.3  # of a voiced frame: how much an unvoiced one moves the clock, in both languages
_NEARBY = 50  # frames
_BREATH = 0.1  # of the difference in noise: more of it made words unclear, and told no more
_TEMPO = (0.7, 2.2)  # times eSpeak's own duration


@dataclass(frozen=True)
class _Heard:
    """Frames and what is heard in them; begin, end: of the speech; voiced, paused: (T,) of its frames."""

    frames: Frames
    begin: int
    end: int
    voiced: NDArray[np.bool_]
    paused: NDArray[np.bool_]


@dataclass(frozen=True)
class Level:
    """A voice's own: pitch in Hz, and the slow shape of its voiced envelopes, loudness among it."""

    pitch: float
    shape: Floats


class Plain:
    """eSpeak alone, with a voice of the source's gender: what a transplant is compared with.

    Raises `UserError` where eSpeak NG is missing.
    """

    def __init__(self) -> None:
        self._espeak = Espeak()
        self.about: dict[str, Any] = {"name": "espeak", **_versions("espeakng-loader"), **_CARRIER}

    def languages(self) -> set[str]:
        theirs = self._espeak.languages()
        return {name for name in theirs if len(name) == 2} | {own for own, t in _ESPEAK_LANGUAGE.items() if t in theirs}

    def speak(self, source: Source, text: str, language: str) -> NDArray[np.float32]:
        return _spoken(self._espeak, text, language, source.gender or "male")


class Transplant:
    """eSpeak's words with the recording's pitch contour, tempo, pauses, energy and voice quality.

    The recording and the carrier, what eSpeak makes of the text, are laid upon each other by their voiced stretches: a
    clock runs in each, by a voiced frame and more slowly by an unvoiced one, and stands still in pauses. Of the
    recording then come

    - tempo: the carrier lasts as many times its own duration as the recording does that of eSpeak saying its text
      (without a text: the recording's own duration), and pauses where the recording pauses;
    - pitch: the contour in voiced frames;
    - loudness, and of the voice quality the mean slow shape of the envelope (`envelope.shaped`);
    - breath: a part of the aperiodicity's contour relative to the carrier's;
    - what is before and after the speech, without voice.

    level_of: the level of a recording's speaker (`level`): it is taken out, and the carrier's put in its place, so that
    pitch, loudness and tilt tell what is expressed alone. Where it is None they are the recording's.

    Raises `UserError` where eSpeak NG or WORLD are missing.
    """

    def __init__(self, level_of: Callable[[Source], Level | None] | None = None) -> None:
        self._espeak = Espeak()
        self._level_of = level_of or (lambda source: None)
        analyse(np.zeros(0, np.float32))  # a missing WORLD is told at once
        self.about: dict[str, Any] = {
            "name": "transplant",
            **_versions("espeakng-loader", "pyworld-prebuilt"),
            **_CARRIER,
            **envelope.SETTINGS,
            "breath": _BREATH,
            "level": "voice" if level_of else "recording",
        }
        self._carrier = lru_cache(16)(self._made)  # of 1 MB a second; sets of acted speech have few sentences

    def languages(self) -> set[str]:
        return Plain().languages()

    def speak(self, source: Source, text: str, language: str) -> NDArray[np.float32]:
        """Raises `NotMadeError`: the source is silent, clipped or without voice, or the carrier is; no such voice."""
        recording = _recording(source.audio)
        gender = source.gender if source.gender in _VOICES else None
        if gender is None:
            gender = "male" if _level([recording]).pitch < _LOW_VOICE else "female"
        carrier = self._carrier(text, language, gender)
        tempo = self._tempo(source, gender, recording, carrier)
        if (own := self._level_of(source)) is not None:
            recording = _moved(recording, own, _level([carrier]))
        there, here = _aligned(recording, carrier, tempo)
        pitch = _contour(np.log(np.maximum(recording.frames.pitch, 1)), recording.voiced, 1)
        paused = _at(recording.paused.astype(float), there) > 0.5
        voiced = (carrier.frames.pitch[np.rint(here).astype(int)] > 0) & ~paused
        noise = [_contour(heard.frames.noise, heard.voiced, 4) for heard in (recording, carrier)]
        made = Frames(
            np.where(voiced, np.exp(_at(pitch, there)), 0.0),
            envelope.shaped(
                _at(carrier.frames.envelope, here),
                _at(recording.frames.envelope, there),
                voiced,
                recording.voiced[np.rint(there).astype(int)],
            ),
            _at(carrier.frames.noise, here) + _BREATH * (_at(noise[0], there) - _at(noise[1], here)),
        )
        wave = synthesise(_surrounded(made, recording))
        peak = float(np.abs(wave).max())
        return wave if peak <= _FULL else wave * np.float32(_FULL / peak)

    def _made(self, text: str, language: str, gender: str) -> _Heard:
        try:
            return _heard(_spoken(self._espeak, text, language, gender), "carrier")
        except _VoicelessError:
            raise NotMadeError("no voice in what eSpeak says") from None

    def _tempo(self, source: Source, gender: str, recording: _Heard, carrier: _Heard) -> float:
        spoken = carrier
        if source.text:
            with suppress(NotMadeError):  # no voice of the source's language: as without a text
                spoken = self._carrier(source.text, source.language.partition("-")[0], gender)
        return float(np.clip(_lasts(recording) / _lasts(spoken), *_TEMPO))


def level(waves: Iterable[np.ndarray]) -> Level | None:
    """A speaker's own: the mean over recordings, (n,) at 16 kHz each; None where nothing can be made of any."""
    heard = []
    for wave in waves:
        with suppress(NotMadeError):
            heard.append(_recording(wave))
    return _level(heard) if heard else None


class _VoicelessError(Exception):
    """Too few frames have a pitch."""


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # pyworld built from source has another name
            found[package] = "unknown"
    return found


def _spoken(espeak: Espeak, text: str, language: str, gender: str) -> NDArray[np.float32]:
    voice = f"{_ESPEAK_LANGUAGE.get(language, language)}+{_VOICES.get(gender, _VOICES['male'])}"
    try:
        samples, rate = espeak.synthesize(text, voice, rate=_RATE, volume=_VOLUME)
    except ValueError as error:
        reason = "eSpeak made no sound" if "no sound" in str(error) else f"no voice in {language}"
        raise NotMadeError(reason) from None
    made: NDArray[np.float32] = soxr.resample(samples.astype(np.float32) / 32768, rate, SAMPLE_RATE, quality="HQ")
    return made


def _recording(wave: np.ndarray) -> _Heard:
    if not np.isfinite(wave).all():
        raise NotMadeError("not finite")
    level = np.abs(wave)
    if len(wave) == 0 or level.max() < _SILENT:
        raise NotMadeError("silent source")
    if (level >= _FULL).mean() > _CLIPPED:
        raise NotMadeError("clipped source")
    try:
        return _heard(wave, "recording")
    except _VoicelessError:
        raise NotMadeError("no voice in it") from None


def _heard(wave: np.ndarray, what: str) -> _Heard:
    frames = analyse(wave)
    hop = round(FRAME * SAMPLE_RATE)
    energy = np.concatenate([np.zeros(1), np.cumsum(np.asarray(wave, np.float64) ** 2)])
    centres = np.arange(len(frames)) * hop
    first, last = (np.clip(centres + side, 0, len(wave)) for side in (-200, 200))  # samples: 25 ms
    power = (energy[last] - energy[first]) / np.maximum(last - first, 1)
    loudness = uniform_filter1d(10 * np.log10(np.maximum(power, 1e-12)), 5)
    speech = loudness > max(np.percentile(loudness, 5) + 6, loudness.max() - _SPEECH[what])
    voiced = _without_short((frames.pitch > 0) & speech, 5)
    if voiced.any():  # an octave from the rest is mostly an error of the tracker
        voiced &= np.abs(np.log(np.maximum(frames.pitch, 1) / np.median(frames.pitch[voiced]))) < 0.85
    if voiced.sum() * FRAME < _LEAST_VOICED:
        raise _VoicelessError
    there = np.flatnonzero(speech)
    return _Heard(frames, int(there[0]), int(there[-1]) + 1, voiced, _without_short(~speech, _PAUSE))


def _without_short(mask: NDArray[np.bool_], least: int) -> NDArray[np.bool_]:
    """The mask without its runs of fewer frames than `least`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    kept = np.zeros_like(mask)
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        kept[begin:end] = end - begin >= least
    return kept


def _level(heard: Sequence[_Heard]) -> Level:
    pitches = [np.median(np.log(one.frames.pitch[one.voiced])) for one in heard]
    shapes = [envelope.shape(one.frames.envelope[one.voiced].mean(0)) for one in heard]
    return Level(float(np.exp(np.mean(pitches))), np.mean(shapes, 0))


def _moved(heard: _Heard, level: Level, other: Level) -> _Heard:
    """What is expressed from another level."""
    frames = heard.frames
    envelopes = frames.envelope + envelope.drawn(other.shape - level.shape)
    return replace(heard, frames=Frames(frames.pitch * other.pitch / level.pitch, envelopes, frames.noise))


def _lasts(heard: _Heard) -> int:
    """Frames of the speech without its pauses."""
    return heard.end - heard.begin - int(heard.paused[heard.begin : heard.end].sum())


def _clock(heard: _Heard) -> Floats:
    """(frames of the speech,) from 0 to 1, which stands still in pauses."""
    speech = slice(heard.begin, heard.end)
    moves = np.where(heard.voiced[speech], 1.0, np.where(heard.paused[speech], 0.0, _UNVOICED))
    told = np.cumsum(moves)
    # Strictly rising, so that a pause is jumped over and not lost in a tie.
    return np.asarray(told / told[-1] + np.arange(len(told)) * 1e-9, np.float64)


def _aligned(recording: _Heard, carrier: _Heard, tempo: float) -> tuple[Floats, Floats]:
    """Positions in the recording and in the carrier, of each frame that is made.

    The carrier runs evenly, or its words would be lost; the recording is laid upon it by the clocks. A pause of the
    recording comes where the carrier is faintest nearby.
    """
    here = np.linspace(carrier.begin, carrier.end - 1, max(2, round((carrier.end - carrier.begin) * tempo)))
    told = np.interp(here, np.arange(carrier.begin, carrier.end), _clock(carrier))
    there = np.interp(told, _clock(recording), np.arange(recording.begin, recording.end))
    quiet = envelope.power(_at(carrier.frames.envelope, here))
    edges = np.flatnonzero(np.diff(recording.paused[recording.begin : recording.end].astype(np.int8)))
    for begin, end in zip(edges[-2::-2], edges[::-2], strict=True):  # from the last, so that places stay
        pause = np.arange(recording.begin + begin + 1, recording.begin + end + 1, dtype=np.float64)
        first = max(0, int(np.searchsorted(there, pause[0])) - _NEARBY)
        place = first + int(quiet[first : first + 2 * _NEARBY].argmin())
        there = np.insert(there, place, pause)
        here = np.insert(here, place, np.full(len(pause), here[place]))
    return there, here


def _contour(values: Floats, voiced: NDArray[np.bool_], smooth: float) -> Floats:
    """(T,) of a value that voiced frames alone have, in a line across the others; smooth: frames."""
    known = np.flatnonzero(voiced)
    line = np.interp(np.arange(len(values)), known, values[known])
    return np.asarray(gaussian_filter1d(line, smooth), np.float64)


def _at(values: Floats, position: Floats) -> Floats:
    """(n, …) values between the frames of (T, …)."""
    below = np.clip(np.floor(position).astype(int), 0, len(values) - 1)
    above = np.minimum(below + 1, len(values) - 1)
    share = (position - below).reshape(-1, *[1] * (values.ndim - 1))
    return np.asarray(values[below] * (1 - share) + values[above] * share, np.float64)


def _surrounded(made: Frames, recording: _Heard) -> Frames:
    """With the recording's frames before and after its speech, as noise: breath and the room."""
    before, after = recording.frames.envelope[: recording.begin], recording.frames.envelope[recording.end :]
    zeros = np.zeros(len(before)), np.zeros(len(after))
    assert made.envelope.shape[1] == BINS
    return Frames(
        np.concatenate([zeros[0], made.pitch, zeros[1]]),
        np.concatenate([before, made.envelope, after]),
        np.concatenate([zeros[0], made.noise, zeros[1]]),
    )
