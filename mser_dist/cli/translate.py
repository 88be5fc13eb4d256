"""The verb `translate` of the ``mser`` command."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from mser_dist import tables
from mser_dist.cli.jobs import Verb
from mser_dist.cli.runs import part_of
from mser_dist.errors import UserError

_HELP = """\
Say the recordings of a set again in other languages, with their emotion: what a recording says is written down, put
into the language, spoken as it was spoken, and kept where words and emotion can be heard in it.

  mser translate shards/ravdess shards/ravdess-fr --to fr,de,it --workers 8
  mser translate shards/ravdess shards/cloned --to fr speech.backend=command speech.command="python my_tts.py"
  mser translate shards/ravdess shards/fr --to fr --plan --clips 100000 --price 0.04
  mser translate shards/ravdess shards/fr --to fr selection.scorer=runs/stage1 selection.min_score=0.3

Keys: mser config --keys translate. What is made lies in OUT.made until the set is whole: stopped, the same command goes
on. With --keep-made it stays there, and another selection makes nothing anew. An array of jobs shares the work
(slurm/translate.sh).
"""


def add_verbs(verb: Verb, config_words: Callable[[argparse.ArgumentParser], None]) -> None:
    """Register the verb, which takes a config where one is named."""
    sub = verb("translate", _translate, "carry the emotion of recordings into other languages", _HELP)
    sub.add_argument("set", metavar="SET", help="folder of shards, a .tar, or a URL")
    sub.add_argument("out", type=Path, metavar="OUT", help="folder of shards to make")
    sub.add_argument("words", metavar="key=value", nargs="*", default=[], help="keys; mser config --keys translate")
    sub.add_argument("--to", metavar="fr,de", help="languages, as ISO 639 codes (the key `to`)")
    sub.add_argument("--config", metavar="FILE", help="YAML file of keys")
    sub.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    sub.add_argument(
        "--part", type=part_of, default=(0, 1), metavar="I/N", help="the I-th of N parts of the work, from 0 to N-1"
    )
    sub.add_argument("--merge", action="store_true", help="make nothing: write the set of what the parts have made")
    sub.add_argument("--keep-all", action="store_true", help="select nothing (selection.all=true)")
    sub.add_argument("--keep-made", action="store_true", help="leave OUT.made where it is, to select anew")
    sub.add_argument("--overwrite", action="store_true", help="replace an earlier set in OUT")
    sub.add_argument("--plan", action="store_true", help="try some clips, and say what the whole will take")
    sub.add_argument("--clips", type=int, metavar="N", help="plan: clips to make (default: those of SET)")
    sub.add_argument("--try", type=int, default=4, dest="tried", metavar="N", help="plan: recordings (default: 4)")
    sub.add_argument("--price", type=float, metavar="P", help="plan: of an hour of a core")


def _translate(options: argparse.Namespace) -> None:
    from mser_dist.config.file import load_translation

    for name, least in (("workers", 1), ("tried", 1), ("clips", 1), ("price", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('tried', 'try')} must be {least} or more, not {value:g}")
    for name in ("clips", "price"):
        if getattr(options, name) is not None and not options.plan:
            raise UserError(f"--{name} is of --plan: add --plan, or leave it out")
    to = json.dumps([code.strip() for code in options.to.split(",")]) if options.to else ""  # `no` is no boolean
    words = [*options.words, *([f"to={to}"] if to else [])]
    config = load_translation(options.config, [*words, *(["selection.all=true"] if options.keep_all else [])])
    if options.plan:
        from mser_dist.translation import plan

        tables.show(
            plan.measured(
                options.set,
                config,
                clips=options.tried,
                wanted=options.clips,
                workers=options.workers,
                price=options.price,
            )
        )
        return
    from mser_dist.translation.job import translate

    outcomes = translate(
        options.set,
        options.out,
        config,
        workers=options.workers,
        part=options.part,
        merge=options.merge,
        keep_made=options.keep_made,
        overwrite=options.overwrite,
    )
    if outcomes is not None:
        tables.show(outcomes.table())
        print(f"shards: {options.out}   card: {options.out}/README.md   every clip: {options.out}/selection.csv")
