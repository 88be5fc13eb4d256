"""The verbs of the ``mser`` command that give a model away: export, push."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mser_dist.cli.jobs import Verb
from mser_dist.errors import UserError

_EXPORT_HELP = """\
Write the model of a run to a folder: of its last checkpoint, of the best one, or of any that is kept; the run may be
unfinished. A run that has ended has its model in export/ already.

  mser export runs/demo/stage2 models/demo --best
  mser export runs/lora models/merged --merge

OUT has a README.md that a hub shows, the LLM as an ordinary Hugging Face folder in llm/ (adapters as peft's), and the
rest as safetensors with card.json. Before it is published it has to answer as the trained model does.
"""
_PUSH_HELP = """\
Upload an export to a model hub, by huggingface_hub: log in by `hf auth login` or HF_TOKEN first.

  mser push models/demo somebody/emotions --private
"""


def add_verbs(verb: Verb, config_words: Callable[[argparse.ArgumentParser], None]) -> None:
    """Register the verbs, none of which takes a config."""
    export = verb("export", _export, "write the model of a run, or of one of its steps, to a folder", _EXPORT_HELP)
    export.add_argument("folder", type=Path, metavar="RUN", help="run folder of a training")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to make; an export there is replaced")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="of this step (default: the last one that is kept)")
    which.add_argument("--best", action="store_true", help="of the step with the highest UA in validation")
    export.add_argument("--merge", action="store_true", help="make adapters a part of the LLM")
    export.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="size of a file of weights (default: %(default)g)"
    )

    push = verb("push", _push, "upload an export to a model hub", _PUSH_HELP)
    push.add_argument("export", metavar="EXPORT", help="an export, or a run that has one")
    push.add_argument("name", metavar="NAME", help="OWNER/MODEL on the hub")
    push.add_argument("--private", action="store_true", help="nobody else may see it")


def _export(options: argparse.Namespace) -> None:
    if not options.shard_gb > 0:
        raise UserError(f"--shard-gb must be above 0, not {options.shard_gb:g}")
    if not (options.folder / "config.yaml").is_file():
        raise UserError(f"{options.folder} is no run folder: it has no config.yaml")
    from mser_dist.training.export import export

    size = round(options.shard_gb * 1e9)
    found = export(
        options.folder, options.out, step=options.step, best=options.best, merge=options.merge, shard_bytes=size
    )
    said = ", ".join(f"{name} {value:.3f}" for name, value in found["validation"].items())
    print(f"{found['out']}: step {found['step']}{f' (validation: {said})' if said else ''}, which answers as trained")


def _push(options: argparse.Namespace) -> None:
    from mser_dist.models.push import push
    from mser_dist.prediction.locate import find_export

    print(push(find_export(options.export), options.name, options.private))
