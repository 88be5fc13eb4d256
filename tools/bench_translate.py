"""How much of a recording's emotion a transplant of prosody carries into other languages: one table, three JSON rows.

    python tools/bench_translate.py --data FOLDER [--to de,fr,it] [--clips 840] [--folds 4] [--json FILE]

FOLDER holds recordings and a clips.csv, as `mser pack manifest` takes it. Clips of all speakers, as many of each common
label, are carried into the languages in turn, by the transplant and by eSpeak alone. A probe, `mser baseline`'s
logistic regression on mean-pooled hidden states of the frozen Whisper-base encoder, names the emotion of the sources
and of both kinds of speech; it is trained on the recordings of speakers of other folds. As `encoder.normalize=corpus`
has it, the vectors of a language of a corpus have zero mean and unit variance. Whisper-base writes down some clips.

real-time: seconds of speech that a second of one core makes, analysis of the source included. probe-share: UA of the
transplanted over UA of their sources. cer-ratio: character error of the transplanted clips that `selection.max_cer`
keeps, over that of eSpeak alone saying the same.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mser_dist import config as cfg
from mser_dist.audio import SAMPLE_RATE, decode, log_mel
from mser_dist.config.translation_keys import WHISPER, SelectionConfig
from mser_dist.corpora.manifest import parse_manifest
from mser_dist.corpora.recording import Recording
from mser_dist.evaluation.bootstrap import clusters_of, draw_ua
from mser_dist.evaluation.classifiers import fitted
from mser_dist.models.attention import choose
from mser_dist.models.encoders import build_encoder
from mser_dist.progress import bar
from mser_dist.shards.emotions import COMMON
from mser_dist.translation.measures import character_error
from mser_dist.translation.parts import NotMadeError, Source
from mser_dist.translation.table import Table
from mser_dist.translation.transplant import Plain, Transplant
from mser_dist.translation.whisper import Whisper

KINDS = ("transplant", "plain")
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
        print(f"{clip.id}: nothing made: {error}", file=sys.stderr, flush=True)
        return None
    about = {"label": clip.label, "language": language, "speaker": clip.speaker, "voice": clip.gender}
    return {**made, **about, "text": text}


def adapted(x: Sequence[np.ndarray], group: Sequence[str] | None = None) -> np.ndarray:
    """(n, D) of zero mean and unit variance, in each group for itself."""
    vectors, names = np.stack(x).astype(np.float64), np.array(group or [""] * len(x))
    for one in set(names):
        own = vectors[names == one]
        vectors[names == one] = (own - own.mean(0)) / (own.std(0) + 1e-8)
    return vectors


@cache
def writer() -> Whisper:
    torch.set_num_threads(1)
    return Whisper(WHISPER)


def error_of(work: tuple[np.ndarray, str, str]) -> float:
    """By character, of a clip: its samples, language and text."""
    wave, language, text = work
    return character_error(writer().write(wave, language), text)


def chosen(clips: Sequence[Recording], count: int) -> list[Recording]:
    """As many clips of each label and speaker as there are."""
    drawn = np.random.default_rng(0)
    speakers = sorted({str(clip.speaker) for clip in clips})
    each = max(1, count // (len(COMMON) * len(speakers)))
    found = []
    for label in COMMON:
        for speaker in speakers:
            own = [clip for clip in clips if clip.label == label and clip.speaker == speaker]
            found += [own[n] for n in sorted(drawn.permutation(len(own))[:each])]
    return found


def interval(right: dict[str, np.ndarray], label: np.ndarray, speaker: np.ndarray, kind: str) -> tuple[float, float]:
    """95 % of the share, with the same draws of speakers above and below the line."""
    reference, cluster = np.unique(label, return_inverse=True)[1], clusters_of(speaker)[0]
    ua = {
        one: draw_ua(reference, np.where(right[one], reference, (reference + 1) % len(COMMON)), cluster, len(COMMON))
        for one in (kind, "sources")
    }
    low, high = np.nanquantile(ua[kind].values / ua["sources"].values, [0.025, 0.975])
    return float(low), float(high)


def mean_recall(right: np.ndarray, label: np.ndarray) -> float:
    """UA."""
    return float(np.mean([right[label == one].mean() for one in np.unique(label)]))


def named(made: list[Made], recordings: list[Recording], heard: list[np.ndarray], folds: int) -> dict[str, np.ndarray]:
    """(n,) of each kind, whether a probe of the other folds' speakers names the label."""
    speakers = sorted({str(clip.speaker) for clip in recordings})
    number = {label: n for n, label in enumerate(COMMON)}
    right = {kind: np.zeros(len(made), bool) for kind in ("sources", *KINDS)}
    language = [one["language"] for one in made]
    tested = {"sources": adapted([one["source"] for one in made])}
    tested |= {kind: adapted([one[kind]["heard"] for one in made], language) for kind in KINDS}
    for part in np.array_split(speakers, folds):
        train = [n for n, clip in enumerate(recordings) if clip.speaker not in part]
        labels = np.array([number[str(recordings[n].label)] for n in train])
        probe = fitted("logistic_regression", adapted([heard[n] for n in train]), labels, 0)
        test = [n for n, one in enumerate(made) if one["speaker"] in part]
        wanted = np.array([number[made[n]["label"]] for n in test])
        for kind, x in tested.items():
            right[kind][test] = probe.predict(x[test]) == wanted
    return right


def measure(options: argparse.Namespace) -> tuple[dict[str, float], list[str]]:
    """The rows, and the lines of the table."""
    clips = [clip for clip in parse_manifest(options.data / "clips.csv") if clip.label in COMMON and clip.speaker]
    languages = options.to.split(",")
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        work = [(clip, languages[n % len(languages)]) for n, clip in enumerate(chosen(clips, options.clips))]
        made = [
            one
            for one in bar(pool.map(translated, work, chunksize=4), title="make", unit="clip", total=len(work))
            if one
        ]
        heard = list(bar(pool.map(recorded, clips, chunksize=8), title="hear", unit="clip", total=len(clips)))
        right = named(made, clips, heard, options.folds)
        some = [made[n] for n in np.random.default_rng(1).permutation(len(made))[: options.transcribed]]
        # eSpeak alone says the same of every recording of a sentence by a gender: once is enough.
        plain = {(one["text"], one["voice"]): one for one in some}
        asked = [*spoken(some, "transplant"), *spoken(plain.values(), "plain")]
        errors = list(bar(pool.map(error_of, asked), title="write down", unit="clip", total=len(asked)))
    own = np.array(errors[: len(some)])
    by_text = dict(zip(plain, errors[len(some) :], strict=True))
    other = np.array([by_text[one["text"], one["voice"]] for one in some])
    kept = own <= float(SelectionConfig().max_cer or np.inf)
    cer = {"transplant": float(own[kept].mean()), "plain": float(other[kept].mean())}
    speed = {
        kind: sum(len(one[kind]["wave"]) for one in made) / SAMPLE_RATE / sum(one[kind]["cpu"] for one in made)
        for kind in KINDS
    }
    label, speaker = (np.array([one[name] for one in made]) for name in ("label", "speaker"))
    ua = {kind: mean_recall(of, label) for kind, of in right.items()}
    rows = {
        "real-time": speed["transplant"],
        "probe-share": ua["transplant"] / ua["sources"],
        "cer-ratio": cer["transplant"] / cer["plain"],
    }
    lines = [
        f"{len(made)} clips of {len(set(speaker))} speakers in {', '.join(languages)}, {options.folds} folds by "
        f"speaker; {len(some)} transcribed, {int(kept.sum())} kept (CER of all: transplant {own.mean():.3f}, "
        f"eSpeak {other.mean():.3f})",
        f"{'':12}{'UA':>6}{'share':>7}{'95 %':>12}{'CER kept':>10}{'x real time':>13}",
        f"{'sources':12}{ua['sources']:6.3f}{1:7.2f}",
    ]
    for kind in KINDS:
        low, high = interval(right, label, speaker, kind)
        lines.append(
            f"{kind:12}{ua[kind]:6.3f}{ua[kind] / ua['sources']:7.2f}{f'{low:.2f}–{high:.2f}':>12}{cer[kind]:10.3f}"
            f"{speed[kind]:13.1f}"
        )
    return rows, lines


def spoken(made: Iterable[Made], kind: str) -> list[tuple[np.ndarray, str, str]]:
    return [(one[kind]["wave"], one["language"], one["text"]) for one in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with clips.csv and recordings")
    parser.add_argument("--to", default="de,fr,it", help="languages (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=840, help="clips to carry over (default: %(default)s)")
    parser.add_argument("--folds", type=int, default=4, help="of speakers (default: %(default)s)")
    parser.add_argument("--transcribed", type=int, default=300, help="clips to write down (default: %(default)s)")
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
