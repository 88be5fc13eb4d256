"""The verbs of the ``mser`` command that make and read sets of shards: synth, pack, inspect, verify."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mser_dist import tables
from mser_dist.cli.jobs import Verb
from mser_dist.errors import UserError

_PACK_HELP = """\
Make shards from a corpus, with speaker-disjoint train, val and test splits.

  mser pack emodb data/emodb shards/emodb
  mser pack manifest clips.csv shards/mine      CSV, TSV or JSONL: path, emotion, language, speaker
                                                (optional: id, label, gender, text, split, source_id, corpus)

Interrupted, the same command goes on from the finished shards, which wait in OUT.partial.
"""
_INSPECT_HELP = """\
Show what is in sets of shards, by their indexes alone: clips, hours, speakers and durations of each split, languages,
labels, corpora, and what one should know before a training, such as a speaker in two splits.

  mser inspect shards/mine --out plots
"""


def add_verbs(verb: Verb, config_words: Callable[[argparse.ArgumentParser], None]) -> None:
    """Register the verbs, none of which takes a config."""
    synth = verb("synth", _synth, "synthesise an M5SER-style multilingual set with eSpeak NG")
    synth.add_argument("out", type=Path, metavar="OUT", help="folder of shards to make")
    synth.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")
    synth.add_argument(
        "--takes", type=int, help="takes of each sentence and emotion in train (default: that of the demo)"
    )
    synth.add_argument("--overwrite", action="store_true", help="replace an earlier set in OUT")

    pack = verb("pack", _pack, "make shards from a corpus or a list of files", _PACK_HELP)
    pack.add_argument("corpus", metavar="CORPUS", help="manifest, emodb, … (an unknown name lists them)")
    pack.add_argument("src", type=Path, metavar="SRC", help="the corpus folder, or the manifest file")
    pack.add_argument("out", type=Path, metavar="OUT", help="folder of shards to make")
    pack.add_argument("--val-fraction", type=float, help="share of the speakers (default: 0.1; of two speakers, none)")
    pack.add_argument("--test-fraction", type=float, default=0.2, help="share of the speakers (default: %(default)s)")
    pack.add_argument("--test-speakers", default="", metavar="A,B", help="these speakers make the test split")
    pack.add_argument("--folds", type=int, metavar="K", help="cross-validation: cut the speakers in K test sets …")
    pack.add_argument("--fold", type=int, default=0, metavar="I", help="… and test on number I (default: %(default)s)")
    pack.add_argument("--seed", type=int, default=0, help="seed of the split (default: %(default)s)")
    pack.add_argument(
        "--format", choices=("flac", "wav"), default="flac", help="audio in the shards (default: %(default)s)"
    )
    pack.add_argument(
        "--max-seconds", type=float, default=40.0, metavar="S", help="refuse longer clips (default: %(default)g)"
    )
    pack.add_argument(
        "--scale",
        action="store_true",
        help="divide clips beyond full scale, which are refused else: by 32768 where samples reach past 32 (16-bit "
        "integers in a float file), otherwise by the clip's peak, after resampling too, so that none is clipped",
    )
    pack.add_argument(
        "--drop-duplicates", action="store_true", help="of clips of identical audio keep the first in SRC's order"
    )
    pack.add_argument("--overwrite", action="store_true", help="replace an earlier set in OUT")

    look = verb("inspect", _inspect, "show what is in sets of shards: a table, plots", _INSPECT_HELP)
    look.add_argument("sets", metavar="SET", nargs="+", help="folder of shards, a .tar, or a URL")
    look.add_argument("--split", help="only this one")
    look.add_argument("--out", type=Path, metavar="FOLDER", help="draw the plots into this folder")
    look.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, and all shared speakers, to a file")

    check = verb("verify", _verify, "check every hash, count and clip of sets of shards")
    check.add_argument("sets", metavar="SET", nargs="+", help="folder of shards")


def _synth(options: argparse.Namespace) -> None:
    from mser_dist.synth.speech import SynthConfig
    from mser_dist.synth.write import write_set

    if options.takes is not None and options.takes < 1:
        raise UserError(f"--takes must be 1 or more, not {options.takes}")
    changes = {"train_takes": options.takes} if options.takes is not None else {}
    write_set(options.out, SynthConfig(seed=options.seed, **changes), overwrite=options.overwrite)
    print(f"shards: {options.out}")


def _pack(options: argparse.Namespace) -> None:
    from mser_dist.corpora.pack import pack
    from mser_dist.shards import repeats

    summary = pack(
        options.corpus,
        options.src,
        options.out,
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        test_speakers=[name for name in options.test_speakers.split(",") if name],
        folds=options.folds,
        fold=options.fold,
        seed=options.seed,
        audio_format=options.format,
        max_seconds=options.max_seconds,
        scale=options.scale,
        drop_duplicates=options.drop_duplicates,
        overwrite=options.overwrite,
    )
    print(f"{summary['out']}: {summary['clips']} clips, {summary['hours']:.2f} h, in {summary['seconds']:.0f} s")
    for name, part in summary["splits"].items():
        print(f"  {name:<6} {part['clips']:>7} clips, {part['speakers']} speakers")
    if options.val_fraction is None and not summary["splits"]["val"]["clips"] and summary["splits"]["train"]["clips"]:
        print("  no val: the speakers do not suffice for one; train with data.val_split=null, or give --val-fraction")
    for key in ("emotions", "languages", "dropped"):
        if summary[key]:
            print(f"  {key}: " + ", ".join(f"{name} {value}" for name, value in summary[key].items()))
    if loud := summary["full_scale"]["beyond"]:
        most = summary["full_scale"]["decibels"]
        print(f"  clips clipped where a codec or resampling overshot full scale, by up to {most:.2f} dB: {loud}")
    if summary["scaled"]:
        print(f"  clips beyond full scale, divided: {summary['scaled']}")
    if options.drop_duplicates:
        gone = summary["duplicates"]
        other = f"{gone['other_labels']} of another label, {gone['other_splits']} of another split"
        print(f"  clips of audio that an earlier one has, dropped: {gone['clips']} ({other})")
    lines = repeats.lines(summary["identical"])
    for line in lines + (["  --drop-duplicates keeps the first of each"] if lines else []):
        print(f"  {line}")
    if summary["shared_speakers"]:
        print(
            f"  warning: {summary['shared_speakers']} speakers are in more than one split, as the manifest prescribes"
        )


def _inspect(options: argparse.Namespace) -> None:
    from mser_dist.shards.inspect import describe, draw, report_parts
    from mser_dist.shards.shard_set import ShardSet

    shards = ShardSet.open(options.sets, split=options.split, sound=True)
    report = describe(shards)
    tables.show(*report_parts(report))
    if options.json:
        from mser_dist.files import write_json

        with _writable(options.json, "--json"):
            write_json(options.json, report)
        print(f"numbers: {options.json}")
    if options.out:
        with _writable(options.out, "--out"):
            draw(shards, options.out)
        print(f"plots: {options.out}")


@contextmanager
def _writable(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): choose another place with {option}") from None


def _verify(options: argparse.Namespace) -> int:
    from mser_dist.shards import repeats
    from mser_dist.shards.columns import Filter, Gathered
    from mser_dist.shards.shard_set import ShardSet
    from mser_dist.shards.verify import verify

    found = 0
    gathered = Gathered(Filter(None, None, {}, {}), sound=True)
    for path in dict.fromkeys(path.rstrip("/") or path for path in options.sets):  # one named twice is one set
        problems = verify(path, progress=True, into=gathered)
        for problem in problems:
            print(problem)
        print(f"{path}: {'no problem found' if not problems else f'problems: {len(problems)}'}")
        found += len(problems)
    if gathered.shards:
        for line in repeats.lines(repeats.describe(ShardSet(gathered, None))):
            print(line)
    return 1 if found else 0
