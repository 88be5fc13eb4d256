"""The ``mser`` command: reads the words, runs the verb, and says in one line what ended it."""

import argparse
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from mser_dist import __version__
from mser_dist.cli import jobs, runs, sets
from mser_dist.errors import Stopped, UserError
from mser_dist.quiet import hush
from mser_dist.ranks import preempt
from mser_dist.tables import show_what_can_be


def main(argv: list[str] | None = None) -> int:
    """Run a verb and return the exit code: 0, 2 for a mistake that the user can mend, 75 for a run that was stopped and
    has saved, 130 for Ctrl-C."""
    show_what_can_be()  # first: a help text may hold more letters than the terminal
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    # argparse takes no more key=value words once an option stood among them: they are what is left over.
    if not hasattr(options, "words") or any(word.startswith("-") for word in rest):
        options = parser.parse_args(argv)  # its own error for what is really wrong
    else:
        options.words += rest
    hush()
    try:
        return int(options.run(options) or 0)
    except UserError as error:
        return _leave(options.debug, f"error: {error}", error.code)
    except Stopped as stop:
        return _leave(options.debug, str(stop), preempt.SAVED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = f"error: the disk is full ({error.filename or 'while writing'}): free space and start again"
        return _leave(options.debug, full, 2)
    except KeyboardInterrupt:
        _end_bars()
        print("mser: interrupted; the same command continues from the last checkpoint or shard", file=sys.stderr)
        return 130


def _end_bars() -> None:
    """A bar that an error left open would share its line with the message."""
    if "mser_dist.progress" in sys.modules:
        from mser_dist.progress import end_bars

        end_bars()


def _leave(debug: bool, message: str, code: int) -> int:
    """Say one line and end with `code`: of a mistake each rank speaks, of an orderly stop only rank 0."""
    _end_bars()
    if debug:
        traceback.print_exc()
    srun = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"  # before or after `distributed.init` has set RANK
    rank = os.environ.get("RANK") or (os.environ.get("SLURM_PROCID", "0") if srun else "0")
    several = srun or os.environ.get("WORLD_SIZE", "1") != "1"
    if srun and rank != "0" and code == 2:
        # Most mistakes are every rank's: rank 0 says it, srun then ends the others, and they need not say it again.
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(code))
        if preempt.heard:  # srun was faster
            os._exit(code)
        time.sleep(10)
    if several:  # a launcher that ends its ranks should see the code of one that has spoken, not the signal's
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank == "0" or message.startswith("error"):
        text = message if rank == "0" else message.replace("error:", f"error (rank {rank}):", 1)
        print(f"mser: {' '.join(text.split())}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if several and "torch" in sys.modules:
        os._exit(code)  # a normal exit would wait in the process group's destructor for peers that are still at work
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mser",
        description="Zero-shot multilingual speech emotion recognition: align speech with emotion-aware language by "
        "contrastive learning (stage 1), fine-tune a whole LLM on top (stage 2), name emotions in unseen languages.",
        epilog="Start with: mser demo",
    )
    parser.add_argument("--version", action="version", version=f"mser {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(
        name: str, run: Callable[[argparse.Namespace], int | None], help: str, more: str = ""
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name, help=help, description=more or help, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run)
        return sub

    def config_words(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", metavar="CONFIG", help="YAML file or preset name")
        sub.add_argument(
            "words",
            metavar="key=value",
            nargs="*",
            help="overrides; mser config --keys stage1 lists them",
        )

    for subject in (runs, sets, jobs):
        subject.add_verbs(verb, config_words)
    return parser
