"""The recording's prosody is in the speech that is made of it, and not in eSpeak's own."""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr

from mser_dist import audio as audio_module
from mser_dist.cli import main as cli
from mser_dist.config.translation_keys import TranslateConfig
from mser_dist.errors import UserError
from mser_dist.shards.index import sound
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.writer import DatasetWriter
from mser_dist.synth.espeak import Espeak
from mser_dist.translation import world
from mser_dist.translation.levels import Levels
from mser_dist.translation.parts import NotMadeError, Source
from mser_dist.translation.sources import Recordings
from mser_dist.translation.transplant import Plain, Transplant, level

SAYS, GERMAN = "Kids are talking by the door.", "Die Kinder sprechen an der Tür."


@cache
def spoken(rate: int = 175, text: str = SAYS) -> np.ndarray:
    """A recording: another voice than the carrier's, and a bit of a room before and after."""
    samples, hertz = Espeak().synthesize(text, "en-us+m1", rate=rate, volume=50)
    wave = soxr.resample(samples.astype(np.float32) / 32768, hertz, 16_000)
    room = np.random.default_rng(0).normal(0, 1e-4, len(wave) + 8000).astype(np.float32)
    room[4000:-4000] += wave
    return room


def source(audio: np.ndarray, gender: str | None = "male", text: str | None = SAYS) -> Source:
    return Source("a", audio.astype(np.float32), text, "en", "anger", "c", "s", gender)


def with_pitch(contour: np.ndarray) -> np.ndarray:
    """The recording with another contour of pitch, in Hz from its beginning to its end."""
    frames = world.analyse(spoken())
    line = np.interp(np.linspace(0, 1, len(frames)), np.linspace(0, 1, len(contour)), contour)
    return world.synthesise(replace(frames, pitch=np.where(frames.pitch > 0, line, 0.0)))


def pitch(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in the clip it is voiced, 0 to 1, and how high, in Hz."""
    found = world.analyse(wave).pitch
    voiced = np.flatnonzero(found > 0)
    return voiced / len(found), found[voiced]


def decibels(wave: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(wave.astype(np.float64) ** 2) + 1e-12))


def seconds_of_speech(wave: np.ndarray) -> float:
    loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
    return float(loud[-1] - loud[0]) / 16_000


@pytest.mark.parametrize("contour", [[90, 220], [220, 90], [100, 260, 100]])
def test_pitch_goes_as_the_recording_s(contour: list[float]) -> None:
    recording = source(with_pitch(np.array(contour, float)))
    where, heard = pitch(Transplant().speak(recording, GERMAN, "de"))
    meant = np.interp(where, np.linspace(0, 1, len(contour)), contour)
    assert np.corrcoef(heard, meant)[0, 1] > 0.85
    assert np.median(np.abs(heard / meant - 1)) < 0.12
    control, plain = pitch(Plain().speak(recording, GERMAN, "de"))
    assert np.median(np.abs(plain / np.interp(control, np.linspace(0, 1, len(contour)), contour) - 1)) > 0.2


def test_tempo_is_the_recording_s_and_not_its_sentence_s() -> None:
    fast, slow = (Transplant().speak(source(spoken(rate)), GERMAN, "de") for rate in (280, 110))
    theirs = seconds_of_speech(spoken(110)) / seconds_of_speech(spoken(280))
    assert theirs > 1.8
    assert seconds_of_speech(slow) / seconds_of_speech(fast) == pytest.approx(theirs, rel=0.2)
    normal = seconds_of_speech(Transplant().speak(source(spoken()), GERMAN, "de"))
    assert normal == pytest.approx(seconds_of_speech(Plain().speak(source(spoken()), GERMAN, "de")), rel=0.15)


def test_energy_is_the_recording_s() -> None:
    recording = spoken().copy()
    half = len(recording) // 2
    recording[half:] *= 0.1
    made = Transplant().speak(source(recording), GERMAN, "de")
    assert decibels(made) == pytest.approx(decibels(recording), abs=3)
    # Its contour is smooth over half a second, of a clip that lasts not two.
    parts = [decibels(made[: len(made) // 2]), decibels(made[len(made) // 2 :])]
    even = Transplant().speak(source(spoken()), GERMAN, "de")
    control = [decibels(even[: len(even) // 2]), decibels(even[len(even) // 2 :])]
    assert (parts[0] - parts[1]) - (control[0] - control[1]) > 3
    quiet = Transplant().speak(source(0.1 * spoken()), GERMAN, "de")
    assert decibels(even) - decibels(quiet) == pytest.approx(20, abs=0.5)


def test_a_pause_is_where_the_recording_pauses() -> None:
    def longest(wave: np.ndarray) -> float:
        loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
        return float(np.diff(loud).max()) / 16_000

    recording = spoken()
    half = len(recording) // 2
    room = np.random.default_rng(1).normal(0, 1e-4, 9600).astype(np.float32)
    paused = np.concatenate([recording[:half], room, recording[half:]])
    assert longest(Transplant().speak(source(recording), GERMAN, "de")) < 0.25
    assert longest(Transplant().speak(source(paused), GERMAN, "de")) > 0.4


def test_voice_quality_is_the_recording_s() -> None:
    def tilt(wave: np.ndarray) -> float:
        power = np.abs(np.fft.rfft(wave)) ** 2
        hertz = np.fft.rfftfreq(len(wave), 1 / 16_000)
        return float(10 * np.log10(power[hertz < 1000].sum() / power[(hertz > 2000) & (hertz < 5000)].sum()))

    dull = spoken().copy()
    for _ in range(2):
        dull[1:] = 0.5 * dull[1:] + 0.5 * dull[:-1]
    bright = np.diff(spoken(), prepend=0)
    made = [Transplant().speak(source(wave), GERMAN, "de") for wave in (dull, bright)]
    meant = tilt(dull) - tilt(bright)
    assert meant > 8 and tilt(made[0]) - tilt(made[1]) == pytest.approx(meant, rel=0.35)


def test_the_same_arguments_give_the_same_bytes() -> None:
    for backend in (Transplant, Plain):
        first, other = backend(), backend()
        made = [one.speak(source(spoken()), GERMAN, "de") for one in (first, first, other)]
        assert made[0].dtype == np.float32 and made[0].ndim == 1
        assert made[0].tobytes() == made[1].tobytes() == made[2].tobytes()
        assert np.abs(made[0]).max() < 1


def test_a_speaker_s_own_level_can_be_taken_out() -> None:
    low, high = with_pitch(np.array([100, 120.0])), 0.1 * with_pitch(np.array([200, 240.0]))
    own_of_high, own_of_low = level([high, high, np.zeros(99)]), level([low])
    assert level([np.zeros(9)]) is None and own_of_high and own_of_high.pitch == pytest.approx(220, rel=0.05)
    kept = [Transplant().speak(source(wave), GERMAN, "de") for wave in (low, high)]
    assert np.median(pitch(kept[1])[1]) / np.median(pitch(kept[0])[1]) == pytest.approx(2, rel=0.1)
    assert decibels(kept[0]) - decibels(kept[1]) > 15
    own = Transplant(lambda source: own_of_low).speak(source(low), GERMAN, "de")
    theirs = Transplant(lambda source: own_of_high).speak(source(high), GERMAN, "de")
    assert np.median(pitch(theirs)[1]) / np.median(pitch(own)[1]) == pytest.approx(1, rel=0.1)
    assert decibels(own) == pytest.approx(decibels(theirs), abs=3)
    raised = Transplant(lambda source: own_of_high).speak(source(2 * high), GERMAN, "de")
    assert decibels(raised) - decibels(theirs) == pytest.approx(6, abs=0.5)


def test_a_set_is_translated_with_its_speakers_own_levels(tmp_path: Path) -> None:
    pcm = {
        f"{speaker}{n}": audio_module.to_pcm16(with_pitch(np.array([height, height + 40.0 * (1 + n)])))
        for speaker, height in (("low", 90), ("high", 200))
        for n in range(2)
    }
    with DatasetWriter(tmp_path / "set", "spoken", {}) as writer:
        for number, (key, samples) in enumerate(pcm.items()):
            meta: dict[str, Any] = {
                "emotion": "joy",
                "label": ("happy", "sad")[number % 2],
                "language": "en",
                "corpus": "c",
                "speaker": key[:-1],
                "gender": "male",
                "text": SAYS,
                "source_id": key,
                "synthetic": False,
                "duration": len(samples) / 16_000,
                "sample_rate": 16_000,
            }
            writer.write("train", key, audio_module.encode(samples, 16_000, "flac"), "flac", meta, sound(samples))
    words = ["--to", "de", "selection.whisper=null"]
    heights = {}
    for name in ("recording", "voice"):
        how = [*words, f"speech.level={name}"]
        assert cli.main(["translate", str(tmp_path / "set"), str(tmp_path / name), *how]) == 0
        made = ShardSet.open([str(tmp_path / name)])
        assert made.read(0).meta["translation"]["speech"]["level"] == name
        assert len(made) == 4 and made.read(0).meta["translation"]["speech"]["name"] == "transplant"
        waves = {made.key(i): audio_module.decode(made.read(i).audio, "") for i in range(4)}
        heights[name] = [float(np.median(pitch(waves[f"{key}_de"])[1])) for key in ("low0", "low1", "high0", "high1")]
    assert heights["recording"][2] / heights["recording"][0] > 1.7
    assert heights["voice"][2] / heights["voice"][0] == pytest.approx(1, rel=0.2)
    assert all(heights[name][1] > heights[name][0] for name in heights), "what is expressed stays"
    recordings = Recordings(str(tmp_path / "set"), TranslateConfig(to=["de"]))
    asked, _, _ = recordings.read(0)
    found = Levels(recordings, tmp_path).of(asked)
    (file,) = tmp_path.glob("level-*.npz")
    written = file.stat().st_mtime_ns
    again = Levels(recordings, tmp_path).of(asked)
    assert found and again and found.pitch == again.pitch and (found.shape == again.shape).all()
    assert file.stat().st_mtime_ns == written, "another process reads what is there"


@pytest.mark.parametrize(
    ("audio", "text", "language", "reason"),
    [
        (np.zeros(16_000), GERMAN, "de", "silent"),
        (np.zeros(0), GERMAN, "de", "silent"),
        (np.full(16_000, np.nan), GERMAN, "de", "not finite"),
        (np.sign(np.sin(np.arange(16_000) / 20)), GERMAN, "de", "clipped"),
        (np.random.default_rng(0).normal(0, 0.1, 16_000), GERMAN, "de", "no voice in it"),
        (np.sin(np.arange(300) / 20), GERMAN, "de", "no voice in it"),
        (None, "", "de", "made no sound"),
        (None, "Hello", "tlh", "no voice in tlh"),
        (None, "tss", "de", None),
    ],
)
def test_what_nothing_can_be_made_of(audio: np.ndarray | None, text: str, language: str, reason: str | None) -> None:
    recording = source(spoken() if audio is None else 0.9 * audio if reason != "clipped" else audio)
    if reason is None:  # hardly a word: made or refused, but in words
        try:
            assert len(Transplant().speak(recording, text, language))
        except NotMadeError as told:
            assert "no voice" in str(told)
        return
    with pytest.raises(NotMadeError, match=reason):
        Transplant().speak(recording, text, language)


def test_without_a_text_or_gender_and_a_long_recording() -> None:
    long = np.tile(spoken(), 12)
    assert len(long) > 16_000 * 20
    made = Transplant().speak(source(long, gender=None, text=None), GERMAN, "de")
    assert np.isfinite(made).all() and len(made) < len(long)
    assert {"de", "fr", "it", "zh", "es", "ko", "pl", "ru"} <= Transplant().languages() & Plain().languages()


def test_a_missing_world_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyworld", None)
    with pytest.raises(UserError, match="pip install pyworld-prebuilt"):
        Transplant()
