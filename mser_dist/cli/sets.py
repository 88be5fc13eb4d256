"""The verbs of the ``mser`` command that make and read sets of shards: synth, pack, inspect, verify."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mser_dist import tables
from mser_dist.cli.jobs import Verb
from mser_dist.corpora.parsers import CORPORA
from mser_dist.errors import UserError
from mser_dist.shards.metadata import SPLITS

_PACK_HELP = """\
Make shards from a corpus, with speaker-disjoint train, val and test splits.

  mser pack emodb data/emodb shards/emodb
  mser pack manifest clips.csv shards/mine      CSV, TSV or JSONL: path, emotion, language, speaker
                                                (optional: id, label, gender, text, split, source_id, corpus)
  mser pack manifest clips.csv shards/polish --column path=file --column speaker=actor --language pl --split test
  mser pack iemocap data/IEMOCAP shards/iemocap --map excitement=happy --skip-bad 5

Interrupted, the same command goes on from the finished shards, which wait in OUT.partial.

CORPUS, its language and clips, and how it lies in the folder SRC:
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

    pack = verb("pack", _pack, "make shards from a corpus or a list of files", _PACK_HELP + _corpora_help())
    pack.add_argument("corpus", metavar="CORPUS", help="manifest, emodb, … (listed above)")
    pack.add_argument("src", type=Path, metavar="SRC", help="the corpus folder, or the manifest file")
    pack.add_argument("out", type=Path, metavar="OUT", help="folder of shards to make")
    pack.add_argument("--column", action=_Pairs, metavar="OURS=THEIRS", help="manifest: its name of a column (repeat)")
    pack.add_argument("--language", metavar="CODE", help="manifest: the language of all clips, where no column says it")
    pack.add_argument("--corpus", dest="corpus_name", metavar="NAME", help="manifest: the corpus of all clips")
    pack.add_argument("--map", action=_Pairs, metavar="WORD=LABEL", help="what an emotion's word means (repeat)")
    pack.add_argument(
        "--skip-bad",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N files that cannot be read, and list them",
    )
    pack.add_argument("--split", choices=SPLITS, help="put all clips into this one, as a zero-shot test")
    pack.add_argument(
        "--val-fraction", type=float, help="share of the clips (default: 0.1, where the speakers suffice)"
    )
    pack.add_argument(
        "--test-fraction", type=float, help="share of the clips (default: 0.2, where the speakers suffice)"
    )
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


def _corpora_help() -> str:
    rows = [(name, corpus.language, corpus.clips or "", corpus.layout) for name, corpus in CORPORA.items()]
    return "".join(f"  {name:<12} {language:<4}{clips:>6}  {layout}\n" for name, language, clips, layout in rows)


class _Pairs(argparse.Action):
    """`--option a=b --option c=d` as {a: b, c: d}."""

    def __call__(self, parser: object, options: argparse.Namespace, text: object, option: str | None = None) -> None:
        name, equals, value = (part.strip() for part in str(text).partition("="))
        if not (name and equals and value):
            raise UserError(f"{option} {text}: give it as {option} {self.metavar}")
        pairs: dict[str, str] = getattr(options, self.dest) or {}
        if name in pairs:
            raise UserError(f"{option} {text}: {name} is {pairs[name]} already; give it once")
        setattr(options, self.dest, pairs | {name: value})


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
        split=options.split,
        columns=options.column,
        constants={
            name: value for name, value in (("language", options.language), ("corpus", options.corpus_name)) if value
        },
        words=options.map,
        skip_bad=options.skip_bad,
        audio_format=options.format,
        max_seconds=options.max_seconds,
        scale=options.scale,
        drop_duplicates=options.drop_duplicates,
        overwrite=options.overwrite,
    )
    print(f"{summary['out']}: {summary['clips']} clips, {summary['hours']:.2f} h, in {summary['seconds']:.0f} s")
    for name, part in summary["splits"].items():
        print(f"  {name:<6} {part['clips']:>7} clips, {part['speakers']} speakers")
    for group, missing in summary["without"].items():
        if free := [name for name in missing if getattr(options, f"{name}_fraction") is None]:
            remedy = "; --split test makes all a test" if "test" in free else ""
            print(f"  no {', no '.join(free)}: the speakers do not suffice in {group}{remedy}")
    if not summary["splits"]["val"]["clips"] and summary["splits"]["train"]["clips"]:
        print("  train with data.val_split=null, as there is no val")
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
    if summary["left_out"]["clips"]:
        print(f"  left out, for they cannot be read: {summary['left_out']['clips']}, see {summary['left_out']['list']}")
    if summary["shared_speakers"]:
        print(f"  warning: {summary['shared_speakers']} speakers are in more than one split, as the source prescribes")


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
        for line in repeats.lines(repeats.describe(ShardSet(gathered.table(), None))):
            print(line)
    return 1 if found else 0
