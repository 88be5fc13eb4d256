"""M5SER-style synthetic speech: the same neutral sentences, spoken with an emotional prosody, in several languages.

The emotion is carried by the prosody alone: rate, pitch, pitch range, loudness and pauses are drawn per clip from
distributions that belong to the emotion and overlap each other. The directions follow the acoustic profiles of vocal
emotion (Scherer 2003, https://doi.org/10.1016/S0167-6393(02)00084-5, table 2); the widths are set so that a classifier
of log-mel statistics is right on about 85 to 90 % of clips in a language it never heard.
"""

import hashlib
import json
import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from itertools import islice, product

import numpy as np
import soxr
from tqdm import tqdm

from mser_dist.data.espeak import Espeak
from mser_dist.errors import UserError

CORPUS = "m5ser-espeak"
SPLITS = ("train", "val", "test")
SAMPLE_RATE = 16_000
ESPEAK_LANGUAGE = {"en": "en", "fr": "fr", "de": "de", "it": "it", "zh": "cmn", "es": "es", "el": "el", "ru": "ru", "fa": "fa"}

_RATE_WPM = 195.0  # the normal rate of speech, in eSpeak's words a minute
# At one nominal rate eSpeak needs longer for a sentence in Mandarin, and less in French and Russian, than in the others.
_TEMPO = {"zh": 1.3, "fr": 0.9, "ru": 0.9}
_LEVEL_DBFS = -35.0  # RMS of normal speech; leaves room for the loudest clip's peaks
_PITCH_PER_SEMITONE = 50 / 12  # eSpeak's pitch parameter doubles the frequency every 50
_CHUNK = 16  # clips a worker renders per task: small enough for a smooth progress bar


@dataclass(frozen=True)
class Prosody:
    """One setting of the voice, relative to the speaker's own.

    ``rate`` in octaves of speaking rate, ``pitch`` in semitones, ``pitch_range`` in eSpeak's units (50 is normal),
    ``level`` in dB, ``word_gap`` in eSpeak's units of 10 ms.
    """

    rate: float
    pitch: float
    pitch_range: float
    level: float
    word_gap: float


# Mean and standard deviation of every emotion's Gaussian; the deviations are shared but for the emotions' own breadth.
EMOTIONS: dict[str, tuple[Prosody, Prosody]] = {
    "anger": (Prosody(0.35, 1.5, 58, 8.5, 0.0), Prosody(0.10, 1.2, 9, 1.3, 0.6)),
    "disgust": (Prosody(-0.46, -3.0, 70, 2.0, 3.2), Prosody(0.08, 1.1, 9, 1.4, 0.9)),
    "fear": (Prosody(0.55, 7.5, 22, -4.0, 0.0), Prosody(0.10, 1.2, 9, 1.4, 0.6)),
    "happy": (Prosody(0.15, 7.5, 92, 2.5, 0.4), Prosody(0.10, 1.2, 6, 1.4, 0.8)),
    "neutral": (Prosody(0.00, -0.3, 40, 0.0, 0.4), Prosody(0.08, 1.0, 8, 1.2, 0.7)),
    "sad": (Prosody(-0.40, -1.5, 10, -8.0, 2.0), Prosody(0.08, 1.1, 6, 1.4, 0.9)),
}
_LOWEST = Prosody(-0.55, -7.0, 2, -11.0, 0.0)  # beyond these a clip would sound broken, last too long or overload
_HIGHEST = Prosody(0.75, 10.0, 99, 11.0, 5.0)


@dataclass(frozen=True)
class Voice:
    """An eSpeak voice variant; ``level_dbfs`` is its RMS at volume 100, extrapolated from 30, where nothing clips."""

    name: str
    gender: str
    level_dbfs: float


# The human-sounding, distinct variants: no klatt, whisper, robot, echo or comic ones.
VOICES = tuple(
    Voice(name, gender, level)
    for gender, levels in (
        (
            "female",
            {
                "f1": -18.7, "f2": -19.1, "f3": -20.5, "f4": -19.3, "f5": -20.8, "Annie": -19.9, "belinda": -18.4,
                "Alicia": -20.9, "shelby": -20.2, "steph": -20.2, "grandma": -20.9,
                "aunty": -18.4,
            },
        ),
        (
            "male",
            {
                "m1": -21.4, "m2": -22.7, "m3": -20.2, "m4": -20.6, "m5": -21.3, "m6": -20.2, "m7": -19.2, "m8": -24.8,
                "victor": -25.6, "Alex": -21.1, "Denis": -25.3, "Diogo": -24.8, "Lee": -19.5,
                "Michael": -18.7, "michel": -19.8, "travis": -18.5, "Nguyen": -21.4, "boris": -22.7,
                "max": -21.8,
            },
        ),
    )
    for name, level in levels.items()
)  # fmt: skip


@dataclass(frozen=True)
class SynthConfig:
    """What to synthesise. The defaults give 2304 training, 180 validation and 972 test clips, 1.6 hours in all.

    A *source* is one sentence in one emotion and one take; it is spoken once in every language of its split. Sentences
    and voices are divided among the splits, so neither is shared between them.
    """

    seed: int = 0
    """Everything drawn depends on it; the same seed gives the same set."""
    languages: tuple[str, ...] = ("en", "fr", "de", "it", "zh", "es")
    """Languages of the training and validation splits; they are in the test split too."""
    unseen_languages: tuple[str, ...] = ("el", "ru", "fa")
    """Languages of the test split alone."""
    train_sentences: int = 32
    val_sentences: int = 5
    test_sentences: int = 9
    train_takes: int = 2
    """Times a sentence is spoken in one emotion and language, each with a prosody and speaker of its own."""
    val_takes: int = 1
    test_takes: int = 2
    val_voices: int = 4
    """Voices of the validation split, half of them female; an even number."""
    test_voices: int = 8
    """Voices of the test split, half of them female; an even number. The others are for training."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and field.name != "seed" and value < 1:
                raise UserError(f"synthesis: {field.name} is {value}, give 1 or more")
        languages = (*self.languages, *self.unseen_languages)
        for language in languages:
            if language not in ESPEAK_LANGUAGE:
                raise UserError(f"synthesis: no sentences in language {language!r}, choose from {', '.join(ESPEAK_LANGUAGE)}")
        if not self.languages or len(set(languages)) < len(languages):
            raise UserError("synthesis: give at least one language, and each one once, in languages or unseen_languages")
        wanted, there = self.train_sentences + self.val_sentences + self.test_sentences, len(_sentences())
        if wanted > there:
            raise UserError(f"synthesis: {wanted} sentences asked for in all splits, there are {there}: lower *_sentences")
        fewest = min(sum(voice.gender == gender for voice in VOICES) for gender in ("female", "male"))
        if self.val_voices % 2 or self.test_voices % 2 or self.val_voices + self.test_voices > 2 * (fewest - 1):
            raise UserError(
                f"synthesis: val_voices {self.val_voices} and test_voices {self.test_voices} must be even "
                f"and at most {2 * (fewest - 1)} together"
            )


@dataclass(frozen=True)
class Utterance:
    """All that decides one clip: `render` is a function of it alone."""

    key: str
    split: str
    language: str
    emotion: str
    speaker: str
    gender: str
    text: str
    source_id: str
    voice: str
    """eSpeak's voice, such as ``el+f3``."""
    rate: int
    pitch: int
    pitch_range: int
    volume: int
    word_gap: int
    lead_seconds: float
    tail_seconds: float
    snr_db: float
    noise_slope: float
    """Power of the background noise falls with frequency to this power."""
    noise_seed: int


def _sentences() -> list[dict[str, str]]:
    """The parallel sentences: one mapping of ``id`` and language codes to text for each."""
    text = files("mser_dist.data").joinpath("sentences.json").read_text(encoding="utf-8")
    sentences: list[dict[str, str]] = json.loads(text)["sentences"]
    return sentences


def _generator(*parts: object) -> np.random.Generator:
    """A random generator that depends on ``parts`` alone, not on what was drawn before."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def _assign_voices(config: SynthConfig) -> dict[str, list[Voice]]:
    """Divide the voices among the splits, the genders evenly in validation and test."""
    voices: dict[str, list[Voice]] = {split: [] for split in SPLITS}
    for gender in ("female", "male"):
        own = [voice for voice in VOICES if voice.gender == gender]
        order = _generator(config.seed, "voices", gender).permutation(len(own))
        val, test = config.val_voices // 2, config.test_voices // 2
        for place, index in enumerate(order):
            split = "val" if place < val else "test" if place < val + test else "train"
            voices[split].append(own[index])
    return voices


def _assign_sentences(config: SynthConfig) -> dict[str, list[dict[str, str]]]:
    sentences = _sentences()
    order = iter(_generator(config.seed, "sentences").permutation(len(sentences)))
    counts = {"train": config.train_sentences, "val": config.val_sentences, "test": config.test_sentences}
    return {split: [sentences[index] for index in islice(order, counts[split])] for split in SPLITS}


def plan(config: SynthConfig) -> list[Utterance]:
    """Every clip of the set, in order, without audio: a pure function of ``config``."""
    voices, sentences = _assign_voices(config), _assign_sentences(config)
    takes = {"train": config.train_takes, "val": config.val_takes, "test": config.test_takes}
    utterances = []
    for split in SPLITS:
        languages = config.languages + (config.unseen_languages if split == "test" else ())
        for take, sentence, emotion in product(range(takes[split]), sentences[split], EMOTIONS):
            source_id = f"{sentence['id']}_{emotion}_t{take}"
            for language in languages:
                pool = voices[split]
                voice = pool[_generator(config.seed, source_id, language).integers(len(pool))]
                utterances.append(_draw(config.seed, split, language, emotion, voice, sentence[language], source_id))
    return utterances


def _draw(
    seed: int, split: str, language: str, emotion: str, voice: Voice, text: str, source_id: str
) -> Utterance:
    """Draw one clip's prosody around its emotion's, on top of its speaker's own manner, and the recording's condition."""
    speaker = voice.name.lower()
    manner = _generator(seed, "speaker", speaker)
    own_rate, own_pitch, own_level = manner.normal(0, 0.04), manner.normal(0, 0.6), manner.normal(0, 0.6)

    draw = _generator(seed, source_id, language, speaker)
    mean, deviation = (np.array(list(asdict(part).values())) for part in EMOTIONS[emotion])
    low, high = (np.array(list(asdict(part).values())) for part in (_LOWEST, _HIGHEST))
    prosody = Prosody(*np.clip(draw.normal(mean, deviation), low, high))
    gain = draw.normal(0, 0.7)  # distance to the microphone; applied at the source, as eSpeak's volume is linear
    level = _LEVEL_DBFS + own_level + prosody.level + gain
    tag = f"{language}_{source_id}_{speaker}"
    return Utterance(
        key=tag,
        split=split,
        language=language,
        emotion=emotion,
        speaker=speaker,
        gender=voice.gender,
        text=text,
        source_id=source_id,
        voice=f"{ESPEAK_LANGUAGE[language]}+{voice.name}",
        rate=round(_RATE_WPM * _TEMPO.get(language, 1.0) * 2 ** (prosody.rate + own_rate)),
        pitch=int(np.clip(round(50 + _PITCH_PER_SEMITONE * (prosody.pitch + own_pitch)), 0, 99)),
        pitch_range=round(prosody.pitch_range),
        volume=int(np.clip(round(100 * 10 ** ((level - voice.level_dbfs) / 20)), 3, 150)),
        word_gap=round(prosody.word_gap),
        lead_seconds=float(draw.uniform(0.1, 0.2)),
        tail_seconds=float(draw.uniform(0.1, 0.2)),
        snr_db=float(draw.uniform(25, 40)),
        noise_slope=float(draw.uniform(0, 1)),
        noise_seed=int(draw.integers(2**63)),
    )


def render(utterance: Utterance, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Synthesise one clip: int16 of shape (samples,), mono, at ``rate`` Hz. The same utterance gives the same samples.

    Raises:
        UserError: eSpeak NG is missing or cannot be used in this process.
    """
    speech, espeak_rate = Espeak().synthesize(
        utterance.text,
        utterance.voice,
        rate=utterance.rate,
        pitch=utterance.pitch,
        pitch_range=utterance.pitch_range,
        volume=utterance.volume,
        word_gap=utterance.word_gap,
    )
    sounding = np.flatnonzero(np.abs(speech) > 2)
    speech = speech[sounding[0] : sounding[-1] + 1]  # eSpeak's own silences depend on the rate; ours are drawn
    wave = soxr.resample(speech.astype(np.float32), espeak_rate, rate)
    loudness = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))
    wave = np.pad(wave, (round(utterance.lead_seconds * rate), round(utterance.tail_seconds * rate)))
    wave += loudness * 10 ** (-utterance.snr_db / 20) * _noise(len(wave), utterance.noise_slope, utterance.noise_seed)
    return np.clip(np.rint(wave), -32768, 32767).astype(np.int16)


def _noise(samples: int, slope: float, seed: int) -> np.ndarray:
    """Background noise of unit RMS, shape (samples,): power falls as frequency to the power ``slope``."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(samples))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1) ** (-slope / 2)
    noise = np.fft.irfft(spectrum, samples)
    return noise / np.sqrt(np.mean(noise**2))


def metadata(utterance: Utterance, wave: np.ndarray, rate: int = SAMPLE_RATE) -> dict[str, object]:
    """The sample's JSON record, as the data contract of the shards wants it."""
    return {
        "id": utterance.key,
        "emotion": utterance.emotion,
        "label": utterance.emotion,
        "language": utterance.language,
        "speaker": utterance.speaker,
        "gender": utterance.gender,
        "corpus": CORPUS,
        "split": utterance.split,
        "text": utterance.text,
        "source_id": utterance.source_id,
        "synthetic": True,
        "duration": round(len(wave) / rate, 6),
        "sample_rate": rate,
    }


def generate(
    config: SynthConfig, workers: int = 1, progress: bool = False
) -> Iterator[tuple[str, np.ndarray, dict[str, object]]]:
    """Yield ``(key, int16 samples at 16 kHz, record)`` for every clip of `plan`, in its order.

    Args:
        workers: processes to render in; 1 renders in this one. The result is the same.
        progress: draw a progress bar on standard error.

    Raises:
        UserError: eSpeak NG is missing.
        RuntimeError: a clip could not be rendered; names its key.
    """
    utterances = plan(config)
    chunks = [utterances[start : start + _CHUNK] for start in range(0, len(utterances), _CHUNK)]
    rendered = map(_render_chunk, chunks) if workers <= 1 else _render_parallel(chunks, workers)
    with tqdm(total=len(utterances), desc="synthesis", unit="clip", disable=not progress) as bar:
        for chunk, waves in zip(chunks, rendered, strict=True):
            for utterance, wave in zip(chunk, waves, strict=True):
                yield utterance.key, wave, metadata(utterance, wave)
                bar.update()


def _render_chunk(chunk: list[Utterance]) -> list[np.ndarray]:
    waves = []
    for utterance in chunk:
        try:
            waves.append(render(utterance))
        except UserError:
            raise
        except Exception as error:
            raise RuntimeError(f"clip {utterance.key} could not be synthesised: {error}") from error
    return waves


def _render_parallel(chunks: list[list[Utterance]], workers: int) -> Iterator[list[np.ndarray]]:
    """Render the chunks in ``workers`` processes, yield them in order, and keep only a few waiting in memory."""
    context = multiprocessing.get_context("spawn")  # fork is unsafe where torch or MLflow have started threads
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting: deque[tuple[str, Future[list[np.ndarray]]]] = deque()
        coming = iter(chunks)
        try:
            while True:
                for chunk in islice(coming, 4 * workers - len(waiting)):
                    waiting.append((chunk[0].key, pool.submit(_render_chunk, chunk)))
                if not waiting:
                    return
                first, future = waiting.popleft()
                try:
                    yield future.result()
                except BrokenProcessPool as error:
                    raise RuntimeError(f"a synthesis process died at clip {first} or shortly after it") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # the reader stopped early or a clip failed
