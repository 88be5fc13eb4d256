"""The one training loop of both stages. Start reading here: `RunState`, then `train_steps`, top to bottom.

Every rank runs the loop in step. These are the collectives of a step, in their order. Each is entered by all ranks or
by none, because what decides is the same on all of them: the config, the step, or what they agreed on just before.

1. data:      none; each rank's workers read its part of the plan.
2. step:      stage 1 gathers embeddings and sums the loss's parts, stage 2 sums the answer tokens; ZeRO gathers weights
              and reduces gradients; DeepSpeed sums the gradient's norm.
3. finite:    only after an update that was skipped: a vote, and a gather of what was in the step.
4. log:       each `train.log_every` steps: a sum of the telemetry, a gather of the clips that could not be read.
5. poll:      no collective: what rank 0 has decided of signals, time and saves is read from the store, behind the same
              step by all, at each step or every so many (`ranks.boundary`).
6. save:      a gather of bad clips, a digest of buffers, who writes where. What is written later is agreed on in 5;
              the last one is waited for, as in 9.
7. validate:  between two batches a poll as in 5; then sums: which labels were taken for which, and the losses at
              temperatures to choose from, twice.
8. save best: as 6, where 6 has not saved this step.
9. stop:      a gather that ends the saves under way.

A save comes before whatever can fail behind a step: a validation, export or plot that breaks leaves the checkpoint of
that step, and the same command goes on from it.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mser_dist import config as cfg
from mser_dist.config.chosen import chosen, command
from mser_dist.errors import Stopped
from mser_dist.evaluation.predict import validate
from mser_dist.files import write_text
from mser_dist.ranks import distributed, preempt
from mser_dist.runs import folder
from mser_dist.runs.tracking import COMMAND, tracked
from mser_dist.stream.plan import START, Position
from mser_dist.training import facts, ledgers
from mser_dist.training.best import out_of_patience, settle
from mser_dist.training.finish import finish
from mser_dist.training.setup import Run, load, look_ahead, started
from mser_dist.training.step_log import StepLog, bad_everywhere


@dataclass
class RunState:
    """What a run is between two steps: all that a checkpoint keeps beside weights, optimizer and random states."""

    step: int = 0  # optimizer steps done
    position: Position = START  # of the next step, in the order of the clips
    order: dict[str, Any] = field(default_factory=dict)  # what set, seed and batch the position counts in
    bad: set[int] = field(default_factory=set)  # clips that some rank could not read
    validation: dict[str, float] = field(default_factory=dict)  # the newest one
    validated: int = 0  # its step
    best_ua: float = -1.0  # of all validations
    skipped_in_a_row: int = 0  # steps that were not finite
    save_seconds: float = 0.0  # that the last save took
    bases: dict[str, Any] = field(default_factory=dict)  # frozen weights that the checkpoint does not hold
    total: int = 0  # steps of the whole run, as it was then; 0: unknown

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"position": list(self.position), "bad": sorted(self.bad)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunState":
        """The state that a checkpoint keeps; whether it may be used here was checked when it was loaded."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**known | {"position": Position(*known["position"]), "bad": set(known["bad"])})


def train(config: cfg.Stage1 | cfg.Stage2) -> dict[str, Any]:
    """Train a run to its end, from its newest checkpoint if it has one, and return its summary.

    Collective: every rank of the job calls it. Writes ``<out>/``: config.yaml, log.jsonl, curves.png, checkpoints/,
    export/ (the model) and summary.json. Raises `UserError` for what a user can mend, and `Stopped` when a signal or
    the end of the job's time stopped it and every rank has saved.
    """
    distributed.check_gpus()
    world = distributed.discover()
    if summary := folder.finished(Path(config.out), config):
        return summary
    with preempt.listen() as flag:
        setup = look_ahead(config, world)
        with started(setup):
            run = load(setup, flag)
            if world.is_main:
                facts.keep(run)
            ledgers.keep(config, setup.shards, setup.held_out)
            state = RunState.from_json(run.resumed) if run.resumed else RunState(order=run.order)
            state.total, state.bases = run.total, run.bases
            if noted := run.checkpoints.noted(state.step):  # validated behind the save, by the start before this one
                state.validation, state.validated = noted, state.step
                state.best_ua = max(state.best_ua, noted["ua"])
            if state.validated and state.validated not in run.checkpoints.notes:  # a checkpoint that was copied alone
                run.checkpoints.note(state.validated, state.validation)
            tags = {"mser.stage": str(config.stage), COMMAND: command(config, "train", world.world_size)}
            tags |= {f"mser.{name}": value for name, value in run.facts().items()}
            params, links = chosen(config), setup.links
            with tracked(config.tracking, setup.out, tags, params, world.is_main, links=links) as tracker:
                if tracker:
                    setup.watchdog.at_end = lambda: tracker.close("FAILED")
                    write_text(setup.out / "groups.txt", f"{run.groups()}\n")
                    tracker.artifact(setup.out / "groups.txt")
                    tracker.datasets(setup.datasets())
                with StepLog(run, state.step, tracker) as log:
                    train_steps(run, state, log)
                run.ended = settle(run, state)
                summary = finish(run, state.validation, tracker)
            distributed.barrier()
    return summary


def train_steps(run: Run, state: RunState, log: StepLog) -> None:
    """From the first step that is not done yet to the last. Raises `Stopped` between two of them."""
    validate_if_due(run, state, log)  # the last start ended before it, or in the middle of it
    run.boundary.poll()
    stop_if_asked(run, state)
    if out_of_patience(run, state):  # the last start ended before it had exported
        return
    for data in log.waiting(run.batches(state.step, state.position, state.bad)):
        # Forward and backward, step.
        run.watchdog.tick(f"step {state.step + 1}")
        stats, losses = run.stage.step(run.engine, data.batches, state.step / max(1, run.total - 1))
        state.step, state.position = state.step + 1, data.after
        # Not finite: no rank changes a byte, too many in a row end the run.
        skipped = state.skipped_in_a_row
        state.skipped_in_a_row = run.not_finite.settle(run.engine, state.step, skipped, losses, data.batches)
        # Log.
        state.bad = log.step(state.step, stats, state.bad, data)
        # Save, before whatever can fail.
        run.boundary.poll()
        if save_due(run, state):
            save(run, state, data.bad)
        if state.step == run.total:  # it is written behind the next steps, and there is none
            run.watchdog.tick("the last save")
            run.checkpoints.finish()
        # Validate; save the best, and what a stop in the middle of it would lose.
        best = validate_if_due(run, state, log)
        over = out_of_patience(run, state)
        if run.saved != state.step and (run.boundary.stop or over or (best and run.config.train.save_best)):
            save(run, state, data.bad)
        # Stop, where a rank was asked to. Behind the last step there is nothing left to stop.
        if state.step < run.total or validation_due(run, state):
            stop_if_asked(run, state)
        if over:
            break
    run.watchdog.tick("the last save")
    run.checkpoints.finish()


def save_due(run: Run, state: RunState) -> bool:
    """Whether a checkpoint is due behind this step, whatever a validation says."""
    every = run.config.train.save_every
    by_steps = state.step == run.total or bool(every and state.step % every == 0)
    return by_steps or run.boundary.save_due or run.boundary.stop is not None


def save(run: Run, state: RunState, bad: frozenset[int]) -> None:
    """Begin a checkpoint of this step; `bad` are the clips that this rank could not read so far. Collective."""
    run.watchdog.tick(f"step {state.step}, saving")
    state.bad = bad_everywhere(bad, state.bad, run.examples, run.world.is_main)
    state.save_seconds = run.checkpoints.seconds
    run.checkpoints.save(state.step, run.engine, state.to_json())
    run.boundary.saved()
    run.saved = state.step


def validation_due(run: Run, state: RunState) -> bool:
    """Whether the config asks for a validation behind this step, and it was not done."""
    every = run.config.train.val_every
    due = state.step == run.total or bool(every and state.step and state.step % every == 0)
    return run.validation is not None and due and state.validated != state.step


def validate_if_due(run: Run, state: RunState, log: StepLog) -> bool:
    """Whether this step was validated, and is the best so far. A stop that ranks agree on ends it. Collective."""
    if run.boundary.stop or not validation_due(run, state):
        return False

    def go_on() -> bool:
        run.watchdog.tick("validating")
        run.boundary.poll()
        return run.boundary.stop is None

    assert run.validation is not None
    batch, workers = max(run.micro, 8), run.config.data.workers
    run.boundary.soon()
    with log.aside(), run.engine.averaged():
        measured = validate(run.stage, run.validation, batch, workers, run.world, run.device, go_on)
    run.boundary.soon()
    if measured is None:
        return False
    found = measured.numbers
    best = found["ua"] > state.best_ua
    state.validation, state.validated, state.best_ua = found, state.step, max(state.best_ua, found["ua"])
    run.checkpoints.note(state.step, found)
    log.validation(state.step, found, found["ua"] == state.best_ua)  # of equal ones the last is exported
    log.confusion(state.step, measured.metrics.confusion)
    return best


def stop_if_asked(run: Run, state: RunState) -> None:
    """Raise `Stopped` where the ranks have agreed to stop, once every save is on the disk. Collective."""
    if run.boundary.stop:
        run.checkpoints.finish()
        raise Stopped(run.boundary.stop, state.step)
