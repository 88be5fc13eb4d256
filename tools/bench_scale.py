"""What a rank costs as their number grows: sockets, a checkpoint's opens, the boundary between two steps, an index.

    python tools/bench_scale.py [--ranks 16,64,256] [--shards 10000] [--no-plan] [--json FILE]

Light processes that compute nothing and have no model, but real parts: the store and the meeting at it, the watchdog,
the boundary, `Checkpoints` with its seal and manifest, `ShardSet`. NCCL's own sockets (a bootstrap of a few a rank, and
its rings') cannot be counted here; a run on CPUs has gloo's mesh besides, which is for tests. The rows:

    sockets         of the rank that has most, with its watchdog; `server`: of the process that serves the store
    resume-opens    files that the rank with most opens to go on from a checkpoint; `mean`: as the kernel counts them
    resume-seconds  of one rank; with more ranks than cores its own CPU time, `wall`: until the last of all had resumed
    boundary-ms     a step, in the mean of all ranks, at steps of 0.1 s; printed: what follows for 1,024
    index-seconds   a set of --shards opened by a further rank of a node; `first`: by the first one
    plan-…-error    of `mser plan`, as a share: step times (published, not seen by the fit), bytes (two real ranks)
"""

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # at the end of a job its store goes before its clients

import numpy as np
import torch
from numpy.typing import NDArray

from mser_dist import audio
from mser_dist.deepspeed_parts import Part
from mser_dist.ranks import distributed, limits
from mser_dist.ranks.boundary import FARTHEST, SPACING, Boundary
from mser_dist.ranks.distributed import World
from mser_dist.ranks.preempt import Flag
from mser_dist.ranks.watchdog import Watchdog
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.writer import DatasetWriter
from mser_dist.state import checkpoint, engine_state, manifest
from mser_dist.state.checkpoint import Checkpoints

STEPS, STEP_SECONDS = 40, 0.1
SHAPES = [(2048, 512), *[(512, 512), (512,), (512, 1376), (1376,)] * 12]  # 13 million parameters, some of few elements
SLOTS = ("exp_avg", "exp_avg_sq")
CONTEXT = multiprocessing.get_context("fork")


class LightEngine:
    """Parameters that ZeRO-3 would have cut over the ranks, with an optimizer's state, and no model."""

    def __init__(self, rank: int, ranks: int, seed: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.parts: list[Part] = []
        self.state: dict[str, dict[str, torch.Tensor]] = {}
        random = torch.Generator().manual_seed(seed)
        for number, shape in enumerate(SHAPES):
            start, count = manifest.even(int(np.prod(shape)), rank, ranks)
            owner = torch.rand(count, generator=random)
            self.parts.append(Part(f"layer.{number}", shape, start, count, owner, 0, everywhere=False))
            self.state[f"layer.{number}"] = {slot: torch.rand(count, generator=random) for slot in SLOTS}

    def kinds(self, part: Part) -> dict[str, torch.Tensor]:
        return {"master": part.owner, **self.state[part.name]}

    def collect(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {f"{kind}/{p.name}": found for p in self.parts for kind, found in self.kinds(p).items() if p.count}
        entries = {p.name: {"shape": p.shape, "start": p.start, "count": p.count, "step": 1.0} for p in self.parts}
        groups = [{"parameters": [part.name for part in self.parts], "hyper": {}}]
        small: dict[str, Any] = {"buffers": {}, "scheduler": None, "loss_scaler": {}, "counters": {}, "groups": groups}
        return tensors, {"rank": self.rank, "world_size": self.ranks, "parameters": entries, "slots": [*SLOTS], **small}

    def restore(self, folder: Path, fork: bool = False) -> None:
        saved = engine_state.saved_by_all(folder, self.rank)
        assert not [*saved.faults([self.parts], [], fork)]
        for part in self.parts:
            for kind, place in self.kinds(part).items():
                saved.copy(kind, part, place)


class Opens:
    """Counts the files below a folder that this process opens, in Python and in safetensors."""

    def __init__(self, folder: Path) -> None:
        self.count = 0
        sys.addaudithook(lambda name, given: self._heard(name, given, str(folder)))
        for module, call in ((engine_state, "safe_open"), (manifest, "safe_open"), (checkpoint, "load_file")):
            setattr(module, call, self._counted(getattr(module, call)))

    def _heard(self, name: str, given: tuple[Any, ...], folder: str) -> None:
        self.count += name == "open" and str(given[0]).startswith(folder) and Path(str(given[0])).suffix != ""

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **options: Any) -> Any:
            self.count += 1
            return call(*given, **options)

        return counted


class KernelOpens:
    """Counts the opens of a folder's files by all processes, as inotify(7) tells them."""

    def __init__(self, folder: Path) -> None:
        system = ctypes.CDLL(None, use_errno=True)
        self._handle = system.inotify_init1(os.O_NONBLOCK)
        if system.inotify_add_watch(self._handle, str(folder).encode(), 0x20) < 0:  # IN_OPEN
            raise OSError(ctypes.get_errno(), "inotify")

    def read(self) -> int:
        """Files opened since the last call, but for the folder itself."""
        count = 0
        while True:
            try:
                data = os.read(self._handle, 1 << 20)
            except BlockingIOError:
                return count
            at = 0
            while at < len(data):
                length = struct.unpack_from("iIII", data, at)[3]
                count += length > 0
                at += 16 + length


def sockets(pid: int | str = "self") -> int:
    """Open sockets of a process."""
    found = 0
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found += str(handle.readlink()).startswith("socket:")
        except OSError:  # closed meanwhile
            continue
    return found


def light(world: World, folder: Path, answer: Any, more: Callable[[World], dict[str, float]] | None = None) -> None:
    """One rank of a job: it meets the others, is watched, walks over some steps, saves and goes on from that.

    more: what else a rank does before its first step; numbers.
    """
    torch.set_num_threads(1)
    began = time.perf_counter()
    distributed.join_store(world, 300)
    found: dict[str, Any] = {"start": time.perf_counter() - began}
    if more:
        found |= more(world)
    store = distributed.store()
    engine = LightEngine(world.rank, world.world_size, seed=world.rank)
    checkpoints = Checkpoints(folder, world, keep=1)
    with Watchdog(world, silence=300.0, stall=3000.0).watch():
        boundary = Boundary(Flag(), checkpoints, 0.0, None, world.is_main)
        boundary.poll()
        polls = []
        for _ in range(STEPS):
            time.sleep(STEP_SECONDS)
            before = time.perf_counter()
            boundary.poll()
            polls.append((time.perf_counter() - before) * 1000)
        found["polls"] = polls
        before = time.perf_counter()
        for _ in range(200 if world.is_main else 0):
            store.client.get("here/0")
        found["get"] = (time.perf_counter() - before) / 200 * 1000
        checkpoints.save(1, engine, {"position": [0, 0]})
        boundary.saved()
        checkpoints.finish()
        _together(store)
        found |= {"sockets": sockets(), "server": max(map(sockets, _children()), default=0), "every": boundary.every}
        _together(store)
        kernel = KernelOpens(folder / "checkpoints/step-000001") if world.is_main else None
        _together(store)
        opens, again = Opens(folder), LightEngine(world.rank, world.world_size, seed=10_000)
        wall, cpu = time.perf_counter(), time.process_time()
        Checkpoints(folder, world, keep=1).resume(again)
        found |= {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "opens": opens.count}
        for one, two in zip(engine.parts, again.parts, strict=True):
            kept, read = engine.kinds(one), again.kinds(two)
            assert all(torch.equal(kept[kind], read[kind]) for kind in kept)
        everyone = store.to_main(found)
        if everyone and kernel:
            answer.send((everyone, kernel.read() / world.world_size))
        store.to_main(None)  # rank 0, with which the store goes, goes last


def _together(store: Any) -> None:
    store.to_main(None)
    store.from_main([None] * store.ranks if store.rank == 0 else None)


def _children() -> list[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
    return [int(pid) for pid in text.split()]


def job(ranks: int, folder: Path, more: Callable[[World], dict[str, float]] | None = None) -> list[dict[str, Any]]:
    """The rows of a job of so many ranks on this machine; with `more`, "rank" has the most of each of its numbers."""
    port = distributed.free_port()
    here, there = CONTEXT.Pipe(duplex=False)
    processes = []
    for rank in range(ranks):
        world = World(rank, ranks, rank, "127.0.0.1", port, "torchrun")
        processes.append(CONTEXT.Process(target=light, args=(world, folder, there, more)))
        processes[-1].start()
    deadline = time.monotonic() + 120 + ranks
    while not here.poll(0.2):
        if time.monotonic() > deadline or any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
            raise SystemExit(f"bench_scale: one of {ranks} ranks did not come to an end")
    everyone, mean = here.recv()
    polls = np.array([one.pop("polls") for one in everyone])  # (ranks, steps) ms
    for process in processes:
        process.join()
    most = {name: max(one[name] for one in everyone) for name in everyone[0]}
    seconds = most["wall"] if ranks <= (os.cpu_count() or 1) else most["cpu"]
    rows = [
        {"name": "sockets", "ranks": ranks, "value": most["sockets"], "server": most["server"]},
        {"name": "resume-opens", "ranks": ranks, "value": most["opens"], "mean": mean},
        {"name": "resume-seconds", "ranks": ranks, "value": seconds, "wall": most["wall"]},
        {"name": "boundary-ms", "ranks": ranks, "value": boundary_ms(polls, most["every"])}
        | {"every": most["every"], "longest": float(polls.max()), "get": most["get"]},
    ]
    return rows + ([{"name": "rank", "ranks": ranks, "value": most["start"], **most}] if more else [])


def boundary_ms(polls: NDArray[Any], every: int) -> float:
    """A step's part of the time that polls take, (ranks, steps) ms, once the pace is known and one in `every` asks.

    The mean of the ranks, in the median of so many steps: more ranks than cores are put off now and then, whatever they
    do.
    """
    late = polls[:, len(polls[0]) // 2 :].mean(axis=0)
    late = late[: len(late) // every * every].reshape(-1, every)
    return float(np.median(late.mean(axis=1)))


def write_set(folder: Path, shards: int) -> None:
    """Many shards of two short clips each."""
    data = audio.encode(np.random.default_rng(0).integers(-3000, 3000, 800).astype(np.int16), 16000, "wav")
    meta = {"emotion": "joy", "language": "de", "speaker": "s", "gender": None, "corpus": "noise", "text": None}
    own = {"label": "happy", "duration": 0.05, "sample_rate": 16000, "synthetic": True}
    with mock.patch("os.fsync"), DatasetWriter(folder, "noise", {}, shard_samples=2) as writer:  # a set of no use
        for i in range(2 * shards):
            writer.write("train", f"k{i:07d}", data, "wav", {**meta, **own, "source_id": f"u{i // 2}"})


def index(shards: int, folder: Path, further: int = 3) -> list[dict[str, Any]]:
    """The row of a set that the ranks of a node open, one after the other."""
    write_set(folder, shards)
    here, there = CONTEXT.Pipe(duplex=False)
    done = CONTEXT.Event()
    processes = []
    times: list[float] = []
    port = str(distributed.free_port())

    def opened(rank: int) -> None:
        place = {"RANK": str(rank), "WORLD_SIZE": str(further + 1), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(place)
        began = time.perf_counter()
        found = ShardSet.open(folder, split="train", sound=True)
        there.send((time.perf_counter() - began, found.fingerprint()))
        done.wait()

    prints = set()
    for rank in range(further + 1):
        processes.append(CONTEXT.Process(target=opened, args=(rank,)))
        processes[-1].start()
        seconds, fingerprint = here.recv()
        times.append(seconds)
        prints.add(fingerprint)
    done.set()
    for process in processes:
        process.join()
    assert len(prints) == 1
    return [
        {"name": "index-seconds", "ranks": further + 1, "value": max(times[1:]), "first": times[0], "shards": shards}
    ]


def planner() -> list[dict[str, Any]]:
    """How far plans are off: step times, of published figures of 64 GPUs or more that the constants have not seen, and
    bytes, of two real ranks."""
    from mser_dist.planning import fit, real

    errors = {"plan-median-error": (64, fit.median_error), "plan-p90-error": (64, fit.p90_error)}
    errors["plan-bytes-error"] = (2, real.bytes_error)
    return [{"name": name, "ranks": ranks, "value": error()} for name, (ranks, error) in errors.items()]


def at_1024(rows: list[dict[str, Any]]) -> str:
    """What the boundary is at 1,024 ranks: at most as long as one request a rank, one after the other, takes."""
    each = max(row["get"] for row in rows if row["name"] == "boundary-ms")  # ms, of one rank that asks alone
    short = each * 1024 / min(FARTHEST, math.ceil(1024 * SPACING / STEP_SECONDS))
    return (
        f"boundary: {each * 1000:.0f} µs a request; at 1,024 ranks at most {each * 1024:.1f} ms a step where steps "
        f"last {1024 * SPACING:.1f} s or more, {short:.2f} ms where they last {STEP_SECONDS} s"
    )


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, printed."""
    for row in rows:
        more = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if key not in ("name", "ranks", "value"))
        print(f"{row['name']:<16}{row['ranks']:>6} ranks {row['value']:>10.4g}   ({more})", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="16,64,256", help="numbers of ranks (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=10_000, help="of the set (default: %(default)s); 0: none")
    parser.add_argument("--no-plan", action="store_true", help="without the planner, whose bytes take a minute")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    given = parser.parse_args()
    limits.raise_limit()
    rows: list[dict[str, Any]] = []
    for ranks in map(int, given.ranks.split(",")):
        with tempfile.TemporaryDirectory(prefix="bench_scale-") as folder:
            rows += shown(job(ranks, Path(folder)))
    if given.shards:
        with tempfile.TemporaryDirectory(prefix="bench_scale-") as folder:
            rows += shown(index(given.shards, Path(folder) / "set"))
    if not given.no_plan:
        rows += shown(planner())
    if line := at_1024(rows):
        print(line)
    if given.json:
        given.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
