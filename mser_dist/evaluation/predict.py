"""Every clip of a set through a scorer once, shared out over the ranks: for an evaluation, or for a validation."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mser_dist.errors import UserError
from mser_dist.evaluation.calibration import Likelihood, fit_temperature
from mser_dist.evaluation.metrics import Metrics, of_confusion
from mser_dist.evaluation.parts import Parts
from mser_dist.progress import bar
from mser_dist.ranks import distributed
from mser_dist.stream import steps
from mser_dist.stream.examples import Examples, pad_speech
from mser_dist.tables import count


class Batch(NamedTuple):
    """What a scorer makes of the clips of a batch that could be read."""

    number: int  # of the pass, the same whatever the ranks are
    clips: NDArray[np.int64]  # (B,) their numbers in the set
    found: dict[str, NDArray[Any]]  # (B, …) each: "scores" (B, K), and what else the scorer tells


def scored(
    scorer: Any,
    clips: Examples,
    batch: int,
    workers: int,
    world: distributed.World,
    device: str,
    title: str,
    before_each: Callable[[], object],
    leave: bool = True,
    done: Collection[int] = (),
) -> Iterator[Batch | None]:
    """This rank's batches of the pass but those that are `done`; None for one that only keeps step with other ranks.

    Collective when there is a process group: all ranks run equally many forward passes. `before_each` may raise, and
    has to do so on all of them.
    """
    rounds, batches = steps.one_pass(clips, batch, world.rank, world.world_size, pad_speech, workers, done)
    for number, indices, inputs in bar(
        batches, title=title, unit="batch", total=rounds, disable=not world.is_main, leave=leave
    ):
        before_each()
        prepared = scorer.model.speech.prepared(clips.grouped(inputs), device)
        found = {name: values.cpu() for name, values in scorer(prepared).items()}
        real = indices >= 0  # not what fills a batch up, nor what could not be read
        if len(wrong := indices[real & ~np.isfinite(found["scores"].numpy()).all(1)]):
            raise UserError(
                f"{title}: the scores of {clips.shards.where(int(wrong[0]))} are not numbers: with a 16-bit dtype take "
                "float32; otherwise the model is damaged"
            )
        if number is None:
            yield None
        else:
            yield Batch(number, indices[real], {name: np.asarray(values)[real] for name, values in found.items()})


def predict(
    scorer: Any,
    clips: Examples,
    batch: int,
    workers: int,
    world: distributed.World,
    device: str,
    title: str,
    parts: Parts,
    before_each: Callable[[], object],
) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]] | None:
    """Score every clip once: (n,) clip numbers in order, and n rows of what the scorer tells; None but on rank 0.

    What a rank has found it keeps in `parts`, so that a pass that was stopped goes on there, on as many ranks as may
    be. `before_each`: as in `scored`. Collective.
    """
    whole = steps.batch_count(clips, batch)
    done = parts.done()
    if len(done) and world.is_main:
        print(f"{title}: {len(done)} of {whole} batches were done before", flush=True)
    with parts.writing():
        for made in scored(scorer, clips, batch, workers, world, device, title, before_each, done=done):
            if made is not None:
                parts.add(*made)
    distributed.barrier()
    problem, found = None, None
    if world.is_main:
        try:
            numbers, columns = parts.read(whole)
            _check_found(clips, np.isin(np.arange(len(clips)), numbers))
            found = numbers, columns
        except UserError as error:
            problem = str(error)
    if problem := distributed.agree(problem):
        raise UserError(problem)
    return found


def _check_found(clips: Examples, read: NDArray[np.bool_]) -> None:
    """Raise `UserError` where more clips could not be read than `clips.max_bad`, or none could. read: (n,)."""
    lost = np.flatnonzero(~read)
    if len(lost) > clips.max_bad or len(lost) == len(clips):
        raise UserError(
            f"{count(len(lost), 'clip')} could not be read on all ranks together, more than "
            f"data.max_bad={clips.max_bad}: the first is {clips.shards.where(int(lost[0]))}; mser verify lists all of "
            "them"
        )


class _Ended(Exception):
    """A validation that was ended."""


class Validation(NamedTuple):
    """What a model makes of the validation split; temperature: of `calibration`, where one can be fitted."""

    metrics: Metrics
    temperature: float | None

    @property
    def numbers(self) -> dict[str, float]:
        """UA, WA, macro-F1 and, where there is one, the temperature."""
        m = self.metrics
        found = {"ua": m.ua, "wa": m.wa, "macro_f1": m.macro_f1}
        return found if self.temperature is None else found | {"temperature": self.temperature}


def validate(
    stage: Any,
    clips: Examples,
    batch: int,
    workers: int,
    world: distributed.World,
    device: str,
    go_on: Callable[[], bool],
) -> Validation | None:
    """What is measured on the validation split; None where `go_on` ended it. Collective.

    `go_on` is asked before each forward pass, and has to say the same on all ranks. Of the clips nothing is gathered
    but how many of a label were taken for which, and the sums of their losses at some temperatures.
    """
    read = np.zeros(len(clips), dtype=bool)  # by this rank
    scores = np.zeros((len(clips), len(stage.labels)), dtype=np.float32)  # of those
    confusion = np.zeros((len(stage.labels), len(stage.labels)))

    def before_each() -> None:
        if not go_on():
            raise _Ended

    stage.model.eval()
    scorer = stage.scorer()
    try:
        for made in scored(scorer, clips, batch, workers, world, device, "validate", before_each, False):
            if made is not None:
                np.add.at(confusion, (clips.label[made.clips], made.found["scores"].argmax(1)), 1)
                read[made.clips] = True
                scores[made.clips] = made.found["scores"]
        scale = scorer.scale()
    except _Ended:
        return None
    finally:
        stage.model.train()
    confusion = np.array(distributed.all_sum(confusion.ravel().tolist())).reshape(confusion.shape)
    if int(confusion.sum()) < len(clips):  # on every rank, or none
        _check_found(clips, np.array(distributed.most(read.astype(int).tolist()), dtype=bool))
    loss = Likelihood(scores[read] * scale, clips.label[read])
    temperature = fit_temperature(lambda tried: np.array(distributed.all_sum(loss(tried).tolist())))
    return Validation(of_confusion(confusion.astype(np.int64)), temperature)
