"""What the plan of the stream costs: a resume, an epoch of ten million samples, a worker's memory.

    python tools/bench_plan.py [--samples 10000000] [--shards 1000]

`python tools/bench_stream.py` runs it too and writes its figures beside those of the loaders.
"""

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from mser_dist import audio
from mser_dist.config import TrainingDataConfig
from mser_dist.shards.columns import Column
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.writer import DatasetWriter
from mser_dist.stream.examples import Examples
from mser_dist.stream.features import Features
from mser_dist.stream.loader import Example
from mser_dist.stream.plan import Position
from mser_dist.stream.steps import plan_of, training_steps
from tools import bench_packing

LABELS = ["anger", "happy", "sad"]


def write_small(folder: Path, shards: int, each: int) -> None:
    """A set of many small shards of short clips of noise."""
    random = np.random.default_rng(0)
    data = audio.encode(random.integers(-3000, 3000, 8000).astype(np.int16), 16000, "wav")
    meta = {"emotion": "joy", "language": "de", "speaker": "s", "gender": None, "corpus": "noise", "text": None}
    with DatasetWriter(folder, "noise", {}, shard_samples=each) as writer:
        for i in range(shards * each):
            own = {"label": LABELS[i % 3], "source_id": f"u{i // 3}", "duration": 0.5, "sample_rate": 16000}
            writer.write("train", f"k{i:07d}", data, "wav", {**meta, **own, "synthetic": True})


def nothing(clips: list[Example]) -> dict[str, Any]:
    return {"frames": [clip.speech.shape[1] for clip in clips]}


def resume(shards: int = 1000, rounds: int = 7) -> dict[str, float]:
    """From opening the set to the first batch, at 90 % of an epoch against at its start; medians, in turn."""
    times: dict[str, list[float]] = {"start": [], "late": []}
    with tempfile.TemporaryDirectory(prefix="bench_plan-") as name:
        write_small(Path(name) / "set", shards, each=8)

        def first_batch(share: float) -> float:
            began = time.perf_counter()
            clips = Examples(ShardSet.open(Path(name) / "set"), LABELS, Features())
            plan = plan_of(clips.shards, TrainingDataConfig(), 32, 2)
            at = Position(0, int(share * plan.steps()))
            next(training_steps(clips, plan, at, 1, None, 0, 1, nothing, 0))
            return time.perf_counter() - began

        for _ in range(rounds + 1):
            times["start"].append(first_batch(0.0))
            times["late"].append(first_batch(0.9))
    start, late = (statistics.median(times[name][1:]) for name in ("start", "late"))  # the first warms up
    return {"ratio": late / start, "seconds_at_start": start, "seconds_at_90_percent": late, "shards": shards}


def _tiled(shards: ShardSet, size: int) -> ShardSet:
    """The same samples again and again, as the columns of a set of `size`; their lengths are drawn."""
    big = copy.copy(shards)

    def tile(column: np.ndarray) -> np.ndarray:
        return np.resize(column, size)

    big.duration = bench_packing.seconds("lognormal", size)
    big.source = np.random.default_rng(1).integers(0, 2**62, size // 6 + 1)[np.arange(size) // 6]
    big.shard, big._row = tile(shards.shard), tile(shards._row)
    big._place = [tile(column) for column in shards._place]
    big.coded = {name: Column(tile(column.codes), column.names) for name, column in shards.coded.items()}
    return big


def _measured(work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """`work()` in a process of its own, with the peak of its memory in GiB."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(work, sender))
    process.start()
    sender.close()
    result: dict[str, float] = receiver.recv()
    process.join()
    return result


def _report(work: Callable[[], dict[str, float]], sender: Any) -> None:
    result = work()
    sender.send(result | {"gib": _peak_kib() / 2**20})


def _peak_kib() -> int:
    """The most memory this process has held: VmHWM of proc_pid_status(5).

    ru_maxrss would not do: on Linux a process starts with that of the one which started it.
    """
    [line] = [
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:")
    ]
    return int(line.split()[1])


class PlanJob:
    """Plans an epoch of a set of `size` and reads from it with one worker; made to be pickled."""

    def __init__(self, folder: Path, size: int, options: dict[str, Any], read: bool = False) -> None:
        self.folder, self.size, self.options, self.read = folder, size, options, read

    def __call__(self) -> dict[str, float]:
        clips = Examples(_tiled(ShardSet.open(self.folder), self.size), LABELS, Features())
        data = TrainingDataConfig(**self.options)
        began, cpu = time.perf_counter(), time.process_time()
        plan = plan_of(clips.shards, data, 512, data.parallel)
        plan.batch(Position())
        result = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        if self.read:
            steps = training_steps(clips, plan, Position(), 12, None, 0, 8, nothing, 1)
            for _ in range(6):
                next(steps)
            [worker] = psutil.Process().children()
            result["worker_mib"] = worker.memory_full_info().uss / 2**20
            for _ in steps:
                pass
        return result


PLANS: dict[str, dict[str, Any]] = {
    "shuffle": {"parallel": 1},
    "pairs": {"parallel": 2},
    "bucket": {"parallel": 1, "batching": "bucket"},
    "tokens": {"parallel": 1, "batching": "tokens"},
    "balance": {"parallel": 1, "balance": ["label"]},
    "balance, pairs": {"parallel": 2, "balance": ["label"]},
}


def plan(samples: int = 10_000_000, only: Collection[str] = tuple(PLANS)) -> dict[str, Any]:
    """Seconds and peak GiB (of the whole process, the set's columns included) to plan an epoch of each kind.

    `seconds` and `gib` are of the plain shuffle; worker_mib: a worker's own memory (USS), for a small set and this one.
    """
    with tempfile.TemporaryDirectory(prefix="bench_plan-") as name:
        folder = Path(name) / "set"
        write_small(folder, shards=10, each=100)
        kinds = {kind: _measured(PlanJob(folder, samples, PLANS[kind])) for kind in only}
        workers = {
            size: _measured(PlanJob(folder, size, PLANS["shuffle"], read=True))["worker_mib"]
            for size in (10_000, samples)
        }
    return {"samples": samples, **kinds["shuffle"], "kinds": kinds, "worker_mib": workers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000, help="of the plan (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=1000, help="of the resume (default: %(default)s)")
    options = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "resume": lambda: resume(options.shards),
        "plan": lambda: plan(options.samples),
    }
    for name, part in parts.items():
        print(json.dumps({name: part()}, indent=1))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
