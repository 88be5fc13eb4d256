"""What it gains to keep a frozen encoder's features: python tools/bench_features.py --json FILE

Stage 1 on a frozen Whisper-base by a preset, as `mser train` runs it, in processes of their own: with
`encoder.cache=off` and with `disk`, in turn, so that both meet the same noise; medians over the rounds. Rows of
{"rows": [{name, …}]}:

- off: an epoch without a cache, {clips_per_s, ratio: 1}
- cached-epoch: the epochs behind the first with it
- whole-run: all epochs, and the encoding before them (the first run's start, less a start that finds everything there)
- second-start: {seconds} from the command to the end of its first step, of a second run on the same set
- memory: {mib, mib_4x, ratio} peak of a rank that encodes and trains, for the set and for one four times as large

Words behind the options override keys of the config, as for `mser train`.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mser_dist import audio
from mser_dist.config import SIX_EMOTIONS
from mser_dist.shards.index import sound
from mser_dist.shards.writer import DatasetWriter
from tools.stream_peers.clips import concatenated, speech

ROOT = Path(__file__).parents[1]
QUIET = [
    f"data.labels={','.join(SIX_EMOTIONS)}",
    "data.val_split=null",
    "train.log_every=1",
    "train.save_best=false",
    "tracking.enabled=false",
]


class Ran(NamedTuple):
    """What a training took."""

    start: float  # seconds to the end of the first step
    steps: list[float]  # seconds of each step behind it
    peak: float  # MiB of the largest process


class Bench:
    """Trains on a set by a config, for so many processes, with words for all runs."""

    def __init__(self, folder: Path, config: str, nproc: int, batch: int, words: Sequence[str]) -> None:
        self.folder, self.config, self.nproc, self.batch, self.words = folder, config, nproc, batch, list(words)
        self._runs = 0

    def train(self, shards: Path, steps: int, cache: str, features: Path) -> Ran:
        """Train `steps` steps in a new run folder."""
        self._runs += 1
        out = self.folder / f"run{self._runs}"
        words = [f"data.sets={shards.resolve()}", f"out={out}", f"train.steps={steps}", *QUIET]
        words += [f"train.global_batch={self.batch}", f"encoder.cache={cache}"]
        words += [f"encoder.cache_dir={features}"] if cache == "disk" else []
        command = [sys.executable, "-m", "mser_dist", "train", self.config, *words, *self.words]
        command += ["--nproc", str(self.nproc)] if self.nproc > 1 else []
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with (self.folder / "log").open("w+", encoding="utf-8") as log:
            began = time.time()
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)  # of this process and its own alone
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                log.seek(0)
                raise SystemExit(f"bench_features: {' '.join(command)}\n{log.read()[-3000:]}")
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        times = [float(row["time"]) for row in rows if "train/loss" in row]
        shutil.rmtree(out)
        return Ran(times[0] - began, np.diff(times).tolist(), usage.ru_maxrss / 1024)


def write_clips(out: Path, count: int, seed: int = 0) -> None:
    """A set of `count` synthetic clips of 2 to 3 seconds, all of them training."""
    seconds = np.random.default_rng(seed).uniform(2.0, 3.0, count)
    with DatasetWriter(out, "bench", {"clips": count}, shard_samples=500) as writer:
        for i, wave in enumerate(concatenated(speech(None, 64), seconds, seed)):
            emotion = SIX_EMOTIONS[i % len(SIX_EMOTIONS)]
            said = {"emotion": emotion, "label": emotion, "source_id": f"u{i}", "synthetic": True, "text": None}
            who = {"language": "en", "speaker": f"s{i % 10}", "gender": None, "corpus": "bench"}
            what = {"duration": len(wave) / audio.SAMPLE_RATE, "sample_rate": audio.SAMPLE_RATE}
            data = audio.encode(wave, audio.SAMPLE_RATE, "flac")
            writer.write("train", f"k{i:06d}", data, "flac", said | who | what, sound(wave))


def measure(bench: Bench, shards: Path, clips: int, epochs: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of speed, and the peak of the first run with a cache."""
    epoch = max(2, round(clips / bench.batch))  # steps
    off, cached, encoding, starts, peaks = ([] for _ in range(5))
    for number in range(rounds):
        features = bench.folder / f"features{number}"
        off += bench.train(shards, epoch, "off", features).steps
        first = bench.train(shards, epoch * epochs, "disk", features)
        second = bench.train(shards, epoch * 2, "disk", features)
        cached += first.steps[epoch - 1 :]
        starts.append(second.start)
        encoding.append(first.start - second.start)
        peaks.append(first.peak)
        print(f"round {number + 1}: off {1 / np.median(off) * bench.batch:.1f} clips/s", end="")
        print(f", cached {bench.batch / np.median(cached):.1f}, encoding {encoding[-1]:.1f} s", flush=True)
        shutil.rmtree(features)
    slow, fast = statistics.median(off), statistics.median(cached)
    whole = (statistics.median(encoding) + epochs * epoch * fast) / (epochs * epoch)  # seconds a step
    rows: list[dict[str, Any]] = [
        {"name": name, "clips_per_s": bench.batch / seconds, "ratio": slow / seconds}
        for name, seconds in (("off", slow), ("cached-epoch", fast), ("whole-run", whole))
    ]
    start = {"name": "second-start", "seconds": statistics.median(starts)}
    return [*rows, start, {"name": "memory", "mib": max(peaks)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="key=value", default=[], help="overrides of the config")
    parser.add_argument("--config", default="real_stage1", help="what to train (default: %(default)s)")
    parser.add_argument("--set", type=Path, metavar="SHARDS", help="train on this set (default: a synthetic one)")
    parser.add_argument("--clips", type=int, default=256, help="of the set (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="clips a step (default: the preset's %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="of the whole run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--nproc", type=int, default=1, help="ranks (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_features-") as name:
        folder = Path(name)
        bench = Bench(folder, options.config, options.nproc, options.batch, options.words)
        shards = options.set or folder / "set"
        if not options.set:
            write_clips(shards, options.clips)
        rows = measure(bench, shards, options.clips, options.epochs, options.rounds)
        write_clips(folder / "large", 4 * options.clips, seed=1)
        large = bench.train(folder / "large", round(4 * options.clips / options.batch), "disk", folder / "features")
        rows[-1] |= {"mib_4x": large.peak, "ratio": large.peak / rows[-1]["mib"]}
    for row in rows:
        print("  ".join(f"{key} {value:.2f}" if isinstance(value, float) else str(value) for key, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
