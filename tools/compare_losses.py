"""Stage 1 with one contrastive loss after the other, and what they are worth on languages never heard: table and JSON.

    python tools/compare_losses.py --json FILE [--losses supcon,infonce] [--seeds 0,1,2] [--out DIR] [key=value …]

Each run is the preset demo_stage1 on the demo's synthetic set (made on first use), with captions drawn anew for every
clip and the language-agnostic term off, so that only the loss differs; batches, steps and seeds are the same. Words
key=value go to every training. What a folder holds already is not run again.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from mser_dist.config.file import load_training
from mser_dist.errors import UserError
from mser_dist.files import read_json, write_json
from mser_dist.jobs import local_ranks
from mser_dist.synth.speech import SynthConfig
from mser_dist.synth.write import write_set

WORDS = ["contrastive.beta=0", "data.balance=label,language"]


def mser(nproc: int, words: list[str]) -> None:
    if code := local_ranks.local(nproc, words):
        raise UserError(f"`mser {' '.join(words)}` ended with code {code}")


def unseen_ua(loss: str, seed: int, options: argparse.Namespace) -> float:
    """Train, evaluate on the test split: mean UA over the languages that were not trained on."""
    run = options.out / f"{loss}-{seed}"
    shards = f"data.sets={options.out / 'shards'}"
    if not (run / "summary.json").exists():
        words = [shards, f"out={run}", f"contrastive.loss={loss}", f"seed={seed}", *WORDS, *options.words]
        mser(options.nproc, ["train", "demo_stage1", *words])
    report = options.out / f"{loss}-{seed}-eval" / "report.json"
    if not report.exists():
        mser(1, ["eval", "demo_eval", shards, f"stage1={run}", "stage2=null", f"out={report.parent}"])
    rows = [row for row in read_json(report)["zero_shot"] if not row["seen_language"]]
    return statistics.mean(row["ua"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="key=value", help="for every training")
    parser.add_argument("--losses", default="supcon,infonce", help="the first is held against the others")
    parser.add_argument("--seeds", default="0,1,2", help="(default: %(default)s)")
    parser.add_argument("--nproc", type=int, default=2, help="processes of a training (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/losses"), help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    losses, seeds = options.losses.split(","), [int(seed) for seed in options.seeds.split(",")]
    try:
        for loss in losses:  # a typo shows now, not after minutes
            load_training("demo_stage1", [f"contrastive.loss={loss}", *WORDS, *options.words])
        if not (options.out / "shards" / "dataset.json").exists():
            write_set(options.out / "shards", SynthConfig())
        found: dict[str, list[float]] = {loss: [] for loss in losses}
        for seed in seeds:
            for loss in losses:
                found[loss].append(unseen_ua(loss, seed, options))
    except UserError as error:
        sys.exit(f"compare_losses: {error}")
    print(f"\n{'loss':<10}" + "".join(f"{f'seed {seed}':>9}" for seed in seeds) + f"{'mean':>9}   UA, unseen languages")
    for loss, values in found.items():
        print(f"{loss:<10}" + "".join(f"{value:>9.3f}" for value in [*values, statistics.mean(values)]))
    result: dict[str, Any] = {"unseen_ua": found, "seeds": seeds, "words": [*WORDS, *options.words]}
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
