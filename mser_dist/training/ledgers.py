"""The ledger of a training: its own clips, and what the runs heard that it builds on."""

from pathlib import Path

from mser_dist import config as cfg
from mser_dist.errors import UserError
from mser_dist.files import read_json
from mser_dist.models import exported, initial
from mser_dist.models.heard import ledger_of, ledger_of_run
from mser_dist.ranks import distributed
from mser_dist.runs import folder
from mser_dist.shards.ledger import FILE, TRAINING, VALIDATION, Ledger, Part, part_of
from mser_dist.shards.shard_set import ShardSet
from mser_dist.state import fork


def keep(config: cfg.Stage1 | cfg.Stage2, shards: ShardSet, held_out: ShardSet | None) -> None:
    """Write the ledger of a training into its run folder, on rank 0. Collective.

    One that is there is kept once there is a checkpoint, which is of the same clips: what the run was forked from may
    be gone by now. Raises `UserError`, on every rank, for a damaged ledger of a run that it builds on.
    """
    problem = None
    if distributed.discover().is_main:
        try:
            _keep(config, shards, held_out)
        except UserError as error:
            problem = str(error)
    if problem := distributed.agree(problem):
        raise UserError(problem)


def _keep(config: cfg.Stage1 | cfg.Stage2, shards: ShardSet, held_out: ShardSet | None) -> None:
    out = Path(config.out)
    if folder.steps_done(out) and (out / FILE).is_file():
        try:
            Ledger.load(out / FILE)
            return
        except UserError as error:
            distributed.warn(f"{error}: it is written anew")
    sets = [(shards, TRAINING), *([(held_out, VALIDATION)] if held_out else [])]
    own = tuple(part_of(clips, out.resolve().name, config.stage, use) for clips, use in sets)
    before = _before(config)
    heard = before[0].encoder if before else None
    if isinstance(config, cfg.Stage1) and not config.init_from:
        heard = config.encoder.pretrained or ""
    Ledger(own, heard).with_those_of(before).save(out / FILE)


def _before(config: cfg.Stage1 | cfg.Stage2) -> list[Ledger]:
    """Those of the runs that a training builds on, that which brings the encoder first."""
    found = []
    if isinstance(config, cfg.Stage2):
        begin = initial.find(config)
        exports = [begin.speech, exported.find(config.stage1, stage=1)]
        found = [ledger_of(export) for export in dict.fromkeys(exports)]
        if begin.adapter and not begin.run:  # of peft's, from anywhere
            export = begin.adapter.resolve().parent
            of_a_run = (export / "card.json").is_file()
            nobody_knows = Part(begin.adapter.name, 2, TRAINING, [], [], [], known=False)
            found.append(ledger_of(export) if of_a_run else Ledger((nobody_knows,)))
        if (whole := Path(config.llm.pretrained or "").resolve().parent / "card.json").is_file():
            found.append(ledger_of(whole.parent))  # the LLM of another run's export
    elif config.init_from:
        found = [ledger_of(exported.find(config.init_from, 1, "init_from"))]
    if config.train.fork:
        run = fork.run_of(config.train.fork)
        facts = run / "facts.json"
        found.append(ledger_of_run(run, read_json(facts) if facts.is_file() else {"stage": config.stage}))
    return found
