"""``mser report``: the page of an evaluation, to be opened from an e-mail."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mser_dist.cli.jobs import Verb

_HELP = """\
The page of a finished evaluation or baseline: what was trained on what, the table with intervals, UA by language, the
confusions, a map of the clips, calibration, the worst confusions, and the commands to repeat it. One file that needs no
other and no network. Nothing is computed anew: it reads what the evaluation has written. `mser eval` writes it too.

  mser report runs/eval                                     writes runs/eval/report.html
  mser report runs/eval --baseline runs/eval_baseline       beside other results on the same clips
  mser report runs/eval --audio --out page.html             the worst confusions can be heard

--audio puts recordings into the file, up to 6 MB, read from the sets that were evaluated. Without it there are none.
"""


def add_verbs(verb: Verb, config_words: Callable[[argparse.ArgumentParser], None]) -> None:
    """Register the verb, which takes no config."""
    report = verb("report", _report, "the page of an evaluation, in one file", _HELP)
    report.add_argument("folder", type=Path, metavar="EVAL_FOLDER", help="of `mser eval` or `mser baseline`")
    report.add_argument(
        "--baseline",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER",
        help="others on the same clips",
    )
    report.add_argument("--audio", action="store_true", help="put the recordings of the worst confusions into it")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in EVAL_FOLDER")


def _report(options: argparse.Namespace) -> None:
    from mser_dist.evaluation import page

    out, notes = page.write(options.folder, options.baseline, audio=options.audio, out=options.out)
    for line in notes:
        print(f"note: {line}")
    print(f"page: {out}")
