"""The ``mser`` command: reads the words, runs the verb, and says in one line what ended it."""

import argparse
import difflib
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from mser_dist import __version__
from mser_dist.cli import compare, export, jobs, plan, predict, report, runs, sets, translate
from mser_dist.errors import Stopped, UserError
from mser_dist.quiet import hush
from mser_dist.ranks import preempt
from mser_dist.tables import show_what_can_be

# What the user can mend, where the system names the path.
_MENDABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)


def main(argv: list[str] | None = None) -> int:
    """Run a verb and return the exit code: 0, 2 for a mistake that the user can mend, 75 for a run that was stopped and
    has saved, 130 for Ctrl-C."""
    show_what_can_be()  # first: a help text or an error may hold more letters than the terminal
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        options = _options(sys.argv[1:] if argv is None else argv)
        hush()
        return int(options.run(options) or 0)
    except UserError as error:
        return _leave(debug, f"error: {error}", error.code)
    except Stopped as stop:
        return _leave(debug, str(stop), preempt.SAVED)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = f"error: the disk is full ({error.filename or 'while writing'}): free space and start again"
            return _leave(debug, full, 2)
        if error.errno in _MENDABLE and error.filename is not None:
            what = f"error: {error.filename}: {error.strerror}: name another path, or mend this one"
            return _leave(debug, what, 2)
        raise
    except KeyboardInterrupt:
        _end_bars()
        print("mser: interrupted; the same command continues from the last checkpoint or shard", file=sys.stderr)
        return 130


def _options(argv: list[str]) -> argparse.Namespace:
    """The words of a command as its options; `UserError` for those that it does not take."""
    parser = _parser()
    if argv and not argv[0].startswith("-") and argv[0] not in parser.verbs:
        near = difflib.get_close_matches(argv[0].lower(), parser.verbs, 1)
        hint = f"did you mean `mser {near[0]}`?" if near else f"first comes one of {', '.join(parser.verbs)}"
        raise UserError(f"there is no verb {argv[0]!r}: {hint}")
    options, rest = parser.parse_known_args(argv)
    # argparse takes no more key=value words once an option stood among them: they are what is left over.
    strange = [word for word in rest if word.startswith("-")] if hasattr(options, "words") else rest
    if not strange:
        options.words = getattr(options, "words", []) + rest
        return options
    verb = f"mser {argv[0]}"
    if hasattr(options, "words"):
        key, equals, value = strange[0].lstrip("-").partition("=")
        after = [*rest[rest.index(strange[0]) + 1 :], *options.words, "VALUE"]
        how = f"a key is set without dashes, {key}={value if equals else after[0]}"
        raise UserError(f"{verb} has no option {strange[0]}: {how} (`{verb} --help` lists the options)")
    raise UserError(f"{verb} does not take {' '.join(map(repr, strange))}: `{verb} --help` shows what it takes")


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
        if "mser_dist.encoded.place" in sys.modules:
            from mser_dist.encoded.place import give_back

            give_back()
        os._exit(code)  # a normal exit would wait in the process group's destructor for peers that are still at work
    return code


class _Parser(argparse.ArgumentParser):
    """One whose mistakes are a line, as every other one is, and not a usage of several."""

    verbs: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`{self.prog} --help` shows how)")


def _parser() -> _Parser:
    parser = _Parser(
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
            default=[],
            help="overrides; mser config --keys stage1 lists them",
        )

    for subject in (runs, compare, report, predict, export, sets, translate, plan, jobs):
        subject.add_verbs(verb, config_words)
    parser.verbs = list(verbs.choices)
    return parser
