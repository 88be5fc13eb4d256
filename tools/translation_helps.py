"""Does translated speech help? Stage 1 trained with and without it, several seeds, tested on other recorded languages.

    python tools/translation_helps.py [--shards shards] [--out runs/translation] [--to de,it] [--seeds 0,1,2]

SHARDS holds the packed sets of the README's part on recorded speech: ravdess, emovo, emodb_uncut; nemo and korean, on
which is tested and which no step sees. Trained on:

- english     ravdess
- espeak      and what eSpeak alone says of its translations: words of no emotion, with a label
- transplant  and its translations with the recordings' prosody, all of them
- selected    of these what `mser translate` keeps: by Whisper's errors, and a probe of ravdess that hears the label
- recorded    ravdess, emovo and emodb_uncut: what recordings in the languages themselves are worth

Each is `real_stage1` of every seed, and `mser compare` tells them apart, with intervals by speaker. What is there is
kept: stopped, the same command goes on. With half of ravdess' speakers it took 53 minutes of two cores, beside other
work.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from mser_dist.cli import main as cli

CONDITIONS = "english,espeak,transplant,selected,recorded"
ENGLISH, RECORDED, TESTED = "ravdess", ("emovo", "emodb_uncut"), ("nemo", "korean")


def mser(*words: object) -> None:
    """Run a command of the package; its error line and exit code are this script's."""
    line = [str(word) for word in words]
    print(f"\n▶ mser {' '.join(line)}", flush=True)
    if code := cli.main(line):
        sys.exit(code)


def sets(options: argparse.Namespace) -> dict[str, list[Path]]:
    """Those of each condition that is asked for; makes what is not there."""
    english, made = options.shards / ENGLISH, options.out / "shards"
    made.mkdir(parents=True, exist_ok=True)
    asked = options.only.split(",")
    what = ["--to", options.to, "split=[train,val,test]", "--workers", options.workers]
    if options.speakers:
        what.append(f"keep={json.dumps({'speaker': options.speakers.split(',')})}")
    if "espeak" in asked:
        plain = ["speech.backend=espeak", "selection.whisper=null", "--keep-all"]
        mser("translate", english, made / "espeak", *what, *plain)
    scored = [*what, f"selection.probe=[{english}]", "--keep-made"]
    if {"selected", "transplant"} & set(asked):
        mser("translate", english, made / "selected", *scored)
    if "transplant" in asked:
        if not (made / "transplant").exists() and not (made / "transplant.made").exists():
            shutil.copytree(made / "selected.made", made / "transplant.made")  # the same clips, otherwise selected
        mser("translate", english, made / "transplant", *scored, "--keep-all")
    others: dict[str, list[Path]] = {"english": [], "recorded": [options.shards / name for name in RECORDED]}
    return {name: [english, *others.get(name, [made / name])] for name in asked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=Path("shards"), help="packed sets (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/translation"), help="default: %(default)s")
    parser.add_argument("--to", default="de,it", help="languages (default: %(default)s, those of `recorded`)")
    parser.add_argument("--speakers", help="of ravdess, whose clips are translated, by comma (default: all)")
    parser.add_argument("--only", default=CONDITIONS, help="conditions (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("words", metavar="key=value", nargs="*", help="keys of each training, e.g. train.steps=20")
    options = parser.parse_args()
    tested = ",".join(str(options.shards / name) for name in TESTED)
    evaluations = []
    for name, which in sets(options).items():
        for seed in options.seeds.split(","):
            trained = options.out / f"{name}-{seed}"
            keys = [f"data.sets=[{','.join(map(str, which))}]", f"seed={seed}", *options.words]
            track = f"tracking.experiment=mser-translation tracking.run_name={trained.name}".split()
            mser("train", "real_stage1", *keys, *track, f"out={trained}", "--nproc", options.workers)
            evaluations.append(options.out / f"{trained.name}-eval")
            test = [f"data.sets=[{tested}]", f"stage1={trained}", "stage2=null", f"out={evaluations[-1]}"]
            mser("eval", "real_eval", *test, *track[:1], f"tracking.run_name={trained.name}-eval")
    mser("compare", *evaluations, "--out", options.out / "compare")


if __name__ == "__main__":
    main()
