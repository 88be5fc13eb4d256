"""``mser plan``: what a training will need and how long it will take, without a GPU."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mser_dist import tables
from mser_dist.cli.jobs import Verb
from mser_dist.errors import UserError

_HELP = """\
What a training will need, before a GPU is asked for: memory of a rank by part, of the host, of checkpoints and export,
bytes by collective, step time with an interval, GPU-hours, and the changes that would help most. DeepSpeed itself is
rehearsed on tensors without storage; shapes are needed, weights are not (mser_dist/planning/README.md: the formulas).

  mser plan whisper-large-v3_llama3-8b_stage2 --nodes 8 --gpus-per-node 8 --gpu h100 --link 400Gb --clips 200000
  mser plan my_stage2.yaml --nodes 64 --gpus-per-node 8 --gpu a100 --price 2.10 --plot plan.png --json plan.json
"""


def add_verbs(verb: Verb, config_words: Callable[[argparse.ArgumentParser], None]) -> None:
    """Register the verb."""
    sub = verb("plan", _plan, "say what a training will need and take, without a GPU", _HELP)
    config_words(sub)
    sub.add_argument("--nodes", type=int, default=1, help="(default: %(default)s)")
    sub.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(default: %(default)s)")
    sub.add_argument("--gpu", required=True, help="h100, a100, … (an unknown name lists them)")
    sub.add_argument("--link", metavar="RATE", help="of a GPU between nodes, e.g. 400Gb (default: by the GPU)")
    sub.add_argument(
        "--llm-shape", metavar="NAME", help="llama-3-8b, … or a folder with a config.json, for llm.pretrained"
    )
    sub.add_argument("--stage1", metavar="CONFIG", help="of the stage 1 that a stage 2 builds on, where it has not run")
    sub.add_argument("--clips", type=int, metavar="N", help="of an epoch (default: counted, where the sets are here)")
    sub.add_argument("--clip-seconds", type=float, metavar="S", help="mean length of a clip (default: counted, or 5)")
    sub.add_argument("--prompt-tokens", type=int, metavar="N", help="of an instruction (default: 34)")
    sub.add_argument("--price", type=float, metavar="P", help="of a GPU-hour, in any currency")
    sub.add_argument("--plot", type=Path, metavar="FILE", help="draw step time and memory against ranks")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write all of it to a file")


def _plan(options: argparse.Namespace) -> int:
    from mser_dist.config.file import load_training
    from mser_dist.planning.cluster import cluster_of

    config = load_training(options.config, options.words)
    cluster = cluster_of(options.nodes, options.gpus_per_node, options.gpu, options.link)
    if options.price is not None and not options.price > 0:
        raise UserError(f"--price {options.price:g}: what a GPU-hour costs is above 0")
    for path, option in ((options.plot, "--plot"), (options.json, "--json")):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{option} {path}: there is no folder {path.parent}: make it, or name another place")

    from mser_dist.planning import changes, report
    from mser_dist.planning.given import Given
    from mser_dist.planning.plan import look, plan

    given = Given.of(
        config,
        clips=options.clips,
        seconds=options.clip_seconds,
        prompt_tokens=options.prompt_tokens,
        llm_shape=options.llm_shape,
        stage1=options.stage1,
    )
    network = look(config, cluster, given)
    found = plan(config, cluster, given, network)
    better = changes.best(config, cluster, given, network, found)
    tables.show(*report.parts(found, better, options.price))
    if options.json:
        from mser_dist.files import write_json

        write_json(options.json, report.as_json(found, better, options.price))
        print(f"numbers: {options.json}")
    if options.plot:
        report.draw(report.against_ranks(config, cluster, given, network), found, options.plot)
        print(f"plot: {options.plot}")
    if found.fits:
        return 0
    over = f"{found.memory_sum / 2**30:.0f} GiB a GPU, and a {cluster.gpu.name} has {cluster.gpu.memory / 2**30:.0f}"
    remedy = (
        f"it would fit with {better[0].what}"
        if better
        else "take GPUs with more memory, more of them, or a smaller LLM"
    )
    raise UserError(f"the training does not fit: {over}: {remedy}")
