"""What the contrastive losses cost, beside open_clip's ClipLoss and the full matrix: tables, and JSON.

    python tools/bench_contrastive.py --json FILE [--envs DIR] [--rounds 3] [--quick]

Every figure is of a process of its own on one thread: CPU seconds of a forward and backward pass, and the most memory
that came on top of the embeddings. The ways that are compared run in turn, and the medians over the rounds are told.
open_clip is installed, at a pinned version, into an environment of its own under --envs.

{"contrastive": rows of {loss, against, n, width, world_size, ours_s, clip_s, ours_mib, clip_mib, time_ratio,
memory_ratio, max_abs_grad_diff, grads_of_n}, "caching": {…}, "memory": rows of {…, predicted_mib, measured_mib, ratio}}

clip_… is what the row is `against`; ratios are ours / theirs. With world_size > 1 ours is the ring in that many real
processes, and the figures are the largest of any. ClipLoss would not fit so often: it is one rank, the others being
imagined (torch's "fake" process group: no waiting, collectives cost a copy). The gradients are compared in that many
real processes, on a batch of `grads_of_n`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mser_dist.contrastive import peak_bytes
from mser_dist.files import write_json
from tools.bench_stream import machine
from tools.stream_peers.loaders import ROOT, Peer, PeerError, environment

OPEN_CLIP = Peer("open_clip", "", "open_clip_torch", ("open_clip_torch==3.3.0",))
# Freed blocks go back to the system at once, so that the peak is of what was held.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


class Bench:
    def __init__(self, python: Path, rounds: int) -> None:
        self.python, self.rounds = python, rounds

    def ask(self, task: dict[str, Any], **env: str) -> dict[str, Any]:
        """One measurement. Raises `PeerError` where it fails."""
        command = [str(self.python), str(ROOT / "tools" / "contrastive_worker.py"), json.dumps(task)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), **env}
        done = subprocess.run(command, env=environ, capture_output=True, encoding="utf-8", errors="replace", cwd=ROOT)
        if done.returncode:
            raise PeerError(f"{task}: {done.stderr[-2000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def in_turn(self, tasks: list[dict[str, Any]]) -> list[dict[str, float]]:
        """Median seconds of each over the rounds, and its memory."""
        times: list[list[float]] = [[] for _ in tasks]
        for _ in range(self.rounds):
            for task, seconds in zip(tasks, times, strict=True):
                seconds.append(self.ask(task)["seconds"])
        memory = [self.ask(task, **EXACT_MEMORY)["mib"] for task in tasks]
        return [{"s": statistics.median(s), "mib": m} for s, m in zip(times, memory, strict=True)]

    def row(self, loss: str, against: str, n: int, width: int, ranks: int) -> dict[str, Any]:
        print(f"{loss} of {n} against {against}, {ranks} rank{'s' * (ranks > 1)}", file=sys.stderr)
        task = {"what": "loss", "loss": loss, "n": n, "width": width, "ranks": ranks, "gather": "ring"}
        real = {"what": "group"} if ranks > 1 else {}
        ours, theirs = self.in_turn([task | {"who": "ours"} | real, task | {"who": against}])
        compared = n if ranks == 1 else n // 4
        return {
            "loss": loss,
            "against": against,
            "n": n,
            "width": width,
            "world_size": ranks,
            "ours_s": ours["s"],
            "clip_s": theirs["s"],
            "ours_mib": ours["mib"],
            "clip_mib": theirs["mib"],
            "time_ratio": ours["s"] / theirs["s"],
            "memory_ratio": ours["mib"] / theirs["mib"],
            "max_abs_grad_diff": self._difference(task | {"n": compared}, against),
            "grads_of_n": compared,
        }

    def _difference(self, task: dict[str, Any], against: str) -> float:
        """The largest difference between any two gradients, of embeddings and of the scale."""
        real = task | ({"what": "group"} if task["ranks"] > 1 else {})
        with tempfile.TemporaryDirectory() as folder:
            for who in ("ours", against):
                self.ask(real | {"who": who, "keep": str(Path(folder, who))})
            worst = 0.0
            for rank in range(task["ranks"]):
                pair = [torch.load(Path(folder, f"{who}.{rank}"), weights_only=True) for who in ("ours", against)]
                # Each rank's gradient is W times its part: what counts is the mean over ranks that DDP takes.
                parts = [float((a - b).abs().max()) / task["ranks"] for a, b in zip(*pair, strict=True)]
                worst = max(worst, *parts[:2], parts[2] if task["ranks"] == 1 else 0.0)
            if task["ranks"] > 1:
                scales = [
                    sum(torch.load(Path(folder, f"{who}.{r}"), weights_only=True)[2] for r in range(task["ranks"]))
                    for who in ("ours", against)
                ]
                worst = max(worst, abs(float(scales[0] - scales[1])) / task["ranks"])
        return worst

    def caching(self, micro: int, chunks: int) -> dict[str, Any]:
        """A step of `chunks` micro-batches against one of one, in memory, and against the same in one pass, in time."""
        print(f"gradient caching, {chunks} times {micro} clips", file=sys.stderr)
        n, few = micro * chunks, micro * max(1, chunks // 16)
        cached, whole = self.in_turn(
            [{"what": "caching", "n": n, "micro": micro}, {"what": "caching", "n": n, "micro": n}]
        )
        small = self.ask({"what": "caching", "n": few, "micro": micro}, **EXACT_MEMORY)["mib"]
        return {
            "micro_batch": micro,
            "n": few,
            "n_times_16": n,
            "mib_of_n": small,
            "mib_of_n_times_16": cached["mib"],
            "memory_ratio": cached["mib"] / small,
            "seconds": cached["s"],
            "one_pass_seconds": whole["s"],
            "one_pass_mib": whole["mib"],
            "time_ratio": cached["s"] / whole["s"],
        }

    def memory(self, n: int, width: int, ranks: int, gather: str, tile: int, loss: str) -> dict[str, Any]:
        """The formula of `peak_bytes` beside what was seen."""
        print(f"memory of {loss}, {n} rows on {ranks} ranks, {gather}, tile {tile}", file=sys.stderr)
        shape = {"n": n, "width": width, "ranks": ranks, "gather": gather, "tile": tile, "loss": loss}
        what = "group" if ranks > 1 else "loss"
        measured = self.ask(shape | {"what": what, "who": "ours"}, **EXACT_MEMORY)["mib"]
        classes = 6 if loss == "supcon" else None
        bytes_ = peak_bytes(n // ranks, width, ranks=ranks, gather=gather, tile=tile, classes=classes)  # type: ignore[arg-type]
        predicted = bytes_ / 2**20
        return shape | {"predicted_mib": predicted, "measured_mib": measured, "ratio": predicted / measured}


def losses(quick: bool) -> list[tuple[str, str, int, int, int]]:
    """(loss, against, n, width, ranks)"""
    if quick:
        return [("infonce", "open_clip", 256, 32, 1), ("infonce", "open_clip", 512, 32, 2)]
    return [
        ("infonce", "open_clip", 16_384, 512, 1),
        ("infonce", "open_clip", 32_768, 512, 8),
        ("supcon", "full matrix", 8_192, 512, 1),
        ("siglip", "full matrix", 8_192, 512, 1),
    ]


def shapes(quick: bool) -> list[tuple[int, int, int, str, int, str]]:
    """(n, width, ranks, gather, tile, loss)"""
    if quick:
        return [(2048, 64, 1, "all_gather", 512, "infonce")]
    return [
        (16_384, 512, 1, "all_gather", 1024, "infonce"),
        (16_384, 512, 1, "all_gather", 1024, "supcon"),
        (8_192, 1024, 1, "all_gather", 512, "supcon"),
        (8_192, 512, 1, "all_gather", 4096, "infonce"),
        (16_384, 512, 2, "all_gather", 1024, "infonce"),
        (16_384, 512, 2, "ring", 1024, "infonce"),
        (16_384, 512, 4, "all_gather", 1024, "supcon"),
        (16_384, 512, 4, "ring", 1024, "supcon"),
    ]


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{'loss':<9}{'against':<13}{'n':>7}{'ranks':>6}{'CPU s':>16}{'ratio':>7}{'MiB':>17}{'1/':>6}{'gradients':>11}"
    ]
    for row in result["contrastive"]:
        seconds, mib = (f"{row[f'ours_{u}']:.1f} / {row[f'clip_{u}']:.1f}" for u in ("s", "mib"))
        lines.append(
            f"{row['loss']:<9}{row['against']:<13}{row['n']:>7}{row['world_size']:>6}{seconds:>16}"
            f"{row['time_ratio']:>7.2f}{mib:>17}{1 / row['memory_ratio']:>6.1f}{row['max_abs_grad_diff']:>11.1e}"
        )
    c = result["caching"]
    lines += [
        "",
        f"gradient caching: {c['n_times_16']} clips in chunks of {c['micro_batch']}: {c['mib_of_n_times_16']:.0f} MiB "
        f"({c['n']} clips: {c['mib_of_n']:.0f}, ratio {c['memory_ratio']:.3f}); {c['seconds']:.1f} s, in one pass "
        f"{c['one_pass_seconds']:.1f} s and {c['one_pass_mib']:.0f} MiB (time ratio {c['time_ratio']:.2f})",
        "",
        f"{'n':>7}{'width':>6}{'ranks':>6}{'gather':>12}{'tile':>6}{'loss':>9}{'predicted':>11}{'measured':>10}{'ratio':>7}",
    ]
    for row in result["memory"]:
        lines.append(
            f"{row['n']:>7}{row['width']:>6}{row['ranks']:>6}{row['gather']:>12}{row['tile']:>6}{row['loss']:>9}"
            f"{row['predicted_mib']:>11.1f}{row['measured_mib']:>10.1f}{row['ratio']:>7.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    cache = Path("~/.cache/mser_dist/bench").expanduser()
    parser.add_argument("--envs", type=Path, default=cache, help="environment of open_clip (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes, 1 round")
    options = parser.parse_args()
    quick = options.quick
    try:
        bench = Bench(environment(OPEN_CLIP, options.envs), 1 if quick else options.rounds)
        result: dict[str, Any] = {
            "contrastive": [bench.row(*case) for case in losses(quick)],
            "caching": bench.caching(*((1, 4) if quick else (8, 32))),
            "memory": [bench.memory(*shape) for shape in shapes(quick)],
        }
    except PeerError as error:
        sys.exit(f"bench_contrastive: {error}")
    print(table(result))
    if options.json:
        write_json(options.json, result | {"machine": machine(), "rounds": bench.rounds})


if __name__ == "__main__":
    main()
