"""What a person sees of the steps: a progress bar, numbers in the log, clips that could not be read."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mser_dist.errors import UserError
from mser_dist.progress import Clock, bar
from mser_dist.ranks import distributed
from mser_dist.runs.tracking import Tracker
from mser_dist.stream.examples import Examples
from mser_dist.stream.steps import Step
from mser_dist.tables import count
from mser_dist.training.setup import Run
from mser_dist.training.telemetry import Telemetry
from mser_dist.training.timing import Trace


class StepLog:
    """The log of a training's steps: on the terminal, in log.jsonl and so in MLflow. `tracker` is rank 0's."""

    def __init__(self, run: Run, done: int, tracker: Tracker | None) -> None:
        self._run, self._done, self._tracker = run, done, tracker
        self._clock, self._telemetry, self._read = Clock(), Telemetry(run), done
        steps = run.config.train.profile_steps if run.world.is_main else []
        self._trace = Trace(steps, run.setup.out / "profile")
        title = f"stage {run.config.stage}"
        self._bar = bar(title=title, unit="step", total=run.total, initial=done, disable=not run.world.is_main)

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._trace.write(self._done)

    def waiting(self, batches: Iterator[Step]) -> Iterator[Step]:
        """The same batches; the time spent waiting for them is counted."""
        with closing(batches):  # type: ignore[type-var]
            for number in range(self._done + 1, self._run.total + 1):
                self._run.watchdog.tick(f"step {number}, data")
                with self._clock.waiting():
                    data = next(batches)
                self._clock.clips += data.clips
                self._trace.before(number)
                yield data

    def step(self, step: int, stats: dict[str, torch.Tensor], bad: set[int], data: Step) -> set[int]:
        """A step is done; its numbers are logged where they are due. Collective there.

        bad: the clips that could not be read, as the ranks agreed on the last time; returns those of now.
        """
        run, self._done = self._run, step
        self._trace.after(step)
        self._telemetry.step(data.batches)
        if step % run.config.train.log_every == 0 or step == run.total:
            own = self._telemetry.sums()
            means = _mean_over_ranks(stats | own, run.device)
            numbers = {name: means[name] for name in stats}
            seconds, rates = self._clock.read()  # behind the sum over the ranks, which has waited for the device
            numbers |= {**run.engine.rates, "grad_norm": run.engine.grad_norm, **rates}
            numbers |= self._telemetry.read({name: means[name] for name in own}, rates, seconds, step - self._read)
            self._read = step
            bad = bad_everywhere(data.bad, bad, run.examples, run.world.is_main)
            numbers |= {"bad_clips": float(len(bad)), "skipped_steps": float(run.engine.skipped_steps)}
            if self._tracker:
                finite = {f"train/{name}": value for name, value in numbers.items() if math.isfinite(value)}
                self._tracker.metrics(step, finite)
            self._bar.set_postfix(loss=f"{numbers['loss']:.3f}", refresh=False)
        self._bar.update()
        return bad

    def aside(self) -> AbstractContextManager[None]:
        """Around what is none of the steps' time, such as a validation."""
        return self._clock.aside()

    def validation(self, step: int, found: dict[str, float], best: bool) -> None:
        """The validation behind a step; whether none was better so far."""
        if self._tracker:
            numbers = {f"val/{name}": value for name, value in found.items()}
            self._tracker.metrics(step, numbers | ({"best/ua": found["ua"], "best/step": float(step)} if best else {}))

    def confusion(self, step: int, table: NDArray[np.int64]) -> None:
        """The (K, K) confusion of the validation behind a step, as a picture of MLflow's, where the run is tracked."""
        if self._tracker and self._run.config.tracking.enabled:
            from mser_dist.runs.plots import confusions

            path = self._run.setup.out / "validations" / f"confusion-{step:06d}.png"
            path.parent.mkdir(exist_ok=True)
            confusions({"validation": table}, list(self._run.stage.labels), f"step {step}", path)
            self._tracker.image(path, "val/confusion", step)


def bad_everywhere(own: frozenset[int], known: set[int], clips: Examples, is_main: bool) -> set[int]:
    """The clips that some rank could not read; rank 0 names those of other ranks, whose output may be hidden.

    Collective. Raises `UserError` where they are more than data.max_bad; a rank stops by itself at so many of its own.
    """
    everywhere = known.union(*distributed.gather(own))
    if is_main:
        for index in sorted(everywhere - known - own):
            distributed.warn(f"{clips.shards.where(index)}: could not be read by another rank")
    if len(everywhere) > clips.max_bad:
        raise UserError(
            f"{count(len(everywhere), 'clip')} could not be read on all ranks together, "
            f"more than data.max_bad={clips.max_bad}: "
            f"the last is {clips.shards.where(max(everywhere - known, default=max(everywhere)))}; mser verify lists all"
        )
    return everywhere


def _mean_over_ranks(stats: Mapping[str, Any], device: str) -> dict[str, float]:
    names = sorted(stats)
    *sums, ranks = distributed.all_sum([float(stats[name]) for name in names] + [1.0], device)
    return {name: value / ranks for name, value in zip(names, sums, strict=True)}
