"""How much of a recording's emotion a transplant of prosody carries into other languages: one table, three JSON rows.

    python tools/bench_translate.py --data FOLDER [--to de,fr,it] [--clips 240] [--speakers 6] [--json FILE]

FOLDER holds recordings and a clips.csv, as `mser pack manifest` takes it. Clips of the last speakers, as many of each
common label, are carried into the languages in turn, by the transplant and by eSpeak alone. A probe, `mser baseline`'s
logistic regression on mean-pooled hidden states of the frozen Whisper-base encoder, is trained on the other speakers'
recordings and names the emotion of the sources and of both kinds of speech; adapted: each of these has zero mean and
unit variance. Whisper-base writes down some of them.

real-time: seconds of speech that a second of one core makes, analysis of the source included. probe-share: UA of the
transplanted over UA of their sources. cer-ratio: character error of the transplanted over that of eSpeak alone.
"""

import argparse
import json
import multiprocessing
import time
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mser_dist import config as cfg
from mser_dist.audio import SAMPLE_RATE, decode, log_mel
from mser_dist.corpora.manifest import parse_manifest
from mser_dist.corpora.recording import Recording
from mser_dist.evaluation.classifiers import fitted
from mser_dist.models import pretrained, sources
from mser_dist.models.attention import choose
from mser_dist.models.encoders import build_encoder
from mser_dist.shards.emotions import COMMON
from mser_dist.translation.parts import NotMadeError, Source
from mser_dist.translation.table import Table
from mser_dist.translation.transplant import Plain, Transplant

WHISPER = "pypi:whisper-base"
LAYERS = [2, 3, 4]  # emotions are heard best in the middle of Whisper
Made = dict[str, Any]  # of one clip: its features and speech by kind, CPU seconds


@cache
def encoder() -> Any:
    torch.set_num_threads(1)
    attention = choose("auto", torch.float32, "cpu")
    return build_encoder(cfg.EncoderConfig(pretrained=WHISPER, layers=LAYERS), attention).eval()


@torch.inference_mode()
def heard(wave: np.ndarray) -> np.ndarray:
    """(3 * 512,) mean over frames of the layers' hidden states."""
    mel = torch.from_numpy(log_mel(wave.astype(np.float32)))[None]
    states, _ = encoder().hidden(mel, torch.tensor([mel.shape[-1]]))
    return np.concatenate([state[0].mean(0).numpy() for state in states])


def audio(clip: Recording) -> np.ndarray:
    return decode(clip.path.read_bytes(), str(clip.path), scale=True)


def recorded(clip: Recording) -> np.ndarray:
    return heard(audio(clip))


@cache
def backends() -> tuple[Table, dict[str, Any]]:
    return Table(), {"transplant": Transplant(), "plain": Plain()}


def translated(work: tuple[Recording, str]) -> Made | None:
    """The clip in the language, by both; None where nothing is made of it."""
    clip, language = work
    table, speech = backends()
    source = Source(
        clip.id, audio(clip), clip.text, clip.language, clip.emotion, clip.corpus, clip.speaker, clip.gender
    )
    made: Made = {"source": heard(source.audio)}
    try:
        text = table.sentence(source, language).text
        for kind, backend in speech.items():
            began = time.process_time()
            wave = backend.speak(source, text, language)
            made[kind] = {"wave": wave, "cpu": time.process_time() - began, "heard": heard(wave)}
    except NotMadeError as error:
        print(f"{clip.id}: nothing made: {error}", flush=True)
        return None
    return {**made, "text": text, "label": clip.label, "language": language, "voice": clip.gender}


def adapted(x: Sequence[np.ndarray]) -> np.ndarray:
    """(n, D) of zero mean and unit variance."""
    vectors = np.stack(x)
    return np.asarray((vectors - vectors.mean(0)) / (vectors.std(0) + 1e-8), np.float64)


def by_language(made: list[Made], kind: str) -> np.ndarray:
    """(n, D) where each language is a corpus of its own."""
    x = np.stack([one[kind]["heard"] for one in made])
    for language in {one["language"] for one in made}:
        own = [n for n, one in enumerate(made) if one["language"] == language]
        x[own] = adapted([*x[own]])
    return x.astype(np.float64)


def recall(probe: Any, x: np.ndarray, label: np.ndarray) -> float:
    """Mean of the labels' recalls, UA."""
    named = probe.predict(x)
    return float(np.mean([(named[label == one] == one).mean() for one in np.unique(label)]))


class Writer:
    """Whisper-base, whole: speech to text."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer
        from transformers import GenerationConfig, WhisperForConditionalGeneration

        source = sources.resolve(WHISPER)
        found = pretrained.read_config("encoder", WHISPER, source)
        self.model: Any = pretrained.load(
            WhisperForConditionalGeneration, "encoder", WHISPER, source, config=found
        ).eval()
        self.tokens = Tokenizer.from_file(str(Path(source.path) / "tokenizer.json"))
        self.number = self.tokens.token_to_id
        never = json.loads((Path(source.path) / "config.json").read_text(encoding="utf-8"))
        self.model.generation_config = GenerationConfig(
            is_multilingual=True,
            task_to_id={"transcribe": self.number("<|transcribe|>")},
            lang_to_id={name: n for name, n in self.tokens.get_vocab().items() if n in never["lang_ids"]},
            no_timestamps_token_id=self.number("<|notimestamps|>"),
            decoder_start_token_id=self.number("<|startoftranscript|>"),
            eos_token_id=self.number("<|endoftext|>"),
            pad_token_id=self.number("<|endoftext|>"),
            suppress_tokens=never["suppress_ids"],
            begin_suppress_tokens=never["suppress_ids_begin"],
            max_length=100,  # a short sentence: what repeats itself ends
        )

    @torch.inference_mode()
    def __call__(self, wave: np.ndarray, language: str) -> str:
        mel = log_mel(np.pad(wave[: 30 * SAMPLE_RATE], (0, max(0, 30 * SAMPLE_RATE - len(wave)))))
        answer = self.model.generate(torch.from_numpy(mel)[None], language=language, task="transcribe")
        return str(self.tokens.decode(answer[0].tolist(), skip_special_tokens=True))


def letters(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in folded if unicodedata.category(letter)[0] in "LMN")


def errors(written: str, meant: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(meant) + 1))
    for n, one in enumerate(written, 1):
        before, row[0] = row[0], n
        for m, other in enumerate(meant, 1):
            before, row[m] = row[m], min(row[m] + 1, row[m - 1] + 1, before + (one != other))
    return row[-1]


@cache
def writer() -> Writer:
    torch.set_num_threads(1)
    return Writer()


def character_error(work: tuple[np.ndarray, str, str]) -> float:
    """Of one clip, at most 1: what Whisper makes up without end counts as everything wrong."""
    wave, language, text = work
    meant = letters(text)
    return min(1.0, errors(letters(writer()(wave, language)), meant) / len(meant))


def chosen(clips: Iterable[Recording], speakers: set[str], count: int) -> list[Recording]:
    """As many clips of each label, spread over their speakers."""
    drawn = np.random.default_rng(0)
    found = []
    own = [clip for clip in clips if clip.speaker in speakers]
    for label in COMMON:
        of_label = [clip for clip in own if clip.label == label]
        order = drawn.permutation(len(of_label))[: count // len(COMMON)]
        found += [of_label[n] for n in sorted(order)]
    return found


def measure(options: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """The rows, and the lines of the table."""
    clips = [clip for clip in parse_manifest(options.data / "clips.csv") if clip.label in COMMON]
    speakers = sorted({clip.speaker for clip in clips if clip.speaker})
    tested = set(options.tested.split(",") if options.tested else speakers[-options.speakers :])
    left_out = set(options.left_out.split(",")) if options.left_out else set()
    trained = [clip for clip in clips if clip.speaker not in tested | left_out]
    asked = chosen(clips, tested, options.clips)
    languages = options.to.split(",")
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        work = [(clip, languages[n % len(languages)]) for n, clip in enumerate(asked)]
        made = [one for one in pool.map(translated, work, chunksize=8) if one is not None]
        train = list(pool.map(recorded, trained, chunksize=16))
        number = {label: n for n, label in enumerate(COMMON)}
        probe = fitted("logistic_regression", adapted(train), np.array([number[str(c.label)] for c in trained]), 0)
        label = np.array([number[one["label"]] for one in made])
        ua = {"sources": recall(probe, adapted([one["source"] for one in made]), label)}
        own = {}
        for kind in ("transplant", "plain"):
            ua[kind] = recall(probe, adapted([one[kind]["heard"] for one in made]), label)
            own[kind] = recall(probe, by_language(made, kind), label)
        some = [made[n] for n in np.random.default_rng(1).permutation(len(made))[: options.transcribed]]
        # eSpeak alone says the same of every recording of a sentence by a gender: once is enough.
        plain = {(one["text"], one["voice"]): one for one in some}
        cer_plain = dict(zip(plain, pool.map(character_error, spoken(plain.values(), "plain")), strict=True))
        cer = {
            "transplant": float(np.mean(list(pool.map(character_error, spoken(some, "transplant"))))),
            "plain": float(np.mean([cer_plain[one["text"], one["voice"]] for one in some])),
        }
    speed = {
        kind: sum(len(one[kind]["wave"]) for one in made) / SAMPLE_RATE / sum(one[kind]["cpu"] for one in made)
        for kind in ("transplant", "plain")
    }
    rows = {
        "real-time": speed["transplant"],
        "probe-share": ua["transplant"] / ua["sources"],
        "cer-ratio": cer["transplant"] / cer["plain"],
    }
    lines = [
        f"{len(made)} clips of speakers {', '.join(sorted(tested))} in {', '.join(languages)}; probe trained on "
        f"{len(trained)} recordings of {len({c.speaker for c in trained})} others; {len(some)} transcribed",
        f"{'':12}{'UA':>6}{'share':>7}{'by language':>13}{'share':>7}{'CER':>6}{'x real time':>13}",
        f"{'sources':12}{ua['sources']:6.3f}{1:7.2f}",
    ]
    for kind in ("transplant", "plain"):
        lines.append(
            f"{kind:12}{ua[kind]:6.3f}{ua[kind] / ua['sources']:7.2f}{own[kind]:13.3f}"
            f"{own[kind] / ua['sources']:7.2f}{cer[kind]:6.3f}{speed[kind]:13.1f}"
        )
    return rows, lines


def spoken(made: Iterable[Made], kind: str) -> list[tuple[np.ndarray, str, str]]:
    return [(one[kind]["wave"], one["language"], one["text"]) for one in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with clips.csv and recordings")
    parser.add_argument("--to", default="de,fr,it", help="languages (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=240, help="clips to carry over (default: %(default)s)")
    parser.add_argument("--speakers", type=int, default=6, help="how many speakers' (default: the last %(default)s)")
    parser.add_argument("--tested", help="or their names")
    parser.add_argument("--left-out", help="speakers the probe does not hear either")
    parser.add_argument("--transcribed", type=int, default=60, help="clips to write down (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows, lines = measure(options)
    print("\n".join(lines))
    for name, value in rows.items():
        print(f"{name:12}{value:8.2f}")
    if options.json:
        listed = [{"name": name, "value": value} for name, value in rows.items()]
        options.json.write_text(json.dumps({"rows": listed}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
