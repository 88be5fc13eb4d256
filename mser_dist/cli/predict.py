"""The verb `predict` of the ``mser`` command."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from mser_dist import tables
from mser_dist.cli.jobs import Verb
from mser_dist.errors import UserError

_SHOWN = 20  # recordings left out that are named on the terminal; the files name all

_PREDICT_HELP = """\
Ask a trained model which emotion recordings express, with a probability for each label.

  mser predict runs/demo/stage2 x.wav
  mser predict runs/demo/stage2 recordings/ --labels "calm,furious,bored" --top 3
  mser predict runs/demo/stage2 recordings/ --adapt --parquet answers.parquet
  mser predict models:/mser@best shards/mine --split test --csv answers.csv

MODEL is a run folder, an export, or of MLflow (MLFLOW_TRACKING_URI) models:/NAME@ALIAS or runs:/ID. RECORDINGS are
audio files, folders of them, and sets of shards. Labels may be any words. A recording that is longer than a window is
cut into windows; its answer is their mean over time, and each window is listed too.

A file that cannot be read as audio is left out and named, and the others are done. With a file to write, what is known
is kept beside it: stopped, the same command goes on where it was.
"""


def add_verbs(verb: Verb, config_words: Callable[[argparse.ArgumentParser], None]) -> None:
    """Register the verb, which takes no config."""
    sub = verb("predict", _predict, "name the emotions in recordings", _PREDICT_HELP)
    sub.add_argument("model", metavar="MODEL", help="run folder, export, models:/NAME@ALIAS or runs:/ID")
    sub.add_argument("recordings", metavar="RECORDINGS", nargs="+", help="audio file, folder, or set of shards")
    sub.add_argument("--labels", metavar="A,B", help="labels to choose from (default: those of the training)")
    sub.add_argument("--top", type=int, default=1, metavar="K", help="show the K likeliest labels (default: 1)")
    sub.add_argument(
        "--adapt",
        action="store_true",
        help="normalise by how these recordings sound on the whole (where encoder.normalize was on in training)",
    )
    for kind in ("json", "csv", "parquet"):
        sub.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"write all labels' probabilities to FILE.{kind}")
    sub.add_argument(
        "--window", type=float, metavar="S", help="seconds of a window (default: data.max_seconds of training)"
    )
    sub.add_argument("--hop", type=float, metavar="S", help="seconds from window to window (default: a window)")
    sub.add_argument("--split", help="of sets of shards: only this one")
    sub.add_argument(
        "--batch", type=int, default=8, metavar="N", help="windows per forward pass (default: %(default)s)"
    )
    sub.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s"
    )


def _predict(options: argparse.Namespace) -> None:
    for name in ("top", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be 1 or more, not {getattr(options, name)}")
    files = []
    for kind in ("json", "csv", "parquet"):
        if path := getattr(options, kind):
            if path.suffix != f".{kind}":
                raise UserError(f"--{kind} {path}: the name of the file ends with .{kind}")
            files.append(path)
    from mser_dist.prediction.job import Asked, predict
    from mser_dist.prediction.model import load_model
    from mser_dist.prediction.outputs import table
    from mser_dist.prediction.recordings import listed

    recordings = listed(options.recordings, options.split)
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    labels = model.check_labels(None if options.labels is None else options.labels.split(","))
    asked = Asked(labels, model.windows(options.window, options.hop), options.adapt, options.batch)
    found = predict(model, recordings, asked, files)
    left_out = [result for result in found if result.prediction is None]
    if not files:
        tables.show(table(found, options.top))
    for result in left_out[:_SHOWN]:
        print(f"mser: left out: {result.recording}: {result.error}", file=sys.stderr)
    if len(left_out) > _SHOWN:
        print(f"mser: left out: {len(left_out) - _SHOWN} more", file=sys.stderr)
    if files or left_out:
        done = tables.count(len(found) - len(left_out), "recording")
        out = f", {len(left_out)} left out" if left_out else ""
        print(f"{done}{out}{': ' if files else ''}{', '.join(map(str, files))}")
