"""Synthesis: what is spoken depends on the arguments alone, the plan is sound, and the emotions can be learnt."""

import ctypes
import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mser_dist.errors import UserError
from mser_dist.synth import speech as synth
from mser_dist.synth.espeak import Espeak
from mser_dist.synth.speech import EMOTIONS, LANGUAGES, SynthConfig, Utterance, generate, plan, render

espeakng_loader = pytest.importorskip("espeakng_loader", reason="pip install espeakng-loader")

TINY = SynthConfig(
    languages=("en", "zh"),
    unseen_languages=("el",),
    train_sentences=2,
    val_sentences=1,
    test_sentences=1,
    train_takes=1,
    test_takes=1,
)
# Voices with breath noise (f2, f3), with flutter (f1, grandma) and without either.
LINES = [
    ("The bus leaves at nine.", "en+f1"),
    ("Το λεωφορείο φεύγει στις εννέα.", "el+f3"),
    ("اتوبوس ساعت نه حرکت می‌کند.", "fa+m2"),
    ("公交车九点出发。", "cmn+Annie"),
    ("Автобус уходит в девять.", "ru+grandma"),
    ("Le bus part à neuf heures.", "fr+f2"),
]


@pytest.fixture(scope="module")
def utterances() -> list[Utterance]:
    return plan(SynthConfig())


def digest(text: str, voice: str) -> str:
    return hashlib.sha256(Espeak().synthesize(text, voice)[0].tobytes()).hexdigest()


def rms(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))


def pitch_hz(wave: np.ndarray, rate: int) -> float:
    """Median fundamental frequency over voiced 40 ms frames, by autocorrelation."""
    size = rate // 25
    found = []
    for start in range(0, len(wave) - size, size):
        frame = wave[start : start + size].astype(np.float64)
        if rms(frame) < 0.3 * rms(wave):
            continue
        correlation = np.fft.irfft(np.abs(np.fft.rfft(frame - frame.mean(), 4 * size)) ** 2)[:size]
        shortest = rate // 500
        lag = shortest + int(np.argmax(correlation[shortest : rate // 60]))
        if correlation[lag] > 0.5 * correlation[0]:
            found.append(rate / lag)
    return float(np.median(found)) if found else 0.0


def test_a_clip_does_not_depend_on_what_was_spoken_before() -> None:
    first = {line: digest(*line) for line in LINES}
    assert {line: digest(*line) for line in reversed(LINES)} == first
    code = "import hashlib, sys; from mser_dist.synth.espeak import Espeak; "
    code += "print(hashlib.sha256(Espeak().synthesize(*sys.argv[1:])[0].tobytes()).hexdigest())"
    alone = subprocess.run([sys.executable, "-c", code, *LINES[-1]], capture_output=True, text=True, check=True)
    assert alone.stdout.strip() == first[LINES[-1]]


def test_every_prosody_parameter_is_heard() -> None:
    def speak(**parameters: int) -> np.ndarray:
        samples, rate = Espeak().synthesize("The bicycle is in the garden.", "en+f3", **{"volume": 30, **parameters})
        assert rate == 22050
        assert samples.dtype == np.int16
        assert samples.ndim == 1
        return samples

    usual = speak()
    assert rms(speak(volume=60)) / rms(usual) == pytest.approx(2, rel=0.15)
    low, high = (pitch_hz(speak(pitch=pitch, pitch_range=0), 22050) for pitch in (40, 90))
    assert high / low == pytest.approx(2 ** (50 / synth._PITCH_PER_SEMITONE / 12), rel=0.08)
    assert len(speak(rate=300)) < 0.7 * len(usual)
    assert len(speak(word_gap=5)) > 1.15 * len(usual)
    assert not np.array_equal(speak(pitch_range=5), usual)


@pytest.mark.parametrize(
    ("voice", "parameters", "message"),
    [
        ("xx", {}, "no voice 'xx'"),
        ("en+nobody", {}, "no voice variant 'nobody'"),
        ("en", {"rate": 20}, "rate is 20"),
        ("en", {"volume": 300}, "volume is 300"),
    ],
)
def test_espeak_refuses_what_it_would_ignore(voice: str, parameters: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Espeak().synthesize("A word.", voice, **parameters)
    assert len(Espeak().synthesize("A word.", "en")[0])  # the library was let go


def test_text_without_sound_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sound"):
        Espeak().synthesize(" ", "en")


def test_missing_package_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match="pip install espeakng-loader"):
        next(generate(TINY))


def test_library_held_by_others_is_refused_and_not_kept() -> None:
    held = ctypes.CDLL(espeakng_loader.get_library_path())
    with pytest.raises(UserError, match="held by another part"):
        Espeak().synthesize("A word.", "en")
    close = ctypes.CDLL(None).dlclose
    close.argtypes = [ctypes.c_void_p]
    close(held._handle)
    assert len(Espeak().synthesize("A word.", "en")[0])


def test_unreadable_voice_data_is_a_user_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match="cannot read its voices"):
        Espeak().synthesize("A word.", "en")


def test_sentences_are_parallel_neutral_in_form_and_in_their_own_script() -> None:
    sentences = synth._sentences()
    assert len(sentences) >= 40
    scripts = {"el": ("\u0370", "\u03ff"), "ru": ("\u0400", "\u04ff"), "fa": ("\u0600", "\u06ff"), "zh": ("一", "龥")}
    for sentence in sentences:
        assert set(sentence) == {"id", *LANGUAGES}
        for language in LANGUAGES:
            text = sentence[language]
            assert text.endswith("。" if language == "zh" else "."), text  # ! and ? would change the melody
            letters = [letter for letter in text if letter.isalpha()]
            low, high = scripts.get(language, ("A", "\u024f"))
            assert all(low <= letter <= high for letter in letters), text
    for column in ("id", *LANGUAGES):
        assert len({sentence[column] for sentence in sentences}) == len(sentences), column


def test_plan_is_balanced_and_keys_are_unique(utterances: list[Utterance]) -> None:
    assert len({utterance.key for utterance in utterances}) == len(utterances)
    counts = Counter((u.split, u.language, u.emotion) for u in utterances)
    expected = {("train", language): 64 for language in LANGUAGES[:6]} | {("val", lang): 5 for lang in LANGUAGES[:6]}
    expected |= {("test", language): 18 for language in LANGUAGES}
    assert counts == {(*group, emotion): n for group, n in expected.items() for emotion in EMOTIONS}


def test_splits_share_neither_speaker_nor_sentence_nor_source(utterances: list[Utterance]) -> None:
    for key in (lambda u: u.speaker, lambda u: u.source_id.split("_")[0], lambda u: u.source_id):
        seen = {split: {key(u) for u in utterances if u.split == split} for split in synth.SPLITS}
        assert not seen["train"] & seen["val"]
        assert not seen["train"] & seen["test"]
        assert not seen["val"] & seen["test"]
    speakers = {u.speaker: u.gender for u in utterances}
    assert len(speakers) >= 24
    test_genders = Counter(speakers[speaker] for speaker in {u.speaker for u in utterances if u.split == "test"})
    assert test_genders == {"female": 4, "male": 4}


def test_a_source_is_spoken_in_every_language_with_a_prosody_of_its_own(utterances: list[Utterance]) -> None:
    sources: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        sources.setdefault(utterance.source_id, []).append(utterance)
    for spoken in sources.values():
        wanted = LANGUAGES if spoken[0].split == "test" else LANGUAGES[:6]
        assert tuple(u.language for u in spoken) == wanted
        assert len({u.emotion for u in spoken}) == 1
        assert len({(u.rate, u.pitch, u.pitch_range, u.gain_db) for u in spoken}) == len(spoken)


def test_an_utterance_does_not_depend_on_the_rest_of_the_plan(utterances: list[Utterance]) -> None:
    some = plan(SynthConfig(languages=("fr", "es"), unseen_languages=("fa",)))
    assert some == [u for u in utterances if u.language in ("fr", "es", "fa")]
    assert plan(SynthConfig()) == utterances
    assert plan(SynthConfig(seed=1)) != utterances


@pytest.mark.parametrize("parameter", ["rate", "pitch", "pitch_range", "gain_db", "word_gap"])
def test_no_single_parameter_tells_the_emotion(utterances: list[Utterance], parameter: str) -> None:
    values = {e: np.array([getattr(u, parameter) for u in utterances if u.emotion == e]) for e in EMOTIONS}
    edges = np.quantile(np.concatenate(list(values.values())), np.linspace(0, 1, 41))
    histograms = np.array([np.histogram(own, edges)[0] / len(own) for own in values.values()])
    best_accuracy = histograms.max(axis=0).sum() / len(EMOTIONS)
    assert 0.2 < best_accuracy < 0.75


def test_clips_keep_their_loudness_and_have_a_noise_floor(utterances: list[Utterance]) -> None:
    for utterance in utterances[:: len(utterances) // 40]:
        wave = render(utterance)
        assert wave.dtype == np.int16
        assert wave.ndim == 1
        assert 0.6 <= len(wave) / synth.SAMPLE_RATE <= 3.5
        assert np.abs(wave.astype(int)).max() < 32767
        assert len(np.unique(wave[: synth.SAMPLE_RATE // 20])) > 1  # the lead is no digital silence
        assert np.array_equal(render(utterance), wave)
    utterance = utterances[0]
    louder = replace(utterance, gain_db=utterance.gain_db + 6.02)
    assert rms(render(louder)) / rms(render(utterance)) == pytest.approx(2, rel=0.01)
    assert len(render(utterance, rate=8000)) == pytest.approx(len(render(utterance)) / 2, abs=2)


def test_the_slowest_and_the_fastest_clips_stay_within_limits(utterances: list[Utterance]) -> None:
    longest = next(sentence["fa"] for sentence in synth._sentences() if sentence["id"] == "s010")
    slow = replace(utterances[0], text=longest, voice="fa+Alicia", rate=120, word_gap=5, lead_seconds=0.2)
    assert 2.5 < len(render(slow)) / synth.SAMPLE_RATE <= 3.5
    shortest = next(sentence["fr"] for sentence in synth._sentences() if sentence["id"] == "s042")
    fast = replace(utterances[0], text=shortest, voice="fr+m3", rate=320, word_gap=0, lead_seconds=0.1)
    assert 0.6 <= len(render(fast)) / synth.SAMPLE_RATE < 1.0


def features(utterance: Utterance) -> np.ndarray:
    """Loudness, length, pitch and spectral balance of a clip, shape (6,)."""
    wave = render(utterance)
    spectrum = np.abs(np.fft.rfft(wave)) ** 2
    balance = spectrum[len(spectrum) // 8 :].sum() / spectrum.sum()
    pitch = np.log2(max(pitch_hz(wave, synth.SAMPLE_RATE), 60) / 150)
    return np.array([np.log2(rms(wave)), np.log2(len(wave)), pitch, np.log2(balance), pitch**2, 1.0])


def test_emotion_is_learnt_across_languages_and_not_from_shuffled_labels(utterances: list[Utterance]) -> None:
    train = [u for u in utterances if u.split == "train"][::13]  # strides prime to the 6 emotions and the languages
    test = [u for u in utterances if u.split == "test" and u.language in ("el", "ru", "fa")][::5]
    names = list(EMOTIONS)
    train_features, test_features = (np.stack([features(u) for u in part]) for part in (train, test))
    train_labels, test_labels = (np.array([names.index(u.emotion) for u in part]) for part in (train, test))

    def accuracy(labels: np.ndarray) -> float:
        weights = np.linalg.lstsq(train_features, np.eye(len(names))[labels], rcond=None)[0]
        return float(np.mean((test_features @ weights).argmax(axis=1) == test_labels))

    assert accuracy(train_labels) > 0.5
    shuffle = np.random.default_rng(0)
    shuffled = [accuracy(shuffle.permutation(train_labels)) for _ in range(50)]
    assert abs(np.mean(shuffled) - 1 / 6) < 0.06


def test_generate_is_the_same_with_any_number_of_processes() -> None:
    alone, together = list(generate(TINY)), list(generate(TINY, workers=2))
    planned = plan(TINY)
    assert [key for key, _, _ in together] == [u.key for u in planned]
    for (key, wave, record), (_, same_wave, same_record), utterance in zip(alone, together, planned, strict=True):
        assert np.array_equal(wave, same_wave), key
        assert record == same_record
        assert record["duration"] == pytest.approx(len(wave) / 16000, abs=1e-6)
        contract = "id emotion label language speaker gender corpus split text source_id synthetic duration sample_rate"
        assert set(record) == set(contract.split())
        assert (record["id"], record["label"], record["split"]) == (key, utterance.emotion, utterance.split)
        assert (record["corpus"], record["synthetic"], record["sample_rate"]) == ("m5ser-espeak", True, 16000)


def test_a_failing_clip_in_a_worker_names_its_key() -> None:
    planned = plan(TINY)
    planned[3] = replace(planned[3], voice="en+nobody")
    with pytest.raises(RuntimeError, match=f"clip {planned[3].key} could not be synthesised.*nobody"):
        list(synth._render_parallel([planned[:2], planned[2:4]], workers=2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"languages": ("en", "sv")}, "no sentences in language 'sv'"),
        ({"languages": ("en", "el")}, "named twice"),
        ({"languages": ()}, "must not be empty"),
        ({"train_sentences": 60}, "lower"),
        ({"test_takes": 0}, "test_takes is 0"),
        ({"test_voices": 3}, "must be even"),
        ({"test_voices": 22}, "must be even and at most"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        SynthConfig(**wrong)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
