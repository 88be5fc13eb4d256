"""The ``mser`` command: thin, one function a verb. Heavy imports stay inside the verbs: --help answers at once."""

import argparse
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from mser_dist import __version__
from mser_dist.cli import jobs
from mser_dist.errors import Stopped, UserError
from mser_dist.quiet import hush
from mser_dist.ranks import preempt

_TRAIN_HELP = """\
Train stage 1 (align) or stage 2 (instruct); the key `stage` of the config decides. One command for every launcher:

  mser train CONFIG                            one process
  mser train CONFIG --nproc 2                  two processes on this machine
  torchrun --nproc-per-node 8 -m mser_dist train CONFIG
  srun mser train CONFIG                       one rank per task (see slurm/stage1.sh)

CONFIG is a YAML file or the name of a preset (`mser config` lists them). Words behind it override keys:

  mser train demo_stage1 train.lr=3e-4 data.sets=shards/a,shards/b out=runs/try

The same command on an unfinished run folder continues from its newest checkpoint. Ctrl-C, TERM, USR1 or USR2 to any
rank: all ranks save the step and the command ends with exit code 75; Ctrl-C twice ends it without saving.
"""
_EVAL_HELP = """\
Evaluate finished runs: stage 1 by cosine to label prompts, stage 2 by the log-likelihood of every label, per corpus and
language. Prints the table; writes it, the predictions and the plots to `out`, and to MLflow.

  mser eval demo_eval stage1=runs/demo/stage1 stage2=runs/demo/stage2 data.sets=runs/demo/shards
"""
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
_DEMO_HELP = """\
From nothing to a zero-shot table: synthesise emotional speech in nine languages, train both stages on two workers under
DeepSpeed ZeRO-3, evaluate on Greek, Russian and Persian, which were never heard, and track it all in MLflow.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a verb and return the exit code: 0, 2 for a mistake that the user can mend, 75 for a run that was stopped and
    has saved, 130 for Ctrl-C."""
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

    demo = verb("demo", _demo, "from nothing to a zero-shot table, on a laptop", _DEMO_HELP)
    demo.add_argument(
        "--out", default="runs/demo", type=Path, help="folder of everything it makes (default: %(default)s)"
    )
    demo.add_argument(
        "--llm", choices=("tiny", "smollm2"), default="tiny", help="tiny: made on the spot (default); smollm2: 135M"
    )
    demo.add_argument("--nproc", type=int, default=2, metavar="N", help="worker processes (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of data, weights and order (default: %(default)s)")
    demo.add_argument("--shards", type=Path, help="use this synthetic set instead of making one")
    demo.add_argument(
        "--shuffle-labels", action="store_true", help="control: permuted training labels must end at chance"
    )
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo in --out")

    for name, run, help, more in (
        ("train", _train, "train stage 1 or stage 2 from a config", _TRAIN_HELP),
        ("eval", _eval, "zero-shot evaluation of finished runs", _EVAL_HELP),
    ):
        sub = verb(name, run, help, more)
        config_words(sub)
        sub.add_argument("--nproc", type=int, metavar="N", help="start N processes on this machine")

    config = verb("config", _config, "list presets, print a resolved config, or explain the keys")
    config.add_argument("config", nargs="?", metavar="CONFIG", help="print this config with every default resolved")
    config.add_argument("words", metavar="key=value", nargs="*", help="overrides")
    config.add_argument("--keys", choices=("stage1", "stage2", "eval"), help="explain every key of a kind of config")

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
    pack.add_argument("--val-fraction", type=float, default=0.1, help="share of the speakers (default: %(default)s)")
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
    pack.add_argument("--overwrite", action="store_true", help="replace an earlier set in OUT")

    look = verb("inspect", _inspect, "show what is in sets of shards: a table, plots", _INSPECT_HELP)
    look.add_argument("sets", metavar="SET", nargs="+", help="folder of shards, a .tar, or a URL")
    look.add_argument("--split", help="only this one")
    look.add_argument("--out", type=Path, metavar="FOLDER", help="draw the plots into this folder")
    look.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, and all shared speakers, to a file")

    check = verb("verify", _verify, "check every hash, count and clip of sets of shards")
    check.add_argument("sets", metavar="SET", nargs="+", help="folder of shards")

    jobs.add_verbs(verb, config_words)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from mser_dist.cli.demo import demo

    demo(
        options.out,
        llm=options.llm,
        nproc=options.nproc,
        seed=options.seed,
        shards=options.shards,
        shuffle_labels=options.shuffle_labels,
        overwrite=options.overwrite,
    )


def _ranks(options: argparse.Namespace, verb: str) -> int | None:
    """Start the ranks of ``--nproc``; None where this process is itself a rank."""
    if options.nproc is None or "RANK" in os.environ:
        return None
    if options.nproc < 1:
        raise UserError(f"--nproc must be 1 or more, not {options.nproc}")
    from mser_dist.jobs.local_ranks import local

    debug = ["--debug"] if options.debug else []
    return local(options.nproc, [verb, options.config, *options.words, *debug])


def _train(options: argparse.Namespace) -> int:
    from mser_dist.config.file import load_training

    config = load_training(options.config, options.words)
    code = _ranks(options, "train")
    if code is not None:
        return code
    with preempt.listen():  # from here on: a signal that comes while torch is imported is not lost
        from mser_dist.ranks import distributed
        from mser_dist.training.loop import train

        summary = train(config)
    if distributed.discover().is_main:
        val = ", ".join(f"{name} {value:.3f}" for name, value in summary["validation"].items()) or "none"
        print(f"stage {summary['stage']}: {summary['steps']} steps in {summary['seconds']:.0f} s; validation: {val}")
        print(f"  model: {config.out}/export   curves: {config.out}/curves.png   log: {config.out}/log.jsonl")
    distributed.shutdown()
    return 0


def _eval(options: argparse.Namespace) -> int:
    from mser_dist.config.file import load_evaluation

    config = load_evaluation(options.config, options.words)
    code = _ranks(options, "eval")
    if code is not None:
        return code
    from mser_dist.evaluation.evaluate import evaluate, format_table
    from mser_dist.ranks import distributed

    report = evaluate(config)
    if distributed.discover().is_main:
        print(format_table(report["zero_shot"]))
        print(f"table, predictions and plots: {config.out}")
    distributed.shutdown()
    return 0


def _config(options: argparse.Namespace) -> None:
    from mser_dist import config
    from mser_dist.config import file as config_file

    if options.keys:
        from mser_dist.config.fields import key_table

        cls = {"stage1": config.Stage1, "stage2": config.Stage2, "eval": config.Evaluation}[options.keys]
        for key, kind, default, help in key_table(cls):
            print(f"{key} ({kind}) = {default}\n    {help}")
    elif options.config:
        resolved = config_file.load_any(options.config, options.words)
        print(config_file.to_yaml(resolved), end="")
    else:
        for path in sorted(config_file.PRESETS.glob("*.yaml")):
            print(f"{path.stem:<40} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")


def _synth(options: argparse.Namespace) -> None:
    from mser_dist.synth.speech import SynthConfig
    from mser_dist.synth.write import write_set

    changes = {"train_takes": options.takes} if options.takes else {}
    write_set(options.out, SynthConfig(seed=options.seed, **changes), overwrite=options.overwrite)
    print(f"shards: {options.out}")


def _pack(options: argparse.Namespace) -> None:
    from mser_dist.corpora.pack import pack

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
        overwrite=options.overwrite,
    )
    print(f"{summary['out']}: {summary['clips']} clips, {summary['hours']:.2f} h, in {summary['seconds']:.0f} s")
    for name, part in summary["splits"].items():
        print(f"  {name:<6} {part['clips']:>7} clips, {part['speakers']} speakers")
    for key in ("emotions", "languages", "dropped"):
        if summary[key]:
            print(f"  {key}: " + ", ".join(f"{name} {value}" for name, value in summary[key].items()))
    if summary["shared_speakers"]:
        print(
            f"  warning: {summary['shared_speakers']} speakers are in more than one split, as the manifest prescribes"
        )


def _inspect(options: argparse.Namespace) -> None:
    from mser_dist.shards.inspect import describe, draw, format_report
    from mser_dist.shards.shard_set import ShardSet

    shards = ShardSet.open(options.sets, split=options.split)
    report = describe(shards)
    print(format_report(report))
    try:
        if options.json:
            from mser_dist.files import write_json

            write_json(options.json, report)
            print(f"numbers: {options.json}")
        if options.out:
            draw(shards, options.out)
            print(f"plots: {options.out}")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror}); choose another place") from None


def _verify(options: argparse.Namespace) -> int:
    from mser_dist.shards.verify import verify

    found = 0
    for path in options.sets:
        problems = verify(path, progress=True)
        for problem in problems:
            print(problem)
        print(f"{path}: {'no problem found' if not problems else f'problems: {len(problems)}'}")
        found += len(problems)
    return 1 if found else 0
