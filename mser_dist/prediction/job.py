"""`mser predict`: many recordings, one after the other; what cannot be read is left out; a stop loses nothing."""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mser_dist.errors import UserError
from mser_dist.files import file_sha256
from mser_dist.prediction import outputs
from mser_dist.prediction.model import Model, Piece, Prediction, gathered
from mser_dist.prediction.partial import Partial
from mser_dist.prediction.recordings import Recording
from mser_dist.prediction.windows import Windows
from mser_dist.progress import bar

_THREADS, _AHEAD = 2, 4  # that decode, and recordings that are decoded before they are asked for
_ADAPTS_TO = 2000  # windows: the mean of so many is known to 2 % of their spread


@dataclass(frozen=True)
class Result:
    """A recording's prediction, or why it was left out."""

    recording: str
    prediction: Prediction | None
    error: str = ""


@dataclass(frozen=True)
class Asked:
    """What is asked of a model about each recording."""

    labels: list[str]
    windows: Windows
    adapt: bool = False
    batch: int = 8


def predict(model: Model, recordings: Sequence[Recording], asked: Asked, files: Sequence[Path] = ()) -> list[Result]:
    """Every recording's result, in order, and the `files` (``outputs.write``) that hold them.

    Where files are asked for, what is known is kept beside the first one, and a command that was stopped goes on from
    there. Raises `UserError` where not one recording can be read.
    """
    for file in files:
        outputs.check(file)
    if asked.adapt:
        model.check_adaptable()
    with Partial.beside(files[0] if files else None, _identity(model, recordings, asked)) as partial:
        if asked.adapt:
            _adapt(model, recordings, asked)
        found = _heard(model, recordings, asked, partial)
        if recordings and not any(result.prediction for result in found):
            raise UserError(
                f"none of the recordings ({len(found)}) can be read: {found[0].recording}: {found[0].error}: name "
                "audio files"
            )
        for file in files:
            outputs.write(file, found, asked.labels)
        partial.remove()
    return found


def _identity(model: Model, recordings: Sequence[Recording], asked: Asked) -> dict[str, Any]:
    """All that a window's probabilities depend on beside the recording."""
    known: dict[str, Any] = {
        "model": file_sha256(model.export / "card.json"),
        "dtype": str(next(model.network.parameters()).dtype),
        "labels": asked.labels,
        "window": asked.windows.window,
        "hop": asked.windows.hop,
    }
    if asked.adapt:
        names = "\n".join(f"{one.name} {one.size}" for one in recordings)
        known["adapted"] = hashlib.sha256(names.encode("utf-8", "replace")).hexdigest()
    return known


def _adapt(model: Model, recordings: Sequence[Recording], asked: Asked) -> None:
    """Listen to the recordings once, to know how they sound on the whole; to some of many."""
    some = sorted(np.random.default_rng(0).permutation(len(recordings))[:_ADAPTS_TO])

    def pieces() -> Iterator[Piece]:
        chosen = [recordings[i] for i in some]
        for wave in bar(_decoded(chosen), title="adapt", unit="recording", total=len(chosen), leave=False):
            if not isinstance(wave, str):
                yield from (Piece(wave[begin:end]) for begin, end in asked.windows.cut(len(wave)))

    model.adapt_to(pieces(), batch=asked.batch)


def _heard(model: Model, recordings: Sequence[Recording], asked: Asked, partial: Partial) -> list[Result]:
    errors: dict[str, str] = {}
    under_way: deque[tuple[Recording, int, tuple[int, int]]] = deque()  # pieces asked for and not answered
    rest = [one for one in recordings if not partial.whole(one)]

    def pieces() -> Iterator[Piece]:
        for recording, wave in zip(rest, _decoded(rest), strict=True):
            if isinstance(wave, str):
                errors[recording.name] = wave
                shown.update()
                continue
            cut = asked.windows.cut(len(wave))
            partial.begin(recording, len(wave), cut)
            for place in partial.missing(recording):
                under_way.append((recording, len(wave), place))
                yield Piece(wave[slice(*place)], recording.corpus)

    with bar(title="predict", unit="recording", total=len(recordings), initial=len(recordings) - len(rest)) as shown:
        for rows in model.probabilities(pieces(), asked.labels, asked.batch):
            for row in rows:
                recording, _, place = under_way.popleft()
                partial.add(recording, place, row)
                if partial.whole(recording):
                    shown.update()
    return [_result(recording, partial, errors, asked) for recording in recordings]


def _result(recording: Recording, partial: Partial, errors: dict[str, str], asked: Asked) -> Result:
    if recording.name in errors:
        return Result(recording.name, None, errors[recording.name])
    samples, places, rows = partial.of(recording)
    return Result(recording.name, gathered(places, rows, asked.labels, samples))


def _decoded(recordings: Sequence[Recording]) -> Iterator[NDArray[np.float32] | str]:
    """The waveform of each, or what is wrong with it; decoded ahead by threads."""

    def read(recording: Recording) -> NDArray[np.float32] | str:
        try:
            return recording.read()
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[Future[NDArray[np.float32] | str]] = deque()
        try:
            for recording in recordings:
                waiting.append(pool.submit(read, recording))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
