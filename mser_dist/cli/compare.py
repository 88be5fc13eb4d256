"""``mser compare``: which of many runs is best, by how much, and in what they differ."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

from mser_dist import tables
from mser_dist.cli.jobs import Verb
from mser_dist.errors import UserError

_HELP = """\
One table of many runs, the best first: the parameters that differ, the mean ± standard deviation over seeds, the 95 %
interval over speakers, and the difference to the best with its own, by a bootstrap that draws the same speakers for
both. Nothing is computed anew: it reads what the runs have written.

  mser compare runs/lr/*/                                  run folders; a folder of runs stands for them
  mser compare runs/eval runs/baseline --model stage2,svm
  mser compare --experiment mser-real --by train.lr --out runs/compared

RUN is the folder of an evaluation, a baseline, a cross-validation, or of a training, which is compared by its
validation unless an evaluation of it is among them. --experiment takes the runs of an MLflow experiment; predictions
are read from the run's folder where it is still there, else from MLflow.

The metric is the mean over the languages that none of the runs was trained on, or over all where there are none. Runs
that answered to other clips, or with other labels to choose from, have a table of their own, and so have systems that
are adapted to the clips. --out writes compare.md, .csv, .html, .png and .svg.
"""


def add_verbs(verb: Verb, config_words: Callable[[argparse.ArgumentParser], None]) -> None:
    """Register the verb, which takes no config."""
    compare = verb("compare", _compare, "one table of many runs, the best first", _HELP)
    compare.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders, or folders of them")
    compare.add_argument("--experiment", metavar="E", help="the runs of this MLflow experiment, by name or id")
    compare.add_argument("--uri", help="of MLflow (default: MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db)")
    compare.add_argument("--metric", choices=("ua", "wa", "macro_f1"), default="ua", help="default: %(default)s")
    compare.add_argument("--by", metavar="KEY", help="sort by this parameter, and draw the metric against it")
    compare.add_argument("--model", type=_listed, default=[], metavar="A,B", help="these alone, e.g. stage2,svm")
    compare.add_argument("--language", type=_listed, default=[], metavar="A,B", help="the mean over these alone")
    compare.add_argument("--common", action="store_true", help="on the clips alone that all runs predicted")
    compare.add_argument("--out", type=Path, metavar="FOLDER", help="write the tables and the plot there")


def _listed(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _compare(options: argparse.Namespace) -> None:
    if bool(options.runs) == (options.experiment is not None):
        raise UserError("name either run folders or --experiment E (`mser compare --help` shows how)")
    if options.uri and options.experiment is None:
        raise UserError("--uri is where --experiment E is looked up: run folders are read as they are")
    from mser_dist.evaluation import compare_report, gathered
    from mser_dist.evaluation.compare import compare
    from mser_dist.evaluation.systems import of_model
    from mser_dist.runs.page import pages

    if options.out:
        compare_report.check_out(options.out)
    store = None
    if options.experiment is not None:
        from mser_dist.runs.stored import Store

        store = Store(options.uri)
        systems, notes = gathered.of_experiment(store, options.experiment)
    else:
        systems, notes = gathered.of_folders(options.runs)
    if options.model:
        systems = of_model(systems, options.model)
    found = compare(systems, options.metric, options.by, options.language, options.common, notes)
    tables.show(*compare_report.shown_parts(found))
    if options.out:
        compare_report.write(found, options.out, _command(options))
        print(f"\ntables and plot: {options.out}/compare.html, .md, .csv, .png, .svg")
    line = store.page() if store else pages(options.runs)
    if line:
        print(line)


def _command(options: argparse.Namespace) -> str:
    """The command as it was typed, without what a URI may hold of passwords."""
    from mser_dist.runs.record import redact

    words = ["mser", "compare", *map(str, options.runs)]
    lists = {"model": ",".join(options.model), "language": ",".join(options.language)}
    named = {"experiment": options.experiment, "uri": options.uri and redact(options.uri), "metric": options.metric}
    for name, value in {**named, "by": options.by, **lists, "out": str(options.out)}.items():
        words += [f"--{name}", value] if value else []
    return shlex.join([*words, *(["--common"] if options.common else [])])
