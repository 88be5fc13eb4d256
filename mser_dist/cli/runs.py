"""The verbs of the ``mser`` command that train and evaluate: demo, train, eval, features, folds, baseline, config."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from mser_dist import tables
from mser_dist.cli.jobs import Verb, say_page
from mser_dist.errors import UserError
from mser_dist.ranks import preempt

_DEMO_HELP = """\
From nothing to a zero-shot table: synthesise emotional speech in nine languages, train both stages (a frozen Whisper
encoder, a small LLM made on the spot) on two workers under DeepSpeed ZeRO-3, evaluate on Greek, Russian and Persian,
which were never heard, and track it all in MLflow.
"""
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
_FOLDS_HELP = """\
Cross-validation by speaker: cuts the speakers of data.sets into K folds, trains on the speakers of all other folds and
tests on the fold's own, so that every clip is tested once, by a model that has not heard its voice; then pools.

  mser folds emodb_stage1 data.sets=shards/emodb out=runs/emodb-folds --nproc 2
  mser folds emodb_stage1 --stage2 emodb_stage2 train.epochs=20 stage2.train.epochs=5 out=runs/emodb-folds

Speakers are whole, and folds have about as many clips; the same set gives the same folds. All splits of the set take
part (data.split=all), and none is for validation (data.val_split=null), unless words say otherwise. Words are for stage
1; those of data., engine., tracking. and seed also for stage 2, which has its own behind `stage2.`.

In `out`: table.txt (each fold, all clips pooled, mean and standard deviation over folds), predictions.parquet with a
column `fold`, folds.json, and the run folders fold01-stage1, fold01-eval …, each of which `mser train` or `mser eval`
repeats from its config.yaml. In MLflow they are children of one run, which has the pooled scores.

Ctrl-C ends it with exit code 75, and the same command goes on: what is done is not done again.
"""
_FEATURES_HELP = """\
Compute ahead what a frozen encoder makes of the clips of a training (its training and validation split) or of an
evaluation, so that the run itself begins at once: each clip once, kept on a disk, found by every later run that has the
same encoder. A run without it does the same when it starts.

  mser features my_stage1.yaml --dry-run                         how much there is to do
  mser features my_stage1.yaml --nproc 2                         two processes on this machine
  mser features my_stage1.yaml encoder.cache_dir=/shared/features --part 0/8
  sbatch --array=0-7 slurm/features.sh my_stage1.yaml            a job array: each job one of eight parts

Parts are counted from 0, as SLURM counts the jobs of an array. They share a folder that all see: encoder.cache_dir, or
MSER_FEATURES, here and in the run that reads them. Stopped (Ctrl-C, TERM, USR1 or USR2: exit code 75), the same command
goes on with what is missing.
"""
_BASELINE_HELP = """\
Baselines for a table of `mser eval`: what usual classifiers make of the same training clips, tested on the same clips
with the same labels and metrics. CONFIG is that of a stage 1 with a frozen encoder (its data, encoder and seed are
used; nothing is trained but the classifiers), EVAL that of an evaluation (its runs are not looked at).

  mser baseline CONFIG --on EVAL
  mser baseline CONFIG --on EVAL encoder.layers=3 on.data.sets=shards/nemo out=runs/nemo/baseline

Words override keys of CONFIG; those that begin with on. override keys of EVAL; out is the folder of the table, by
default that of EVAL with _baseline behind it.

  majority                     the most frequent training label, for every clip
  logistic_regression, svm     on the encoder's features, averaged over a clip's frames (several layers side by side),
                               standardised; labels count alike, however many clips they have. Logistic regression has
                               C = 1.5 / D of D numbers a clip, the SVM an RBF kernel, C = 1, and a time that grows
                               with the square of the clips
  egemaps_logistic_regression, the same on openSMILE's eGeMAPSv02 functionals, 88 numbers a clip. Only where openSMILE
  egemaps_svm                  is installed, pip install 'mser-dist[opensmile]': its licence allows private use,
                               research and education alone

Each classifier has two sections of the table: as it is, and `adapted`, with every corpus (encoder.normalize=speaker:
every speaker) brought to zero mean and unit variance by its own clips, training's and the test's, without labels.
With encoder.normalize=corpus or speaker the first has training's so too, and the test clips by the mean of training's.
Features are kept as those of a training (encoder.cache): what one has encoded, the other finds. data.workers processes
decode, and compute eGeMAPS. A label of EVAL that no training clip has is never answered, and training labels that EVAL
does not ask about are learned and not answered: set data.labels to those of EVAL to learn no others.
"""


def add_verbs(verb: Verb, config_words: Callable[[argparse.ArgumentParser], None]) -> None:
    """Register the verbs; the two functions are those that ``cli/main.py`` makes all verbs with."""
    demo = verb("demo", _demo, "from nothing to a zero-shot table, on a laptop", _DEMO_HELP)
    demo.add_argument(
        "--out", default="runs/demo", type=Path, help="folder of everything it makes (default: %(default)s)"
    )
    demo.add_argument(
        "--encoder",
        choices=("auto", "small", "whisper-base"),
        default="auto",
        help="whisper-base: pretrained and frozen (auto, the default, where it is installed); small: from scratch",
    )
    demo.add_argument(
        "--llm", choices=("tiny", "smollm2"), default="tiny", help="tiny: made on the spot (default); smollm2: 135M"
    )
    demo.add_argument("--nproc", type=int, metavar="N", help="worker processes (default: 2; 1 where there is one GPU)")
    demo.add_argument("--seed", type=int, default=0, help="seed of data, weights and order (default: %(default)s)")
    demo.add_argument("--shards", type=Path, help="use this synthetic set instead of making one")
    demo.add_argument(
        "--shuffle-labels", action="store_true", help="control: permuted training labels must end at chance"
    )
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo in --out")

    for name, run, help, more in (
        ("train", _train, "train stage 1 or stage 2 from a config", _TRAIN_HELP),
        ("eval", _eval, "zero-shot evaluation of finished runs", _EVAL_HELP),
        ("features", _features, "compute a frozen encoder's features ahead of a run", _FEATURES_HELP),
    ):
        sub = verb(name, run, help, more)
        config_words(sub)
        sub.add_argument("--nproc", type=int, metavar="N", help="start N processes on this machine")
    sub.add_argument("--part", type=part_of, default=(0, 1), metavar="I/N", help="only the I-th of N parts, I from 0")
    sub.add_argument("--dry-run", action="store_true", help="only say how much there is to do")

    folds = verb("folds", _folds, "cross-validation by speaker: train and evaluate every fold, and pool", _FOLDS_HELP)
    config_words(folds)
    folds.add_argument("--stage2", metavar="CONFIG2", help="train a stage 2 on each fold's stage 1, and evaluate both")
    folds.add_argument("--folds", type=int, metavar="K", help="default: 10, or the number of speakers if that is less")
    folds.add_argument("--nproc", type=int, default=1, metavar="N", help="processes of each training (default: 1)")

    baseline = verb("baseline", _baseline, "usual classifiers on the same clips, in the same table", _BASELINE_HELP)
    config_words(baseline)
    baseline.add_argument("--on", required=True, metavar="EVAL", help="config of an evaluation: what to test on")
    baseline.add_argument(
        "--only", type=lambda text: text.split(","), default=[], metavar="A,B", help="these systems alone, or egemaps"
    )

    config = verb("config", _config, "list presets, print a resolved config, or explain the keys")
    config.add_argument("config", nargs="?", metavar="CONFIG", help="print this config with every default resolved")
    config.add_argument("words", metavar="key=value", nargs="*", default=[], help="overrides")
    config.add_argument(
        "--keys", choices=("stage1", "stage2", "eval", "translate"), help="explain every key of a kind of config"
    )


def _demo(options: argparse.Namespace) -> None:
    from mser_dist.cli.demo import demo

    demo(
        options.out,
        encoder=options.encoder,
        llm=options.llm,
        nproc=options.nproc,
        seed=options.seed,
        shards=options.shards,
        shuffle_labels=options.shuffle_labels,
        overwrite=options.overwrite,
    )


def part_of(text: str) -> tuple[int, int]:
    """I/N of an option as numbers."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part = (int(found[1]), int(found[2])) if found else (0, 0)
    if part[0] >= part[1]:
        raise UserError(f"--part {text}: give it as I/N, the I-th of N parts, with I from 0 to N-1, e.g. --part 0/8")
    return part


def _ranks(options: argparse.Namespace, verb: str, more: Sequence[str] = ()) -> int | None:
    """Start the ranks of ``--nproc``; None where this process is itself a rank."""
    if options.nproc is None or "RANK" in os.environ:
        return None
    if options.nproc < 1:
        raise UserError(f"--nproc must be 1 or more, not {options.nproc}")
    from mser_dist.jobs.local_ranks import local

    debug = ["--debug"] if options.debug else []
    return local(options.nproc, [verb, options.config, *options.words, *more, *debug])


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
        steps = tables.count(summary["steps"], "step")
        print(f"stage {summary['stage']}: {steps} in {summary['seconds']:.0f} s; validation: {val}")
        if summary.get("exported_step", summary["steps"]) != summary["steps"]:
            print(f"exported: step {summary['exported_step']}, the best validated one")
        print(f"  model: {config.out}/export   curves: {config.out}/curves.png   log: {config.out}/log.jsonl")
        say_page(Path(config.out))
    distributed.shutdown()
    return 0


def _eval(options: argparse.Namespace) -> int:
    from mser_dist.config.file import load_evaluation

    config = load_evaluation(options.config, options.words)
    code = _ranks(options, "eval")
    if code is not None:
        return code
    from mser_dist.evaluation.evaluate import evaluate
    from mser_dist.evaluation.report import zero_shot_table
    from mser_dist.ranks import distributed

    report = evaluate(config)
    if distributed.discover().is_main:
        tables.show(zero_shot_table(report["zero_shot"]))
        print(f"table, predictions and plots: {config.out}   page: {config.out}/report.html")
        say_page(Path(config.out))
    distributed.shutdown()
    return 0


def _folds(options: argparse.Namespace) -> None:
    from mser_dist.cli.folds import folds

    folds(options.config, options.words, stage2=options.stage2, number=options.folds, nproc=options.nproc)


def _features(options: argparse.Namespace) -> int:
    from mser_dist.config.file import load_any

    config = load_any(options.config, options.words)
    more = ["--part", "/".join(map(str, options.part)), *(["--dry-run"] if options.dry_run else [])]
    code = _ranks(options, "features", more)
    if code is not None:
        return code
    with preempt.listen():
        from mser_dist.jobs.features import encode_ahead
        from mser_dist.ranks import distributed

        encode_ahead(config, options.part, options.dry_run)
    distributed.shutdown()
    return 0


def _baseline(options: argparse.Namespace) -> None:
    from mser_dist.config.file import load_baseline

    config = load_baseline(options.config, options.on, options.words, options.only)
    from mser_dist.evaluation.baseline import baseline
    from mser_dist.evaluation.report import zero_shot_table

    tables.show(zero_shot_table(baseline(config)["zero_shot"]))
    print(f"table, predictions and plots: {config.out}   page: {config.out}/report.html")
    say_page(Path(config.out))


def _config(options: argparse.Namespace) -> None:
    from mser_dist import config
    from mser_dist.config import file as config_file

    if options.keys and options.config:
        raise UserError(f"--keys explains a kind of config, and {options.config!r} is one to print: give either")
    if options.keys:
        from mser_dist.config.fields import key_table

        cls = {
            "stage1": config.Stage1,
            "stage2": config.Stage2,
            "eval": config.Evaluation,
            "translate": config.TranslateConfig,
        }[options.keys]
        for key, kind, default, help in key_table(cls):
            print(f"{key} ({kind}) = {default}\n    {help}")
    elif options.config:
        resolved = config_file.load_any(options.config, options.words)
        print(config_file.to_yaml(resolved), end="")
    else:
        presets = sorted(config_file.PRESETS.glob("*.yaml"))
        rows = [[path.stem, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")] for path in presets]
        tables.show(tables.Table((), [rows], align="ll"))
